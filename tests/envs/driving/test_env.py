"""RouteDriving as users meet it: Gymnasium's contract, seeds, states, scenarios, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import saferl.envs
from saferl.envs import make_vec
from saferl.envs.driving.drivers import DRIVERS, Driver
from saferl.envs.driving.env import RouteDrivingEnv, RouteDrivingVectorEnv
from saferl.envs.driving.replay import Recording, replay
from saferl.envs.driving.reward import COSTS
from saferl.envs.driving.roads import RoadBank
from saferl.envs.driving.scenario import read_scenario
from saferl.errors import UsageError


def make(bank: RoadBank, num_envs: int = 4, **kwargs: Any) -> RouteDrivingVectorEnv:
    return RouteDrivingVectorEnv(num_envs, bank=bank, **kwargs)


def steps(env: RouteDrivingVectorEnv, count: int, name: str = "follow"):  # type: ignore[no-untyped-def]
    driver = Driver(name)
    obs, _ = env.reset(seed=0)
    for _ in range(count):
        outcome = env.step(driver.act(obs["vector"] if isinstance(obs, dict) else obs))
        obs = outcome[0]
        yield outcome


@pytest.mark.filterwarnings("ignore:.*Box observation space.*")
@pytest.mark.parametrize(
    "kwargs", [{}, {"privileged": True}, {"observation": "bev", "picture": 64, "per_metre": 0.75}]
)
def test_it_is_a_gymnasium_environment(bank: RoadBank, kwargs: dict[str, Any]) -> None:
    check_env(RouteDrivingEnv(bank=bank, **kwargs), skip_render_check=True)


def test_the_vector_environment_keeps_the_contract(bank: RoadBank) -> None:
    env = make(bank, 8, privileged=True)
    ended = 0
    for obs, rewards, terminated, truncated, info in steps(env, 150):
        assert env.observation_space.contains(obs)
        assert rewards.dtype == np.float64
        assert rewards.shape == terminated.shape == truncated.shape == (8,)
        assert not (terminated & truncated).any()
        assert info["cost"].shape == (8,)
        assert set(info["costs"]) == set(COSTS) == set(env.metadata["cost_names"])
        assert info["cost"] == pytest.approx(sum(info["costs"][name] for name in COSTS[:4]))
        if (terminated | truncated).any():
            over = info["_final_obs"]
            assert (over == (terminated | truncated)).all()
            ended += int(over.sum())
            # A new drive has begun: it stands, and nothing is behind it.
            assert np.allclose(obs["vector"][over, 2], 0.0)
            assert not np.allclose(info["final_obs"]["vector"][over], obs["vector"][over])
            assert np.array_equal(info["final_obs"]["vector"][~over], obs["vector"][~over])
            scores = info["final_info"]
            assert (scores["_driving_score"] == over).all()
            assert (scores["driving_score"] <= scores["route_completion"] + 1e-4).all()
    assert ended > 3


def test_seeds_decide_everything(bank: RoadBank) -> None:
    def run(seed: int | list[int], num_envs: int = 3) -> np.ndarray:
        env = make(bank, num_envs)
        obs, _ = env.reset(seed=seed)
        rows = [obs]
        for _ in range(40):
            rows.append(env.step(np.tile(np.float32([0.8, 0.05]), (num_envs, 1)))[0])
        return np.stack(rows)

    first, again, other = run(5), run(5), run(6)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    # Environment i has the seed s + i, alone or among others.
    assert np.array_equal(first[:, 1:], other[:, :2])
    assert np.array_equal(run([7], 1)[:, 0], first[:, 2])


def test_a_reset_of_some_leaves_the_others(bank: RoadBank) -> None:
    env = make(bank, 4)
    list(steps(env, 30))
    before = env.frame.x.clone()
    mask = np.array([True, False, True, False])
    obs, _ = env.reset(seed=[11, None, 12, None], options={"reset_mask": mask})
    assert torch.equal(env.frame.x[1::2], before[1::2])
    assert not torch.equal(env.frame.x[::2], before[::2])
    fresh, _ = make(bank, 1).reset(seed=12)
    assert np.array_equal(obs[2:3], fresh)


def test_a_stored_state_goes_on_to_the_same_bits(bank: RoadBank) -> None:
    env = make(bank, 5, privileged=True)
    list(steps(env, 60))
    state = env.get_state()
    assert all(isinstance(v, np.ndarray) for v in state.values())
    action = np.tile(np.float32([0.5, 0.1]), (5, 1))
    first = [env.step(action) for _ in range(80)]
    other = make(bank, 5, privileged=True)
    other.set_state(state)
    for expected in first:
        found = other.step(action)
        assert np.array_equal(found[0]["vector"], expected[0]["vector"])
        assert np.array_equal(found[1], expected[1])
        assert np.array_equal(found[4]["cost"], expected[4]["cost"])
    with pytest.raises(UsageError, match="5 environments, this one 2"):
        make(bank, 2).set_state(state)


def test_evaluation_goes_on_after_collisions(bank: RoadBank) -> None:
    env = make(bank, 16, mode="eval")
    hits, ends = 0, 0
    for _, _, terminated, _, info in steps(env, 200):
        hits += int(info["costs"]["collision"].sum())
        ends += int(terminated.sum())
        stopped = info["costs"]["collision"] > 0
        assert np.allclose(env.frame.speed.numpy()[stopped], 0.0, atol=8.0)
    assert hits > 5
    assert ends == 0


def test_rewards_beside_the_one_that_is_learned(
    bank: RoadBank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them of the same steps, as if each had been the one."""
    both = make(bank, 3, also=["roach", "carl"])
    alone = make(bank, 3, reward="roach")
    both.reset(seed=4)
    alone.reset(seed=4)
    for _ in range(20):
        action = np.tile(np.float32([0.6, 0.02]), (3, 1))
        _, rewards, *_, info = both.step(action)
        _, expected, *_ = alone.step(action)
        assert np.array_equal(info["rewards"]["roach"], expected)
        assert np.array_equal(info["rewards"]["carl"], rewards)
    from saferl.cli import main

    env = 'RouteDriving-v0?maps=1&routes=4&route_length=60&time_limit=6&also=["carl","roach"]'
    words = ["starc", "carl", "roach", "--env", env, "--episodes", "8", "--resamples", "20", "--quiet"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    assert "roach" in capsys.readouterr().out


def test_drivers_are_ordered(bank: RoadBank) -> None:
    """The driving score of those that stand is below that of blind drivers, and theirs below that of
    IDM's."""
    scores = {}
    for name in DRIVERS:
        env = make(bank, 24, mode="eval", time_limit=55.0)
        found: list[float] = []
        for *_, info in steps(env, 551, name):
            if "final_info" in info:
                over = info["_final_obs"]
                found += info["final_info"]["driving_score"][over].tolist()
        scores[name] = float(np.mean(found))
    assert scores["stop"] < 0.5 < scores["random"] + 0.5
    assert scores["random"] < scores["follow"] - 5
    assert scores["follow"] < scores["idm"] - 5


def test_make_and_options() -> None:
    env = make_vec("RouteDriving-v0?maps=1&routes=4&route_length=80&reward=roach&vehicles=5", 2)
    assert env.worlds.population.vehicles == 5
    assert type(env.reward).__name__ == "RoachReward"
    assert env.metadata["backend"] == "native"
    single = gym.make("saferl/RouteDriving-v0", maps=1, routes=4, route_length=80.0)
    obs, _ = single.reset(seed=1)
    assert obs.shape == (262,)
    assert len(single.step(np.zeros(2, np.float32))) == 5
    assert saferl.envs.split_options("A-v0?x=1&y=no&z=[1,2]") == ("A-v0", {"x": 1, "y": "no", "z": [1, 2]})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("reward=carll", "did you mean 'carl'"),
        ("observation=camera", "observation"),
        ("mode=test", "mode"),
        ("maps=0", "at least one"),
        ("maps=two", "maps is 'two'; it must be a whole number"),
        ("route_length=far", "route_length is 'far'; it must be a number"),
        ("route_length=10", "50 to 5000 m"),
        ("colour=red", "no such option"),
        ("colour", "is no option"),
        ("vehicles=0", "must be 1"),
        ("scenarios=/nowhere.json", "cannot be read"),
    ],
)
def test_what_is_refused(options: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        make_vec(f"RouteDriving-v0?{options}", 2)


def test_actions_and_order_are_checked(bank: RoadBank) -> None:
    env = make(bank, 2)
    with pytest.raises(UsageError, match="reset"):
        env.step(np.zeros((2, 2), np.float32))
    env.reset(seed=0)
    with pytest.raises(UsageError, match="shape"):
        env.step(np.zeros((3, 2), np.float32))


def test_pictures(bank: RoadBank) -> None:
    env = make(bank, 2, render_mode="rgb_array")
    list(steps(env, 5))
    pictures = env.render()
    assert len(pictures) == 2
    assert pictures[0].shape == (320, 320, 3)
    assert pictures[0].dtype == np.uint8
    assert len(np.unique(pictures[0].reshape(-1, 3), axis=0)) > 5


SCENARIO: dict[str, Any] = {
    "lanes": [
        {"points": [[0, 0], [100, 0]], "successors": [1]},
        {"points": [[100, 0], [120, 0]], "successors": [2], "junction": 0, "group": 0},
        {"points": [[120, 0], [200, 0]]},
    ],
    "junctions": [
        {"control": "signal", "greens": [12, 12], "polygon": [[100, -4], [120, -4], [120, 4], [100, 4]]}
    ],
    "crossings": [{"start": [60, -4], "end": [60, 4]}],
    "routes": [{"lanes": [0, 1, 2], "length": 150}],
    "vehicles": [{"lane": 0, "arc": 40, "speed": 5}],
    "pedestrians": [{"crossing": 0, "wait": 1.0, "pace": 1.0}],
    "parked": [{"x": 30, "y": -3.2, "heading": 0}],
}


def write(path: Path, scenario: Any) -> Path:
    path.write_text(json.dumps(scenario))
    return path


def test_a_scenario_is_driven_as_written(tmp_path: Path) -> None:
    path = write(tmp_path / "one.json", SCENARIO)
    env = make_vec(f"RouteDriving-v0?scenarios={path}", 2)
    env.reset(seed=0)
    others = env.frame.others  # type: ignore[attr-defined]
    assert others.valid[:, 0].tolist() == [True, True, True]
    assert others.x[:, 0].tolist() == pytest.approx([40, 60, 30])
    assert float(others.speed[0, 0]) == 5.0
    walked = []
    for _ in range(30):
        env.step(np.tile(np.float32([-1.0, 0.0]), (2, 1)))
        walked.append(float(env.frame.others.y[1, 0]))  # type: ignore[attr-defined]
    # A second of waiting, then a metre a second from the kerb at -4 m.
    assert walked[8] == pytest.approx(-4.0)
    assert walked[-1] == pytest.approx(-4.0 + 2.0, abs=0.2)
    assert float(env.frame.others.x[0, 0]) > 45.0  # type: ignore[attr-defined]
    two = make_vec(f'RouteDriving-v0?scenarios=["{path}","{path}"]', 2)
    assert len(two.bank.map_routes) == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s["lanes"][0].update(succesors=[1]), "lane 0 has no field 'succesors'"),
        (lambda s: s["lanes"][0].update(points=[[0, 0]]), "lane 0: a lane's points"),
        (lambda s: s["lanes"][0].update(points=[[0, 0], ["a", 1]]), "lane 0: 'points'"),
        (lambda s: s["lanes"][0].update(successors=[7]), "refers to lane 7"),
        (lambda s: s["lanes"][0].update(speed_limit=-1), "must be positive"),
        (lambda s: s["junctions"][0].update(control="magic"), "junction 0"),
        (lambda s: s["routes"][0].update(length=900), "route 0 is 900 m long"),
        (lambda s: s["routes"][0].update(lanes=[0, 2]), "does not follow"),
        (lambda s: s["routes"][0].update(lanes=[9]), "names a lane"),
        (lambda s: s.pop("routes"), "no routes"),
        (lambda s: s["vehicles"][0].update(lane=5), "vehicles 0 is on lane 5"),
        (lambda s: s["vehicles"][0].update(arc=500), "beyond its lane's end"),
        (lambda s: s["vehicles"][0].pop("arc"), "vehicles 0 needs 'arc'"),
        (lambda s: s["vehicles"][0].update(speed="fast"), "no finite number"),
        (lambda s: s["pedestrians"][0].update(crossing=3), "pedestrians 0 is at crossing 3"),
        (lambda s: s["parked"].append(3), "parked 1 is no object"),
        (lambda s: s.update(weather="rain"), "'weather' is no part"),
        (lambda s: s.update(lanes={}), "'lanes' is no list"),
    ],
)
def test_a_malformed_scenario_is_named(tmp_path: Path, change: Any, sentence: str) -> None:
    scenario = json.loads(json.dumps(SCENARIO))
    change(scenario)
    path = write(tmp_path / "bad.json", scenario)
    with pytest.raises(UsageError, match=sentence):
        make_vec(f"RouteDriving-v0?scenarios={path}", 1)


