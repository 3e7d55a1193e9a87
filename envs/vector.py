"""Vector environments that report costs: one contract for native, in-process and multi-process batches.

Every vector environment of `saferl.envs` follows Gymnasium's `VectorEnv` with `AutoresetMode.SAME_STEP`
and adds the cost of the step. `step(actions)` returns

    observations, rewards (N,) float64, terminations (N,) bool, truncations (N,) bool, info

where `info` always holds

    info["cost"]   (N,) float64, the cost of the step just taken (of the finished episode's last step
                   where an episode ended, never of the reset that followed)
    info["costs"]  {name: (N,) float64}, its parts, a key for each of metadata["cost_names"]

and, when at least one episode ended in this step,

    info["final_obs"]   observations of the same batched structure as `observations`, taken before the reset
                        (rows whose episode goes on equal `observations`)
    info["_final_obs"]  (N,) bool, the rows whose episode ended
    info["final_info"]  the other entries of the finished episodes' last info, if there are any

`reset(options={"reset_mask": mask})`, mask (N,) bool, starts a new episode in the selected environments and
leaves the others as they are; it returns the observations of all. Seeds count for the selected ones only.

An environment declares the parts of its cost in `metadata["cost_names"]` and gives them in
`info["costs"]`. One that gives `info["cost"]` alone has the single part "cost"; one without any cost
counts as free of cost.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import cloudpickle  # type: ignore[import-untyped]  # a dependency of Gymnasium
import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from saferl.errors import SaferlError, UsageError

__all__ = [
    "ProcessVectorEnv",
    "SerialVectorEnv",
    "StatefulVectorEnv",
    "check_num_envs",
    "cost_names_of",
    "expand_seed",
    "split_reset_mask",
]

EnvFn: TypeAlias = Callable[[], gym.Env]
#: A batch: one array, or arrays nested in dicts and tuples as the space is.
Tree: TypeAlias = Any
#: What an environment said besides its cost: (index of the environment, its info).
Extras: TypeAlias = list[tuple[int, dict[str, Any]]]
_Take: TypeAlias = Callable[[tuple[int, ...], np.dtype], np.ndarray]

_FLAT_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
_ALIGNMENT = 64  # bytes; keeps arrays of different workers off one another's cache lines
_SHUTDOWN_SECONDS = 5.0


@runtime_checkable
class StatefulVectorEnv(Protocol):
    """A vector environment whose future can be stored and restored bit for bit, random numbers included."""

    def get_state(self) -> dict[str, Any]:
        """Return the complete state: NumPy arrays and JSON values by name, independent of the environment."""

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; the steps that follow equal those that followed `get_state`."""


def cost_names_of(env: gym.Env | VectorEnv) -> tuple[str, ...]:
    """Return the names of the parts of the environment's cost, ("cost",) where it declares none."""
    return tuple(env.metadata.get("cost_names", ())) or ("cost",)


def check_num_envs(num_envs: int) -> int:
    """Return `num_envs`; raise UsageError unless it is at least 1."""
    if num_envs < 1:
        raise UsageError(f"num_envs is {num_envs}; ask for at least one environment")
    return num_envs


def expand_seed(seed: int | Sequence[int | None] | None, num_envs: int) -> list[int | None]:
    """Return one seed an environment: `seed + i` for an int, `None`s for None, a list as it is.

    Raises UsageError when a list has not exactly `num_envs` entries, or a seed is negative.
    """
    if seed is None:
        return [None] * num_envs
    if isinstance(seed, (int, np.integer)):
        seeds: list[int | None] = [int(seed) + i for i in range(num_envs)]
    else:
        seeds = [None if s is None else int(s) for s in seed]
    if len(seeds) != num_envs:
        raise UsageError(f"got {len(seeds)} seeds for {num_envs} environments; give each its own")
    if any(s is not None and s < 0 for s in seeds):
        raise UsageError(f"the seed {min(s for s in seeds if s is not None)} is negative; seeds start at 0")
    return seeds


