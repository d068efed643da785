"""A stress set with known answers for a quantised visual cache: every method, run through the real operator.

A *method* is a quantiser, a score correction and a number of bits. Each case of ``vkvx.evaluation.stress_cases`` makes
tensors whose exact attention is known, fills a cache with them by calls of ``torch.ops.vkvx.visual_kv_attention``, and
judges decode steps over it by one number against one limit. The limits follow from the mathematics or from what a user
needs, which each case says; nothing is required of a method beyond them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vkvx.plugins.torch_op  # noqa: F401  (registers the operator)
from vkvx.errors import OptionError
from vkvx.export.options import ExportOptions
from vkvx.format import BITS, CACHE_NAMES, QUANTIZERS, SCORE_CORRECTIONS
from vkvx.plugins.operator import INPUTS, OperatorAttributes, layer_attributes

GROUP_SIZE = 256
"""Visual tokens a group in all cases: what an export gives models whose pictures vary in size."""


@dataclass(frozen=True)
class Method:
    """One way to quantise the cache; names as in ``vkvx.format``."""

    quantizer: str
    score_correction: str
    bits: int

    def attributes(self, scale: float) -> OperatorAttributes:
        """The operator's attributes as an export with these options sets them; ``scale`` multiplies the scores."""
        options = ExportOptions(
            bits=self.bits,
            quantizer=self.quantizer,
            score_correction=self.score_correction,
            group_size=GROUP_SIZE,
        )
        return layer_attributes(options.resolve(1, (GROUP_SIZE,)), scale)[0]


@dataclass(frozen=True)
class Sizes:
    """How large the cases are.

    Attributes:
        needle_tokens: visual tokens among which a needle hides.
        text_tokens: text tokens after a picture.
        steps: decode steps over one cache.
        heads: independent draws in the cases that have more than one.
    """

    needle_tokens: int = 10_000
    text_tokens: int = 4_096
    steps: int = 4_096
    heads: int = 2


FULL = Sizes()
REDUCED = Sizes(needle_tokens=1_500, text_tokens=1_024, steps=64, heads=1)
"""For a quick check; harder or easier in places, so figures of the two sizes are not to be compared."""


class StressOutcome(NamedTuple):
    """What a case found: ``figure`` (its unit is the case's), and whether it keeps to the case's limit."""

    figure: float
    passed: bool


class StressSetting(NamedTuple):
    """What a case is to run: a method, how large, and where."""

    method: Method
    sizes: Sizes
    device: torch.device


