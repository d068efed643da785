"""Scores by hand, and intervals on data whose spread is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vkvx.evaluation.metrics import DIGIT_METRICS, TEXT_METRICS, anls, exact, f1, normalise
from vkvx.evaluation.statistics import Estimate, estimate


@pytest.mark.parametrize(
    ("text", "expected"),
    [("The  Cat, sat!", "cat sat"), ("An apple a day", "apple day"), ("theatre", "theatre"), ("", "")],
)
def test_normalisation(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_exact() -> None:
    assert exact("The cat.", "cat") == 1
    assert exact("cats", "cat") == 0


@pytest.mark.parametrize(
    ("given", "answer", "score"),
    [
        ("a red cat", "the cat", 2 / 3),  # precision 1/2, recall 1
        ("cat cat dog", "cat dog dog", 2 / 3),  # words count as often as they occur
        ("dog", "cat", 0),
        ("", "cat", 0),
        ("the", "", 1),
    ],
)
def test_f1(given: str, answer: str, score: float) -> None:
    assert f1(given, answer) == pytest.approx(score)


@pytest.mark.parametrize(
    ("given", "answer", "score"),
    [
        ("Hello", "hello", 1),
        ("helo", "hello", 0.8),
        ("abcd", "abxy", 0),
        ("abcde", "abcxy", 0.6),
        ("", "", 1),
        ("", "a", 0),
    ],
)
def test_anls(given: str, answer: str, score: float) -> None:
    """At a distance of one half the score is 0."""
    assert anls(given, answer) == pytest.approx(score)


@pytest.mark.parametrize("name", ["exact", "f1", "anls"])
def test_the_best_answer_counts(name: str) -> None:
    assert TEXT_METRICS[name](["cat", "bird"], [["dog", "cat"], ["x"]]).tolist() == [1, 0]


def test_cider_by_hand() -> None:
    """Texts of two words have 1-grams and a 2-gram, none of which both samples share: cosines 1, 1, 0, 0."""
    scores = TEXT_METRICS["cider"](["red cat", "blue bird"], [["a red cat"], ["green frog"]])
    assert scores == pytest.approx([10 * 2 / 4, 0])
    # Half of the words: dot (ln 2)^2 over norms of sqrt(2) ln 2 each; the answers' mean, not the best, counts.
    scores = TEXT_METRICS["cider"](["red cat", "x"], [["red dog", "red cat"], ["green frog"]])
    assert scores[0] == pytest.approx(10 * ((0.5 + 0) / 4 + 2 / 4) / 2)


def test_cider_of_one_sample_is_zero() -> None:
    assert TEXT_METRICS["cider"](["red cat"], [["red cat"]]).tolist() == [0]


def test_digits() -> None:
    truth = "123\n456"
    given = [" 123\n456", "123\n455", "12\n456", ""]
    right = [[truth]] * 4
    assert DIGIT_METRICS["per_digit"](given, right) == pytest.approx([1, 5 / 6, 5 / 6, 0])
    assert DIGIT_METRICS["exact"](given, right).tolist() == [1, 0, 0, 0]


def test_width_of_an_interval() -> None:
    """Near the normal approximation, 1.96 standard errors to either side."""
    scores = np.random.default_rng(1).normal(3, 2, 400)
    found = estimate(scores)
    half = 1.96 * scores.std() / math.sqrt(400)
    assert found.mean == pytest.approx(scores.mean())
    assert found.mean - found.low == pytest.approx(half, rel=0.1)
    assert found.high - found.mean == pytest.approx(half, rel=0.1)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        found = estimate(rng.random(100) < 0.7)
        held += found.low <= 0.7 <= found.high
    assert 0.9 <= held / 200 <= 0.985


def test_paired_differences_are_sharper_than_scores() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(0, 5, 300)
    other = base + rng.normal(0.5, 0.1, 300)
    found = estimate(other - base)
    assert 0.45 < found.low < 0.5 < found.high < 0.55
    assert found == estimate(other - base)  # the same seed in each call


def test_equal_scores_have_no_width_and_one_score_no_interval() -> None:
    found = estimate(np.full(7, 0.1))
    assert found.low <= found.mean <= found.high < found.low + 1e-12
    assert found.mean == pytest.approx(0.1)
    assert estimate(np.array([0.3])) == Estimate(0.3, None, None)
