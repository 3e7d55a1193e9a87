"""Evaluation of a policy on a vector environment: returns, costs, and how sure we are of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from gymnasium.vector import VectorEnv

from saferl.errors import NonFiniteError
from saferl.policies.protocol import Stateful


class Acts(Protocol):
    """Whatever maps batched observations to batched actions."""

    def act(self, obs: Any, *, deterministic: bool = False) -> Any: ...


@dataclass(frozen=True)
class Evaluation:
    """Undiscounted sums of the evaluated episodes, each of shape (E,)."""

    returns: np.ndarray
    costs: dict[str, np.ndarray]
    """By name; the total is always there under "cost"."""
    lengths: np.ndarray
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    """What the environment itself says of finished episodes in `info["final_info"]`, such as a driving
    score."""

    def summary(self, limits: Mapping[str, float] | None = None) -> dict[str, Any]:
        """Means, standard deviations and 95 % Student-t intervals as JSON values.

        With limits, `violation_rate` is the share of episodes whose cost exceeds any of them.
        """
        limits = dict(limits or {})
        answer: dict[str, Any] = {
            "episodes": len(self.returns),
            "return": _describe(self.returns),
            "cost": _describe(self.costs["cost"]),
            "costs": {name: _describe(values) for name, values in self.costs.items() if name != "cost"},
            "length": _describe(self.lengths),
            "limits": limits,
        }
        if self.scores:
            answer["scores"] = {name: _describe(values) for name, values in self.scores.items()}
        if limits:
            above = np.zeros(len(self.returns), dtype=bool)
            for name, limit in limits.items():
                above |= self.costs[name] > limit
            answer["violation_rate"] = float(above.mean())
        return answer


def evaluate(
    policy: Acts,
    env: VectorEnv,
    episodes: int,
    *,
    seed: int = 0,
    deterministic: bool = True,
    report: Callable[[int], None] | None = None,
) -> Evaluation:
    """Run `episodes` episodes and return their sums.

    Every environment of the vector contributes a fixed share of the episodes (its first ones), so
    that short episodes are not over-represented.

    Args:
        policy: acts on batched observations; one that is `Stateful` is told what comes of its actions.
        env: a vector environment in SAME_STEP autoreset mode with the cost in `info["cost"]`. Returns are
            of `info["unwrapped_reward"]` where a wrapper that changes the reward gives it.
        episodes: episodes in all.
        seed: environment i is seeded with seed + i.
        deterministic: act by the mode of the policy.
        report: called with the number of finished episodes.

    Raises:
        NonFiniteError: a reward or cost is not finite.
    """
    n = env.num_envs
    share = np.full(n, episodes // n)
    share[: episodes % n] += 1
    names = tuple(env.metadata.get("cost_names", ()))
    sums = np.zeros((n, 3 + len(names)))
    counts = np.zeros(n, dtype=np.int64)
    finished: list[np.ndarray] = []
    scores: dict[str, list[np.ndarray]] = {}
    observations, _ = env.reset(seed=seed)
    memory = policy if isinstance(policy, Stateful) else None
    if memory is not None:
        memory.begin(n)
    while (counts < share).any():
        actions = policy.act(observations, deterministic=deterministic)
        observations, reward, terminated, truncated, info = env.step(actions)
        columns = [np.asarray(info.get("unwrapped_reward", reward)), np.asarray(info["cost"]), np.ones(n)]
        columns += [np.asarray(info["costs"][name]) for name in names]
        sums += np.stack(columns, axis=1)
        ended = np.asarray(terminated) | np.asarray(truncated)
        if memory is not None:
            memory.observe(reward, info["cost"], ended)
        if ended.any():
            if not np.isfinite(sums).all():
                raise NonFiniteError(
                    "a reward or cost of the evaluation is not finite; check the environment."
                )
            counted = ended & (counts < share)
            finished.append(sums[counted])
            said = info.get("final_info", {})
            for name in said:
                if f"_{name}" in said and np.asarray(said[name]).dtype.kind == "f":
                    scores.setdefault(name, []).append(np.asarray(said[name])[counted])
            counts += ended
            sums[ended] = 0.0
            if report is not None:
                report(int(np.minimum(counts, share).sum()))
    table = np.concatenate(finished)
    costs = {"cost": table[:, 1], **{name: table[:, 3 + k] for k, name in enumerate(names)}}
    told = {name: np.concatenate(values) for name, values in scores.items()}
    told = {name: values for name, values in told.items() if len(values) == len(table)}
    return Evaluation(returns=table[:, 0], costs=costs, lengths=table[:, 2], scores=told)


def _describe(values: np.ndarray) -> dict[str, Any]:
    mean = float(values.mean())
    if len(values) < 2:
        return {"mean": mean, "std": 0.0, "ci95": [mean, mean]}
    from scipy.stats import t

    std = float(values.std(ddof=1))
    half = float(t.ppf(0.975, len(values) - 1)) * std / np.sqrt(len(values))
    return {"mean": mean, "std": std, "ci95": [mean - half, mean + half]}
