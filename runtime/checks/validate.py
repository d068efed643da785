"""Compare a bundle in onnxruntime with its checkpoint in torch, or its engines with onnxruntime, tensor by tensor.

Both sides get the same tokens and the same picture embeddings. After each prefill, when the caches have been compared,
the bundle takes over the reference's cache. So every call is compared on equal inputs, and a difference shows where it
arises: a code that differs because its value lies on the border of two levels would otherwise change all later logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vkvx.errors import OptionError
from vkvx.format import BASELINE_BITS, METRIC_QUANTIZERS, STATE_NAMES
from vkvx.manifest import Progress
from vkvx.runtime.backends.base import Backend
from vkvx.runtime.backends.registry import ENGINE_BACKENDS, open_backend
from vkvx.runtime.bundles import read_bundle
from vkvx.runtime.calls import build_call, place_embeds
from vkvx.runtime.checks.unpack import unpack_keys, unpack_values
from vkvx.runtime.sessions.pictures import Picture
from vkvx.runtime.sessions.processor import Prepared, Processor

COMPARED = ("onnxruntime", *ENGINE_BACKENDS)
"""Backends that can be validated."""

PROMPT = "Describe the picture."
"""What is asked about each picture; the tokens that follow come from the torch model, greedily."""


@dataclass(frozen=True)
class Tolerance:
    """What may differ, by the model's dtype. All but ``codes`` are relative to the range of the reference tensor.

    ``codes`` is the share of codes of all layers that may differ, by bits; at 8 bits a difference of one step does not
    count. The keys or values of one layer may have ``LAYER_CODES`` times that.
    ``outliers`` is the share of parameters that may lie outside ``cache``: where a channel has two clusters of tokens,
    rounding can tip the iterations of ``lloyd`` from one pair of levels to another that is as good.
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
LAYER_CODES = 5
"""Where ``lloyd`` settles on other levels, many codes of that channel differ, and a layer has few channels."""
SHAPED_CODES, SHAPED_OUTLIERS = 20, 0.25
"""For ``shaped``: times ``codes``, and in place of ``outliers``. It chooses each code and level to make up for those
before, so one that rounding tips changes later ones, to others that are as good."""

ENGINE_LOGITS = 2.5
"""For engines: times ``logits``. They round to the model's type after every product, onnxruntime on a CPU does not;
engines of TensorRT 8.6 were 1.22 times ``logits`` apart from it at most, at 1 to 16 bits."""


@dataclass(frozen=True)
class Check:
    """One comparison. ``max_difference`` and ``tolerance`` have the unit that ``detail`` names."""

    name: str
    phase: str
    layer: int | None
    max_difference: float
    tolerance: float
    passed: bool
    detail: str = ""


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

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain types."""
        return {
            **{name: getattr(self, name) for name in ("bundle", "model", "dtype", "provider", "backend")},
            "passed": self.passed,
            "first_divergent_layer": self.first_divergent_layer,
            "checks": [asdict(check) for check in self.checks],
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
        model: checkpoint directory, alias or hub id; None takes what the manifest names.
        images: one picture a turn; None takes two of the bundled sample pages.
        steps: decode steps after each prefill.
        atol, rtol: tolerance atol + rtol * range in place of ``TOLERANCES``, but for the share of codes.
        provider: of onnxruntime; engines need none.
        backend: what is compared.

    Raises:
        BundleError, EngineError, ModelError, InputError: if something cannot be read; DependencyError: without what the
        backend or the reference needs; OptionError: for an unusable number, or an option that would have no effect.
    """
    from vkvx.models.registry import sample_pages

    if backend not in COMPARED:
        raise OptionError(f"backend '{backend}' (--backend) cannot be validated: give one of {', '.join(COMPARED)}")
    engines = backend in ENGINE_BACKENDS
    if engines and model is not None:
        raise OptionError(f"--model has no effect with --backend {backend}: engines are compared with onnxruntime")
    if engines and provider != "auto":
        raise OptionError(f"--provider has no effect with --backend {backend}; leave it out")

    for name, value in (("atol", atol), ("rtol", rtol)):
        if value is not None and not 0 <= value < float("inf"):
            raise OptionError(f"{name} {value} is not supported: give a number of at least 0")
    report_progress = progress or (lambda stage, done, total: None)
    directory = Path(bundle)
    manifest = read_bundle(directory)
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
    if engines:
        opened = open_backend(backend, directory, manifest, **capacity)
        reference = open_backend("onnxruntime", directory, manifest, provider="cpu", **capacity)
        name = "onnxruntime"
    else:
        from vkvx.models.registry import resolve
        from vkvx.runtime.backends.torch.loading import load_reference

        source = resolve(model or manifest.model.source, revision=None if model else manifest.model.revision)
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
            done += 1
            report_progress("compare", done, total)
        comparison.caches(f"{phase}decode {steps}")
    return report


