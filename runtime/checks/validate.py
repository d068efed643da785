"""Compare a bundle in onnxruntime with its checkpoint in torch, or its engines with onnxruntime, tensor by tensor.

Both sides get the same tokens and the same picture embeddings. After each prefill, when the caches have been compared,
the bundle takes over the reference's cache; with text rows of 8 bits after each step, too. So every call is compared on
equal inputs, and a difference shows where it arises: a code that differs because its value lies on the border of two
levels would otherwise change all later logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from vkvx.errors import OptionError
from vkvx.format import BASELINE_BITS, STATE_NAMES
from vkvx.manifest import FILE_NAME, Manifest, Progress
from vkvx.models.family import Source
from vkvx.models.registry import read_bundle, resolve_origin, sample_pages
from vkvx.packages import TORCH, require
from vkvx.runtime.backends.base import Backend
from vkvx.runtime.backends.registry import ENGINE_BACKENDS, choose_backend, open_backend
from vkvx.runtime.bundles import load_manifest
from vkvx.runtime.calls import Call, build_call, place_embeds
from vkvx.runtime.checks.packed import Finding, Packed, compare
from vkvx.runtime.checks.unpack import unpack_keys, unpack_text, unpack_values
from vkvx.runtime.sessions.nonfinite import OVERFLOW
from vkvx.runtime.sessions.pictures import Picture
from vkvx.runtime.sessions.processor import Prepared, Processor, user_message

if TYPE_CHECKING:
    from vkvx.runtime.backends.torch.backend import TorchBackend
    from vkvx.runtime.checks.recorded import Recorded

COMPARED = ("onnxruntime", *ENGINE_BACKENDS)
"""Backends that can be validated."""

VISION_OUTPUT = "image_embeds"
PROMPT = "Describe the picture."
"""What is asked about each picture; the tokens that follow come from the torch model, greedily."""


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


@dataclass(frozen=True)
class Check:
    """One comparison. ``max_difference`` and ``tolerance`` have the unit that ``detail`` names.

    ``is_finite`` is False where either side has an infinity or NaN; the difference is infinite then.
    """

    name: str
    phase: str
    layer: int | None
    max_difference: float
    tolerance: float
    passed: bool
    detail: str = ""
    is_finite: bool = True


@dataclass
class Report:
    """All comparisons of one bundle."""

    bundle: str
    model: str
    dtype: str
    provider: str
    backend: str = "onnxruntime"
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every comparison is within its tolerance."""
        return all(check.passed for check in self.checks)

    @property
    def first_divergent_layer(self) -> int | None:
        """The lowest layer with a failed comparison in the earliest phase that has one."""
        failed = [check for check in self.checks if not check.passed and check.layer is not None]
        if not failed:
            return None
        return min(c.layer for c in failed if c.phase == failed[0].phase and c.layer is not None)

    @property
    def first_divergence(self) -> str | None:
        """The part of the model that fails first: "the vision output" or "layer 3"; None where no such part does."""
        failed = next((check for check in self.checks if not check.passed), None)
        if failed is not None and failed.name == VISION_OUTPUT:
            return "the vision output"
        layer = self.first_divergent_layer
        return None if layer is None else f"layer {layer}"

    @property
    def remedy(self) -> str | None:
        """What helps where something is not finite."""
        if all(check.is_finite for check in self.checks):
            return None
        return OVERFLOW if self.dtype == "float16" else "numbers are infinite or NaN: look at the checkpoint's weights"

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain types; numbers that are infinite or NaN are None, which JSON has no others for."""
        return {
            **{name: getattr(self, name) for name in ("bundle", "model", "dtype", "provider", "backend")},
            "passed": self.passed,
            "first_divergence": self.first_divergence,
            "first_divergent_layer": self.first_divergent_layer,
            "remedy": self.remedy,
            "checks": [
                {
                    name: None if isinstance(value, float) and not isfinite(value) else value
                    for name, value in asdict(check).items()
                }
                for check in self.checks
            ],
        }


def validate_bundle(
    bundle: str | Path,
    model: str | None = None,
    images: Sequence[Picture] | None = None,
    steps: int = 8,
    atol: float | None = None,
    rtol: float | None = None,
    provider: str = "auto",
    progress: Progress | None = None,
    backend: str = "onnxruntime",
) -> Report:
    """Run a bundle side by side with what it is made from: vision, a prefill, ``steps`` decode steps, a second turn.

    Backend "onnxruntime" is compared with the checkpoint in torch; "tensorrt" and "rtx", the engines of a bundle, with
    onnxruntime on the CPU.

    Args:
        bundle: directory of the bundle; the hashes of its files are verified.
        model: checkpoint directory, alias or hub id; None takes what the manifest names. The bundle itself holds all
            weights, too: it can stand in where its checkpoint is gone.
        images: one picture a turn; None takes two of the bundled sample pages.
        steps: decode steps after each prefill.
        atol, rtol: tolerance atol + rtol * range in place of ``TOLERANCES``, but for shares.
        provider: of onnxruntime; engines need none.
        backend: what is compared.

    Raises:
        BundleError, EngineError, ModelError, InputError: if something cannot be read; DependencyError: without what the
        backend or the reference needs; OptionError: for an unusable number, or an option that would have no effect.
    """
    if backend not in COMPARED:
        raise OptionError(f"backend '{backend}' (--backend) cannot be validated: give one of {', '.join(COMPARED)}")
    engines = backend in ENGINE_BACKENDS
    if engines and model is not None:
        raise OptionError(f"--model has no effect with --backend {backend}: engines are compared with onnxruntime")
    if engines and provider != "auto":
        raise OptionError(f"--provider has no effect with --backend {backend}; leave it out")

    for name, value in (("atol", atol), ("rtol", rtol)):
        if value is not None and not 0 <= value < inf:
            raise OptionError(f"{name} {value} is not supported: give a number of at least 0")
    report_progress = progress or (lambda stage, done, total: None)
    directory = Path(bundle)
    manifest = load_manifest(directory)
    choose_backend(backend, directory, manifest, "auto" if engines else provider)
    source = None if engines else _reference(directory, manifest, model)
    manifest.verify(directory, report_progress)
    pictures = list(images) if images else sample_pages()[:2]
    processor = Processor.of_bundle(directory, manifest)
    turns = [_turn(processor, picture, first=i == 0) for i, picture in enumerate(pictures)]
    capacity: dict[str, Any] = {
        "slots": 2,  # the second row shows that the slot is honoured
        "visual_tokens": sum(
            manifest.quantization.group_size * -(-n // manifest.quantization.group_size)
            for t in turns
            for n in t.picture_lengths
        ),
        "text_tokens": sum(len(t.token_ids) - sum(t.picture_lengths) + steps + 1 for t in turns),
    }
    total = 1 + len(turns) * (steps + 2)
    report_progress("compare", 0, total)
    reference: Backend
    if source is None:
        opened = open_backend(backend, directory, manifest, **capacity)
        reference = open_backend("onnxruntime", directory, manifest, provider="cpu", **capacity)
        name = "onnxruntime"
    else:
        from vkvx.runtime.backends.torch.loading import load_reference

        reference = load_reference(source, manifest, **capacity)
        opened = open_backend(backend, directory, manifest, provider=provider, **capacity)
        name = str(source.name)
    report = Report(str(directory), name, manifest.model.dtype, opened.provider, backend)
    comparison = _Comparison(report, reference, opened, atol, rtol)
    done, token = 1, None
    for number, turn in enumerate(turns, start=1):
        phase = "" if number == 1 else f"turn {number} "
        embeds = comparison.vision(f"{phase}vision", turn)
        ids = turn.token_ids if token is None else np.concatenate([[np.int32(token)], turn.token_ids])
        token = comparison.step(f"{phase}prefill", ids, turn, embeds)
        comparison.caches(f"{phase}prefill")
        opened.cache.load(reference.cache)
        done += 2
        report_progress("compare", done, total)
        for step in range(1, steps + 1):
            token = comparison.step(f"{phase}decode {step}", np.array([token], np.int32))
            if step < steps:
                comparison.share_codes(f"{phase}decode {step}")
            done += 1
            report_progress("compare", done, total)
        comparison.caches(f"{phase}decode {steps}")
    return report


def _reference(bundle: Path, manifest: Manifest, model: str | None) -> Source:
    """What a bundle is compared with: its checkpoint, or another bundle's or its own copy of one."""
    require("export", *TORCH)
    if model is not None and (Path(model) / FILE_NAME).is_file():
        return read_bundle(Path(model))
    return resolve_origin(bundle, manifest.model, model, f"--model {bundle}, which compares with its own weights")


def _turn(processor: Processor, picture: Picture, *, first: bool) -> Prepared:
    message = user_message(PROMPT, pictures=1)
    prompt = processor.format([message]) if processor.has_chat_template else processor.plain(message)
    return processor.prepare(prompt, [picture], first=first)


class _Comparison:
    """Feeds both sides the same calls in slot 1 and collects the checks."""

    SLOT = 1

    def __init__(
        self, report: Report, reference: Backend, backend: Backend, atol: float | None, rtol: float | None
    ) -> None:
        self.report, self.reference, self.backend = report, reference, backend
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
        actual = self.backend.step(call, visual)
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
