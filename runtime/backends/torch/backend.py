"""The torch backend: the modules that the graphs of a bundle were traced from, over a packed cache updated in place.

On a CPU every call runs eagerly. On a GPU with the kernels of ``vkvx.plugins`` a step of one or a few text tokens per
row is the replay of a CUDA graph, see :mod:`vkvx.runtime.backends.torch.capture`, of few kernels, see
:mod:`vkvx.runtime.backends.torch.fused`, and so are pieces of prompts, see
:mod:`vkvx.runtime.backends.torch.prefills`; other calls run eagerly, and the host waits for none. Tokens are chosen
there, too, and embeddings of pictures stay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vkvx.errors import CapacityError, OptionError
from vkvx.graph_specs import decoder_inputs
from vkvx.manifest import Manifest
from vkvx.models.family import Family
from vkvx.models.graph.decoder import DecoderGraph, Observer
from vkvx.models.graph.vision import VisionGraph
from vkvx.plugins import torch_cuda
from vkvx.plugins.library import MAX_HEAD_DIM, MAX_VOCAB
from vkvx.plugins.operator import model_attributes
from vkvx.runtime.backends.base import CallInParts, SampledRow
from vkvx.runtime.backends.torch.capture import DecodeSteps
from vkvx.runtime.backends.torch.fused import fuse
from vkvx.runtime.backends.torch.prefills import Prefills
from vkvx.runtime.backends.torch.projections import merge_projections
from vkvx.runtime.backends.torch.sampling import PendingTokens, TokenSampler, upload
from vkvx.runtime.backends.torch.turns import LayerPauses, in_turns
from vkvx.runtime.cache import HostStorage, PackedCache, Shape, Storage
from vkvx.runtime.calls import Call, place_embeds


class CudaStorage:
    """Buffers in the memory of a GPU, as tensors."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        """``stream`` is the one of the model's calls, which nobody waits for."""
        self._stream, self._device = stream, stream.device

    def allocate(self, dtype: str, shape: Shape) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=self._device)

    def copy(self, buffer: Tensor, source: int, target: int, entries: int) -> None:
        with torch.cuda.stream(self._stream):
            buffer[target, :, :entries] = buffer[source, :, :entries]

    def read(self, buffer: Tensor, row: int | None = None) -> np.ndarray:
        with torch.cuda.stream(self._stream):
            return to_numpy((buffer if row is None else buffer[row]).cpu())

    def write(self, buffer: Tensor, contents: np.ndarray) -> None:
        with torch.cuda.stream(self._stream):
            buffer.copy_(to_torch(contents))


