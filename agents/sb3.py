"""Any Stable-Baselines3 algorithm under constraints.

    from stable_baselines3 import PPO
    from saferl.agents.sb3 import constrained
    from saferl.constraints import Constraint, ConstraintSet

    constraints = ConstraintSet([Constraint("speed", limit=25.0)])
    model, callback = constrained(PPO, "MlpPolicy", "saferl/SpeedLimit-v0", constraints, num_envs=16)
    model.learn(200_000, callback=callback)
    callback.save("speed_limit")  # speed_limit.zip and, beside it, speed_limit.constraints.json

The algorithm itself is left as it is. It is given the reward of the Lagrangian relaxation of the constrained
problem (Ray, Achiam and Amodei 2019, "Benchmarking Safe Exploration in Deep Reinforcement Learning",
section 4), here with K constraints,

    r' = (r - sum_k lambda_k c_k) / (1 + sum_k lambda_k),

and the multipliers lambda_k follow the costs of the episodes that finish. The division keeps the reward's
scale bounded while a multiplier grows; `norm` is passed on to `saferl.constraints.scalarise`.

On-policy algorithms see r' with the multipliers of the moment of collection: `LagrangianVecEnv` makes it,
and the multipliers move at the end of each rollout. Off-policy algorithms reuse transitions long after
their multipliers have moved, so `LagrangianReplayBuffer` keeps the raw reward and the costs apart and the
reward it serves always has the live multipliers. Costs come from `info["costs"][name]`, or from
`info["cost"]` for a constraint named "cost". In `info`, the raw reward is left under "raw_reward".

What the algorithm learns is one value for r', not a value for the reward and one for each cost; agents that
keep them apart (`saferl.agents.online`) estimate each with its own critic.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from saferl.constraints import ConstraintSet, scalarise
from saferl.constraints.scalarise import Norm
from saferl.errors import CheckpointError, MissingPackageError, UsageError

try:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
    from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper
except ImportError as error:
    raise MissingPackageError(
        "stable-baselines3 is needed for saferl.agents.sb3; install it with: pip install 'saferl[control]'"
    ) from error

__all__ = [
    "LagrangianCallback",
    "LagrangianDictReplayBuffer",
    "LagrangianNStepReplayBuffer",
    "LagrangianReplayBuffer",
    "LagrangianVecEnv",
    "SB3VecEnv",
    "constrained",
    "load_constrained",
]

RAW_REWARD = "raw_reward"
EPISODE = "constraint_episode"

Floats = NDArray[np.floating[Any]]


def _cost(info: Mapping[str, Any], name: str) -> float:
    """The cost called `name` of one environment's step."""
    costs = info.get("costs") or {}
    if name in costs:
        return float(costs[name])
    if name == "cost" and "cost" in info:
        return float(info["cost"])
    known = sorted({*costs, *(["cost"] if "cost" in info else [])})
    raise UsageError(
        f"the environment reports no cost named {name!r}; "
        + (f"it reports {', '.join(known)}." if known else 'put the step\'s cost in info["cost"].')
    )


def _mix(rewards: Floats, costs: Mapping[str, Floats], constraints: ConstraintSet, norm: Norm) -> Floats:
    """r' in float32 from rewards and costs of one shape; exact for the reward where all multipliers are 0."""
    mixed = scalarise(
        np.asarray(rewards, np.float64),
        {name: np.asarray(cost, np.float32).astype(np.float64) for name, cost in costs.items()},
        constraints.multipliers,
        norm=norm,
    )
    return np.asarray(mixed, np.float32)


