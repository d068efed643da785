"""Names the part of a model whose output is infinite or no number, once its logits are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vkvx.format import BASELINE_BITS
from vkvx.runtime.backends.base import Backend
from vkvx.runtime.cache import PackedCache

OVERFLOW = "numbers leave the range of float16: export the model again with --dtype bfloat16 or float32"


def explain(backend: Backend, slot: int, embeds: Sequence[Any], picture_lengths: Sequence[int]) -> str:
    """What comes first of a slot's pictures and its caches that is not finite, and what helps.

    ``embeds`` [tokens, width] are those of the call's pictures. Looks at all that the slot holds, so it is for calls
    that have failed.
    """
    picture = _first_picture(embeds, picture_lengths)
    layer = None if picture else _first_layer(backend.cache, slot)
    if picture:
        part = f"what the vision tower gives for picture {picture}"
    elif layer is not None:
        part = f"what decoder layer {layer} puts into the cache"
    elif backend.manifest.quantization.text_bits == BASELINE_BITS:
        part = "what follows the last cache"
    else:
        part = "what the decoder makes of the text, whose rows of 8 bits do not tell the layer"
    helps = OVERFLOW if backend.manifest.model.dtype == "float16" else "compare bundle and model with `vkvx validate`"
    return f"the first that is not finite is {part}; {helps}"


def _first_picture(embeds: Sequence[Any], lengths: Sequence[int]) -> int | None:
    """Number of the first picture, from 1, that has embeddings that are not finite."""
    rows = [np.isfinite(np.asarray(one, np.float32)).all(-1) for one in embeds]
    bad = np.flatnonzero(~np.concatenate(rows)) if rows else np.empty(0, int)
    return int(np.searchsorted(np.cumsum(lengths), bad[0], side="right")) + 1 if bad.size else None


def _first_layer(cache: PackedCache, slot: int) -> int | None:
    groups, rows = cache.group_count(slot), int(cache.text_count[slot])
    used = {"text_key": rows, "text_value": rows, "visual_key_params": groups, "visual_value_params": groups}
    for name in cache.buffers:  # in the order of the layers
        layer, _, kind = name.partition(".")
        values = cache.read(name, slot)
        if values.dtype == np.int32:
            continue  # codes, which are always finite
        values = values[:, : used[kind]] if kind in used else values
        if not np.isfinite(np.asarray(values, np.float32)).all():
            return int(layer)
    return None
