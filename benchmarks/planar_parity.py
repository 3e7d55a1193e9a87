"""Is the planar engine Safety-Gymnasium? The real package and the engine side by side.

Scripted drivers over whole episodes, with confidence intervals; random actions over short ones, step by
step; layouts and goals bit for bit; and how far the one approximation, the vase of PointGoal1, is from the
original, along the robot's recorded paths. Episodes of the original are kept in --folder, so that the script
can be stopped and started again.

    python benchmarks/planar_parity.py [--episodes 50]
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
from _common import RESULTS, save
from numpy.typing import NDArray
from scipy.stats import t as student

from saferl.envs.safety_gym.original import SafetyGymEnv
from saferl.envs.safety_gym.planar import kernels
from saferl.envs.safety_gym.planar.env import PlanarVectorEnv
from saferl.envs.safety_gym.planar.tasks import TASKS, PlanarTask

NAME = "planar_parity"
GOAL1 = "SafetyPointGoal1-v0"
SHORT = 8
LONG = 60

Floats = NDArray[np.float64]

# --- the drivers ----------------------------------------------------------------------------------------


def drive(task: PlanarTask, x: Floats, y: Floats, heading: Floats, target: Floats) -> Floats:
    """Actions (N, 2) of a scripted driver at poses (N,).

    Goal: towards `target` (N, 2). Circle: around the origin at 1.5 m, anticlockwise, across the walls. Run:
    down the street in a slow weave, now and then across its edges.
    """
    if task.kind == "goal":
        course = np.arctan2(target[:, 1] - y, target[:, 0] - x)
    elif task.kind == "circle":
        inwards = np.clip(2.0 * (np.hypot(x, y) - 1.5), -1.2, 1.2)
        course = np.arctan2(y, x) + math.pi / 2 + inwards
    else:
        aim = 0.7 * np.sin(y / 2)
        course = -math.pi / 2 + np.clip(1.5 * (aim - x), -0.8, 0.8)
    error = np.arctan2(np.sin(course - heading), np.cos(course - heading))
    ahead = np.where(np.abs(error) < 1.2, 0.04 * np.cos(error), 0.0)
    return np.stack([ahead, np.clip(2 * error, -1.0, 1.0)], axis=1)


def run_planar(task_id: str, episodes: int, *, vase: str = "model") -> tuple[Floats, Floats]:
    """Returns and costs (E,) of the scripted driver in the planar engine, seeds 0 to E - 1.

    `vase` is "model", or "fixed" for one that does not move.
    """
    env, task = PlanarVectorEnv(task_id, episodes, threads=1), TASKS[task_id]
    env.reset(seed=0)
    start, turned = env._places[:, task.vase].copy(), env._rotations[:, task.vase].copy()
    returns, costs = np.zeros(episodes), np.zeros(episodes)
    for _ in range(task.max_episode_steps):
        x, y, heading = env._state[:, :3].T
        _, rewards, _, _, info = env.step(
            drive(task, x, y, heading, env._places[:, min(1, len(task.things))])
        )
        returns += rewards
        costs += info["cost"]
        if vase == "fixed":
            env._places[:, task.vase] = start
            env._state[:, kernels.VASE_VX :] = 0.0
            env._rotations[:, task.vase] = turned
    return returns, costs


def goal_seeker(episodes: int) -> dict[str, float]:
    """Mean return and cost of the scripted driver on PointGoal1: what no learning at all achieves."""
    returns, costs = run_planar(GOAL1, episodes)
    return {"return": float(returns.mean()), "cost": float(costs.mean())}


# --- the original ---------------------------------------------------------------------------------------


def pose(env: SafetyGymEnv) -> Floats:
    """x, y, heading, vx, vy, turning rate in the world's frame (6,)."""
    task = env._task
    start = task.world_info.world_config_dict["agent_rot"]
    sin, cos = math.sin(start), math.cos(start)
    vx, vy, rate = task.data.qvel[:3]
    x, y = task.agent.pos[:2]
    return np.array([x, y, start + task.data.qpos[2], cos * vx - sin * vy, sin * vx + cos * vy, rate])


