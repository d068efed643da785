"""The page of an evaluation: complete without network or script, well formed, escaped, and whole or not there."""

from __future__ import annotations

import copy
import itertools
import os
import re
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from vkvx.errors import DependencyError, InputError, StorageError
from vkvx.evaluation.examples import Example
from vkvx.evaluation.html import check_report, write_html
from vkvx.packages import extra

SVG = "{http://www.w3.org/2000/svg}"


def metric(mean: float, reference: bool) -> dict[str, float | None]:
    shift = None if reference else mean - 0.9
    difference = {
        "difference": shift,
        "difference_low": shift and shift - 0.02,
        "difference_high": shift and shift + 0.02,
    }
    return {"mean": mean, "low": mean - 0.03, "high": mean + 0.03, **difference}


def setting(name: str, bits: int, mean: float, **options: Any) -> dict[str, Any]:
    reference = bits == 16
    return {
        "name": name,
        "options": {"bits": bits, **options},
        "reference": reference,
        "metrics": {"per_digit": metric(mean, reference), "exact": metric(mean / 2, reference)},
        "token_agreement": None if reference else mean,
        "equal_answers": None if reference else mean / 3,
        "kl": None if reference else 1 - mean,
        "attention_error": None if reference else [[(1 - mean) * (1 + i + h) for h in range(3)] for i in range(2)],
        "bits_per_element": bits + 0.15,
        "visual_bytes": bits * 70_000.0,
        "seconds": 1.25,
    }


def result() -> dict[str, Any]:
    return {
        "format": "vkvx-eval",
        "version": 1,
        "vkvx_version": "0.1.0",
        "target": "models/<tiny> & co",
        "kind": "torch",
        "device": "cpu",
        "dtype": "float32",
        "task": "transcribe",
        "samples": 40,
        "environment": {"python": "3.11.9", "cpu": "Model <X>", "threads": 1, "gpu": None},
        "settings": [
            setting("16 bits", 16, 0.9),
            setting("1 bit, lloyd, <expected>", 1, 0.8, quantizer="lloyd", score_correction="expected"),
            setting("2 bits, lloyd & co", 2, 0.88, quantizer="lloyd", score_correction="expected"),
            setting('2 bits, "affine"', 2, 0.7, quantizer="shrink", score_correction="affine", tau=2.0),
        ],
        "histograms": [
            {
                "setting": "1 bit, lloyd, <expected>",
                "layer": 1,
                "head": 0,
                "kind": "key",
                "channel": 7,
                "edges": [-1.0, 0.0, 1.0, 2.0],
                "counts": [3, 9, 4],
                "levels": [-0.5, 1.25],
            }
        ],
    }


def without_nulls_to_show() -> dict[str, Any]:
    """As of a bundle: no attention error, no distances, no reference."""
    document = result()
    document["histograms"] = []
    for s in document["settings"]:
        s["reference"] = False
        for name in ("token_agreement", "equal_answers", "kl", "attention_error"):
            s[name] = None
        for m in s["metrics"].values():
            m.update(dict.fromkeys(("difference", "difference_low", "difference_high")))
    return document


class Page(HTMLParser):
    """Everything of a page that a browser would fetch or run, and whether its elements close in order."""

    VOID = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object", "base")
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        self.ids += [v or "" for k, v in attrs if k == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(document: dict[str, Any], folder: Path) -> str:
    path = folder / "page.html"
    write_html(document, path)
    return path.read_text(encoding="utf-8")


def figures_of(text: str) -> list[ElementTree.Element]:
    svgs = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert len(svgs) == text.count("<svg")
    return [ElementTree.fromstring(svg) for svg in svgs]


def words_of(figure: ElementTree.Element) -> list[str]:
    return ["".join(element.itertext()).strip() for element in figure.iter(f"{SVG}text")]


def test_the_whole_page(tmp_path: Path) -> None:
    document = result()
    text = page_of(document, tmp_path)
    for s in document["settings"]:
        assert f"<td>{escape(s['name'])}</td>" in text
    assert "<expected>" not in text
    assert "<tiny>" not in text
    assert "<X>" not in text
    # 0.8 with its interval, and its difference from 0.9, as in the terminal.
    assert '<td data-title="digits %">80.00 ±\u00a03.00</td>' in text
    assert '<td data-title="digits % − 16 bits">−10.00 ±\u00a02.00</td>' in text
    figures = figures_of(text)
    assert len(figures) == text.count("<figure") == 5
    curve, maps, lines, bars, channels = (words_of(figure) for figure in figures)
    assert {"16 bits", "lloyd, expected", "shrink, affine, tau 2.0", "digits %", "80"} <= set(curve)
    for words in (maps, lines, bars):
        assert "16 bits" not in words
        assert {s["name"] for s in document["settings"][1:]} <= set(words)
    assert {"0.2", "80.0"} <= set(bars)
    assert {"layer 1, head 0, key channel 7", "tokens"} <= set(channels)


def test_nothing_is_loaded(tmp_path: Path) -> None:
    text = page_of(result(), tmp_path)
    page = Page(text)
    assert page.open == []
    inside = [target[1:] for target in page.fetched if target.startswith("#")]
    assert inside
    assert set(inside) <= set(page.ids)
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in page.fetched)
    assert len(page.ids) == len(set(page.ids))
    namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.search(r"https?://|@import|url\((?!#)", namespaces)


