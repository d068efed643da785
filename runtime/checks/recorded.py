"""What the reference computes in a call: keys and values of pictures before they are packed, and the size of scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vkvx.plugins.reference.shaping import rotate
from vkvx.runtime.backends.torch.backend import TorchBackend
from vkvx.runtime.calls import Call


@dataclass
class Recorded:
    """Of one call with one row.

    ``tokens`` are each group's tokens, as indices INT [n] of the visual tokens of the call; ``first`` is which group of
    the slot is the first of them, and ``first_row`` the text row of the first text token. ``scores`` is the root mean
    square of the scores among the tokens of the call, in the layer where it is largest.
    """

    first: int
    first_row: int
    tokens: list[np.ndarray]
    scores: float = 0.0
    _layers: dict[int, dict[str, tuple[Any, Any]]] = field(default_factory=dict)
    _text: dict[int, dict[str, Any]] = field(default_factory=dict)

    def layer(self, layer: int, kind: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Keys or values of the visual tokens, FP32 [Hkv, tokens, D], and their metric [Hkv, D, D] if there is one."""
        x, metric = self._layers[layer][kind]
        return x.float().numpy(), None if metric is None else metric.numpy()

    def text(self, layer: int, kind: str) -> np.ndarray:
        """Keys or values of the text tokens, FP32 [Hkv, tokens, D]."""
        return self._text[layer][kind].float().numpy()

    def keep_text(self, layer: int, key: Any, value: Any) -> None:
        """Note keys and values of the text tokens: tensors on the CPU in the model's dtype."""
        self._text[layer] = {"key": key, "value": value}

    def keep(self, layer: int, *kinds: tuple[Any, Any]) -> None:
        """Note keys with their metric, and values with theirs: tensors on the CPU in the model's dtype."""
        self._layers[layer] = dict(zip(("key", "value"), kinds, strict=True))


@contextmanager
def recorded(backend: TorchBackend, call: Call, first: int, first_row: int) -> Iterator[Recorded]:
    """Records the one call that is run within; the slot has ``first`` groups and ``first_row`` text rows before."""
    layers = backend.manifest.model.layers
    groups = call.visual_index[0].reshape(-1, backend.manifest.quantization.group_size)
    ends = np.cumsum((groups >= 0).sum(1))
    tokens = [np.arange(end - n, end) for end, n in zip(ends, (groups >= 0).sum(1), strict=True)]
    found = Recorded(first, first_row, tokens)
    visual = groups[groups >= 0].tolist()
    text = call.text_index[0][call.text_index[0] >= 0].tolist()

    def record(layer: int, query: Any, key: Any, value: Any, metrics: Sequence[Any]) -> None:
        info = layers[layer]
        found.scores = max(found.scores, info.scale * _score_size(query[0].float(), key[0].float()))
        if info.keys_of is not None:
            return
        ways: tuple[Any, Any] = (None, None)
        if metrics:
            key_metric, value_metric, rotation = metrics
            cosine, sine = rotation[0].unsqueeze(1).unbind(0)  # [1, D] each
            turned = rotate(key_metric, cosine, sine, info.rotary_dim, info.rotary_interleaved)
            ways = (turned.cpu(), value_metric.float().cpu())
        x = (tensor[0, :, visual].cpu() for tensor in (key, value))
        found.keep(layer, *zip(x, ways, strict=True))
        found.keep_text(layer, *(tensor[0, :, text].cpu() for tensor in (key, value)))

    backend.observe(record)
    try:
        yield found
    finally:
        backend.observe(None)


def _score_size(query: Any, key: Any) -> float:
    """Root mean square of query . key over each token and those up to it: query [Hq, S, D], key [Hkv, S, D]."""
    heads = query.unflatten(0, (len(key), -1))
    total = sum(float((q @ k.T).tril().square().sum()) for k, group in zip(key, heads, strict=True) for q in group)
    tokens = query.shape[1]
    return float(np.sqrt(total / (len(query) * tokens * (tokens + 1) / 2)))