def split_reset_mask(
    options: Mapping[str, Any] | None, num_envs: int
) -> tuple[np.ndarray, dict[str, Any] | None]:
    """Return `options["reset_mask"]` (num_envs,) bool, all True where it is not given, and the other options.

    The mask may be an array or a torch tensor; an array comes back. Raises UsageError when it has another
    shape or is not of booleans.
    """
    if options is None or "reset_mask" not in options:
        return np.ones(num_envs, np.bool_), None if options is None else dict(options)
    rest = {name: value for name, value in options.items() if name != "reset_mask"}
    given = options["reset_mask"]
    mask = np.asarray(given.cpu() if hasattr(given, "cpu") else given)  # a tensor of any device, or an array
    if mask.shape != (num_envs,) or mask.dtype != np.bool_:
        raise UsageError(
            f"reset_mask has shape {mask.shape} and type {mask.dtype}; give {num_envs} booleans, one an "
            "environment"
        )
    return mask, rest or None


# --- batches: allocated, written and read row by row, the same code in every process -------------------


def _allocate(space: spaces.Space, num_envs: int, take: _Take) -> Tree:
    """Build the arrays of a batch of `num_envs` elements of `space`, each taken from `take`."""
    if isinstance(space, spaces.Dict):
        return {name: _allocate(part, num_envs, take) for name, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_allocate(part, num_envs, take) for part in space.spaces)
    if isinstance(space, _FLAT_SPACES):
        assert space.dtype is not None
        assert space.shape is not None
        return take((num_envs, *space.shape), np.dtype(space.dtype))
    raise UsageError(
        f"{type(space).__name__} spaces cannot be batched; "
        "use Box, Discrete, MultiDiscrete, MultiBinary, or Dict and Tuple of these"
    )


def _write_row(batch: Tree, index: int, value: Any) -> None:
    if isinstance(batch, dict):
        for name, part in batch.items():
            _write_row(part, index, value[name])
    elif isinstance(batch, tuple):
        for part, element in zip(batch, value, strict=True):
            _write_row(part, index, element)
    else:
        batch[index] = value


def _read_row(batch: Tree, index: int) -> Any:
    """Return a copy of one row, so that an environment may keep it."""
    if isinstance(batch, dict):
        return {name: _read_row(part, index) for name, part in batch.items()}
    if isinstance(batch, tuple):
        return tuple(_read_row(part, index) for part in batch)
    row = batch[index]
    return row.copy() if isinstance(row, np.ndarray) else row


def _copy_tree(batch: Tree) -> Tree:
    if isinstance(batch, dict):
        return {name: _copy_tree(part) for name, part in batch.items()}
    if isinstance(batch, tuple):
        return tuple(_copy_tree(part) for part in batch)
    return batch.copy()


def _copy_rows(source: Tree, target: Tree, mask: np.ndarray) -> None:
    """Overwrite the rows of `target` where `mask` (N,) is true."""
    if isinstance(source, dict):
        for name, part in source.items():
            _copy_rows(part, target[name], mask)
    elif isinstance(source, tuple):
        for part, other in zip(source, target, strict=True):
            _copy_rows(part, other, mask)
    else:
        target[mask] = source[mask]


def _write_actions(batch: Tree, actions: Any) -> None:
    if isinstance(batch, dict):
        for name, part in batch.items():
            _write_actions(part, actions[name])
        return
    if isinstance(batch, tuple):
        for part, element in zip(batch, actions, strict=True):
            _write_actions(part, element)
        return
    values = np.asarray(actions)
    if values.shape != batch.shape:
        raise UsageError(f"actions have shape {values.shape}; this environment takes {batch.shape}")
    np.copyto(batch, values, casting="same_kind")


