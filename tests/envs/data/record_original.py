"""Records safety-gymnasium 1.0.0 with the packages it pins, for `test_safety_gym.py` to compare with.

Needs a Python 3.10 with `pip install safety-gymnasium==1.0.0`; nothing of this repository:

    NPY_DISABLE_CPU_FEATURES="AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL" \
        python tests/envs/data/record_original.py tests/envs/data/original.json

The variable makes NumPy 1.23 compute sine and cosine as the C library does. Its AVX-512 versions differ in
the last bit, which decides whether a wheel that just touches the ground is in contact with it.
"""

import hashlib
import json
import sys

import numpy as np

SEEDS = (0, 1, 2)
STEPS = 40  # the steps of which costs are kept
REWARDS = 5
OBS_AFTER = 5  # the second observation that is kept, for the first seed
NAVIGATION = {"Goal": (0, 1, 2), "Button": (0, 1, 2), "Push": (0, 1, 2), "Circle": (0, 1, 2), "Run": (0,)}
ROBOTS = ("Point", "Car", "Racecar", "Doggo", "Ant")
VELOCITY = ("HalfCheetah", "Hopper", "Swimmer", "Walker2d", "Ant", "Humanoid")


def task_ids():
    for name, levels in NAVIGATION.items():
        for level in levels:
            for robot in ROBOTS:
                yield f"Safety{robot}{name}{level}-v0"
    for version in ("v1", "v0"):
        for robot in VELOCITY:
            yield f"Safety{robot}Velocity-{version}"


def actions(space, seed, steps=STEPS):
    """A persistent direction with noise; forwards for the robots with two actuators."""
    rng = np.random.RandomState(seed + 1000)
    base = rng.uniform(-1, 1, space.shape)
    share = 0.7 * base + 0.3 * rng.uniform(-1, 1, (steps, *space.shape))
    if space.shape == (2,):
        share[:, 0] = np.abs(share[:, 0])
    return space.low + (share + 1) / 2 * (space.high - space.low)


def layout_digest(layout, rotation):
    """A short hash of the bits of all positions and of the robot's rotation."""
    text = json.dumps([{k: [float(x).hex() for x in v] for k, v in layout.items()}, float(rotation).hex()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rounded(values, digits):
    return [float(f"{value:.{digits}g}") or 0 for value in np.asarray(values, float)]


def record(env):
    result = {"layouts": [], "rewards": [], "costs": []}
    for seed in SEEDS:
        obs, _ = env.reset(seed=seed)
        if seed == SEEDS[0]:
            result["first_obs"] = rounded(obs, 9)
        task = getattr(env.unwrapped, "task", None)
        if task is not None:
            info = task.world_info
            result["layouts"].append(layout_digest(info.reset_layout, info.world_config_dict["agent_rot"]))
        rewards, costs = [], ""
        for index, action in enumerate(actions(env.action_space, seed)):
            obs, reward, cost, terminated, truncated, _ = env.step(action)
            rewards.append(reward)
            costs += str(int(cost))
            if seed == SEEDS[0] and index + 1 == OBS_AFTER:
                result["obs_after"] = rounded(obs, 7)
            if terminated or truncated:
                break
        result["rewards"].append(rounded(rewards[:REWARDS], 9))
        result["costs"].append(costs)
    return result


def main(path):
    import safety_gymnasium

    recorded = {}
    for task_id in task_ids():
        recorded[task_id] = record(safety_gymnasium.make(task_id))
        print(task_id, flush=True)
    lines = [
        f"{json.dumps(task_id)}:{json.dumps(r, separators=(',', ':'))}" for task_id, r in recorded.items()
    ]
    with open(path, "w") as file:  # noqa: PTH123
        file.write("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1])
