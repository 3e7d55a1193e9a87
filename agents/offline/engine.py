"""The offline engine: load recorded transitions, draw batches, take gradient steps, checkpoint.

An algorithm supplies a configuration that extends `OfflineConfig` and a class with `update`, one gradient
step on a batch. The whole data set lies on the learner's device and batches are drawn with replacement, as
gathers. A checkpoint holds networks, optimisers and random state, so that a run killed at any moment goes on
to the same bits; the data are read again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from saferl.agents.online.engine import at_least
from saferl.envs.datasets import OfflineDataset
from saferl.errors import NonFiniteError, UsageError
from saferl.experiment.run import Run
from saferl.experiment.seeding import choose_device, derive_seed

__all__ = ["Algorithm", "Batch", "Context", "OfflineConfig", "reward_factor", "train_offline"]


@dataclass(frozen=True, kw_only=True)
class OfflineConfig:
    """What every offline learner shares."""

    dataset: str
    """Data set: a DSRL, D4RL or Minari file, or the name of a DSRL task."""
    env: str = ""
    """Environment id, for the spaces and the evaluation (see `saferl list envs`); a DSRL task's own when left
    out."""
    total_steps: int = 1_000_000
    """Gradient steps in all."""
    batch_size: int = 256
    """Transitions a gradient step."""
    seed: int = 0
    """Seed of initial weights, batches and noise."""
    device: str = "cpu"
    """cpu, cuda or cuda:N; the data lie there too."""
    threads: int = 1
    """Torch threads."""
    discount: float = 0.99
    """Discount of rewards and of constraints."""
    log_interval: int = 1_000
    """Gradient steps between lines of metrics, which are means over them."""
    checkpoint_interval: float = 30.0
    """Least seconds between checkpoints, which fall on lines of metrics; 0 saves at every one."""
    offline: bool = False
    """Never look for a data set on the network."""

    def __post_init__(self) -> None:
        if not self.env:
            object.__setattr__(self, "env", _environment_of(self.dataset))
        for name in ("total_steps", "batch_size", "threads", "log_interval"):
            at_least(name.replace("_", " "), getattr(self, name), 1)
        for name in ("seed", "checkpoint_interval"):
            at_least(name.replace("_", " "), getattr(self, name), 0)
        if not 0 < self.discount < 1:
            raise UsageError(f"the discount is {self.discount:g}; it must lie strictly between 0 and 1.")


class Batch(NamedTuple):
    """Transitions on the learner's device."""

    observations: Tensor
    """(B, S)"""
    actions: Tensor
    """(B, A) in [-1, 1], kept off the ends."""
    rewards: Tensor
    """(B,), scaled."""
    costs: Tensor
    """(B,)"""
    masks: Tensor
    """(B,), 0 where the episode ended, by termination or by its time limit, else 1."""
    next_observations: Tensor
    """(B, S)"""


class Algorithm(Protocol):
    """What the engine asks of a learner.

    One that also has a method `draw()` is given what that returns instead of a `Batch` of transitions drawn
    uniformly; it must take its randomness from the context's generator.
    """

    @property
    def policy(self) -> nn.Module:
        """What a checkpoint stores for acting; it has `describe`."""
        ...

    @property
    def networks(self) -> nn.Module:
        """All that is trained; its parameters must stay finite."""
        ...

    def update(self, batch: Any) -> Mapping[str, Tensor]:
        """Take one gradient step; returns detached scalars to log."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything besides the policy's weights that the rest of the run depends on."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s answer."""
        ...


@dataclass
class Context:
    """What an algorithm is built from."""

    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    device: torch.device
    generator: torch.Generator
    """The source of all noise, on the device."""
    episode_steps: int
    """Longest episode."""
    data: OfflineDataset
    """The data as recorded: the index of episodes."""
    transitions: Batch
    """The same rows on the device, as learners read them."""


