"""The on-policy engine: collect, estimate advantages, hand the rollout to an algorithm, checkpoint.

An algorithm supplies a configuration that extends `OnPolicyConfig` and a class with `update`; all
that a rollout needs happens here, vectorised over environments, with termination and truncation
kept apart (a truncated episode is bootstrapped from its final observation).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from saferl.advantages import gae, next_values
from saferl.errors import NonFiniteError, UsageError, unknown_name
from saferl.experiment.run import Run
from saferl.experiment.seeding import choose_device, derive_seed
from saferl.nn.host import HostActor
from saferl.nn.models import Actor, ActorCritic
from saferl.nn.networks import ACTIVATIONS
from saferl.nn.normalise import RunningNormaliser

#: Environments from which on they are stepped on the GPU where they can be: a step takes it milliseconds
#: whatever their number, which the host needs for a few thousand.
_DEVICE_ENVS = 4096


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig:
    """What every on-policy learner shares; defaults are those of OmniSafe's published runs."""

    env: str = "SafetyPointGoal1-v0"
    """Environment id; see `saferl list envs`."""
    backend: str = "auto"
    """Engine that steps the environment."""
    processes: int = 0
    """Worker processes for environments stepped one by one; 0 steps them in this process."""
    num_envs: int = 10
    """Environments stepped side by side."""
    total_steps: int = 10_000_000
    """Environment steps in all, counted over all environments."""
    steps_per_iteration: int = 20_000
    """Environment steps between updates, counted over all environments."""
    seed: int = 0
    """Seed of environments, initial weights, action noise and mini-batches."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    threads: int = 1
    """Torch threads; small networks are fastest with one."""
    discount: float = 0.99
    """Discount of the reward."""
    cost_discount: float = 0.99
    """Discount of the costs in their critics (limits apply to undiscounted episode costs)."""
    gae_lambda: float = 0.95
    """GAE's lambda for the reward."""
    cost_gae_lambda: float = 0.95
    """GAE's lambda for the costs."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the policy network and of every value network."""
    activation: str = "tanh"
    """tanh, relu, elu, silu or gelu."""
    log_std_init: float = 0.0
    """Initial log standard deviation of continuous actions (in units of half the action range)."""
    normalise_observations: bool = True
    """Standardise observations by running moments, frozen in evaluation."""
    normalise_rewards: bool = False
    """Divide rewards by the running deviation of the discounted return (reports stay in raw units)."""
    checkpoint_interval: float = 30.0
    """Least seconds between checkpoints, which fall on iteration boundaries; 0 saves at every one."""

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", self.activation, ACTIVATIONS)
        for width in self.hidden_sizes:
            at_least("hidden sizes", width, 1)
        at_least("total steps", self.total_steps, 1)
        at_least("steps per iteration", self.steps_per_iteration, 1)
        at_least("threads", self.threads, 1)
        at_least("seed", self.seed, 0)
        at_least("checkpoint interval", self.checkpoint_interval, 0)
        if self.num_envs < 1:
            raise UsageError(f"the number of environments is {self.num_envs}; ask for at least one.")
        for name in ("discount", "cost_discount", "gae_lambda", "cost_gae_lambda"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UsageError(f"{name} is {value:g}; it must lie between 0 and 1.")


@dataclass
class Episodes:
    """Episodes that ended in a rollout: undiscounted sums in raw units, each of shape (E,)."""

    returns: np.ndarray
    lengths: np.ndarray
    costs: dict[str, np.ndarray]
    """Every cost that the environment names, and the total under "cost"."""

    def __len__(self) -> int:
        return len(self.returns)


@dataclass
class Rollout:
    """Data of one iteration, flattened to B = steps x environments samples.

    `advantages` and `cost_advantages` are as GAE gives them: each algorithm decides what to rescale.
    """

    features: Tensor
    """Normalised observations (B, D)."""
    actions: Tensor
    """Actions before the map onto the environment's box (B, A)."""
    log_probs: Tensor
    """Of the behaviour policy (B,)."""
    parameters: Tensor
    """Of the behaviour policy's action distribution (B, P)."""
    advantages: Tensor
    """Of the reward (B,)."""
    cost_advantages: dict[str, Tensor]
    """Of every constrained cost, each (B,)."""
    targets: Tensor
    """Value targets (B, 1 + K), reward first."""
    episodes: Episodes
    """Episodes that ended here."""

    def __len__(self) -> int:
        return len(self.log_probs)


class Algorithm(Protocol):
    """What the engine asks of a learner."""

    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        """Improve the model from one rollout; `progress` runs from 0 to 1. Returns scalars to log."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything besides the model's weights that the next update depends on."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s answer."""
        ...


@dataclass
class Context:
    """What an algorithm is built from."""

    model: ActorCritic
    cost_names: tuple[str, ...]
    """Constrained costs, in the order of the value network's columns."""
    generator: torch.Generator
    """The source of mini-batch order."""
    env: VectorEnv
    """The environments that are stepped, wrapped if the algorithm wraps them."""


def train_on_policy(
    config: OnPolicyConfig,
    run: Run,
    build: Callable[[Context], Algorithm],
    limits: Mapping[str, float] | None = None,
    wrap: Callable[[VectorEnv], VectorEnv] | None = None,
) -> Actor:
    """Train until `config.total_steps`, going on from the run's checkpoint if it has one.

    Args:
        config: the learner's configuration.
        run: where metrics and checkpoints go.
        build: makes the algorithm for a model.
        limits: limits by cost name; one value network is made for each.
        wrap: put around the environments before anything else sees them. What it changes of a reward is
            what the algorithm learns from; reports use `info["unwrapped_reward"]` (N,) where it is given.

    Returns:
        the trained policy, in evaluation mode.

    Raises:
        UsageError: the environment, a cost name or the device does not exist.
        NonFiniteError: an observation, reward, cost or loss is not finite; the checkpoint kept is
            that of the iteration before.
    """
    torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    trainer = _Trainer(config, run, device, build, tuple(limits or ()), wrap)
    try:
        return trainer.train()
    finally:
        trainer.env.close()


def engine_of(env: VectorEnv) -> str:
    """The line that says which engine steps the environments, before they start."""
    name = env.metadata.get("backend", "native")
    # Half a minute in which nothing else is to be seen, once after an installation.
    compiled = " (compiled when first used)" if name in ("planar", "simulated") else ""
    return f"environments: {name} engine{compiled}"


class _Trainer:
    """The state of one training run, and the loop over it."""

    def __init__(
        self,
        config: OnPolicyConfig,
        run: Run,
        device: torch.device,
        build: Callable[[Context], Algorithm],
        cost_names: tuple[str, ...],
        wrap: Callable[[VectorEnv], VectorEnv] | None,
    ) -> None:
        from saferl.envs import make_vec, runs_on_devices

        self.config = config
        self.run = run
        self.device = device
        self.cost_names = cost_names
        engine: dict[str, Any] = {"backend": config.backend, "processes": config.processes}
        many = config.num_envs >= _DEVICE_ENVS
        if device.type == "cuda" and many and runs_on_devices(config.env, **engine):
            engine["device"] = config.device
        self.env = make_vec(config.env, config.num_envs, **engine)
        if wrap is not None:
            self.env = wrap(self.env)
        self.reported_costs: tuple[str, ...] = tuple(self.env.metadata.get("cost_names", ()))
        known = {"cost", *self.reported_costs}
        for name in cost_names:
            if name not in known:
                raise unknown_name("cost", name, known)
        # Weights are drawn from torch's global generator: fork it, so that a caller's stays as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, 0))
            actor = Actor(
                self.env.single_observation_space,
                self.env.single_action_space,
                hidden_sizes=config.hidden_sizes,
                activation=config.activation,
                normalise_observations=config.normalise_observations,
                log_std_init=config.log_std_init,
            )
            self.model = ActorCritic(
                actor, len(cost_names), hidden_sizes=config.hidden_sizes, activation=config.activation
            ).to(device)
        self.actor = actor
        self.generator = torch.Generator(device).manual_seed(derive_seed(config.seed, 1))
        self.algorithm = build(Context(self.model, cost_names, self.generator, self.env))
        self.reward_scale = RunningNormaliser(1, clip=10.0, floor=1e-4, centre=False).to(device)
        self.discounts = torch.tensor(
            [config.discount] + [config.cost_discount] * len(cost_names), device=device
        )
        self.lambdas = torch.tensor(
            [config.gae_lambda] + [config.cost_gae_lambda] * len(cost_names), device=device
        )
        self.step = 0
        self.iteration = 0
        self.last_metrics: dict[str, float] = {}
        self.observations: Any = None
        self.episode: Tensor
        self.discounted: Tensor
        self._restart_episodes()

    # --- the loop -------------------------------------------------------------------------------

    def train(self) -> Actor:
        config, run = self.config, self.run
        with run.progress(f"{run.config['algorithm']} on {config.env}", config.total_steps) as progress:
            progress.message(engine_of(self.env))
            if run.resumed is not None:
                self._restore(run.resumed, progress.message)
                progress.restart(self.step)
            else:
                self.observations, _ = self.env.reset(seed=config.seed)
            boundary = self._state()
            try:
                while self.step < config.total_steps:
                    rollout, steps = self._collect(progress.update)
                    self.model.train()
                    metrics = self.algorithm.update(rollout, self.step / config.total_steps)
                    self._check_model(metrics)
                    self.step += steps
                    self.iteration += 1
                    self.last_metrics.update(_episode_metrics(rollout.episodes), **metrics)
                    logged = {**self.last_metrics, "time/steps_per_second": progress.steps_per_second}
                    run.log(self.step, logged)
                    progress.update(self.step, self.last_metrics)
                    boundary = self._state()
                    if (
                        self.step >= config.total_steps
                        or run.seconds_since_save >= config.checkpoint_interval
                    ):
                        run.save(self.step, boundary)
            except (KeyboardInterrupt, NonFiniteError):
                # The iteration in progress is lost, the one before it is not.
                if run.saved_step != boundary["training"]["step"] and boundary["training"]["step"] > 0:
                    run.save(boundary["training"]["step"], boundary)
                raise
        return self.actor.eval()

    def _collect(self, report: Callable[[int], None]) -> tuple[Rollout, int]:
        """Step every environment `horizon` times; returns the rollout and the steps taken.

        What need not be known at the next step waits until the end: environments on a device are never
        waited for, and those on the host cost a few array writes a step.
        """
        config, env, actor, device = self.config, self.env, self.actor, self.device
        n, names = config.num_envs, self.cost_names
        remaining = min(config.steps_per_iteration, config.total_steps - self.step)
        horizon = math.ceil(remaining / n)
        actor.train()
        self.reward_scale.train()
        on_device = getattr(env, "torch_device", None) is not None
        side = device if on_device else torch.device("cpu")

        def table(*columns: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Any]:
            """A tensor of horizon x environments, and what to write a step's rows into."""
            tensor = torch.empty(horizon, n, *columns, dtype=dtype, device=side)
            return tensor, tensor if on_device else tensor.numpy()

        features = torch.empty(horizon, n, actor.encoder.size, device=device)
        actions = torch.empty(horizon, n, actor.distribution.action_size, device=device)
        rewards, write_rewards = table()
        # What reports count: steps, total cost, the environment's own reward, then every named cost.
        tally, write_tally = table(3 + len(self.reported_costs))
        terminated, write_terminated = table(dtype=torch.bool)
        truncated, write_truncated = table(dtype=torch.bool)
        tally[..., 0] = 1.0
        finals: list[tuple[int, Tensor]] = []

        with torch.no_grad():
            act = self._acting(features, actions, on_device)
            for t in range(horizon):
                self.observations, reward, done, cut, info = env.step(act(t))
                write_rewards[t] = reward
                write_tally[t, :, 1] = info["cost"]
                write_tally[t, :, 2] = info.get("unwrapped_reward", reward)
                for k, name in enumerate(self.reported_costs):
                    write_tally[t, :, 3 + k] = info["costs"][name]
                write_terminated[t] = done
                write_truncated[t] = cut
                if "final_obs" in info:
                    finals.append((t, actor.encode(info["final_obs"])))
                report(self.step + (t + 1) * n)

            columns = [1 if name == "cost" else 3 + self.reported_costs.index(name) for name in names]
            streams = torch.cat([rewards[..., None], tally[..., columns]], dim=-1).to(device)
            episodes = self._close_episodes(tally, terminated | truncated)
            terminated, truncated = terminated.to(device), truncated.to(device)
            self._check_data(features, streams)
            if config.normalise_rewards:
                streams[..., :1] = self._rescale(streams[..., 0], terminated | truncated)
            values = self.model.values(features)
            last_values = self.model.values(actor.encode(self.observations))
            final_values = torch.zeros_like(values)
            if finals:
                steps, final_features = zip(*finals, strict=True)
                final_values[list(steps)] = self.model.values(torch.stack(final_features))
            advantages, targets = gae(
                streams.float(),
                values,
                next_values(values, last_values, final_values, truncated),
                terminated,
                truncated,
                discount=self.discounts,
                gae_lambda=self.lambdas,
            )
            parameters = actor.distribution_parameters(features)
            log_probs = actor.distribution.log_prob(parameters, actions)
        rollout = Rollout(
            features=features.flatten(0, 1),
            actions=actions.flatten(0, 1),
            log_probs=log_probs.flatten(),
            parameters=parameters.flatten(0, 1),
            # Contiguous: a strided view is reduced in another order, and the bits would depend on K.
            advantages=advantages[..., 0].flatten().contiguous(),
            cost_advantages={
                name: advantages[..., 1 + k].flatten().contiguous() for k, name in enumerate(names)
            },
            targets=targets.flatten(0, 1),
            episodes=episodes,
        )
        return rollout, horizon * n

    def _acting(self, features: Tensor, actions: Tensor, on_device: bool) -> Callable[[int], Any]:
        """What observes and acts at step t: fills row t of `features` and `actions`, returns the command."""
        actor = self.actor
        host = None if on_device else HostActor.of(actor)
        if host is not None:
            draws = torch.randn(actions.shape, generator=self.generator).numpy()
            feature_rows, action_rows = features.numpy(), actions.numpy()

            def act_on_host(t: int) -> Any:
                feature_rows[t] = host.encode(self.observations, update=True)
                action_rows[t], command = host.act(feature_rows[t], draws[t])
                return command

            return act_on_host

        def act(t: int) -> Any:
            features[t] = actor.encode(self.observations, update=True)
            parameters = actor.distribution_parameters(features[t])
            actions[t] = actor.distribution.sample(parameters, self.generator)
            command = actor.distribution.to_env(actions[t])
            return command if on_device else command.cpu().numpy()

        return act

    def _close_episodes(self, tally: Tensor, ended: Tensor) -> Episodes:
        """Sums of the episodes that ended, in the order of their ends; the others' go on in `self.episode`.

        `tally` is (T, N, C) and `ended` (T, N). An episode's sum is the difference of two running sums.
        """
        running = tally.cumsum(0) + self.episode.to(tally.device)
        rows, steps = ended.T.nonzero(as_tuple=True)
        totals = running[steps, rows]
        before = totals.roll(1, 0)
        first = rows != rows.roll(1, 0)
        if len(rows):
            first[0] = True
        before[first] = 0.0
        last = rows != rows.roll(-1, 0)
        if len(rows):
            last[-1] = True
        carried = torch.zeros_like(running[-1])
        carried[rows[last]] = totals[last]
        self.episode = running[-1] - carried
        table = (totals - before)[steps.argsort(stable=True)].cpu().numpy()
        costs = {name: table[:, 3 + k] for k, name in enumerate(self.reported_costs)}
        return Episodes(returns=table[:, 2], lengths=table[:, 0], costs={**costs, "cost": table[:, 1]})

    def _rescale(self, rewards: Tensor, ended: Tensor) -> Tensor:
        """Rewards (T, N) divided by the running deviation of the discounted return, (T, N, 1)."""
        discounted = []
        for reward, end in zip(rewards, ended, strict=True):
            self.discounted = self.discounted * self.config.discount + reward[:, None]
            discounted.append(self.discounted)
            self.discounted = self.discounted.masked_fill(end[:, None], 0.0)
        self.reward_scale.update(torch.cat(discounted))
        scaled: Tensor = self.reward_scale(rewards[..., None])
        return scaled.double()

    # --- checks ---------------------------------------------------------------------------------

    def _check_data(self, features: Tensor, streams: Tensor) -> None:
        """Stop before anything that is not finite reaches the networks' weights."""
        named = [("an observation", features), ("the reward", streams[..., :1])]
        named += [
            (f"the cost {name!r}", streams[..., k + 1 : k + 2]) for k, name in enumerate(self.cost_names)
        ]
        for label, data in named:
            bad = ~torch.isfinite(data).all(-1)
            if bool(bad.any()):
                t, i = (int(x) for x in bad.nonzero()[0])
                step = self.step + t * self.config.num_envs
                raise NonFiniteError(
                    f"{label} of environment {i} is not finite at step {step}; {self._kept()}"
                )

    def _check_model(self, metrics: Mapping[str, float]) -> None:
        finite = all(bool(torch.isfinite(p).all()) for p in self.model.parameters())
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad or not finite:
            culprit = bad[0] if bad else "a network weight"
            raise NonFiniteError(
                f"{culprit} is not finite in the update after step {self.step}: lower the learning rate or "
                f"scale the rewards; {self._kept()}"
            )

    def _kept(self) -> str:
        if self.step == 0:
            return "the run had not finished its first iteration, so there is no checkpoint."
        return f"the checkpoint of step {self.step} is kept in {self.run.checkpoints}."

    # --- state ----------------------------------------------------------------------------------

    def _restart_episodes(self) -> None:
        """Forget the episodes in progress: columns are length, total cost, reward, named costs."""
        n = self.config.num_envs
        self.episode = torch.zeros(n, 3 + len(self.reported_costs), dtype=torch.float64, device=self.device)
        self.discounted = torch.zeros(n, 1, dtype=torch.float64, device=self.device)

    def _state(self) -> dict[str, Any]:
        """A copy of everything the rest of the run depends on."""
        get_state = getattr(self.env, "get_state", None)
        episodes = None
        if get_state is not None:
            episodes = {
                "env": get_state(),
                "observations": self.observations,
                "episode": self.episode,
                "discounted": self.discounted,
            }
        return copy.deepcopy(
            {
                "policy": {"description": self.actor.describe(), "weights": self.actor.state_dict()},
                "training": {
                    "step": self.step,
                    "iteration": self.iteration,
                    "critics": self.model.critics.state_dict(),
                    "reward_scale": self.reward_scale.state_dict(),
                    "generator": self.generator.get_state(),
                    "algorithm": self.algorithm.state_dict(),
                    "episodes": episodes,
                    "last_metrics": self.last_metrics,
                },
            }
        )

    def _restore(self, checkpoint: Mapping[str, Any], message: Callable[[str], None]) -> None:
        training = checkpoint["training"]
        self.actor.load_state_dict(checkpoint["policy"]["weights"])
        self.model.critics.load_state_dict(training["critics"])
        self.reward_scale.load_state_dict(training["reward_scale"])
        self.generator.set_state(training["generator"])
        self.algorithm.load_state_dict(training["algorithm"])
        self.step, self.iteration = training["step"], training["iteration"]
        self.last_metrics = training["last_metrics"]
        episodes = training["episodes"]
        set_state = getattr(self.env, "set_state", None)
        if episodes is not None and set_state is not None:
            self.env.reset(seed=self.config.seed)
            set_state(episodes["env"])
            self.observations = episodes["observations"]
            self.episode = episodes["episode"].to(self.device)
            self.discounted = episodes["discounted"].to(self.device)
            message(f"resumed at step {self.step:,}")
            return
        self.observations, _ = self.env.reset(seed=derive_seed(self.config.seed, 2, self.iteration))
        message(
            f"resumed at step {self.step:,} with fresh episodes: the state of {self.config.env} cannot be "
            "restored"
        )


def _episode_metrics(episodes: Episodes) -> dict[str, float]:
    """Means over the finished episodes; nothing when none has finished (the last ones stay shown)."""
    if not len(episodes):
        return {}
    return {
        "train/return": float(episodes.returns.mean()),
        "train/cost": float(episodes.costs["cost"].mean()),
        "train/episode_length": float(episodes.lengths.mean()),
        **{
            f"train/cost/{name}": float(costs.mean())
            for name, costs in episodes.costs.items()
            if name != "cost"
        },
    }


def at_least(what: str, value: float, least: float) -> None:
    """Raise `UsageError` unless value >= least (NaN is refused)."""
    if not value >= least:
        raise UsageError(f"{what} must be {least:g} or more, not {value:g}.")
