"""G-RA: step rewards that count only in episodes whose outcome passes a gate.

Sun, Li, Chen, Qin and Hu 2025 (arXiv 2508.10548). Where dense step rewards can be farmed, their plain sum
with a sparse outcome is maximised by never finishing; the total rises while the outcome falls. Rewards are
therefore ordered by priority, and one counts only if all of higher priority exceed their thresholds over the
episode.

The gate is known when the episode has ended: it is applied to the recorded rewards before returns or
advantages are formed, never while acting. It is no potential shaping and moves the optimum on purpose.
Thresholds and step rewards of the paper's runs, and whether the inequality is strict, are unverified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from saferl.errors import UsageError
from saferl.gates import Array, Gate, accumulate, gated_sum

__all__ = ["Accumulated", "GatedAccumulator", "dead_groups"]


@dataclass(frozen=True)
class Accumulated:
    """What counts of episodes (...), such as (B,) or (groups, G), of T turns.

    Attributes:
        per_turn: (..., T).
        total: (...).
        opened: for each level but the first, how far its rewards count (...).
    """

    per_turn: Array
    total: Array
    opened: dict[str, Array]


class GatedAccumulator:
    """Counts the rewards of several levels through the gates of the levels above.

    Args:
        levels: names from the highest priority to the lowest; with each, the gate that an episode's sum of
            it must pass for lower levels to count. The last level's gate is not used and may be None.

    Raises:
        UsageError: no level, a name twice, or a gate is missing.
    """

    def __init__(self, levels: Sequence[tuple[str, Gate | None]]) -> None:
        self.names = [name for name, _ in levels]
        if not levels or len(set(self.names)) < len(levels):
            raise UsageError("name at least one level, each once, from the highest priority to the lowest.")
        gates = [gate for _, gate in levels[:-1]]
        missing = [name for name, gate in levels[:-1] if gate is None]
        if missing:
            raise UsageError(f"the level {missing[0]} has lower ones below it and needs a gate.")
        self.gates: list[Gate] = [gate for gate in gates if gate is not None]

    def __call__(self, rewards: Mapping[str, Array]) -> Accumulated:
        """Count rewards (..., T), one array a level; turns after an episode's end hold 0.

        Raises:
            UsageError: a level is missing or unknown, or shapes differ.
        """
        if set(rewards) != set(self.names):
            raise UsageError(
                f"the rewards have the levels {', '.join(sorted(rewards)) or 'none'}; "
                f"these gates are for {', '.join(self.names)}."
            )
        shapes = {tuple(rewards[name].shape) for name in self.names}
        if len(shapes) > 1 or () in shapes:
            raise UsageError(f"the rewards have shapes {sorted(shapes)}; all must be the same (..., T).")
        sums = [rewards[name].sum(-1) for name in self.names]
        total, factors = accumulate(sums, self.gates)
        per_turn = rewards[self.names[0]]
        for name, factor in zip(self.names[1:], factors, strict=True):
            per_turn = gated_sum(per_turn, rewards[name], factor[..., None])
        return Accumulated(per_turn, total, dict(zip(self.names[1:], factors, strict=True)))


def dead_groups(totals: Array, group_size: int) -> float:
    """Share of groups of consecutive episodes whose totals (B,) are all equal: GRPO learns nothing from them.

    Raises `UsageError` if the groups do not fill the batch.
    """
    if group_size < 1 or len(totals) == 0 or len(totals) % group_size:
        raise UsageError(f"{len(totals)} episodes are no whole number of groups of {group_size}.")
    groups = totals.reshape(-1, group_size)
    return float((groups == groups[:, :1]).all(1).sum()) / len(groups)
