"""Figures of ``attention``, ``breakeven`` and ``throughput`` from their JSON files, as SVG for pages in ``docs/``."""

from __future__ import annotations

import argparse
import io
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cases import attention, breakeven
from vkvx.errors import InputError
from vkvx.evaluation.plots import COLOURS, DASHES, INK, MARKERS, WIDTH, drawing_style
from vkvx.storage import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FOLDER = Path(__file__).parents[1]
_FP16 = ("cudnn", "flash", "efficient")
_COLUMNS = 3
_SPAN = 3.0
"""Powers of two of the speed-up at which the colours of a heat map end."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this verb."""
    parser.add_argument("--results", type=Path, default=_FOLDER / "results", help="folder of the JSON files")
    images = _FOLDER.parent / "docs" / "images"
    parser.add_argument("--images", type=Path, default=images, help="folder of the figures (default docs/images)")


def run(arguments: argparse.Namespace) -> None:
    """Write every figure whose results are there; InputError if there are none."""
    arguments.images.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in FIGURES.items():
        path = arguments.results / f"{name}.json"
        if not path.exists():
            continue
        try:
            figures = draw(json.loads(path.read_text(encoding="utf-8"))["results"])
        except (ValueError, KeyError) as error:
            raise InputError(f"{path} is not a result of this version ({error}); run the benchmark again") from error
        for figure, svg in figures.items():
            written.append(arguments.images / f"{figure}.svg")
            write_file(written[-1], svg)
    if not written:
        *names, last = (f"{name}.json" for name in FIGURES)
        raise InputError(f"{arguments.results} has no {', '.join(names)} or {last}; run those benchmarks on a GPU")
    print("\n".join(map(str, written)))


def attention_figures(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Time, and share of the copy bandwidth, of every method by bits: one panel a shape."""
    panels = {"attention-time": ("us", "µs a step (logarithmic)"), "attention-bandwidth": ("% of copy", "% of copy")}
    with drawing_style():
        return {name: _svg(_by_shape(rows, *column)) for name, column in panels.items()}


def _by_shape(rows: list[dict[str, Any]], column: str, label: str) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    rows = [row for row in rows if row["us"] is not None]
    shapes, bits = (list(dict.fromkeys(row[key] for row in rows)) for key in ("shape", "bits"))
    bits = sorted(b for b in bits if b != 16)
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] not in _FP16))
    methods.sort(key=lambda name: name not in (attention.OURS, attention.AFFINE))
    height = math.ceil((len(shapes) + 1) / _COLUMNS)  # the legend has a panel of its own
    figure = Figure(figsize=(WIDTH, 2.6 * height))
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.08)
    grid = figure.subplots(height, _COLUMNS, squeeze=False)
    for i, (axes, shape) in enumerate(zip(grid.flat, shapes, strict=False)):
        here = [row for row in rows if row["shape"] == shape]
        if dense := [row for row in here if row["method"] in _FP16]:
            best = min(dense, key=lambda row: row["us"])
            axes.axhline(best[column], color=INK, lw=1, ls="--")
        for j, method in enumerate(methods):
            points = sorted((bits.index(row["bits"]), row[column]) for row in here if row["method"] == method)
            style = {"color": COLOURS[j % len(COLOURS)], "marker": MARKERS[j % len(MARKERS)]}
            axes.plot(*zip(*points, strict=True) if points else ((), ()), lw=1.4, ms=5, **style)
        axes.set_title(shape)
        axes.set_xticks(range(len(bits)), [str(b) for b in bits])
        axes.set_xlim(-0.3, len(bits) - 0.7)
        if column == "us":
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        if i % _COLUMNS == 0:
            axes.set_ylabel(label)
        axes.set_xlabel("bits")
    for axes in grid.flat[len(shapes) :]:
        axes.set_axis_off()
    _legend(grid.flat[len(shapes)], methods)
    return figure


def _legend(axes: Axes, methods: list[str]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=INK, lw=1, ls="--", label="SDPA FP16, the fastest")]
    for j, name in enumerate(methods):
        style = {"color": COLOURS[j % len(COLOURS)], "marker": MARKERS[j % len(MARKERS)]}
        lines.append(Line2D([], [], lw=1.4, ms=5, label=name, **style))
    axes.legend(handles=lines, loc="center left", frameon=False)


def breakeven_figures(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Speed-up over the fastest FP16 attention: one heat map for each number of bits and of heads."""
    from matplotlib.figure import Figure

    found = breakeven.speed_ups(rows)
    heads, bits, batches = (list(dict.fromkeys(key[i] for key in found)) for i in range(3))
    tokens = sorted({row["tokens"] for row in rows})
    with drawing_style():
        figure = Figure(figsize=(WIDTH, 2.7 * len(heads) + 0.3))
        figure.set_layout_engine("constrained", w_pad=0.04, h_pad=0.08)
        grid = figure.subplots(len(heads), len(bits), squeeze=False, sharex=True, sharey=True)
        for line, head in zip(grid, heads, strict=True):
            for axes, b in zip(line, bits, strict=True):
                values = [[found[head, b, batch].get(t) or math.nan for t in tokens] for batch in batches]
                image = _heat_map(axes, values)
                axes.set_title(f"{head}, {b} bit{'s' if b > 1 else ''}")
                axes.set_xticks(range(len(tokens)), [str(t) for t in tokens], rotation=90)
                axes.set_yticks(range(len(batches)), [str(batch) for batch in batches])
            line[0].set_ylabel("batch")
        for axes in grid[-1]:
            axes.set_xlabel("visual tokens")
        bar = figure.colorbar(image, ax=grid, aspect=30, pad=0.015, extend="both")
        steps = range(-int(_SPAN), int(_SPAN) + 1)
        bar.set_ticks(list(steps), labels=[f"{2.0**step:g}" for step in steps])
        bar.set_label("times as fast as FP16")
        bar.outline.set_visible(False)
        return {"breakeven": _svg(figure)}


def _heat_map(axes: Axes, values: list[list[float]]) -> Any:
    logs = [[math.log2(x) for x in line] for line in values]
    image = axes.imshow(logs, cmap="PuOr", vmin=-_SPAN, vmax=_SPAN, aspect="auto", interpolation="none")
    axes.grid(False)
    axes.tick_params(length=0)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if math.isfinite(value):
                dark = abs(math.log2(value)) > 0.7 * _SPAN
                text = f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
                axes.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else INK)
    return image


