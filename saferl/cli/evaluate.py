"""`saferl evaluate RUN|ZIP|TORCHSCRIPT`: episodes with a trained policy, in a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from saferl.cli.parsing import parse
from saferl.errors import SaferlError, UsageError
from saferl.experiment.config import CostLimit


@dataclass
class Arguments:
    """Run episodes with a trained policy; report return and cost."""

    policy: Annotated[Path, tyro.conf.Positional]
    """A run folder, a checkpoint folder, a Stable-Baselines3 zip or a TorchScript file."""
    env: str | None = None
    """Environment id; the run's own when left out."""
    episodes: int = 20
    """Episodes in all."""
    num_envs: int = 1
    """Environments stepped side by side."""
    processes: int = 0
    """Worker processes for environments stepped one by one."""
    backend: str = "auto"
    """Engine that steps the environment."""
    cost_limit: CostLimit | None = None
    """Limit on the episode cost; the run's own when left out."""
    seed: int = 1_000_000
    """Seed of the episodes, by default far from those of training."""
    stochastic: bool = False
    """Sample actions instead of taking the mode."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    threads: int = 1
    """Torch threads."""
    output: Path | None = None
    """JSON file to write; evaluation.json in the run when left out."""
    video: Path | None = None
    """Render one episode to this .mp4 or .gif file."""
    quiet: bool = False
    """Plain lines instead of a progress bar."""


def main(arguments: list[str]) -> int:
    """Evaluate, print the table, and write `evaluation.json` into the run."""
    asked = parse(Arguments, arguments, "saferl evaluate")
    for what, value in (
        ("episodes", asked.episodes),
        ("environments", asked.num_envs),
        ("threads", asked.threads),
    ):
        if value < 1:
            raise UsageError(f"the number of {what} is {value}; ask for at least one.")

    import torch

    from saferl.cli import video
    from saferl.envs import make_vec
    from saferl.experiment.checkpoint import write_atomically
    from saferl.experiment.config import cost_limits
    from saferl.experiment.evaluate import evaluate
    from saferl.experiment.progress import Progress
    from saferl.experiment.seeding import choose_device
    from saferl.policies import load_policy

    torch.set_num_threads(asked.threads)
    run = _run_config(asked.policy)
    stored = run.get("config", {})
    env_id = asked.env or stored.get("env")
    if env_id is None:
        raise UsageError(f"{asked.policy} does not say its environment; add --env ID.")
    limit = asked.cost_limit if asked.cost_limit is not None else stored.get("cost_limit")
    limits = {} if limit is None else cost_limits(limit)
    choose_device(asked.device)
    policy = load_policy(asked.policy, device=asked.device)
    if hasattr(policy, "seed"):
        policy.seed(asked.seed)

    def make_drawn() -> Any:
        return _wrapped(video.open_env(env_id, asked.backend), run)

    if asked.video is not None:
        video.check(asked.video, make_drawn)
    env = make_vec(
        env_id, min(asked.num_envs, asked.episodes), backend=asked.backend, processes=asked.processes
    )
    engine = env.metadata.get("backend", "native")
    try:
        env = _wrapped(env, run)
        _check_fit(policy, env, env_id)
        with Progress(
            f"evaluating on {env_id}", asked.episodes, quiet=asked.quiet, unit="episodes"
        ) as progress:
            result = evaluate(
                policy,
                env,
                asked.episodes,
                seed=asked.seed,
                deterministic=not asked.stochastic,
                report=progress.update,
            )
    finally:
        env.close()
    unknown = set(limits) - set(result.costs)
    if unknown:
        raise UsageError(
            f"{env_id} has no cost named {sorted(unknown)[0]!r}; it has {', '.join(result.costs)}."
        )
    summary = result.summary(limits)
    summary |= {
        "env": env_id,
        "backend": engine,
        "seed": asked.seed,
        "deterministic": not asked.stochastic,
        "step": _step_of(asked.policy),
    }
    _print_table(asked.policy, summary)
    output = asked.output
    if output is None and (asked.policy / "config.json").exists():
        output = asked.policy / "evaluation.json"
    if output is not None:
        write_atomically(output, json.dumps(summary, indent=2) + "\n")
        print(f"evaluation: {output}")
    if output == asked.policy / "evaluation.json" and summary["step"] is not None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(asked.policy)) as writer:
            writer.add_scalar("eval/return", summary["return"]["mean"], summary["step"])
            writer.add_scalar("eval/cost", summary["cost"]["mean"], summary["step"])
    if asked.video is not None:
        if hasattr(policy, "seed"):
            policy.seed(asked.seed)  # one environment's first episode, sampled, is then the film's
        episode = video.record(
            asked.video,
            make_drawn,
            policy,
            seed=asked.seed,
            deterministic=not asked.stochastic,
            quiet=asked.quiet,
        )
        cut = "" if episode.finished else ", cut off: it has no time limit"
        print(
            f"video: {asked.video} (return {episode.episode_return:.3f}, cost {episode.cost:g}, "
            f"{episode.steps} steps{cut})"
        )
    return 0


def _run_config(path: Path) -> dict[str, Any]:
    from saferl.experiment.run import read_config

    for folder in (path, path.parent.parent):
        if path.is_dir() and (folder / "config.json").exists():
            return read_config(folder)
    return {}


def _wrapped(env: Any, run: dict[str, Any]) -> Any:
    """The environment as the run's policy sees it.

    An algorithm whose policy observes more than the environment gives has `evaluation_wrap(config)` in its
    module. What a wrapper does to training alone, such as ending episodes early, is left out.
    """
    import importlib

    from saferl.agents import LEARNERS
    from saferl.experiment.config import from_json

    learner = LEARNERS.get(run.get("algorithm", ""))
    if learner is None:
        return env
    module = importlib.import_module(learner.module)
    wrap = getattr(module, "evaluation_wrap", None)
    return env if wrap is None else wrap(from_json(module.Config, run["config"]))(env)


def _step_of(path: Path) -> int | None:
    from saferl.experiment.checkpoint import list_checkpoints, step_of

    if path.name.startswith("step_"):
        return step_of(path)
    found = list_checkpoints(path / "checkpoints")
    return step_of(found[-1]) if found else None


def _check_fit(policy: Any, env: Any, env_id: str) -> None:
    expected = getattr(policy, "observation_space", None)
    offered = env.single_observation_space
    if expected is not None and expected.shape != offered.shape:
        raise SaferlError(
            f"the policy takes observations of shape {expected.shape}, {env_id} gives {offered.shape}; "
            "name the environment it was trained on with --env."
        )


def _print_table(path: Path, summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{path}: {summary['episodes']} episodes on {summary['env']} ({summary['backend']} engine)",
        title_justify="left",
    )
    for column in ("", "mean", "std", "95 % interval", "limit"):
        table.add_column(column, justify="left" if not column else "right")
    rows = {
        "return": summary["return"],
        "cost": summary["cost"],
        **summary["costs"],
        "length": summary["length"],
        **summary.get("scores", {}),
    }
    for name, row in rows.items():
        low, high = row["ci95"]
        limit = summary["limits"].get(name)
        shown = "" if limit is None else f"{limit:g} {'ok' if row['mean'] <= limit else 'above'}"
        table.add_row(name, f"{row['mean']:.3f}", f"{row['std']:.3f}", f"{low:.3f} .. {high:.3f}", shown)
    console = Console()
    console.print(table)
    if "violation_rate" in summary:
        console.print(f"{100 * summary['violation_rate']:.0f} % of the episodes exceed a limit")
