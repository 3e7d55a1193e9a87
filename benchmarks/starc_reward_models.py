"""Does the STARC distance to the true reward say what a reward model costs when it is optimised?

Hand-made reward models of synthetic responses, whose true reward is known: a response has a quality, a length
and features of style, a prompt a difficulty, which the true reward subtracts from all its responses. First,
distance and plain correlation to the true reward, and the share of best-of-N's gain that is lost when the
model selects. Then an alarm for reward hacking: a policy is tilted towards a proxy that agrees with the gold
reward where the base policy is, and both rewards are compared on the policy's own samples. The slope of the
gold reward in the tilt is the covariance of both within prompts, so that it peaks where d is sqrt(2).

    python benchmarks/starc_reward_models.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _common import RESULTS, save
from scipy import stats

from saferl.rewards.par import par_reward
from saferl.starc.bandit import (
    RewardModelComparison,
    best_of_n_regret,
    compare_reward_models,
    pearson_distance,
    score_responses,
)

Model = Callable[[np.ndarray, np.ndarray], np.ndarray]

PROMPTS, EACH, STYLES, REFERENCES, RANDOM_MODELS = 400, 128, 6, 10, 48
NUMBERS = (2, 4, 16, 64)
QUALITY, LENGTH = 0, 1
DIFFICULTY, ONSET = 0, 1
TILTS = np.arange(0, 3.01, 0.125)


def noise(responses: np.ndarray, seed: int = 0) -> np.ndarray:
    """Uniform numbers that are a fixed function of the response, as a reward model's error is."""
    direction = np.random.default_rng([7, seed]).normal(size=responses.shape[1])
    return np.asarray(1e4 * np.sin(responses @ direction) % 1).clip(1e-9, 1 - 1e-9)


def truth(prompts: np.ndarray, responses: np.ndarray) -> np.ndarray:
    return np.asarray(responses[:, QUALITY] - prompts[:, DIFFICULTY])


def plus_length(strength: float) -> Model:
    return lambda prompts, responses: truth(prompts, responses) + strength * responses[:, LENGTH]


def plus_noise(strength: float) -> Model:
    return lambda prompts, responses: truth(prompts, responses) + strength * stats.norm.ppf(noise(responses))


def par(k: float) -> Model:
    def model(prompts: np.ndarray, responses: np.ndarray) -> np.ndarray:
        references = prompts[:, 2:] - prompts[:, [DIFFICULTY]]
        scores = torch.as_tensor(truth(prompts, responses))
        return np.asarray(par_reward(scores, torch.as_tensor(references), k))

    return model


def drawn(index: int) -> Model:
    """Random weights and share of the difficulty, half of them squashed, an error of random size and tail."""
    rng = np.random.default_rng([1, index])
    weights = rng.normal(size=2 + STYLES) * rng.choice([0.1, 0.3, 1], 2 + STYLES)
    weights[QUALITY] = rng.uniform(-0.5, 1.5)
    difficulty, strength, degrees = rng.uniform(-1, 2), rng.uniform(0, 0.7), rng.uniform(2.1, 10)

    def model(prompts: np.ndarray, responses: np.ndarray) -> np.ndarray:
        score = responses @ weights
        score = 2 * np.tanh(score) if index % 2 else score
        error = stats.t.ppf(noise(responses, index), degrees)
        return np.asarray(score + strength * error - difficulty * prompts[:, DIFFICULTY])

    return model


NAMED: dict[str, Model] = {
    "true reward": truth,
    "offset for each prompt": lambda p, r: truth(p, r) + 10 * np.cos(9 * p[:, DIFFICULTY]),
    "3 times": lambda p, r: 3 * truth(p, r),
    "opposite": lambda p, r: -truth(p, r),
    "opposite, difficulty kept": lambda p, r: -r[:, QUALITY] - p[:, DIFFICULTY],
    "difficulty alone": lambda p, r: -p[:, DIFFICULTY],
    **{f"length bias {s:g}": plus_length(s) for s in (0.25, 0.5, 1, 2, 4)},
    **{f"PAR, k = {k:g}": par(k) for k in (0.1, 1, 3, 10)},
    **{f"noise {s:g}": plus_noise(s) for s in (0.25, 0.5, 1, 2, 4)},
    "heavy-tailed noise": lambda p, r: truth(p, r) + 0.5 * stats.t.ppf(noise(r), 2.1),
}