def test_a_file_that_is_no_scenario(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{not json")
    with pytest.raises(UsageError, match="is not JSON"):
        read_scenario(path)
    path.write_text("[1, 2]")
    with pytest.raises(UsageError, match="holds no object"):
        read_scenario(path)


def test_a_recording_is_replayed_bit_for_bit(tmp_path: Path) -> None:
    options = {"maps": 1, "routes": 4, "route_length": 100.0}
    recording = Recording.of(Driver("follow"), seed=3, episode=0, steps=80, options=options)
    path = tmp_path / "drive.json"
    recording.save(path)
    again = Recording.load(path)
    frames = list(replay(again))
    assert len(frames) == len(recording.actions) <= 80
    assert float(frames[-1].frame.x[0]) == recording.end[0]
    text = json.loads(path.read_text())
    text["actions"][5][0] = -text["actions"][5][0] - 0.3
    path.write_text(json.dumps(text))
    with pytest.raises(UsageError, match="does not end where"):
        list(replay(Recording.load(path)))
    path.write_text("{}")
    with pytest.raises(UsageError, match="no recording"):
        Recording.load(path)


def test_stable_baselines_can_use_it(bank: RoadBank) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    model = sb3.PPO(
        "MlpPolicy", RouteDrivingEnv(bank=bank), n_steps=64, batch_size=32, n_epochs=1, device="cpu"
    )
    model.learn(64)
    assert model.num_timesteps == 64


def test_nothing_is_nan_for_a_hundred_thousand_steps(bank: RoadBank) -> None:
    """benchmarks/driving_speed.py does the same for more than a million."""
    env = make(bank, 500)
    generator = np.random.default_rng(0)
    env.reset(seed=0)
    for _ in range(200):
        actions = generator.uniform(-1, 1, (500, 2)).astype(np.float32)
        obs, rewards, *_, info = env.step(actions)
        assert np.isfinite(obs).all()
        assert np.isfinite(rewards).all()
        assert np.isfinite(info["cost"]).all()