class _Batch:
    """Everything a step hands over, in plain or in shared memory.

    The arrays are taken in a fixed order, so that a worker that is given the same memory finds them at
    the same offsets.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        num_envs: int,
        num_costs: int,
        take: _Take,
    ) -> None:
        vector = (num_envs,)
        self.actions = _allocate(action_space, num_envs, take)
        self.obs = _allocate(observation_space, num_envs, take)
        self.final_obs = _allocate(observation_space, num_envs, take)
        self.rewards = take(vector, np.dtype(np.float64))
        self.cost = take(vector, np.dtype(np.float64))
        self.costs = take((num_costs, num_envs), np.dtype(np.float64))
        self.terminations = take(vector, np.dtype(np.bool_))
        self.truncations = take(vector, np.dtype(np.bool_))


def _take_plain(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.zeros(shape, dtype)


class _Measure:
    """Counts the bytes that a `_Batch` needs."""

    def __init__(self) -> None:
        self.size = 0

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        self.size += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        return np.empty(0, dtype)


class _Arena:
    """Hands out consecutive arrays of one shared memory."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.offset = 0

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        count = math.prod(shape)
        array = np.frombuffer(self.memory, dtype, count, self.offset).reshape(shape)
        self.offset += -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        return array


class _Block:
    """Some consecutive environments and the rows of the batch they own."""

    def __init__(
        self, envs: Sequence[gym.Env], first: int, cost_names: tuple[str, ...], batch: _Batch
    ) -> None:
        self.envs = envs
        self.first = first
        self.cost_names = cost_names
        self.batch = batch

    def reset(
        self, seeds: Sequence[int | None], mask: Sequence[bool], options: dict[str, Any] | None
    ) -> Extras:
        """Start new episodes where `mask` is true; their observations go into the batch."""
        extras: Extras = []
        for index, (env, seed, chosen) in enumerate(zip(self.envs, seeds, mask, strict=True), self.first):
            if not chosen:
                continue
            obs, info = env.reset(seed=seed, options=options)
            _write_row(self.batch.obs, index, obs)
            _add_extra(extras, index, info)
        return extras

    def step(self) -> tuple[Extras, Extras]:
        """Take the batch's actions; return the infos of running episodes and those of finished ones."""
        batch, extras, final_extras = self.batch, cast(Extras, []), cast(Extras, [])
        for index, env in enumerate(self.envs, self.first):
            obs, reward, terminated, truncated, info = env.step(_read_row(batch.actions, index))
            batch.rewards[index] = reward
            batch.terminations[index] = terminated
            batch.truncations[index] = truncated
            self._write_cost(index, info)
            if terminated or truncated:
                _add_extra(final_extras, index, info)
                _write_row(batch.final_obs, index, obs)
                obs, info = env.reset()
            _write_row(batch.obs, index, obs)
            _add_extra(extras, index, info)
        return extras, final_extras

    def _write_cost(self, index: int, info: Mapping[str, Any]) -> None:
        cost = float(info.get("cost", 0.0))
        self.batch.cost[index] = cost
        parts = info.get("costs")
        if parts is None:
            parts = {"cost": cost}
        for row, name in enumerate(self.cost_names):
            try:
                self.batch.costs[row, index] = parts[name]
            except KeyError:
                raise SaferlError(
                    f"the environment declares the cost {name!r} in metadata['cost_names'] but its step "
                    f"gave {sorted(parts)}; give every declared cost in info['costs'] at every step"
                ) from None


def _add_extra(extras: Extras, index: int, info: Mapping[str, Any]) -> None:
    rest = {key: value for key, value in info.items() if key not in ("cost", "costs")}
    if rest:
        extras.append((index, rest))


# --- the vector environments --------------------------------------------------------------------------