class LagrangianVecEnv(VecEnvWrapper):
    """Replace the reward by r' of the module's docstring, with the multipliers of the moment.

    `info["raw_reward"]` keeps the environment's reward; the costs in `info` are left alone. When an episode
    ends, its `info` gets "constraint_episode": {"return": float, "cost": float, "costs": {name: float},
    "length": int}, in raw terms ("cost" sums `info["cost"]`, or all constrained costs where that is absent),
    and "episode", which Stable-Baselines3 logs, unless a Monitor has put it there.

    Put VecNormalize around it, not below.

    Args:
        venv: an environment that reports costs.
        constraints: read at every step, never written.
        norm: how `scalarise` normalises.
    """

    def __init__(self, venv: VecEnv, constraints: ConstraintSet, norm: Norm = "sum") -> None:
        super().__init__(venv)
        self.constraints = constraints
        self.norm = norm
        self._clear()

    def _clear(self) -> None:
        self._returns = np.zeros(self.num_envs)
        self._totals = np.zeros(self.num_envs)
        self._costs = {name: np.zeros(self.num_envs) for name in self.constraints.names}
        self._lengths = np.zeros(self.num_envs, np.int64)

    def reset(self) -> Any:
        """Start all episodes anew; what was summed of unfinished ones is forgotten."""
        self._clear()
        return self.venv.reset()

    def step_wait(self) -> Any:
        """Step; rewards (num_envs,) float32 are r'. Raises UsageError where a constrained cost is missing."""
        obs, rewards, dones, infos = self.venv.step_wait()
        costs = {name: np.array([_cost(info, name) for info in infos]) for name in self._costs}
        self._returns += rewards
        self._lengths += 1
        for name, cost in costs.items():
            self._costs[name] += cost
        if all("cost" in info for info in infos):
            self._totals += [float(info["cost"]) for info in infos]
        else:
            self._totals += sum(costs.values())
        for i, info in enumerate(infos):
            info[RAW_REWARD] = float(rewards[i])
            if dones[i]:
                self._finish(i, info)
        return obs, _mix(rewards, costs, self.constraints, self.norm), dones, infos

    def _finish(self, i: int, info: dict[str, Any]) -> None:
        info[EPISODE] = {
            "return": float(self._returns[i]),
            "cost": float(self._totals[i]),
            "costs": {name: float(cost[i]) for name, cost in self._costs.items()},
            "length": int(self._lengths[i]),
        }
        info.setdefault("episode", {"r": float(self._returns[i]), "l": int(self._lengths[i]), "t": 0.0})
        self._returns[i] = self._totals[i] = self._lengths[i] = 0
        for cost in self._costs.values():
            cost[i] = 0.0


class _LagrangianBuffer:
    """Mixed into a replay buffer: stores rewards and costs apart, serves r' with the live multipliers.

    `rewards`, the array that every buffer of Stable-Baselines3 samples from, is brought up to date in one
    vectorised pass whenever a multiplier has moved since the last sample: once in `update_every` episodes.
    """

    # what the buffer mixed with brings
    rewards: Floats
    pos: int
    buffer_size: int
    n_envs: int

    constraints: ConstraintSet | None = None
    norm: Norm = "sum"
    raw_rewards: Floats
    costs: dict[str, Floats]
    _applied: dict[str, float]

    def bind(self, constraints: ConstraintSet, norm: Norm = "sum") -> None:
        """Follow these constraints' multipliers; the callback calls this before the first transition.

        Raises:
            UsageError: the buffer already holds costs under other names.
        """
        names = list(constraints.names)
        if not hasattr(self, "costs"):
            self.raw_rewards = np.zeros_like(self.rewards)
            self.costs = {name: np.zeros_like(self.rewards) for name in names}
            self._applied = {}
        elif set(self.costs) != set(names):
            raise UsageError(
                f"the replay buffer holds the costs {', '.join(self.costs)}, the constraints are on "
                f"{', '.join(names)}; start with an empty buffer."
            )
        if norm != self.norm:
            self._applied = {}
        self.constraints, self.norm = constraints, norm

    def add(
        self, obs: Any, next_obs: Any, action: Any, reward: Any, done: Any, infos: list[dict[str, Any]]
    ) -> None:
        """Store a transition of each environment, its raw reward and its costs."""
        constraints = self._bring_up_to_date()
        row = self.pos
        self.raw_rewards[row] = [info.get(RAW_REWARD, reward[i]) for i, info in enumerate(infos)]
        for name, cost in self.costs.items():
            cost[row] = [_cost(info, name) for info in infos]
        reward = _mix(self.raw_rewards[row], self._row_costs(row), constraints, self.norm)
        super().add(obs, next_obs, action, reward, done, infos)  # type: ignore[misc]

    def sample(self, batch_size: int, env: Any = None) -> Any:
        """Sample as the buffer mixed with does, with r' at the multipliers of now."""
        self._bring_up_to_date()
        return super().sample(batch_size, env)  # type: ignore[misc]

    def _row_costs(self, rows: Any) -> dict[str, Floats]:
        return {name: cost[rows] for name, cost in self.costs.items()}

    def _bring_up_to_date(self) -> ConstraintSet:
        if self.constraints is None:
            raise UsageError("the replay buffer knows no constraints; pass LagrangianCallback to learn().")
        multipliers = {name: float(value) for name, value in self.constraints.multipliers.items()}
        if multipliers != self._applied:
            rows = slice(0, self.size())  # type: ignore[attr-defined]
            self.rewards[rows] = _mix(
                self.raw_rewards[rows], self._row_costs(rows), self.constraints, self.norm
            )
            self._applied = multipliers
        return self.constraints

    def __getstate__(self) -> dict[str, Any]:
        """Leave the constraints out of a saved buffer; they are saved beside the model, once."""
        return {**self.__dict__, "constraints": None, "_applied": {}}