def throughput_figures(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Sampled tokens a second over the budget, a panel a shape; waiting times at a server over the rate of arrivals."""
    found = (row for row in rows if row["part"] == "batch" and "sampled tokens/s" in row and row["fill"] != "prompts")
    batch = [row | {"contender": row["contender"] + _chunk(row)} for row in found]
    served = [row for row in rows if row["part"] == "arrivals" and "rates" in row]
    with drawing_style():
        drawn = {"throughput": _budgets(batch)} if batch else {}
        return {
            name: _svg(figure) for name, figure in (drawn | ({"arrivals": _arrivals(served)} if served else {})).items()
        }


def _chunk(row: dict[str, Any]) -> str:
    return f", chunks of {row['chunk']}" if row["chunk"] else ""


def _budgets(rows: list[dict[str, Any]]) -> Figure:
    from matplotlib.figure import Figure

    shapes, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("shape", "contender"))
    figure = Figure(figsize=(WIDTH, 2.6 * math.ceil((len(shapes) + 1) / _COLUMNS)))
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.08)
    grid = figure.subplots(math.ceil((len(shapes) + 1) / _COLUMNS), _COLUMNS, squeeze=False)
    count = len(COLOURS)
    styles = [
        {"color": COLOURS[i % count], "marker": MARKERS[i % count], "ls": DASHES[i // count]} for i in range(len(names))
    ]
    for axes, shape in zip(grid.flat, shapes, strict=False):
        here = [row for row in rows if row["shape"] == shape]
        for name, style in zip(names, styles, strict=True):
            points = sorted((row["budget"], row["sampled tokens/s"]) for row in here if row["contender"] == name)
            axes.plot(*zip(*points, strict=True) if points else ((), ()), lw=1.4, ms=5, **style)
        axes.set_title(shape)
        axes.set_yscale("log")
        budgets = sorted({row["budget"] for row in here})
        axes.set_xscale("log")
        axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
        axes.minorticks_off()
        axes.set_xlabel("GB")
    for axes in grid[:, 0]:
        axes.set_ylabel("tokens/s (logarithmic)")
    for axes in grid.flat[len(shapes) :]:
        axes.set_axis_off()
    labels = [name if name.startswith("transformers") else f"vkvx {name}" for name in names]
    _named(grid.flat[len(shapes)], labels, styles)
    return figure


def _arrivals(rows: list[dict[str, Any]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 2.8))
    figure.set_layout_engine("constrained", w_pad=0.06)
    *panels, legend = figure.subplots(1, 3)
    labels, styles = [], []
    for i, row in enumerate(rows):
        for part, dashes in (("p50", "--"), ("p99", "-")):
            style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "ls": dashes}
            labels.append(f"{row['shape']}, vkvx {row['contender']}{_chunk(row)}, {part}")
            styles.append(style)
            for axes, what in zip(panels, ("first token ms", "gap ms"), strict=True):
                axes.plot(
                    [r["rate"] for r in row["rates"]], [r[f"{what} {part}"] for r in row["rates"]], lw=1.4, **style
                )
    for axes, title in zip(panels, ("first token, ms", "gap between tokens, ms"), strict=True):
        axes.set_title(title)
        axes.set_xlabel("arrivals a second")
        axes.set_ylim(bottom=0)
    legend.set_axis_off()
    _named(legend, labels, styles)
    return figure


def _named(axes: Axes, labels: list[str], styles: list[dict[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], lw=1.4, ms=5, label=label, **style) for label, style in zip(labels, styles, strict=True)]
    axes.legend(handles=lines, loc="center left", frameon=False)


FIGURES = {"attention": attention_figures, "breakeven": breakeven_figures, "throughput": throughput_figures}
"""What draws the figures of a benchmark, from its results."""


def _svg(figure: Figure) -> str:
    """The element alone on white, the same for the same data."""
    out = io.StringIO()
    figure.savefig(out, format="svg", facecolor="white", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    return re.sub(r"[ \t]+\n", "\n", text)