def reward_factor(data: OfflineDataset, episode_steps: int) -> float:
    """T_max / (R_max - R_min), by which FISOR multiplies rewards so that tasks have one scale.

    The returns' range is that of the data's task, if it is known, else of the data's own whole episodes.
    Raises `UsageError` where they have none.
    """
    if data.task is not None:
        low, high = data.task.min_episode_reward, data.task.max_episode_reward
        episode_steps = data.task.episode_steps
    elif data.num_episodes:
        low, high = float(data.episode_returns.min()), float(data.episode_returns.max())
    else:
        low = high = 0.0
    if not high > low:
        raise UsageError(
            f"{data.source}: all whole episodes have the same return, so that rewards cannot be scaled by "
            "their range; give --reward-scale."
        )
    return episode_steps / (high - low)


def train_offline(
    config: OfflineConfig,
    run: Run,
    build: Callable[[Context], Algorithm],
    *,
    reward_scale: float | None = None,
    select: Callable[[OfflineDataset], OfflineDataset] | None = None,
) -> nn.Module:
    """Train for `config.total_steps` gradient steps, going on from the run's checkpoint if it has one.

    Args:
        config: the learner's configuration.
        run: where metrics and checkpoints go.
        build: makes the algorithm; initial weights are drawn from torch's global generator.
        reward_scale: multiplies the rewards; None takes `reward_factor`.
        select: takes what is to be learned from out of the data.

    Returns:
        the trained policy, in evaluation mode.

    Raises:
        DatasetError: the data cannot be had or are damaged.
        UsageError: the environment or the device does not exist, or the data are of another environment.
        NonFiniteError: a loss or weight is not finite; the last checkpoint is kept.
    """
    torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    generator = torch.Generator(device).manual_seed(derive_seed(config.seed, 1))
    observation_space, action_space, episode_steps = _spaces(config.env)
    data = _load(config, observation_space, action_space, quiet=run.quiet)
    if select is not None:
        data = select(data)
    if reward_scale is None:
        reward_scale = reward_factor(data, episode_steps)
    transitions = _on_device(data, action_space, reward_scale, device)
    # Weights and dropout are drawn from torch's global generators: fork them, so that a caller's stay.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(config.seed, 0))
        algorithm = build(
            Context(observation_space, action_space, device, generator, episode_steps, data, transitions)
        )
        return _loop(config, run, algorithm, transitions, generator)


def _loop(
    config: OfflineConfig, run: Run, algorithm: Algorithm, data: Batch, generator: torch.Generator
) -> nn.Module:
    step, rows, device = 0, len(data.rewards), data.rewards.device

    def uniform() -> Batch:
        drawn = torch.randint(rows, (config.batch_size,), generator=generator, device=device)
        return Batch(*(part[drawn] for part in data))

    draw: Callable[[], Any] = getattr(algorithm, "draw", uniform)
    title = f"{run.config['algorithm']} on {Path(config.dataset).name}"
    with run.progress(title, config.total_steps) as progress:
        if run.resumed is not None:
            training = run.resumed["training"]
            algorithm.policy.load_state_dict(run.resumed["policy"]["weights"])
            algorithm.load_state_dict(training["algorithm"])
            _set_random_state(training["random"], generator)
            step = training["step"]
            progress.message(f"resumed at gradient step {step:,}")
            progress.restart(step)
        state = _state(step, algorithm, generator)
        try:
            while step < config.total_steps:
                algorithm.networks.train()
                sums: dict[str, Tensor] = {}
                steps = min(config.log_interval - step % config.log_interval, config.total_steps - step)
                for k in range(steps):
                    for name, value in algorithm.update(draw()).items():
                        sums[name] = sums[name] + value if name in sums else value
                    progress.update(step + k + 1)
                step += steps
                metrics = {name: float(total) / steps for name, total in sums.items()}
                _check(algorithm, metrics, step, run)
                run.log(step, {**metrics, "time/steps_per_second": progress.steps_per_second})
                state = _state(step, algorithm, generator)
                if step >= config.total_steps or run.seconds_since_save >= config.checkpoint_interval:
                    run.save(step, state)
        except (KeyboardInterrupt, NonFiniteError):
            # The steps since the last line of metrics are lost, those before it are not.
            done = state["training"]["step"]
            if run.saved_step != done and done > 0:
                run.save(done, state)
            raise
    return algorithm.policy.eval()


def _state(step: int, algorithm: Algorithm, generator: torch.Generator) -> dict[str, Any]:
    policy: Any = algorithm.policy
    return copy.deepcopy(
        {
            "policy": {"description": policy.describe(), "weights": policy.state_dict()},
            "training": {
                "step": step,
                "random": _random_state(generator),
                "algorithm": algorithm.state_dict(),
            },
        }
    )