def vase_place(env: SafetyGymEnv) -> Floats:
    """x, y and rotation of the vase (3,); zeros where there is none."""
    if not TASKS[env.task_id].vase:
        return np.zeros(3)
    body = env._task.data.body("vase0")
    return np.array([*body.xpos[:2], math.atan2(body.xmat[3], body.xmat[0])])


def run_original(env: SafetyGymEnv, seed: int, folder: Path, towards: str) -> dict[str, Floats]:
    """One episode of the scripted driver, or the stored one: rewards, costs, poses and the vase's places.

    `towards` is "goal", or "vase" to push it about.
    """
    path = folder / f"{env.task_id}-{towards}-{seed}.npz"
    if path.exists():
        with np.load(path) as stored:
            return dict(stored)
    task = TASKS[env.task_id]
    env.reset(seed=seed)
    rows: dict[str, list[Any]] = {"reward": [], "cost": [], "pose": [], "vase": []}
    for _ in range(task.max_episode_steps):
        rows["pose"].append(pose(env))
        rows["vase"].append(vase_place(env))
        x, y, heading = rows["pose"][-1][:3, None]
        target = np.zeros(2)
        if task.kind == "goal":
            target = env._task.goal.pos[:2] if towards == "goal" else rows["vase"][-1][:2]
        _, reward, _, _, info = env.step(drive(task, x, y, heading, target[None])[0])
        rows["reward"].append(reward)
        rows["cost"].append(info["cost"])
    rows["pose"].append(pose(env))
    rows["vase"].append(vase_place(env))
    arrays = {name: np.array(values, np.float64) for name, values in rows.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".part").open("wb") as file:
        np.savez(file, **arrays)
    path.with_suffix(".part").rename(path)
    return arrays


# --- whole episodes -------------------------------------------------------------------------------------


def interval(values: Floats) -> tuple[float, float]:
    """Mean and half the width of its 95 % confidence interval (Student's t)."""
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(half)


def compare_episodes(task_id: str, episodes: int, folder: Path) -> dict[str, Any]:
    """Returns and costs of both engines over the same seeds."""
    env = SafetyGymEnv(task_id)
    stored = [run_original(env, seed, folder, "goal") for seed in range(episodes)]
    result: dict[str, Any] = {
        "original": {key: [float(row[key].sum()) for row in stored] for key in ("reward", "cost")}
    }
    for vase in ("model", "fixed") if TASKS[task_id].vase else ("model",):
        returns, costs = run_planar(task_id, episodes, vase=vase)
        result[vase] = {"reward": returns.tolist(), "cost": costs.tolist()}
    return result


# --- short episodes -------------------------------------------------------------------------------------


