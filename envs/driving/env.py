"""RouteDriving as a Gymnasium vector environment.

    env = saferl.envs.make_vec("RouteDriving-v0", 1024)                          # 262 numbers, CaRL's reward
    env = make_vec("RouteDriving-v0", 64, observation="bev", privileged=True)    # what CaRL's network reads

A drive ends (terminated) with what the reward says ends it, a collision or a red light for CaRL's, and is
truncated at the end of the route and of the time. With `mode="eval"` only the route's end, the time,
leaving the route and standing for 180 s end it, as in CARLA's leaderboard; collisions stop the ego and count.

`info` holds, besides the costs (see `saferl.envs.vector`), `completion` (%), and in `final_info` the scores
of the drives that ended: `route_completion`, `penalty`, `driving_score` (leaderboard 2.0),
`driving_score_21`, `closed_loop_score` (nuPlan's), `km`, and a count for each infraction. They are defined
as CARLA and nuPlan define them, in another world: their numbers are not comparable with longest6 v2 or Val14.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from saferl.envs.driving.frame import DrivingFrame
from saferl.envs.driving.observe import (
    CHANNELS,
    VECTOR_SIZE,
    bird_view,
    measurements,
    vector_observation,
)
from saferl.envs.driving.reward import COSTS, REWARDS, costs
from saferl.envs.driving.roads import RoadBank, random_network, random_route
from saferl.envs.driving.scenario import load_scenarios
from saferl.envs.driving.score import DrivingScore, time_to_collision
from saferl.envs.driving.world import Population, State, Worlds, tree_map
from saferl.envs.vector import check_num_envs, expand_seed, split_reset_mask
from saferl.errors import UsageError, unknown_name

__all__ = ["RouteDrivingEnv", "RouteDrivingVectorEnv", "load_bank"]

OBSERVATIONS = ("vector", "bev")
MODES = ("train", "eval")
_BLOCKED = 180.0  # s, CARLA's leaderboard
_BANK_VERSION = 1


def load_bank(maps: int = 16, routes: int = 128, route_length: float = 300.0, seed: int = 0) -> RoadBank:
    """Random maps with random routes, kept in the cache once they are made (half a second a map).

    Raises UsageError for numbers that make no bank.
    """
    if maps < 1 or routes < 1 or not 50.0 <= route_length <= 5000.0:
        raise UsageError(
            f"{maps} maps with {routes} routes of {route_length:g} m: ask for at least one of each, and for "
            "50 to 5000 m."
        )
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    from saferl.envs.datasets.download import cache_directory

    source = Path(__file__).with_name("roads.py").read_bytes()
    key = hashlib.sha256(
        source + repr((maps, routes, route_length, seed, _BANK_VERSION)).encode()
    ).hexdigest()
    path = cache_directory() / "driving" / f"{key[:20]}.safetensors"
    names = {f.name for f in fields(RoadBank)}
    if path.exists():
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError):
            tensors = {}  # cut short: made anew below
        if tensors.keys() == names:
            return RoadBank(**tensors)
    networks = [random_network(1000 * seed + m) for m in range(maps)]
    walks = [
        [random_route(network, np.random.default_rng([seed, m, r]), route_length) for r in range(routes)]
        for m, network in enumerate(networks)
    ]
    bank = RoadBank.build(networks, walks, float(route_length))
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({n: getattr(bank, n).contiguous() for n in names}, temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a cache that cannot be written only costs time
    return bank


@dataclass
class _Drive:
    """All that a batch carries from step to step, the batch last everywhere."""

    state: State
    reward: dict[str, Tensor]
    score: dict[str, Tensor]
    others: dict[str, dict[str, Tensor]]
    """States of the rewards that are only reported."""


@dataclass
class _Outcome:
    """What a step says, (B,) each."""

    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    cost: Tensor
    costs: dict[str, Tensor]
    completion: Tensor
    rewards: dict[str, Tensor]


class RouteDrivingVectorEnv(VectorEnv[Any, Any, Any]):
    """B drives at once; see the module's docstring.

    Args:
        num_envs: B.
        observation: "vector", 262 numbers, or "bev", a dictionary of CaRL's picture and measurements.
        reward: one of `saferl.envs.driving.reward.REWARDS`, or an instance of such a class.
        also: names of rewards to report besides, in `info["rewards"]`, for the same steps.
        mode: "train", or "eval" with CARLA's rules for what ends a drive.
        privileged: add "value_measurements" (10,), which a critic may read; with "vector" the observation
            becomes a dictionary, too.
        maps, routes, route_length, map_seed: of the bank; routes are `route_length` m long.
        vehicles, pedestrians, parked: how many others a world has.
        blocked: share of routes with a car in the way.
        picture, per_metre: side of the picture in pixels, and pixels a metre (CaRL: 256 and 2).
        time_limit: s after which a drive is truncated; CARLA's rule when None.
        bank: maps and routes to use instead of random ones.
        scenarios: scenario files to drive instead (see `saferl.envs.driving.scenario`).
        device: where worlds are stepped; on another than the CPU `step` takes and returns tensors.
        compiled: fuse the step with `torch.compile`: a minute at the first step, twice as fast after.
        render_mode: "rgb_array" for `render`.

    Raises:
        UsageError: an argument is none of its choices.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  # Gymnasium's declaration
        "render_modes": ["rgb_array"],
        "render_fps": 10,
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "cost_names": COSTS,
    }

    def __init__(
        self,
        num_envs: int = 1,
        *,
        observation: str = "vector",
        reward: str | Any = "carl",
        also: Sequence[str] = (),
        mode: str = "train",
        privileged: bool = False,
        maps: int = 16,
        routes: int = 128,
        route_length: float = 300.0,
        map_seed: int = 0,
        vehicles: int = 24,
        pedestrians: int = 8,
        parked: int = 8,
        blocked: float = 0.15,
        picture: int = 256,
        per_metre: float = 2.0,
        time_limit: float | None = None,
        bank: RoadBank | None = None,
        scenarios: str | Path | Sequence[str | Path] | None = None,
        device: str | torch.device = "cpu",
        compiled: bool = False,
        render_mode: str | None = None,
    ) -> None:
        self.num_envs = check_num_envs(num_envs)
        for value, known, what in ((observation, OBSERVATIONS, "observation"), (mode, MODES, "mode")):
            if value not in known:
                raise unknown_name(what, value, known)
        for name, count in (
            ("maps", maps), ("routes", routes), ("map_seed", map_seed), ("vehicles", vehicles),
            ("pedestrians", pedestrians), ("parked", parked), ("picture", picture),
        ):  # fmt: skip
            if not isinstance(count, int) or isinstance(count, bool):
                raise UsageError(f"{name} is {count!r}; it must be a whole number.")
        for name, number in (
            ("route_length", route_length), ("blocked", blocked), ("per_metre", per_metre),
            ("time_limit", 1.0 if time_limit is None else time_limit),
        ):  # fmt: skip
            if not isinstance(number, (int, float)) or not number >= 0:
                raise UsageError(f"{name} is {number!r}; it must be a number of 0 or more.")
        also = [also] if isinstance(also, str) else list(also)
        for name in (*also, reward) if isinstance(reward, str) else also:
            if name not in REWARDS:
                raise unknown_name("reward", name, REWARDS)
        if isinstance(reward, str):
            reward = REWARDS[reward]()
        self._others = {name: REWARDS[name]() for name in also}
        if min(vehicles, pedestrians, parked) < 0 or vehicles < 1:
            raise UsageError(
                "the numbers of vehicles, pedestrians and parked cars must be 1, 0 and 0 or more."
            )
        self.device = torch.device(device)
        self.torch_device = None if self.device.type == "cpu" else self.device
        self.render_mode = render_mode
        self.mode, self.kind, self.privileged = mode, observation, privileged
        self.reward = reward
        self.score = DrivingScore()
        self.time_limit = time_limit
        self.picture, self.per_metre = picture, per_metre
        cast = None
        if scenarios is not None:
            files = [scenarios] if isinstance(scenarios, (str, Path)) else list(scenarios)
            bank, cast = load_scenarios(files)
            cast = cast.to(self.device)
        bank = bank if bank is not None else load_bank(maps, routes, float(route_length), map_seed)
        self.bank = bank.to(self.device)
        population = Population(vehicles, pedestrians, parked)
        self.worlds = Worlds(
            self.bank, population, blocked=blocked, ends_on_collision=mode == "train", cast=cast
        )
        self.single_observation_space = self._space()
        self.single_action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._advance: Callable[..., Any] = self._eager_advance
        self._compiled = compiled
        if compiled:
            self._advance = torch.compile(self._eager_advance, dynamic=False)
        self._seeds = torch.from_numpy(np.random.default_rng().integers(0, 2**31, num_envs)).to(self.device)
        self._episodes = torch.full((num_envs,), -1, dtype=torch.int64, device=self.device)
        self._drive: _Drive | None = None
        self._frame: DrivingFrame | None = None
        self._none = torch.zeros(num_envs, dtype=torch.bool, device=self.device)

    # --- spaces and observations -------------------------------------------------------------------------

    def _space(self) -> spaces.Space[Any]:
        value = (
            {"value_measurements": spaces.Box(-np.inf, np.inf, (10,), np.float32)} if self.privileged else {}
        )
        if self.kind == "vector":
            vector = spaces.Box(-np.inf, np.inf, (VECTOR_SIZE,), np.float32)
            return spaces.Dict({"vector": vector, **value}) if value else vector
        shape = (len(CHANNELS), self.picture, self.picture)
        return spaces.Dict(
            {
                "bev": spaces.Box(0, 255, shape, np.uint8),
                "measurements": spaces.Box(-np.inf, np.inf, (8,), np.float32),
                **value,
            }
        )

    def _observe(self, drive: _Drive, frame: DrivingFrame) -> Any:
        state, population = drive.state, self.worlds.population
        result: dict[str, Tensor] = {}
        if self.kind == "vector":
            vector = vector_observation(self.bank, state, frame, population.vehicles, population.pedestrians)
            if not self.privileged:
                return vector
            result["vector"] = vector
        else:
            result["bev"] = bird_view(self.bank, state, frame, self.picture, self.per_metre)
            result["measurements"] = measurements(state, frame)
        if self.privileged:
            result["value_measurements"] = self.reward.value_measurements(frame, drive.reward).T.contiguous()
        return result

    # --- drives ------------------------------------------------------------------------------------------

    def _start(self, seeds: Tensor, episodes: Tensor) -> tuple[_Drive, DrivingFrame]:
        """New drives and what there is to see at their start."""
        state = self.worlds.start(seeds, episodes)
        if self.time_limit is not None:
            state.time_limit = torch.full_like(state.time_limit, self.time_limit)
        frame = self.worlds.look(state)
        batch = len(seeds)
        others = {name: other.initial(batch, self.device) for name, other in self._others.items()}
        drive = _Drive(
            state, self.reward.initial(batch, self.device), self.score.initial(batch, self.device), others
        )
        return drive, frame

    def _eager_advance(self, drive: _Drive, action: Tensor) -> tuple[_Drive, DrivingFrame, _Outcome, Any]:
        state, frame = self.worlds.step(drive.state, action)
        step = self.reward(frame, drive.reward)
        ttc = time_to_collision(frame)
        parts = costs(frame, step.state, ttc)
        score = self.score.update(frame, drive.score, ttc)
        late = frame.finished | (frame.time >= frame.time_limit)
        if self.mode == "train":
            terminated = step.terminated
        else:
            terminated = frame.deviated | (frame.standing >= _BLOCKED)
        total = torch.stack([parts[name] for name in COSTS[:4]]).sum(0)
        said = {name: other(frame, drive.others[name]) for name, other in self._others.items()}
        drive = _Drive(state, step.state, score, {name: other.state for name, other in said.items()})
        outcome = _Outcome(
            reward=step.reward, terminated=terminated, truncated=late & ~terminated, cost=total, costs=parts,
            completion=frame.completion,
            rewards={name: other.reward for name, other in said.items()},
        )  # fmt: skip
        return drive, frame, outcome, self._observe(drive, frame)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start drives anew, all or those of `options["reset_mask"]`; a seed makes its world's drives those
        of that seed from the first on, without one they go on."""
        mask, _ = split_reset_mask(options, self.num_envs)
        seeds = expand_seed(seed, self.num_envs)
        rows = np.flatnonzero(mask)
        given = torch.tensor([-1 if seeds[r] is None else seeds[r] for r in rows], device=self.device)
        where = torch.from_numpy(rows).to(self.device)
        self._seeds[where] = torch.where(given >= 0, given, self._seeds[where])
        self._episodes[where] = torch.where(given >= 0, 0, self._episodes[where] + 1)
        if self._drive is None or len(rows) == self.num_envs:
            self._episodes = self._episodes.clamp(min=0)
            self._drive, self._frame = self._start(self._seeds, self._episodes)
            self._drive = _canonical(self._drive)
        else:
            self._restart(where)
        assert self._frame is not None
        return self._out(self._observe(self._drive, self._frame)), {}

    def _restart(self, rows: Tensor) -> tuple[_Drive, DrivingFrame]:
        """Put new drives into some rows; returns them."""
        fresh, frame = self._start(self._seeds[rows], self._episodes[rows])

        def put(old: Tensor, new: Tensor) -> Tensor:
            return old.index_copy(-1, rows, new.to(old.dtype))

        assert self._drive is not None
        drive = tree_map(put, self._drive, fresh)
        self._drive = _canonical(drive) if self._compiled else drive
        self._frame = tree_map(put, self._frame, frame)
        return fresh, frame

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Drive 0.1 s with `actions` (B, 2): acceleration and steering.

        Raises UsageError for another shape, or before the first reset.
        """
        if tuple(np.shape(actions)) != (self.num_envs, 2):
            raise UsageError(
                f"actions have shape {tuple(np.shape(actions))}; this environment takes {(self.num_envs, 2)}"
            )
        if self._drive is None:
            raise UsageError("the environment has not been reset; call reset() first.")
        action = torch.as_tensor(actions, dtype=torch.float32, device=self.device).T.contiguous()
        with torch.no_grad():
            self._drive, self._frame, outcome, obs = self._advance(self._drive, action)
            if self._compiled:
                self._drive = _canonical(self._drive)
            ended = outcome.terminated | outcome.truncated
            info: dict[str, Any] = {
                "cost": self._out(outcome.cost.double()),
                "costs": {name: self._out(value.double()) for name, value in outcome.costs.items()},
                "completion": self._out(outcome.completion),
            }
            if outcome.rewards:
                info["rewards"] = {name: self._out(v.double()) for name, v in outcome.rewards.items()}
            if bool(ended.any()):
                info["final_obs"], info["_final_obs"] = self._out(obs), self._out(ended)
                rows = ended.nonzero()[:, 0]
                info["final_info"] = self._scores(rows)
                self._episodes[rows] += 1
                fresh, frame = self._restart(rows)
                new = self._observe(fresh, frame)
                if isinstance(obs, dict):
                    obs = {name: obs[name].index_copy(0, rows, new[name]) for name in obs}
                else:
                    obs = obs.index_copy(0, rows, new)
        return (
            self._out(obs),
            self._out(outcome.reward.double()),
            self._out(outcome.terminated),
            self._out(outcome.truncated),
            info,
        )

    def _scores(self, rows: Tensor) -> dict[str, Any]:
        """What the drives in `rows` scored; others hold 0 and are not marked."""
        assert self._drive is not None
        score = tree_map(lambda t: t[..., rows], self._drive.score)
        marked = self._none.index_fill(0, rows, True)
        found: dict[str, Any] = {}
        for name, value in self.score.result(score).items():
            table = torch.zeros(self.num_envs, dtype=value.dtype, device=self.device)
            found[name] = self._out(table.index_copy(0, rows, value))
            found[f"_{name}"] = self._out(marked)
        return found

    def _out(self, value: Any) -> Any:
        """Tensors for whoever uses them: arrays on the CPU."""
        if isinstance(value, dict):
            return {k: self._out(v) for k, v in value.items()}
        return value.numpy() if self.torch_device is None else value

    # --- state and pictures ------------------------------------------------------------------------------

    @property
    def frame(self) -> DrivingFrame:
        """The frame after the last step, of the new drives where some began."""
        if self._frame is None:
            raise UsageError("the environment has not been reset; call reset() first.")
        return self._frame

    @property
    def state(self) -> State:
        """The worlds' state."""
        if self._drive is None:
            raise UsageError("the environment has not been reset; call reset() first.")
        return self._drive.state

    def get_state(self) -> dict[str, Any]:
        """Everything the drives' future depends on, as arrays."""
        flat = _flatten((self._drive, self._frame), "")
        return {
            "seeds": self._seeds.cpu().numpy().copy(),
            "episodes": self._episodes.cpu().numpy().copy(),
            **{name: value.cpu().numpy().copy() for name, value in flat.items()},
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `get_state`'s result; UsageError when it is of another number of environments."""
        if len(state["seeds"]) != self.num_envs:
            raise UsageError(
                f"the stored state has {len(state['seeds'])} environments, this one {self.num_envs}; make "
                "the environment with the same number"
            )
        self._seeds = torch.from_numpy(np.array(state["seeds"])).to(self.device)
        self._episodes = torch.from_numpy(np.array(state["episodes"])).to(self.device)
        template = self._start(self._seeds, self._episodes.clamp(min=0))
        self._drive, self._frame = _unflatten(template, "", state, self.device)

    def render(self) -> tuple[np.ndarray, ...]:
        """Every world from above, (height, width, 3) uint8 each."""
        from saferl.envs.driving.draw import draw

        return tuple(draw(self, k) for k in range(self.num_envs))


def _canonical(drive: _Drive) -> _Drive:
    """The same with every tensor contiguous and in memory of its own: a compiled step is one for a layout."""
    seen: set[int] = set()

    def own(tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        if tensor.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        return tensor

    result: _Drive = tree_map(own, drive)
    return result


def _flatten(tree: Any, prefix: str) -> dict[str, Tensor]:
    """Tensors of nested dataclasses, tuples and dicts, by path."""
    if isinstance(tree, Tensor):
        return {prefix: tree}
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, tuple):
        items = [(str(k), value) for k, value in enumerate(tree)]
    else:
        items = [(f.name, getattr(tree, f.name)) for f in fields(tree)]
    return {path: value for name, sub in items for path, value in _flatten(sub, f"{prefix}/{name}").items()}


def _unflatten(tree: Any, prefix: str, stored: Mapping[str, Any], device: torch.device) -> Any:
    """`tree` with the tensors that `_flatten` stored."""
    if isinstance(tree, Tensor):
        return torch.from_numpy(np.array(stored[prefix])).to(device)
    if isinstance(tree, dict):
        return {k: _unflatten(v, f"{prefix}/{k}", stored, device) for k, v in tree.items()}
    if isinstance(tree, tuple):
        values = [_unflatten(v, f"{prefix}/{k}", stored, device) for k, v in enumerate(tree)]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    names = [f.name for f in fields(tree)]
    return type(tree)(**{n: _unflatten(getattr(tree, n), f"{prefix}/{n}", stored, device) for n in names})


class RouteDrivingEnv(gym.Env[Any, np.ndarray]):
    """One drive: a row of `RouteDrivingVectorEnv` in Gymnasium's single interface, with its arguments."""

    metadata: dict[str, Any] = {  # noqa: RUF012
        "render_modes": ["rgb_array"],
        "render_fps": 10,
        "cost_names": COSTS,
    }

    def __init__(self, render_mode: str | None = None, **kwargs: Any) -> None:
        self._vector = RouteDrivingVectorEnv(1, render_mode=render_mode, **kwargs)
        self.render_mode = render_mode
        self.observation_space = self._vector.single_observation_space
        self.action_space = self._vector.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start a drive; there are no options."""
        super().reset(seed=seed)
        obs, _ = self._vector.reset(seed=seed)
        return _first(obs), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Drive 0.1 s with `action` (2,)."""
        obs, reward, terminated, truncated, info = self._vector.step(np.reshape(action, (1, 2)))
        said: dict[str, Any] = {
            "cost": float(info["cost"][0]),
            "costs": {name: float(value[0]) for name, value in info["costs"].items()},
            "completion": float(info["completion"][0]),
        }
        if "final_obs" in info:
            obs = info["final_obs"]
            said |= {k: float(v[0]) for k, v in info["final_info"].items() if not k.startswith("_")}
        return _first(obs), float(reward[0]), bool(terminated[0]), bool(truncated[0]), said

    def render(self) -> np.ndarray:
        """The world from above, (height, width, 3) uint8."""
        return self._vector.render()[0]


def _first(obs: Any) -> Any:
    return {k: v[0] for k, v in obs.items()} if isinstance(obs, dict) else obs[0]
