"""`saferl train ALGO --env ID ...` and `saferl train --resume RUN`."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from saferl.errors import DatasetError, UsageError, unknown_name

if TYPE_CHECKING:
    from saferl.experiment.run import Run

USAGE = """usage: saferl train ALGO [--env ID --run DIR --total-steps N --num-envs K --cost-limit D ...]
       saferl train --resume RUN [--total-steps N]

`saferl list algos` names the algorithms; `saferl train ALGO --help` documents every option."""


@dataclasses.dataclass
class ResumeArguments:
    """Go on with an interrupted run, or train a finished one further."""

    resume: Path
    """Folder of the run to go on with."""
    total_steps: int | None = None
    """Train up to this many steps in all, instead of what the run asked for."""
    quiet: bool = False
    """Plain lines instead of a progress bar."""


def main(arguments: list[str]) -> int:
    """Parse, then train a new run or resume one."""
    from saferl.agents import LEARNERS

    if not arguments or arguments[0] in {"-h", "--help"}:
        print(USAGE)
        return 0 if arguments else 2
    if any(word.split("=")[0] == "--resume" for word in arguments):
        if arguments[0] in LEARNERS:
            raise UsageError("a resumed run knows its algorithm; leave it out: `saferl train --resume RUN`.")
        return _resume(arguments)
    name = arguments[0]
    if name.startswith("-"):
        raise UsageError("name the algorithm first: `saferl train ALGO ...`; `saferl list algos` shows them.")
    if name not in LEARNERS:
        raise unknown_name("algorithm", name, LEARNERS)
    module = importlib.import_module(LEARNERS[name].module)
    prog = f"saferl train {name}"
    preset, words = _take_preset(arguments[1:])
    config, directory, quiet = _parse_new(module, preset, words, prog)
    if directory is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        task = re.sub(r"[^A-Za-z0-9]+", "-", config.env.removeprefix("saferl/"))
        directory = Path("runs") / f"{name}-{task}-{config.seed}-{stamp}"

    from saferl.experiment.config import to_json

    run = _run_class(module, name).create(
        directory, {"algorithm": name, "config": to_json(config)}, quiet=quiet
    )
    return _train(module, config, run, fresh=True)


def _resume(arguments: list[str]) -> int:
    from saferl.agents import LEARNERS
    from saferl.cli.parsing import parse
    from saferl.experiment.config import from_json
    from saferl.experiment.run import read_config

    asked = parse(ResumeArguments, arguments, "saferl train")
    stored = read_config(asked.resume)
    name = stored["algorithm"]
    if name not in LEARNERS:
        raise unknown_name("algorithm", name, LEARNERS)
    module = importlib.import_module(LEARNERS[name].module)
    config = from_json(module.Config, stored["config"])
    if asked.total_steps is not None:
        config = dataclasses.replace(config, total_steps=asked.total_steps)
    run = _run_class(module, name).open(asked.resume, quiet=asked.quiet)
    return _train(module, config, run, fresh=False)


def _run_class(module: Any, name: str) -> type[Run]:
    """Who writes the run: the first process, where `torchrun` started several."""
    from saferl.experiment.ranks import process_rank, world_size
    from saferl.experiment.run import Run, ShadowRun

    if world_size() > 1 and not getattr(module, "DATA_PARALLEL", False):
        raise UsageError(
            f"{name} trains in one process; start it without torchrun (carl and carl-lag share the work)."
        )
    if process_rank() == 0:
        return Run
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  # what the first process says is enough
    return ShadowRun


def _take_preset(words: list[str]) -> tuple[str | None, list[str]]:
    """The value of --preset, and the other words: the defaults must be known before these are parsed."""
    preset, rest = None, []
    remaining = iter(words)
    for word in remaining:
        flag, _, value = word.partition("=")
        if flag == "--preset":
            preset = value or next(remaining, "")
        else:
            rest.append(word)
    return preset, rest


def _parse_new(module: Any, preset: str | None, words: list[str], prog: str) -> tuple[Any, Path | None, bool]:
    import tyro

    from saferl.cli.parsing import parse

    presets: dict[str, dict[str, Any]] = getattr(module, "PRESETS", {})
    if preset is not None and not presets:
        raise UsageError(f"`{prog}` has no presets; leave out --preset {preset}.")
    if preset is not None and preset not in presets:
        raise unknown_name("preset", preset, presets)
    kinds = get_type_hints(module.Config)
    fields: list[Any] = [
        (name, kinds[name], value) for name, value in ({} if preset is None else presets[preset]).items()
    ]
    config_class = dataclasses.make_dataclass(
        "Config", fields, bases=(module.Config,), frozen=True, kw_only=True
    )
    extra: list[Any] = [
        (
            "run",
            Annotated[Path | None, tyro.conf.arg(help="Run folder; runs/ALGO-ENV-SEED-TIME when left out.")],
            None,
        ),
        ("quiet", Annotated[bool, tyro.conf.arg(help="Plain lines instead of a progress bar.")], False),
    ]
    if presets:
        what = f"Other defaults than the published ones: {', '.join(presets)}."
        extra.append(("preset", Annotated[str | None, tyro.conf.arg(help=what)], preset))
    arguments_class = dataclasses.make_dataclass(
        "Arguments", extra, bases=(config_class,), frozen=True, kw_only=True
    )
    parsed: Any = parse(arguments_class, words, prog)
    values = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(module.Config)}
    return module.Config(**values), parsed.run, parsed.quiet


def _train(module: Any, config: Any, run: Any, *, fresh: bool) -> int:
    from saferl.experiment.ranks import process_rank

    # A supervisor's SIGTERM gets the same orderly stop as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    directory = run.directory
    try:
        module.train(config, run)
    except KeyboardInterrupt:
        saved = "nothing was finished yet" if run.saved_step is None else f"step {run.saved_step:,} is saved"
        print(f"\nstopped; {saved}. Go on with: saferl train --resume {directory}", file=sys.stderr)
        raise
    except (UsageError, DatasetError):
        # What was asked for cannot run at all: leave no empty run behind.
        run.close()
        if fresh and run.saved_step is None and process_rank() == 0:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    finally:
        run.close()
    print(f"run: {directory}")
    print(f"next: saferl evaluate {directory}   or   saferl report {directory}")
    return 0