def compare_steps(task_id: str, seeds: int, steps: int) -> dict[str, Any]:
    """Errors of observations and rewards under random actions: (steps, seeds) running free, and one step at
    a time from the original's state; layouts and goals bit for bit."""
    import mujoco

    real, task = SafetyGymEnv(task_id), TASKS[task_id]
    free, tied = PlanarVectorEnv(task_id, seeds, threads=1), PlanarVectorEnv(task_id, 1)
    free.reset(seed=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, seeds, 2))
    results = [free.step(step) for step in actions]
    errors = {name: np.zeros((steps, seeds)) for name in ("obs", "reward", "tied_obs", "tied_reward")}
    layouts = goals = wrong_costs = 0
    for seed in range(seeds):
        real.reset(seed=seed)
        tied.reset(seed=seed)
        layouts += bool((_layout(real, task) == tied._places[0]).all())
        for step in range(steps):
            mujoco.mj_forward(real._task.model, real._task.data)
            tied._state[0, :6] = pose(real)
            if task.kind == "goal":
                tied._state[0, kernels.LAST] = real._task.last_dist_goal
            seen = task.observation_size
            if task.vase:
                before = vase_place(real)
                tied._places[0, task.vase] = before[:2]
            obs, reward, _, _, info = real.step(actions[step, seed])
            mine, paid, _, _, told = tied.step(actions[step, seed][None])
            if task.vase and (vase_place(real) != before).any():
                seen -= 16  # the vase is not compared where it is pushed
            errors["tied_obs"][step, seed] = np.abs(mine[0, :seen] - obs[:seen]).max()
            errors["tied_reward"][step, seed] = abs(paid[0] - reward)
            errors["obs"][step, seed] = np.abs(results[step][0][seed] - obs).max()
            errors["reward"][step, seed] = abs(results[step][1][seed] - reward)
            wrong_costs += told["cost"][0] != info["cost"]
            if step < SHORT:
                wrong_costs += results[step][4]["cost"][seed] != info["cost"]
        if task.kind == "goal":
            goals += _same_goals(real, tied, seed)
    short = errors["obs"][:SHORT]
    return {
        "layouts": layouts,
        "goals": goals,
        "wrong_costs": int(wrong_costs),
        "one_step": float(errors["tied_obs"].max()),
        "one_step_reward": float(errors["tied_reward"].max()),
        "first": float(errors["obs"][0].max()),
        "median": float(np.median(short[-1])),
        "q90": float(np.quantile(short[-1], 0.9)),
        "max": float(short.max()),
        "curve": np.quantile(errors["obs"], (0.5, 0.9, 1.0), axis=1).tolist(),
    }


def _layout(real: SafetyGymEnv, task: PlanarTask) -> Floats:
    places = real._task.world_info.layout
    return np.array([places[thing.name] for thing in task.things])


def _same_goals(real: SafetyGymEnv, env: PlanarVectorEnv, seed: int, number: int = 3) -> int:
    """How many of the goals that follow, when both robots are put into theirs, have the same bits."""
    real.reset(seed=seed)
    env.reset(seed=seed)
    same = 0
    for _ in range(number):
        goal = _layout(real, env.task)[1]
        task = real._task
        start = task.world_info.world_config_dict["agent_rot"]
        dx, dy = goal - task.world_info.reset_layout["agent"]
        sin, cos = math.sin(start), math.cos(start)
        task.data.qpos[:2], task.data.qvel[:3] = (cos * dx + sin * dy, cos * dy - sin * dx), 0.0
        env._state[0, :2], env._state[0, 3:6] = goal, 0.0
        real.step(np.zeros(2))
        env.step(np.zeros((1, 2)))
        same += bool((_layout(real, env.task)[1] == env._places[0, 1]).all())
    return same


# --- the vase -------------------------------------------------------------------------------------------


def replay(path: Floats, start: Floats) -> Floats:
    """Places (T + 1, 2) of the model's vase from `start` (3,) on, the robot's poses being (T + 1, 6)."""
    row, place, turned = np.zeros(kernels.STATE), start[:2].copy(), float(start[2])
    places = [place.copy()]
    for before, after in itertools.pairwise(path[:, :3].tolist()):
        row[kernels.X], row[kernels.Y] = after[:2]
        old = (*before[:2], math.sin(before[2]), math.cos(before[2]))
        turned = kernels.move_vase(row, place, turned, *old, math.sin(after[2]), math.cos(after[2]))
        places.append(place.copy())
    return np.array(places)


def lidars(path: Floats, places: Floats) -> Floats:
    """What robots at poses (T + 1, 6) see of a vase at (T + 1, 2): (T + 1, 16)."""
    out = np.zeros((len(path), 16))
    for bins, (x, y, heading, *_), (vase_x, vase_y) in zip(out, path, places, strict=True):
        kernels._see(bins, vase_x - x, vase_y - y, math.sin(heading), math.cos(heading), 3.0)
    return out


