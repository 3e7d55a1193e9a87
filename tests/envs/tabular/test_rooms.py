"""Rooms: the tables against walking, a shortest way, heuristics, batching, errors."""

from __future__ import annotations

import numpy as np
import pytest

from saferl.envs.tabular.rooms import CAPTIONS, EPISODE_STEPS, RoomsVectorEnv, tables
from saferl.errors import UsageError
from saferl.starc import TabularMDP, optimal_policy, starc_distance

UP, DOWN, LEFT, RIGHT = range(4)
WAY = [DOWN] * 4 + [RIGHT] * 4 + [UP] * 2 + [RIGHT] * 5
"""To the key, back up, through the door, to the goal."""


def test_a_shortest_way_and_its_captions() -> None:
    env = RoomsVectorEnv(2)
    env.reset()
    captions, total, heuristics = [], 0.0, np.zeros(2)
    for k, action in enumerate(WAY):
        _, rewards, terminations, truncations, info = env.step(np.array([action, UP]))
        captions.append(CAPTIONS[info["caption"][0]])
        total += rewards[0]
        heuristics += info["helpful"][0], info["misleading"][0]
        assert terminations.tolist() == [k == len(WAY) - 1, False]
        assert not truncations.any()
        assert info["cost"][1] == 1
    assert total == 1
    assert [c for c in captions if c not in (CAPTIONS[0], CAPTIONS[2])] == [
        "You find a key!",
        "You unlock the door and step through.",
        "You reach the goal!",
    ]
    assert heuristics[0] == pytest.approx(1.0)
    assert tables().distances[tables().start] == len(WAY)


def test_the_door_is_locked_without_the_key() -> None:
    env = RoomsVectorEnv(1)
    env.reset()
    for action in [DOWN] * 2 + [RIGHT] * 4:
        env.step(np.array([action]))
    before, *_ = env.step(np.array([UP]))
    env.step(np.array([DOWN]))
    obs, _, _, _, info = env.step(np.array([RIGHT]))
    assert CAPTIONS[info["caption"][0]] == "The door is locked."
    assert obs[0] != before[0]


def test_episodes_are_cut() -> None:
    env = RoomsVectorEnv(1)
    env.reset()
    for k in range(EPISODE_STEPS):
        obs, _, terminations, truncations, _ = env.step(np.array([UP]))
        assert truncations[0] == (k == EPISODE_STEPS - 1)
        assert not terminations[0]
    assert obs[0] == tables().start


def test_planning_on_the_tables() -> None:
    task = tables()
    mdp = TabularMDP(task.transitions(), 0.95)
    _, values = optimal_policy(mdp, task.rewards)
    assert values[task.start] == pytest.approx(0.95 ** (len(WAY) - 1))
    with_key = task.rewards + task.helpful
    misled = task.rewards + task.misleading
    best, _ = optimal_policy(mdp, misled)
    state, seen = task.start, set()
    while state not in seen:
        seen.add(state)
        state = int(task.successors[state, best[state]])
    assert state != len(task.successors) - 1, "what the misleading heuristic wants is to stay and hum"
    assert starc_distance(task.rewards, with_key, mdp) < starc_distance(task.rewards, misled, mdp)
    # The door pays once: going back and forth earns nothing.
    assert task.helpful.sum() == pytest.approx(0.5 * (task.captions == 3).sum())


def test_wrong_actions() -> None:
    env = RoomsVectorEnv(2)
    env.reset()
    for actions in (np.array([0]), np.array([0, 4]), np.array([-1, 0])):
        with pytest.raises(UsageError, match="2 numbers from 0 to 3"):
            env.step(actions)
