"""The TensorRT backend: engines of a bundle over a packed cache in GPU memory, without torch or transformers.

The caches are allocated once and bound to ``past.*`` and ``present.*`` at one address each: the operator writes past
the counts in place. The counts have outputs of their own, copied over the old ones after the step. Decode steps are
replayed as CUDA graphs, one for each of a few numbers of rows; a call waits for the device once, for its logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from vkvx.cache_layout import tensor_bytes
from vkvx.errors import CapacityError, EngineError, OptionError, VkvxError
from vkvx.manifest import Manifest
from vkvx.runtime.backends.tensorrt.call_plan import (
    COUNTS,
    CallPlan,
    cache_buffers,
    check_cache,
    embed_copies,
    pack,
    plan_call,
)
from vkvx.runtime.backends.tensorrt.device import CapturedGraph, Device, DeviceArray, DeviceStorage, PinnedMemory
from vkvx.runtime.backends.tensorrt.engine import Engines
from vkvx.runtime.cache import PackedCache, Shape, numpy_dtype
from vkvx.runtime.calls import Call
from vkvx.runtime.engines.gpus import use_gpu
from vkvx.runtime.engines.limits import has_tiles
from vkvx.runtime.engines.manifest import DECODE, DECODER, VISION, Limits


class TensorRTBackend:
    """Engines of a bundle with a cache of their own. See :class:`vkvx.runtime.backends.base.Backend`.

    ``name`` is "tensorrt" or "rtx". ``gpu`` is where the engines were opened. Pictures stay there: :meth:`encode` and
    :meth:`place` return arrays on it.

    Raises CapacityError (a cache that the engines do not take, or too little GPU memory).
    """

    provider = "cuda"
    closed = False
    samples = False

    def __init__(
        self, manifest: Manifest, engines: Engines, gpu: Device, *, slots: int, visual_tokens: int, text_tokens: int
    ) -> None:
        self.name = engines.manifest.backend
        self.golden = "not checked"
        """What the golden sample said."""
        self.manifest = manifest
        self.gpu = gpu
        self.device = str(gpu.gpu)
        self.engines = engines
        self.limits: Limits = engines.manifest.limits
        self.cache = PackedCache(manifest.layout, slots, visual_tokens, text_tokens, DeviceStorage(gpu))
        buffers = cache_buffers(engines.manifest, self.cache)
        check_cache(engines.manifest, buffers)
        caches = {f"past.{key}": array for key, array in self.cache.buffers.items()}
        self._arrays = {b.name: caches[b.alias or b.name] for b in buffers if (b.alias or b.name) in caches}
        self._arrays |= {b.name: gpu.allocate(b.dtype, b.shape) for b in buffers if b.name not in self._arrays}
        self._counts = PinnedMemory(gpu, 4 * (self.cache.visual_count.size + self.cache.text_count.size))
        self._known_counts: tuple[np.ndarray, ...] | None = None  # what the device has; None: nobody knows
        self._prefill: _Lane | None = None
        self._decode: dict[int, _Lane] = {}
        self._vision: Any = None
        self._scratch: dict[str, DeviceArray] = {}

    def close(self) -> None:
        """See :meth:`vkvx.runtime.backends.base.Backend.close`."""
        if self.closed:
            return
        self.closed = True
        with contextlib.suppress(VkvxError):  # a GPU that failed has nothing left to wait for
            self.gpu.synchronize()
        # Graphs use what contexts hold, contexts their engine and the memory that is bound to them.
        for lane in (self._prefill, *self._decode.values()):
            if lane is not None:
                lane.close()
        self._prefill = self._vision = None
        for held in (self._decode, self._arrays, self._scratch, self.cache.buffers):
            held.clear()
        del self._counts, self.engines

    @property
    def addresses(self) -> dict[str, int]:
        """Where caches and counts lie in GPU memory, by the decoder's input or output. They never change."""
        return {name: array.address for name, array in self._arrays.items()}

    @property
    def graphs(self) -> dict[int, CapturedGraph]:
        """The captured decode steps, by rows."""
        return {rows: lane.graph for rows, lane in self._decode.items() if lane.graph is not None}

    def encode(self, pixel_inputs: Mapping[str, np.ndarray]) -> DeviceArray:
        """See :meth:`vkvx.runtime.backends.base.Backend.encode`; the embeddings stay on the device."""
        use_gpu(self.gpu.gpu)
        manifest, engine = self.engines.manifest, self.engines.vision
        profile = next(one for one in manifest.profiles if one.engine == VISION)
        dtypes = {tensor.name: tensor.dtype for tensor in manifest.engine_tensors(VISION, "input")}
        if set(dtypes) != set(pixel_inputs):
            raise OptionError(f"the vision engine takes {sorted(dtypes)}, got {sorted(pixel_inputs)}")
        (output,) = manifest.engine_tensors(VISION, "output")
        graph = self.manifest.graphs["vision"]
        rows, count = graph.output_rows(pixel_inputs), len(next(iter(pixel_inputs.values())))
        # Tiles do not know of each other, patches of a picture do.
        step = self.limits.pictures if has_tiles(self.manifest) else count
        embeds = self.gpu.allocate(output.dtype, (rows, self.manifest.model.embed_width))
        if self._vision is None:
            self._vision = self.engines.context(engine, profile.index, self.gpu)
        for first in range(0, count, step):
            part = {
                name: np.asarray(a)[first : first + step] if step < count else a for name, a in pixel_inputs.items()
            }
            for name, array in part.items():
                if not profile.takes(name, array.shape):
                    least, _, most = profile.shapes[name]
                    raise CapacityError(
                        f"the vision engine takes {name} of {least} to {most}, got {array.shape}; "
                        "give a smaller picture, or build with a larger --max-input-len"
                    )
                held = self._reserve(name, dtypes[name], array.shape)
                self.gpu.upload(held, array.astype(numpy_dtype(dtypes[name]), copy=False))
                self._bind(self._vision, {name: held}, inputs=True)
            row = tensor_bytes(output.dtype, (first * rows // count, self.manifest.model.embed_width))
            self._vision.set_tensor_address(output.name, embeds.address + row)
            self._enqueue(self._vision)
        return embeds

    def place(self, call: Call, embeds: Sequence[DeviceArray]) -> DeviceArray:
        """See :meth:`vkvx.runtime.backends.base.Backend.place`: copies on the device, zeros without a picture."""
        dtype, hidden = self.manifest.model.dtype, self.manifest.model.embed_width
        placed = self._reserve("visual_embeds", dtype, (*call.visual_index.shape, hidden))
        self.gpu.clear(placed)
        size = tensor_bytes(dtype, (hidden,))
        for target, piece, source, rows in embed_copies(call, [len(part) for part in embeds]):
            self.gpu.copy(placed.address + target * size, embeds[piece].address + source * size, rows * size)
        return placed

    def step(self, call: Call, visual_embeds: DeviceArray | np.ndarray | None) -> np.ndarray:
        """See :meth:`vkvx.runtime.backends.base.Backend.step`."""
        use_gpu(self.gpu.gpu)  # TensorRT and its plugins take the thread's GPU for theirs
        model, cache = self.manifest.model, self.cache
        plan = plan_call(self.engines.manifest, call, cache, model.embed_width)
        lane = self._lane(plan)
        embeds = self._embeds(plan, visual_embeds)
        known, self._known_counts = self._known_counts, None  # until the step is done
        self._send_counts(known)
        lane.run(plan, embeds)
        self.gpu.synchronize()
        logits = np.array(lane.logits[: plan.rows])
        visual_count, text_count = (np.array(counts) for counts in lane.counts)
        cache.commit(call, visual_count, text_count)
        self._known_counts = visual_count, text_count
        return logits

    def _lane(self, plan: CallPlan) -> _Lane:
        """What runs calls of this kind: one for all prefills, and one for each number of rows of a decode step."""
        if plan.profile.name != DECODE:
            if self._prefill is None:
                self._prefill = _Lane(self, plan, captured=False)
            return self._prefill
        rows = len(plan.call.slot)
        if rows not in self._decode:
            self._decode[rows] = _Lane(self, plan, captured=True)
        return self._decode[rows]

    def _embeds(self, plan: CallPlan, given: DeviceArray | np.ndarray | None) -> DeviceArray:
        """``visual_embeds`` of a call: zero where no entry is a picture's, for an engine may multiply them by 0."""
        shape, dtype = plan.shapes["visual_embeds"], self.manifest.model.dtype
        if plan.profile.name == DECODE:
            # A captured step keeps the address: memory for the most rows at once, never replaced.
            first = "no embeds" not in self._scratch
            held = self._reserve("no embeds", dtype, (self.cache.slots, *shape[1:]))
            if first:
                self.gpu.clear(held)
            return DeviceArray(self.gpu, dtype, shape, held.address)
        if given is None or not prod(given.shape):
            held = self._reserve("visual_embeds", dtype, shape)
            self.gpu.clear(held)
            return held
        if tuple(given.shape) != shape:
            raise OptionError(f"visual_embeds of shape {tuple(given.shape)} for a call that needs {shape}")
        if isinstance(given, DeviceArray):
            return given
        held = self._reserve("visual_embeds", dtype, shape)
        self.gpu.upload(held, np.asarray(given, numpy_dtype(dtype)))
        return held

    def _send_counts(self, known: tuple[np.ndarray, ...] | None) -> None:
        """Bring the counts to the device if the host changed them: slots were taken, given back, copied."""
        cache, offset = self.cache, 0
        current = (cache.visual_count, cache.text_count)
        if known is not None and all(np.array_equal(a, b) for a, b in zip(known, current, strict=True)):
            return
        for name, counts in zip(COUNTS, current, strict=True):
            if counts.size:
                self._counts.view(offset, "int32", counts.shape)[...] = counts
                self.gpu.copy(self._arrays[name].address, self._counts.address + offset, counts.nbytes)
            offset += counts.nbytes

    def _reserve(self, name: str, dtype: str, shape: Shape) -> DeviceArray:
        """Memory under a name, kept from call to call and replaced when a larger one is wanted."""
        size = tensor_bytes(dtype, shape)
        held = self._scratch.get(name)
        if held is None or held.nbytes < size:
            self._scratch.pop(name, None)
            held = self._scratch[name] = self.gpu.allocate("int32", (-(-size // 4),))
        return DeviceArray(self.gpu, dtype, shape, held.address)

    def _bind(self, context: Any, arrays: Mapping[str, DeviceArray], *, inputs: bool) -> None:
        log = self.engines.log
        for name, array in arrays.items():
            what = f"the engines in {self.engines.directory} refuse {name} of shape {list(array.shape)}"
            with log.explain(EngineError, what):
                if inputs:
                    log.require(context.set_input_shape(name, array.shape))
                log.require(context.set_tensor_address(name, array.address))

    def _enqueue(self, context: Any) -> None:
        log = self.engines.log
        with log.explain(EngineError, f"TensorRT cannot run the engines in {self.engines.directory}"):
            log.require(context.execute_async_v3(int(self.gpu.stream)))


class _Lane:
    """A context of the decoder with what its calls read and write beside the caches.

    A ``captured`` lane is for calls of one shape: the second is captured as a CUDA graph, which then serves all.
    (Before a capture TensorRT needs one run with the same shapes.) Each has a context of its own, because a graph may
    hold addresses inside its context.
    """

    def __init__(self, backend: TensorRTBackend, plan: CallPlan, *, captured: bool) -> None:
        self._backend, self._device, self._captured = backend, backend.gpu, captured
        self._context: Any = backend.engines.context(backend.engines.decoder, plan.profile.index, self._device)
        names = {tensor.name: tensor for tensor in backend.engines.manifest.engine_tensors(DECODER, "input")}
        for name, array in backend._arrays.items():
            backend._bind(self._context, {name: array}, inputs=name in names)
        self._staged: PinnedMemory | None = None
        self._inputs: DeviceArray | None = None
        self._logits: DeviceArray | None = None
        self._results: PinnedMemory | None = None
        self._ran = False
        self.graph: CapturedGraph | None = None

    def close(self) -> None:
        """Drop the graph, then the context; the device must be done."""
        self.graph = None
        self._context = None

    def run(self, plan: CallPlan, embeds: DeviceArray) -> None:
        """Queue a call. ``logits`` and ``counts`` hold its results once the device is done."""
        arrays = plan.call.inputs
        shapes = {name: array.shape for name, array in arrays.items()}
        offsets, size = pack(shapes)
        if not self._captured or not self._ran:
            self._prepare(plan, offsets, size, embeds)
        assert self._staged is not None
        for name, shape in shapes.items():
            self._staged.view(offsets[name], "int32", shape)[...] = arrays[name]
        if not self._captured or not self._ran:
            self._enqueue(size, len(plan.call.slot))
            self._ran = True
            return
        if self.graph is None:
            with self._device.capture() as captured:
                self._enqueue(size, len(plan.call.slot))
            self.graph = captured[0]
        self.graph.launch()

    def _prepare(self, plan: CallPlan, offsets: Mapping[str, int], size: int, embeds: DeviceArray) -> None:
        """Memory for a call of these shapes, bound to the context."""
        backend, rows = self._backend, len(plan.call.slot)
        if self._staged is None or self._staged.size < size:
            self._staged, self._inputs = PinnedMemory(self._device, size), self._device.allocate("int32", (size // 4,))
        assert self._inputs is not None
        inputs = {
            name: DeviceArray(self._device, "int32", plan.shapes[name], self._inputs.address + offset)
            if prod(plan.shapes[name])
            else self._device.allocate("int32", plan.shapes[name])
            for name, offset in offsets.items()
        }
        backend._bind(self._context, {**inputs, "visual_embeds": embeds}, inputs=True)
        if self._logits is None or self._logits.shape[0] < rows:
            cache, vocabulary = backend.cache, backend.manifest.model.vocab_size
            self._logits = self._device.allocate("float32", (rows, vocabulary))
            sizes = [self._logits.nbytes, cache.visual_count.nbytes, cache.text_count.nbytes]
            self._results = PinnedMemory(self._device, sum(sizes))
            self.logits = self._results.view(0, "float32", self._logits.shape)
            self.counts = tuple(
                self._results.view(sum(sizes[: i + 1]), "int32", getattr(cache, name).shape)
                for i, name in enumerate(COUNTS)
            )
        backend._bind(self._context, {"logits": self._logits}, inputs=False)

    def _enqueue(self, size: int, rows: int) -> None:
        """Inputs in (``size`` bytes), the engine, new counts over old ones, results of so many rows out."""
        backend, device = self._backend, self._device
        assert self._staged is not None
        assert self._inputs is not None
        assert self._results is not None
        assert self._logits is not None
        device.copy(self._inputs.address, self._staged.address, size)
        backend._enqueue(self._context)
        device.copy(self._results.address, self._logits.address, self._logits.nbytes // len(self._logits) * rows)
        place = self._results.address + self._logits.nbytes
        for name in COUNTS:
            new = backend._arrays[f"{name}_out"]
            if new.nbytes:
                device.copy(backend._arrays[name].address, new.address, new.nbytes)
                device.copy(place, new.address, new.nbytes)
                place += new.nbytes