def _turn(processor: Processor, picture: Picture, *, first: bool) -> Prepared:
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    if processor.has_chat_template:
        return processor.prepare(processor.format([{"role": "user", "content": content}]), [picture], first=first)
    return processor.prepare(f"{processor.plain_picture}{PROMPT}", [picture], first=first)


class _Comparison:
    """Feeds both sides the same calls in slot 1 and collects the checks."""

    SLOT = 1

    def __init__(
        self, report: Report, reference: Backend, backend: Backend, atol: float | None, rtol: float | None
    ) -> None:
        self.report, self.reference, self.backend = report, reference, backend
        self.manifest = backend.manifest
        self.tolerances = TOLERANCES[report.dtype]
        if self.manifest.quantization.quantizer in METRIC_QUANTIZERS:
            codes = {bits: SHAPED_CODES * share for bits, share in self.tolerances.codes.items()}
            self.tolerances = replace(self.tolerances, codes=codes, outliers=SHAPED_OUTLIERS)
        if report.backend in ENGINE_BACKENDS:
            self.tolerances = replace(self.tolerances, logits=ENGINE_LOGITS * self.tolerances.logits)
        self.override = None if atol is None and rtol is None else (atol or 0.0, rtol or 0.0)

    def vision(self, phase: str, turn: Prepared) -> np.ndarray:
        """Compare the picture embeddings; returns those of the bundle."""
        embeds, expected = (
            np.concatenate([np.asarray(side.encode(inputs)) for inputs in turn.vision_calls])
            for side in (self.backend, self.reference)
        )
        self._close("image_embeds", phase, None, embeds, expected, self.tolerances.vision)
        return embeds

    def step(self, phase: str, ids: np.ndarray, turn: Prepared | None = None, embeds: np.ndarray | None = None) -> int:
        """Run one call on both sides and compare the logits; returns the reference's likeliest token."""
        quantization, model = self.manifest.quantization, self.manifest.model
        row = self.reference.cache.row(self.SLOT, ids, *((turn.picture_lengths, turn.positions) if turn else ()))
        call = build_call([row], group_size=quantization.group_size, image_token_id=model.image_token_id)
        visual = None if embeds is None else place_embeds(call, embeds)
        expected, actual = self.reference.step(call, visual), self.backend.step(call, visual)
        self._close("logits", phase, None, actual, expected, self.tolerances.logits)
        return int(expected[0].argmax())

    def caches(self, phase: str) -> None:
        """Compare what lies below the counts, layer by layer."""
        ours, theirs = self.backend.cache, self.reference.cache
        for name in ("visual_count", "text_count"):
            different = int(np.count_nonzero(getattr(ours, name) != getattr(theirs, name)))
            self._add(name, phase, None, different, 0, "counts that differ")
        groups, rows = theirs.group_count(self.SLOT), int(theirs.text_count[self.SLOT])
        shares: dict[int, list[float]] = {}
        for layer in self.manifest.model.linear_layers:
            for name in STATE_NAMES:
                actual, expected = (c.read(f"{layer}.{name}")[self.SLOT] for c in (ours, theirs))
                self._close(name, phase, layer, actual, expected, self.tolerances.cache)
        for layer in self.manifest.model.caches:
            for kind in ("key", "value"):
                if groups:
                    bits, share = self._codes(layer, kind, phase)
                    shares.setdefault(bits, []).append(share)
                    name = f"visual_{kind}_params"
                    actual, expected = (c.read(f"{layer}.{name}")[self.SLOT, :, :groups] for c in (ours, theirs))
                    outliers = self.tolerances.outliers
                    self._close(name, phase, layer, actual, expected, self.tolerances.cache, outliers)
                name = f"text_{kind}"
                actual, expected = (c.read(f"{layer}.{name}")[self.SLOT, :, :rows] for c in (ours, theirs))
                self._close(name, phase, layer, actual, expected, self.tolerances.cache)
        for bits, layers in sorted(shares.items()):
            share = sum(layers) / len(layers)
            self._add("visual_codes", phase, None, share, self.tolerances.codes[bits], _agreement(bits, share))

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
        tolerance = LAYER_CODES * self.tolerances.codes[bits]
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
            self._add(name, phase, layer, float("inf"), 0.0, f"shape {list(a.shape)}, expected {list(e.shape)}")
            return
        spread = float(e.max() - e.min()) if e.size else 0.0
        atol, rtol = self.override or (0.0, relative)
        differences, tolerance = np.abs(a - e), atol + rtol * spread
        # Written so that NaN counts as an outlier.
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
