"""How a user asks for the quantisation of a cache, and what it means for a model. Standard library only."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkvx.errors import OptionError
from vkvx.format import (
    BASELINE_BITS,
    BITS,
    METRIC_QUANTIZERS,
    QUANTILE_ALPHA,
    QUANTIZERS,
    SCORE_CORRECTIONS,
    SHRINK_KEY,
    SHRINK_VALUE,
    TEXT_BITS,
    check_group_size,
    typical_group_size,
)
from vkvx.manifest import Quantization

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

DEFAULT_QUANTIZER, DEFAULT_SCORE_CORRECTION = "shaped", "expected"
DEFAULT_TAU = DEFAULT_CORRECTION_LIMIT = 3.0
_DEFAULTS = {"quantizer": DEFAULT_QUANTIZER, "score_correction": DEFAULT_SCORE_CORRECTION}
_NUMBERS = {
    "quantile_alpha": ("quantizer", "quantile", "at least 0 and less than 0.5", 0.0, 0.5),
    "tau": ("score_correction", "affine", "at least 0", 0.0, math.inf),
    "correction_limit": ("score_correction", "expected", "greater than 0", math.nextafter(0.0, 1.0), math.inf),
}
"""Options of one method: the option that chooses it, its name there, what is allowed in words and as a range."""
_METHODS = (*_DEFAULTS, *_NUMBERS)
_OF_PACKED: dict[str, Any] = {"group_size": "auto", "text_bits": BASELINE_BITS, "metrics_file": None}
"""Options that, like those of a method, are for packed pictures only, and their defaults."""


def keyword(name: str) -> str:
    """How messages name an option to callers of Python and of the command line: ``key_bits= (--key-bits)``."""
    return f"{name}= (--{name.replace('_', '-')})"


_PER_LAYER = keyword("bits_per_layer")
_RANGE = re.compile(r"(?P<first>\d+)(?P<dash>-(?P<last>\d+)?)?:(?P<bits>\d+)")


@dataclass(frozen=True)
class QuantizationOptions:
    """What can be asked for of the visual cache.

    None means the default. An option that would have no effect (``tau`` without ``score_correction="affine"``, say) is
    refused, not ignored.

    Attributes:
        bits: of visual keys and values: 1, 2, 4 or 8; 16 is the unquantised baseline.
        key_bits, value_bits: in place of ``bits``.
        bits_per_layer: in place of these in some layers, such as ``"0-1:8,2-:1"``: a layer or range of layers, counted
            from 0, ends included, then the bits of its keys and values.
        group_size: visual tokens that share scale and offset, a multiple of 128; "auto" suits the model's pictures.
        quantizer: one of ``vkvx.format.QUANTIZERS``; shaped by default.
        quantile_alpha: tail cut off on each side by ``quantile``, at least 0, less than 0.5; it defaults by bits.
        score_correction: one of ``vkvx.format.SCORE_CORRECTIONS``; expected by default.
        tau: of ``affine``, at least 0; 3 by default.
        correction_limit: of ``expected``, greater than 0; 3 by default.
        text_bits: of cached text tokens: 16, the model's type, or 8. Not at 16 bits, where text rows hold pictures.
        metrics_file: what ``vkvx calibrate`` has recorded of the model, for ``shaped``; None: metrics of the weights.
    """

    bits: int = 1
    key_bits: int | None = None
    value_bits: int | None = None
    bits_per_layer: str | None = None
    group_size: str | int = "auto"
    quantizer: str | None = None
    quantile_alpha: float | None = None
    score_correction: str | None = None
    tau: float | None = None
    correction_limit: float | None = None
    text_bits: int = BASELINE_BITS
    metrics_file: str | Path | None = None

    def check(self) -> None:
        """Raise OptionError for what no model could be exported with."""
        self._check_bits()
        if self.text_bits not in TEXT_BITS:
            raise OptionError(f"{self.text_bits} bits are not supported for text; give {keyword('text_bits')} 16 or 8")
        if self.group_size != "auto":
            if not isinstance(self.group_size, int):
                raise OptionError(f"group size '{self.group_size}' is not supported; give 'auto' or a multiple of 128")
            check_group_size(self.group_size)
        for name, value, known in (
            ("quantizer", self.quantizer, QUANTIZERS),
            ("score_correction", self.score_correction, SCORE_CORRECTIONS),
        ):
            if value is not None and value not in known:
                raise OptionError(
                    f"unknown {name.replace('_', ' ')} '{value}'; give {keyword(name)} one of {', '.join(known)}"
                )
        for name, (_, _, allowed, low, high) in _NUMBERS.items():
            value = getattr(self, name)
            if value is not None and not low <= value < high:
                raise OptionError(f"{name.replace('_', ' ')} {value} is not supported; give {keyword(name)} {allowed}")
        for reason in self.without_effect().values():
            raise OptionError(reason)

    def with_bits(self, bits: int) -> Self:
        """The same options with this many bits throughout; those that have no effect at 16 are left out there."""
        other: dict[str, Any] = {**dict.fromkeys(_METHODS), **_OF_PACKED} if bits == BASELINE_BITS else {}
        return replace(self, bits=bits, key_bits=None, value_bits=None, bits_per_layer=None, **other)

    def without_effect(self) -> dict[str, str]:
        """The options given that would change nothing, and for each the line that says so."""
        given = {name for name in _METHODS if getattr(self, name) is not None}
        if self._pair == (BASELINE_BITS, BASELINE_BITS):
            idle = [name for name in _METHODS if name in given]
            idle += [name for name, default in _OF_PACKED.items() if getattr(self, name) != default]
            reasons = {name: f"{keyword(name)} has no effect at 16 bits; leave it out" for name in idle}
            if "text_bits" in reasons:
                packed = f"{keyword('text_bits')} {self.text_bits} is for text beside packed pictures"
                reasons["text_bits"] = f"{packed}; leave it out at 16 bits"
            return reasons
        reasons = {}
        for name, (of, needed, *_) in _NUMBERS.items():
            chosen = getattr(self, of) or _DEFAULTS[of]
            if name in given and chosen != needed:
                reasons[name] = f"{keyword(name)} has no effect with {chosen}; give {keyword(of)} {needed} as well"
        quantizer = self.quantizer or DEFAULT_QUANTIZER
        if self.metrics_file is not None and quantizer not in METRIC_QUANTIZERS:
            needed = f"give {keyword('quantizer')} {' or '.join(METRIC_QUANTIZERS)} as well"
            reasons["metrics_file"] = f"{keyword('metrics_file')} has no effect with {quantizer}; {needed}"
        return reasons

    def resolve(self, layers: int, typical_tokens: Sequence[int]) -> Quantization:
        """The quantisation of a model with so many layers, whose usual pictures have these tokens; OptionError."""
        self.check()
        bits = [self._pair] * layers
        if self.bits_per_layer is not None:
            overrides = parse_bits_per_layer(self.bits_per_layer, layers)
            bits = [(overrides[i], overrides[i]) if i in overrides else pair for i, pair in enumerate(bits)]
        key_bits, value_bits = (tuple(column) for column in zip(*bits, strict=True))
        alpha = None if self.quantile_alpha is None else float(self.quantile_alpha)
        # At 16 bits nothing is quantised; the numbers only fill the manifest.
        alphas = {**QUANTILE_ALPHA, BASELINE_BITS: 0.0} if alpha is None else dict.fromkeys(BITS, alpha)
        shrink_key, shrink_value = ({**table, BASELINE_BITS: 1.0} for table in (SHRINK_KEY, SHRINK_VALUE))
        size = typical_group_size(typical_tokens) if self.group_size == "auto" else int(self.group_size)
        return Quantization(
            key_bits=key_bits,
            value_bits=value_bits,
            group_size=size,
            quantizer=self.quantizer or DEFAULT_QUANTIZER,
            quantile_alpha_key=tuple(alphas[b] for b in key_bits),
            quantile_alpha_value=tuple(alphas[b] for b in value_bits),
            shrink_key=tuple(shrink_key[b] for b in key_bits),
            shrink_value=tuple(shrink_value[b] for b in value_bits),
            score_correction=self.score_correction or DEFAULT_SCORE_CORRECTION,
            tau=DEFAULT_TAU if self.tau is None else float(self.tau),
            correction_limit=DEFAULT_CORRECTION_LIMIT
            if self.correction_limit is None
            else float(self.correction_limit),
            text_bits=self.text_bits,
        )

    @property
    def _pair(self) -> tuple[int, int]:
        """Key and value bits of a layer that ``bits_per_layer`` does not name."""
        return (
            self.bits if self.key_bits is None else self.key_bits,
            self.bits if self.value_bits is None else self.value_bits,
        )

    def _check_bits(self) -> None:
        for name, bits in (("bits", self.bits), ("key_bits", self.key_bits), ("value_bits", self.value_bits)):
            if bits is not None and bits not in (*BITS, BASELINE_BITS):
                raise OptionError(
                    f"{bits} bits are not supported; give {keyword(name)} 1, 2, 4 or 8, or bits= (--bits) 16"
                )
        if (BASELINE_BITS in self._pair) != (self._pair == (BASELINE_BITS, BASELINE_BITS)):
            raise OptionError("16 bits are for the whole model, not for keys or values alone; give bits= (--bits) 16")
        if self.bits_per_layer is not None:
            if BASELINE_BITS in self._pair:
                raise OptionError(f"16 bits are for the whole model; leave out {_PER_LAYER}, or bits= (--bits) 16")
            parse_bits_per_layer(self.bits_per_layer)


def parse_bits_per_layer(text: str, layers: int | None = None) -> dict[int, int]:
    """Read ``"0-1:8,2-:1"``: comma-separated LAYER:BITS, FIRST-LAST:BITS or FIRST-:BITS. Returns layer to bits.

    Raises OptionError for what cannot be read, bits other than 1, 2, 4 and 8, layers named twice, and layers that the
    model lacks. With ``layers`` unknown only the grammar is checked and the result is empty.
    """
    result: dict[int, int] = {}
    for item in text.split(","):
        match = _RANGE.fullmatch(item.strip())
        if match is None:
            raise OptionError(f"'{item}' in {_PER_LAYER} is not understood; write LAYERS:BITS, such as 0-1:8,2-:1")
        bits, first = int(match["bits"]), int(match["first"])
        if bits not in BITS:
            hint = "; 16 bits are for the whole model: bits= (--bits)" if bits == BASELINE_BITS else ""
            raise OptionError(f"{bits} bits in {_PER_LAYER} are not supported; give 1, 2, 4 or 8{hint}")
        last = int(match["last"]) if match["last"] else None
        if last is not None and last < first:
            raise OptionError(f"'{item}' in {_PER_LAYER} ends before it starts; write FIRST-LAST:BITS")
        if layers is None:
            continue
        if last is None:
            last = max(first, layers - 1) if match["dash"] else first
        if last >= layers:
            raise OptionError(f"{_PER_LAYER} names layer {last}; the model has layers 0 to {layers - 1}")
        for layer in range(first, last + 1):
            if layer in result:
                raise OptionError(f"{_PER_LAYER} names layer {layer} twice; name each layer once")
            result[layer] = bits
    return result
