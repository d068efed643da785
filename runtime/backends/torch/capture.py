"""Decode steps on a GPU as CUDA graphs: one for each number of rows and of positions, captured when first needed.

A step costs two copies to the device, one launch, and one copy back, of the tokens that were chosen within the graph;
nothing is waited for. For that all integers of a step, the counts included, lie in one array: counts are the host's,
where slots are emptied, forked and cut. Steps that give logits are graphs of their own.

Most steps feed a token in every row. Those of up to eight text tokens in a row are captured, too: guesses that are
checked, and short turns of a conversation.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vkvx.format import STATE_NAMES
from vkvx.manifest import ModelInfo
from vkvx.models.graph.decoder import DecoderGraph
from vkvx.runtime.backends.torch.fused import POSITIONS, no_compiler
from vkvx.runtime.backends.torch.sampling import TokenSampler, Uploads
from vkvx.runtime.cache import PackedCache
from vkvx.runtime.calls import Call

MOST_LONGER = 64
"""Graphs of more than one position that are kept; those used last."""


class Size(NamedTuple):
    """What graphs are told apart by; ``sampled`` ones choose tokens, others give logits."""

    rows: int
    positions: int
    sampled: bool


class _Inputs:
    """The integers of calls of so many positions, on the device and on their way to it."""

    def __init__(self, positions: int, cache: PackedCache, model: ModelInfo, device: torch.device) -> None:
        self._rows = model.position_rows
        slots, windows = cache.slots, 2 if model.sliding_window else 0
        by_row = {
            "slot": (slots,),
            "last_index": (slots,),
            "input_ids": (slots, positions),
            "text_index": (slots, positions),
            "position_ids": (self._rows, slots, positions),
            "window_start": (windows, slots, positions),
        }
        counts = {"visual_count": (slots, cache.groups), "text_count": (slots,)}
        self._shapes = by_row | counts
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        ints = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self._sizes, self._uploads = sizes, Uploads(ints)
        self._parts = self._split(ints)
        self._host_parts = [
            {name: part.numpy() for name, part in self._split(pinned).items()} for pinned, _ in self._uploads.sources
        ]

    def _split(self, ints: Tensor) -> dict[str, Tensor]:
        parts = zip(self._shapes.items(), ints.split(self._sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}

    def send(self, call: Call, cache: PackedCache) -> None:
        """Copy a call and the counts of ``cache`` to the device."""
        rows, host = len(call.slot), self._host_parts[self._uploads.begin()]
        for name in ("slot", "last_index", "input_ids", "text_index"):
            host[name][:rows] = getattr(call, name)
        host["position_ids"][:, :rows] = call.position_ids.reshape(rows, self._rows, -1).swapaxes(0, 1)
        if call.window_start is not None:
            host["window_start"][:, :rows] = call.window_start.swapaxes(0, 1)
        host["visual_count"][...], host["text_count"][...] = cache.visual_count, cache.text_count
        self._uploads.send()

    def of(self, rows: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Token ids [rows, S], slots [rows], and the other inputs of the decoder by name, on the device."""
        parts = {name: part[:rows] for name, part in self._parts.items() if part.dim() < 3 and "count" not in name}
        positions = self._parts["position_ids"][:, :rows]
        others = {
            "position_ids": positions[0] if self._rows == 1 else positions.transpose(0, 1),
            "text_index": parts["text_index"],
            "last_index": parts["last_index"],
            "visual_count": self._parts["visual_count"],
            "text_count": self._parts["text_count"],
        }
        if len(self._parts["window_start"]):
            others["window_start"] = self._parts["window_start"][:, :rows].transpose(0, 1).contiguous()
        return parts["input_ids"], parts["slot"], others


