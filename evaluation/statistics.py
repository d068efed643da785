"""Confidence intervals by the bootstrap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0
_CHUNK = 100


@dataclass(frozen=True)
class Estimate:
    """A mean over samples and the interval around it; one sample has none."""

    mean: float
    low: float | None
    high: float | None


def estimate(scores: np.ndarray) -> Estimate:
    """The mean of scores [n] with its 95 % interval.

    Percentile bootstrap: n samples are drawn with replacement 2000 times, with a fixed seed, and the interval is what
    lies between the 2.5 % and 97.5 % quantiles of the means. Every call draws the same samples, so for a paired
    difference give the differences sample by sample. Where all scores are equal the interval has no width: that is all
    the data say, not certainty. One score says nothing of others, so it has no interval.
    """
    scores = np.asarray(scores, np.float64)
    if len(scores) == 1:
        return Estimate(float(scores[0]), None, None)
    rng = np.random.default_rng(SEED)
    share = np.full(len(scores), 1 / len(scores))
    means = [rng.multinomial(len(scores), share, size=_CHUNK) @ scores for _ in range(RESAMPLES // _CHUNK)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means) / len(scores), (tail, 1 - tail))
    mean = float(scores.mean())
    # Rounding may put the mean of equal scores a hair outside.
    return Estimate(mean, min(mean, float(low)), max(mean, float(high)))
