"""`saferl collect RUN... -o FILE`: record trained agents as a data set in DSRL's format."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from saferl.cli.parsing import parse
from saferl.errors import SaferlError, UsageError


@dataclasses.dataclass
class Arguments:
    """Record episodes of trained policies, one after another, as one data set in DSRL's format.

    Agents trained under several cost limits give the spread of costs that offline learners need.
    """

    policies: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Runs, checkpoints, Stable-Baselines3 zips or TorchScript files; none with --random-episodes."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """HDF5 file to write."""
    env: str | None = None
    """Environment id; the first run's own when left out."""
    episodes: int = 100
    """Episodes of each policy."""
    random_episodes: int = 0
    """Episodes of uniformly random actions besides."""
    num_envs: int = 20
    """Environments stepped side by side."""
    processes: int = 0
    """Worker processes for environments stepped one by one."""
    backend: str = "auto"
    """Engine that steps the environment."""
    seed: int = 2_000_000
    """Seed of the episodes; those of the k-th policy come k x 1,000,000 later."""
    deterministic: bool = False
    """Record the mode of the policies instead of samples."""
    threads: int = 1
    """Torch threads."""
    overwrite: bool = False
    """Replace the file if it exists."""
    quiet: bool = False
    """Plain lines instead of a progress bar."""


def main(arguments: list[str]) -> int:
    """Record, print what was recorded, and write the file."""
    asked = parse(Arguments, arguments, "saferl collect")
    for what, value in (("episodes", asked.episodes), ("environments", asked.num_envs)):
        if value < 1:
            raise UsageError(f"the number of {what} is {value}; ask for at least one.")
    if not asked.policies and asked.random_episodes < 1:
        raise UsageError("name at least one run, or ask for --random-episodes.")
    if asked.output.exists() and not asked.overwrite:
        raise UsageError(f"{asked.output} exists; choose another file, or add --overwrite.")

    import torch

    from saferl.cli.evaluate import _check_fit, _run_config
    from saferl.envs import make_vec
    from saferl.envs.datasets import OfflineDataset, concatenate, write_dsrl
    from saferl.envs.datasets.record import RandomPolicy, record
    from saferl.experiment.progress import Progress
    from saferl.policies import load_policy

    torch.set_num_threads(asked.threads)
    configs = [_run_config(path) for path in asked.policies]
    env_id = asked.env or next((c["config"]["env"] for c in configs if "config" in c), None)
    if env_id is None:
        raise UsageError("nothing says which environment to record; add --env ID.")
    jobs: list[tuple[Any, int]] = []
    for path in asked.policies:
        jobs.append((load_policy(path), asked.episodes))
    total = asked.episodes * len(jobs) + asked.random_episodes
    parts: list[OfflineDataset] = []
    env = make_vec(env_id, asked.num_envs, backend=asked.backend, processes=asked.processes)
    try:
        for (policy, _), path in zip(jobs, asked.policies, strict=True):
            try:
                _check_fit(policy, env, env_id)
            except SaferlError as error:
                raise SaferlError(f"{path}: {error}") from error
        if asked.random_episodes:
            jobs.append((RandomPolicy(env.single_action_space, asked.seed), asked.random_episodes))
        with Progress(f"recording {env_id}", total, quiet=asked.quiet, unit="episodes") as progress:
            done = 0
            for k, (policy, episodes) in enumerate(jobs):
                seed = asked.seed + k * 1_000_000
                if hasattr(policy, "seed"):
                    policy.seed(seed)
                # Fewer episodes than environments: those beyond would be run for nothing.
                stepped = env
                if episodes < asked.num_envs:
                    stepped = make_vec(env_id, episodes, backend=asked.backend, processes=asked.processes)
                try:
                    parts.append(
                        record(
                            policy,
                            stepped,
                            episodes,
                            seed=seed,
                            deterministic=asked.deterministic,
                            report=lambda count, before=done: progress.update(before + count),  # type: ignore[misc]
                        )
                    )
                finally:
                    if stepped is not env:
                        stepped.close()
                done += episodes
    finally:
        env.close()
    data = concatenate(parts)
    write_dsrl(asked.output, data)
    _print_table([*map(str, asked.policies), *(["random actions"] if asked.random_episodes else [])], parts)
    print(f"data set: {asked.output} ({data.num_episodes} episodes, {len(data):,} transitions)")
    return 0


def _print_table(names: list[str], parts: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="recorded episodes", title_justify="left")
    for column in ("policy", "episodes", "return", "cost", "length"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name, part in zip(names, parts, strict=True):
        means = (part.episode_returns.mean(), part.episode_costs.mean(), part.episode_lengths.mean())
        table.add_row(name, str(part.num_episodes), *(f"{mean:.2f}" for mean in means))
    Console().print(table)
