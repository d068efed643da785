"""Short prompts and pieces of long ones on a GPU as CUDA graphs: one for each of a few lengths, padded to it.

The host takes longer to launch the kernels of a short prefill one by one than a GPU takes to run them, and no decode
step can follow meanwhile. A replay is one launch. Each length has several graphs, of some layers each, between which
decode steps fit: so their rows wait for some layers, not for a prompt.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vkvx.format import TILE
from vkvx.manifest import ModelInfo
from vkvx.models.graph.decoder import DecoderGraph
from vkvx.runtime.backends.torch.sampling import Uploads
from vkvx.runtime.cache import PackedCache
from vkvx.runtime.calls import Call

GRAPHS = 8
"""The most lengths; they are multiples of a tile of the cache."""
PART = 256
"""A call of so many positions is launched in two parts, and in one more for each further so many."""


class Prefills:
    """Runs calls of one row and at most ``limit`` positions over the buffers of one cache, on one stream.

    Call its methods with ``stream`` as the current one, and without gradients.
    """

    def __init__(
        self,
        decoder: DecoderGraph,
        buffers: Sequence[Tensor],
        cache: PackedCache,
        model: ModelInfo,
        stream: torch.cuda.Stream,
        limit: int,
    ) -> None:
        self._decoder, self._buffers, self._cache, self._stream = decoder, buffers, cache, stream
        self._step = TILE * -(-limit // (TILE * GRAPHS))
        self.limit = limit
        most, device = -(-limit // self._step) * self._step, stream.device
        self._has_rotary, self._has_window = model.position_rows > 1, bool(model.sliding_window)
        rows = model.position_rows if self._has_rotary else 1
        self._shapes = {
            "input_ids": (most,),
            "position_ids": (rows, most),
            "visual_index": (self._entries(most),),
            "text_index": (most,),
            "last_index": (1,),
            "slot": (1,),
            "window_start": (2 if self._has_window else 0, most),
            "visual_count": cache.visual_count.shape,
            "text_count": cache.text_count.shape,
        }
        self._ints = torch.zeros(sum(map(math.prod, self._shapes.values())), dtype=torch.int32, device=device)
        self._uploads = Uploads(self._ints)
        self._device_parts = self._parts(self._ints)
        self._host_parts = [
            {name: part.numpy() for name, part in self._parts(pinned).items()} for pinned, _ in self._uploads.sources
        ]
        dtype = getattr(torch, model.dtype)
        self._embeds = torch.zeros(1, self._entries(most), model.embed_width, dtype=dtype, device=device)
        self.logits = torch.zeros(1, model.vocab_size, dtype=dtype, device=device)
        self._pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[int, list[torch.cuda.CUDAGraph]] = {}
        """The graphs captured so far, by length, in the order of their layers."""

    def takes(self, call: Call) -> bool:
        """Whether there is a graph for a call: it may have one group more than its positions fill."""
        rows, length = call.input_ids.shape
        if rows > 1 or length > self.limit or call.slot[0] < 0:
            return False
        return call.visual_index.shape[1] <= self._entries(self._padded(length))

    def run(self, call: Call, visual_embeds: Tensor | None) -> Tensor:
        """Logits [1, V] of a call on the device, in the type of the model, good until the next one."""
        for graph in self.start(call, visual_embeds):
            graph.replay()
        return self.logits

    def start(self, call: Call, visual_embeds: Tensor | None) -> list[torch.cuda.CUDAGraph]:
        """Bring a call to the device: the graphs to replay, after which ``logits`` are its logits."""
        if visual_embeds is not None:
            self._embeds[:, : visual_embeds.shape[1]].copy_(visual_embeds)
        self._send(call)
        length = self._padded(call.input_ids.shape[1])
        if length not in self.graphs:
            self.graphs[length] = self._capture(length)
        return self.graphs[length]

    def _padded(self, length: int) -> int:
        return -(-length // self._step) * self._step

    def _entries(self, length: int) -> int:
        size = self._cache.group_size
        return (-(-length // size) + 1) * size

    def _parts(self, ints: Tensor) -> dict[str, Tensor]:
        pieces = ints.split([math.prod(shape) for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), pieces, strict=True)}

    def _send(self, call: Call) -> None:
        parts, length = self._host_parts[self._uploads.begin()], call.input_ids.shape[1]
        padded = self._padded(length)
        parts["input_ids"][:length] = call.input_ids[0]
        positions = call.position_ids.reshape(-1, length)
        parts["position_ids"][:, :length] = positions
        parts["position_ids"][:, length:padded] = positions[:, -1:] + np.arange(1, padded - length + 1)  # they count on
        for name in ("visual_index", "text_index"):
            given = getattr(call, name)[0]
            parts[name][: len(given)], parts[name][len(given) :] = given, -1
        parts["last_index"][:], parts["slot"][:] = call.last_index, call.slot
        if call.window_start is not None:
            parts["window_start"][:, :length] = call.window_start[0]
            parts["window_start"][:, length:] = call.window_start[0, :, -1:]
        parts["visual_count"][...], parts["text_count"][...] = self._cache.visual_count, self._cache.text_count
        self._uploads.send()

    def _capture(self, length: int) -> list[torch.cuda.CUDAGraph]:
        """The graphs of a length; what the first run stores lies past the counts, and replays store the same."""
        self._forward(length)  # loads kernels and allocates workspaces, which must not happen within a capture
        torch.cuda.synchronize(self._stream.device)
        gc.collect()  # what is dead must not be freed within a capture either
        layers: Any = self._decoder.text_model.layers
        parts = min(len(layers), 1 + -(-length // PART))
        graphs = [torch.cuda.CUDAGraph()]

        def begin() -> None:
            graphs[-1].capture_begin(pool=self._pool, capture_error_mode="thread_local")

        def cut(*ignored: object) -> None:
            graphs[-1].capture_end()
            graphs.append(torch.cuda.CUDAGraph())
            begin()

        # What later layers need of earlier ones lives on while they are captured, so it keeps its place.
        hooks = [layers[number * len(layers) // parts - 1].register_forward_hook(cut) for number in range(1, parts)]
        begin()
        try:
            self.logits.copy_(self._forward(length))
        finally:
            for hook in hooks:
                hook.remove()
            graphs[-1].capture_end()
        return graphs

    def _forward(self, length: int) -> Tensor:
        parts = self._device_parts
        positions = parts["position_ids"][:, :length]
        windows = [parts["window_start"][:, :length].unsqueeze(0).contiguous()] if self._has_window else []
        entries = self._entries(length)
        (logits,) = self._decoder(
            parts["input_ids"][:length].unsqueeze(0),
            positions.unsqueeze(0) if self._has_rotary else positions,
            self._embeds[:, :entries],
            parts["visual_index"][:entries].unsqueeze(0),
            parts["text_index"][:length].unsqueeze(0),
            *(parts[name] for name in ("last_index", "slot", "visual_count", "text_count")),
            *windows,
            *self._buffers,
        )
        return logits
