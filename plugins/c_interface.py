"""The C interface as lists: its enumerations, its limits and the fields of ``VkvxParams``, from the operator's table.

``generate.py`` writes the C and C++ headers from them, ``library.py`` makes the struct of ctypes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

from vkvx.format import CACHE_NAMES
from vkvx.plugins.operator import (
    ALL_INPUTS,
    INPUTS,
    OUTPUTS,
    TEXT_ROWS_8,
    OperatorAttributes,
    TensorDefinition,
    definitions,
)

ABI_VERSION = 5
"""Raised with every change of the struct or of a number."""
MAX_HEAD_DIM = 512
"""The widest head that the kernels take."""
MAX_VOCAB = 1 << 19
"""The most tokens that ``vkvx_sample`` chooses among: what the sums of its histogram have bits for."""
STRIDED = ("query", "key", "value")
"""Tensors that may lie in any order, but for their last axis."""


class Enumeration(NamedTuple):
    """Names in the order of their numbers; in C ``VKVX_``, the prefix and the name."""

    names: tuple[str, ...]
    prefix: str = ""

    @property
    def numbers(self) -> dict[str, int]:
        """The number of each name."""
        return {name: number for number, name in enumerate(self.names)}

    @property
    def constants(self) -> tuple[str, ...]:
        """The names in C."""
        return tuple(f"VKVX_{self.prefix}{name}".upper() for name in self.names)


RESULTS = Enumeration(("ok", "bad_argument", "unsupported", "workspace_too_small", "cuda_error"))
DTYPES = Enumeration(("float16", "bfloat16", "float32"))
KERNELS = Enumeration(("auto", "plain", "codes", "planes", "prefill", "few"))


@dataclass(frozen=True)
class Field:
    """A field of ``VkvxParams``, its type in C, and what fills it.

    That is the attribute or the size (a letter of ``docs/operator.md``) named here, or the tensor of the field's name.
    """

    name: str
    type: str
    meaning: str = ""
    attribute: str = ""
    size: str = ""
    unit: str = ""
    """An attribute: what one of the size stands for."""


SAMPLE_ROW_FIELDS = (
    Field("temperature", "float", "0: the likeliest token"),
    Field("top_p", "float", "1: all"),
    Field("repetition_penalty", "float", "1: none"),
    Field("top_k", "int32_t", "0: all"),
    Field("seed", "uint64_t"),
    Field("step", "uint32_t", "of the row's draws, from 0"),
    Field("wants_log_probability", "int32_t", "1: yes, 0: no"),
)
"""Fields of ``VkvxSampleRow``, 32 bytes."""
SAMPLE_FIELDS = (
    Field("size", "int32_t", "sizeof(VkvxSampleParams)"),
    Field("dtype", "int32_t", "of the logits"),
    Field("rows", "int32_t", "B"),
    Field("vocab", "int32_t", "V"),
    Field("logits_stride", "int64_t", "of row, in elements"),
    Field("logits", "const void *", "[B, V]"),
    Field("options", "const VkvxSampleRow *", "[B]"),
    Field("slot", "const int32_t *", "int32 [B]; -1: an idle row, of which nothing is read or written"),
    Field("seen", "uint32_t *", "uint32 [Bc, ceil(V/32)], a bit for each token; that of the token is set"),
    Field("excluded", "const uint32_t *", "likewise; null: none"),
    Field("token", "int32_t *", "int32 [B]"),
    Field("last_token", "int32_t *", "int32 [Bc], of the rows' slots, 0 in place of less; null: not wanted"),
    Field("log_probability", "float *", "float32 [B], by the logits as they are, of rows that want it; null: of none"),
)
"""Fields of ``VkvxSampleParams``."""


def enumerations(table: type[OperatorAttributes] = OperatorAttributes) -> dict[str, Enumeration]:
    """Enumerations by the field that holds their numbers; ``RESULTS`` are returned, not held."""
    choices = {field: definitions(table)[a.attribute].choices for field, a in _attribute_fields(table).items()}
    attributes = {
        field: Enumeration(names, "" if field == "quantizer" else f"{field.removeprefix('visual_')}_")
        for field, names in choices.items()
        if names
    }
    return {"dtype": DTYPES, **attributes, "kernel": KERNELS}


def struct_fields(table: type[OperatorAttributes] = OperatorAttributes) -> tuple[Field, ...]:
    """Fields of ``VkvxParams``, in order."""
    attributes = _attribute_fields(table)
    group_size = attributes.pop("group_size")
    call = {"rows": "B", "positions": "S", "slots": "Bc", "query_heads": "Hq", "kv_heads": "Hkv", "head_dim": "D"}
    lengths = {"text_capacity": "N", "visual_entries": "Nv", "text_entries": "Nt"}
    return (
        Field("size", "int32_t", "sizeof(VkvxParams)"),
        Field("dtype", "int32_t", "of T"),
        *(Field(name, "int32_t", letter, size=letter) for name, letter in call.items()),
        group_size,
        Field("visual_capacity", "int32_t", "C", size="G", unit="group_size"),
        *(Field(name, "int32_t", letter, size=letter) for name, letter in lengths.items()),
        *(a for a in attributes.values() if a.type == "int32_t"),
        Field("kernel", "int32_t", "VKVX_AUTO, or one of the kernels"),
        Field("splits", "int32_t", "parts of the sequence that run side by side in decode; 0: chosen by shape"),
        *(a for a in attributes.values() if a.type == "float"),
        *(Field(f"{name}_stride", "int64_t[3]", "of row, head, position") for name in STRIDED),
        *(_pointer(tensor) for tensor in (*ALL_INPUTS, OUTPUTS[0])),
        Field("workspace", "void *", "zero before its first use, see below"),
        Field("workspace_bytes", "size_t"),
    )


def size_sources() -> dict[str, tuple[str, int]]:
    """Where each size is read: letter to tensor and axis."""
    found: dict[str, tuple[str, int]] = {}
    for tensor in INPUTS:
        for axis, letter in enumerate(tensor.shape):
            found.setdefault(letter, (tensor.name, axis))
    return found


def _attribute_fields(table: type[OperatorAttributes]) -> dict[str, Field]:
    found = {}
    for f in fields(table):
        known = definitions(table)[f.name]
        name = f.name if known.field is None else known.field
        if name:
            kind = "float" if isinstance(f.default, float) else "int32_t"
            found[name] = Field(name, kind, known.meaning, attribute=f.name)
    return found


def _pointer(tensor: TensorDefinition) -> Field:
    kind = {"int32": "int32_t *", "float32": "float *"}.get(tensor.dtype, "void *")
    is_written = tensor.name in CACHE_NAMES or tensor is OUTPUTS[0]
    meaning = f"{tensor.dtype} [{', '.join(tensor.shape)}]"
    meaning += "".join(f"; 8 bits: {t.dtype} [{', '.join(t.shape)}]" for t in TEXT_ROWS_8 if t.name == tensor.name)
    return Field(tensor.name, kind if is_written else f"const {kind}", meaning)
