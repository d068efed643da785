"""The page of an evaluation: one HTML file that needs nothing else, no network and no script."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from vkvx import __version__
from vkvx.errors import InputError, StorageError
from vkvx.evaluation import plots
from vkvx.evaluation.examples import Example
from vkvx.evaluation.report import TITLES, columns
from vkvx.evaluation.result import Metric, SettingResult
from vkvx.packages import missing, require
from vkvx.storage import check_file, write_file

FORMAT, VERSION = "vkvx-eval", 1
"""Result documents that the page can be made from."""
_GENERATOR = '<meta name="generator" content="vkvx eval'
"""What a page is known by."""

_CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #8b949e; --paper: #ffffff; --rule: #d8dee4; --soft: #f6f8fa;
  --c0: #0069a6; --c1: #c25400; --c2: #00805d; --c3: #b0568f; --c4: #2d8bc4; --c5: #a87400 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #848d97; --paper: #0d1117; --rule: #30363d; --soft: #161b22;
    --c0: #5aa9e0; --c1: #f58a4b; --c2: #35c29b; --c3: #e0a0c4; --c4: #86cdf7; --c5: #efb73e }
}
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem }
p { max-width: 44rem; margin: .5rem 0 }
.lead { opacity: .75 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem 0 .35rem .9rem; text-align: right; border-bottom: 1px solid var(--rule) }
th { font-weight: 600; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
.settings tr.reference { background: var(--soft) }
.facts td, .given td { text-align: left; vertical-align: top; overflow-wrap: anywhere }
figure { margin: 1rem 0 0; max-width: 60rem }
figure svg { width: 100%; height: auto; display: block }
figure svg text { font-family: inherit !important }
code { font: .8rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
code.command { display: block; padding: .6rem .8rem; background: var(--soft); overflow-wrap: anywhere }
.example { display: grid; grid-template-columns: minmax(0, 14rem) minmax(0, 1fr); gap: 0 1.5rem; margin: 1.5rem 0 0;
  padding: 1.25rem 0 0; border-top: 1px solid var(--rule) }
.example img { display: block; max-width: 100%; height: auto; margin: 0 0 .5rem }
.given td { white-space: pre-wrap }
.given td:last-child { text-align: right; white-space: nowrap }
@media (max-width: 56rem) {
  .figures, .figures tbody, .figures tr, .figures td { display: block }
  .figures tr.head { display: none }
  .figures tr { padding: .75rem 0; border-bottom: 1px solid var(--rule) }
  .figures td { display: flex; justify-content: space-between; gap: 1rem; padding: .1rem 0; border: 0 }
  .figures td:first-child { font-weight: 600 }
  .figures td[data-title]::before { content: attr(data-title); text-align: left; opacity: .75 }
  figure { overflow-x: auto }
  figure svg { width: 46rem }
  .example { grid-template-columns: minmax(0, 1fr) }
}
"""


def check_report(path: Path, force: bool) -> None:
    """Raise StorageError unless a report can be written to ``path``, with ``force`` also over an older report.

    DependencyError if what draws it is missing. Nothing but a report, or an empty file, is ever replaced.
    """
    require("eval", "matplotlib")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise missing("matplotlib", error) from error
    check_file(path, "--html")
    if not path.exists():
        return
    if path.stat().st_size and _GENERATOR.encode() not in path.read_bytes()[:4096]:
        raise StorageError(
            f"{path} exists and is no report of `vkvx eval`; it is never replaced, choose another --html"
        )
    if not force:
        raise StorageError(f"{path} exists; give --force to replace it, or choose another --html")


