"""The `saferl` command: a table of commands, each imported only when it is typed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("saferl.cli.train", "train a learner, or go on with an interrupted run"),
    "evaluate": ("saferl.cli.evaluate", "run episodes with a trained policy and report return and cost"),
    "collect": ("saferl.cli.collect", "record trained agents as a data set for offline learning"),
    "dataset": ("saferl.cli.dataset", "inspect, draw, check, convert and fetch data sets"),
    "starc": ("saferl.cli.starc", "compare reward functions by how they order policies"),
    "report": ("saferl.cli.report", "write one HTML page with curves and tables of runs"),
    "list": ("saferl.cli.listing", "list algos or envs"),
    "doctor": ("saferl.cli.doctor", "tell what is installed, what is missing and how to mend it"),
}

DONE, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0 done, 1 failure, 2 wrong use, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in {"-h", "--help", "help"}:
        print(_help())
        return DONE if words else WRONG_USE
    if words[0] in {"-V", "--version"}:
        from saferl import __version__

        print(f"saferl {__version__}")
        return DONE
    from saferl.errors import SaferlError, UsageError, unknown_name

    try:
        if words[0] not in COMMANDS:
            raise unknown_name("command", words[0], COMMANDS)
        status: int = importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])
        return status
    except UsageError as error:
        print(f"saferl: {error}", file=sys.stderr)
        return WRONG_USE
    except SaferlError as error:
        print(f"saferl: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        "usage: saferl COMMAND ...",
        "",
        "Constrained reinforcement learning on one set of primitives.",
        "",
    ]
    lines += [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    lines += [
        "",
        "`saferl COMMAND --help` documents every option with its default.",
    ]
    return "\n".join(lines)


def run() -> None:
    """Entry point of the installed command."""
    sys.exit(main())
