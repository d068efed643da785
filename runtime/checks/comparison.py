"""Feed two backends the same calls, and compare what they give and hold, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from vkvx.format import BASELINE_BITS, STATE_NAMES
from vkvx.runtime.backends.base import Backend
from vkvx.runtime.backends.registry import ENGINE_BACKENDS
from vkvx.runtime.calls import Call, build_call, place_embeds
from vkvx.runtime.checks.call_files import CallFiles
from vkvx.runtime.checks.packed import Finding, Packed, compare
from vkvx.runtime.checks.report import VISION_OUTPUT, Check, Report
from vkvx.runtime.checks.unpack import unpack_keys, unpack_text, unpack_values
from vkvx.runtime.sessions.processor import Prepared

if TYPE_CHECKING:
    from vkvx.runtime.backends.torch.backend import TorchBackend
    from vkvx.runtime.checks.recorded import Recorded


@dataclass(frozen=True)
class Tolerance:
    """What may differ, by the model's dtype, relative to the range of the reference tensor.

    ``cache`` is that of keys and values: text rows are compared with it, and what is packed is judged by it
    (:mod:`vkvx.runtime.checks.packed`). ``codes`` and ``outliers`` are for engines alone, see ``FLIPS``: the share of
    codes that may differ, by bits (at 8 bits a difference of one step does not count), and of params outside ``cache``.
    """

    vision: float
    logits: float
    cache: float
    outliers: float
    codes: dict[int, float]


TOLERANCES = {
    "float32": Tolerance(1e-4, 1e-5, 1e-3, 1e-3, {1: 1e-4, 2: 1e-4, 4: 1e-3, 8: 1e-4}),
    "float16": Tolerance(1e-2, 2e-3, 5e-3, 1e-2, {1: 1e-3, 2: 2e-3, 4: 1e-2, 8: 1e-3}),
    "bfloat16": Tolerance(5e-2, 2e-2, 4e-2, 5e-2, {1: 1e-2, 2: 1e-2, 4: 5e-2, 8: 1e-2}),
}
"""torch rounds FP16 and BF16 after every operator; onnxruntime on a CPU does so only where tensors are stored."""
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Logits may differ by twice this times the size of scores, too: each side rounds a score by this share of it, and that
changes its attention weight by as much as it changes the score. Those of different scores are independent, so what
counts is their root mean square, where it is largest. Engines do without: nobody sees their scores."""
FLIPS = {"shaped": (20 / 64, 0.25 / 64)}
"""By quantiser, for each channel of a head: how many times the share of codes may differ, and which share of params.

Engines are compared with onnxruntime, which does not show its keys. So codes are counted: those that rounding puts on
the other side of a border. With ``shaped`` such a code changes codes of the channels after it, offsets and RMS."""
MOST_OUTLIERS = 0.5
"""Half of the params are within their tolerance in any case."""
LAYER_CODES = 5
"""The keys or values of one layer may have so many times the share of all: it has few channels."""

ENGINE_LOGITS = 2.5
"""For engines: times ``logits``. They round to the model's type after every product, onnxruntime on a CPU does not;
engines of TensorRT 8.6 were 1.22 times ``logits`` apart from it at most, at 1 to 16 bits."""


