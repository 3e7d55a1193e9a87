"""ONI: the count law, newest captions first, answers that cannot be read, three distillers, late labels."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from saferl.errors import SaferlError, UsageError
from saferl.rewards.oni import (
    CaptionNetwork,
    ClassificationDistiller,
    EpisodeCounts,
    RankingDistiller,
    RetrievalDistiller,
    ThreadedAnnotator,
    combined_rewards,
    encode,
    parse_label,
)


def test_the_count_law() -> None:
    counts = EpisodeCounts(2, captions=1)
    nobody = np.zeros(2, bool)
    found = [counts.step(np.array([0, 5]), nobody) for _ in range(3)]
    np.testing.assert_array_equal(found, [[1, 1], [2, 2], [3, 3]])
    rewards = combined_rewards(np.zeros(3), np.ones(3), np.array([1, 2, 3]))
    np.testing.assert_allclose(rewards, [0.4, 0.05, 0.4 / 27])
    np.testing.assert_array_equal(counts.step(np.array([0, 7]), np.array([True, False])), [4, 1])
    np.testing.assert_array_equal(counts.step(np.array([0, 7]), nobody), [1, 2], "only the first began anew")
    sparse = combined_rewards(np.ones(1), np.zeros(1), np.ones(1, int), extrinsic_weight=10)
    np.testing.assert_allclose(sparse, 10)
    with pytest.raises(UsageError, match="at least 1"):
        combined_rewards(np.zeros(1), np.zeros(1), np.zeros(1, int))


def test_answers() -> None:
    assert [parse_label(answer) for answer in (1, 0, "FOO", "it is BAR.", "FOO, yes FOO")] == [1, 0, 1, 0, 1]
    for answer in ("yes", "FOO or BAR", "", "FOOBAR"):
        with pytest.warns(UserWarning, match="counts as 0"):
            assert parse_label(answer) == 0


class SlowJudge:
    """Answers when told to, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.go = threading.Semaphore(0)

    def __call__(self, captions: list[str]) -> list[int]:
        self.asked.append(captions)
        assert self.go.acquire(timeout=20)
        return [int("good" in caption) for caption in captions]


def wait(condition: object) -> None:
    assert callable(condition)
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_newest_first_and_each_once() -> None:
    judge = SlowJudge()
    annotator = ThreadedAnnotator(judge, batch_size=2)
    annotator.submit(["busy"])
    wait(lambda: judge.asked)
    annotator.submit(["m1 good", "m2", "m1 good"])
    annotator.submit(["m3 good", "m2"])
    assert annotator.waiting == 3
    assert annotator.poll() == {}
    for _ in range(3):
        judge.go.release()
    wait(lambda: annotator.waiting == 0 and len(judge.asked) == 3)
    assert judge.asked == [["busy"], ["m2", "m3 good"], ["m1 good"]]
    labels: dict[str, int] = {}
    wait(lambda: labels.update(annotator.poll()) or len(labels) == 4)
    assert labels == {"busy": 0, "m1 good": 1, "m2": 0, "m3 good": 1}
    assert annotator.poll() == {}
    annotator.close()


def test_a_judge_that_fails() -> None:
    def broken(captions: list[str]) -> list[int]:
        raise RuntimeError("no memory")

    with ThreadedAnnotator(broken) as annotator:
        annotator.submit(["a"])

        def failed() -> bool:
            try:
                annotator.poll()
            except SaferlError as error:
                said.append(str(error))
            return bool(said)

        said: list[str] = []
        wait(failed)
        assert said == ["the judge of captions failed: RuntimeError: no memory"]
    with ThreadedAnnotator(lambda captions: [1]) as annotator:
        annotator.submit(["a", "b"])
        with pytest.raises(SaferlError, match="1 answers to 2 captions"):
            wait(lambda: annotator.poll())
    with pytest.raises(UsageError, match="at least 1"):
        ThreadedAnnotator(broken, batch_size=0)


