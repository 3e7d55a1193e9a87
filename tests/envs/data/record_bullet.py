"""Records bullet-safety-gym 1.4.0 with the gymnasium it pins, for `test_bullet.py` to compare with.

Needs a Python 3.10 with `pip install bullet-safety-gym==1.4.0`; nothing of this repository:

    python tests/envs/data/record_bullet.py tests/envs/data/bullet.json
"""

import json
import sys

import numpy as np

SEEDS = (0, 1)
EPISODES = (50, 10)  # steps; the second begins without a seed, after what the first left
KEPT = (1, 5, 20, 50)  # steps after which the observation is kept, as is the reset's and the last
TASK_IDS = tuple(
    f"Safety{robot}{task}-v0" for task in ("Run", "Circle") for robot in ("Ball", "Car", "Drone", "Ant")
)


def actions(space, seed, steps):
    """Hard one way, with noise; at times past the bounds, to which the tasks clip."""
    rng = np.random.RandomState(seed + 1000)
    base = rng.choice([-1.0, 1.0], space.shape)
    if seed == 0:
        base[:] = 1.0
    return base + rng.uniform(-0.8, 0.4, (steps, *space.shape)) * base


def record(env, seed):
    """Two episodes of a new environment."""
    result = []
    np.random.seed(seed)  # noqa: NPY002 (the package draws from there)
    for steps in EPISODES:
        obs, _ = env.reset()
        kept, rewards, costs, terminated = {0: obs.tolist()}, [], "", False
        for step, action in enumerate(actions(env.action_space, seed, steps), start=1):
            obs, reward, terminated, _, info = env.step(action)
            outside, fast = info.get("cost_outside_bounds", 0), info.get("cost_velocity_violation", 0)
            assert info["cost"] == max(outside, fast)
            costs += str(int(outside + 2 * fast))
            rewards.append(float(reward))
            if step in KEPT or terminated:
                kept[step] = obs.tolist()
            if terminated:
                break
        result.append({"obs": kept, "rewards": rewards, "costs": costs, "terminated": bool(terminated)})
    return result


def main(path):
    import bullet_safety_gym  # noqa: F401 (registers the tasks)
    import gymnasium

    assert gymnasium.__version__.startswith("0.28."), gymnasium.__version__
    recorded = {}
    for task_id in TASK_IDS:
        seeds = []
        for seed in SEEDS:
            env = gymnasium.make(task_id)
            seeds.append(record(env, seed))
            sizes = [env.observation_space.shape[0], env.action_space.shape[0]]
            env.close()
        recorded[task_id] = {"sizes": sizes, "max_episode_steps": env.spec.max_episode_steps, "seeds": seeds}
    lines = [
        f"{json.dumps(task_id)}:{json.dumps(r, separators=(',', ':'))}" for task_id, r in recorded.items()
    ]
    with open(path, "w") as file:  # noqa: PTH123
        file.write("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1])
