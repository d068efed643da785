"""The page of an evaluation: one HTML file that needs nothing else, no network and no script."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from vkvx.errors import InputError
from vkvx.evaluation import plots
from vkvx.packages import missing
from vkvx.storage import write_file

FORMAT, VERSION = "vkvx-eval", 1
"""Result documents that the page can be made from."""

_CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #8b949e; --paper: #ffffff; --rule: #d8dee4; --soft: #f6f8fa;
  --c0: #0069a6; --c1: #c25400; --c2: #00805d; --c3: #b0568f; --c4: #2d8bc4; --c5: #a87400 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #848d97; --paper: #0d1117; --rule: #30363d; --soft: #161b22;
    --c0: #5aa9e0; --c1: #f58a4b; --c2: #35c29b; --c3: #e0a0c4; --c4: #86cdf7; --c5: #efb73e }
}
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem }
p { max-width: 44rem; margin: .5rem 0 }
.lead { opacity: .75 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule) }
th { font-weight: 600; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
tr.reference { background: var(--soft) }
td small { opacity: .7; font-size: .8rem }
.facts th, .facts td { text-align: left; white-space: normal; vertical-align: top; overflow-wrap: anywhere }
figure { margin: 1rem 0 0 }
figure svg { width: 100%; height: auto; display: block }
figure svg text { font-family: inherit !important }
code { font: .8rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
"""


def write_html(result: dict[str, Any], path: Path) -> None:
    """Write the page of a result document (format ``vkvx-eval``, version 1) to a file, whole or not at all.

    The page is self-contained and the same for the same document and versions of the packages. Fields that are null
    leave their columns or figures out. An older file at ``path`` is replaced.

    Raises:
        InputError: the document is of another format or version.
        DependencyError: matplotlib is not installed.
        StorageError: the file cannot be written.
    """
    if (result.get("format"), result.get("version")) != (FORMAT, VERSION):
        raise InputError(
            f"the result has format '{result.get('format')}' version {result.get('version')}; give one of format "
            f"'{FORMAT}' version {VERSION}"
        )
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise missing("matplotlib", error) from error
    write_file(path, _page(result))


def _page(result: dict[str, Any]) -> str:
    settings = result["settings"]
    metrics = list(dict.fromkeys(name for s in settings for name in s["metrics"]))
    title = f"{result['target']}: {result['task']}"
    lead = (
        f"What a quantised visual cache costs, on {result['samples']} samples. "
        f"{result['kind']}, {result['device']}, {result['dtype']}; vkvx {result['vkvx_version']}."
    )
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(lead)}</p>']
    parts += ["<h2>All settings</h2>", _settings_table(settings, metrics)]
    parts.append(
        "<p>Intervals in brackets; a difference is to the shaded reference setting, over the same samples. Bytes and "
        "seconds are means a sample.</p>"
    )
    with plots.drawing_style():
        figures = _figures(result, metrics)
    parts += [figure for figure in figures if figure]
    parts += ["<h2>How to reproduce</h2>", _facts(result), _options(settings)]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _figures(result: dict[str, Any], metrics: list[str]) -> list[str]:
    settings = result["settings"]
    drawn: list[tuple[str, str, str | None]] = []
    if metrics:
        drawn.append(
            (
                "Accuracy and memory",
                "Vertical lines are intervals of the mean. Points of equal size are moved apart a little.",
                plots.accuracy(settings, metrics[0]),
            )
        )
    error = (
        "How far the attention output is from that of the reference, relative to its norm, after each head",
        "and before the output projection.",
    )
    drawn += [
        ("Attention error, by layer and head", " ".join(error), plots.error_maps(settings)),
        ("Attention error, by layer", "Mean over heads.", plots.error_lines(settings)),
        (
            "Distance from the reference's predictions",
            "Smaller divergence and larger agreement are better.",
            plots.divergence_bars(settings),
        ),
        (
            "Channels and their levels",
            "Bars count the tokens of a group; vertical lines are the values that its codes can stand for.",
            plots.histograms(result.get("histograms") or []),
        ),
    ]
    return [
        f'<h2>{escape(heading)}</h2>\n<p>{escape(text)}</p>\n<figure role="img" aria-label="{escape(heading)}">\n'
        f"{_own_ids(svg, f'figure{i}')}\n</figure>"
        for i, (heading, text, svg) in enumerate(drawn, start=1)
        if svg
    ]


