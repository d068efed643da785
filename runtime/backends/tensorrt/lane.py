"""Runs the decoder engine for calls of one kind: their inputs in, the engine, what is wanted of its logits out.

One copy brings all integers of a call: its inputs, the counts, which are the host's, and how tokens are chosen. Nothing
is waited for but logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from vkvx.runtime.backends.base import SampledRow
from vkvx.runtime.backends.sampling import CALLS, OPTIONS, write_options
from vkvx.runtime.backends.tensorrt.call_plan import CallPlan, pack
from vkvx.runtime.backends.tensorrt.device import CapturedGraph, DeviceArray, PinnedMemory
from vkvx.runtime.backends.tensorrt.sampling import Frame, PendingTokens
from vkvx.runtime.cache import Shape
from vkvx.runtime.engines.manifest import DECODER

if TYPE_CHECKING:
    from vkvx.runtime.backends.tensorrt.backend import TensorRTBackend


class Lane:
    """A context of the decoder with what its calls read and write beside the caches.

    A ``captured`` lane is for calls of one shape: the second is captured as a CUDA graph, which then serves all; those
    that choose tokens and those that give logits have a graph each. (Before a capture TensorRT needs one run with the
    same shapes.) Each lane has a context of its own, because a graph may hold addresses inside its context.
    """

    def __init__(self, backend: TensorRTBackend, plan: CallPlan, *, captured: bool) -> None:
        self._backend, self._device, self._captured = backend, backend.gpu, captured
        self._context: Any = backend.engines.context(backend.engines.decoder, plan.profile.index, self._device)
        manifest = backend.engines.manifest
        names = {tensor.name for tensor in manifest.engine_tensors(DECODER, "input")}
        for name, array in backend.arrays.items():
            backend.bind(self._context, {name: array}, inputs=name in names)
        (self._logits_dtype,) = (t.dtype for t in manifest.engine_tensors(DECODER, "output") if t.name == "logits")
        self._places: dict[str, int] = {}
        self._inputs: DeviceArray | None = None
        self._frames: list[Frame] = []
        self._next = 0
        self._rows = 0
        self._host_logits: PinnedMemory | None = None
        self._ran: set[bool] = set()
        self.graphs: dict[bool, CapturedGraph] = {}
        """By whether they choose tokens."""

    def close(self) -> None:
        """Drop graphs, then the context; the device must be done."""
        self.graphs.clear()
        self._context = None

    def launch(self, plan: CallPlan, embeds: DeviceArray, rows: Sequence[SampledRow]) -> PendingTokens:
        """Queue a call and the choice of tokens."""
        frame = self._send(plan, embeds, rows)
        self._run(samples=True)
        return frame.receive(self._tokens, plan.rows)

    def logits(self, plan: CallPlan, embeds: DeviceArray) -> np.ndarray:
        """Logits FP32 [B, V] of a call; waits for them."""
        self._send(plan, embeds, ())
        self._run(samples=False)
        logits = self._logits
        if self._host_logits is None or self._host_logits.size < logits.nbytes:
            self._host_logits = PinnedMemory(self._device, logits.nbytes)
        self._device.copy(self._host_logits.address, logits.address, logits.nbytes // len(logits) * plan.rows)
        self._device.synchronize()
        shape = (plan.rows, *logits.shape[1:])
        return self._host_logits.view(0, logits.dtype, shape).astype(np.float32)

    def _send(self, plan: CallPlan, embeds: DeviceArray, rows: Sequence[SampledRow]) -> Frame:
        """Queue the way of a call's integers to the device, and bind them if this call has another shape."""
        options = (len(plan.call.slot), OPTIONS.itemsize // 4)
        shapes: dict[str, Shape] = {name: array.shape for name, array in plan.arrays.items()}
        places, size = pack(shapes | {"options": options})
        if not self._captured or not self._ran:
            self._prepare(plan, places, size, embeds)
        frame = self._frames[self._next]
        self._next = (self._next + 1) % CALLS
        frame.begin()
        for name, array in plan.arrays.items():
            frame.inputs.view(places[name], "int32", array.shape)[...] = array
        write_options(frame.inputs.view(places["options"], "int32", options).view(OPTIONS)[:, 0], rows)
        assert self._inputs is not None
        self._device.copy(self._inputs.address, frame.inputs.address, size)
        return frame

    def _prepare(self, plan: CallPlan, places: Mapping[str, int], size: int, embeds: DeviceArray) -> None:
        """Memory for a call of these shapes, bound to the context."""
        backend, device, rows = self._backend, self._device, len(plan.call.slot)
        held = 0 if self._inputs is None else self._inputs.nbytes
        if held < size or self._rows < rows:
            device.synchronize()  # copies from and to what is replaced may be under way
            self._frames = [Frame(device, max(size, held), max(rows, self._rows)) for _ in range(CALLS)]
        if held < size:
            self._inputs = device.allocate("int32", (size // 4,))
        if self._rows < rows:
            vocabulary = backend.manifest.model.vocab_size
            self._all_logits = device.allocate(self._logits_dtype, (rows, vocabulary))
            self._all_tokens = device.allocate("int32", (2, rows))
            self._rows = rows
        assert self._inputs is not None
        start = self._inputs.address
        inputs = {
            name: DeviceArray(device, "int32", plan.shapes[name], start + places[name])
            if prod(plan.shapes[name])
            else device.allocate("int32", plan.shapes[name])
            for name in plan.arrays
        }
        whole = self._all_logits
        self._logits = DeviceArray(device, whole.dtype, (rows, *whole.shape[1:]), whole.address)
        self._tokens = DeviceArray(device, "int32", (2, rows), self._all_tokens.address)
        self._places = {name: start + place for name, place in places.items()}
        backend.bind(self._context, {**inputs, "visual_embeds": embeds}, inputs=True)
        backend.bind(self._context, {"logits": self._logits}, inputs=False)

    def _run(self, *, samples: bool) -> None:
        if not self._captured or samples not in self._ran:
            self._enqueue(samples=samples)
            self._ran.add(samples)
            return
        if samples not in self.graphs:
            with self._device.capture() as captured:
                self._enqueue(samples=samples)
            self.graphs[samples] = captured[0]
        self.graphs[samples].launch()

    def _enqueue(self, *, samples: bool) -> None:
        backend, places = self._backend, self._places
        if not samples:
            backend.enqueue(self._context)
            return
        sampler = backend.sampler
        assert sampler is not None
        if self._captured:
            sampler.feed(len(self._logits), places["slot"], places["input_ids"])
        backend.enqueue(self._context)
        sampler.choose(self._logits, places["slot"], places["options"], self._tokens)
