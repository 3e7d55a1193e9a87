"""The report: its numbers, what it shows of odd runs, and that the page stands alone."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saferl.cli import report as command
from saferl.errors import CheckpointError, SaferlError, UsageError
from saferl.experiment.report import Series, final_mean, read_runs, render, write_report

VERSIONS = {"saferl": "0.1.0", "python": "3.11.7", "torch": "2.13.0"}


def make_run(
    directory: Path,
    *,
    algorithm: str = "ppo-lag",
    seed: int = 0,
    iterations: int = 40,
    total_steps: int = 40_000,
    limits: dict[str, float] | None = None,
    rows: list[dict[str, float]] | None = None,
    evaluation: dict[str, Any] | None = None,
    **hyperparameters: Any,
) -> Path:
    """A run whose return is its iteration plus its seed and whose cost is 20 plus its seed."""
    limits = {"cost": 25.0} if limits is None else limits
    directory.mkdir(parents=True)
    config = {
        "env": "SafetyPointGoal1-v0",
        "seed": seed,
        "total_steps": total_steps,
        "hidden_sizes": [64, 64],
    }
    if limits:
        config["cost_limit"] = limits["cost"] if set(limits) == {"cost"} else limits
    document = {"algorithm": algorithm, "config": {**config, **hyperparameters}, "versions": VERSIONS}
    (directory / "config.json").write_text(json.dumps(document))
    if rows is None:
        rows = []
        for i in range(1, iterations + 1):
            row = {"step": 1000 * i, "train/return": float(i + seed), "train/cost": 20.0 + seed}
            for k, (name, limit) in enumerate(limits.items()):
                if name != "cost":
                    row[f"train/cost/{name}"] = 5.0 * (k + 1)
                row[f"constraint/{name}/limit"] = limit
                row[f"constraint/{name}/multiplier"] = 0.01 * i
            rows.append({**row, "loss/policy": -0.01, "policy/kl": 0.02, "time/steps_per_second": 9000.0})
    columns = list(dict.fromkeys(name for row in rows for name in row)) or ["step"]
    with (directory / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    if evaluation is not None:
        (directory / "evaluation.json").write_text(json.dumps(evaluation))
    return directory


class _Page(HTMLParser):
    """Tags that are not closed in order, attributes and text of a page."""

    VOID = frozenset({"meta", "br", "link", "img", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.html = text
        self.open: list[str] = []
        self.faults: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def page_of(*runs: Path) -> _Page:
    page = _Page(render(read_runs(runs)))
    assert page.open == []
    assert page.faults == []
    assert not re.search(r"\b(nan|inf)\b", page.html, re.IGNORECASE)
    return page


def test_the_header_tells_what_ran(tmp_path: Path) -> None:
    text = page_of(make_run(tmp_path / "first", seed=3)).text
    for part in ("ppo-lag on SafetyPointGoal1-v0", "first", "40,000 of 40,000", "finished", "torch 2.13.0"):
        assert part in text
    assert "stopped" not in text.replace("counts as stopped", "")


def test_a_run_short_of_its_steps_is_called_stopped(tmp_path: Path) -> None:
    assert "stopped at step 7,000" in page_of(make_run(tmp_path / "r", iterations=7)).text


def test_final_numbers_are_means_over_the_last_tenth(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", iterations=40)
    (record,) = read_runs([run])
    assert final_mean(record.return_series) == pytest.approx((37 + 38 + 39 + 40) / 4)
    assert final_mean(record.multiplier_series("cost")) == pytest.approx(0.385)
    assert "38.50" in page_of(run).text
    assert final_mean(Series(np.arange(3.0), np.array([1.0, 2.0, 9.0]))) == 9.0
    assert final_mean(None) is None


@pytest.mark.parametrize(("seed", "verdict"), [(5, "within limit 25"), (6, "above limit 25")])
def test_the_cost_is_compared_with_its_limit(tmp_path: Path, seed: int, verdict: str) -> None:
    assert verdict in page_of(make_run(tmp_path / "r", seed=seed)).text


def test_an_unconstrained_run_has_no_verdict(tmp_path: Path) -> None:
    text = page_of(make_run(tmp_path / "r", algorithm="ppo", limits={})).text
    assert "limit" not in text
    assert "Multiplier" not in text
    assert "Cost" in text


def test_named_costs_have_their_own_limit_and_multiplier(tmp_path: Path) -> None:
    text = page_of(make_run(tmp_path / "r", limits={"hazards": 10.0, "vases": 5.0})).text
    assert "within limit 10" in text
    assert "above limit 5" in text
    assert "Multiplier: hazards" in text
    assert "Multiplier: vases" in text


def test_seeds_are_drawn_as_a_mean_in_a_band(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"s{seed}", seed=seed) for seed in (0, 1, 2)]
    page = page_of(*runs)
    assert page.html.count("fill-opacity: 0.18") >= 3  # return, cost, multiplier
    assert "mean of 3 runs" in page.text
    assert "39.50 ± 1.00" in page.text
    assert "Return against cost" in page.text


def test_one_run_has_neither_band_nor_scatter(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "r"))
    assert "fill-opacity: 0.18" not in page.html
    assert "Return against cost" not in page.text


def test_other_hyperparameters_make_another_group(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", clip=0.2),
        make_run(tmp_path / "b", clip=0.1, seed=1),
        make_run(tmp_path / "c", algorithm="ppo", limits={}),
        make_run(tmp_path / "d", clip=0.2, seed=2, threads=2),
    ]
    text = page_of(*runs).text
    assert "ppo-lag (clip 0.2) mean of 2 runs" in text
    assert "ppo-lag (clip 0.1) seed 1" in text
    assert "ppo-lag (clip 0.2) seeds 0, 2" in text


def test_every_environment_has_its_own_figures(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", env="SafetyCarGoal1-v0")]
    text = page_of(*runs).text
    assert text.count("Final numbers") == 2 + 1  # and the footnote
    assert "Return against cost" not in text


def test_runs_that_ended_at_different_steps_share_what_they_have(tmp_path: Path) -> None:
    short = make_run(tmp_path / "short", iterations=10)
    long = make_run(tmp_path / "long", seed=1, iterations=40)
    later = make_run(tmp_path / "later", seed=2, rows=[{"step": 50_000, "train/return": 1.0}])
    page_of(short, long)
    page_of(short, long, later)  # no step in common


def test_before_the_first_episode_ends(tmp_path: Path) -> None:
    rows = [{"step": 1000.0 * i, "loss/policy": 0.1} for i in (1, 2)]
    text = page_of(make_run(tmp_path / "r", rows=rows)).text
    assert "No episode has finished yet" in text
    assert "Policy loss" in text


@pytest.mark.parametrize("iterations", [1, 2, 19, 20, 21])
def test_short_runs(tmp_path: Path, iterations: int) -> None:
    page_of(make_run(tmp_path / "r", iterations=iterations))


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    rows = [{"step": 1000.0, "train/return": math.nan, "train/cost": 1.0, "loss/value": math.inf}]
    rows.append({"step": 2000.0, "train/return": 5.0, "train/cost": math.inf, "loss/value": math.nan})
    run = make_run(tmp_path / "r", rows=rows)
    (record,) = read_runs([run])
    assert set(record.series) == {"train/return", "train/cost"}
    assert "5.00" in page_of(run).text


def test_training_without_episodes_falls_back_on_evaluations(tmp_path: Path) -> None:
    rows = [{"step": 1000.0 * i, "eval/return": 2.0 * i, "eval/cost": 4.0} for i in (1, 2, 3)]
    (record,) = read_runs([make_run(tmp_path / "r", rows=rows)])
    assert final_mean(record.return_series) == 6.0
    assert final_mean(record.cost_series("cost")) == 4.0


def test_the_evaluation_is_shown(tmp_path: Path) -> None:
    def about(mean: float) -> dict[str, Any]:
        return {"mean": mean, "std": 2.0, "ci95": [mean - 1, mean + 1]}

    evaluation = {
        "step": 40_000,
        "episodes": 20,
        "return": about(18.25),
        "cost": about(31.5),
        "costs": {"vases": about(3.5)},
        "limits": {"cost": 25.0},
        "violation_rate": 0.45,
        "backend": "original",
        "deterministic": True,
        "env": "SafetyPointGoal1-v0",
        "seed": 7,
    }
    text = page_of(make_run(tmp_path / "r", evaluation=evaluation)).text
    for part in ("18.25 ± 2.00", "[17.25, 19.25]", "above limit 25", "3.50", "45 %", "backend original"):
        assert part in text
    assert "step 40,000, deterministic" in text


def test_a_damaged_evaluation_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", evaluation={"return": 3})
    with pytest.raises(CheckpointError, match=r"evaluation\.json is damaged"):
        read_runs([run])


def test_hyperparameters_are_collapsed_and_differences_marked(tmp_path: Path) -> None:
    text = render(read_runs([make_run(tmp_path / "a", clip=0.2), make_run(tmp_path / "b", clip=0.1)]))
    assert "<details><summary>Hyperparameters</summary>" in text
    assert "64 × 64" in text
    assert re.findall(r'<tr class="differs"><th scope="row"><code>(\w+)', text) == ["clip"]


def test_the_page_stands_alone(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1))
    assert "http" not in page.html
    assert "<script" not in page.html
    names = Counter(value for name, value in page.attributes if name == "id")
    assert set(names.values()) == {1}
    links = {value for name, value in page.attributes if name in {"href", "src"}}
    links |= set(re.findall(r"url\(([^)]*)\)", page.html))
    assert links
    assert links <= {f"#{name}" for name in names}


def test_names_cannot_inject_html(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r&<b>", algorithm="<script>x", env='"><img src=x>', limits={"$a<b$": 3.0})
    page = page_of(run)
    assert "<script" not in page.html
    assert "<img" not in page.html
    assert "<script>x on" in page.text


def test_several_long_runs_stay_below_a_megabyte(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{algorithm}{seed}", algorithm=algorithm, seed=seed, iterations=600)
        for algorithm in ("ppo-lag", "cpo")
        for seed in (0, 1, 2)
    ]
    assert write_report(runs, tmp_path / "page.html").stat().st_size < 1_000_000


def test_where_the_page_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)
    assert write_report([a]) == a / "report" / "index.html"
    assert write_report([a, b]) == Path("report/index.html")
    assert write_report([a], Path("new/deep/page.html")) == Path("new/deep/page.html")
    assert write_report([a], tmp_path) == tmp_path / "index.html"
    assert write_report([a], tmp_path).read_text().startswith("<!doctype html>")
    with pytest.raises(UsageError, match="cannot be made"):
        write_report([a], Path("new/deep/page.html/index.html"))


def test_a_run_given_twice_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_run(tmp_path / "a"))
    (record,) = read_runs([Path(), tmp_path / "a"])
    assert record.name == "a"


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    records = read_runs([make_run(tmp_path / "x" / "seed0"), make_run(tmp_path / "y" / "seed0")])
    assert len({record.name for record in records}) == 2


def test_what_is_no_run_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run to report on"):
        write_report([])
    with pytest.raises(UsageError, match="is not a run"):
        write_report([tmp_path / "nothing"])
    empty = make_run(tmp_path / "empty", rows=[])
    with pytest.raises(SaferlError, match="no metrics yet") as told:
        write_report([empty])
    assert "\n" not in str(told.value)
    (empty / "metrics.csv").unlink()
    with pytest.raises(SaferlError, match="no metrics yet"):
        write_report([empty])


def test_smoothing_keeps_constants_and_reports_its_window() -> None:
    steps = np.arange(100.0)
    constant = Series(steps, np.full(100, 3.0))
    assert constant.window == 5
    assert np.allclose(constant.smoothed().values, 3.0)
    line = Series(steps, 2.0 * steps).smoothed()
    assert np.allclose(line.values[2:-2], 2.0 * steps[2:-2])
    assert line.values[0] == pytest.approx((0 + 2 + 4) / 3)
    assert Series(steps[:19], steps[:19]).window == 1


def test_thinning_keeps_the_ends() -> None:
    steps = np.arange(1000.0)
    thin = Series(steps, steps).thinned(120)
    assert len(thin) == 120
    assert (thin.steps[0], thin.steps[-1]) == (0.0, 999.0)


def test_a_limit_that_moves_is_drawn_as_a_curve(tmp_path: Path) -> None:
    rows = [
        {"step": 1000.0 * i, "train/return": 1.0, "train/cost": 9.0, "constraint/cost/limit": 10.0 - i}
        for i in (1, 2, 3)
    ]
    text = page_of(make_run(tmp_path / "r", rows=rows)).text
    assert "limit 7" in text


def test_the_users_matplotlib_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # a package under test may want it
    with matplotlib.rc_context({"font.size": 33.0}):
        text = render(read_runs([make_run(tmp_path / "r")]))
        assert matplotlib.rcParams["font.size"] == 33.0
    assert "33" not in set(re.findall(r"font-size: (\d+)", text))
    assert "matplotlib.pyplot" not in sys.modules


def test_the_command_prints_numbers_and_the_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    runs = [str(make_run(tmp_path / "a")), str(make_run(tmp_path / "b", seed=6))]
    page = tmp_path / "page.html"
    assert command.main([*runs, "--output", str(page)]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[-1] == f"report: {page}"
    assert "38.500" in output
    assert "25 ok" in output
    assert "25 above" in output
    assert page.exists()


@pytest.mark.parametrize("arguments", [[], ["nowhere"], ["nowhere", "--outptu", "x"]])
def test_the_command_refuses_wrong_use(arguments: list[str]) -> None:
    with pytest.raises(UsageError):
        command.main(arguments)
