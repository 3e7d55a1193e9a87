"""Distances from transitions: against the exact ones, invariances, control tasks, what data cannot say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from saferl.envs import make_vec
from saferl.errors import UsageError
from saferl.starc import TabularMDP, starc_distance
from saferl.starc.sampled import Comparison, Features, Transitions, compare

SIZE, ACTIONS, DISCOUNT = 32, 4, 0.95
TABLE = Features(random=0)


def process(seed: int) -> tuple[TabularMDP, list[np.ndarray]]:
    """A sparse process and a reward, shaped, redistributed, mixed with another, the other, opposite."""
    rng = np.random.default_rng(seed)
    transitions = rng.dirichlet(np.full(SIZE, 0.1), (SIZE, ACTIONS))
    shape = (SIZE, ACTIONS, SIZE)
    reward, other, moved = rng.normal(size=shape), rng.normal(size=shape), rng.normal(size=shape)
    moved -= np.einsum("sat,sat->sa", moved, transitions)[:, :, None]
    potential = 5 * rng.normal(size=SIZE)
    shaped = reward + DISCOUNT * potential - potential[:, None, None]
    rewards = [reward, shaped, reward + moved, 0.7 * reward + 0.3 * other, other, -2 * reward]
    return TabularMDP(transitions, DISCOUNT), rewards


def drawn(mdp: TabularMDP, count: int, seed: int) -> tuple[Transitions, tuple[np.ndarray, ...]]:
    rng = np.random.default_rng(seed)
    s, a = rng.integers(0, SIZE, count), rng.integers(0, ACTIONS, count)
    cumulative = mdp.transitions.cumsum(axis=2)
    t = (rng.random(count)[:, None] > cumulative[s, a]).sum(axis=1).clip(0, SIZE - 1)
    eye = np.eye(SIZE)
    return Transitions(eye[s], a, eye[t]), (s, a, t)


@pytest.mark.parametrize("name", ["val", "minimal"])
def test_against_the_exact_distances(name: Any) -> None:
    found = []
    for seed in range(4):
        mdp, rewards = process(seed)
        data, (s, a, t) = drawn(mdp, 20_000, seed)
        columns = [reward[s, a, t] for reward in rewards]
        result = compare(columns, data, DISCOUNT, features=TABLE, canonicalization=name, resamples=20)
        norm = 2 if name == "val" else "w2"
        exact = [starc_distance(rewards[0], reward, mdp, name, norm, norm) for reward in rewards]
        assert result.distances[0, 1] < 1e-6, "a potential in the features' span drops out"
        assert result.distances[0, 5] == pytest.approx(2, abs=1e-9)
        assert result.distances[0, 3] == pytest.approx(exact[3], abs=0.06)
        assert result.distances[0, 4] == pytest.approx(exact[4], abs=0.06)
        assert (result.low <= result.distances).all()
        assert (result.distances <= result.high).all()
        assert not result.cautions
        found.append(result.distances[0, 2])
    assert np.mean(found) < 0.1, found


def test_intervals_hold_the_exact_distance() -> None:
    mdp, rewards = process(0)
    exact = starc_distance(rewards[0], rewards[3], mdp)
    inside = 0
    for seed in range(10):
        data, (s, a, t) = drawn(mdp, 5_000, seed)
        result = compare([rewards[0][s, a, t], rewards[3][s, a, t]], data, DISCOUNT, features=TABLE)
        inside += result.low[0, 1] <= exact <= result.high[0, 1]
    assert inside >= 7


def test_terminal_steps_and_time_limits() -> None:
    # Potentials are 0 after a true end: what shaping leaves there must still drop out.
    rng = np.random.default_rng(0)
    count = 5_000
    s, a = rng.normal(size=(count, 3)), rng.normal(size=(count, 1))
    after, done = 0.9 * s + 0.1 * a, rng.random(count) < 0.1
    reward = (s[:, 0] - after[:, 1]) * a[:, 0]
    potential = s @ [3.0, -1.0, 2.0] + 4
    later = (after @ [3.0, -1.0, 2.0] + 4) * ~done
    data = Transitions(s, a, after, done, np.arange(count) // 50)
    result = compare([reward, reward + 0.9 * later - potential], data, 0.9, features=TABLE)
    assert result.distances[0, 1] < 1e-6
    forgotten = Transitions(s, a, after, None, np.arange(count) // 50)
    result = compare([reward, reward + 0.9 * later - potential], forgotten, 0.9, features=TABLE)
    assert result.distances[0, 1] > 0.05


# --- control tasks ---------------------------------------------------------------------------------------


def recorded(env_id: str, steps: int, noise: float = 0.0) -> tuple[Transitions, np.ndarray]:
    """Random actions in 40 environments; the rewards they gave."""
    env = make_vec(env_id, 40)
    rng = np.random.default_rng(0)
    observations, _ = env.reset(seed=0)
    space: Any = env.single_action_space
    columns: list[list[np.ndarray]] = [[] for _ in range(6)]
    episodes, following = np.arange(40), 40
    for _ in range(steps):
        actions = rng.uniform(space.low, space.high, (40, *space.shape)).astype(np.float32)
        after, rewards, terminations, truncations, info = env.step(actions)
        ended = terminations | truncations
        last = after.copy()
        if ended.any():
            last[ended] = np.stack(list(info["final_obs"][ended]))
        row = (observations, actions, last, terminations, episodes.copy(), rewards)
        for column, value in zip(columns, row, strict=True):
            column.append(value)
        episodes[ended] = following + np.arange(ended.sum())
        following += int(ended.sum())
        observations = after
    env.close()
    parts = [np.concatenate(column) for column in columns]
    return Transitions(*parts[:5]), parts[5]


def check_shaped_and_opposite(env_id: str, steps: int) -> Comparison:
    data, reward = recorded(env_id, steps)
    assert data.terminations is not None
    size = data.observations.shape[1]
    rng = np.random.default_rng(1)
    scale = np.maximum(data.observations.std(axis=0), 1e-6)
    line = rng.normal(size=size) / np.sqrt(size)
    potentials: list[Any] = [
        lambda s: (s / scale) @ line,
        lambda s: -np.linalg.norm((s - data.observations.mean(axis=0)) / scale, axis=1),
    ]
    shaped = []
    for potential in potentials:
        now, after = potential(data.observations), potential(data.next_observations)
        factor = 3 * reward.std() / now.std()
        shaped.append(reward + factor * (0.99 * ~data.terminations * after - now))
    result = compare([reward, *shaped, -reward], data, 0.99, resamples=20)
    assert result.distances[0, 1] < 1e-4
    assert result.distances[0, 2] < 0.05
    assert result.distances[0, 3] > 1.9
    return result


@pytest.mark.parametrize(
    ("env_id", "steps"), [("Pendulum-v1", 400), ("Reacher-v5", 400), ("SafetyPointGoal1-v0", 1_000)]
)
def test_shaped_and_opposite_rewards(env_id: str, steps: int) -> None:
    check_shaped_and_opposite(env_id, steps)


def test_redistribution_where_the_dynamics_are_noisy() -> None:
    # s' = s + a + noise: the reward of the noise has mean zero whatever was done.
    rng = np.random.default_rng(0)
    count = 40_000
    s, a = rng.uniform(-1, 1, (count, 2)), rng.uniform(-1, 1, (count, 2))
    noise = 0.3 * rng.normal(size=(count, 2))
    after = 0.8 * s + 0.2 * a + noise
    reward = -np.square(s + 0.5 * a).sum(axis=1)
    moved = reward + 2 * (after - 0.8 * s - 0.2 * a).sum(axis=1) * np.cos(3 * s[:, 0])
    data = Transitions(s, a, after, None, np.arange(count) // 100)
    result = compare([reward, moved, -moved], data, 0.9, features=Features(random=32))
    assert result.distances[0, 1] < 0.05
    assert result.distances[0, 2] > 1.9
    assert starc_free(reward, moved) > 0.3, "the rewards themselves differ a great deal"


def starc_free(x: np.ndarray, y: np.ndarray) -> float:
    """Distance without canonical forms: of centred columns."""
    x, y = x - x.mean(), y - y.mean()
    return float(np.linalg.norm(x / np.linalg.norm(x) - y / np.linalg.norm(y)))


def test_a_network_adds_potentials_that_the_features_lack() -> None:
    data, reward = recorded("Pendulum-v1", 400)
    weights = np.random.default_rng(2).normal(size=data.observations.shape[1])

    def potential(s: np.ndarray) -> np.ndarray:
        return np.sin(3 * (s - data.observations.mean(axis=0)) / data.observations.std(axis=0) @ weights)

    shaped = reward + 10 * reward.std() * (
        0.99 * potential(data.next_observations) - potential(data.observations)
    )
    without = compare([reward, shaped], data, 0.99, resamples=20).distances[0, 1]
    learned = Features(network=64)
    found = compare([reward, shaped], data, 0.99, features=learned, resamples=20).distances[0, 1]
    assert found < 0.5 * without


# --- what the data cannot say ----------------------------------------------------------------------------


def simple(count: int = 2_000, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    s, a = rng.normal(size=(count, 3)), rng.normal(size=(count, 1))
    return {"observations": s, "actions": a, "next_observations": 0.9 * s + 0.1 * a}


def test_actions_that_the_state_decides() -> None:
    parts = simple()
    parts["actions"] = parts["observations"][:, :1] * 2
    result = compare(
        [parts["observations"][:, 0], -parts["observations"][:, 1]], Transitions(**parts), 0.9, resamples=20
    )
    assert any("record with more random actions" in caution for caution in result.cautions)


def test_trivial_and_constant_rewards() -> None:
    parts = simple()
    data = Transitions(**parts)
    potential = parts["observations"][:, 0]
    shaping = 0.9 * parts["next_observations"][:, 0] - potential
    real = parts["actions"][:, 0] * parts["observations"][:, 1]
    noise = np.random.default_rng(9).normal(size=len(real))
    result = compare([real, np.ones(len(real)), shaping, noise], data, 0.9, resamples=20)
    assert result.trivial.tolist() == [False, True, True, False]
    np.testing.assert_array_equal(result.distances[0, 1:3], 1)
    assert result.distances[1, 2] == 0
    assert any("all policies earn reward 1 alike" in c for c in result.cautions)
    assert any(
        "reward 3: by these 2,000 transitions its canonical form is mostly noise" in c
        for c in result.cautions
    )
    assert not any("reward 0" in c for c in result.cautions)


def test_too_few_transitions() -> None:
    parts = simple(400)
    real = parts["actions"][:, 0] * parts["observations"][:, 1]
    result = compare([real, real + parts["actions"][:, 0]], Transitions(**parts), 0.9, resamples=20)
    assert any("400 transitions are few" in caution for caution in result.cautions)


def test_functions_tensors_and_scales() -> None:
    parts = simple()
    data = Transitions(**parts)

    def reward(s: Any, a: Any, after: Any) -> torch.Tensor:
        return torch.as_tensor(a[:, 0] * s[:, 1])

    tiny = 1e-9 * parts["actions"][:, 0] * parts["observations"][:, 1]
    result = compare([reward, tiny], data, 0.9, resamples=20)
    assert result.distances[0, 1] < 1e-6


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"actions": np.zeros((5, 1))}, "2,000 observations but 5 actions"),
        ({"next_observations": np.zeros((2_000, 2))}, "they must agree"),
        ({"observations": np.full((2_000, 3), np.nan)}, "observations of transition 0"),
        ({"terminations": np.zeros(3, bool)}, "terminations have shape"),
        ({"episodes": np.zeros(3, int)}, "episodes have shape"),
    ],
)
def test_transitions_that_do_not_fit(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        Transitions(**{**simple(), **change})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"discount": 1.0}, "the discount is 1"),
        ({"canonicalization": "epic"}, "val and minimal"),
        ({"resamples": 3}, "at least 20 resamples"),
        ({"rewards": [np.zeros(2_000)]}, "at least two rewards"),
        ({"rewards": [np.zeros(2_000), np.zeros(3)]}, r"reward 1 has shape \(3,\)"),
        ({"rewards": [np.zeros(2_000), np.full(2_000, np.inf)]}, "reward 1 is not finite at transition 0"),
        ({"rewards": [np.zeros(2_000), "words"]}, "reward 1 gives no numbers"),
    ],
)
def test_comparisons_that_cannot_be_made(options: dict[str, Any], sentence: str) -> None:
    asked = {"rewards": [np.zeros(2_000), np.ones(2_000)], "discount": 0.9, **options}
    rewards, discount = asked.pop("rewards"), asked.pop("discount")
    with pytest.raises(UsageError, match=sentence):
        compare(rewards, Transitions(**simple()), discount, **asked)


def test_too_little_of_everything() -> None:
    with pytest.raises(UsageError, match="at least 100"):
        Transitions(**simple(99))
    parts = {**simple(), "episodes": np.arange(2_000) // 1_000}
    with pytest.raises(UsageError, match="at least 4 are needed"):
        compare([np.zeros(2_000), np.ones(2_000)], Transitions(**parts), 0.9)
