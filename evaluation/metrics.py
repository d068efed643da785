"""Scores of answers: one number a sample, the higher the better, 0 to 1 (CIDEr-D: 0 to 10).

Answers may differ in more than one way from what is right, so a sample has several right answers; the score is the best
over them, but for CIDEr-D, which is a mean over them by definition, and that of VQA, which counts them.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from vkvx.evaluation.mmmu import mmmu
from vkvx.models.tiny_llava.data import right_digits
from vkvx.packages import missing

ANLS_THRESHOLD = 0.5
_VQA_MARKS = ';/[]"{}()=+\\_-><@`!'
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
_NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_PUNCTUATION = str.maketrans("", "", string.punctuation)
Scorer = Callable[[Sequence[str], Sequence[Sequence[str]]], np.ndarray]
"""From n given texts and the right answers of each to n scores, float64."""
ChoiceScorer = Callable[[Sequence[Sequence[str]], Sequence[str], Sequence[Sequence[str]]], np.ndarray]
"""The same, with the choices of each question in front: none if it is open."""


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


def relaxed(given: str, answer: str) -> float:
    """1 if a number is within 5 % of the right one, or a text is the same in any case.

    As in ChartQA (arXiv 2203.10244). ``12%`` is the number 0.12. Numbers are not compared with a right answer of 0,
    texts are.
    """
    number, right = _number(given.strip()), _number(answer)
    if number is not None and right:
        return float(abs(number - right) <= 0.05 * abs(right))
    return float(given.strip().lower() == answer.lower())


def contains(given: str, answer: str) -> float:
    """1 if the answer stands in the given text, in any case; as in OCRBench (arXiv 2305.07895)."""
    return float(_line(answer.lower()) in _line(given.lower()))


def contains_formula(given: str, answer: str) -> float:
    """The same without spaces and with case, which OCRBench wants of formulas."""
    return float(_line(answer).replace(" ", "") in _line(given).replace(" ", ""))


def vqa(given: str, answers: Sequence[str]) -> float:
    """Accuracy of VQA (arXiv 1505.00468) and TextVQA: 1 if three people gave that answer, mean over leaving one out.

    Texts are normalised as there: lower case, no punctuation, no articles, digits for the words of numbers. Apostrophes
    are dropped, where its list of contractions would put them in.
    """
    text, listed = _vqa_text(given), [_vqa_text(answer) for answer in answers]
    same = listed.count(text)
    others = [same - (answer == text) for answer in listed]
    return sum(min(1.0, count / 3) for count in others) / len(listed)


def _vqa_text(text: str) -> str:
    text = " ".join(text.lower().replace(",", "").replace("?", "").split())
    kept = text
    for mark in _VQA_MARKS:
        text = text.replace(mark, "" if f"{mark} " in kept or f" {mark}" in kept else " ")
    text = re.sub(r"\.(?!\d)", "", text).replace("'", "")
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _number(text: str) -> float | None:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _line(text: str) -> str:
    return text.strip().replace("\n", " ")


def _page_exact(given: str, answer: str) -> float:
    return float(given.strip() == answer)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _best(score: Callable[[str, str], float]) -> Scorer:
    def scorer(given: Sequence[str], answers: Sequence[Sequence[str]]) -> np.ndarray:
        best = [max(score(text, answer) for answer in listed) for text, listed in zip(given, answers, strict=True)]
        return np.array(best, np.float64)

    return scorer


def _each(score: Callable[[str, Sequence[str]], float]) -> Scorer:
    def scorer(given: Sequence[str], answers: Sequence[Sequence[str]]) -> np.ndarray:
        return np.array([score(text, listed) for text, listed in zip(given, answers, strict=True)], np.float64)

    return scorer


def _of_choices(score: Callable[[str, Sequence[str], Sequence[str]], float]) -> ChoiceScorer:
    def scorer(choices: Sequence[Sequence[str]], given: Sequence[str], answers: Sequence[Sequence[str]]) -> np.ndarray:
        rows = zip(given, answers, choices, strict=True)
        return np.array([score(text, listed, offered) for text, listed, offered in rows], np.float64)

    return scorer


DIGIT_METRICS: dict[str, Scorer] = {"per_digit": _best(right_digits), "exact": _best(_page_exact)}
"""Share of right digits, and whether the whole page is right."""
METRIC_MODULES = {"anls": "rapidfuzz", "cider": "pycocoevalcap"}
"""What some metrics need besides NumPy."""
TEXT_METRICS: dict[str, Scorer] = {
    "exact": _best(exact),
    "anls": _best(anls),
    "f1": _best(f1),
    "cider": cider,
    "vqa": _each(vqa),
    "relaxed": _best(relaxed),
    "contains": _best(contains),
    "contains-formula": _best(contains_formula),
}
CHOICE_METRICS: dict[str, ChoiceScorer] = {"mmmu": _of_choices(mmmu)}
