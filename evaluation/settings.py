"""Which ways to quantise the cache are evaluated: values of options, their cross product, and names for people."""

from __future__ import annotations

import itertools
import typing
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vkvx.errors import OptionError
from vkvx.export.options import ExportOptions
from vkvx.format import BASELINE_BITS
from vkvx.manifest import Quantization
from vkvx.options import keyword

_NOT_OF_THE_CACHE = (
    *("dtype", "opset", "min_pixels", "max_pixels", "force", "cache_dir", "revision", "trust_remote_code"),
)
FIELDS = tuple(entry.name for entry in fields(ExportOptions) if entry.name not in _NOT_OF_THE_CACHE)
"""The fields of ExportOptions that say how the cache is quantised."""
_DEFAULTS = {entry.name: entry.default for entry in fields(ExportOptions)}
_KINDS = typing.get_type_hints(ExportOptions)
DEFAULT_BITS = (BASELINE_BITS, 4, 2, 1)
"""The settings where none are given."""


@dataclass(frozen=True)
class Setting:
    """One way to quantise the cache, for a certain model. The ``reference`` has 16 bits."""

    name: str
    options: ExportOptions
    quantization: Quantization
    reference: bool

    def to_json(self) -> dict[str, Any]:
        """The options that are not at their default, and ``bits``."""
        found = {name: getattr(self.options, name) for name in FIELDS}
        given = {name: value for name, value in found.items() if name == "bits" or value != _DEFAULTS[name]}
        return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


def option_name(field: str) -> str:
    """How a field is written on the command line."""
    return f"--{field.replace('_', '-')}"


def parse_value(field: str, text: str) -> Any:
    """The value that a text means for a field of ExportOptions. Raises OptionError if it is of another type."""
    kinds = typing.get_args(_KINDS[field]) or (_KINDS[field],)
    text = text.strip()
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    if str in kinds and text:
        return text
    what = "a value" if str in kinds else "a number" if float in kinds else "an integer"
    raise OptionError(f"{option_name(field)} '{text}' is not understood; give {what}")


def parse_values(field: str, text: str) -> list[Any]:
    """The values of a comma-separated list."""
    return [parse_value(field, item) for item in text.split(",")]


def parse_setting(text: str) -> ExportOptions:
    """Read ``"bits=1,quantizer=shrink"``; a comma inside a value, as in ``bits-per-layer=0:8,1-:2``, is part of it.

    Raises OptionError for unknown names, values that are not supported, and options without effect.
    """
    given: dict[str, str] = {}
    name = ""
    for item in text.split(","):
        left, equals, right = item.partition("=")
        if not equals and name:
            given[name] += f",{item}"
            continue
        name = left.strip().replace("-", "_")
        if not equals or name not in FIELDS:
            known = ", ".join(field.replace("_", "-") for field in FIELDS)
            raise OptionError(f"'{item}' in --setting is not understood; write NAME=VALUE,... with names among {known}")
        if name in given:
            raise OptionError(f"--setting '{text}' gives {left.strip()} twice; give it once")
        given[name] = right
    options, idle = _without_idle({field: parse_value(field, value) for field, value in given.items()})
    for reason in idle.values():
        raise OptionError(f"--setting '{text}': {reason}")
    return options


def product(values: Mapping[str, Sequence[Any]]) -> list[ExportOptions]:
    """All combinations of the values of some fields, each once.

    What has no effect in a combination is left out of it (a quantiser at 16 bits, say), so that some combinations
    become one. Raises OptionError for a value that has no effect in any of them, and for unsupported ones.
    """
    values = dict(values)
    if not {"bits", "key_bits", "value_bits", "bits_per_layer"} & set(values):
        values = {"bits": DEFAULT_BITS, **values}
    result: list[ExportOptions] = []
    used: dict[str, list[Any]] = {name: [] for name in values}
    reasons: dict[tuple[str, Any], str] = {}
    for combination in itertools.product(*values.values()):
        given = dict(zip(values, combination, strict=True))
        options, idle = _without_idle(given)
        for name, value in given.items():
            if name in idle and given.get("bits") == BASELINE_BITS:
                reasons.setdefault((name, value), idle[name])
            elif name in idle:  # tells more than that nothing has an effect at 16 bits
                reasons[name, value] = idle[name]
            else:
                used[name].append(value)
        if options not in result:
            result.append(options)
    for name, listed in values.items():
        for value in listed:
            if value not in used[name]:
                raise OptionError(reasons[name, value])
    return result