class DeviceEmbeds:
    """Embeddings [tokens, hidden] on a GPU; ``np.asarray`` copies them to main memory."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        self.tensor, self._stream = tensor, stream

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        with torch.cuda.stream(self._stream):
            return to_numpy(self.tensor.cpu()).astype(dtype, copy=False)


class TorchBackend:
    """A loaded model with a cache of its own. See :class:`vkvx.runtime.backends.base.Backend`.

    ``provider`` is "cpu" or "cuda" and says where the model is; on a CPU the cache's buffers are NumPy arrays, on a GPU
    tensors that keep their addresses.
    """

    name = "torch"
    limits = None
    closed = False

    def __init__(
        self,
        model: Any,
        family: Family,
        manifest: Manifest,
        metrics: Sequence[tuple[Tensor, Tensor]] = (),
        *,
        slots: int,
        visual_tokens: int,
        text_tokens: int,
    ) -> None:
        """``metrics`` holds the key and value metric of each layer if the quantiser needs them, beside the model.

        The model is set to the attention function ``vkvx``. Raises CapacityError if a GPU is too small for the cache.
        """
        info = manifest.model
        self.manifest = manifest
        self.provider: str = model.device.type
        self._device: torch.device = model.device
        self._dtype = getattr(torch, info.dtype)
        self.device = "CPU"
        if self.provider == "cuda":
            self.device = f"{torch.cuda.get_device_name(self._device)} (GPU {self._device.index or 0})"
        self._stream = torch.cuda.Stream(self._device) if self.provider == "cuda" else None
        storage: Storage = HostStorage() if self._stream is None else CudaStorage(self._stream)
        with self._in_memory("a cache of this size"):
            self.cache = PackedCache(manifest.layout, slots, visual_tokens, text_tokens, storage)
        self._buffers = [self._place(buffer) for buffer in self.cache.buffers.values()]
        if self._stream is not None:
            merge_projections(family.text_model(model))
        attributes = model_attributes(manifest.layout)
        self._decoder: Any = DecoderGraph(model, family, attributes, metrics, in_place=True)
        # Scores of all pairs of a picture's patches can take more memory than the cache of many rows. In FP32 kernels
        # may use other products than the ones that codes were compared with.
        fused = self._stream is not None and self._dtype is not torch.float32
        self._vision: Any = VisionGraph(model, family, self._dtype, fused=fused)
        self._pauses = LayerPauses(model, family.text_model(model))
        self._steps: DecodeSteps | None = None
        self._sampler: Any = None
        self._prefills: Prefills | None = None
        if self._stream is not None and has_kernels(manifest):
            with self._running("the buffers of decode steps"):
                library = torch_cuda.kernels()
                assert library is not None
                fuse(family.text_model(model), family.head(model))
                self._sampler = TokenSampler(library, slots, info.vocab_size, self._device)
                self._steps = DecodeSteps(self._decoder, self._buffers, self.cache, info, self._stream, self._sampler)

    @property
    def samples(self) -> bool:
        """Whether tokens are chosen on the GPU."""
        return self._steps is not None and self.manifest.model.vocab_size <= MAX_VOCAB

    def observe(self, observer: Observer | None) -> None:
        """Show ``observer`` what each layer is given in calls to come that are not captured; None ends it."""
        self._decoder.observer = observer

    @property
    def captures(self) -> bool:
        """Whether decode steps run as captured CUDA graphs."""
        return self._steps is not None

    def compile(self) -> None:
        """Let torch.compile fuse what lies between the matrix products of decode steps.

        That takes half a minute at the first step of each number of rows. Raises OptionError where no steps are
        captured; where torch cannot compile, steps run as before, and a warning says so.
        """
        if self._steps is None:
            raise OptionError(
                "compile= is for decode steps on a GPU with the kernels of `vkvx plugin build`; leave it out"
            )
        self._steps.compile()

    def capture_prefills(self, limit: int) -> None:
        """Run prefills of one row and at most ``limit`` tokens as CUDA graphs from now on, where steps are captured.

        See :mod:`vkvx.runtime.backends.torch.prefills`; states of linear attention are left out.
        """
        info, cache = self.manifest.model, self.cache
        # Calls are padded to parts of the limit, so it is no more than what a slot has room for.
        limit = min(limit, cache.visual_capacity + cache.text_capacity, info.max_positions)
        if self._stream is not None and self._steps is not None and not info.linear_layers:
            with self._running("the buffers of prefills"):
                self._prefills = Prefills(self._decoder, self._buffers, cache, info, self._stream, limit)

    def close(self) -> None:
        if self._stream is not None and not self.closed:
            self._stream.synchronize()
        self.closed = True
        self._steps = self._prefills = self._sampler = None  # graphs before the memory that they use
        self._decoder = self._vision = None
        self._buffers.clear()
        self.cache.buffers.clear()

    def encode(self, pixel_inputs: Mapping[str, np.ndarray]) -> np.ndarray | DeviceEmbeds:
        """See :meth:`vkvx.runtime.backends.base.Backend.encode`; on a GPU the embeddings stay there."""
        names = [spec.name for spec in self.manifest.graphs["vision"].inputs]
        with self._running("the pictures"):
            pixels = (self._place(np.asarray(pixel_inputs[name])) for name in names)
            with _convolutions(allow_tf32=False):
                embeds: Tensor = self._vision(*pixels)
            return to_numpy(embeds) if self._stream is None else DeviceEmbeds(embeds, self._stream)

    def encode_in_parts(
        self, pixel_inputs: Mapping[str, np.ndarray]
    ) -> Generator[None, None, np.ndarray | DeviceEmbeds]:
        """See :meth:`vkvx.runtime.backends.base.DividedTower.encode_in_parts`; parts are some layers."""

        def call(pause: Callable[[], None]) -> np.ndarray | DeviceEmbeds:
            given = bool(torch.backends.cudnn.allow_tf32)

            def pause_as_given() -> None:
                with _convolutions(allow_tf32=given):  # all threads share the flag
                    pause()

            self._pauses.pause = pause_as_given
            try:
                return self.encode(pixel_inputs)
            finally:
                self._pauses.pause = None

        return in_turns(call)

    def place(self, call: Call, embeds: Sequence[Any]) -> np.ndarray | Tensor:
        """See :meth:`vkvx.runtime.backends.base.Backend.place`."""
        if self._stream is None:
            return place_embeds(call, np.concatenate(embeds))
        with self._running("the embeddings of pictures"):
            rows = self._place(call.visual_rows)
            placed = torch.cat([piece.tensor for piece in embeds])[rows.clamp(min=0)]
            return placed.masked_fill_((rows < 0).unsqueeze(-1), 0)

    def begin(self, slot: int, seen: Sequence[int], excluded: Sequence[int]) -> None:
        """See :meth:`vkvx.runtime.backends.base.SamplingBackend.begin`."""
        with self._running("the tokens of a slot"):
            self._sampler.begin(slot, seen, excluded)

    def exclude(self, slot: int, excluded: Sequence[int]) -> None:
        """See :meth:`vkvx.runtime.backends.base.SamplingBackend.exclude`."""
        with self._running("the tokens of a slot"):
            self._sampler.exclude(slot, excluded)

    def launch(
        self, call: Call, visual_embeds: np.ndarray | Tensor | None, rows: Sequence[SampledRow]
    ) -> PendingTokens | CallInParts:
        """See :meth:`vkvx.runtime.backends.base.SamplingBackend.launch`; prefills that are captured come in parts."""
        assert self._steps is not None
        if self._prefills is not None and self._prefills.takes(call) and not self._steps.takes(call):
            with self._running("a prompt"):
                return _Prefill(self, call, rows, self._prefills.start(call, self._on_device(visual_embeds)))
        with self._running(f"{call.input_ids.shape[0]} rows of {call.input_ids.shape[1]} tokens"):
            self._sampler.set_options(rows)
            if self._steps.takes(call):
                self._steps.launch(call)
            else:
                self._sampler.choose(self._run(call, visual_embeds), self._place(call.slot))
            pending = self._sampler.pending(len(call.slot))
        self.cache.commit(call, *self.cache.counts_after(call))
        return pending

    def step(self, call: Call, visual_embeds: np.ndarray | Tensor | None) -> np.ndarray:
        with self._running(f"{call.input_ids.shape[0]} rows of {call.input_ids.shape[1]} tokens"):
            if self._steps is not None and self._steps.takes(call):
                logits = self._steps.logits(call)
            else:
                logits = self._run(call, visual_embeds).float().cpu().numpy()
        self.cache.commit(call, *self.cache.counts_after(call))
        return logits

    def _run(self, call: Call, visual_embeds: np.ndarray | Tensor | None) -> Tensor:
        """Logits [B, V] on the device, in the type of the model."""
        if self._prefills is not None and self._prefills.takes(call):
            return self._prefills.run(call, self._on_device(visual_embeds))
        info, cache = self.manifest.model, self.cache
        shape = (*call.visual_index.shape, info.embed_width)
        given = {"visual_count": cache.visual_count, "text_count": cache.text_count}
        inputs = []
        for spec in decoder_inputs(cache.layout)[: -len(self._buffers)]:
            if spec.name != "visual_embeds":
                inputs.append(self._place(given[spec.name] if spec.name in given else getattr(call, spec.name)))
            elif visual_embeds is None:
                inputs.append(torch.zeros(shape, dtype=self._dtype, device=self._device))
            else:
                inputs.append(self._place(visual_embeds).to(self._dtype))
        logits: Tensor = self._decoder(*inputs, *self._buffers)[0]
        return logits

    def _on_device(self, visual_embeds: np.ndarray | Tensor | None) -> Tensor | None:
        return None if visual_embeds is None else self._place(visual_embeds)

    def _place(self, array: np.ndarray | Tensor) -> Tensor:
        """The array on the model's device: its own memory if it is there. Nothing waits for a copy to a GPU."""
        if isinstance(array, Tensor):
            return array.to(self._device)
        return to_torch(array) if self._stream is None else upload(to_torch(array), self._device)

    @contextmanager
    def _running(self, what: str) -> Iterator[None]:
        """Without gradients, and on a GPU on this backend's own stream, after what the caller's stream has to do.

        The stream brings its GPU with it: in another thread another one may be current.
        """
        with torch.no_grad(), self._in_memory(what):
            if self._stream is None:
                yield
                return
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                yield

    @contextmanager
    def _in_memory(self, what: str) -> Iterator[None]:
        """Tell in one line that memory of the GPU is short."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"the GPU has no memory left for {what}; lower slots=, visual_tokens= (--max-visual-tokens) or "
                "text_tokens= (--max-text-tokens), or give --backend onnxruntime --provider cpu"
            ) from error


class _Prefill(CallInParts):
    """A prefill of some graphs."""

    def __init__(
        self, backend: TorchBackend, call: Call, rows: Sequence[SampledRow], graphs: Sequence[torch.cuda.CUDAGraph]
    ) -> None:
        self._backend, self._call, self._rows, self._graphs = backend, call, rows, deque(graphs)
        self._pending: PendingTokens | None = None

    def advance(self) -> bool:
        backend, call = self._backend, self._call
        with backend._running("a prompt"):
            self._graphs.popleft().replay()
            if self._graphs:
                return True
            assert backend._prefills is not None
            backend._sampler.set_options(self._rows)
            backend._sampler.choose(backend._prefills.logits, backend._place(call.slot))
            self._pending = backend._sampler.pending(1)
        backend.cache.commit(call, *backend.cache.counts_after(call))
        return False

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        assert self._pending is not None
        return self._pending.result()


def _convolutions(*, allow_tf32: bool) -> AbstractContextManager[None]:
    """Whether cuDNN rounds inputs of FP32 convolutions to TF32, as it does by default; matrix products are in FP32.

    What a picture's embeddings are off by decides on which side of a border codes of 1 bit fall.
    """
    cudnn = torch.backends.cudnn
    given = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
    return cudnn.flags(**given, allow_tf32=allow_tf32)


def has_kernels(manifest: Manifest) -> bool:
    """Whether ``libvkvx`` can attend for this model on a GPU."""
    return all(layer.head_dim <= MAX_HEAD_DIM for layer in manifest.model.layers) and torch_cuda.kernels() is not None


def to_torch(array: np.ndarray) -> Tensor:
    """A tensor on the array's memory."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """An array on the memory of a CPU tensor."""
    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
