"""Where quantisation errs most: one channel of keys and one of values, with its levels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vkvx.plugins.reference import quantization

if TYPE_CHECKING:
    from vkvx.runtime.transformers.cache import PackedVisualCache

BINS = 40


def worst_channels(
    cache: PackedVisualCache, prompt: Mapping[int, tuple[Tensor, Tensor]], visual_index: Tensor, setting: str
) -> list[dict[str, Any]]:
    """The channel of keys and that of values with the largest RMS error, in the first and the last cache.

    ``cache`` holds a prompt under a packed setting, ``prompt`` the exact keys and values [B, Hkv, S, D] by layer,
    ``visual_index`` the positions of row 0's visual tokens, in whole groups that -1 fills up. Row 0 counts. Each entry
    has KV head, channel, edges and counts of a histogram of the exact elements of the group in which the channel errs
    most, and the levels that the codes stand for there.
    """
    q, caches = cache.layout.quantization, cache.layout.info.caches
    positions = visual_index.unflatten(0, (-1, q.group_size)).to(prompt[caches[0]][0].device)
    positions = positions[(positions >= 0).any(1)].long()  # rows of a batch have the groups of the fullest
    valid = positions >= 0
    found = []
    for number in dict.fromkeys((0, len(caches) - 1)):
        layer = caches[number]
        buffers = cache.buffers(number, prompt[layer][0])
        for kind, exact in zip(("key", "value"), prompt[layer], strict=True):
            bits = (q.key_bits if kind == "key" else q.value_bits)[number]
            unpack = quantization.unpack_keys if kind == "key" else quantization.unpack_values
            params = buffers[f"visual_{kind}_params"][0].float()
            scale, offset = params[:, :, 0], params[:, :, 1]
            codes = unpack(buffers[f"visual_{kind}"][0]).unflatten(1, (-1, q.group_size))
            decoded = quantization.decode(codes, scale, offset)[:, : len(positions)]
            values = exact[0].float()[:, positions.clamp(min=0)]  # [Hkv, groups, entries, D]
            seen = valid[None, :, :, None]
            squares = torch.where(seen, (values - decoded).square(), 0.0).sum(2) / seen.sum(2).clamp(min=1)
            head, group, channel = np.unravel_index(int(squares.argmax()), squares.shape)
            chosen = values[head, group, valid[group], channel].cpu().numpy()
            counts, edges = np.histogram(chosen, BINS)
            low, step = float(offset[head, group, channel]), float(scale[head, group, channel])
            found.append(
                {
                    "setting": setting,
                    "layer": layer,
                    "head": int(head),
                    "kind": kind,
                    "channel": int(channel),
                    "edges": [float(edge) for edge in edges],
                    "counts": counts.tolist(),
                    "levels": [low + step * code for code in range(2**bits)],
                }
            )
    return found
