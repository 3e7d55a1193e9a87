"""Command lines from dataclasses (tyro), with one sentence for whatever is wrong."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import textwrap
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from saferl.errors import UsageError
from saferl.experiment.config import CostLimit, parse_cost_limit

Arguments = TypeVar("Arguments")

_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _cost_limit_rule(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
    """Cost limits are typed as 25 or as hazards=10,vases_contact=5."""
    if info.type not in (CostLimit, CostLimit | None):
        return None

    def show(value: CostLimit | None) -> list[str]:
        if value is None:
            return ["none"]
        if isinstance(value, dict):
            return [",".join(f"{name}={limit:g}" for name, limit in value.items())]
        return [f"{value:g}"]

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="LIMIT|NAME=LIMIT,...",
        instance_from_str=lambda words: parse_cost_limit(words[0]),
        is_instance=lambda value: value is None or isinstance(value, float | int | dict),
        str_from_instance=show,
    )


def parse(cls: type[Arguments], arguments: Sequence[str], prog: str) -> Arguments:
    """Build `cls` from the words of a command line.

    Raises:
        UsageError: an option is unknown (the nearest one is named), missing or ill-typed.
        SystemExit: with status 0, after `--help` was printed.
    """
    errors = io.StringIO()
    try:
        with _REGISTRY, contextlib.redirect_stderr(errors):
            parsed, unknown = tyro.cli(
                cls,
                args=list(arguments),
                prog=prog,
                return_unknown_args=True,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(_sentence(errors.getvalue(), prog)) from None
    if unknown:
        raise UsageError(_unknown_option(cls, unknown[0], prog))
    return parsed


def _sentence(box: str, prog: str) -> str:
    """The first paragraph below the title of the box that tyro draws, as a sentence of our own."""
    blocks: list[list[str]] = [[]]
    for framed in box.splitlines():
        line = re.sub(r"\x1b\[[0-9;]*m", "", framed).strip("│").rstrip()
        if not line.strip(" -─") or line.strip()[0] in "╭╰":
            blocks.append([])
        else:
            blocks[-1].append(line)
    blocks = [block for block in blocks if block]
    if "╭" not in box:
        blocks = blocks[1:]  # without a frame, the title has lines of its own
    told = textwrap.dedent("\n".join(blocks[0])).splitlines() if blocks else []
    what = " ".join(map(str.strip, told)).rstrip(".") or "the options cannot be read"
    if what.startswith("Missing from"):
        # The names are indented by four, what they mean by eight.
        what = "missing: " + "; ".join(line.strip() for line in told if re.match(r" {4}\S", line))
    return f"{what[0].lower()}{what[1:]}; see `{prog} --help`."


def _unknown_option(cls: type[Any], word: str, prog: str) -> str:
    help_text = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(help_text), _REGISTRY:
        tyro.cli(
            cls, args=["--help"], prog=prog, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
        )
    known = sorted(set(re.findall(r"--[a-z][a-z0-9-]*", help_text.getvalue())))
    kind = "option" if word.startswith("-") else "word"
    near = difflib.get_close_matches(word.split("=")[0].replace("_", "-"), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near and kind == "option" else f"see `{prog} --help`."
    return f"unknown {kind} {word!r}; {hint}"
