"""What backends that choose tokens by ``vkvx_sample`` share: options on their way there, results on their way back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vkvx.plugins.library import SampleRow
from vkvx.runtime.backends.base import SampledRow

OPTIONS = np.dtype(SampleRow)
CALLS = 3
"""Calls that may be under way at a time, and one that is being prepared: each has pinned memory of its own."""


def write_options(target: np.ndarray, rows: Sequence[SampledRow]) -> None:
    """Write the options of a call's rows into memory for ``OPTIONS`` [at least B]."""
    for name in OPTIONS.names or ():
        target[name][: len(rows)] = [getattr(row, name) for row in rows]


def read_results(results: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens INT32 [B] and log-probabilities FP32 [B], from INT32 [2, B] as the device wrote them."""
    tokens, probabilities = results
    return tokens, probabilities.view(np.float32)
