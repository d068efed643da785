"""The TensorRT backend: engines of a bundle over a packed cache in GPU memory, without torch or transformers.

The caches are allocated once and bound to ``past.*`` and ``present.*`` at one address each: the operator writes past
the counts in place. The counts are the host's, which knows what a call makes of them: each call brings them, and what
the engine gives in return is not looked at. Decode steps are replayed as CUDA graphs, one for each of a few numbers of
rows, and choose the next tokens on the GPU if libvkvx is there.
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
from vkvx.runtime.backends.base import SampledRow
from vkvx.runtime.backends.tensorrt.call_plan import (
    CallPlan,
    cache_buffers,
    check_cache,
    embed_copies,
    plan_call,
)
from vkvx.runtime.backends.tensorrt.device import CapturedGraph, Device, DeviceArray, DeviceStorage
from vkvx.runtime.backends.tensorrt.engine import Engines
from vkvx.runtime.backends.tensorrt.lane import Lane
from vkvx.runtime.backends.tensorrt.sampling import PendingTokens, open_sampler
from vkvx.runtime.cache import PackedCache, Shape, numpy_dtype
from vkvx.runtime.calls import Call
from vkvx.runtime.engines.gpus import use_gpu
from vkvx.runtime.engines.limits import has_tiles
from vkvx.runtime.engines.manifest import DECODE, VISION, Limits


class TensorRTBackend:
    """Engines of a bundle with a cache of their own. See :class:`vkvx.runtime.backends.base.Backend`.

    ``name`` is "tensorrt" or "rtx". ``gpu`` is where the engines were opened. Pictures stay there: :meth:`encode` and
    :meth:`place` return arrays on it.

    Raises CapacityError (a cache that the engines do not take, or too little GPU memory).
    """

    provider = "cuda"
    closed = False

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
        self.arrays = {b.name: caches[b.alias or b.name] for b in buffers if (b.alias or b.name) in caches}
        """What all calls share: inputs and outputs of the decoder that keep their memory, by name."""
        self.arrays |= {b.name: gpu.allocate(b.dtype, b.shape) for b in buffers if b.name not in self.arrays}
        self.sampler = open_sampler(engines, gpu, slots, manifest.model.vocab_size)
        """What chooses tokens on the GPU, None where the host does."""
        self._prefill: Lane | None = None
        self._decode: dict[int, Lane] = {}
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
        self._prefill = self._vision = self.sampler = None
        for held in (self._decode, self.arrays, self._scratch, self.cache.buffers):
            held.clear()
        del self.engines

    @property
    def samples(self) -> bool:
        """Whether tokens are chosen on the GPU."""
        return self.sampler is not None

    @property
    def addresses(self) -> dict[str, int]:
        """Where caches lie in GPU memory, by the decoder's input or output. They never change."""
        return {name: array.address for name, array in self.arrays.items()}

    @property
    def graphs(self) -> dict[int, CapturedGraph]:
        """The captured decode steps that choose tokens, by rows."""
        return {rows: lane.graphs[True] for rows, lane in self._decode.items() if True in lane.graphs}

    @property
    def logits_graphs(self) -> dict[int, CapturedGraph]:
        """Those that give logits."""
        return {rows: lane.graphs[False] for rows, lane in self._decode.items() if False in lane.graphs}

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
                self.bind(self._vision, {name: held}, inputs=True)
            row = tensor_bytes(output.dtype, (first * rows // count, self.manifest.model.embed_width))
            self._vision.set_tensor_address(output.name, embeds.address + row)
            self.enqueue(self._vision)
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
        plan, lane, embeds = self._plan(call, visual_embeds)
        logits = lane.logits(plan, embeds)
        self.cache.commit(call, *self.cache.counts_after(call))
        return logits

    def begin(self, slot: int, seen: Sequence[int], excluded: Sequence[int]) -> None:
        """See :meth:`vkvx.runtime.backends.base.SamplingBackend.begin`."""
        assert self.sampler is not None
        self.sampler.begin(slot, seen, excluded)

    def exclude(self, slot: int, excluded: Sequence[int]) -> None:
        """See :meth:`vkvx.runtime.backends.base.SamplingBackend.exclude`."""
        assert self.sampler is not None
        self.sampler.exclude(slot, excluded)

    def launch(
        self, call: Call, visual_embeds: DeviceArray | np.ndarray | None, rows: Sequence[SampledRow]
    ) -> PendingTokens:
        """See :meth:`vkvx.runtime.backends.base.SamplingBackend.launch`."""
        plan, lane, embeds = self._plan(call, visual_embeds)
        pending = lane.launch(plan, embeds, rows)
        self.cache.commit(call, *self.cache.counts_after(call))
        return pending

    def _plan(self, call: Call, visual_embeds: DeviceArray | np.ndarray | None) -> tuple[CallPlan, Lane, DeviceArray]:
        """What a call is for the engine, what runs it, and its ``visual_embeds``."""
        use_gpu(self.gpu.gpu)  # TensorRT and its plugins take the thread's GPU for theirs
        plan = plan_call(self.engines.manifest, call, self.cache, self.manifest.model.embed_width)
        return plan, self._lane(plan), self._embeds(plan, visual_embeds)

    def _lane(self, plan: CallPlan) -> Lane:
        """What runs calls of this kind: one for all prefills, and one for each number of rows of a decode step."""
        if plan.profile.name != DECODE:
            if self._prefill is None:
                self._prefill = Lane(self, plan, captured=False)
            return self._prefill
        rows = len(plan.call.slot)
        if rows not in self._decode:
            self._decode[rows] = Lane(self, plan, captured=True)
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

    def _reserve(self, name: str, dtype: str, shape: Shape) -> DeviceArray:
        """Memory under a name, kept from call to call and replaced when a larger one is wanted."""
        size = tensor_bytes(dtype, shape)
        held = self._scratch.get(name)
        if held is None or held.nbytes < size:
            self.gpu.synchronize()  # a call under way may use it
            self._scratch.pop(name, None)
            held = self._scratch[name] = self.gpu.allocate("int32", (-(-size // 4),))
        return DeviceArray(self.gpu, dtype, shape, held.address)

    def bind(self, context: Any, arrays: Mapping[str, DeviceArray], *, inputs: bool) -> None:
        """Give a context its inputs, or outputs, by name."""
        log = self.engines.log
        for name, array in arrays.items():
            what = f"the engines in {self.engines.directory} refuse {name} of shape {list(array.shape)}"
            with log.explain(EngineError, what):
                if inputs:
                    log.require(context.set_input_shape(name, array.shape))
                log.require(context.set_tensor_address(name, array.address))

    def enqueue(self, context: Any) -> None:
        """Queue a run of an engine."""
        log = self.engines.log
        with log.explain(EngineError, f"TensorRT cannot run the engines in {self.engines.directory}"):
            log.require(context.execute_async_v3(int(self.gpu.stream)))