class Sequences:
    """B sequences in one cache of the operator, in slots 0 to B - 1, each with the same number of tokens.

    Args:
        setting: method and device.
        rows: sequences B.
        kv_heads, head_dim: heads and channels; scores are multiplied by ``1 / sqrt(head_dim)``.
        visual_tokens, text_tokens: room for so many; each picture is padded to whole groups. One row more is kept for
            the step of ``ask``.
        dtype: of queries, keys, values and text rows.

    Attributes:
        finite: [B] bool, every output so far of the row was finite.
        caches: the cache tensors by name, as ``docs/format.md`` describes them.
    """

    def __init__(
        self,
        setting: StressSetting,
        kv_heads: int,
        head_dim: int,
        visual_tokens: int,
        text_tokens: int = 0,
        *,
        rows: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.attributes = setting.method.attributes(head_dim**-0.5)
        self.device, self.dtype = setting.device, dtype
        self.rows, self.kv_heads, self.head_dim = rows, kv_heads, head_dim
        groups = -(-visual_tokens // GROUP_SIZE)
        sizes = {
            "Bc": rows,
            "Hkv": kv_heads,
            "D": head_dim,
            "G": groups,
            "C": groups * GROUP_SIZE,
            "N": text_tokens + 1,
        }
        sizes.update(bk=self.attributes.key_bits, bv=self.attributes.value_bits)
        self.caches = {t.name: self._poison(t.dtype, t.shape, sizes) for t in INPUTS if t.name in CACHE_NAMES}
        self.visual_count = torch.zeros(rows, groups, dtype=torch.int32, device=self.device)
        self.text_count = torch.zeros(rows, dtype=torch.int32, device=self.device)
        self.finite = torch.ones(rows, dtype=torch.bool, device=self.device)

    def picture(self, key: Tensor, value: Tensor, groups_a_call: int = 4) -> None:
        """Append a picture, keys and values [B, Hkv, n, D], by calls that are cut where groups end."""
        for part_key, part_value in zip(*(x.split(groups_a_call * GROUP_SIZE, 2) for x in (key, value)), strict=True):
            tokens = part_key.shape[2]
            entries = -(-tokens // GROUP_SIZE) * GROUP_SIZE
            index = torch.arange(entries, dtype=torch.int32, device=self.device)
            index = torch.where(index < tokens, index, -1)
            self._call(part_key, part_key, part_value, visual=index, text=index[:0], keep=True)
            counts = (index >= 0).unflatten(0, (-1, GROUP_SIZE)).sum(1, dtype=torch.int32)
            first = int((self.visual_count[0] > 0).sum())
            self.visual_count[:, first : first + len(counts)] = counts

    def text(self, key: Tensor, value: Tensor, tokens_a_call: int = 1024) -> None:
        """Append text tokens, keys and values [B, Hkv, n, D]."""
        for part_key, part_value in zip(*(x.split(tokens_a_call, 2) for x in (key, value)), strict=True):
            self.step(part_key, part_key, part_value)

    def step(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Append S text tokens and return their attention output: query [B, Hq, S, D], key and value [B, Hkv, S, D]."""
        index = torch.arange(key.shape[2], dtype=torch.int32, device=self.device)
        output = self._call(query, key, value, visual=index[:0], text=index, keep=True)
        self.text_count += key.shape[2]
        return output

    def ask(self, query: Tensor, own_key: Tensor | None = None) -> Tensor:
        """Output of one decode step for each of n queries [B, n, D]: [B, n, D] FP32; the cache stays as it was.

        Queries are heads of one call with ``q_len`` 1. Query i asks KV head ``i // (n / Hkv)``. The step's own token
        has the key ``own_key`` [D], zeros by default, and a value of zeros.
        """
        query = query[:, :, None].to(self.device)
        nothing = torch.zeros(self.rows, self.kv_heads, 1, self.head_dim, device=self.device)
        key = nothing if own_key is None else own_key.to(self.device).expand_as(nothing)
        index = torch.zeros(1, dtype=torch.int32, device=self.device)
        output = self._call(query, key, nothing, visual=index[:0], text=index, keep=False)
        return output[:, :, 0].float()

    def _call(self, query: Tensor, key: Tensor, value: Tensor, visual: Tensor, text: Tensor, *, keep: bool) -> Tensor:
        """Output of one call for all rows; ``keep`` updates the cache, in place."""
        own = {"query": query, "key": key, "value": value}
        named = {name: x.to(self.device, self.dtype) for name, x in own.items()}
        named.update(visual_index=visual.expand(self.rows, -1), text_index=text.expand(self.rows, -1), **self.caches)
        named["slot"] = torch.arange(self.rows, dtype=torch.int32, device=self.device)
        named.update(visual_count=self.visual_count, text_count=self.text_count, **self._metrics())
        arguments, attributes = [named[t.name] for t in self.attributes.inputs], self.attributes.to_dict()
        if keep:
            output = torch.ops.vkvx.visual_kv_attention_(*arguments, **attributes)
        else:
            output = torch.ops.vkvx.visual_kv_attention(*arguments, **attributes)[0]
        self.finite &= output.isfinite().flatten(1).all(1)
        return output

    def _metrics(self) -> dict[str, Tensor]:
        """Plain distance: the queries and values of the cases come from no weights, and no direction is preferred."""
        if not self.attributes.needs_metrics:
            return {}
        one = torch.eye(self.head_dim, dtype=torch.float16, device=self.device).expand(self.kv_heads, -1, -1)
        still = torch.ones(self.rows, 2, self.head_dim, device=self.device)
        still[:, 1] = 0.0
        return {"key_metric": one, "value_metric": one, "rotation": still}

    def _poison(self, dtype: str, shape: tuple[str, ...], sizes: dict[str, int]) -> Tensor:
        """A cache tensor whose unused part would spoil any result that reads it: NaN, or all bits set."""
        dims = []
        for symbol in shape:
            name, _, divisor = symbol.partition("/")
            dims.append((int(name) if name.isdigit() else sizes[name]) // int(divisor or 1))
        kind = self.dtype if dtype == "T" else getattr(torch, dtype)
        return torch.full(dims, float("nan") if kind.is_floating_point else -1, dtype=kind, device=self.device)


def exact(query: Tensor, key: Tensor, value: Tensor, own_key: Tensor | None = None) -> Tensor:
    """Attention at full precision, with the step's own token as in ``Sequences.ask``: the same shapes, float64.

    Args:
        query: [B, n, D]; query i asks KV head ``i // (n / Hkv)``.
        key, value: [B, Hkv, tokens, D], all that the cache holds.
    """
    rows, heads, _, channels = key.shape
    q = query.double().reshape(rows, heads, -1, channels)
    key, value = (torch.nn.functional.pad(x.double(), (0, 0, 0, 1)) for x in (key, value))
    if own_key is not None:
        key[:, :, -1] = own_key
    weights = (q @ key.transpose(-1, -2) * channels**-0.5).softmax(-1)
    return (weights @ value).flatten(1, 2)


Case = Callable[[StressSetting], StressOutcome]


def methods(bits: Iterable[int] = BITS) -> list[Method]:
    """Every quantiser with every score correction at these bits; OptionError for bits that do not exist."""
    chosen = tuple(bits)
    for b in chosen:
        if b not in BITS:
            raise OptionError(f"{b} bits are not in the stress set; give some of {', '.join(map(str, BITS))}")
    return [Method(q, c, b) for b, q, c in itertools.product(chosen, QUANTIZERS, SCORE_CORRECTIONS)]


def run_stress(
    chosen: Iterable[Method], cases: dict[str, Case], sizes: Sizes = FULL, device: str = "cpu"
) -> Iterator[tuple[Method, dict[str, StressOutcome]]]:
    """Run cases by name for each method, one method after the other."""
    for method in chosen:
        setting = StressSetting(method, sizes, torch.device(device))
        with torch.inference_mode():
            yield method, {name: case(setting) for name, case in cases.items()}


def table(results: Iterable[tuple[Method, dict[str, StressOutcome]]]) -> list[dict[str, Any]]:
    """Rows for people: one a method, with verdict and figure of each case, and a last one with the sums."""
    rows: list[dict[str, Any]] = []
    passes: dict[str, int] = {}
    for method, outcomes in results:
        cells = {}
        for name, outcome in outcomes.items():
            cells[name] = f"{'pass' if outcome.passed else 'FAIL'} {outcome.figure:.2g}"
            passes[name] = passes.get(name, 0) + outcome.passed
        total = sum(outcome.passed for outcome in outcomes.values())
        rows.append(
            {
                "quantizer": method.quantizer,
                "score_correction": method.score_correction,
                "bits": method.bits,
                **cells,
                "passed": f"{total} of {len(outcomes)}",
            }
        )
    count = len(rows)
    sums = {name: f"{number} of {count}" for name, number in passes.items()}
    whole = f"{sum(passes.values())} of {count * len(passes)}"
    rows.append({"quantizer": "all", "score_correction": "", "bits": "", **sums, "passed": whole})
    return rows
