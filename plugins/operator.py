"""Definition of the operator ``vkvx::VisualKVAttention``, version 1: the one table behind all forms of it.

The torch ops, the ONNX schema and function, the C interface (``c_interface.py``) and the TensorRT plugins are built
from it, the table in ``docs/operator.md`` is checked against it. Names of quantisers and score corrections are those of
``vkvx/format.py``. Nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from vkvx.cache_layout import CacheLayout
from vkvx.errors import OptionError
from vkvx.format import (
    BASELINE_BITS,
    CACHE_NAMES,
    METRIC_QUANTIZERS,
    OPERATOR_VERSION,
    QUANTIZERS,
    SCORE_CORRECTIONS,
    VISUAL_MASKS,
    check_bits,
    check_group_size,
    check_text_bits,
)
from vkvx.manifest import Quantization

DOMAIN = "vkvx"
NAME = "VisualKVAttention"
VERSION = OPERATOR_VERSION


@dataclass(frozen=True)
class TensorDefinition:
    """One input or output. ``dtype`` is ``T`` for the model's float type; dims are numbers, symbols or their ratio."""

    name: str
    dtype: str
    shape: tuple[str, ...]
    meaning: str


_CACHES = (
    TensorDefinition("visual_key", "int32", ("Bc", "Hkv", "C/128", "bk", "128", "D/32"), "key codes, bit planes"),
    TensorDefinition("visual_key_params", "float16", ("Bc", "Hkv", "G", "3", "D"), "key scale, offset, residual RMS"),
    TensorDefinition("visual_value", "int32", ("Bc", "Hkv", "C/128", "bv", "D", "4"), "value codes, bit planes"),
    TensorDefinition("visual_value_params", "float16", ("Bc", "Hkv", "G", "2", "D"), "value scale, offset"),
    TensorDefinition("text_key", "T", ("Bc", "Hkv", "N", "D"), "text keys, position order"),
    TensorDefinition("text_value", "T", ("Bc", "Hkv", "N", "D"), "text values, position order"),
)
assert tuple(t.name for t in _CACHES) == CACHE_NAMES
TEXT_ROWS_8 = (
    TensorDefinition("text_key", "int32", ("Bc", "Hkv", "N", "D/4+1"), "codes and scale of text keys"),
    TensorDefinition("text_value", "int32", ("Bc", "Hkv", "N", "D/4+1"), "codes and scale of text values"),
)
"""What takes the place of the tensors of these names in nodes with text rows of 8 bits."""
_WITH_TEXT_8 = {t.name: t for t in TEXT_ROWS_8}
_VISUAL_COUNT = TensorDefinition("visual_count", "int32", ("Bc", "G"), "valid tokens in each group")
_TEXT_COUNT = TensorDefinition("text_count", "int32", ("Bc",), "valid text rows")

INPUTS = (
    TensorDefinition("query", "T", ("B", "Hq", "S", "D"), "queries after RoPE"),
    TensorDefinition("key", "T", ("B", "Hkv", "S", "D"), "keys after RoPE"),
    TensorDefinition("value", "T", ("B", "Hkv", "S", "D"), "values"),
    TensorDefinition("visual_index", "int32", ("B", "Nv"), "positions of the visual tokens, by group, -1 is padding"),
    TensorDefinition("text_index", "int32", ("B", "Nt"), "positions of the text tokens, -1 is padding at the end"),
    TensorDefinition("slot", "int32", ("B",), "cache row of each row, all different; -1 is idle"),
    *_CACHES[:4],
    _VISUAL_COUNT,
    *_CACHES[4:],
    _TEXT_COUNT,
)
METRIC_INPUTS = (
    TensorDefinition("key_metric", "float16", ("Hkv", "D", "D"), "metric of keys, rotated back to position 0"),
    TensorDefinition("value_metric", "float16", ("Hkv", "D", "D"), "metric of values"),
    TensorDefinition("rotation", "float32", ("B", "2", "D"), "cosine and sine of RoPE at each row's last position"),
)
"""Three more inputs of nodes whose quantiser needs metrics; other nodes do not have them."""
WINDOW_INPUTS = (
    TensorDefinition("window_start", "int32", ("B", "2", "S"), "first visual entry and text row that positions see"),
)
"""The last input of nodes with a sliding window; other nodes do not have it."""
ALL_INPUTS = (*INPUTS, *METRIC_INPUTS, *WINDOW_INPUTS)
"""Inputs that a node can have, in order."""
OUTPUTS = (TensorDefinition("output", "T", ("B", "Hq", "S", "D"), "attention output, 0 on padding"), *_CACHES)


class Range(NamedTuple):
    """Numbers that an attribute may have. Bounds are excluded where ``above`` and ``below`` say so."""

    least: float | None = None
    most: float | None = None
    above: bool = False
    below: bool = False

    def conditions(self) -> list[tuple[str, float]]:
        """Comparisons that a number has to pass, such as ``(">=", 0.0)``; NaN passes none."""
        bounds = ((">" if self.above else ">=", self.least), ("<" if self.below else "<=", self.most))
        return [(sign, bound) for sign, bound in bounds if bound is not None]

    def takes(self, x: float) -> bool:
        """Whether the number passes."""
        is_enough = self.least is None or (x > self.least if self.above else x >= self.least)
        return is_enough and (self.most is None or (x < self.most if self.below else x <= self.most))

    def __str__(self) -> str:
        words = {">": "more than", ">=": "at least", "<": "less than", "<=": "at most"}
        return " and ".join(f"{words[sign]} {bound:g}" for sign, bound in self.conditions())


_FRACTION = Range(0.0, 0.5, below=True)
_FACTOR = Range(0.0, 1.0, above=True)


@dataclass(frozen=True)
class Attribute:
    """What is known of an attribute beside its name, type and default.

    ``field`` is its name in ``VkvxParams``: None for its own, "" for an attribute that kernels do not get. ``choices``
    are the names that a string may be, in the order of their numbers there.
    """

    meaning: str
    within: Range | None
    choices: tuple[str, ...]
    field: str | None


def attribute(
    default: Any,
    meaning: str = "",
    *,
    within: Range | None = None,
    choices: tuple[str, ...] = (),
    field_name: str | None = None,
) -> Any:
    """A field of ``OperatorAttributes``."""
    return field(default=default, metadata={"attribute": Attribute(meaning, within, choices, field_name)})


def definitions(table: type[OperatorAttributes]) -> dict[str, Attribute]:
    """Each attribute of ``OperatorAttributes``, or of a table that extends it, by its name."""
    return {f.name: f.metadata["attribute"] for f in fields(table)}


_CHECKED: dict[type, list[tuple[str, Attribute]]] = {}
"""By table: attributes with choices or a range. Kept, as each call of the torch ops makes its attributes anew."""


