"""The engine of CaRL: rollouts of pictures or vectors, shared by the processes of `torchrun`.

It differs from `saferl.agents.online.engine` in what rollouts hold (dictionaries of uint8 pictures and
numbers, the values at the time of acting, Beta samples) and in that W processes, each stepping its own
environments, do together exactly what one would do: environment i has the same seed and the same noise, and
mini-batches are drawn from all samples; every process sums the gradient of those that are its own.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from saferl.advantages import gae, next_values
from saferl.agents.online.engine import Episodes, at_least, engine_of
from saferl.errors import NonFiniteError, UsageError, unknown_name
from saferl.experiment.ranks import Ranks
from saferl.experiment.run import Run
from saferl.experiment.seeding import choose_device, derive_seed
from saferl.nn.driving import DrivingCritic, DrivingPolicy, batch_of

__all__ = ["DataParallelConfig", "DrivingModel", "Learner", "Rollout", "train_data_parallel"]

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class DataParallelConfig:
    """What is not the algorithm's; numbers are those of all processes together."""

    env: str = "RouteDriving-v0?privileged=true"
    """Environment id, with options after a question mark; see `saferl list envs`."""
    backend: str = "auto"
    """Engine that steps the environment."""
    processes: int = 0
    """Worker processes for environments stepped one by one; 0 steps them in this process."""
    num_envs: int = 128
    """Environments stepped side by side."""
    steps: int = 512
    """Steps of every environment between updates."""
    total_steps: int = 300_000_000
    """Environment steps in all, counted over all environments."""
    seed: int = 0
    """Seed of environments, initial weights, action noise and mini-batches."""
    device: str = "cpu"
    """cpu, cuda or cuda:N; under torchrun each process takes the GPU of its local rank."""
    threads: int = 1
    """Torch threads."""
    discount: float = 0.99
    """Discount of the reward and of costs."""
    gae_lambda: float = 0.95
    """GAE's lambda."""
    truncation_bootstrap: bool = False
    """Whether what a truncated drive would have gone on to earn counts. The published code treats the end
    of the route like any other end."""
    precision: str = "float32"
    """float32, or bfloat16 for the networks' products in updates."""
    micro_batch: int | None = None
    """Samples whose gradient is formed at once; a whole mini-batch when left out."""
    checkpoint_interval: float = 30.0
    """Least seconds between checkpoints, which fall on iteration boundaries; 0 saves at every one."""

    def __post_init__(self) -> None:
        for name in ("num_envs", "steps", "total_steps", "threads"):
            at_least(name.replace("_", " "), getattr(self, name), 1)
        at_least("seed", self.seed, 0)
        at_least("checkpoint interval", self.checkpoint_interval, 0)
        if self.micro_batch is not None:
            at_least("micro batch", self.micro_batch, 1)
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)
        for name in ("discount", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name):g}; it must lie between 0 and 1.")

    @property
    def batch(self) -> int:
        """Samples of an iteration."""
        return self.num_envs * self.steps

    @property
    def iterations(self) -> int:
        """Updates of the whole run."""
        return math.ceil(self.total_steps / self.batch)


class DrivingModel(nn.Module):
    """Policy and critic in one module, so that one call gives what a loss needs."""

    def __init__(self, policy: DrivingPolicy, critic: DrivingCritic) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Action parameters (B, P) and values (B, K)."""
        features = self.policy.features(batch)
        return self.policy.parameters_at(features), self.critic(features, batch)


@dataclass
class Rollout:
    """This process's samples of one iteration, flat: B = steps x own environments, time first."""

    observations: dict[str, Tensor]
    actions: Tensor
    """Beta samples in (0, 1), (B, A)."""
    parameters: Tensor
    """Of the behaviour policy (B, P)."""
    log_probs: Tensor
    """(B,)."""
    values: Tensor
    """At the time of acting (B, K), reward first, then constrained costs."""
    advantages: Tensor
    """(B, K)."""
    targets: Tensor
    """(B, K)."""
    episodes: Episodes
    """Episodes that ended in any process."""


class Learner(Protocol):
    """What the engine asks of an algorithm."""

    def update(self, rollout: Rollout, iteration: int, minibatches: MinibatchesOf) -> dict[str, float]:
        """Improve the model; `minibatches(count)` splits all samples once. Returns scalars to log."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything besides the model's weights that the next update depends on."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s answer."""
        ...


MinibatchesOf = Callable[[int], list[tuple[Tensor, int]]]
"""From a number of mini-batches to, for each, this process's rows and the size over all processes."""


@dataclass
class Context:
    """What an algorithm is built from."""

    model: DrivingModel
    parallel: nn.Module
    """The model, its gradients averaged over processes where there are several."""
    ranks: Ranks
    cost_names: tuple[str, ...]


