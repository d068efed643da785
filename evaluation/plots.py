"""Figures of an evaluation as SVG text, by matplotlib. ``vkvx.evaluation.html`` has the page around them.

Every function takes settings of a result document and returns an ``<svg>`` element, or None where there is nothing to
draw. Colours are variables of the page, ``var(--ink)``, ``var(--faint)``, ``var(--c0)`` and on, so that it can be light
or dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vkvx.evaluation.report import TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, FAINT = "#1a1b1c", "#9a9b9c"
"""Stand for colours of the page while matplotlib draws; nothing else may use them."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""The palette of Okabe and Ito, which people with any colour vision tell apart, less black and yellow. Stand for
``--c0`` and on; the page has them darker or lighter, as text needs."""
MARKERS, DASHES = ("o", "s", "^", "D", "v", "P"), ("-", "--", ":")
WIDTH = 9.2
"""Inches, 72 points each: the width of the page's column."""
_BITS = ("bits", "key_bits", "value_bits", "bits_per_layer")
_STYLE = {
    "svg.hashsalt": "vkvx",
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def method_name(setting: dict[str, Any]) -> str:
    """What joins settings to one series: their options other than bits and group size, or "default"."""
    options = {k: v for k, v in setting["options"].items() if k not in (*_BITS, "group_size") and v is not None}
    return ", ".join(str(v) if isinstance(v, str) else f"{k.replace('_', ' ')} {v}" for k, v in options.items()) or (
        "default"
    )


def human_bytes(count: float) -> str:
    """Bytes in the largest binary unit that gives a number of at least 1."""
    power = 0 if count < 1 else min(int(math.log2(count) // 10), 4)
    return f"{count / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def accuracy(settings: list[dict[str, Any]], metric: str) -> str | None:
    """A metric in percent with its intervals against the bytes of visual cache a sample, one series a method."""
    series: dict[str, list[dict[str, Any]]] = {}
    for setting in settings:
        if _number(setting["metrics"].get(metric, {}).get("mean")) and setting["visual_bytes"] > 0:
            name = setting["name"] if setting["reference"] else method_name(setting)
            series.setdefault(name, []).append(setting)
    if not series:
        return None
    figure = _figure(4.6)
    axes = figure.add_axes((0.07, 0.13, 0.91, 0.83))
    left: list[tuple[float, float, str, str]] = []
    right: list[tuple[float, float, str, str]] = []
    for i, (name, points) in enumerate(series.items()):
        points.sort(key=lambda s: s["visual_bytes"])
        values = [s["metrics"][metric] for s in points]
        # Settings of equal size would hide each other.
        x = [s["visual_bytes"] * 1.025 ** (i - (len(series) - 1) / 2) for s in points]
        y = [100 * v["mean"] for v in values]
        style = _series_style(i, points[0]["reference"])
        spread = [[100 * max(0, v["mean"] - _or(v["low"], v["mean"])) for v in values]]
        spread.append([100 * max(0, _or(v["high"], v["mean"]) - v["mean"]) for v in values])
        axes.errorbar(x, y, yerr=spread, capsize=2.5, elinewidth=1, lw=1.4, ms=5, **style)
        (right if points[0]["reference"] else left).append((x[0], y[0], name, style["color"]))
    axes.set_xscale("log", base=2)
    sizes = sorted({s["visual_bytes"] for points in series.values() for s in points})
    ticks = [size for i, size in enumerate(sizes) if i == 0 or size > 1.25 * sizes[i - 1]]
    axes.set_xticks(ticks, [human_bytes(size) for size in ticks])
    axes.minorticks_off()
    axes.set_xlabel("visual cache a sample, bytes (logarithmic)")
    axes.set_ylabel(TITLES.get(metric, f"{metric.replace('_', ' ')} %"))
    # Names stand left of the smallest caches, where methods differ most, in a quarter of the width; 16 bits right.
    octaves = max(1.0, math.log2(sizes[-1] / sizes[0]))
    axes.set_xlim(sizes[0] / 2 ** (0.42 * octaves), sizes[-1] * 2 ** (0.16 * octaves))
    _label_ends(axes, left, sizes[0] / 2 ** (0.07 * octaves), "right")
    _label_ends(axes, right, sizes[-1] * 2 ** (0.04 * octaves), "left")
    return _svg(figure)


def error_maps(settings: list[dict[str, Any]]) -> str | None:
    """Attention output error of each layer and head, one map a setting on one scale of colours."""
    from matplotlib.colors import LogNorm

    shown = [s for s in settings if s["attention_error"]]
    values = [x for s in shown for row in s["attention_error"] for x in row if _number(x) and x > 0]
    if not values:
        return None
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = _figure(rows * 2.05 + 0.75)
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.06)
    grid = figure.subplots(rows, 4, squeeze=False, sharex=True, sharey=True)
    low, high = min(values), max(values)
    norm = LogNorm(low, high if high > low else low * 1.01)
    for i, axes in enumerate(grid.flat):
        if i >= len(shown):
            axes.set_visible(False)
            continue
        errors = shown[i]["attention_error"]
        # An image: one path a cell would make pages of large models huge.
        extent = (0, len(errors[0]), len(errors), 0)
        image = axes.imshow(errors, cmap="cividis", norm=norm, extent=extent, aspect="auto", interpolation="none")
        axes.set_title(_wrap(shown[i]["name"], 26), fontsize=9)
        axes.grid(False)
        for axis, count in ((axes.xaxis, len(errors[0])), (axes.yaxis, len(errors))):
            step = max(1, math.ceil(count / 8))
            axis.set_ticks([j + 0.5 for j in range(0, count, step)], [str(j) for j in range(0, count, step)])
        if i % columns == 0:
            axes.set_ylabel("layer")
        if i + columns >= len(shown):
            axes.set_xlabel("query head")
            axes.tick_params(labelbottom=True)
    bar = figure.colorbar(
        image, ax=list(grid.flat[: len(shown)]), shrink=min(0.9, 2.2 / rows), aspect=15, pad=0.015, anchor=(0, 1)
    )
    _plain_decades(bar.ax.yaxis)
    bar.set_label("relative error (logarithmic)")
    bar.outline.set_visible(False)
    return _svg(figure)


def error_lines(settings: list[dict[str, Any]]) -> str | None:
    """Attention output error of each layer, mean over heads, one line a setting."""
    shown = [s for s in settings if s["attention_error"]]
    if not shown:
        return None
    figure = _figure(max(4.0, 0.22 * len(shown) + 0.9))
    axes = figure.add_axes((0.07, 0.55 / figure.get_figheight(), 0.7, 1 - 0.8 / figure.get_figheight()))
    colours = list(dict.fromkeys(str([s["options"].get(k) for k in _BITS]) for s in shown))
    styles = list(dict.fromkeys(method_name(s) for s in shown))
    ends = []
    for setting in shown:
        y = [sum(row) / len(row) for row in setting["attention_error"]]
        colour = COLOURS[colours.index(str([setting["options"].get(k) for k in _BITS])) % len(COLOURS)]
        style = styles.index(method_name(setting))
        marker, dash = MARKERS[style % len(MARKERS)], DASHES[style % len(DASHES)]
        axes.plot(range(len(y)), y, lw=1.4, ms=4.5, color=colour, marker=marker, linestyle=dash)
        ends.append((len(y) - 1.0, y[-1], setting["name"], colour))
    last = max(len(s["attention_error"]) for s in shown) - 1
    axes.set_xlim(-0.03 * max(1, last), 1.03 * max(1, last))
    axes.set_yscale("log")
    _plain_decades(axes.yaxis)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error (logarithmic)")
    _label_ends(axes, ends, 1.1 * max(1, last), "left")
    return _svg(figure)


def divergence_bars(settings: list[dict[str, Any]]) -> str | None:
    """KL divergence from the reference and agreement of tokens with it, one bar a setting."""
    panels = [
        ("kl", 1.0, "KL divergence from the reference, nats a token", "{:.3g}"),
        ("token_agreement", 100.0, "tokens equal to the reference's, %", "{:.1f}"),
    ]
    shown = [s for s in settings if not s["reference"] and any(_number(s[key]) for key, *_ in panels)]
    panels = [panel for panel in panels if any(_number(s[panel[0]]) for s in shown)]
    if not shown:
        return None
    figure = _figure(0.28 * len(shown) + 0.85)
    figure.set_layout_engine("constrained", w_pad=0.08)
    for i, (axes, (key, factor, label, form)) in enumerate(
        zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True)
    ):
        values = [factor * s[key] if _number(s[key]) else 0.0 for s in shown]
        bars = axes.barh(range(len(shown)), values, height=0.62, color=COLOURS[i])
        texts = [form.format(v) if _number(s[key]) else "" for s, v in zip(shown, values, strict=True)]
        axes.bar_label(bars, texts, padding=3, fontsize=9)
        axes.set_yticks(range(len(shown)), [s["name"] for s in shown] if i == 0 else [""] * len(shown))
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(0, max(values) * 1.18 or 1)
        if factor == 100.0:
            axes.set_xlim(0, 118)
            axes.set_xticks(range(0, 101, 20))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(label)
    return _svg(figure)


def histograms(entries: Sequence[dict[str, Any]]) -> str | None:
    """Distribution of channels with the levels that they were given, three in a row."""
    if not entries:
        return None
    rows = math.ceil(len(entries) / 3)
    figure = _figure(rows * 2.35)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    for i, axes in enumerate(figure.subplots(rows, 3, squeeze=False).flat):
        if i >= len(entries):
            axes.set_visible(False)
            continue
        entry = entries[i]
        axes.stairs(entry["counts"], entry["edges"], fill=True, color=COLOURS[4], alpha=0.75)
        # Many levels are short lines at the foot, so that they do not hide the bars.
        height, width = (1, 1.4) if len(entry["levels"]) <= 16 else (0.08, 0.5)
        axes.vlines(entry["levels"], 0, height, COLOURS[1], lw=width, transform=axes.get_xaxis_transform())
        place = f"layer {entry['layer']}, head {entry['head']}, {entry['kind']} channel {entry['channel']}"
        axes.set_title(f"{_wrap(entry['setting'], 34)}\n{place}", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(f"{entry['kind']} element")
        if i % 3 == 0:
            axes.set_ylabel("tokens")
    return _svg(figure)


def drawing_style() -> Any:
    """The context in which the functions above are to be called."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def _number(x: Any) -> bool:
    return isinstance(x, (int, float)) and math.isfinite(x)


def _or(x: Any, other: float) -> float:
    return x if _number(x) else other


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height))


def _series_style(i: int, reference: bool) -> dict[str, Any]:
    if reference:
        return {"color": INK, "marker": "*", "linestyle": "none"}
    turn = i // len(COLOURS)
    marker = MARKERS[(i + turn) % len(MARKERS)]
    return {"color": COLOURS[i % len(COLOURS)], "marker": marker, "linestyle": DASHES[turn % len(DASHES)]}


def _plain_decades(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 of each decade, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _label_ends(axes: Axes, ends: list[tuple[float, float, str, str]], at: float, align: str) -> None:
    """Names of points (x, y) in a column at ``at`` on the x axis, near them in height, with lines to the points."""
    figure = axes.get_figure()
    assert figure is not None
    transform = axes.transData + axes.transAxes.inverted()
    heights = [float(transform.transform((x, y))[1]) for x, y, _, _ in ends]
    order = sorted(range(len(ends)), key=heights.__getitem__)
    step = 14 / 72 * figure.dpi / axes.get_window_extent().height
    wanted = _apart([heights[i] for i in order], step)
    for i, height in zip(order, wanted, strict=True):
        x, y, name, colour = ends[i]
        line: dict[str, Any] = {"arrowstyle": "-", "color": colour, "lw": 0.7, "alpha": 0.7, "shrinkA": 1, "shrinkB": 4}
        text: dict[str, Any] = {"color": colour, "va": "center", "ha": align, "fontsize": 9.5}
        # The line starts at the middle of the side of the text that faces the points.
        line["relpos"] = (1.0, 0.5) if align == "right" else (0.0, 0.5)
        where = ("data", "axes fraction")
        axes.annotate(name, (x, y), (at, height), "data", where, arrowprops=line, **text)


def _apart(heights: list[float], step: float) -> list[float]:
    """Ascending heights moved as little as it takes to be ``step`` apart: runs that touch share their middle."""
    runs: list[tuple[float, int]] = []  # middle and number of labels
    for height in heights:
        middle, count = height, 1
        while runs and middle - runs[-1][0] < step * (count + runs[-1][1]) / 2:
            before, more = runs.pop()
            middle, count = (middle * count + before * more) / (count + more), count + more
        runs.append((middle, count))
    return [middle + step * (i - (count - 1) / 2) for middle, count in runs for i in range(count)]


def _wrap(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)) or text


def _svg(figure: Figure) -> str:
    """The element alone, sized by the page, with the page's colours."""
    out = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=metadata)
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", text))
    names = {INK: "--ink", FAINT: "--faint"} | {colour: f"--c{i}" for i, colour in enumerate(COLOURS)}
    for colour, name in names.items():
        text = text.replace(colour, f"var({name})")
    return text.strip()