def _random_state(generator: torch.Generator) -> dict[str, Tensor]:
    state = {"generator": generator.get_state(), "cpu": torch.get_rng_state()}
    if generator.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(generator.device)
    return state


def _set_random_state(state: Mapping[str, Tensor], generator: torch.Generator) -> None:
    generator.set_state(state["generator"])
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], generator.device)


def _check(algorithm: Algorithm, metrics: Mapping[str, float], step: int, run: Run) -> None:
    finite = all(bool(torch.isfinite(p).all()) for p in algorithm.networks.parameters())
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad or not finite:
        kept = "there is no checkpoint" if run.saved_step is None else f"step {run.saved_step:,} is saved"
        raise NonFiniteError(
            f"{bad[0] if bad else 'a network weight'} is not finite before gradient step {step:,}: lower the "
            f"learning rate or scale the rewards; {kept}."
        )


def _environment_of(dataset: str) -> str:
    """The environment of a DSRL task, given its name or file; raises UsageError where there is none."""
    from saferl.envs.datasets import find_task

    path = Path(dataset)
    try:
        task = find_task(path.name)
    except UsageError:
        if path.exists() or path.suffix or len(path.parts) > 1:
            raise UsageError(f"nothing says which environment {dataset} is of; add --env ID.") from None
        raise
    if task.env_id is None:
        raise UsageError(
            f"the environment of {task.key} is none of saferl's; add --env ID of one with "
            f"{task.observation_size} observations and {task.action_size} actions."
        )
    return task.env_id


def _spaces(env_id: str) -> tuple[spaces.Space[Any], spaces.Space[Any], int]:
    """Spaces of one environment and its longest episode."""
    from saferl.envs import make_vec

    env = make_vec(env_id, 1)
    try:
        steps = None if env.spec is None else env.spec.max_episode_steps
        return env.single_observation_space, env.single_action_space, steps or 1_000
    finally:
        env.close()


def _load(
    config: OfflineConfig,
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    *,
    quiet: bool,
) -> OfflineDataset:
    from saferl.envs.datasets import load, locate
    from saferl.experiment.progress import Meter

    with Meter("downloading", quiet=quiet) as meter:
        path, task = locate(config.dataset, offline=config.offline, progress=meter, notice=meter.say)
    with Meter("reading", quiet=quiet) as meter:
        data = load(path, env=None if task is None else task.key, progress=meter)
    for what, array, space in (
        ("observations", data.observations, observation_space),
        ("actions", data.actions, action_space),
    ):
        size = int(np.prod(space.shape or ()))
        if array.shape[1] != size:
            raise UsageError(
                f"{data.source} has {what} of size {array.shape[1]}, {config.env} of {size}; name the "
                "environment that was recorded with --env."
            )
    if not isinstance(action_space, spaces.Box):
        raise UsageError(f"offline learners take continuous actions; those of {config.env} are not.")
    data.check_values()
    return data


def _on_device(
    data: OfflineDataset, action_space: spaces.Space[Any], reward_scale: float, device: torch.device
) -> Batch:
    """The data as the learners read them: actions in [-1, 1], rewards scaled, ends of episodes masked."""
    assert isinstance(action_space, spaces.Box)
    low, high = (
        torch.as_tensor(x.reshape(-1), dtype=torch.float32) for x in (action_space.low, action_space.high)
    )
    end = 1 - 1e-5  # an action on the border has no density under a squashed policy (FISOR's code)
    actions = torch.as_tensor(np.asarray(data.actions))
    actions = ((actions - (low + high) / 2) / ((high - low) / 2)).clamp(-end, end)
    over = np.asarray(data.terminals) | np.asarray(data.timeouts)
    parts = (
        torch.as_tensor(np.asarray(data.observations)),
        actions,
        torch.as_tensor(np.asarray(data.rewards)) * reward_scale,
        torch.as_tensor(np.asarray(data.costs)),
        torch.as_tensor(~over).float(),
        torch.as_tensor(np.asarray(data.next_observations)),
    )
    return Batch(*(part.to(device) for part in parts))
