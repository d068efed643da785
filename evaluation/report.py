"""The table that ``vkvx eval`` prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from vkvx.evaluation.result import Metric, Result, SettingResult

TITLES = {"per_digit": "digits %", "exact": "exact %", "f1": "F1 %", "anls": "ANLS %", "cider": "CIDEr-D x100"}
"""Of metrics; their figures are shown times 100."""


def table(result: Result) -> list[str]:
    """A line a setting, and above it what was run; metrics and differences in percent, with half their interval."""
    shown = columns(result.settings)
    engine = f"{result.kind}, {result.device}, {result.dtype}"
    head = f"{result.target} ({engine}), {result.task}: {count_samples(result.samples)}"
    return [head, "", *align(list(shown), zip(*shown.values(), strict=True))]


def columns(settings: Sequence[SettingResult]) -> dict[str, list[str]]:
    """The columns of the table by their titles, a cell a setting; those that nothing is known of are left out."""
    compared = any(setting.kl is not None for setting in settings)
    rows = [_row(setting, compared) for setting in settings]
    names = dict.fromkeys(name for row in rows for name in row)
    found = {name: [row.get(name, "-") for row in rows] for name in names}
    return {name: cells for name, cells in found.items() if set(cells) != {"-"}}


def count_samples(count: int) -> str:
    """``1 sample``, ``2 samples``."""
    return f"{count} sample" if count == 1 else f"{count} samples"


def align(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines with the first column to the left and the others to the right."""
    lines = [titles, *rows]
    first, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    return [
        "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))]).rstrip()
        for name, *cells in lines
    ]


def _row(setting: SettingResult, compared: bool) -> dict[str, str]:
    row = {"setting": setting.name}
    for name, metric in setting.metrics.items():
        title = TITLES.get(name, f"{name} %")
        row[title] = _interval(metric.mean, metric.low, metric.high)
        if compared:
            row[f"{title} - 16 bits"] = _difference(metric)
    attention = setting.attention_error
    row |= {
        "tokens %": _percent(setting.token_agreement),
        "equal %": _percent(setting.equal_answers),
        "KL": "-" if setting.kl is None else f"{setting.kl:.2e}",
        "attention": "-" if attention is None else f"{np.mean(attention):.4f}",
        "bits": f"{setting.bits_per_element:.2f}",
        "bytes": f"{setting.visual_bytes:,.0f}",
        "seconds": f"{setting.seconds:.1f}",
    }
    return row


def _difference(metric: Metric) -> str:
    if metric.difference is None:
        return "-"
    return _interval(metric.difference, metric.difference_low, metric.difference_high, sign="+")


def _interval(mean: float, low: float | None, high: float | None, sign: str = "") -> str:
    text = f"{100 * mean:{sign}.2f}"
    return text if low is None or high is None else f"{text} ± {50 * (high - low):.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"
