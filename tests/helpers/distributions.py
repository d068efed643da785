"""Values of many distributions, for quantisers."""

from __future__ import annotations

import numpy as np

KINDS = (
    "normal",
    "uniform",
    "heavy_tails",
    "far_from_zero",
    "outlier_channels",
    "fp16_grid",
    "integers",
    "two_clusters",
    "sparse",
    "tiny",
    "huge",
    "one_outlier",
)
NO_CLAMP = tuple(kind for kind in KINDS if kind != "huge")  # there a 1-bit scale meets the largest FP16 number


def sample(kind: str, seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Values [..., n, D] float32 of one distribution."""
    rng = np.random.default_rng(seed)
    x: np.ndarray = rng.standard_normal(shape)
    if kind == "uniform":
        x = rng.uniform(-1, 1, shape)
    elif kind == "heavy_tails":
        x = np.clip(rng.standard_t(2, shape), -1e4, 1e4)
    elif kind == "far_from_zero":
        x = x + rng.choice([-40.0, 40.0, 900.0], (*shape[:-2], 1, shape[-1]))
    elif kind == "outlier_channels":
        x = x * np.exp(rng.standard_normal((*shape[:-2], 1, shape[-1])) * 2) + 3 * rng.standard_normal(shape[-1])
    elif kind == "fp16_grid":
        x = x.astype(np.float16)
    elif kind == "integers":
        x = rng.integers(-3, 4, shape)
    elif kind == "two_clusters":
        x = 0.1 * x + rng.choice([-1.0, 2.0], shape)
    elif kind == "sparse":
        x = np.where(rng.random(shape) < 0.9, 0.0, x)
    elif kind == "tiny":
        x = x * 1e-6
    elif kind == "huge":
        x = x * 2e4
    elif kind == "one_outlier":
        x[..., 0, :] = 500.0
    return np.asarray(x, np.float32)
