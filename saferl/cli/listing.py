"""`saferl list algos|envs`."""

from __future__ import annotations

from saferl.errors import UsageError, unknown_name

KINDS = ("algos", "envs")


def main(arguments: list[str]) -> int:
    """Print one table; plain text, so that it can be searched."""
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(f"usage: saferl list {'|'.join(KINDS)}")
        return 0 if arguments else 2
    kind = arguments[0]
    if kind not in KINDS:
        raise unknown_name("list", kind, KINDS)
    if len(arguments) > 1:
        raise UsageError(f"`saferl list {kind}` takes no further words, but got {arguments[1]!r}.")
    if kind == "algos":
        from saferl.agents import LEARNERS

        rows = [(name, learner.summary) for name, learner in LEARNERS.items()]
    else:
        from saferl.envs import list_envs

        rows = list_envs()
    width = max(len(row[0]) for row in rows)
    for name, summary in rows:
        print(f"{name:<{width}}  {summary}")
    return 0