class LagrangianReplayBuffer(_LagrangianBuffer, ReplayBuffer):
    """`ReplayBuffer` with live multipliers; pass it as `replay_buffer_class`."""


class LagrangianDictReplayBuffer(_LagrangianBuffer, DictReplayBuffer):
    """`DictReplayBuffer` with live multipliers, for Dict observations."""


class LagrangianNStepReplayBuffer(_LagrangianBuffer, NStepReplayBuffer):
    """`NStepReplayBuffer` with live multipliers; takes n_steps and gamma in `replay_buffer_kwargs`."""


class LagrangianCallback(BaseCallback):
    """Feed finished episodes' costs to the constraints, move the multipliers, log and save.

    The multipliers move at the end of a rollout in which an episode finished (on-policy algorithms), or
    once `update_every` episodes have finished since the last time (off-policy algorithms). Each time it
    logs, over those episodes and in raw terms, `train/return`, `train/cost` and the constraints' own
    `constraint/NAME/...`.

    Args:
        constraints: the set that `LagrangianVecEnv` reads.
        update_every: finished episodes between updates, for off-policy algorithms.
        save_path: where to save model and constraints when training ends, or None.
        verbose: as of Stable-Baselines3.
    """

    def __init__(
        self,
        constraints: ConstraintSet,
        *,
        update_every: int = 10,
        save_path: str | Path | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        if update_every < 1:
            raise UsageError(f"update_every is {update_every}; the multipliers need at least one episode.")
        self.constraints = constraints
        self.update_every = update_every
        self.save_path = save_path
        self._episodes: list[dict[str, Any]] = []

    def _init_callback(self) -> None:
        wrapper = _lagrangian_env(self.model.get_env())
        if wrapper is None or wrapper.constraints is not self.constraints:
            raise UsageError(
                "the model's environment is not under these constraints; wrap it in "
                "LagrangianVecEnv(venv, constraints) with the same ConstraintSet."
            )
        self._off_policy = isinstance(self.model, OffPolicyAlgorithm)
        if self._off_policy:
            buffer = self.model.replay_buffer  # type: ignore[attr-defined]
            if not isinstance(buffer, _LagrangianBuffer):
                raise UsageError(
                    f"{type(buffer).__name__} would keep rewards with stale multipliers; pass "
                    "replay_buffer_class=LagrangianReplayBuffer (LagrangianDictReplayBuffer for Dict "
                    "observations)."
                )
            buffer.bind(self.constraints, wrapper.norm)

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if EPISODE in info:
                self._episodes.append(info[EPISODE])
        if self._off_policy and len(self._episodes) >= self.update_every:
            self._update()
        return True

    def _on_rollout_end(self) -> None:
        if self._episodes and not self._off_policy:
            self._update()

    def _on_training_end(self) -> None:
        if self.save_path is not None:
            self.save(self.save_path)

    def _update(self) -> None:
        episodes, self._episodes = self._episodes, []
        self.constraints.observe(
            {
                name: np.array([episode["costs"][name] for episode in episodes])
                for name in self.constraints.names
            }
        )
        self.constraints.update()
        self.logger.record("train/return", float(np.mean([episode["return"] for episode in episodes])))
        self.logger.record("train/cost", float(np.mean([episode["cost"] for episode in episodes])))
        for key, value in self.constraints.metrics().items():
            self.logger.record(key, value)

    def save(self, path: str | Path) -> None:
        """Save the model as `path`.zip and the constraints' state as `path`.constraints.json."""
        stem = _stem(path)
        stem.parent.mkdir(parents=True, exist_ok=True)
        self.model.save(stem.with_name(f"{stem.name}.zip"))
        target = stem.with_name(f"{stem.name}.constraints.json")
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(self.constraints.state_dict(), indent=1))
        partial.replace(target)

    def load_constraints(self, path: str | Path) -> None:
        """Take over the state of the constraints that `save(path)` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or of other constraints.
        """
        stem = _stem(path)
        source = stem.with_name(f"{stem.name}.constraints.json")
        try:
            self.constraints.load_state_dict(json.loads(source.read_text()))
        except OSError as error:
            raise CheckpointError(
                f"{source} cannot be read ({error.strerror}); save the model again."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{source} does not fit these constraints ({error}).") from error


def _stem(path: str | Path) -> Path:
    path = Path(path)
    return path.with_suffix("") if path.suffix == ".zip" else path


def _lagrangian_env(env: VecEnv | None) -> LagrangianVecEnv | None:
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, LagrangianVecEnv):
            return env
        env = env.venv
    return None


