"""The onnxruntime backend: CPU and CUDA execution providers, caches updated in place through I/O binding.

Each cache buffer is bound to ``past.*`` and to ``present.*`` at once. onnxruntime then writes the new entries into
the buffer and copies nothing else: the last node before a ``present.*`` is a ScatterND on the ``past.*`` itself. That
is safe because the graph writes only at or past the counts, and reads only below them; the counts themselves have
output arrays of their own and are taken over after the call.

On CUDA with ``libvkvx_onnxruntime`` (:mod:`vkvx.runtime.backends.onnxruntime.kernels`) attention is one kernel of it,
decode steps are CUDA graphs, and the host keeps the counts.

On the CPU a float16 bundle is computed in float32 between its float16 inputs, weights and caches: onnxruntime has no
float16 kernels for most processors, inserts casts, and folds those of the weights on load. It has none for bfloat16 at
all, so there a bfloat16 bundle runs as a float32 copy made on load, with text rows in float32.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vkvx.cache_layout import CacheLayout
from vkvx.errors import BundleError, DependencyError, DeviceError
from vkvx.graph_files import read_graph
from vkvx.manifest import Manifest
from vkvx.packages import missing, requirement
from vkvx.runtime.backends.base import check_machine
from vkvx.runtime.backends.onnxruntime import kernels, overloads
from vkvx.runtime.backends.onnxruntime.faults import explain
from vkvx.runtime.backends.onnxruntime.steps import OPTION, DecodeSteps, run_options
from vkvx.runtime.backends.onnxruntime.storage import ONNX_TYPES, OrtStorage, ort_value
from vkvx.runtime.backends.onnxruntime.threads import default_threads
from vkvx.runtime.cache import HostStorage, PackedCache, Storage, numpy_dtype
from vkvx.runtime.calls import Call, place_embeds

_LOG = logging.getLogger(__name__)
_UNCAPTURED = "onnxruntime captures no decode steps of this model as CUDA graphs, so that they are slower: %s"
_REFUSES_CAPTURE = re.compile("cannot use the (graph capture|CUDA Graph)")


class OnnxRuntimeBackend:
    """A bundle opened in onnxruntime, with a cache of its own. See :class:`vkvx.runtime.backends.base.Backend`.

    ``provider`` is "cpu", "cuda", or "auto": CUDA where onnxruntime has it. ``threads`` are those of the CPU
    provider, by default the physical cores that the process may use.
    """

    name = "onnxruntime"
    limits = None
    closed = False
    samples = False

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        *,
        slots: int,
        visual_tokens: int,
        text_tokens: int,
        provider: str = "auto",
        threads: int | None = None,
    ) -> None:
        check_machine(provider, threads)
        self._ort = _import_onnxruntime()
        self.provider = choose_provider(self._ort, provider)
        self._captures = False
        self._library = kernels.find(manifest, self.provider)
        self.device = "CPU" if self.provider == "cpu" else f"GPU 0{' with libvkvx_onnxruntime' * bool(self._library)}"
        self.threads = threads or default_threads()
        self.manifest = manifest
        self._bundle = bundle
        self._storage: Storage = HostStorage() if self.provider == "cpu" else OrtStorage(self._ort, "cuda")
        # What the graphs run with here: bfloat16 becomes float32 on the CPU.
        self._widen = manifest.model.dtype == "bfloat16" and self.provider == "cpu"
        dtype = "float32" if self._widen else manifest.model.dtype
        self._dtype = numpy_dtype(dtype)
        # The CUDA provider reduces no empty axis; a group of padding means the same as no group.
        self._fills_empty = self.provider == "cuda" and self._library is None
        self._weights: list[dict[str, np.ndarray]] = []
        self._vision: Any = None  # opened with the first picture
        read_graph(bundle, manifest, "vision")  # what is wrong with it shall be told now
        self._decoder = self._open_decoder()
        layout = CacheLayout(replace(manifest.model, dtype=dtype), manifest.quantization)
        with explain(self._ort, f"onnxruntime cannot allocate a cache of {slots} slots"):
            self.cache = PackedCache(layout, slots, visual_tokens, text_tokens, self._storage)
        self._visual_count_out = np.zeros_like(self.cache.visual_count)
        self._text_count_out = np.zeros_like(self.cache.text_count)
        self._binding: Any
        self._steps: DecodeSteps | None
        self._bind()

    def close(self) -> None:
        self.closed = True
        self._steps = None
        self._binding = self._decoder = self._vision = None
        self._weights.clear()
        self.cache.buffers.clear()

    def encode(self, pixel_inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        graph = self.manifest.graphs["vision"]
        if self._vision is None:
            self._vision = self._open("vision")
        binding = self._vision.io_binding()
        for name, array in pixel_inputs.items():
            binding.bind_ortvalue_input(name, ort_value(self._ort, array))
        output = graph.outputs[0]
        if output.dtype != "bfloat16" or self._widen:
            binding.bind_output(output.name)  # in main memory
            self._run(self._vision, binding, graph.file)
            return binding.get_outputs()[0].numpy()
        # NumPy arrays of bfloat16 can be written to, but not had from onnxruntime.
        embeds = np.empty((graph.output_rows(pixel_inputs), self.manifest.model.embed_width), numpy_dtype("bfloat16"))
        binding.bind_ortvalue_output(output.name, ort_value(self._ort, embeds))
        self._run(self._vision, binding, graph.file)
        return embeds

    def place(self, call: Call, embeds: Sequence[np.ndarray]) -> np.ndarray:
        return place_embeds(call, np.concatenate(embeds))

    def step(self, call: Call, visual_embeds: np.ndarray | None) -> np.ndarray:
        cache, file = self.cache, self.manifest.graphs["decoder"].file
        captured = self._run_captured(call, file)
        if captured is not None:
            cache.commit(call, *cache.counts_after(call))
            return captured
        binding = self._binding
        if self._fills_empty and not call.visual_index.size:
            group = np.full((len(call.slot), cache.group_size), -1, np.int32)
            call = replace(call, visual_index=group)
        batch, entries = call.visual_index.shape
        if visual_embeds is None:
            visual_embeds = np.zeros((batch, entries, self.manifest.model.embed_width), self._dtype)
        visual_embeds = np.ascontiguousarray(visual_embeds, self._dtype)
        inputs = call.inputs
        # Binding copies to the device, so the counts are bound anew each time.
        inputs |= {"visual_count": cache.visual_count, "text_count": cache.text_count, "visual_embeds": visual_embeds}
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, ort_value(self._ort, array))
        logits = np.empty((batch, self.manifest.model.vocab_size), np.float32)
        binding.bind_ortvalue_output("logits", ort_value(self._ort, logits))
        self._run(self._decoder, binding, file, run_options(self._ort) if self._captures else None)
        counts = (self._visual_count_out, self._text_count_out) if self._library is None else cache.counts_after(call)
        cache.commit(call, *counts)
        return logits

    def _bind(self) -> None:
        """Bind what is the same in each call."""
        self._binding, self._steps = self._decoder.io_binding(), None
        self._bind_caches(self._binding)
        if self._library is None:
            self._binding.bind_ortvalue_output("visual_count_out", ort_value(self._ort, self._visual_count_out))
            self._binding.bind_ortvalue_output("text_count_out", ort_value(self._ort, self._text_count_out))
        elif self._captures:
            self._steps = DecodeSteps(self._ort, self._decoder, self.cache, self.provider, self._bind_caches)

    def _run_captured(self, call: Call, file: str) -> np.ndarray | None:
        """Logits of a step that runs as a graph; None for others. What cannot be captured runs without from now on:
        then the decoder is opened again, and what the step has stored is stored again.
        """
        if self._steps is None or not self._steps.takes(call):
            return None
        try:
            with self._explained(file):
                return self._steps.run(call)
        except DeviceError as error:
            if self._steps.has_run:
                raise
            _LOG.warning(_UNCAPTURED, error)
        # Behind the block, whose error keeps the session.
        self._captures, self._steps = False, None
        self._binding = self._decoder = None
        self._decoder = self._open("decoder")
        self._bind()
        return None

    def _bind_caches(self, binding: Any) -> None:
        cache, ort = self.cache, self._ort
        for name, buffer in cache.buffers.items():
            if isinstance(buffer, np.ndarray):
                value = ort_value(ort, buffer)
                binding.bind_ortvalue_input(f"past.{name}", value)
                binding.bind_ortvalue_output(f"present.{name}", value)
            else:
                kind = ONNX_TYPES[buffer.data_type()]
                place = (self.provider, 0, kind, buffer.shape(), buffer.data_ptr())
                binding.bind_input(f"past.{name}", *place)
                binding.bind_output(f"present.{name}", *place)

    def _open_decoder(self) -> Any:
        # A step that is captured runs several times, which states of linear attention do not allow.
        if self._library is not None and not self.manifest.model.linear_layers:
            try:
                session = self._open("decoder", captures=True)
            except BundleError as error:
                if not _REFUSES_CAPTURE.search(str(error)):
                    raise
                _LOG.warning(_UNCAPTURED, error)
            else:
                self._captures = True
                return session
        return self._open("decoder")

    def _open(self, name: str, *, captures: bool = False) -> Any:
        ort, path = self._ort, self._bundle / self.manifest.graphs[name].file
        read = read_graph(self._bundle, self.manifest, name)
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        # Threads that spin while they wait halve the time of the smallest steps on an idle machine, but double it where
        # others compute, and take twice the CPU time in either case.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers: list[Any] = ["CPUExecutionProvider"]
        if self.provider == "cuda":
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": 0} | ({OPTION: 1} if captures else {})))
        model: Any = str(path)
        is_changed = False
        if name == "decoder" and self._library is not None:
            from vkvx.runtime.backends.onnxruntime.lowering import use_operator

            kernels.register(ort, options, self._library)
            use_operator(read)
            is_changed = True
        with explain(ort, f"onnxruntime cannot load {path}"):
            if self._widen:
                from vkvx.runtime.backends.onnxruntime.bf16 import widen

                values = widen(read, path.parent)
                options.add_external_initializers(list(values), [ort_value(ort, array) for array in values.values()])
                self._weights.append(values)  # onnxruntime does not copy them
                model = read.SerializeToString()
            elif is_changed or not overloads.are_known(ort.__version__):
                if not overloads.are_known(ort.__version__):
                    overloads.separate(read)
                options.add_session_config_entry(overloads.FOLDER_ENTRY, str(path.parent))
                model = read.SerializeToString()
            session = ort.InferenceSession(model, options, providers=providers)
        if self.provider == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
            raise DependencyError(
                "onnxruntime could not start its CUDA provider (CUDA 12 and cuDNN 9 libraries missing?); install them, "
                "or use provider='cpu' (--provider cpu)"
            )
        return session

    def _run(self, session: Any, binding: Any, file: str, options: Any = None) -> None:
        with self._explained(file):
            session.run_with_iobinding(binding, options)

    def _explained(self, file: str) -> AbstractContextManager[None]:
        return explain(self._ort, f"onnxruntime failed in {self._bundle / file}")


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise missing("onnxruntime", error) from error
    return onnxruntime


def choose_provider(ort: Any, provider: str) -> str:
    """cpu or cuda, as :class:`OnnxRuntimeBackend` takes ``provider``. Raises DependencyError."""
    cuda = "CUDAExecutionProvider" in ort.get_available_providers()
    if provider == "cuda" and not cuda:
        raise DependencyError(
            "this onnxruntime has no CUDA provider; run `pip uninstall onnxruntime` and then "
            f"`pip install '{requirement('onnxruntime-gpu')}'`"
        )
    if provider == "auto":
        provider = "cuda" if cuda else "cpu"
    if provider == "cuda" and hasattr(ort, "preload_dlls"):
        # Finds the CUDA libraries that pip installs. What it prints is no result.
        with contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls()
    return provider