class _ListVectorEnv(VectorEnv[Any, Any, np.ndarray]):
    """What the serial and the multi-process environment share: spaces, contract, bookkeeping."""

    _batch: _Batch

    def _describe(self, env: gym.Env, num_envs: int) -> None:
        self.num_envs = num_envs
        self.spec = env.spec
        self.render_mode = env.render_mode
        self.single_observation_space = env.observation_space
        self.single_action_space = env.action_space
        self.observation_space = batch_space(env.observation_space, num_envs)
        self.action_space = batch_space(env.action_space, num_envs)
        self._cost_names = cost_names_of(env)
        self.metadata = {
            **env.metadata,
            "autoreset_mode": AutoresetMode.SAME_STEP,
            "cost_names": self._cost_names,
        }

    def _make_batch(self, take: _Take) -> _Batch:
        return _Batch(
            self.single_observation_space,
            self.single_action_space,
            self.num_envs,
            len(self._cost_names),
            take,
        )

    def _reset_envs(
        self, seeds: list[int | None], mask: list[bool], options: dict[str, Any] | None
    ) -> Extras:
        raise NotImplementedError

    def _step_envs(self) -> tuple[Extras, Extras]:
        raise NotImplementedError

    def _collect(self, extras: Extras) -> dict[str, Any]:
        info: dict[str, Any] = {}
        for index, extra in extras:
            info = self._add_info(info, extra, index)
        return info

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Start a new episode in every environment, or in those that `options["reset_mask"]` selects.

        `seed=s` seeds environment i with s + i; a list gives one seed an environment; None goes on with
        the random numbers at hand. The other `options` are passed to every environment's `reset`.
        Returns the batched observations (N, ...) of all environments and the infos of those reset.
        """
        self._check_open()
        mask, rest = split_reset_mask(options, self.num_envs)
        extras = self._reset_envs(expand_seed(seed, self.num_envs), mask.tolist(), rest)
        return _copy_tree(self._batch.obs), self._collect(extras)

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take one step in every environment and restart those whose episode ended.

        `actions` has the batched action space's shape and is cast to its dtype. The returned arrays are
        the caller's own. The module's docstring describes `info`.
        """
        self._check_open()
        batch = self._batch
        _write_actions(batch.actions, actions)
        extras, final_extras = self._step_envs()
        obs = _copy_tree(batch.obs)
        info = self._collect(extras)
        info["cost"] = batch.cost.copy()
        info["costs"] = {name: batch.costs[row].copy() for row, name in enumerate(self._cost_names)}
        ended = batch.terminations | batch.truncations
        if ended.any():
            final_obs = _copy_tree(obs)
            _copy_rows(batch.final_obs, final_obs, ended)
            info["final_obs"] = final_obs
            info["_final_obs"] = ended
            if final_extras:
                info["final_info"] = self._collect(final_extras)
        return obs, batch.rewards.copy(), batch.terminations.copy(), batch.truncations.copy(), info

    def _check_open(self) -> None:
        if self.closed:
            raise SaferlError("this vector environment is closed; make a new one")

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return attribute `name` of every environment, called with the arguments where it is callable."""
        raise NotImplementedError

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """Return attribute `name` of every environment."""
        return self.call(name)

    def render(self) -> tuple[Any, ...]:
        """Return every environment's frame."""
        return self.call("render")


