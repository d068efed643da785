"""Codes from packed words, in NumPy: what the reference quantisation does in torch, for machines without torch."""

from __future__ import annotations

import numpy as np


def unpack_keys(words: np.ndarray) -> np.ndarray:
    """Codes UINT8 [..., C, D] from ``visual_key`` INT32 [..., C/128, bits, 128, D/32]."""
    codes = _sum_planes(_bits(words), -3)
    return codes.reshape(*codes.shape[:-3], -1, codes.shape[-1])


def unpack_values(words: np.ndarray) -> np.ndarray:
    """Codes UINT8 [..., C, D] from ``visual_value`` INT32 [..., C/128, bits, D, 4]."""
    codes = _sum_planes(_bits(words), -3).swapaxes(-1, -2)
    return codes.reshape(*codes.shape[:-3], -1, codes.shape[-1])


def unpack_text(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys or values FP64 [..., N, D] and scales FP64 [..., N, 1] from text rows of 8 bits INT32 [..., N, D/4 + 1]."""
    little = np.ascontiguousarray(words.astype("<i4", copy=False))
    codes = np.ascontiguousarray(little[..., :-1]).view(np.int8).astype(np.float64)
    scale = np.ascontiguousarray(little[..., -1:]).view("<f2")[..., :1].astype(np.float64)
    return codes * scale, scale


def _bits(words: np.ndarray) -> np.ndarray:
    """The bits of the last axis, least significant first."""
    little = np.ascontiguousarray(words.astype("<i4", copy=False))
    return np.unpackbits(little.view(np.uint8), axis=-1, bitorder="little")


def _sum_planes(bits: np.ndarray, axis: int) -> np.ndarray:
    """Bit p of each code is that of plane p."""
    planes = np.moveaxis(bits, axis, 0)
    return sum((plane << p for p, plane in enumerate(planes)), np.zeros_like(planes[0]))
