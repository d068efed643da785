"""Decode steps on a GPU as CUDA graphs: one for each number of rows, captured when it is first needed.

A step costs two copies to the device, one launch, and one copy back, of the tokens that were chosen within the graph;
nothing is waited for. For that all integers of a step, the counts included, lie in one array: counts are the host's,
where slots are emptied, forked and cut. Steps that give logits are graphs of their own.
"""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vkvx.format import STATE_NAMES
from vkvx.manifest import ModelInfo
from vkvx.models.graph.decoder import DecoderGraph
from vkvx.runtime.backends.torch.sampling import TokenSampler, Uploads
from vkvx.runtime.cache import PackedCache
from vkvx.runtime.calls import Call


class DecodeSteps:
    """Runs calls of one text token per row over the buffers of one cache, on one stream.

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
        self._run_decoder: Callable[..., tuple[Tensor, ...]] = decoder
        self._is_compiled = False
        named = zip(cache.buffers, buffers, strict=True)
        self._states = [buffer for name, buffer in named if name.endswith(STATE_NAMES)]
        slots, device = cache.slots, stream.device
        self._rows = model.position_rows
        self._windows = 2 if model.sliding_window else 0
        shapes = ((2 + self._rows + self._windows, slots), (slots, cache.groups), (slots,))
        sizes = [math.prod(shape) for shape in shapes]
        self._ints = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self._uploads = Uploads(self._ints)

        def parts(ints: Tensor) -> list[Tensor]:
            return [part.view(shape) for part, shape in zip(ints.split(sizes), shapes, strict=True)]

        self._parts = parts(self._ints)
        self._host_parts = [[part.numpy() for part in parts(pinned)] for pinned, _ in self._uploads.sources]
        self._zeros = torch.zeros(slots, 1, dtype=torch.int32, device=device)
        self._no_picture = torch.zeros(slots, 0, dtype=torch.int32, device=device)
        self._no_embeds = torch.zeros(slots, 0, model.embed_width, dtype=getattr(torch, model.dtype), device=device)
        self._logits = torch.zeros(slots, model.vocab_size, dtype=torch.float32, device=device)
        self._pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        """The graphs captured so far that choose tokens, by number of rows."""
        self.logits_graphs: dict[int, torch.cuda.CUDAGraph] = {}
        """Those that give logits."""

    def compile(self) -> None:
        """Compile the decoder at the first step of each number of rows from now on."""
        if self._is_compiled:
            return
        if (reason := _no_compiler()) is not None:
            warnings.warn(f"decode steps run as they are, without torch.compile: {reason}", stacklevel=2)
            return
        self._run_decoder = torch.compile(self._decoder, dynamic=False)
        self._is_compiled = True
        self.graphs.clear()
        self.logits_graphs.clear()

    @staticmethod
    def takes(call: Call) -> bool:
        """Whether every row feeds one text token."""
        return call.input_ids.shape[1] == 1 and not call.visual_index.shape[1] and bool((call.slot >= 0).all())

    def logits(self, call: Call) -> np.ndarray:
        """Logits FP32 [B, V] of a call; waits for them."""
        rows = self._send(call)
        if rows not in self.logits_graphs:
            self.logits_graphs[rows] = self._capture(rows, sampled=False)
        self.logits_graphs[rows].replay()
        return self._logits[:rows].cpu().numpy()

    def launch(self, call: Call) -> None:
        """Run a call and choose tokens; -1 in its input is the token chosen last in the row's slot."""
        rows = self._send(call)
        if rows not in self.graphs:
            self.graphs[rows] = self._capture(rows, sampled=True)
        self.graphs[rows].replay()

    def _send(self, call: Call) -> int:
        rows = len(call.slot)
        inputs, visual_count, text_count = self._host_parts[self._uploads.begin()]
        inputs[0, :rows], inputs[1, :rows] = call.input_ids[:, 0], call.slot
        inputs[2 : 2 + self._rows, :rows] = call.position_ids.reshape(rows, -1).T
        if call.window_start is not None:
            inputs[2 + self._rows :, :rows] = call.window_start[:, :, 0].T
        visual_count[...], text_count[...] = self._cache.visual_count, self._cache.text_count
        self._uploads.send()
        return rows

    def _capture(self, rows: int, *, sampled: bool) -> torch.cuda.CUDAGraph:
        """The graph of a step; the step itself is done when it is replayed."""
        # Loads kernels and allocates workspaces, which must not happen within a capture. What it stores in the caches
        # lies past the counts, and the step will store the same there; but states of linear attention move on.
        before = [state.clone() for state in self._states]
        self._warm_up(rows)
        for state, old in zip(self._states, before, strict=True):
            state.copy_(old)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            logits = self._forward(rows)
            if sampled:
                self._sampler.choose(logits, self._parts[0][1, :rows])
            else:
                self._logits[:rows].copy_(logits)
        return graph

    def _warm_up(self, rows: int) -> None:
        if not self._is_compiled:
            self._forward(rows)
            return
        limits: Any = {"recompile_limit": self._cache.slots + 1, "accumulated_recompile_limit": 4096}
        try:
            with torch._dynamo.config.patch(**limits):
                self._forward(rows)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"decode steps run as they are, torch.compile fails: {reason}", stacklevel=2)
            self._run_decoder, self._is_compiled = self._decoder, False
            self._forward(rows)

    def _forward(self, rows: int) -> Tensor:
        inputs, visual_count, text_count = self._parts
        ids, slot, *others = inputs[:, :rows]
        ids = torch.where(ids < 0, self._sampler.last_token[slot], ids)
        positions, starts = others[: self._rows], others[self._rows :]
        position_ids = positions[0] if self._rows == 1 else torch.stack(positions, 1)
        windows = [torch.stack(starts, 1).unsqueeze(-1)] if starts else []
        by_row = [
            *(ids.unsqueeze(1), position_ids.unsqueeze(-1)),
            *(self._no_embeds[:rows], self._no_picture[:rows], self._zeros[:rows], self._zeros[:rows, 0], slot),
        ]
        logits, *_ = self._run_decoder(*by_row, visual_count, text_count, *windows, *self._buffers)
        return logits


def _no_compiler() -> str | None:
    """What torch.compile lacks on this machine, None if nothing."""
    if find_spec("triton") is None:
        return "the Python package 'triton' is missing"
    compilers = [os.environ.get("CC") or "", "gcc", "clang", "cc"]
    return None if any(map(shutil.which, filter(None, compilers))) else "there is no C compiler (gcc or clang, or CC)"