def compare_vases(episodes: int, folder: Path, towards: str) -> dict[str, Any]:
    """The vase of the original, of the model and one that stands still, on the original's paths.

    Differences are taken from the first touch to the episode's end, where the vase was touched at all.
    """
    env = SafetyGymEnv(GOAL1)
    touched, moved, modelled = 0, [], []
    errors: dict[str, list[Floats]] = {name: [] for name in ("model", "fixed")}
    sights: dict[str, list[Floats]] = {name: [] for name in ("model", "fixed")}
    false_touches = 0
    for seed in range(episodes, 2 * episodes):
        run = run_original(env, seed, folder, towards)
        path, vase = run["pose"], run["vase"]
        model = replay(path, vase[0])
        # At rest it sinks and creeps by less than this.
        away = np.hypot(*(vase[:, :2] - vase[0, :2]).T) > 1e-4
        model_moved = (model != model[0]).any()
        if not away.any():
            false_touches += bool(model_moved)
            continue
        touched += 1
        first = int(away.argmax())
        moved.append(float(np.hypot(*(vase[-1, :2] - vase[0, :2]))))
        modelled.append(float(np.hypot(*(model[-1] - vase[0, :2]))))
        fixed = np.broadcast_to(vase[0, :2], model.shape)
        truth = lidars(path[first:], vase[first:, :2])
        for name, places in (("model", model), ("fixed", fixed)):
            errors[name].append(np.hypot(*(places[first:] - vase[first:, :2]).T))
            sights[name].append(np.abs(lidars(path[first:], places[first:]) - truth))
    result: dict[str, Any] = {
        "episodes": episodes,
        "touched": touched,
        "touched_by_model_alone": false_touches,
        "moved": moved,
        "modelled": modelled,
    }
    for name in errors:
        if not touched:
            continue
        distance, sight = np.concatenate(errors[name]), np.concatenate(sights[name])
        result[name] = {
            "final": [float(x[-1]) for x in errors[name]],
            "distance": _spread(distance),
            "lidar": _spread(sight.mean(1)),
            "lidar_largest": _spread(sight.max(1)),
            "lidar_quantiles": np.quantile(sight.max(1), np.linspace(0, 1, 101)).tolist(),
        }
    return result


def _spread(values: Floats) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "q95": float(np.quantile(values, 0.95)),
        "max": float(values.max()),
    }


# --- what is shown --------------------------------------------------------------------------------------


