"""From records to figures: means, intervals, and the JSON document that reports are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from vkvx import __version__
from vkvx.evaluation.examples import Example
from vkvx.evaluation.records import Record, Records
from vkvx.evaluation.settings import Setting
from vkvx.evaluation.statistics import estimate
from vkvx.evaluation.tasks import Task

FORMAT, VERSION = "vkvx-eval", 1


@dataclass(frozen=True)
class Metric:
    """A mean with its 95 % interval, and its paired difference from the reference (None for the reference).

    Of one sample the bounds are None.
    """

    mean: float
    low: float | None
    high: float | None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None


@dataclass(frozen=True)
class SettingResult:
    """The figures of a setting; what compares with the 16-bit reference is None for it, and where there is none.

    ``token_agreement`` is the share of the reference's answer tokens that are the likeliest when its answer is fed,
    ``equal_answers`` the share of answers that have all tokens equal, ``kl`` the mean KL(reference || setting) in nats
    a token, ``attention_error`` by attention layer and query head ||o - o_exact|| / ||o_exact|| over all tokens fed.
    ``bits_per_element`` and ``visual_bytes`` (a sample) count scales, offsets and padding; ``seconds`` is the time to
    answer all samples.
    """

    name: str
    options: dict[str, Any]
    reference: bool
    metrics: dict[str, Metric]
    token_agreement: float | None
    equal_answers: float | None
    kl: float | None
    attention_error: list[list[float]] | None
    bits_per_element: float
    visual_bytes: float
    seconds: float


@dataclass(frozen=True)
class Result:
    """An evaluation. ``histograms`` are those of :func:`vkvx.evaluation.histograms.worst_channels`.

    ``examples`` are some samples with what was answered, for the report; the JSON document is without them.
    """

    target: str
    kind: str
    device: str
    dtype: str
    task: str
    samples: int
    environment: dict[str, Any]
    settings: list[SettingResult]
    histograms: list[dict[str, Any]] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The document of ``vkvx eval --json``."""
        found = asdict(replace(self, examples=[]))
        del found["examples"]
        return {"format": FORMAT, "version": VERSION, "vkvx_version": __version__, **found}


def summarise(records: Records, settings: Sequence[Setting], task: Task) -> tuple[list[SettingResult], list[Any]]:
    """The figures of each setting and all histograms; every record must be there."""
    baseline: dict[str, np.ndarray] = {}
    results: list[SettingResult] = []
    histograms: list[Any] = []
    for setting in settings:
        found = records.of(setting.name, task.count)
        texts, answers = [r.text for r in found], [r.answers for r in found]
        scores = {name: task.scorers[name](texts, answers) for name in task.metrics}
        metrics = {name: _metric(values, baseline.get(name)) for name, values in scores.items()}
        if setting.reference:
            baseline = scores
        results.append(_figures(setting, found, metrics))
        histograms += [entry for record in found for entry in record.histograms or ()]
    return results, histograms


def _metric(scores: np.ndarray, baseline: np.ndarray | None) -> Metric:
    own = estimate(scores)
    if baseline is None:
        return Metric(own.mean, own.low, own.high)
    paired = estimate(scores - baseline)
    return Metric(own.mean, own.low, own.high, paired.mean, paired.low, paired.high)


def _figures(setting: Setting, records: Sequence[Record], metrics: dict[str, Metric]) -> SettingResult:
    return SettingResult(
        name=setting.name,
        options=setting.to_json(),
        reference=setting.reference,
        metrics=metrics,
        token_agreement=_ratio([r.hits for r in records], [r.count for r in records]),
        equal_answers=_ratio([r.equal for r in records], [None if r.equal is None else 1 for r in records]),
        kl=mean_divergence(records),
        attention_error=_attention_error(records),
        bits_per_element=bits_per_element(records),
        visual_bytes=sum(r.visual_bytes for r in records) / len(records),
        seconds=sum(r.seconds for r in records),
    )


def mean_divergence(records: Sequence[Record]) -> float | None:
    """KL in nats a token over all answer tokens; None without a reference."""
    return _ratio([r.kl for r in records], [r.count for r in records])


def bits_per_element(records: Sequence[Record]) -> float:
    """Bits for each key or value element of a visual token; params and padding of groups are counted."""
    return 8 * sum(r.visual_bytes for r in records) / sum(r.elements for r in records)


def _ratio(parts: Sequence[float | None], wholes: Sequence[int | None]) -> float | None:
    if any(part is None for part in parts):
        return None
    return float(sum(part or 0 for part in parts)) / sum(whole or 0 for whole in wholes)


def _attention_error(records: Sequence[Record]) -> list[list[float]] | None:
    """None as well where no answer has a second token: then nothing attends to the quantised cache."""
    if any(record.attention is None for record in records):
        return None
    error, exact = np.moveaxis(np.sum(np.array([record.attention for record in records]), axis=0), -1, 0)
    if not exact.all():
        return None
    return np.sqrt(error / exact).tolist()