class Comparison:
    """Feeds both sides the same calls in slot 1 and collects the checks."""

    SLOT = 1

    def __init__(
        self,
        report: Report,
        reference: Backend,
        backend: Backend,
        atol: float | None,
        rtol: float | None,
        files: CallFiles | None = None,
    ) -> None:
        self.report, self.reference, self.backend = report, reference, backend
        self._step = backend.step if files is None else files.step
        self.manifest = backend.manifest
        self.tolerances = TOLERANCES[report.dtype]
        if report.backend in ENGINE_BACKENDS:
            self.tolerances = replace(self.tolerances, logits=ENGINE_LOGITS * self.tolerances.logits)
        self.recorded: Recorded | None = None
        self.score_rounding = 0.0
        self.override = None if atol is None and rtol is None else (atol or 0.0, rtol or 0.0)

    def vision(self, phase: str, turn: Prepared) -> np.ndarray:
        """Compare the picture embeddings; returns those of the bundle."""
        embeds, expected = (
            np.concatenate([np.asarray(side.encode(inputs)) for inputs in turn.vision_calls])
            for side in (self.backend, self.reference)
        )
        self._close(VISION_OUTPUT, phase, None, embeds, expected, self.tolerances.vision)
        return embeds

    def step(self, phase: str, ids: np.ndarray, turn: Prepared | None = None, embeds: np.ndarray | None = None) -> int:
        """Run one call on both sides and compare the logits; returns the reference's likeliest token."""
        quantization, model = self.manifest.quantization, self.manifest.model
        row = self.reference.cache.row(self.SLOT, ids, *((turn.picture_lengths, turn.positions) if turn else ()))
        call = build_call([row], group_size=quantization.group_size, image_token_id=model.image_token_id)
        visual = None if embeds is None else place_embeds(call, embeds)
        with self._recording(call):
            expected = self.reference.step(call, visual)
        actual = self._step(call, visual)
        if self.recorded is not None:
            self.score_rounding = 2 * ROUNDING[self.report.dtype] * self.recorded.scores
        self._close("logits", phase, None, actual, expected, self.tolerances.logits + self.score_rounding)
        return int(expected[0].argmax())

    @contextmanager
    def _recording(self, call: Call) -> Iterator[None]:
        """Keep what the reference computes for new pictures, if it is torch."""
        self.recorded = None
        if self.report.backend in ENGINE_BACKENDS or not call.visual_index.size:
            yield
            return
        from vkvx.runtime.checks.recorded import recorded

        reference = cast("TorchBackend", self.reference)
        cache = reference.cache
        filled = cache.group_count(self.SLOT), int(cache.text_count[self.SLOT])
        with recorded(reference, call, *filled) as self.recorded:
            yield

    def caches(self, phase: str) -> None:
        """Compare what lies below the counts, layer by layer."""
        ours, theirs = self.backend.cache, self.reference.cache
        for name in ("visual_count", "text_count"):
            different = int(np.count_nonzero(getattr(ours, name) != getattr(theirs, name)))
            self._add(name, phase, None, different, 0, "counts that differ")
        groups, rows = theirs.group_count(self.SLOT), int(theirs.text_count[self.SLOT])
        for layer in self.manifest.model.linear_layers:
            for name in STATE_NAMES:
                actual, expected = (c.read(f"{layer}.{name}")[self.SLOT] for c in (ours, theirs))
                self._close(name, phase, layer, actual, expected, self.tolerances.cache)
        for layer in self.manifest.model.caches:
            for kind in ("key", "value"):
                if groups and self.report.backend not in ENGINE_BACKENDS:
                    self._packed(layer, kind, phase, groups)
                self._text(layer, kind, phase, rows)
        if groups and self.report.backend in ENGINE_BACKENDS:
            self._count_codes(phase, groups)

    def share_codes(self, phase: str) -> None:
        """Compare text rows of 8 bits, and let the bundle go on from those of the reference."""
        if self.manifest.quantization.text_bits == BASELINE_BITS:
            return
        rows = int(self.reference.cache.text_count[self.SLOT])
        for layer in self.manifest.model.caches:
            for kind in ("key", "value"):
                self._text(layer, kind, phase, rows)
        self.backend.cache.load(self.reference.cache)

    def _text(self, layer: int, kind: str, phase: str, rows: int) -> None:
        """Compare text rows. At 8 bits a code may fall to either side: two rows are up to a step apart, too, and what
        is there is within half a step of what the reference computed."""
        name, sides = f"text_{kind}", (self.backend.cache, self.reference.cache)
        actual, expected = (cache.read(f"{layer}.{name}")[self.SLOT, :, :rows] for cache in sides)
        if self.manifest.quantization.text_bits == BASELINE_BITS:
            self._close(name, phase, layer, actual, expected, self.tolerances.cache)
            return
        (ours, step), (theirs, other) = unpack_text(actual), unpack_text(expected)
        self._close_codes(name, phase, layer, ours, theirs, np.maximum(step, other))
        if self.recorded is not None:
            x = self.recorded.text(layer, kind)
            new = slice(self.recorded.first_row, self.recorded.first_row + x.shape[1])
            self._close_codes(f"{name} rounding", phase, layer, ours[:, new], x, step[:, new] / 2)

    def _close_codes(
        self, name: str, phase: str, layer: int, actual: np.ndarray, expected: np.ndarray, room: np.ndarray
    ) -> None:
        """Compare what codes stand for, [Hkv, rows, D], each row but for its ``room`` [Hkv, rows, 1]."""
        spread = float(np.ptp(expected)) if expected.size else 0.0
        atol, rtol = self.override or (0.0, self.tolerances.cache)
        beyond = float((np.abs(actual - expected) - room).max(initial=0.0))
        detail = f"beyond the steps of codes, range {spread:.4g}"
        self._add(name, phase, layer, beyond, atol + rtol * spread, detail)

    def _packed(self, layer: int, kind: str, phase: str, groups: int) -> None:
        """Hold new groups against what the reference computed; older ones, which both sides share, have not changed."""
        quantization, recorded = self.manifest.quantization, self.recorded
        sides = [self._groups(side, layer, kind) for side in (self.backend, self.reference)]
        old = groups if recorded is None else recorded.first
        changed = sum(
            not np.array_equal(getattr(mine, name), getattr(other, name))
            for mine, other in zip(*(side[:old] for side in sides), strict=True)
            for name in ("codes", "scale", "offset", "rms")
        )
        if old:
            self._add(f"visual_{kind}", phase, layer, changed, 0, "parts of earlier pictures that changed")
        if recorded is None:
            return
        x, metric = recorded.layer(layer, kind)
        bits = quantization.key_bits if kind == "key" else quantization.value_bits
        spread = float(np.ptp(x))
        atol, rtol = self.override or (0.0, self.tolerances.cache)
        options: dict[str, Any] = {
            "bits": bits[self.manifest.model.caches.index(layer)],
            "quantizer": quantization.quantizer,
            "off": atol + rtol * spread,
            "metric": metric,
        }
        worst: dict[str, Finding] = {}
        for number, tokens in enumerate(recorded.tokens, start=old):
            for finding in compare(x[:, tokens], sides[0][number], sides[1][number], **options):
                known = worst.get(finding.name)
                if known is None or not finding.difference - finding.tolerance <= known.difference - known.tolerance:
                    worst[finding.name] = finding
        for name, finding in worst.items():
            detail = f"{finding.detail}, range {spread:.4g}"
            self._add(f"visual_{kind}{name}", phase, layer, finding.difference, finding.tolerance, detail)

    def _groups(self, backend: Backend, layer: int, kind: str) -> list[Packed]:
        """The groups of the slot, without padding."""
        size, counts = self.manifest.quantization.group_size, self.reference.cache.visual_count[self.SLOT]
        unpack = unpack_keys if kind == "key" else unpack_values
        codes = unpack(backend.cache.read(f"{layer}.visual_{kind}")[self.SLOT])
        params = backend.cache.read(f"{layer}.visual_{kind}_params")[self.SLOT].astype(np.float64)
        return [
            Packed(
                codes[:, i * size : i * size + n],
                params[:, i, 0],
                params[:, i, 1],
                params[:, i, 2] if kind == "key" else None,
            )
            for i, n in enumerate(counts[counts > 0].tolist())
        ]

    def _count_codes(self, phase: str, groups: int) -> None:
        """What engines hold against what onnxruntime holds."""
        shares: dict[int, list[float]] = {}
        for layer in self.manifest.model.caches:
            for kind in ("key", "value"):
                bits, share = self._codes(layer, kind, phase)
                shares.setdefault(bits, []).append(share)
                name = f"visual_{kind}_params"
                sides = (self.backend, self.reference)
                actual, expected = (side.cache.read(f"{layer}.{name}")[self.SLOT, :, :groups] for side in sides)
                self._close(name, phase, layer, actual, expected, self.tolerances.cache, self._outliers())
        for bits, layers in sorted(shares.items()):
            share = sum(layers) / len(layers)
            self._add("visual_codes", phase, None, share, self._code_share(bits), _agreement(bits, share))

    def _code_share(self, bits: int) -> float:
        """Of codes of all layers that may differ."""
        return self.tolerances.codes[bits] * max(1.0, self._flips()[0])

    def _outliers(self) -> float:
        """Of params of a layer that may lie outside the tolerance."""
        return min(MOST_OUTLIERS, max(self.tolerances.outliers, self._flips()[1]))

    def _flips(self) -> tuple[float, float]:
        codes, params = FLIPS.get(self.manifest.quantization.quantizer, (0.0, 0.0))
        channels = max(layer.head_dim for layer in self.manifest.model.layers)
        return codes * channels, params * channels

    def _read_codes(self, backend: Backend, layer: int, kind: str) -> np.ndarray:
        """Codes of the valid tokens, uint8 [Hkv, tokens, D]."""
        unpack = unpack_keys if kind == "key" else unpack_values
        counts = self.reference.cache.visual_count[self.SLOT]
        size = self.manifest.quantization.group_size
        codes = unpack(backend.cache.read(f"{layer}.visual_{kind}")[self.SLOT])
        return codes[:, (np.arange(size) < counts[:, None]).ravel()]

    def _codes(self, layer: int, kind: str, phase: str) -> tuple[int, float]:
        """Compare the codes of a layer's keys or values; returns their bits and the share that differs."""
        quantization = self.manifest.quantization
        number = self.manifest.model.caches.index(layer)
        bits = (quantization.key_bits if kind == "key" else quantization.value_bits)[number]
        assert bits != BASELINE_BITS
        actual, expected = (self._read_codes(side, layer, kind).astype(int) for side in (self.backend, self.reference))
        steps = np.abs(actual - expected)
        share = float(np.mean(steps > (1 if bits == 8 else 0)))
        tolerance = LAYER_CODES * self._code_share(bits)
        self._add(f"visual_{kind}", phase, layer, share, tolerance, _agreement(bits, share))
        return bits, share

    def _close(
        self,
        name: str,
        phase: str,
        layer: int | None,
        actual: np.ndarray,
        expected: np.ndarray,
        relative: float,
        outliers: float = 0.0,
    ) -> None:
        a, e = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
        if a.shape != e.shape:
            self._add(name, phase, layer, inf, 0.0, f"shape {list(a.shape)}, expected {list(e.shape)}")
            return
        finite = np.isfinite(a), np.isfinite(e)
        if not np.all(finite):
            ours, theirs = (100 * (1 - float(np.mean(side))) for side in finite)
            detail = f"not finite: {ours:.2g} % of the bundle's numbers, {theirs:.2g} % of the reference's"
            self.report.checks.append(Check(name, phase, layer, inf, 0.0, False, detail, is_finite=False))
            return
        spread = float(e.max() - e.min()) if e.size else 0.0
        atol, rtol = self.override or (0.0, relative)
        differences, tolerance = np.abs(a - e), atol + rtol * spread
        beyond = 1.0 - float(np.mean(differences <= tolerance)) if e.size else 0.0
        detail = f"range {spread:.4g}" + (f", {100 * beyond:.2g} % beyond the tolerance" if beyond > 0 else "")
        self._add(name, phase, layer, float(differences.max(initial=0.0)), tolerance, detail, beyond <= outliers)

    def _add(
        self,
        name: str,
        phase: str,
        layer: int | None,
        difference: float,
        tolerance: float,
        detail: str,
        passed: bool | None = None,
    ) -> None:
        if passed is None:
            passed = difference <= tolerance
        self.report.checks.append(Check(name, phase, layer, difference, tolerance, passed, detail))


def _agreement(bits: int, share: float) -> str:
    unit = "share of codes more than one step apart" if bits == 8 else "share of codes that differ"
    return f"{unit}, {100 * (1 - share):.4g} % agree at {bits} bit"
