"""Inputs and outputs of the graphs of a bundle: names, types, shapes. Standard library only.

Those of the decoder follow from the cache (``docs/operator.md``), those of the vision graph from the kind of pictures.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from vkvx.typed_json import Dim, Index, OneOf

if TYPE_CHECKING:
    from vkvx.cache_layout import CacheLayout
    from vkvx.manifest import ModelInfo

DTYPES = ("float16", "bfloat16", "float32", "int32")
"""Types of inputs and outputs."""


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output. ``shape`` holds sizes, and names of dynamic dimensions."""

    name: str
    dtype: Annotated[str, OneOf(DTYPES)]
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {reprlib.repr(list(self.shape))}"


@dataclass(frozen=True)
class Graph:
    """One ONNX file of the bundle; ``file`` is relative to the bundle."""

    file: str
    opset: Index
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def output_rows(self, inputs: Mapping[str, Sized]) -> int:
        """Size of axis 0 of the first output, which may be a multiple of an input's (``"256*P"``), for these arrays."""
        sizes = {}
        for spec in self.inputs:
            factor, symbol = parse_dim(spec.shape[0])
            sizes[symbol] = len(inputs[spec.name]) // factor
        factor, symbol = parse_dim(self.outputs[0].shape[0])
        return factor * sizes[symbol]


def parse_dim(dim: int | str) -> tuple[int, str]:
    """Factor and symbol of a dynamic dimension such as ``P`` or ``256*P``; of a size the size itself and no symbol."""
    if isinstance(dim, int):
        return dim, ""
    factor, _, symbol = dim.rpartition("*")
    return int(factor or 1), symbol


def difference(given: Sequence[TensorSpec], expected: Sequence[TensorSpec]) -> str | None:
    """What tells inputs or outputs from those expected, the first that is found; None if nothing does."""
    for there, wanted in zip(given, expected, strict=False):
        if there.name != wanted.name:
            return f"{reprlib.repr(there.name)} stands where '{wanted.name}' is expected"
        if there != wanted:
            return f"'{wanted.name}' is {there}, expected {wanted}"
    if len(given) != len(expected):
        return f"there are {len(given)}, expected {len(expected)}"
    return None


def decoder_inputs(layout: CacheLayout) -> tuple[TensorSpec, ...]:
    """Inputs of the decoder graph in order. T counts tiles and G groups of the cache, N its text rows."""
    rows = layout.info.position_rows
    calls = (
        TensorSpec("input_ids", "int32", ("B", "S")),
        TensorSpec("position_ids", "int32", ("B", "S") if rows == 1 else ("B", rows, "S")),
        TensorSpec("visual_embeds", layout.info.dtype, ("B", "Nv", layout.info.embed_width)),
        TensorSpec("visual_index", "int32", ("B", "Nv")),
        TensorSpec("text_index", "int32", ("B", "Nt")),
        TensorSpec("last_index", "int32", ("B",)),
        TensorSpec("slot", "int32", ("B",)),
    )
    window = (TensorSpec("window_start", "int32", ("B", 2, "S")),) if layout.info.sliding_window else ()
    return (*calls, *_counts(""), *window, *_caches("past", layout))


def decoder_outputs(layout: CacheLayout) -> tuple[TensorSpec, ...]:
    """Outputs of the decoder graph in order."""
    logits = TensorSpec("logits", "float32", ("B", layout.info.vocab_size))
    return (logits, *_counts("_out"), *_caches("present", layout))


def _counts(suffix: str) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(f"visual_count{suffix}", "int32", ("Bc", "G")),
        TensorSpec(f"text_count{suffix}", "int32", ("Bc",)),
    )


def _caches(prefix: str, layout: CacheLayout) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(f"{prefix}.{layer}.{name}", dtype, shape)
        for layer in layout.stored_layers
        for name, (dtype, shape) in layout.layer_tensors(layer, "Bc", "T", "G", "N").items()
    )


def vision_outputs(model: ModelInfo, rows: str) -> tuple[TensorSpec, ...]:
    """Output of the vision graph; ``rows`` says how many tokens all pictures have, such as ``"256*P"``."""
    return (TensorSpec("image_embeds", model.dtype, (rows, model.embed_width)),)