def test_levels_lie_where_they_belong(tmp_path: Path) -> None:
    """The x of the two vertical lines, measured on the edges of the bars, is that of the levels."""
    figure = figures_of(page_of(result(), tmp_path))[-1]
    paths = [p for p in figure.iter(f"{SVG}path") if p.get("d")]
    styled = {p.get("style", ""): p for p in paths}
    bars = next(p for style, p in styled.items() if "fill: var(--c4)" in style)
    x = [float(v) for v in re.findall(r"[ML] ([\d.]+)", bars.get("d", ""))]
    lines = [p for p in paths if "var(--c1)" in p.get("style", "") and p.get("d", "").count("L") == 1]
    found = sorted(float(re.findall(r"M ([\d.]+)", p.get("d", ""))[0]) for p in lines)
    scale = (max(x) - min(x)) / 3.0
    assert [(v - min(x)) / scale - 1.0 for v in found] == pytest.approx([-0.5, 1.25], abs=0.02)


def test_what_is_null_is_left_out(tmp_path: Path) -> None:
    text = page_of(without_nulls_to_show(), tmp_path)
    assert len(figures_of(text)) == 1
    for heading in ("KL", "tokens %", "− 16 bits", "None", "null", "nan"):
        assert heading not in text
    assert "80.00 ±\u00a03.00" in text


def test_no_metric_and_one_null_among_numbers(tmp_path: Path) -> None:
    document = result()
    for s in document["settings"]:
        s["metrics"] = {}
    document["settings"][1]["kl"] = None
    text = page_of(document, tmp_path)
    assert len(figures_of(text)) == 4
    assert ">–</td>" in text


def test_many_settings_and_large_models(tmp_path: Path) -> None:
    """Names do not overlap: in a column of labels each is at least its height from the next."""
    document = result()
    for i in range(24):
        s = setting(f"setting {i}", 1 + i % 2, 0.8 + i / 1000, quantizer=f"method {i}")
        s["attention_error"] = [[0.1 + i / 1000] * 32] * 40
        document["settings"].append(s)
    curve, _, lines = figures_of(page_of(document, tmp_path))[:3]
    for figure, start in ((curve, "method"), (lines, "setting")):
        labels = [e for e in figure.iter(f"{SVG}text") if "".join(e.itertext()).startswith(start)]
        heights = sorted(float(e.get("y", "nan")) for e in labels)
        assert len(heights) >= 24
        assert min(b - a for a, b in itertools.pairwise(heights)) > 9.5


def test_the_same_document_gives_the_same_page(tmp_path: Path) -> None:
    document = result()
    before = copy.deepcopy(document)
    assert page_of(document, tmp_path) == page_of(document, tmp_path)
    assert document == before


def test_an_older_page_is_replaced_and_nothing_else_left(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    write_html(result(), path)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing" / "page.html", tmp_path / "file" / "page.html", tmp_path):
        with pytest.raises(StorageError, match="cannot write"):
            write_html(result(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="no room left"):
        write_html(result(), path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for act in (lambda path: check_report(path, False), lambda path: write_html(result(), path)):
        with pytest.raises(DependencyError, match=re.escape(f"'matplotlib' is missing; run {extra('eval')}")):
            act(tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


EXAMPLE = Example(
    place="questions.jsonl:7",
    prompt="What is <this>?",
    pictures=("data:image/jpeg;base64,AAAA",) * 2,
    picture_count=5,
    answers=("a cat", "cat & dog"),
    metric="f1",
    given={"16 bits": ("a cat", 1.0), "1 bit, lloyd, <expected>": ("two\nlines", 0.25)},
)


def test_examples_and_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_html(result(), path, examples=[EXAMPLE], command="vkvx eval 'a <b>' --html page.html")
    text = path.read_text(encoding="utf-8")
    assert '<code class="command">vkvx eval &#x27;a &lt;b&gt;&#x27; --html page.html</code>' in text
    assert "questions.jsonl:7: What is &lt;this&gt;?" in text
    assert "<td>a cat | cat &amp; dog</td><td>F1 %</td>" in text
    assert "<td>16 bits</td><td>a cat</td><td>100.00</td>" in text
    assert "<td>two\nlines</td><td>25.00</td>" in text
    assert "and 3 more" in text
    page = Page(text)
    assert page.open == []
    assert page.fetched.count("data:image/jpeg;base64,AAAA") == 2


def test_where_a_report_may_go(tmp_path: Path) -> None:
    page, other = tmp_path / "page.html", tmp_path / "questions.jsonl"
    check_report(page, False)
    write_html(result(), page)
    other.write_text("{}")
    check_report(page, True)
    for path, force, words in (
        (page, False, "page.html exists; give --force"),
        (other, False, "is no report of `vkvx eval`"),
        (other, True, "is no report of `vkvx eval`"),
        (tmp_path, True, "is a directory"),
        (tmp_path / "absent" / "page.html", False, "there is no directory for"),
        (Path("/dev/null"), True, "is no plain file"),
    ):
        with pytest.raises(StorageError, match=words):
            check_report(path, force)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in, since nothing is forbidden to root."""

    def forbid(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", forbid)
    with pytest.raises(StorageError, match=r"page\.html: Permission denied; change its rights, or choose"):
        check_report(tmp_path / "page.html", False)


@pytest.mark.parametrize("wrong", [{"format": "other"}, {"version": 2}])
def test_another_format(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'vkvx-eval' version 1"):
        write_html(result() | wrong, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []
