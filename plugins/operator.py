"""Definition of the operator ``vkvx::VisualKVAttention``, version 1: the one table behind all forms of it.

The torch ops, the ONNX function and the table in ``docs/operator.md`` are built from or checked against it.
Nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vkvx.errors import OptionError
from vkvx.format import (
    BASELINE_BITS,
    CACHE_NAMES,
    METRIC_QUANTIZERS,
    OPERATOR_VERSION,
    SCORE_CORRECTIONS,
    check_bits,
    check_group_size,
    check_quantizer,
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
OUTPUTS = (TensorDefinition("output", "T", ("B", "Hq", "S", "D"), "attention output, 0 on padding"), *_CACHES)


@dataclass(frozen=True)
class OperatorAttributes:
    """Attributes of one node; defaults are those of a 1-bit cache.

    ``scale`` multiplies the scores (models use 1/sqrt(D)). ``softcap`` and ``sliding_window`` are reserved: 0 only.
    """

    key_bits: int = 1
    value_bits: int = 1
    group_size: int = 128
    quantizer: str = "lloyd"
    quantile_alpha_key: float = 0.2
    quantile_alpha_value: float = 0.2
    shrink_key: float = 0.5
    shrink_value: float = 0.3
    score_correction: str = "expected"
    tau: float = 3.0
    correction_limit: float = 3.0
    scale: float = 1.0
    softcap: float = 0.0
    sliding_window: int = 0

    def __post_init__(self) -> None:
        """Refuse values that no implementation supports (OptionError)."""
        if (self.key_bits, self.value_bits) != (BASELINE_BITS, BASELINE_BITS):
            check_bits(self.key_bits)
            check_bits(self.value_bits)
        check_group_size(self.group_size)
        check_quantizer(self.quantizer)
        if self.score_correction not in SCORE_CORRECTIONS:
            raise OptionError(
                f"unknown score correction '{self.score_correction}': give one of {', '.join(SCORE_CORRECTIONS)}"
            )
        if not all(0.0 <= a < 0.5 for a in (self.quantile_alpha_key, self.quantile_alpha_value)):
            raise OptionError("the quantile alpha must be at least 0 and less than 0.5")
        if not all(0.0 < g <= 1.0 for g in (self.shrink_key, self.shrink_value)):
            raise OptionError("the shrink factors must be greater than 0 and at most 1")
        if not self.tau >= 0.0:
            raise OptionError(f"tau {self.tau} is not supported: give a number of at least 0")
        if not self.correction_limit > 0.0:
            raise OptionError(f"correction limit {self.correction_limit} is not supported: give a number above 0")
        if self.softcap != 0.0 or self.sliding_window != 0:
            raise OptionError(
                "softcap and sliding_window are reserved in version 1 of the operator: only 0 is accepted"
            )

    @property
    def needs_metrics(self) -> bool:
        """Whether the node has the inputs ``METRIC_INPUTS``."""
        return self.is_packed and self.quantizer in METRIC_QUANTIZERS

    @property
    def inputs(self) -> tuple[TensorDefinition, ...]:
        """Inputs of a node with these attributes, in order."""
        return (*INPUTS, *METRIC_INPUTS) if self.needs_metrics else INPUTS

    @property
    def is_packed(self) -> bool:
        """False for the 16-bit baseline, which keeps visual tokens in the text rows."""
        return self.key_bits != BASELINE_BITS

    def to_dict(self) -> dict[str, Any]:
        """Attribute name to value, in the order of the table; int, float and str as in the ONNX attributes."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def layer_attributes(quantization: Quantization, scale: float) -> tuple[OperatorAttributes, ...]:
    """The operator's attributes in each layer; ``scale`` multiplies the scores."""
    q = quantization
    return tuple(
        OperatorAttributes(
            key_bits=q.key_bits[layer],
            value_bits=q.value_bits[layer],
            group_size=q.group_size,
            quantizer=q.quantizer,
            quantile_alpha_key=q.quantile_alpha_key[layer],
            quantile_alpha_value=q.quantile_alpha_value[layer],
            shrink_key=q.shrink_key[layer],
            shrink_value=q.shrink_value[layer],
            score_correction=q.score_correction,
            tau=q.tau,
            correction_limit=q.correction_limit,
            scale=scale,
        )
        for layer in range(len(q.key_bits))
    )