@dataclass(frozen=True)
class OperatorAttributes:
    """Attributes of one node; defaults are those of a 1-bit cache.

    ``scale`` multiplies the scores (models use 1/sqrt(D)).
    """

    key_bits: int = attribute(1, "16 together with value_bits: nothing is packed")
    value_bits: int = attribute(1)
    group_size: int = attribute(128)
    quantizer: str = attribute("lloyd", choices=QUANTIZERS)
    quantile_alpha_key: float = attribute(0.2, "of VKVX_QUANTILE", within=_FRACTION)
    quantile_alpha_value: float = attribute(0.2, within=_FRACTION)
    shrink_key: float = attribute(0.5, "of VKVX_SHRINK", within=_FACTOR)
    shrink_value: float = attribute(0.3, within=_FACTOR)
    score_correction: str = attribute("expected", choices=SCORE_CORRECTIONS, field_name="correction")
    tau: float = attribute(3.0, "of VKVX_CORRECTION_AFFINE", within=Range(least=0.0))
    correction_limit: float = attribute(3.0, "of VKVX_CORRECTION_EXPECTED", within=Range(least=0.0, above=True))
    scale: float = attribute(1.0, "of the scores")
    rotary_dim: int = attribute(0, "channels that RoPE turns, for VKVX_SHAPED; 0: all", within=Range(least=0.0))
    rotary_interleaved: int = attribute(0, "1: RoPE turns neighbours, 0: halves", within=Range(0.0, 1.0))
    softcap: float = attribute(0.0, "bound of the scores; 0: none", within=Range(least=0.0))
    sliding_window: int = attribute(0, "positions that a token sees, itself included; 0: all", within=Range(least=0.0))
    visual_mask: str = attribute("causal", choices=VISUAL_MASKS)
    text_bits: int = attribute(16, "of text rows: 16, those of T, or 8")

    def __post_init__(self) -> None:
        """Refuse values that no implementation supports (OptionError)."""
        if (self.key_bits, self.value_bits) != (BASELINE_BITS, BASELINE_BITS):
            check_bits(self.key_bits)
            check_bits(self.value_bits)
        check_group_size(self.group_size)
        check_text_bits(self.text_bits, self.key_bits)
        if (checked := _CHECKED.get(type(self))) is None:
            known = definitions(type(self)).items()
            checked = _CHECKED[type(self)] = [(name, a) for name, a in known if a.choices or a.within]
        for name, definition in checked:
            value = getattr(self, name)
            if definition.choices and value not in definition.choices:
                words = name.replace("_", " ")
                raise OptionError(f"unknown {words} '{value}': give one of {', '.join(definition.choices)}")
            if definition.within is not None and not definition.within.takes(value):
                words = name.replace("_", " ")
                raise OptionError(f"{words} {value} is not supported: give {definition.within}")
        if self.sliding_window and self.score_correction == "affine":
            raise OptionError(
                "score correction 'affine' is not supported with a sliding window: give 'expected' or 'none'"
            )

    @property
    def needs_metrics(self) -> bool:
        """Whether the node has the inputs ``METRIC_INPUTS``."""
        return self.is_packed and self.quantizer in METRIC_QUANTIZERS

    @property
    def inputs(self) -> tuple[TensorDefinition, ...]:
        """Inputs of a node with these attributes, in order."""
        tensors = INPUTS if self.keeps_text else (_WITH_TEXT_8.get(t.name, t) for t in INPUTS)
        metrics = METRIC_INPUTS if self.needs_metrics else ()
        return (*tensors, *metrics, *(WINDOW_INPUTS if self.sliding_window else ()))

    @property
    def is_packed(self) -> bool:
        """False for the 16-bit baseline, which keeps visual tokens in the text rows."""
        return self.key_bits != BASELINE_BITS

    @property
    def keeps_text(self) -> bool:
        """Whether text rows hold keys and values as they are, not codes."""
        return self.text_bits == BASELINE_BITS

    def to_dict(self) -> dict[str, Any]:
        """Attribute name to value, in the order of the table; int, float and str as in the ONNX attributes."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def model_attributes(layout: CacheLayout) -> tuple[OperatorAttributes, ...]:
    """The operator's attributes in each attention layer of a model; one that reads another's cache has its bits."""
    info = layout.info
    packing = dict(zip(info.caches, layer_attributes(layout.quantization, 1.0), strict=True))
    return tuple(
        replace(
            packing[i if layer.keys_of is None else layer.keys_of],
            scale=layer.scale,
            rotary_dim=layer.rotary_dim,
            rotary_interleaved=int(layer.rotary_interleaved),
            softcap=layer.softcap,
            sliding_window=layer.sliding_window,
            visual_mask=layer.visual_mask,
        )
        for i, layer in enumerate(info.layers)
        if layer.linear is None
    )


def layer_attributes(quantization: Quantization, scale: float, **others: Any) -> tuple[OperatorAttributes, ...]:
    """Those of each cache of a quantisation; ``scale`` multiplies the scores, ``others`` are the same in all."""
    named = {f.name: getattr(quantization, f.name) for f in fields(quantization)}
    return tuple(
        OperatorAttributes(
            **{n: x[layer] if isinstance(x, tuple) else x for n, x in named.items()}, scale=scale, **others
        )
        for layer in range(len(quantization.key_bits))
    )