class DecodeSteps:
    """Runs calls of a few text tokens per row over the buffers of one cache, on one stream.

    What a graph reads and writes is allocated here, for as many rows as the cache has slots. Call its methods with
    ``stream`` as the current one, and without gradients.
    """

    def __init__(
        self,
        decoder: DecoderGraph,
        buffers: Sequence[Tensor],
        cache: PackedCache,
        model: ModelInfo,
        stream: torch.cuda.Stream,
        sampler: TokenSampler,
    ) -> None:
        self._sampler = sampler
        self._decoder, self._buffers, self._cache, self._stream = decoder, buffers, cache, stream
        self._model = model
        self._run_decoder: Callable[..., tuple[Tensor, ...]] = decoder
        self._is_compiled = False
        named = zip(cache.buffers, buffers, strict=True)
        self._states = [buffer for name, buffer in named if name.endswith(STATE_NAMES)]
        slots, device = cache.slots, stream.device
        self._inputs = {1: _Inputs(1, cache, model, device)}
        """By number of positions."""
        self._no_picture = torch.zeros(slots, 0, dtype=torch.int32, device=device)
        self._no_embeds = torch.zeros(slots, 0, model.embed_width, dtype=getattr(torch, model.dtype), device=device)
        self._logits: Tensor | None = None  # sessions whose tokens are chosen on the GPU do without
        self._pool = torch.cuda.graph_pool_handle()
        self.graphs: OrderedDict[Size, torch.cuda.CUDAGraph] = OrderedDict()
        """The graphs captured so far, the one used last at the end."""

    def compile(self) -> None:
        """Compile the decoder at the first step of each number of rows from now on."""
        if self._is_compiled:
            return
        if (reason := no_compiler()) is not None:
            warnings.warn(f"decode steps run as they are, without torch.compile: {reason}", stacklevel=2)
            return
        self._run_decoder = torch.compile(self._decoder, dynamic=False)
        self._is_compiled = True
        self.graphs.clear()

    def takes(self, call: Call) -> bool:
        """Whether calls of its size are captured."""
        # Linear attention runs over several positions in another way, which waits for the device.
        return is_step(call, 1 if self._states else POSITIONS)

    def logits(self, call: Call) -> np.ndarray:
        """Logits FP32 [B, V] of a call; waits for them."""
        self._replay(call, sampled=False)
        assert self._logits is not None
        return self._logits[: len(call.slot)].cpu().numpy()

    def launch(self, call: Call) -> None:
        """Run a call and choose tokens; -1 in its input is the token chosen last in the row's slot."""
        self._replay(call, sampled=True)

    def _replay(self, call: Call, *, sampled: bool) -> None:
        rows, positions = call.input_ids.shape
        size = Size(rows, positions, sampled)
        if size.positions not in self._inputs:
            self._inputs[size.positions] = _Inputs(size.positions, self._cache, self._model, self._stream.device)
        self._inputs[size.positions].send(call, self._cache)
        if size not in self.graphs:
            self.graphs[size] = self._capture(size)
            longer = [one for one in self.graphs if one.positions > 1]
            if len(longer) > MOST_LONGER:
                del self.graphs[longer[0]]
        self.graphs.move_to_end(size)
        self.graphs[size].replay()

    def _capture(self, size: Size) -> torch.cuda.CUDAGraph:
        """The graph of a step; the step itself is done when it is replayed."""
        # Loads kernels and allocates workspaces, which must not happen within a capture. What it stores in the caches
        # lies past the counts, and the step will store the same there; but states of linear attention move on.
        before = [state.clone() for state in self._states]
        self._warm_up(size)
        if self._logits is None and not size.sampled:
            shape = (self._cache.slots, self._model.vocab_size)
            self._logits = torch.zeros(shape, dtype=torch.float32, device=self._stream.device)
        for state, old in zip(self._states, before, strict=True):
            state.copy_(old)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            slot, logits = self._forward(size)
            if size.sampled:
                self._sampler.choose(logits, slot)
            elif self._logits is not None:
                self._logits[: size.rows].copy_(logits)
        return graph

    def _warm_up(self, size: Size) -> None:
        if not self._is_compiled:
            self._forward(size)
            return
        limits: Any = {"recompile_limit": self._cache.slots + 1, "accumulated_recompile_limit": 4096}
        try:
            with torch._dynamo.config.patch(**limits):
                self._forward(size)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"decode steps run as they are, torch.compile fails: {reason}", stacklevel=2)
            self._run_decoder, self._is_compiled = self._decoder, False
            self._forward(size)

    def _forward(self, size: Size) -> tuple[Tensor, Tensor]:
        """Slots [rows] and logits [rows, V]."""
        rows = size.rows
        ids, slot, others = self._inputs[size.positions].of(rows)
        ids = torch.where(ids < 0, self._sampler.last_token[slot].unsqueeze(1), ids)
        # Steps of several positions are too many sizes to compile.
        run = self._run_decoder if size.positions == 1 else self._decoder
        by_row = (self._no_embeds[:rows], self._no_picture[:rows], others["text_index"], others["last_index"], slot)
        counts = (others["visual_count"], others["text_count"])
        windows = [others["window_start"]] if "window_start" in others else []
        logits, *_ = run(ids, others["position_ids"], *by_row, *counts, *windows, *self._buffers)
        return slot, logits


def is_step(call: Call, most: int = POSITIONS) -> bool:
    """Whether every row feeds text, and no more than ``most`` tokens."""
    return call.input_ids.shape[1] <= most and not call.visual_index.shape[1] and bool((call.slot >= 0).all())
