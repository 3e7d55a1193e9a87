"""The off-policy engine: collect into a replay buffer, take gradient steps between, checkpoint.

An algorithm supplies a configuration that extends `OffPolicyConfig` and a class with `update` (one gradient
step on a batch) and `end_iteration` (what happens once a round of collection is over, such as the move of a
multiplier). Collection steps all environments at once. A truncated episode is bootstrapped from its final
observation, a terminated one is not.

**Resuming.** A checkpoint holds networks, targets, optimisers, multipliers, random state and the
environments; transitions are in `RUN/replay/`, append-only files of which each iteration writes its own
rows and each checkpoint keeps the length and the checksums (`saferl.experiment.journal`). So a checkpoint
stays a few megabytes, a transition is written once, and a run killed at any moment goes on to the same
bits. A transition takes 4 (2 D + A + K + 2) bytes on disk and as many in memory: 0.5 GB for a million of
PointGoal1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from saferl.agents.online.engine import Episodes, _episode_metrics, at_least, engine_of
from saferl.agents.online.replay import Batch, ReplayBuffer
from saferl.errors import NonFiniteError, UsageError, unknown_name
from saferl.experiment.run import Run
from saferl.experiment.seeding import choose_device, derive_seed
from saferl.nn.models import Actor
from saferl.nn.networks import ACTIVATIONS


@dataclass(frozen=True, kw_only=True)
class OffPolicyConfig:
    """What every off-policy learner shares; defaults are those of OmniSafe's published runs."""

    env: str = "SafetyPointGoal1-v0"
    """Environment id; see `saferl list envs`."""
    backend: str = "auto"
    """Engine that steps the environment."""
    processes: int = 0
    """Worker processes for environments stepped one by one; 0 steps them in this process."""
    num_envs: int = 1
    """Environments stepped side by side."""
    total_steps: int = 1_000_000
    """Environment steps in all, counted over all environments (published Goal and Circle: 3 million)."""
    steps_per_iteration: int = 2_000
    """Environment steps between moves of the multipliers and lines of metrics, over all environments."""
    learning_starts: int = 10_000
    """Environment steps of uniformly random actions, an action for each environment, before learning."""
    update_interval: int = 1
    """Environment steps between bouts of gradient steps, counted over all environments."""
    updates_per_step: float = 1.0
    """Gradient steps for each environment step, counted over all environments."""
    seed: int = 0
    """Seed of environments, initial weights, action noise and batches."""
    device: str = "cpu"
    """cpu, cuda or cuda:N; the replay buffer lies there too."""
    threads: int = 1
    """Torch threads; small networks are fastest with one."""
    discount: float = 0.99
    """Discount of the reward."""
    cost_discount: float = 0.99
    """Discount of the costs in their critics (limits apply to undiscounted episode costs)."""
    buffer_size: int = 1_000_000
    """Transitions kept for replay."""
    batch_size: int = 256
    """Transitions a gradient step, one sample for all networks."""
    actor_lr: float = 3e-4
    """Adam's learning rate for the policy."""
    critic_lr: float = 3e-4
    """Adam's learning rate for the critics."""
    polyak: float = 0.005
    """Share of the networks that moves into the target networks at every policy step."""
    policy_delay: int = 2
    """Critic steps for each step of the policy and of the target networks."""
    max_grad_norm: float = 40.0
    """Largest gradient norm of each network."""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """Widths of the policy network and of every critic."""
    activation: str = "relu"
    """tanh, relu, elu, silu or gelu."""
    normalise_observations: bool = False
    """Standardise observations by running moments, frozen in evaluation; replayed ones by today's moments."""
    checkpoint_interval: float = 30.0
    """Least seconds between checkpoints, which fall on iteration boundaries; 0 saves at every one."""

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", self.activation, ACTIVATIONS)
        for width in self.hidden_sizes:
            at_least("hidden sizes", width, 1)
        for name in (
            *("total_steps", "steps_per_iteration", "update_interval", "threads", "batch_size"),
            *("buffer_size", "policy_delay"),
        ):
            at_least(name.replace("_", " "), getattr(self, name), 1)
        for name in (
            *("learning_starts", "updates_per_step", "seed", "actor_lr", "critic_lr", "max_grad_norm"),
            "checkpoint_interval",
        ):
            at_least(name.replace("_", " "), getattr(self, name), 0)
        if self.num_envs < 1:
            raise UsageError(f"the number of environments is {self.num_envs}; ask for at least one.")
        if self.buffer_size < self.num_envs:
            raise UsageError(
                f"a buffer of {self.buffer_size} transitions cannot take one step of {self.num_envs} "
                "environments; enlarge it."
            )
        for name in ("discount", "cost_discount", "polyak"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UsageError(f"{name} is {value:g}; it must lie between 0 and 1.")


class Algorithm(Protocol):
    """What the engine asks of a learner."""

    @property
    def actor(self) -> Actor:
        """The policy, whose samples explore."""
        ...

    @property
    def networks(self) -> nn.Module:
        """All that is trained; its parameters must stay finite."""
        ...

    def update(self, batch: Batch) -> None:
        """Take one gradient step."""
        ...

    def end_iteration(self, episodes: Episodes, step: int) -> dict[str, float]:
        """Close a round of collection in which `episodes` ended, after `step` environment steps in all.

        Returns scalars to log.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything besides the actor's weights that the rest of the run depends on."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s answer."""
        ...


@dataclass
class Context:
    """What an algorithm is built from."""

    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    cost_names: tuple[str, ...]
    """Constrained costs, in the order of the batches' signals."""
    device: torch.device
    generator: torch.Generator
    """The source of all noise, on the device."""


def train_off_policy(
    config: OffPolicyConfig,
    run: Run,
    build: Callable[[Context], Algorithm],
    limits: Mapping[str, float] | None = None,
) -> Actor:
    """Train until `config.total_steps`, going on from the run's checkpoint if it has one.

    Args:
        config: the learner's configuration.
        run: where metrics, checkpoints and replayed transitions go.
        build: makes the algorithm; initial weights are drawn from torch's global generator.
        limits: limits by cost name; one critic is made for each.

    Returns:
        the trained policy, in evaluation mode.

    Raises:
        UsageError: the environment, a cost name or the device does not exist, or the actions are discrete.
        NonFiniteError: an observation, reward, cost or loss is not finite; the checkpoint kept is
            that of the iteration before.
    """
    torch.set_num_threads(config.threads)
    trainer = _Trainer(config, run, choose_device(config.device), build, tuple(limits or ()))
    try:
        return trainer.train()
    finally:
        trainer.close()


class _Trainer:
    """The state of one training run, and the loop over it."""

    def __init__(
        self,
        config: OffPolicyConfig,
        run: Run,
        device: torch.device,
        build: Callable[[Context], Algorithm],
        cost_names: tuple[str, ...],
    ) -> None:
        from saferl.envs import make_vec

        self.config = config
        self.run = run
        self.device = device
        self.cost_names = cost_names
        self.env = make_vec(config.env, config.num_envs, backend=config.backend, processes=config.processes)
        self.reported_costs: tuple[str, ...] = tuple(self.env.metadata.get("cost_names", ()))
        known = {"cost", *self.reported_costs}
        for name in cost_names:
            if name not in known:
                raise unknown_name("cost", name, known)
        self.on_device = getattr(self.env, "torch_device", None) is not None
        self.generator = torch.Generator(device).manual_seed(derive_seed(config.seed, 1))
        # Weights are drawn from torch's global generator: fork it, so that a caller's stays as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, 0))
            self.algorithm = build(
                Context(
                    self.env.single_observation_space,
                    self.env.single_action_space,
                    cost_names,
                    device,
                    self.generator,
                )
            )
        self.actor = self.algorithm.actor
        n = config.num_envs
        self.replay = ReplayBuffer(
            min(config.buffer_size, math.ceil(config.total_steps / n) * n),
            self.actor.encoder.size,
            self.actor.distribution.action_size,
            ("the reward", *(f"the cost {name!r}" for name in cost_names)),
            device,
            run.directory / "replay",
        )
        self.step = 0
        self.updates = 0
        self.iteration = 0
        self.boundary_step = 0
        self.last_metrics: dict[str, float] = {}
        self.observations: Any = None
        self.features: Tensor
        # Of the episodes in progress: length, total cost, reward, named costs.
        self.episode = np.zeros((n, 3 + len(self.reported_costs)))

    # --- the loop -------------------------------------------------------------------------------

    def train(self) -> Actor:
        config, run = self.config, self.run
        with run.progress(f"{run.config['algorithm']} on {config.env}", config.total_steps) as progress:
            progress.message(engine_of(self.env))
            if run.resumed is not None:
                self._restore(run.resumed, progress.message)
                progress.restart(self.step)
            else:
                self.replay.restart()
                self.observations, _ = self.env.reset(seed=config.seed)
            self.features = self._encode(self.observations)
            boundary = self._state()
            try:
                while self.step < config.total_steps:
                    episodes = self._iterate(progress.update)
                    metrics = self.algorithm.end_iteration(episodes, self.step)
                    self._check_model(metrics)
                    self.iteration += 1
                    self.boundary_step = self.step
                    self.last_metrics.update(_episode_metrics(episodes), **metrics)
                    logged = {**self.last_metrics, "time/steps_per_second": progress.steps_per_second}
                    run.log(self.step, logged)
                    progress.update(self.step, self.last_metrics)
                    boundary = self._state()
                    if (
                        self.step >= config.total_steps
                        or run.seconds_since_save >= config.checkpoint_interval
                    ):
                        self._save(boundary)
            except (KeyboardInterrupt, NonFiniteError):
                # The iteration in progress is lost, the one before it is not.
                if run.saved_step != boundary["training"]["step"] and boundary["training"]["step"] > 0:
                    self._save(boundary)
                raise
        return self.actor.eval()

    def _iterate(self, report: Callable[[int], None]) -> Episodes:
        """Collect for one iteration, with the gradient steps that fall due; returns the finished episodes."""
        config = self.config
        n = config.num_envs
        horizon = math.ceil(min(config.steps_per_iteration, config.total_steps - self.step) / n)
        self.algorithm.networks.train()
        ended: list[np.ndarray] = [np.empty((0, self.episode.shape[1]))]
        for _ in range(horizon):
            self._collect(ended)
            due = self.step // config.update_interval > (self.step - n) // config.update_interval
            if due and self.step >= config.learning_starts:
                # Counted from the start, so that no rounding accumulates.
                target = math.floor((self.step - config.learning_starts) * config.updates_per_step)
                while self.updates < target:
                    self.algorithm.update(self.replay.sample(config.batch_size, self.generator))
                    self.updates += 1
            report(self.step)
        table = np.concatenate(ended)
        costs = {name: table[:, 3 + k] for k, name in enumerate(self.reported_costs)}
        return Episodes(returns=table[:, 2], lengths=table[:, 0], costs={**costs, "cost": table[:, 1]})

    @torch.no_grad()
    def _collect(self, ended: list[np.ndarray]) -> None:
        """Step every environment once and store the transitions; sums of finished episodes go to `ended`."""
        actor, n = self.actor, self.config.num_envs
        if actor.normaliser is not None:
            actor.normaliser.update(self.features.to(self.device))
        if self.step < self.config.learning_starts:
            uniform = torch.rand(
                n, actor.distribution.action_size, generator=self.generator, device=self.device
            )
            actions = 2 * uniform - 1
        else:
            features = actor.normalise(self.features.to(self.device))
            parameters = actor.distribution_parameters(features)
            actions = actor.distribution.sample(parameters, self.generator)
        command = actor.distribution.to_env(actions)
        observations, reward, terminated, truncated, info = self.env.step(
            command if self.on_device else command.cpu().numpy()
        )
        features = self._encode(observations)
        final = info.get("final_obs")
        signals = [reward, *(info["cost"] if x == "cost" else info["costs"][x] for x in self.cost_names)]
        side = self.features.device
        try:
            self.replay.add(
                self.features,
                actions.to(side),
                torch.stack([torch.as_tensor(x, dtype=torch.float32, device=side) for x in signals], dim=1),
                torch.as_tensor(terminated, dtype=torch.float32, device=side),
                features if final is None else self._encode(final),
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}, at step {self.step}; {self._kept()}") from error
        named = [info["costs"][name] for name in self.reported_costs]
        self.episode += np.stack([np.ones(n), *map(_on_host, (info["cost"], reward, *named))], axis=1)
        over = _on_host(terminated) | _on_host(truncated)
        if over.any():
            ended.append(self.episode[over])
            self.episode[over] = 0.0
        self.observations, self.features = observations, features
        self.step += n

    def _encode(self, observations: Any) -> Tensor:
        """Encoded observations (N, D), where the environments are: the buffer keeps them unnormalised."""
        side = self.device if self.on_device else torch.device("cpu")
        return self.actor.encoder(observations, side).float()

    # --- checks ---------------------------------------------------------------------------------

    def _check_model(self, metrics: Mapping[str, float]) -> None:
        finite = all(bool(torch.isfinite(p).all()) for p in self.algorithm.networks.parameters())
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad or not finite:
            culprit = bad[0] if bad else "a network weight"
            raise NonFiniteError(
                f"{culprit} is not finite in the updates before step {self.step}: lower the learning rate or "
                f"scale the rewards; {self._kept()}"
            )

    def _kept(self) -> str:
        if self.boundary_step == 0:
            return "the run had not finished its first iteration, so there is no checkpoint."
        return f"the checkpoint of step {self.boundary_step} is kept in {self.run.checkpoints}."

    # --- state ----------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        """A copy of everything the rest of the run depends on; transitions go to their journal."""
        get_state = getattr(self.env, "get_state", None)
        episodes = None
        if get_state is not None:
            episodes = {"env": get_state(), "observations": self.observations, "episode": self.episode}
        return copy.deepcopy(
            {
                "policy": {"description": self.actor.describe(), "weights": self.actor.state_dict()},
                "training": {
                    "step": self.step,
                    "updates": self.updates,
                    "iteration": self.iteration,
                    "generator": self.generator.get_state(),
                    "algorithm": self.algorithm.state_dict(),
                    "replay": self.replay.state_dict(),
                    "episodes": episodes,
                    "last_metrics": self.last_metrics,
                },
            }
        )

    def _save(self, state: Mapping[str, Any]) -> None:
        self.replay.sync()
        self.run.save(state["training"]["step"], state)
        self.replay.checkpointed(state["training"]["replay"])

    def _restore(self, checkpoint: Mapping[str, Any], message: Callable[[str], None]) -> None:
        training = checkpoint["training"]
        self.replay.load_state_dict(training["replay"])
        self.actor.load_state_dict(checkpoint["policy"]["weights"])
        self.algorithm.load_state_dict(training["algorithm"])
        self.generator.set_state(training["generator"])
        self.step = self.boundary_step = training["step"]
        self.updates, self.iteration = training["updates"], training["iteration"]
        self.last_metrics = training["last_metrics"]
        episodes = training["episodes"]
        set_state = getattr(self.env, "set_state", None)
        if episodes is not None and set_state is not None:
            self.env.reset(seed=self.config.seed)
            set_state(episodes["env"])
            self.observations = episodes["observations"]
            self.episode = np.array(episodes["episode"])
            message(f"resumed at step {self.step:,}")
            return
        self.observations, _ = self.env.reset(seed=derive_seed(self.config.seed, 2, self.iteration))
        message(
            f"resumed at step {self.step:,} with fresh episodes: the state of {self.config.env} cannot be "
            "restored"
        )

    def close(self) -> None:
        """Close the environments and the journal."""
        self.env.close()
        self.replay.close()


def _on_host(values: Any) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