def _own_ids(svg: str, prefix: str) -> str:
    """Make ids differ between the figures of a page."""
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)


def _settings_table(settings: list[dict[str, Any]], metrics: list[str]) -> str:
    columns: list[tuple[str, Callable[[dict[str, Any]], str | None]]] = [
        ("bits per element", lambda s: _format(s["bits_per_element"], ".3g")),
        ("visual cache", lambda s: None if s["visual_bytes"] is None else plots.human_bytes(s["visual_bytes"])),
    ]
    for metric in metrics:
        name = metric.replace("_", " ")
        columns.append((name, lambda s, m=metric: _interval(s["metrics"].get(m), "", ".3f")))  # type: ignore[misc]
        columns.append(
            (f"{name}, difference", lambda s, m=metric: _interval(s["metrics"].get(m), "difference", "+.3f"))  # type: ignore[misc]
        )
    columns += [
        ("equal tokens", lambda s: _format(s["token_agreement"], ".1%")),
        ("equal answers", lambda s: _format(s["equal_answers"], ".1%")),
        ("KL, nats", lambda s: _format(s["kl"], ".3g")),
        ("seconds", lambda s: _format(s["seconds"], ".3g")),
    ]
    cells = {heading: [cell(s) for s in settings] for heading, cell in columns}
    cells = {heading: column for heading, column in cells.items() if any(cell is not None for cell in column)}
    head = "".join(f"<th>{escape(heading)}</th>" for heading in ("setting", *cells))
    rows = []
    for i, setting in enumerate(settings):
        row = "".join(f"<td>{column[i] or '–'}</td>" for column in cells.values())
        kind = ' class="reference"' if setting["reference"] else ""
        rows.append(f"<tr{kind}><td>{escape(setting['name'])}</td>{row}</tr>")
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n' + "\n".join(rows) + "\n</table></div>"


def _format(x: float | None, form: str) -> str | None:
    """None stays None; a minus sign is one, and none stands before 0."""
    if x is None:
        return None
    text = f"{x:{form}}"
    return text.lstrip("+-") if not float(text.rstrip("%")) else text.replace("-", "−")


def _interval(metric: dict[str, Any] | None, prefix: str, form: str) -> str | None:
    """A number with its interval in brackets; ``prefix`` "difference" picks the fields of the difference."""
    names = (f"{prefix}_low", f"{prefix}_high") if prefix else ("low", "high")
    value = (metric or {}).get(prefix or "mean")
    if value is None or metric is None:
        return None
    low, high = (_format(metric.get(name), form) for name in names)
    text = _format(value, form) or ""
    return text if low is None or high is None else f"{text} <small>[{low}, {high}]</small>"


def _facts(result: dict[str, Any]) -> str:
    names = ("target", "kind", "device", "dtype", "task", "samples", "vkvx_version")
    facts = {name.replace("_", " "): result[name] for name in names} | result["environment"]
    return _two_columns({name: value for name, value in facts.items() if value is not None})


def _options(settings: list[dict[str, Any]]) -> str:
    return "<h3>Options of each setting</h3>\n" + _two_columns({s["name"]: s["options"] for s in settings})


def _two_columns(entries: dict[str, Any]) -> str:
    rows = [
        f"<tr><td>{escape(str(name))}</td><td><code>{escape(_plain(value))}</code></td></tr>"
        for name, value in entries.items()
    ]
    return '<table class="facts">\n' + "\n".join(rows) + "\n</table>"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        shown = (f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in value.items() if v is not None)
        return ", ".join(shown) or "defaults"
    return value if isinstance(value, str) else json.dumps(value)
