"""What the benchmark driver does without a GPU: tables, break-even, figures, refusals, and checks around timings."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from benchmarks import __main__ as driver
from benchmarks.cases import attention, breakeven, engine_pages
from benchmarks.lib import gpu, rivals
from benchmarks.lib.rivals import RivalTime
from benchmarks.lib.tables import markdown

SHAPE = "B64 Hq32 Hkv32 T2304"


def attention_rows() -> list[dict[str, Any]]:
    outcomes = [
        RivalTime("cudnn", 16, 3000, 8.0, 2e-4),
        RivalTime("flash", 16, 3000, 10.0, 2e-4),
        RivalTime("efficient", 16, 3000, note="not offered: no kernel"),
        RivalTime("flex fp8", 8, 1500, 6.0, 3e-4),
        RivalTime("vkvx", 1, 300, 2.0, 2e-4),
        RivalTime("triton", 1, 300, 5.0, 2e-4),
        RivalTime("vkvx, affine", 1, 300, 2.5, 2e-4),
        RivalTime("vkvx", 8, 2400, 4.0, 2e-4),
        RivalTime("triton", 8, 2400, 7.0, 2e-4),
    ]
    return [outcome.row(SHAPE, 3.0) for outcome in outcomes]


def breakeven_rows() -> list[dict[str, Any]]:
    return [
        {"heads": heads, "bits": bits, "batch": batch, "tokens": tokens, "us": 1.0, "speed-up": speed_up}
        for heads in breakeven.HEADS
        for batch in (4, 1)
        for bits in (8, 1)
        for tokens, speed_up in ((256, 0.5), (512, batch / 2 / bits), (1024, 4.0 / bits))
    ]


def test_markdown() -> None:
    rows = [{"name": "a|b", "us": 1234.5678}, {"name": "longer", "us": None}, {"name": "c", "us": 0.0002}]
    assert markdown(rows) == (
        "| name   | us     |\n|--------|--------|\n| a\\|b   | 1234.6 |\n| longer |        |\n| c      | 0.0002 |\n"
    )


def test_a_row_has_the_share_of_the_copy_bandwidth() -> None:
    row = RivalTime("vkvx", 1, 3_000_000, 2.0, 2.34e-4).row(SHAPE, 3000.0)
    assert (row["us"], row["% of copy"], row["error"]) == (2.0, 50.0, 2.3e-4)  # 1500 GB/s of 3000
    row = RivalTime("efficient", 16, 1, note="not offered: no kernel").row(SHAPE, 3000.0)
    assert (row["us"], row["% of copy"], row["note"]) == (None, None, "not offered: no kernel")
    json.dumps(row, allow_nan=False)


def test_tables_of_attention() -> None:
    ours, every, failed = attention.tables(attention_rows()).values()
    assert [line["bits"] for line in ours] == [1, 8]
    # A packed rival is compared at the same bits, 16-bit and 8-bit caches at theirs.
    ratios = {"x cudnn": (4.0, 2.0), "x flash": (5.0, 2.5), "x flex fp8": (3.0, 1.5), "x triton": (2.5, 1.75)}
    for name, expected in ratios.items():
        assert tuple(line[name] for line in ours) == expected
    assert [line["affine us"] for line in ours] == [2.5, None]
    assert "x efficient" not in ours[0]
    assert len(every) == 8
    assert failed == [{"method": "efficient", "why": "not offered: no kernel", "shapes": SHAPE}]


@pytest.mark.parametrize(
    ("speed_ups", "expected"),
    [
        ({256: 2.0, 512: 3.0}, 256),
        ({512: 1.1, 256: 0.9, 1024: 2.0}, 512),
        ({256: 2.0, 512: 0.8, 1024: 2.0}, 1024),  # what comes before a loss does not count
        ({256: 0.5, 512: 1.0}, None),
        ({256: 2.0, 512: None}, None),
        ({}, None),
    ],
)
def test_break_even(speed_ups: dict[int, float | None], expected: int | None) -> None:
    assert breakeven.break_even(speed_ups) == expected


def test_tables_of_break_even() -> None:
    first, every = breakeven.tables(breakeven_rows()).values()
    assert first[0] == {"heads": "Hq32 Hkv32", "bits": 1, "B1": "1024", "B4": "512"}
    assert first[1] == {"heads": "Hq32 Hkv32", "bits": 8, "B1": "over 1024", "B4": "over 1024"}
    assert [line["heads"] for line in first] == ["Hq32 Hkv32"] * 2 + ["Hq32 Hkv8"] * 2
    assert every[0] == {"heads": "Hq32 Hkv32", "bits": 1, "batch": 1, "256": 0.5, "512": 0.5, "1024": 4.0}
    faster = [row | {"speed-up": 2.0} for row in breakeven_rows()]
    assert breakeven.tables(faster).popitem()[1][0]["256"] == 2.0
    assert next(iter(breakeven.tables(faster).values()))[0]["B1"] == "≤ 256"


def test_figures_from_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rows in (("attention", attention_rows()), ("breakeven", breakeven_rows())):
        (tmp_path / f"{name}.json").write_text(json.dumps({"results": rows}))
    arguments = ["plots", "--results", str(tmp_path), "--images", str(tmp_path / "images")]
    driver.main(arguments)
    written = {path.stem: path.read_bytes() for path in (tmp_path / "images").glob("*.svg")}
    assert set(written) == {"attention-time", "attention-bandwidth", "breakeven"}
    texts = {
        name: {"".join(node.itertext()).strip() for node in ElementTree.fromstring(svg).iter() if "text" in node.tag}
        for name, svg in written.items()
    }
    assert {SHAPE, "vkvx", "triton", "flex fp8", "SDPA FP16, the fastest"} <= texts["attention-time"]
    assert "% of copy" in texts["attention-bandwidth"]
    assert {"Hq32 Hkv8, 1 bit", "Hq32 Hkv32, 8 bits", "4.0", "0.5"} <= texts["breakeven"]
    driver.main(arguments)
    assert {path.stem: path.read_bytes() for path in (tmp_path / "images").glob("*.svg")} == written
    assert capsys.readouterr().out.count("breakeven.svg") == 2


@pytest.mark.parametrize("content", [None, "{}", '{"results": [{"shape": "x"}]}', "{"])
def test_figures_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None) -> None:
    if content is not None:
        (tmp_path / "attention.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        driver.main(["plots", "--results", str(tmp_path), "--images", str(tmp_path)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "run" in error
    assert not list(tmp_path.glob("*.svg"))


@pytest.mark.parametrize("name", ["attention", "breakeven", "pack", "prefill"])
def test_refusal_without_a_gpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        driver.main([name, "-o", str(tmp_path / "result.json")])
    assert stopped.value.code == 2
    expected = "python -m benchmarks: error: this benchmark needs an NVIDIA GPU and a torch built for it\n"
    assert capsys.readouterr().err == expected
    assert not list(tmp_path.iterdir())


def test_results_are_written_as_json_and_markdown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        importlib.import_module("benchmarks.cases.attention"), "run", lambda arguments: attention_rows()
    )
    driver.main(["attention", "--bits", "1", "8", "-o", str(tmp_path / "new" / "result.json")])
    result = json.loads((tmp_path / "new" / "result.json").read_text())
    assert result["results"] == attention_rows()
    assert result["settings"]["bits"] == [1, 8]
    assert result["environment"]["torch"] == torch.__version__
    page = (tmp_path / "new" / "result.md").read_text()
    for title, table in attention.tables(attention_rows()).items():
        assert f"## {title}\n\n{markdown(table)}" in page
    assert page[page.index("##") :].strip() in capsys.readouterr().out


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Callable]:
    """Calls that were timed; each takes 5 us."""
    calls: list[Callable] = []
    monkeypatch.setattr(gpu, "microseconds", lambda call, cold: calls.append(call) or 5.0)
    return calls


def test_a_wrong_result_is_not_timed(timed: list[Callable]) -> None:
    expected = torch.ones(2, 3, dtype=torch.float64)
    right = rivals.measure("m", 16, 10, lambda: torch.ones(4, 3).half(), expected)
    assert (right.us, right.error, right.note) == (5.0, 0.0, "")
    for wrong in (torch.full((4, 3), 1.01), torch.full((4, 3), torch.nan)):
        outcome = rivals.measure("m", 16, 10, lambda wrong=wrong: wrong, expected)
        assert outcome.us is None
        assert outcome.note.startswith("wrong result")
    assert len(timed) == 1


def test_what_is_not_offered_has_its_reason(timed: list[Callable]) -> None:
    def refuse() -> None:
        raise RuntimeError("No available kernel.\nmore lines")

    outcome = rivals.measure("m", 16, 10, refuse, torch.ones(2, 3))
    assert (outcome.us, outcome.note) == (None, "not offered: No available kernel.")
    assert timed == []

    def exhaust() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        rivals.measure("m", 16, 10, exhaust, torch.ones(2, 3))


def test_exact_attention_of_grouped_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = ((3, 6, 1, 32), (3, 2, 5, 32), (3, 2, 5, 32))
    query, key, value = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert gpu.relative_error(rivals.exact(query, key, value), expected[:2]) < 1e-12


def test_the_faster_form_of_a_backend_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = torch.randn(2, 4, 1, 128), torch.randn(2, 2, 8, 128), torch.randn(2, 2, 8, 128)
    monkeypatch.setattr(rivals, "_random", lambda shape: [query, key, value])

    def measure(method: str, bits: int, size: int, call: Any, expected: Any, cold: bool) -> RivalTime:
        times = {("cudnn", False): 9.0, ("cudnn", True): 7.0, ("flash", False): 6.0, ("flash", True): 8.0}
        us = times.get(call.args[:2])
        return RivalTime(method, bits, size, us, 1e-4, "" if us else "not offered")

    monkeypatch.setattr(rivals, "measure", measure)
    monkeypatch.setattr(rivals, "_sdpa", lambda *arguments: arguments[:2])
    outcomes, fastest = rivals.sixteen_bits(gpu.DecodeShape(2, 4, 2, 8, 128))
    assert [(outcome.method, outcome.us) for outcome in outcomes] == [
        ("cudnn", 7.0),
        ("flash", 6.0),
        ("efficient", None),
    ]
    assert fastest is not None
    assert fastest(query, key, value) == ("flash", False)
    assert outcomes[0].cache_bytes == 4 * key.numel()


def test_copies_of_caches_in_a_graph_are_counted() -> None:
    """Copies into a cache, out of one, and elsewhere; a kernel between them."""

    def copy(source: int, target: int, width: int) -> SimpleNamespace:
        extent = SimpleNamespace(width=width, height=2, depth=1)
        return SimpleNamespace(srcPtr=SimpleNamespace(ptr=source), dstPtr=SimpleNamespace(ptr=target), extent=extent)

    nodes = [copy(64, 1000, 8), None, copy(5000, 1099, 4), copy(1100, 999, 50)]
    kinds = SimpleNamespace(cudaGraphNodeTypeMemcpy="copy", cudaGraphNodeTypeKernel="kernel")
    cuda = SimpleNamespace(
        cudaGraphNodeType=kinds,
        cudaGraphGetNodes=lambda handle, room: (0, nodes, len(nodes)),
        cudaGraphNodeGetType=lambda node: kinds.cudaGraphNodeTypeMemcpy if node else kinds.cudaGraphNodeTypeKernel,
        cudaGraphMemcpyNodeGetParams=lambda node: node,
    )
    opened = SimpleNamespace(
        gpu=SimpleNamespace(cuda=cuda, check=lambda value, what: value),
        cache=SimpleNamespace(buffers={"0.text_key": SimpleNamespace(address=1000, nbytes=100)}),
    )
    found = engine_pages.copies(opened, SimpleNamespace(handle=None))
    assert found == {"nodes": 4, "copies": 3, "copies_of_caches": 2, "largest_copy": 100}


def test_nudged_pages_are_off_by_rounding_and_the_same_each_time(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray] = {}
    for page in range(2):
        known = np.array([-0.5, 0.25 + page], np.float32)
        arrays |= {f"first.{page}": np.arange(3), f"second.{page}": np.arange(4)}
        arrays |= {f"known.x.{page}": known, f"numbers.x.{page}": np.arange(64, dtype=np.uint8).reshape(8, 8) % 2}
    np.savez(tmp_path / "pages.npz", **arrays)  # type: ignore[arg-type]
    graph = SimpleNamespace(inputs=[SimpleNamespace(name="x")])
    manifest = SimpleNamespace(model=SimpleNamespace(usual_tokens=9), graphs={"vision": graph})

    def pixels(nudge: bool) -> np.ndarray:
        pages = list(engine_pages.read_pages(tmp_path / "pages.npz", manifest, nudge))  # type: ignore[arg-type]
        assert pages[0][1].vision_calls[0] is pages[1][0].vision_calls[0], "the second turn shows the next page"
        return np.stack([turns[0].vision_calls[0]["x"] for turns in pages])  # type: ignore[index]

    plain, nudged = pixels(False), pixels(True)
    assert plain.dtype == nudged.dtype == np.float32
    assert plain[0, 0].tolist() == [-0.5, 0.25] * 4
    moved = np.abs(nudged / plain - 1)
    assert 2.0**-13 < moved.max() <= 2.0**-11 + 1e-7
    assert len(np.unique(nudged[0])) == 64
    assert np.array_equal(nudged, pixels(True))


def test_engine_pages_says_in_one_line_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        engine_pages.main(["run", str(tmp_path), str(tmp_path / "none")])
    assert stop.value.code == 2
    assert "vkvx export" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
