"""`saferl starc REWARD REWARD ...`: how differently do rewards order policies?"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from saferl.cli.parsing import parse
from saferl.errors import DatasetError, UsageError

if TYPE_CHECKING:
    from saferl.starc.sampled import Transitions
    from saferl.starc.tabular import Floats


@dataclasses.dataclass
class Arguments:
    """Compare rewards by a STARC metric: 0 for the same order of policies, 2 for opposite orders.

    With --mdp the comparison is exact, and tells what optimising one reward costs of another. With --env, or
    --dataset, it is made from transitions: of uniformly random actions, or of those in the file.
    """

    rewards: Annotated[tuple[str, ...], tyro.conf.Positional]
    """At least two rewards, each a function module:function of (observations, actions, next_observations), or
    of the process with --mdp; a column of the data (reward and cost of an environment); or a TorchScript file
    of a reward model."""
    env: str | None = None
    """Environment whose transitions are recorded."""
    mdp: Path | None = None
    """NumPy archive (npz) with transitions (S, A, S'), and, unless given here, discount; maybe initial and
    rewards."""
    dataset: str | None = None
    """Data set: a DSRL, D4RL or Minari file, or the name of a DSRL task."""
    canonicalization: str = "val"
    """val or minimal; with --mdp also minimal-2, minimal-1, minimal-inf, val-potential, minimal-potential,
    epic, dard and none."""
    norm: Literal["1", "2", "inf", "w1", "w2", "winf"] = "2"
    """Norm that rewards are divided by; from transitions it is 2."""
    metric: Literal["1", "2", "inf", "w1", "w2", "winf", "angle"] = "2"
    """Norm of the difference, or the angle; from transitions it is 2."""
    discount: float | None = None
    """Discount; 0.99 from transitions when left out."""
    episodes: int = 60
    """Episodes that are recorded with --env."""
    features: int = 128
    """Random features of states, from transitions."""
    network: int = 0
    """Width of learned features of states, from transitions; 0 for none."""
    resamples: int = 100
    """Bootstrap samples of the intervals."""
    seed: int = 0
    """Seed of recording, features and resampling."""
    device: str = "cpu"
    """Where sums over transitions are formed."""
    threads: int = 1
    """Torch threads."""
    output: Path | None = None
    """Folder of the figures and the numbers; runs/starc-TIME when left out."""
    quiet: bool = False
    """Plain lines instead of a progress bar."""


def main(arguments: list[str]) -> int:
    """Compare, print the matrix and its reading, write heat map, map of rewards and numbers."""
    asked = parse(Arguments, arguments, "saferl starc")
    sources = [name for name in ("env", "mdp", "dataset") if getattr(asked, name) is not None]
    if len(sources) != 1:
        raise UsageError("say what the rewards are compared on: one of --env ID, --mdp FILE, --dataset FILE.")
    if len(asked.rewards) < 2:
        raise UsageError("name at least two rewards to compare.")
    if len(set(asked.rewards)) < len(asked.rewards):
        raise UsageError("a reward is named twice; its distance from itself is 0.")
    import torch

    torch.set_num_threads(asked.threads)
    sys.path.insert(0, "")  # functions of the user's own modules, as `python -m` finds them
    try:
        result = _exact(asked) if asked.mdp is not None else _sampled(asked)
    finally:
        sys.path.remove("")
    folder = asked.output or Path("runs") / f"starc-{time.strftime('%Y%m%d-%H%M%S')}"
    _print(asked, result)
    _write(asked, result, folder)
    print(f"figures and numbers: {folder}")
    return 0


@dataclasses.dataclass(frozen=True)
class _Result:
    distances: Floats
    low: Floats | None
    high: Floats | None
    readings: list[str]
    cautions: list[str]
    basis: str
    """What was compared on."""


# --- exactly ---------------------------------------------------------------------------------------------


def _exact(asked: Arguments) -> _Result:
    import numpy as np

    from saferl.starc import Canonicalizer, TabularMDP, distance_matrix, regret, worst_case_regret

    assert asked.mdp is not None
    arrays = _archive(asked.mdp)
    if "transitions" not in arrays:
        raise UsageError(f"{asked.mdp} has no array transitions; it has {', '.join(arrays) or 'none'}.")
    discount = asked.discount
    if discount is None:
        if "discount" not in arrays:
            raise UsageError(f"{asked.mdp} has no discount; add --discount.")
        discount = float(arrays["discount"])
    mdp = TabularMDP(arrays["transitions"], discount, arrays.get("initial"))
    rewards = []
    for name in asked.rewards:
        if name in arrays:
            rewards.append(arrays[name])
        elif ":" in name:
            rewards.append(_call(name, _function(name), mdp))
        else:
            others = [n for n in arrays if n not in ("transitions", "discount", "initial")]
            raise UsageError(
                f"{name} is no array of {asked.mdp} ({', '.join(others) or 'it has no rewards'}) and no "
                "module:function."
            )
        try:
            mdp.reward(rewards[-1])
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
    norm: Any = {"1": 1, "2": 2, "inf": np.inf}.get(asked.norm, asked.norm)
    metric: Any = {"1": 1, "2": 2, "inf": np.inf}.get(asked.metric, asked.metric)
    canonical = Canonicalizer(mdp, asked.canonicalization)
    distances = distance_matrix(rewards, mdp, canonical, norm, metric)
    readings = []
    trivial = [
        name for name, reward in zip(asked.rewards, rewards, strict=True) if not canonical(reward).any()
    ]
    cautions = [f"all policies earn {name} alike; it is 1 from all that is not so." for name in trivial]
    small = mdp.num_states * mdp.num_actions <= 20_000
    for name, reward in zip(asked.rewards[1:], rewards[1:], strict=True):
        lost = regret(rewards[0], reward, mdp)
        text = f"optimising {name} costs up to {lost:.1%} of the range of {asked.rewards[0]}"
        if small:
            worst = worst_case_regret(rewards[0], reward, mdp)
            text += f"; a change that {name} calls no worse costs up to {worst:.1%}"
        readings.append(f"{text}.")
    basis = f"{asked.mdp} ({mdp.num_states:,} states, {mdp.num_actions} actions, discount {discount:g})"
    return _Result(distances, None, None, readings, cautions, basis)


def _archive(path: Path) -> dict[str, Any]:
    import zipfile

    import numpy as np

    if not path.exists():
        raise UsageError(f"there is no file {path}.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not hasattr(archive, "files"):
                raise UsageError(f"{path} is a single array; an MDP is an archive, numpy.savez(...).")
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"{path} is no intact NumPy archive of numbers; write it with numpy.savez."
        ) from error


# --- from transitions ------------------------------------------------------------------------------------


def _sampled(asked: Arguments) -> _Result:
    from saferl.experiment.seeding import choose_device
    from saferl.starc.sampled import Features, compare, evaluate_rewards

    if asked.norm != "2" or asked.metric != "2":
        raise UsageError("from transitions the norm and the metric are 2; other norms need --mdp.")
    if asked.canonicalization not in ("val", "minimal"):
        raise UsageError(f"from transitions there are val and minimal; {asked.canonicalization} needs --mdp.")
    device = choose_device(asked.device)
    for name in asked.rewards:
        if ":" in name:
            _function(name)  # before anything is recorded
    data, columns, basis = _recorded(asked) if asked.env is not None else _read(asked)
    rewards = []
    for name in asked.rewards:
        try:
            rewards.append(evaluate_rewards([_sampled_reward(name, columns, data)], data)[:, 0])
        except UsageError as error:
            raise UsageError(str(error).replace("reward 0", name)) from error
    result = compare(
        rewards,
        data,
        0.99 if asked.discount is None else asked.discount,
        canonicalization=asked.canonicalization,  # type: ignore[arg-type]
        features=Features(random=asked.features, network=asked.network, seed=asked.seed),
        resamples=asked.resamples,
        device=device,
    )
    readings = []
    for k, name in enumerate(asked.rewards[1:], start=1):
        share = 1 - result.distances[0, k] ** 2 / 2
        ends = 1 - result.high[0, k] ** 2 / 2, 1 - result.low[0, k] ** 2 / 2
        verb = "brings" if share >= 0 else "costs"
        readings.append(
            f"a step along the advantages of {name} {verb} {abs(share):.0%} of what one along those of "
            f"{asked.rewards[0]} itself brings (between {ends[0]:.0%} and {ends[1]:.0%})."
        )
    cautions = [
        re.sub(r"reward (\d+)", lambda found: asked.rewards[int(found[1])], c) for c in result.cautions
    ]
    return _Result(result.distances, result.low, result.high, readings, cautions, basis)


def _recorded(asked: Arguments) -> tuple[Transitions, dict[str, Any], str]:
    """Episodes of uniformly random actions."""
    from saferl.envs import make_vec
    from saferl.envs.datasets.record import RandomPolicy, record
    from saferl.experiment.progress import Progress

    assert asked.env is not None
    if asked.episodes < 4:
        raise UsageError(f"{asked.episodes} episodes are too few; ask for at least 4.")
    env = make_vec(asked.env, min(20, asked.episodes))
    try:
        policy = RandomPolicy(env.single_action_space, asked.seed)
        with Progress(f"recording {asked.env}", asked.episodes, quiet=asked.quiet, unit="episodes") as bar:
            more: dict[str, Any] = {}
            data = record(policy, env, asked.episodes, seed=asked.seed, report=bar.update, columns=more)
    finally:
        env.close()
    basis = f"{len(data):,} transitions of random actions in {asked.env}"
    return _transitions(data), {"reward": data.rewards, "cost": data.costs, **more}, basis


def _read(asked: Arguments) -> tuple[Transitions, dict[str, Any], str]:
    """A data set, and all its columns of one number a transition."""
    from saferl.envs.datasets import load, locate

    assert asked.dataset is not None
    data = load(asked.dataset)
    columns: dict[str, Any] = {"rewards": data.rewards, "costs": data.costs}
    path, _ = locate(asked.dataset)
    if path.is_file():
        from saferl.envs.datasets import hdf5

        with hdf5.open_file(path) as file:
            for name in asked.rewards:
                if name in columns or ":" in name or Path(name).suffix:
                    continue
                column = hdf5.column(file, path, name, 1)
                if column is None:
                    continue
                values = column.read()
                if len(values) != len(data):
                    raise DatasetError(
                        f"{path}: the column {name} has {len(values):,} rows for {len(data):,} transitions; "
                        "extra columns need DSRL's layout (saferl dataset convert)."
                    )
                columns[name] = values
    return _transitions(data), columns, f"{len(data):,} transitions of {asked.dataset}"


def _transitions(data: Any) -> Transitions:
    import numpy as np

    from saferl.starc.sampled import Transitions

    ends = data.terminals | data.timeouts
    episodes = np.concatenate([[0], np.cumsum(ends)[:-1]])
    return Transitions(data.observations, data.actions, data.next_observations, data.terminals, episodes)


def _sampled_reward(name: str, columns: dict[str, Any], data: Transitions) -> Any:
    if name in columns:
        return columns[name]
    if ":" in name:
        return _call(name, _function(name), data.observations, data.actions, data.next_observations)
    path = Path(name)
    if path.suffix in (".pt", ".ts", ".torchscript"):
        import torch

        if not path.exists():
            raise UsageError(f"there is no file {path}.")
        try:
            model = torch.jit.load(path, map_location="cpu").eval()
        except RuntimeError as error:
            raise UsageError(f"{path} is no TorchScript file ({str(error).splitlines()[0]}).") from error
        inputs = (data.observations, data.actions, data.next_observations)
        with torch.no_grad():
            return _call(name, model, *(torch.as_tensor(x).float() for x in inputs))
    raise UsageError(
        f"{name} is neither a column ({', '.join(columns)}), nor a module:function, nor a TorchScript file."
    )


def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{name} cannot be imported ({error}).") from error
    if not callable(found):
        raise UsageError(f"{name} is no function.")
    return found  # type: ignore[no-any-return]


def _call(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:  # the user's own code
        raise UsageError(f"{name} failed: {type(error).__name__}: {error}.") from error


# --- what is shown -----------------------------------------------------------------------------------------


def _print(asked: Arguments, result: _Result) -> None:
    from rich.console import Console
    from rich.table import Table

    unit = "angle in radians" if asked.metric == "angle" else "0 same order, 2 opposite"
    title = f"STARC distances ({asked.canonicalization}, n = {asked.norm}, m = {asked.metric}; {unit})"
    table = Table(title=title, title_justify="left", caption=result.basis, caption_justify="left")
    table.add_column("")
    for name in asked.rewards:
        table.add_column(name, justify="right")
    for i, name in enumerate(asked.rewards):
        cells = []
        for j in range(len(asked.rewards)):
            cell = f"{result.distances[i, j]:.3f}"
            if result.low is not None and result.high is not None and i != j:
                cell += f"\n{result.low[i, j]:.3f} to {result.high[i, j]:.3f}"
            cells.append(cell)
        table.add_row(name, *cells)
    Console().print(table)
    for reading in result.readings:
        print(reading)
    for caution in result.cautions:
        print(f"caution: {caution}")


def _write(asked: Arguments, result: _Result, folder: Path) -> None:
    from saferl.experiment.checkpoint import write_atomically
    from saferl.starc.figures import draw_heatmap, draw_map

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be made ({error.strerror}).") from error
    numbers = {
        "rewards": list(asked.rewards),
        "on": result.basis,
        "canonicalization": asked.canonicalization,
        "norm": asked.norm,
        "metric": asked.metric,
        "distances": result.distances.tolist(),
        "low": None if result.low is None else result.low.tolist(),
        "high": None if result.high is None else result.high.tolist(),
        "readings": result.readings,
        "cautions": result.cautions,
    }
    write_atomically(folder / "starc.json", json.dumps(numbers, indent=2) + "\n")
    draw_heatmap(folder / "distances.png", asked.rewards, result.distances)
    draw_map(folder / "map.png", asked.rewards, result.distances)
