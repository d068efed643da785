"""Scores of answers: one number a sample, the higher the better, 0 to 1 (CIDEr-D: 0 to 10).

Answers may differ in more than one way from what is right, so a sample has several right answers; the score is the best
over them, but for CIDEr-D, which is a mean over them by definition.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from vkvx.models.tiny_llava.data import right_digits
from vkvx.packages import missing

ANLS_THRESHOLD = 0.5
_PUNCTUATION = str.maketrans("", "", string.punctuation)
Scorer = Callable[[Sequence[str], Sequence[Sequence[str]]], np.ndarray]
"""From n given texts and the right answers of each to n scores, float64."""


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation and the articles a, an, the; one space between words.

    As in the evaluation of SQuAD (arXiv 1606.05250).
    """
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def exact(given: str, answer: str) -> float:
    """1 if both are the same once normalised, else 0."""
    return float(normalise(given) == normalise(answer))


def f1(given: str, answer: str) -> float:
    """Harmonic mean of precision and recall over the normalised words, each counted as often as it occurs (SQuAD)."""
    ours, theirs = normalise(given).split(), normalise(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def anls(given: str, answer: str) -> float:
    """1 less the edit distance over the longer length, in lower case; 0 where that distance is 0.5 or more.

    Average normalised Levenshtein similarity, as in DocVQA (arXiv 2007.00398).
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise missing("rapidfuzz", error) from error
    distance = Levenshtein.normalized_distance(_plain(given), _plain(answer))
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0


def cider(given: Sequence[str], answers: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr-D (arXiv 1411.5726) with its authors' code; words are those of :func:`normalise`.

    How rare a phrase is comes from the answers of all samples, so a score depends on which samples there are; of one
    sample alone it is 0. The usual tokeniser needs Java and is not used: figures differ somewhat from published ones.
    """
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise missing("pycocoevalcap", error) from error
    right = {i: [normalise(answer) for answer in listed] for i, listed in enumerate(answers)}
    _, scores = Cider().compute_score(right, {i: [normalise(text)] for i, text in enumerate(given)})
    return np.asarray(scores, np.float64)


def _page_exact(given: str, answer: str) -> float:
    return float(given.strip() == answer)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _best(score: Callable[[str, str], float]) -> Scorer:
    def scorer(given: Sequence[str], answers: Sequence[Sequence[str]]) -> np.ndarray:
        best = [max(score(text, answer) for answer in listed) for text, listed in zip(given, answers, strict=True)]
        return np.array(best, np.float64)

    return scorer


DIGIT_METRICS: dict[str, Scorer] = {"per_digit": _best(right_digits), "exact": _best(_page_exact)}
"""Share of right digits, and whether the whole page is right."""
METRIC_MODULES = {"anls": "rapidfuzz", "cider": "pycocoevalcap"}
"""What some metrics need besides NumPy."""
TEXT_METRICS: dict[str, Scorer] = {"exact": _best(exact), "anls": _best(anls), "f1": _best(f1), "cider": cider}