def write_html(
    result: dict[str, Any], path: Path, *, examples: Sequence[Example] = (), command: str | None = None
) -> None:
    """Write the page of a result document (format ``vkvx-eval``, version 1) to a file, whole or not at all.

    The page is self-contained and the same for the same document and versions of the packages. Fields that are null
    leave their columns or figures out. ``examples`` are shown with their pictures, ``command`` is the command line that
    gave the result. An older file at ``path`` is replaced; :func:`check_report` says whether it should be.

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
    require("eval", "matplotlib")
    write_file(path, _page(result, examples, command))


def _page(result: dict[str, Any], examples: Sequence[Example], command: str | None) -> str:
    settings = result["settings"]
    metrics = list(dict.fromkeys(name for s in settings for name in s["metrics"]))
    title = f"{result['target']}: {result['task']}"
    lead = (
        f"What a quantised visual cache costs, on {result['samples']} samples. "
        f"{result['kind']}, {result['device']}, {result['dtype']}; vkvx {result['vkvx_version']}."
    )
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(lead)}</p>']
    parts += ["<h2>All settings</h2>", _settings_table(settings)]
    parts.append(
        "<p>± is half the 95 % interval; a difference is to the shaded reference setting, over the same samples. "
        "Bytes of the visual cache are a mean over samples, seconds are those of all samples.</p>"
    )
    with plots.drawing_style():
        figures = _figures(result, metrics)
    parts += [figure for figure in figures if figure]
    if examples:
        parts += ["<h2>Some answers</h2>", "<p>Samples that settings answer differently come before others.</p>"]
        parts += [_example(example) for example in examples]
    parts.append("<h2>How to reproduce</h2>")
    if command is not None:
        parts.append(f'<p><code class="command">{escape(command)}</code></p>')
    parts += [_facts(result), _options(settings)]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{_GENERATOR} {__version__}">\n'
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


def _settings_table(settings: list[dict[str, Any]]) -> str:
    """The table of the terminal. Where it has no room, each row stands as a list of titles and figures."""
    shown = columns([_setting(entry) for entry in settings])
    head = "".join(f"<th>{escape(_typeset(title))}</th>" for title in shown)
    rows = []
    for setting, cells in zip(settings, zip(*shown.values(), strict=True), strict=True):
        name, *figures = (escape(_typeset(cell)) for cell in cells)
        row = "".join(
            f'<td data-title="{escape(_typeset(title))}">{figure}</td>'
            for title, figure in zip(list(shown)[1:], figures, strict=True)
        )
        kind = ' class="reference"' if setting["reference"] else ""
        rows.append(f"<tr{kind}><td>{name}</td>{row}</tr>")
    table = f'<table class="settings figures">\n<tr class="head">{head}</tr>\n' + "\n".join(rows) + "\n</table>"
    return f'<div class="wide">{table}</div>'


def _setting(entry: dict[str, Any]) -> SettingResult:
    return SettingResult(**{**entry, "metrics": {name: Metric(**found) for name, found in entry["metrics"].items()}})


def _typeset(text: str) -> str:
    """A cell or title of the terminal with signs of print: a minus, a dash for what is not known, no break after ±."""
    return "–" if text == "-" else re.sub(r"(?<![\w-])-(?=[\d ])|(?<=\de)-(?=\d)", "−", text).replace("± ", "±\u00a0")


def _example(example: Example) -> str:
    shown = "".join(f'<img src="{uri}" alt="a picture of {escape(example.place)}">' for uri in example.pictures)
    more = example.picture_count - len(example.pictures)
    shown += f"<p>and {more} more</p>" if more else ""
    title = TITLES.get(example.metric, f"{example.metric} %")
    rows = [("right answer", " | ".join(example.answers), title)]
    rows += [(name, text, f"{100 * score:.2f}") for name, (text, score) in example.given.items()]
    cells = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    table = '<table class="given">\n' + "\n".join(f"<tr>{row}</tr>" for row in cells) + "\n</table>"
    said = f"<p>{escape(example.place)}: {escape(example.prompt)}</p>"
    return f'<div class="example">\n<div>{shown}</div>\n<div>{said}\n{table}</div>\n</div>'


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