def _call(env: gym.Env, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value = env.get_wrapper_attr(name)
    return value(*args, **kwargs) if callable(value) else value


def _check_same_spaces(env: gym.Env, observation_space: spaces.Space, action_space: spaces.Space) -> None:
    if env.observation_space != observation_space or env.action_space != action_space:
        raise UsageError(
            f"the environments of a vector must have equal spaces; got {env.observation_space} with "
            f"{env.action_space} beside {observation_space} with {action_space}"
        )


class SerialVectorEnv(_ListVectorEnv):
    """Environments stepped one after the other in this process (for the contract, see the module).

    `env_fns` holds one function an environment. Raises UsageError when it is empty or the environments'
    spaces differ.
    """

    def __init__(self, env_fns: Sequence[EnvFn]) -> None:
        check_num_envs(len(env_fns))
        self.envs = [make() for make in env_fns]
        self._describe(self.envs[0], len(self.envs))
        for env in self.envs:
            _check_same_spaces(env, self.single_observation_space, self.single_action_space)
        self._batch = self._make_batch(_take_plain)
        self._block = _Block(self.envs, 0, self._cost_names, self._batch)

    def _reset_envs(
        self, seeds: list[int | None], mask: list[bool], options: dict[str, Any] | None
    ) -> Extras:
        return self._block.reset(seeds, mask, options)

    def _step_envs(self) -> tuple[Extras, Extras]:
        return self._block.step()

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return attribute `name` of every environment, called with the arguments where it is callable."""
        self._check_open()
        return tuple(_call(env, name, args, kwargs) for env in self.envs)

    def close_extras(self, **kwargs: Any) -> None:
        """Close every environment."""
        for env in self.envs:
            env.close()


class ProcessVectorEnv(_ListVectorEnv):
    """Environments spread over worker processes, results bit for bit those of `SerialVectorEnv`.

    Each of the `processes` workers holds an equal share of consecutive environments, to within one.
    Observations, rewards and costs pass through shared memory. The workers are started by a fork server
    (where the platform has one), not forked from this process, so threads of torch or MuJoCo are safe;
    as with every such start, a script must guard its entry by `if __name__ == "__main__":`.

    An exception in a worker is raised here, with its type and message and the worker's traceback as a
    note; it and Ctrl-C close the environment. Workers end with `close()`, and by themselves when this
    process dies.

    Args:
        env_fns: one function an environment; sent to the workers by cloudpickle.
        processes: number of workers; more than environments counts as one an environment.
        start_method: of `multiprocessing`; None picks "forkserver", or "spawn" where that is missing.

    Raises UsageError when `env_fns` is empty, `processes` is below 1, or the spaces differ.
    """

    def __init__(self, env_fns: Sequence[EnvFn], processes: int, *, start_method: str | None = None) -> None:
        self.closed = True  # until the workers run: close() then has nothing to do
        num_envs = check_num_envs(len(env_fns))
        if processes < 1:
            raise UsageError(f"processes is {processes}; ask for at least one worker process")
        probe = env_fns[0]()
        self._describe(probe, num_envs)
        probe.close()

        if start_method is None:
            methods = multiprocessing.get_all_start_methods()
            start_method = "forkserver" if "forkserver" in methods else "spawn"
        context = multiprocessing.get_context(start_method)
        measure = _Measure()
        self._make_batch(measure)
        # An anonymous shared mapping: it has no name to clean up, whatever way the processes end.
        memory = context.RawArray("b", measure.size)
        self._batch = self._make_batch(_Arena(memory))

        processes = min(processes, num_envs)
        bounds = [num_envs * i // processes for i in range(processes + 1)]
        self._ranges = list(itertools.pairwise(bounds))
        self._connections: list[Connection] = []
        self._workers: list[Any] = []
        self.closed = False
        try:
            for first, last in self._ranges:
                here, there = context.Pipe()
                worker = context.Process(  # type: ignore[attr-defined]  # typeshed's BaseContext lacks it
                    target=_work,
                    name=f"saferl-envs-{first}-{last - 1}",
                    args=(
                        there,
                        memory,
                        cloudpickle.dumps(list(env_fns[first:last])),
                        first,
                        num_envs,
                        pickle.dumps((self.single_observation_space, self.single_action_space)),
                        self._cost_names,
                    ),
                    daemon=True,
                )
                worker.start()
                there.close()  # else the end of a worker would not show as the end of its messages
                self._connections.append(here)
                self._workers.append(worker)
            self._receive()
        except BaseException:
            self.close()
            raise

    def _exchange(self, messages: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Send each worker its message and return their answers, in order."""
        try:
            for index, (connection, message) in enumerate(zip(self._connections, messages, strict=True)):
                try:
                    connection.send(message)
                except (BrokenPipeError, ConnectionResetError):
                    raise self._died(index) from None
            return self._receive()
        except BaseException:
            # After an interrupted exchange answers and questions no longer pair up.
            self.close()
            raise

    def _receive(self) -> list[Any]:
        answers = []
        for index, connection in enumerate(self._connections):
            try:
                ok, answer = connection.recv()
            except (EOFError, ConnectionResetError):
                raise self._died(index) from None
            if not ok:
                error, note = answer
                error.add_note(note)
                raise error
            answers.append(answer)
        return answers

    def _died(self, index: int) -> SaferlError:
        first, last = self._ranges[index]
        self._workers[index].join(1.0)
        return SaferlError(
            f"the worker process of environments {first} to {last - 1} ended with exit code "
            f"{self._workers[index].exitcode}; it was killed or crashed (if memory ran out, use fewer "
            "environments or processes)"
        )

    def _reset_envs(
        self, seeds: list[int | None], mask: list[bool], options: dict[str, Any] | None
    ) -> Extras:
        messages = [("reset", seeds[first:last], mask[first:last], options) for first, last in self._ranges]
        return [extra for extras in self._exchange(messages) for extra in extras]

    def _step_envs(self) -> tuple[Extras, Extras]:
        answers = self._exchange([("step",)] * len(self._ranges))
        extras = [extra for answer in answers for extra in answer[0]]
        return extras, [extra for answer in answers for extra in answer[1]]

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return attribute `name` of every environment, called with the arguments where it is callable."""
        self._check_open()
        answers = self._exchange([("call", name, args, kwargs)] * len(self._ranges))
        return tuple(value for answer in answers for value in answer)

    def close_extras(self, **kwargs: Any) -> None:
        """End the workers: asked first, then, after a few seconds, forced."""
        for connection in self._connections:
            # A worker that is gone, or busy with a step nobody waits for, sees the closed pipe instead.
            with contextlib.suppress(OSError):
                connection.send(("close",))
            connection.close()
        deadline = time.monotonic() + _SHUTDOWN_SECONDS
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.is_alive():
                worker.terminate()
                worker.join(1.0)
            if worker.is_alive():
                worker.kill()
                worker.join()

    def __del__(self) -> None:
        if not getattr(self, "closed", True):
            self.close()


def _work(
    connection: Connection,
    memory: Any,
    env_fns: bytes,
    first: int,
    num_envs: int,
    pickled_spaces: bytes,
    cost_names: tuple[str, ...],
) -> None:
    """Run a worker: build its environments, then answer messages until told to stop or left alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    envs: list[gym.Env] = []
    block: _Block | None = None

    def answer(command: str, *arguments: Any) -> Any:
        nonlocal block
        if command == "step":
            assert block is not None
            return block.step()
        if command == "reset":
            assert block is not None
            return block.reset(*arguments)
        if command == "call":
            return [_call(env, *arguments) for env in envs]
        assert command == "build"
        observation_space, action_space = pickle.loads(pickled_spaces)
        for make in pickle.loads(env_fns):
            envs.append(make())
            _check_same_spaces(envs[-1], observation_space, action_space)
        batch = _Batch(observation_space, action_space, num_envs, len(cost_names), _Arena(memory))
        block = _Block(envs, first, cost_names, batch)
        return None

    message: tuple[Any, ...] = ("build",)
    try:
        while message[0] != "close":
            try:
                payload = pickle.dumps((True, answer(*message)))
            except Exception as error:
                note = f"in the worker process whose first environment is {first}:\n{traceback.format_exc()}"
                payload = pickle.dumps((False, (_portable(error), note)))
            connection.send_bytes(payload)
            message = connection.recv()
    except (EOFError, OSError):
        pass  # the parent is gone
    finally:
        for env in envs:
            env.close()


def _portable(error: Exception) -> Exception:
    """Return `error`, or a SaferlError with its type and message where it cannot cross a pipe."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    if type(copy) is type(error) and str(copy) == str(error):
        return error
    return SaferlError(f"{type(error).__name__}: {error}")