def _without_idle(given: dict[str, Any]) -> tuple[ExportOptions, dict[str, str]]:
    """Options without those that have no effect, and the reasons for these. Raises OptionError for unsupported ones."""
    idle: dict[str, str] = {}
    if given.get("bits") == BASELINE_BITS:
        idle = {
            name: f"{keyword(name)} has no effect at {BASELINE_BITS} bits; leave it out"
            for name in given
            if name != "bits"
        }
    elif {"bits", "key_bits", "value_bits"} <= set(given):
        idle["bits"] = "bits= (--bits) has no effect where key_bits= and value_bits= are given; leave it out"
    options = ExportOptions(**{name: value for name, value in given.items() if name not in idle})
    if found := options.without_effect():
        idle |= found
        options = ExportOptions(**{name: value for name, value in given.items() if name not in idle})
    options.check()
    return options, idle


def settle(options: Iterable[ExportOptions], layers: int, typical_tokens: Sequence[int]) -> list[Setting]:
    """The settings of a model with this many layers and such pictures: the reference first, no two that are alike.

    Raises OptionError for what the model cannot have, such as bits of a layer that it lacks.
    """
    found: dict[tuple[Quantization, str | Path | None], Setting] = {}
    for entry in (ExportOptions(bits=BASELINE_BITS), *options):
        quantization = entry.resolve(layers, typical_tokens)
        reference = BASELINE_BITS in quantization.key_bits
        if not (reference and found):
            name = setting_name(entry, quantization)
            found.setdefault((quantization, entry.metrics_file), Setting(name, entry, quantization, reference))
    return list(found.values())


def setting_name(options: ExportOptions, quantization: Quantization) -> str:
    """A name that no other setting has: ``1 bit, shaped, expected``, with what else is not at its default."""
    if BASELINE_BITS in quantization.key_bits:
        return _bits(BASELINE_BITS)
    pairs = list(zip(quantization.key_bits, quantization.value_bits, strict=True))
    parts = []
    for layers, (key, value) in _runs(pairs):
        bits = _bits(key) if key == value else f"keys {_bits(key)}, values {_bits(value)}"
        parts.append(bits if len(set(pairs)) == 1 else f"{bits} in {layers}")
    parts += [quantization.quantizer, quantization.score_correction]
    said = {"bits", "key_bits", "value_bits", "bits_per_layer", "quantizer", "score_correction"}
    for name in FIELDS:
        value = getattr(options, name)
        if name not in said and value != _DEFAULTS[name]:
            parts.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(parts)


def options_of(quantization: Quantization, typical_tokens: Sequence[int]) -> ExportOptions:
    """Options that give this quantisation: for a bundle, whose manifest holds nothing else."""
    pairs = list(zip(quantization.key_bits, quantization.value_bits, strict=True))
    if BASELINE_BITS in quantization.key_bits:
        return ExportOptions(bits=BASELINE_BITS)
    # Layers that are named have the same bits for keys and values, so a pair that differs is the base.
    key, value = next((pair for pair in pairs if pair[0] != pair[1]), Counter(pairs).most_common(1)[0][0])
    given: dict[str, Any] = {"bits": key} if key == value else {"key_bits": key, "value_bits": value}
    others = [f"{layers}:{pair[0]}" for layers, pair in _runs(pairs) if pair != (key, value)]
    if others:
        given["bits_per_layer"] = ",".join(others)
    plain = ExportOptions(**given).resolve(len(pairs), typical_tokens)
    for name in FIELDS:
        if hasattr(quantization, name) and getattr(quantization, name) != getattr(plain, name):
            given[name] = getattr(quantization, name)
    alphas = {*quantization.quantile_alpha_key, *quantization.quantile_alpha_value}
    options = ExportOptions(**given)
    if options.resolve(len(pairs), typical_tokens) != quantization and len(alphas) == 1:
        options = ExportOptions(**given, quantile_alpha=alphas.pop())
    return options


def _runs(pairs: Sequence[tuple[int, int]]) -> list[tuple[str, tuple[int, int]]]:
    """Equal neighbours as one entry: the layers as ``"0-2"`` or ``"3"``, and their pair."""
    found, first = [], 0
    for pair, run in itertools.groupby(pairs):
        last = first + len(list(run)) - 1
        found.append((str(first) if first == last else f"{first}-{last}", pair))
        first = last + 1
    return found


def _bits(count: int) -> str:
    return f"{count} bit" if count == 1 else f"{count} bits"