def shown(values: list[float], digits: int) -> str:
    mean, half = interval(np.array(values))
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def table(result: dict[str, Any]) -> str:
    count = result["episodes"]
    lines = [
        f"**Whole episodes**, scripted drivers, seeds 0 to {count - 1} in both; means and 95 % confidence "
        "intervals. The difference is taken seed by seed (same layouts, other roundings).",
        "",
        "| task | return, original | planar | difference | cost, original | planar | difference |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for task_id, row in result["driven"].items():
        cells = []
        for key, digits in (("reward", 2), ("cost", 1)):
            theirs, mine = row["original"][key], row["model"][key]
            difference = [b - a for a, b in zip(theirs, mine, strict=True)]
            cells += [shown(theirs, digits), shown(mine, digits), shown(difference, digits)]
        lines.append(f"| {task_id} | {' | '.join(cells)} |")
    lines += [
        "",
        f"**Step by step**, {result['short_seeds']} seeds, random actions. From the original's state: the "
        f"largest error of one step, {LONG} steps a seed. Running free: after {SHORT} steps, by when chaos "
        "has made much of roundings in some seeds. Costs are compared in all these steps.",
        "",
        "| task | layouts of same bits | later goals of same bits | one step: observation | reward "
        "| free: median | 90 % | largest | costs that differ |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for task_id, row in result["short"].items():
        seeds = result["short_seeds"]
        goals = f"{row['goals']} of {3 * seeds}" if TASKS[task_id].kind == "goal" else ""
        lines.append(
            f"| {task_id} | {row['layouts']} of {seeds} | {goals} | {row['one_step']:.1e} "
            f"| {row['one_step_reward']:.1e} | {row['median']:.1e} | {row['q90']:.1e} | {row['max']:.1e} "
            f"| {row['wrong_costs']} |"
        )
    lines += [
        "",
        "**The vase of PointGoal1**, along the original's recorded paths, from its first touch to the end of "
        f"the episode; seeds {count} to {2 * count - 1} (the model's two constants were chosen on seeds 0 to "
        "49), only episodes in which it was touched. The lidar's difference is the largest of its 16 bins "
        "(which run from 0 to 1).",
        "",
        "| driver | touched | way of the vase, original | model | vase | distance from the original's: mean "
        "| 95 % | lidar's difference: mean | 95 % |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for towards, row in result["vase"].items():
        for name, label in (("model", "model"), ("fixed", "immovable")):
            if name not in row:
                continue
            distance, sight = row[name]["distance"], row[name]["lidar_largest"]
            way = f"{np.mean(row['moved']):.2f} m | {np.mean(row['modelled']):.2f} m"
            lines.append(
                f"| to the {towards} | {row['touched']} of {row['episodes']} | {way} | {label} "
                f"| {distance['mean']:.3f} m | {distance['q95']:.3f} m | {sight['mean']:.3f} "
                f"| {sight['q95']:.3f} |"
            )
    row = result["driven"].get(GOAL1)
    if row:
        pairs = [
            f"{label} {shown(row[name]['reward'], 2)} and {shown(row[name]['cost'], 1)}"
            for name, label in (("model", "with the model"), ("fixed", "with an immovable vase"))
        ]
        lines += ["", f"Return and cost of the goal-seeking driver {', '.join(pairs)}."]
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    row = result["driven"].get(GOAL1)
    if row:
        for name, colour, label in (("original", "#555555", "original"), ("model", "#0072B2", "planar")):
            left.scatter(row[name]["cost"], row[name]["reward"], s=14, color=colour, alpha=0.6, label=label)
            means = [np.mean(row[name][key]) for key in ("cost", "reward")]
            left.scatter(*means, s=90, color=colour, marker="x")
        left.set(title="scripted episodes of PointGoal1", xlabel="cost", ylabel="return")
        left.legend(frameon=False, fontsize=8)
    curve = result["short"].get(GOAL1, {}).get("curve")
    if curve:
        steps = np.arange(1, len(curve[0]) + 1)
        for values, label in zip(curve, ("median", "90 %", "largest"), strict=True):
            middle.semilogy(steps, np.maximum(values, 1e-16), label=label)
        middle.set(
            title="PointGoal1 running free: chaos", xlabel="control step", ylabel="observation's error"
        )
        middle.legend(frameon=False, fontsize=8)
    for towards, style in (("goal", "-"), ("vase", "--")):
        for name, colour in (("model", "#0072B2"), ("fixed", "#D55E00")):
            values = result["vase"].get(towards, {}).get(name)
            if values:
                label = f"{'immovable' if name == 'fixed' else 'model'}, driver to the {towards}"
                right.plot(
                    values["lidar_quantiles"], np.linspace(0, 1, 101), style, color=colour, label=label
                )
    right.set(title="vase lidar after the first touch", xlabel="largest difference", ylabel="share of steps")
    right.legend(frameon=False, fontsize=7, loc="lower right")
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=50, help="whole episodes a task")
    parser.add_argument("--seeds", type=int, default=50, help="short episodes a task")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--folder", type=Path, default=Path("runs/planar_parity"))
    asked = parser.parse_args()
    result: dict[str, Any] = {"episodes": asked.episodes, "short_seeds": asked.seeds}
    result["short"], result["driven"], result["vase"] = {}, {}, {}
    for task_id in asked.tasks:
        result["short"][task_id] = compare_steps(task_id, asked.seeds, LONG)
        print(task_id, {key: value for key, value in result["short"][task_id].items() if key != "curve"})
    for task_id in asked.tasks:
        result["driven"][task_id] = compare_episodes(task_id, asked.episodes, asked.folder)
        print(task_id, "driven", flush=True)
    if GOAL1 in asked.tasks:
        for towards in ("goal", "vase"):
            result["vase"][towards] = compare_vases(asked.episodes, asked.folder, towards)
    save(NAME, result, table(result))
    draw(result, RESULTS / f"{NAME}.png")


if __name__ == "__main__":
    main()
