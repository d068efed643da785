"""Decode steps of onnxruntime's CUDA provider as CUDA graphs, which the provider captures, one for a number of rows.

A graph reads and writes where it did when it was captured, so its inputs and logits have buffers of their own on the
GPU. Only what differs from the step before is copied there. The provider captures a graph when it runs it first, in the
thread that does; to that end it runs the step several times, which the operator's rules allow: a call reads below the
counts and writes past them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vkvx.runtime.backends.onnxruntime.storage import ort_value
from vkvx.runtime.cache import PackedCache, numpy_dtype
from vkvx.runtime.calls import PADDING, Call, decode_rows

OPTION = "enable_cuda_graph"
"""Of the provider, for sessions whose runs it may capture."""


class DecodeSteps:
    """Runs calls of one text token per row in a session that was opened with ``OPTION``.

    ``bind`` binds the caches of ``cache``, which lie on ``device``, to an IO binding.
    """

    def __init__(self, ort: Any, session: Any, cache: PackedCache, device: str, bind: Callable[[Any], None]) -> None:
        self._ort, self._session, self._cache, self._device, self._bind = ort, session, cache, device, bind
        self._steps: dict[int, _Step] = {}
        self.has_run = False
        """Whether any step has: then graphs can be captured."""

    @staticmethod
    def takes(call: Call) -> bool:
        """Whether a call is such a step."""
        return call.input_ids.shape[1] == 1 and not (call.visual_index >= 0).any()

    def run(self, call: Call) -> np.ndarray:
        """Logits FP32 [B, V] of a call that it takes; the caller updates the counts."""
        rows, cache = len(call.slot), self._cache
        padded = decode_rows(rows, cache.slots)
        inputs = {name: _pad(x, padded, PADDING.get(name, 0)) for name, x in call.inputs.items()}
        inputs |= {"visual_count": cache.visual_count, "text_count": cache.text_count}
        del inputs["visual_index"]
        if padded not in self._steps:
            self._steps[padded] = self._new(padded)
        logits = self._steps[padded].run(inputs)[:rows]
        self.has_run = True
        return logits

    def _new(self, rows: int) -> _Step:
        info = self._cache.layout.info
        binding = self._session.io_binding()
        self._bind(binding)
        nothing = np.zeros((rows, 0, info.embed_width), numpy_dtype(info.dtype))
        binding.bind_ortvalue_input("visual_embeds", ort_value(self._ort, nothing))
        binding.bind_ortvalue_input("visual_index", ort_value(self._ort, np.zeros((rows, 0), np.int32)))
        logits = self._ort.OrtValue.ortvalue_from_shape_and_type([rows, info.vocab_size], np.float32, self._device, 0)
        return _Step(self._ort, self._session, binding, rows, logits)


class _Step:
    """The graph of a number of rows, which is also its number. Its inputs lie where ``logits`` do."""

    def __init__(self, ort: Any, session: Any, binding: Any, rows: int, logits: Any) -> None:
        self._ort, self._session, self._binding, self._logits = ort, session, binding, logits
        self._options = run_options(ort, rows)
        self._values: dict[str, Any] = {}
        self._held: dict[str, np.ndarray] = {}
        """What :attr:`_values` hold."""
        binding.bind_ortvalue_output("logits", logits)

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        for name, array in inputs.items():
            if name not in self._values:
                value = self._ort.OrtValue.ortvalue_from_numpy(array.copy(), self._logits.device_name(), 0)
                self._binding.bind_ortvalue_input(name, value)
                self._values[name] = value
            elif np.array_equal(self._held[name], array):
                continue
            else:
                self._values[name].update_inplace(np.ascontiguousarray(array))
            self._held[name] = array.copy()
        self._session.run_with_iobinding(self._binding, self._options)
        logits: np.ndarray = self._logits.numpy()
        return logits


def run_options(ort: Any, graph: int = -1) -> Any:
    """Of a run that captures a graph or runs it again, or of one without a graph (-1)."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def _pad(array: np.ndarray, rows: int, value: int) -> np.ndarray:
    more = rows - len(array)
    return np.pad(array, [(0, more), *[(0, 0)] * (array.ndim - 1)], constant_values=value) if more else array
