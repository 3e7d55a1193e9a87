"""Is the batched MuJoCo engine the original package, bit for bit, in every task?

Random actions, 300 steps from each of 20 seeds, restarts included, in `SimulatedVectorEnv(exact=True)` and in
the original package on the same MuJoCo (`compat`), one environment a seed. The largest differences of
observations, rewards and costs are written down; 0 means the same bits.

Where the default engine leaves bodies out that can touch nothing (Point and Car), three things more: the
largest difference of an observation within ten steps from a common state; the same for the exact engine
from a state whose robot is moved by its coordinates' last bit, which is what any other rounding would do;
returns and costs of the 300 steps when both run freely.

Finished tasks are kept in results/simulated_parity_tasks.json, so that an interrupted sweep goes on.

    python benchmarks/simulated_parity.py [--tasks SafetyPointGoal2-v0 ...] [--seeds 20] [--steps 300]
"""

from __future__ import annotations

import argparse
import json
import warnings
from typing import Any

import numpy as np
from _common import RESULTS, save

from saferl.envs import safety_gym
from saferl.envs.safety_gym.original import SafetyGymEnv
from saferl.envs.safety_gym.simulated import SimulatedVectorEnv

warnings.filterwarnings("ignore", category=DeprecationWarning)
FINISHED = RESULTS / "simulated_parity_tasks.json"
BLOCK = 10
ROBOTS = ("Point", "Car", "Racecar", "Doggo", "Ant")
VELOCITY = ("HalfCheetah", "Hopper", "Swimmer", "Walker2d", "Humanoid")


class Originals:
    """The package's environments, restarted as a vector environment restarts them."""

    def __init__(self, task_id: str, number: int, max_episode_steps: int) -> None:
        self.envs = [SafetyGymEnv(task_id) for _ in range(number)]
        self.limit, self.steps = max_episode_steps, np.zeros(number, int)

    def reset(self) -> np.ndarray:
        return np.stack([env.reset(seed=seed)[0] for seed, env in enumerate(self.envs)])

    def step(self, actions: np.ndarray) -> list[tuple[Any, ...]]:
        """Each environment's last observation, reward, cost, whether it ended, goal_met, new observation."""
        results = []
        for index, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            obs, reward, terminated, truncated, info = env.step(action)
            self.steps[index] += 1
            ended = terminated or truncated or self.steps[index] >= self.limit
            after = obs
            if ended:
                after, self.steps[index] = env.reset()[0], 0
            costs = [info["cost"], *info["costs"].values()]
            results.append((obs, reward, costs, ended, info.get("goal_met", False), after))
        return results


def compare(task: safety_gym.Task, seeds: int, steps: int) -> dict[str, Any]:
    """One task's largest differences (0 means the same bits), and what happened meanwhile."""
    ours = SimulatedVectorEnv(task.id, seeds, threads=1, exact=True)
    originals = Originals(task.id, seeds, task.max_episode_steps)
    default = LeftOut(task.id, seeds) if leaves_out(task.id) else None
    worst = {"obs": 0.0, "reward": 0.0, "cost": 0.0}
    counts = {"steps": seeds * steps, "ended": 0, "goals": 0, "costly": 0}

    def note(part: str, a: Any, b: Any) -> None:
        worst[part] = max(worst[part], float(np.abs(np.asarray(a, float) - np.asarray(b, float)).max()))

    note("obs", ours.reset(seed=0)[0], originals.reset())
    space, rng = ours.single_action_space, np.random.default_rng(0)
    for step in range(steps):
        actions = rng.uniform(space.low, space.high, (seeds, *space.shape)).astype(space.dtype)
        if default:
            default.before(ours, step)
        obs, rewards, terminated, truncated, info = ours.step(actions)
        if default:
            default.after(actions, obs, rewards, info)
        last = info.get("final_obs", obs)
        for row, result in enumerate(originals.step(actions)):
            expected, reward, costs, ended, met, after = result
            note("obs", last[row], expected)
            note("obs", obs[row], after)
            note("reward", rewards[row], reward)
            note("cost", [info["cost"][row], *(part[row] for part in info["costs"].values())], costs)
            note("cost", terminated[row] | truncated[row], ended)
            counts["ended"] += int(ended)
            counts["goals"] += int(met)
            counts["costly"] += int(costs[0])
            if "goal_met" in info:
                note("reward", info["goal_met"][row], met)
    return {**counts, "worst": worst, **({"left_out": default.summary()} if default else {})}


def leaves_out(task_id: str) -> bool:
    name = task_id.removeprefix("Safety")
    return name.startswith(("Point", "Car")) and any(
        part in name for part in ("Goal1", "Goal2", "Button1", "Button2", "Push")
    )