def train_data_parallel(
    config: DataParallelConfig,
    run: Run,
    build: Callable[[Context], Learner],
    cost_names: tuple[str, ...] = (),
) -> DrivingPolicy:
    """Train until `config.total_steps`, going on from the run's checkpoint if it has one.

    Raises:
        UsageError: the environment, a cost name or the device does not exist, or processes cannot share the
            environments evenly.
        NonFiniteError: an observation, reward, cost or loss is not finite; the checkpoint kept is that of the
            iteration before.
    """
    torch.set_num_threads(config.threads)
    ranks = Ranks(choose_device(config.device))
    if ranks.size > 1 and ranks.device.type == "cuda" and config.device == "cuda":
        import os

        ranks.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(ranks.device)
    with ranks.connected():
        trainer = _Trainer(config, run, ranks, build, cost_names)
        try:
            return trainer.train()
        finally:
            trainer.env.close()


class _Trainer:
    """The state of one run in one process, and the loop over it."""

    def __init__(
        self,
        config: DataParallelConfig,
        run: Run,
        ranks: Ranks,
        build: Callable[[Context], Learner],
        cost_names: tuple[str, ...],
    ) -> None:
        from saferl.envs import make_vec, runs_on_devices

        self.config, self.run, self.ranks = config, run, ranks
        self.device = ranks.device
        self.cost_names = cost_names
        self.own = ranks.share(config.num_envs, "environments")
        count = self.own.stop - self.own.start
        engine: dict[str, Any] = {"backend": config.backend, "processes": config.processes}
        if self.device.type == "cuda" and runs_on_devices(config.env, **engine):
            engine["device"] = str(self.device)
        self.env = make_vec(config.env, count, **engine)
        self.reported = tuple(self.env.metadata.get("cost_names", ()))
        for name in cost_names:
            if name not in {"cost", *self.reported}:
                raise unknown_name("cost", name, {"cost", *self.reported})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, 0))
            self.policy = DrivingPolicy(self.env.single_observation_space, self.env.single_action_space)
            critic = DrivingCritic(self.policy, 1 + len(cost_names))
        self.model = DrivingModel(self.policy, critic).to(self.device)
        # Noise is drawn for all environments, in every process alike, and used for its own.
        self.noise = torch.Generator().manual_seed(derive_seed(config.seed, 1))
        self.order = torch.Generator().manual_seed(derive_seed(config.seed, 2))
        parallel: nn.Module = self.model
        if ranks.size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            parallel = nn.parallel.DistributedDataParallel(
                self.model, device_ids=ids, forward_sync_buffers=False
            )
        self.learner = build(Context(self.model, parallel, ranks, cost_names))
        self.step = self.iteration = 0
        self.last_metrics: dict[str, float] = {}
        self.observations: Any = None
        self.running = np.zeros((count, 3 + len(self.reported)))
        self.buffers: dict[str, Tensor] = {}

    # --- the loop ----------------------------------------------------------------------------------------

    def train(self) -> DrivingPolicy:
        config, run = self.config, self.run
        title = f"{run.config['algorithm']} on {config.env}"
        with run.progress(title, config.total_steps) as progress:
            progress.message(engine_of(self.env))
            if run.resumed is not None:
                self._restore(run.resumed, progress.message)
                progress.restart(self.step)
            else:
                self.observations, _ = self.env.reset(seed=config.seed + self.own.start)
            boundary = self._state()
            try:
                while self.step < config.total_steps:
                    began = time.monotonic()
                    rollout, scores = self._collect(progress.update)
                    collected = time.monotonic()
                    self.model.train()
                    metrics = self.learner.update(rollout, self.iteration, self._minibatches)
                    self._check(metrics)
                    self.step += config.batch
                    self.iteration += 1
                    self.last_metrics.update(_episode_metrics(rollout.episodes), **scores, **metrics)
                    run.log(self.step, {
                        **self.last_metrics, "time/steps_per_second": progress.steps_per_second,
                        "time/collecting_share": (collected - began) / max(time.monotonic() - began, 1e-9),
                    })  # fmt: skip
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
        return self.policy.eval()

    def _table(self, name: str, like: Tensor) -> Tensor:
        """Memory for `steps` rows like `like`, made once."""
        if name not in self.buffers:
            shape = (self.config.steps, *like.shape)
            self.buffers[name] = torch.empty(shape, dtype=like.dtype, device=self.device)
        return self.buffers[name]

    @torch.no_grad()
    def _collect(self, report: Callable[[int], None]) -> tuple[Rollout, dict[str, float]]:
        """Step every environment `steps` times."""
        config, env, policy = self.config, self.env, self.policy
        count, on_device = self.own.stop - self.own.start, getattr(self.env, "torch_device", None) is not None
        streams = 1 + len(self.cost_names)
        rewards = torch.zeros(config.steps, count, streams)
        ended = torch.zeros(2, config.steps, count, dtype=torch.bool)
        finals: list[tuple[int, dict[str, Tensor]]] = []
        episodes: list[np.ndarray] = []
        scores: dict[str, list[float]] = {}
        self.model.eval()
        distribution = policy.distribution
        stored: dict[str, Tensor] = {}
        for t in range(config.steps):
            batch = batch_of(policy.observation_space, self.observations, self.device)
            for name, value in batch.items():
                stored[name] = self._table(f"observation {name}", value)
                stored[name][t] = value
            parameters, values = self.model(batch)
            noise = distribution.noise(config.num_envs, self.noise, torch.device("cpu"))
            actions = distribution.draw(
                parameters, (noise[0][self.own].to(self.device), noise[1][self.own].to(self.device))
            )
            self._table("parameters", parameters)[t] = parameters
            self._table("values", values)[t] = values
            self._table("actions", actions)[t] = actions
            command = distribution.to_env(actions)
            outcome = env.step(command if on_device else command.cpu().numpy())
            self.observations, reward, terminated, truncated, info = outcome
            rewards[t, :, 0] = torch.as_tensor(reward)
            for k, name in enumerate(self.cost_names):
                rewards[t, :, 1 + k] = torch.as_tensor(
                    info["cost"] if name == "cost" else info["costs"][name]
                )
            ended[0, t], ended[1, t] = torch.as_tensor(terminated), torch.as_tensor(truncated)
            self._tally(reward, info, ended[:, t].any(0).numpy(), episodes, scores)
            if config.truncation_bootstrap and "final_obs" in info:
                final = batch_of(policy.observation_space, info["final_obs"], self.device)
                finals.append((t, final))
            report(self.step + (t + 1) * config.num_envs)
        rollout = self._rollout(stored, rewards.to(self.device), ended.to(self.device), finals)
        return self._share(rollout, episodes, scores)

    def _tally(
        self, reward: Any, info: Mapping[str, Any], over: np.ndarray, episodes: list[np.ndarray],
        scores: dict[str, list[float]],
    ) -> None:  # fmt: skip
        """Sums of the drives in progress; those that end are moved to `episodes`."""
        row = [np.ones(len(over)), _array(info["cost"]), _array(info.get("unwrapped_reward", reward))]
        self.running += np.stack([*row, *(_array(info["costs"][name]) for name in self.reported)], axis=1)
        if over.any():
            episodes.append(self.running[over])
            self.running[over] = 0.0
            for name, value in info.get("final_info", {}).items():
                if not name.startswith("_") and f"_{name}" in info["final_info"]:
                    scores.setdefault(name, []).extend(_array(value)[over].tolist())

    def _rollout(
        self,
        stored: dict[str, Tensor],
        rewards: Tensor,
        ended: Tensor,
        finals: list[tuple[int, dict[str, Tensor]]],
    ) -> Rollout:
        config, model = self.config, self.model
        values, parameters, actions = (self.buffers[name] for name in ("values", "parameters", "actions"))
        if not bool(torch.isfinite(rewards).all()) or not bool(torch.isfinite(values).all()):
            raise NonFiniteError(
                f"a reward, a cost or a value is not finite in the iteration after step {self.step}; "
                f"the last checkpoint in {self.run.checkpoints} is kept."
            )
        batch = batch_of(self.policy.observation_space, self.observations, self.device)
        last = model(batch)[1]
        final_values = torch.zeros_like(values)
        for t, final in finals:
            final_values[t] = model(final)[1]
        terminated, truncated = ended[0], ended[1]
        if not config.truncation_bootstrap:
            terminated, truncated = terminated | truncated, torch.zeros_like(truncated)
        following = next_values(values, last, final_values, truncated)
        advantages, targets = gae(
            rewards, values, following, terminated, truncated, discount=config.discount,
            gae_lambda=config.gae_lambda,
        )  # fmt: skip
        parameters, actions = parameters.flatten(0, 1), actions.flatten(0, 1)
        empty = Episodes(np.zeros(0), np.zeros(0), {})
        return Rollout(
            observations={name: value.flatten(0, 1) for name, value in stored.items()},
            actions=actions,
            parameters=parameters,
            log_probs=self.policy.distribution.log_prob(parameters, actions),
            values=values.flatten(0, 1),
            advantages=advantages.flatten(0, 1),
            targets=targets.flatten(0, 1),
            episodes=empty,
        )

    def _share(
        self, rollout: Rollout, episodes: list[np.ndarray], scores: dict[str, list[float]]
    ) -> tuple[Rollout, dict[str, float]]:
        """Episodes and scores of all processes."""
        said = self.ranks.everyone((episodes, scores))
        width = 3 + len(self.reported)
        table = np.concatenate([np.zeros((0, width)), *(rows for found, _ in said for rows in found)])
        costs = {name: table[:, 3 + k] for k, name in enumerate(self.reported)}
        rollout.episodes = Episodes(table[:, 2], table[:, 0], {**costs, "cost": table[:, 1]})
        merged: dict[str, list[float]] = {}
        for _, found in said:
            for name, values in found.items():
                merged.setdefault(name, []).extend(values)
        return rollout, {f"train/{name}": float(np.mean(values)) for name, values in merged.items()}

    def _minibatches(self, count: int) -> list[tuple[Tensor, int]]:
        """All samples in random order, in `count` parts: the rows of each that are this process's."""
        config, width = self.config, self.own.stop - self.own.start
        if config.batch < count:
            raise UsageError(f"{config.batch} samples make no {count} mini-batches; take more steps.")
        order = torch.randperm(config.batch, generator=self.order)
        parts = []
        for part in order.tensor_split(count):
            t, env = part // config.num_envs, part % config.num_envs
            mine = (env >= self.own.start) & (env < self.own.stop)
            rows = (t * width + env - self.own.start)[mine]
            parts.append((rows.to(self.device), len(part)))
        return parts

    # --- checks and state --------------------------------------------------------------------------------

    def _check(self, metrics: Mapping[str, float]) -> None:
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad or not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            raise NonFiniteError(
                f"{bad[0] if bad else 'a network weight'} is not finite in the update after "
                f"step {self.step}: lower the learning rate; the last checkpoint in "
                f"{self.run.checkpoints} is kept."
            )

    def _state(self) -> dict[str, Any]:
        """A copy of everything the rest of the run depends on, of all processes."""
        get_state = getattr(self.env, "get_state", None)
        own = None
        if get_state is not None:
            observations = batch_of(self.policy.observation_space, self.observations, "cpu")
            own = {"env": get_state(), "observations": observations, "running": self.running.copy()}
        worlds = self.ranks.everyone(own)
        return copy.deepcopy(
            {
                "policy": {"description": self.policy.describe(), "weights": self.policy.state_dict()},
                "training": {
                    "step": self.step,
                    "iteration": self.iteration,
                    "critic": self.model.critic.state_dict(),
                    "noise": self.noise.get_state(),
                    "order": self.order.get_state(),
                    "learner": self.learner.state_dict(),
                    "worlds": None if worlds[0] is None else {str(k): w for k, w in enumerate(worlds)},
                    "last_metrics": self.last_metrics,
                },
            }
        )

    def _restore(self, checkpoint: Mapping[str, Any], message: Callable[[str], None]) -> None:
        training = checkpoint["training"]
        self.policy.load_state_dict(checkpoint["policy"]["weights"])
        self.model.critic.load_state_dict(training["critic"])
        self.noise.set_state(training["noise"])
        self.order.set_state(training["order"])
        self.learner.load_state_dict(training["learner"])
        self.step, self.iteration = training["step"], training["iteration"]
        self.last_metrics = training["last_metrics"]
        worlds, set_state = training["worlds"], getattr(self.env, "set_state", None)
        if worlds is not None and set_state is not None and len(worlds) == self.ranks.size:
            own = worlds[str(self.ranks.rank)]
            self.env.reset(seed=self.config.seed)
            set_state(own["env"])
            stored = {name: value.numpy() for name, value in own["observations"].items()}
            if getattr(self.env, "torch_device", None) is not None:
                stored = {name: torch.from_numpy(value).to(self.device) for name, value in stored.items()}
            plain = list(stored) == ["vector"] and not hasattr(self.policy.observation_space, "spaces")
            self.observations = stored["vector"] if plain else stored
            self.running = np.array(own["running"])
            message(f"resumed at step {self.step:,}")
            return
        seed = derive_seed(self.config.seed, 3, self.iteration) + self.own.start
        self.observations, _ = self.env.reset(seed=seed)
        message(
            f"resumed at step {self.step:,} with fresh episodes: the number of processes changed, or the "
            f"state of {self.config.env} cannot be restored"
        )


def _array(value: Any) -> np.ndarray:
    return value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _episode_metrics(episodes: Episodes) -> dict[str, float]:
    if not len(episodes):
        return {}
    costs = {f"train/cost/{n}": float(v.mean()) for n, v in episodes.costs.items() if n != "cost"}
    return {
        "train/return": float(episodes.returns.mean()),
        "train/cost": float(episodes.costs["cost"].mean()),
        "train/episode_length": float(episodes.lengths.mean()),
        **costs,
    }
