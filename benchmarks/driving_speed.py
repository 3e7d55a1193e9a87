"""How many steps of a driving world a second: RouteDriving, eager and compiled, and highway-env.

Random actions, drawn beforehand; all that a step does is in it (lights, comfort, rewards, costs, scores,
resets, observations). One torch thread. Variants are warmed up and measured in turns, and rates are steps a
second of the process's own time, which other processes on the machine do not slow; medians. highway-env
runs with as many vehicles as RouteDriving has (24), and its rate counts its own policy steps.

    python benchmarks/driving_speed.py [--repeats 3] [--seconds 4] [--sizes 64 256 1024 4096]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from _common import RESULTS, save

from saferl.envs.driving.env import RouteDrivingVectorEnv, load_bank

NAME = "driving_speed"
HIGHWAY = {
    "highway-v0": {"vehicles_count": 24},
    "intersection-v0": {"initial_vehicle_count": 24},
    "racetrack-v0": {"other_vehicles": 24},
}
PEOPLE = {"vehicles": 24, "pedestrians": 8, "parked": 8}


def stepper(env: RouteDrivingVectorEnv) -> Callable[[float], tuple[float, int]]:
    """A function that steps for some seconds; steps a CPU-second, and how many."""
    generator = np.random.default_rng(0)
    # Forward rather than in circles: drives should end as they do in training.
    actions = [
        (generator.uniform(-1, 1, (env.num_envs, 2)) * [1.0, 0.2] + [0.4, 0.0]).astype(np.float32)
        for _ in range(16)
    ]
    on_gpu = env.torch_device is not None
    given = [torch.from_numpy(a).to(env.device) for a in actions] if on_gpu else actions
    env.reset(seed=0)
    counter = iter(range(10**12))

    def measure(seconds: float) -> tuple[float, int]:
        count, began, clock = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - began < seconds:
            obs, rewards, *_ = env.step(given[next(counter) % 16])
            count += 1
        if on_gpu:
            torch.cuda.synchronize()
        spent = time.perf_counter() - began if on_gpu else time.process_time() - clock
        rows = list(obs.values()) if isinstance(obs, dict) else [obs]
        assert all(bool(np.isfinite(np.asarray(torch.as_tensor(r).cpu())).all()) for r in (*rows, rewards))
        return count * env.num_envs / spent, count * env.num_envs

    return measure


def highway(name: str, config: dict[str, Any]) -> Callable[[float], tuple[float, int]]:
    import gymnasium
    import highway_env  # noqa: F401

    env = gymnasium.make(name, config=config)
    env.reset(seed=0)
    env.action_space.seed(0)

    def measure(seconds: float) -> tuple[float, int]:
        count, began, clock = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - began < seconds:
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            if terminated or truncated:
                env.reset()
            count += 1
        return count / (time.process_time() - clock), count

    return measure


def variants(
    sizes: list[int], pictures: bool
) -> Iterator[tuple[str, int, Callable[[float], tuple[float, int]]]]:
    bank = load_bank(route_length=300.0)
    common: dict[str, Any] = {"bank": bank, **PEOPLE}
    for size in sizes:
        yield "vector, eager", size, stepper(RouteDrivingVectorEnv(size, **common))
    for size in sizes:
        yield "vector, compiled", size, stepper(RouteDrivingVectorEnv(size, compiled=True, **common))
    if pictures:
        for side, per_metre, size in ((64, 0.75, 256), (96, 1.0, 128), (256, 2.0, 32)):
            env = RouteDrivingVectorEnv(size, observation="bev", picture=side, per_metre=per_metre, **common)
            yield f"picture {side}, eager", size, stepper(env)
    if torch.cuda.is_available():
        for size in (1024, 4096, 16384):
            for compiled in (False, True):
                env = RouteDrivingVectorEnv(size, device="cuda", compiled=compiled, **common)
                yield f"vector, CUDA, {'compiled' if compiled else 'eager'}", size, stepper(env)
        env = RouteDrivingVectorEnv(512, device="cuda", observation="bev", **common)
        yield "picture 256, CUDA, eager", 512, stepper(env)


def figure(rate: float) -> str:
    """A rate to three digits."""
    return f"{rate:.3g}" if rate < 100 else f"{round(rate, 2 - int(math.log10(rate))):,.0f}"


def table(rows: list[dict[str, Any]], repeats: int, total: int) -> str:
    slowest = {
        r["variant"]: statistics.median(r["rates"]) for r in rows if r["variant"].startswith("highway-env")
    }
    best = max(
        (statistics.median(r["rates"]) for r in rows if r["variant"].startswith("vector, compiled")),
        default=0.0,
    )
    lines = ["| variant | worlds | steps a CPU-second | range |", "| --- | ---: | ---: | --- |"]
    for row in rows:
        middle, low, high = statistics.median(row["rates"]), min(row["rates"]), max(row["rates"])
        lines.append(
            f"| {row['variant']} | {row['size']:,} | {figure(middle)} | {figure(low)} to {figure(high)} |"
        )
    said = [f"{name.removeprefix('highway-env ')} {best / rate:,.0f}" for name, rate in slowest.items()]
    text = "\n".join(lines)
    text += f"\n\nMedians of {repeats} turns; {total:,} steps of ours in all, every number finite."
    if said:
        text += f" The fastest of ours, in steps of highway-env's environments: {', '.join(said)} times."
    return text + ("" if torch.cuda.is_available() else " There was no CUDA device.")


def draw(rows: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    picture = Figure(figsize=(6, 3.6), layout="constrained")
    axis = picture.subplots()
    for label in dict.fromkeys(r["variant"] for r in rows if r["variant"].startswith("vector")):
        found = [r for r in rows if r["variant"] == label]
        axis.plot(
            [r["size"] for r in found], [statistics.median(r["rates"]) for r in found], "o-", label=label
        )
    sizes = sorted({r["size"] for r in rows if r["variant"].startswith("vector")})
    for row in rows:
        if row["variant"].startswith("highway-env"):
            rate = statistics.median(row["rates"])
            axis.axhline(rate, ls="--", lw=1, color="#777777")
            axis.text(sizes[0], rate, row["variant"], fontsize=7, va="bottom")
    axis.set(xscale="log", yscale="log", xlabel="worlds", ylabel="steps a CPU-second")
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    picture.savefig(RESULTS / f"{NAME}.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--no-pictures", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    made = list(variants(asked.sizes, not asked.no_pictures))
    for name, config in HIGHWAY.items():
        made.append((f"highway-env {name}", 1, highway(name, config)))
    for label, size, measure in made:
        began = time.perf_counter()
        measure(0.5)
        print(f"{label}, {size}: warm after {time.perf_counter() - began:.0f} s", flush=True)
    rates: list[list[float]] = [[] for _ in made]
    total = 0
    for _ in range(asked.repeats):
        for kept, (label, _, measure) in zip(rates, made, strict=True):
            rate, count = measure(asked.seconds)
            kept.append(rate)
            total += count if not label.startswith("highway-env") else 0
    rows = [
        {"variant": label, "size": size, "rates": kept}
        for kept, (label, size, _) in zip(rates, made, strict=True)
    ]
    draw(rows)
    save(NAME, {"rows": rows, "steps": total}, table(rows, asked.repeats, total))


if __name__ == "__main__":
    main()