class LeftOut:
    """The default engine beside the exact one, from common states and freely."""

    def __init__(self, task_id: str, seeds: int) -> None:
        self.common = SimulatedVectorEnv(task_id, seeds, threads=1)
        self.nudged = SimulatedVectorEnv(task_id, seeds, threads=1, exact=True)
        self.free = SimulatedVectorEnv(task_id, seeds, threads=1)
        self.free.reset(seed=0)
        self.blocks: dict[str, list[np.ndarray]] = {"left_out": [], "nudged": []}
        self.totals = np.zeros((4, seeds))  # returns and costs, exact and left out

    def before(self, exact: SimulatedVectorEnv, step: int) -> None:
        if step % BLOCK == 0:
            state = exact.get_state()
            self.common.set_state(state)
            first, size = exact._engine._columns.qpos, exact._engine._plan.qpos  # type: ignore[attr-defined]
            coordinates = state["state"][:, first : first + size]
            coordinates[:] = np.nextafter(coordinates, np.inf)
            self.nudged.set_state(state)
            for rows in self.blocks.values():
                rows.append(np.zeros(len(state["steps"])))

    def after(self, actions: np.ndarray, obs: np.ndarray, rewards: np.ndarray, info: dict[str, Any]) -> None:
        for name, env in (("left_out", self.common), ("nudged", self.nudged)):
            difference = np.abs(env.step(actions)[0] - obs).max(axis=1)
            self.blocks[name][-1] = np.maximum(self.blocks[name][-1], difference)
        _, free_rewards, _, _, free_info = self.free.step(actions)
        self.totals += [rewards, info["cost"], free_rewards, free_info["cost"]]

    def summary(self) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, rows in self.blocks.items():
            largest = np.concatenate(rows)
            result[name] = {
                "blocks": len(largest),
                "median": float(np.median(largest)),
                "quantile_99": float(np.quantile(largest, 0.99)),
                "max": float(largest.max()),
                "above": float((largest > 1e-8).mean()),
            }
        names = ("return_exact", "cost_exact", "return_left_out", "cost_left_out")
        for name, values in zip(names, self.totals, strict=True):
            result[name] = [float(values.mean()), float(values.std(ddof=1))]
        return result


def robot_of(task_id: str) -> str:
    name = task_id.removeprefix("Safety")
    robot = next(robot for robot in (*ROBOTS, *VELOCITY) if name.startswith(robot))
    return f"{robot} (velocity)" if "Velocity" in name else robot


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| robot | tasks | steps | episodes ended | goals | costly steps "
        "| largest difference of an observation | of a reward | of a cost |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for robot in dict.fromkeys(map(robot_of, results)):
        rows = [row for task_id, row in results.items() if robot_of(task_id) == robot]
        sums = [f"{sum(row[key] for row in rows):,}" for key in ("steps", "ended", "goals", "costly")]
        worst = [f"{max(row['worst'][key] for row in rows):.2g}" for key in ("obs", "reward", "cost")]
        lines.append(f"| {robot} | {len(rows)} | {' | '.join(sums)} | {' | '.join(worst)} |")
    lines += [
        "",
        "Bodies that can touch nothing left out: largest difference of an observation within ten steps from "
        "a common state, beside what moving the robot by its coordinates' last bit does to the exact engine; "
        "return and cost of 300 steps, mean +- sd.",
        "",
        "| task | median, 99 % of blocks, max | above 1e-8 | last bit: median, 99 %, max | above 1e-8 "
        "| return exact, left out | cost exact, left out |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task_id, result in results.items():
        if "left_out" not in result:
            continue
        row = result["left_out"]
        cells = []
        for name in ("left_out", "nudged"):
            part = row[name]
            cells.append(f"{part['median']:.0e}, {part['quantile_99']:.0e}, {part['max']:.0e}")
            cells.append(f"{100 * part['above']:.1f} %")
        for name in ("return", "cost"):
            pairs = (row[f"{name}_exact"], row[f"{name}_left_out"])
            cells.append(", ".join(f"{mean:.2f} +- {sd:.2f}" for mean, sd in pairs))
        lines.append(f"| {task_id} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tasks = {task.id: task for task in safety_gym.tasks()}
    parser.add_argument("--tasks", nargs="+", choices=list(tasks), default=list(tasks), metavar="ID")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    finished: dict[str, Any] = json.loads(FINISHED.read_text()) if FINISHED.exists() else {}
    for task_id in options.tasks:
        key = f"{task_id} {options.seeds}x{options.steps}"
        if key not in finished:
            finished[key] = compare(tasks[task_id], options.seeds, options.steps)
            FINISHED.write_text(json.dumps(finished, indent=1) + "\n")
        print(key, json.dumps(finished[key]), flush=True)
    results = {task_id: finished[f"{task_id} {options.seeds}x{options.steps}"] for task_id in options.tasks}
    result = {"seeds": list(range(options.seeds)), "steps": options.steps, "tasks": results}
    save("simulated_parity", result, table(results))


if __name__ == "__main__":
    main()