class SB3VecEnv(VecEnv):
    """A Gymnasium `VectorEnv` with SAME_STEP autoreset, such as `saferl.envs.make_vec` gives, for
    Stable-Baselines3.

    Each environment's `info` holds its row of every array in the vector's info, so "cost" as a float and
    "costs" as a dictionary; at the end of an episode "terminal_observation" and "TimeLimit.truncated" (cut
    off by time and not terminated), as Stable-Baselines3 expects.

    Raises:
        UsageError: another autoreset mode, or Tuple observations, which Stable-Baselines3 does not know.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        mode = env.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            raise UsageError(
                f"Stable-Baselines3 needs SAME_STEP autoreset and this environment has {mode}; make it with "
                "saferl.envs.make_vec."
            )
        if isinstance(env.single_observation_space, spaces.Tuple):
            raise UsageError("Stable-Baselines3 knows no Tuple observations; use a Dict space.")
        self.env = env
        self._actions: Any = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> Any:
        """Start all episodes, with the seeds and options set since the last reset."""
        seeds = None if None in self._seeds else list(self._seeds)
        obs, _ = self.env.reset(seed=seeds, options=self._options[0] or None)  # type: ignore[arg-type]
        self.reset_infos = [{} for _ in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return _copy(obs)

    def step_async(self, actions: NDArray[Any]) -> None:
        """Remember the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> Any:
        """Step all environments: observations, rewards (N,) float32, dones (N,), a list of N infos."""
        obs, rewards, terminated, truncated, info = self.env.step(self._actions)
        dones = np.logical_or(terminated, truncated)
        infos = [_row(info, i) for i in range(self.num_envs)]
        for i in np.flatnonzero(dones).tolist():
            infos[i]["terminal_observation"] = _copy(_member(info["final_obs"], i))
            infos[i]["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
        return _copy(obs), np.array(rewards, np.float32), dones, infos

    def close(self) -> None:
        """Close the vector environment."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The vector environment's attribute, once an environment asked for."""
        return [getattr(self.env, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the vector environment, for all environments at once."""
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Call a method of every environment, where the vector environment offers `call`."""
        call = getattr(self.env, "call", None)
        if call is None:
            raise UsageError(f"{type(self.env).__name__} cannot call {method_name!r} of single environments.")
        results = call(method_name, *args, **kwargs)
        return [results[i] for i in self._get_indices(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None
    ) -> list[bool]:
        """No environment of a batch is wrapped on its own."""
        return [False for _ in self._get_indices(indices)]


def _copy(value: Any) -> Any:
    """Observations that the environment may overwrite, copied."""
    if isinstance(value, Mapping):
        return {key: _copy(member) for key, member in value.items()}
    return np.array(value)


def _member(batch: Any, i: int) -> Any:
    if isinstance(batch, Mapping):
        return {key: _member(value, i) for key, value in batch.items()}
    return batch[i]


_FINAL = ("final_obs", "final_info", "final_observation")


def _row(info: Mapping[str, Any], i: int) -> dict[str, Any]:
    """Environment i's part of a vector environment's info, masks ("_key") heeded."""
    row: dict[str, Any] = {}
    for key, value in info.items():
        mask = info.get(f"_{key}")
        if key.startswith("_") or key in _FINAL or (mask is not None and not mask[i]):
            continue
        if isinstance(value, Mapping):
            row[key] = _row(value, i)
        elif isinstance(value, np.ndarray) and value.ndim > 0:
            member = value[i]
            row[key] = member.item() if isinstance(member, np.generic) else member
    return row


def _vec_env(env: Any, num_envs: int) -> VecEnv:
    if isinstance(env, str):
        from saferl.envs import make_vec

        env = make_vec(env, num_envs)
    if isinstance(env, VectorEnv):
        return SB3VecEnv(env)
    if isinstance(env, gym.Env):
        return DummyVecEnv([lambda: env])
    if isinstance(env, VecEnv):
        return env
    raise UsageError(
        f"{type(env).__name__} is no environment; give an id, a Gymnasium or an SB3 environment."
    )


def constrained(
    algorithm: type[BaseAlgorithm],
    policy: Any,
    env: Any,
    constraints: ConstraintSet,
    *,
    num_envs: int = 1,
    norm: Norm = "sum",
    update_every: int = 10,
    **kwargs: Any,
) -> tuple[Any, LagrangianCallback]:
    """Make a model of Stable-Baselines3 whose `learn` keeps constraints; see the module's docstring.

    Args:
        algorithm: the class, such as PPO or SAC.
        policy: the policy's name or class, as for the algorithm.
        env: an id for `saferl.envs.make_vec`, a Gymnasium Env or VectorEnv, or a VecEnv.
        constraints: limits on the costs that the environment reports.
        num_envs: environments to make, where `env` is an id.
        norm: how `scalarise` normalises.
        update_every: finished episodes between updates of the multipliers, for off-policy algorithms.
        **kwargs: the algorithm's own arguments.

    Returns:
        The model, and the callback to pass to its `learn`.

    Raises:
        UsageError: `env` is no environment, or a replay buffer of one's own does not know multipliers.
    """
    venv = LagrangianVecEnv(_vec_env(env, num_envs), constraints, norm)
    if issubclass(algorithm, OffPolicyAlgorithm) and kwargs.get("replay_buffer_class") is None:
        n_steps = kwargs.pop("n_steps", 1)
        if isinstance(venv.observation_space, spaces.Dict):
            kwargs["replay_buffer_class"] = LagrangianDictReplayBuffer
        elif n_steps > 1:
            kwargs["replay_buffer_class"] = LagrangianNStepReplayBuffer
            own = {"n_steps": n_steps, "gamma": kwargs.get("gamma", 0.99)}
            kwargs["replay_buffer_kwargs"] = {**own, **(kwargs.get("replay_buffer_kwargs") or {})}
        else:
            kwargs["replay_buffer_class"] = LagrangianReplayBuffer
    elif not issubclass(algorithm, OnPolicyAlgorithm | OffPolicyAlgorithm):
        raise UsageError(f"{algorithm.__name__} is neither an on-policy nor an off-policy algorithm of SB3.")
    model = algorithm(policy, venv, **kwargs)
    return model, LagrangianCallback(constraints, update_every=update_every)


def load_constrained(
    algorithm: type[BaseAlgorithm],
    path: str | Path,
    env: Any,
    constraints: ConstraintSet,
    *,
    num_envs: int = 1,
    norm: Norm = "sum",
    update_every: int = 10,
    **kwargs: Any,
) -> tuple[Any, LagrangianCallback]:
    """Continue from what `LagrangianCallback.save` wrote: the model, and the constraints' state.

    This goes through Stable-Baselines3's own `load`, which unpickles: open only files of your own. To act
    with a foreign file's policy, `saferl.load_policy` opens it safely.

    Args and Returns: as of `constrained`; `constraints` is built as before and takes over the saved state.

    Raises:
        CheckpointError: a file is missing, or the constraints are others.
    """
    stem = _stem(path)
    if not stem.with_name(f"{stem.name}.zip").is_file():
        raise CheckpointError(f"{stem}.zip does not exist; give the path passed to LagrangianCallback.save.")
    callback = LagrangianCallback(constraints, update_every=update_every)
    callback.load_constraints(path)
    venv = LagrangianVecEnv(_vec_env(env, num_envs), constraints, norm)
    model = algorithm.load(stem.with_name(f"{stem.name}.zip"), env=venv, **kwargs)
    return model, callback
