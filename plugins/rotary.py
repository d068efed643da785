"""Which channels a rotary embedding turns together."""

from __future__ import annotations

import numpy as np


def rotary_pairs(head_dim: int, rotary_dim: int, interleaved: bool) -> tuple[np.ndarray, np.ndarray]:
    """For each channel the one it is turned with, INT64 [D], and the sign of that one's part, FP32 [D].

    The first ``rotary_dim`` channels (0: all) are turned, as pairs of halves, or of neighbours if ``interleaved``. The
    others are their own partners; they have cosine 1 and sine 0.
    """
    channel = np.arange(head_dim)
    turned = rotary_dim or head_dim
    if interleaved:
        partner, first = channel ^ 1, channel % 2 == 0
    else:
        first = channel < turned // 2
        partner = np.where(first, channel + turned // 2, channel - turned // 2)
    partner = np.where(channel < turned, partner, channel)
    return partner, np.where(first, -1.0, 1.0).astype(np.float32)
