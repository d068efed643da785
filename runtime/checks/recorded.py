"""The keys and values of pictures, as the reference computes them before they are quantised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vkvx.runtime.backends.torch.backend import TorchBackend
from vkvx.runtime.calls import Call


@dataclass
class Recorded:
    """Of one call with one row. ``layers`` has keys and values FP32 [Hkv, S, D] and their metrics [Hkv, D, D] or None.

    ``tokens`` are the positions of each group's tokens in the call, ``first`` which group of the slot is the first.
    """

    first: int
    tokens: list[np.ndarray]
    layers: dict[int, dict[str, tuple[np.ndarray, np.ndarray | None]]] = field(default_factory=dict)


@contextmanager
def recorded(backend: TorchBackend, call: Call, first: int) -> Iterator[Recorded]:
    """Records the one call that is run within; ``first`` is the number of groups that the slot has before."""
    size = backend.manifest.quantization.group_size
    groups = call.visual_index[0].reshape(-1, size)
    found = Recorded(first, [group[group >= 0] for group in groups])
    attention = backend.manifest.model

    def record(layer: int, key: Any, value: Any, metrics: Sequence[Any]) -> None:
        info = attention.layers[layer]
        if info.keys_of is not None:
            return
        ways: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
        if metrics:
            from vkvx.plugins.reference.shaping import rotate

            key_metric, value_metric, rotation = metrics
            cosine, sine = rotation[0].unsqueeze(1).unbind(0)  # [1, D] each
            turned = rotate(key_metric, cosine, sine, info.rotary_dim, info.rotary_interleaved)
            ways = (turned.cpu().numpy(), value_metric.float().cpu().numpy())
        x = (tensor[0].float().cpu().numpy() for tensor in (key, value))
        found.layers[layer] = dict(zip(("key", "value"), zip(x, ways, strict=True), strict=True))

    backend.observe(record)
    try:
        yield found
    finally:
        backend.observe(None)