def sample(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts (N, 2 + M), responses (N, F) and prompt ids (N,) of the base policy.

    A prompt is its difficulty, the length from which gold's penalty sets in, and M reference qualities.
    """
    difficulty, onset = 3 * rng.normal(size=(PROMPTS, 1)), rng.uniform(0.5, 1.5, (PROMPTS, 1))
    prompts = np.hstack([difficulty, onset, rng.normal(size=(PROMPTS, REFERENCES))])
    responses = rng.normal(size=(PROMPTS * EACH, 2 + STYLES))
    ids = np.repeat(np.arange(PROMPTS), EACH)
    return prompts[ids], responses, ids


def compare_all() -> tuple[RewardModelComparison, dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
    prompts, responses, ids = sample(np.random.default_rng(0))
    models = {**NAMED, **{f"random {index}": drawn(index) for index in range(RANDOM_MODELS)}}
    scores = {name: score_responses(model, prompts, responses, 4_096) for name, model in models.items()}
    result = compare_reward_models(scores, "base policy", prompt_ids=ids)
    meant = scores["true reward"]
    rows: dict[str, dict[str, Any]] = {}
    for index, (name, column) in enumerate(scores.items()):
        rows[name] = {
            "distance": result.distances[0, index],
            "low": result.low[0, index],
            "high": result.high[0, index],
            "pearson": pearson_distance(meant, column),
            "regret": {n: best_of_n_regret(meant, column, n, ids) for n in NUMBERS},
        }
    ranks: dict[str, dict[str, float]] = {}
    for measure in ("distance", "pearson"):
        values = [row[measure] for row in rows.values()]
        ranks[measure] = {
            str(n): float(stats.spearmanr(values, [row["regret"][n] for row in rows.values()]).statistic)
            for n in NUMBERS
        }
    return result, rows, ranks


def alarm() -> list[dict[str, float]]:
    """Proxy and gold on samples of policies tilted by exp(beta proxy).

    The proxy is quality plus length. Gold agrees until the length at which a prompt's penalty sets in. Under
    a tilt towards a linear proxy, the normal features only move, each by beta times its weight.
    """
    rows = []
    base: tuple[np.ndarray, np.ndarray] | None = None
    for tilt in TILTS:
        prompts, responses, ids = sample(np.random.default_rng(2))
        responses[:, [QUALITY, LENGTH]] += tilt
        proxy = truth(prompts, responses) + responses[:, LENGTH]
        gold = proxy - np.maximum(responses[:, LENGTH] - prompts[:, ONSET], 0) ** 2
        found = compare_reward_models({"proxy": proxy, "gold": gold}, f"tilt {tilt:g}", prompt_ids=ids)
        base = (proxy, gold) if base is None else base
        rows.append(
            {
                "tilt": float(tilt),
                "kl": float(tilt**2),
                "distance": found.distances[0, 1],
                "low": found.low[0, 1],
                "high": found.high[0, 1],
                "pearson": pearson_distance(proxy, gold),
                "proxy gain": float((proxy - base[0]).mean()),
                "gold gain": float((gold - base[1]).mean()),
            }
        )
    return rows


def main() -> None:
    from matplotlib.figure import Figure

    result, rows, ranks = compare_all()
    tilted = alarm()
    lines = [
        f"{PROMPTS} prompts with {EACH} responses of the base policy; d: STARC distance to the true reward "
        "with its 95 % interval over prompts; Pearson: plain distance sqrt((1 - rho) / 2); then the share of "
        "best-of-N's gain that is lost, which is d^2 / 2 for normal scores.",
        "",
        "| reward model | d | 95 % interval | Pearson | d^2 / 2 | "
        + " | ".join(f"N = {n}" for n in NUMBERS)
        + " |",
        "| --- |" + " ---: |" * (4 + len(NUMBERS)),
    ]
    for name in NAMED:
        row = rows[name]
        lost = " | ".join(f"{row['regret'][n]:.3f}" for n in NUMBERS)
        lines.append(
            f"| {name} | {row['distance']:.3f} | {row['low']:.3f} to {row['high']:.3f} | "
            f"{row['pearson']:.3f} | {row['distance'] ** 2 / 2:.3f} | {lost} |"
        )
    lines += [
        "",
        f"Spearman correlation with that share over these and {RANDOM_MODELS} random reward models:",
        "",
        "| | " + " | ".join(f"N = {n}" for n in NUMBERS) + " |",
        "| --- |" + " ---: |" * len(NUMBERS),
        *(
            f"| {label} | " + " | ".join(f"{ranks[measure][str(n)]:.3f}" for n in NUMBERS) + " |"
            for measure, label in (("distance", "STARC distance"), ("pearson", "Pearson distance"))
        ),
        "",
        "Proxy against gold on samples of the policy tilted by exp(beta proxy); gains over the base policy:",
        "",
        "| beta | KL | d | 95 % interval | Pearson | proxy gain | gold gain |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in tilted[::4]:
        lines.append(
            f"| {row['tilt']:.2f} | {row['kl']:.2f} | {row['distance']:.3f} | "
            f"{row['low']:.3f} to {row['high']:.3f} | {row['pearson']:.3f} | {row['proxy gain']:.2f} | "
            f"{row['gold gain']:.2f} |"
        )
    peak = max(tilted, key=lambda row: row["gold gain"])["tilt"]
    crossing = float(np.interp(np.sqrt(2), [row["distance"] for row in tilted], TILTS))
    lines += [
        "",
        f"Gold is highest at beta = {peak:.3f} (in steps of {TILTS[1]:g}); "
        f"d passes sqrt(2) at {crossing:.3f}.",
        *result.cautions,
    ]
    data = {"models": rows, "spearman": ranks, "alarm": tilted, "gold peak": peak, "crossing": crossing}
    save("starc_reward_models", data, "\n".join(lines))

    fig = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = fig.subplots(1, 3)
    shown = 16
    regrets = [row["regret"][shown] for row in rows.values()]
    for axis, measure, title in (
        (left, "distance", "STARC distance to the true reward"),
        (middle, "pearson", "plain Pearson distance"),
    ):
        for part, marker in ((slice(len(NAMED)), "o"), (slice(len(NAMED), None), "x")):
            values = [row[measure] for row in rows.values()]
            label = "hand-made" if marker == "o" else "random"
            axis.scatter(values[part], regrets[part], s=18, marker=marker, label=label)
        spearman = ranks[measure][str(shown)]
        axis.set(
            xlabel=title,
            ylabel=f"best-of-{shown} gain lost",
            title=f"Spearman {spearman:.2f}",
            xlim=(-0.05, None),
        )
    left.legend(frameon=False)
    tilts = [row["tilt"] for row in tilted]
    for key in ("proxy gain", "gold gain", "distance"):
        right.plot(tilts, [row[key] for row in tilted], label="d(proxy, gold)" if key == "distance" else key)
    right.axhline(np.sqrt(2), color="black", ls="--", lw=1, label="sqrt(2)")
    right.fill_between(tilts, [row["low"] for row in tilted], [row["high"] for row in tilted], alpha=0.3)
    right.set(xlabel="tilt towards the proxy", title="alarm on the policy's samples")
    right.legend(frameon=False)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    fig.savefig(RESULTS / "starc_reward_models.png", dpi=100)


if __name__ == "__main__":
    main()