def test_retrieval() -> None:
    distiller = RetrievalDistiller()
    np.testing.assert_array_equal(distiller.reward(["a", "b"]), [0, 0])
    assert distiller.unlabelled(["a", "b", "a"]) == ["a", "b"]
    distiller.update({"a": 1})
    np.testing.assert_array_equal(distiller.reward(["a", "b", "a"]), [1, 0, 1])
    assert distiller.unlabelled(["a", "b"]) == ["b"]


def test_the_reader_of_captions() -> None:
    rows = encode(["ab", "x" * 300, ""])
    assert rows.shape == (3, 256)
    assert rows[0, :3].tolist() == [97, 98, 0]
    assert rows[1, -1] == ord("x")
    assert rows[2].sum() == 0
    network = CaptionNetwork(2)
    assert network(rows).shape == (3, 2)
    kernels = [m.kernel_size for m in network.modules() if isinstance(m, torch.nn.Conv1d)]
    assert kernels == [(7,), (7,), (3,), (3,), (3,), (3,)]


def captions(count: int, seed: int) -> dict[str, int]:
    rng = np.random.default_rng(seed)
    things = ["a key", "a wall", "a door", "some mud"]
    chosen = rng.integers(0, 4, count)
    return {f"You find {things[k]} in room {rng.integers(10**6)}.": int(k in (0, 2)) for k in chosen}


def test_classification_carries_over_to_captions_never_labelled() -> None:
    distiller = ClassificationDistiller(gate=200, batch_size=64, lr=1e-3)
    labelled = captions(400, 0)
    assert distiller.learn() is None
    distiller.update(dict(list(labelled.items())[:100]))
    assert distiller.learn() is None
    np.testing.assert_array_equal(distiller.reward(list(labelled)), 0)
    distiller.update(labelled)
    losses = [distiller.learn() for _ in range(120)]
    assert losses[-1] is not None
    assert losses[0] is not None
    assert losses[-1] < 0.3 < losses[0]
    fresh = captions(200, 1)
    right = distiller.reward(list(fresh)) == np.array(list(fresh.values()))
    assert right.mean() > 0.9
    assert distiller.reward([]).shape == (0,)


def test_ranking_orders_standardises_and_cuts() -> None:
    distiller = RankingDistiller(gate=100, batch_size=64, lr=1e-3)
    labelled = captions(300, 0)
    names, rng = list(labelled), np.random.default_rng(0)
    pairs = {}
    for i, j in rng.integers(0, len(names), (600, 2)):
        first, second = labelled[names[i]], labelled[names[j]]
        pairs[names[i], names[j]] = 0.5 if first == second else float(first > second)
    distiller.update(pairs)
    losses = [distiller.learn() for _ in range(150)]
    assert losses[-1] is not None
    fresh = captions(200, 1)
    rewards = distiller.reward(list(fresh))
    good = np.array(list(fresh.values())) == 1
    assert rewards[good].mean() > rewards[~good].mean() + 1
    assert (rewards[~good] == 0).mean() > 0.8, "scores half a deviation below the mean count as nothing"
    assert rewards.min() >= -0.5
    with pytest.raises(UsageError, match="between 0 and 1"):
        distiller.update({("a", "b"): 2.0})


def test_labels_that_come_late_count_for_what_is_recorded() -> None:
    recorded = ["found the key", "hit a wall", "found the key"]
    counts = np.array([1, 1, 2])
    distiller = RetrievalDistiller()
    with ThreadedAnnotator(
        lambda batch: ["FOO" if "key" in caption else "BAR" for caption in batch]
    ) as judge:
        before = combined_rewards(np.zeros(3), distiller.reward(recorded), counts)
        judge.submit(distiller.unlabelled(recorded))
        labels: dict[str, int] = {}
        wait(lambda: labels.update(judge.poll()) or len(labels) == 2)
    distiller.update(labels)
    after = combined_rewards(np.zeros(3), distiller.reward(recorded), counts)
    np.testing.assert_array_equal(before, 0)
    np.testing.assert_allclose(after, [0.4, 0, 0.05])
