"""The driver of throughput on a CPU, over tiny models: batches, checks, resumed runs, a server's waiting times."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from benchmarks import __main__ as driver
from benchmarks.cases import throughput
from benchmarks.lib import batches, dense, gpu, memory, serving
from benchmarks.lib.dense import DYNAMIC, FP8
from benchmarks.lib.serving import Model, Rows, Setting, Workload
from vkvx.errors import CapacityError, OptionError

SHAPE = "tiny-qwen2.5-vl"
LOAD = Workload(SHAPE, 2, 16, text=8, answer=12)
ROWS = 5
TAKEN = 1 << 20
"""Bytes that the stand-in for a GPU says that a request takes besides its row."""


class FakeBudget:
    """A GPU whose memory nobody measures: what fits is what the numbers say."""

    def __init__(self, size: int) -> None:
        self.size = size

    def limit(self) -> int:
        return self.size

    def left(self) -> int:
        return 0

    def holds(self) -> bool:
        return True

    def __enter__(self) -> FakeBudget:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    """Random weights in FP16, whose logits are off from FP32 as on a GPU."""
    import transformers

    from vkvx.models.presets import preset_config

    torch.manual_seed(0)
    config = preset_config(SHAPE)
    model = getattr(transformers, config.architectures[0])(config).half().eval().requires_grad_(False)
    for module in (serving, dense):
        monkeypatch.setattr(module, "STEPS", 2)
        monkeypatch.setattr(module, "WARM_UP", 1)
    return Model(LOAD, model)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, model: Model) -> Model:
    """The driver for this model alone, without a GPU."""
    monkeypatch.setattr(gpu, "library", lambda: None)
    monkeypatch.setattr(throughput, "WORKLOADS", {SHAPE: LOAD})
    fresh = copy.deepcopy(model.model)  # sessions set how the tower attends, which transformers' own calls do not know
    monkeypatch.setattr(throughput, "_model", lambda shape, layers: Model(LOAD, copy.deepcopy(fresh)))
    monkeypatch.setattr(memory, "free", lambda: None)
    monkeypatch.setattr(memory, "Budget", FakeBudget)
    monkeypatch.setattr(memory, "allocated_peak", lambda: model.weights + model.slot_bytes(Setting(1)) + TAKEN)
    monkeypatch.setattr(memory, "parts", lambda weights, cache: memory.Parts(weights, cache, 1, 2, 3, 4))
    return model


def budget_of(model: Model, rows: int) -> float:
    """GB for so many rows at 1 bit."""
    row = model.slot_bytes(Setting(1)) + batches._LOGIT_BYTES * model.info.vocab_size
    return (model.weights + TAKEN + batches._SLACK + rows * row + row // 2) / 1e9


def results(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text(encoding="utf-8"))["results"])


def test_cells_are_measured_once_and_again_when_code_changes(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, budget = tmp_path / "result.json", budget_of(tiny, ROWS)
    asked = ["throughput", "-o", str(output), "--budget", str(budget), "--contender"]
    driver.main([*asked, "1", "transformers dynamic"])
    check, rival, ours = results(output)
    assert 0 < check["captured"] <= 2 * check["transformers"] < 0.01
    assert (rival["contender"], ours["contender"], ours["rows"]) == (DYNAMIC, "1", ROWS)
    rows = (budget * 1e9 - tiny.weights) / (LOAD.prompt + LOAD.answer) / (2 * 2 * 2 * 64 * 2)
    assert 1 <= rival["rows"] <= rows
    assert ours.get("equal rows") == (rival["rows"] if rival["rows"] <= ROWS else None)
    assert ours["cache GB"] == round(ROWS * tiny.slot_bytes(Setting(1)) / 1e9, 2)
    assert ours["captured against eager"] == 0.0  # on a CPU nothing is captured
    page = output.with_suffix(".md").read_text(encoding="utf-8")
    assert "vkvx 1 " in page
    assert round(ours["sampled tokens/s"] / rival["sampled tokens/s"], 2) == pytest.approx(
        float(next(line for line in page.splitlines() if "| vkvx 1 " in line).split("|")[-3]), rel=1e-4
    )
    capsys.readouterr()
    driver.main([*asked, "1", "transformers dynamic", "16"])
    assert [row["contender"] for row in map(json.loads, lines(capsys))] == ["16"]
    assert results(output)[:3] == [check, rival, ours]
    monkeypatch.setattr(throughput, "_code", lambda: "another")
    driver.main([*asked, "16"])
    assert [row.get("contender") for row in map(json.loads, lines(capsys))] == [None, "16"]
    assert [row["code"] == "another" for row in results(output)] == [False, False, True, True]


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def test_a_batch_shrinks_until_it_fits_and_grows_where_much_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free", lambda: None)
    whole, tried = FakeBudget(0), list[int]()

    def attempt(most: int) -> Any:
        def run(rows: int) -> dict[str, Any]:
            tried.append(rows)
            if rows > most:
                raise (CapacityError("no") if rows % 2 else torch.OutOfMemoryError("no"))
            return {"rows": rows}

        return run

    assert batches._largest(whole, 100, 10, attempt(92)) == {"rows": 90}
    assert tried == [100, 95, 90]
    whole.left = lambda: 105  # type: ignore[method-assign]
    assert batches._largest(whole, 50, 10, attempt(60)) == {"rows": 60}
    assert batches._largest(whole, 50, 10, attempt(59)) == {"rows": 50}
    assert "note" in batches._largest(whole, 50, 10, attempt(1))
    assert batches._largest(whole, 0, 10, attempt(9)) == {"note": "one request does not fit"}


def test_what_does_not_fit_or_run_has_its_reason(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: Any, **options: Any) -> Any:
        raise ImportError("You need to install `hqq`\nmore")

    monkeypatch.setattr("transformers.QuantizedCache", missing)
    output = tmp_path / "result.json"
    asked = ["throughput", "-o", str(output), "--contender", FP8]
    driver.main([*asked, "16", "--budget", "0.001", "--shape", SHAPE])
    driver.main([*asked, "1", "--budget", str(budget_of(tiny, ROWS)), "--prefill-chunk", "5"])
    notes = {(row["contender"], row["budget"] < 0.0015): row["note"] for row in results(output)[1:]}
    assert notes[FP8, True] == notes["16", True] == f"weights of {tiny.weights / 1e9:.1f} GB and a request do not fit"
    assert notes[FP8, False] == "You need to install `hqq`"
    assert notes["1", False].startswith("prefill_chunk (--prefill-chunk) must be at least 128")
    assert "You need to install" in output.with_suffix(".md").read_text(encoding="utf-8")


def test_wrong_logits_and_wrong_tokens_are_told(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    session = tiny.open(Setting(1), 3)
    right = Rows.logits
    found = batches._checked(session, 3, tiny, 1e-3, 2)
    assert found == {"captured against eager": 0.0}
    other = lambda self, fed, *, captured: right(self, fed, captured=captured)[..., ::-1].copy()  # noqa: E731
    monkeypatch.setattr(Rows, "logits", other)
    with pytest.raises(SystemExit, match="below the largest"):
        batches._checked(session, 3, tiny, 1e-3, 2)
    noise = lambda self, fed, *, captured: right(self, fed, captured=captured) * (1.1 if captured else 1.0)  # noqa: E731
    monkeypatch.setattr(Rows, "logits", noise)
    with pytest.raises(SystemExit, match="captured logits differ"):
        batches._checked(session, 3, tiny, 1e-3, 2)
    session.close()
    with pytest.raises(SystemExit, match="logits are off"):
        batches.check_logits(throughput._model(SHAPE, None))


def test_rows_are_copies_that_go_their_own_ways(tiny: Model) -> None:
    """A row's steps are those of a session that is given its tokens after the prompt."""
    session = tiny.open(Setting(2), 3)
    rows = Rows(session, 3)
    tokens = np.array(rows.steps(3, 3))
    assert rows.steps(3, 3) == tokens.tolist()
    assert rows.steps(2, 3) == tokens[:, :2].tolist()
    rows.close()
    prepared = tiny.prompts.prepare("0")
    assert len(prepared.token_ids) == LOAD.prompt
    with session.conversation() as one:
        one.generate("0", max_new_tokens=1, ignore_eos=True)
        cache = session.backend.cache
        for token, expected in zip([12, *tokens[:-1, 2]], tokens[:, 2], strict=True):
            fed = cache.row(one.slot, np.array([token], np.int32))
            from vkvx.runtime.calls import build_call

            logits = session.backend.step(build_call([fed], group_size=cache.group_size, image_token_id=-1), None)
            logits[0, tiny.info.image_token_id] = -np.inf
            assert logits[0].argmax() == expected
    assert serving.prompts_at_once(session, 2, 10)[0] > 0
    session.close()


def test_a_servers_waiting_times(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"SLOTS": 3, "LIVE": 2, "LONG_ANSWER": 300, "ANSWER": 3, "DISTURBING": 1, "EVERY": 0.3}
    for name, value in sizes.items():
        monkeypatch.setattr(throughput, name, value)
    output = tmp_path / "result.json"
    asked = ["--part", "arrivals", "--contender", "16", "--rate", "40", "--seconds", "0.1"]
    driver.main(["throughput", "-o", str(output), *asked])
    (row,) = results(output)
    (rate,) = row["rates"]
    arrivals = np.cumsum(np.random.default_rng(0).exponential(1 / 40, 16))
    assert rate["requests"] == np.count_nonzero(arrivals < 0.1)
    for found in (rate, row["live"]):
        for name in ("first token ms", "gap ms"):
            assert 0 < found[f"{name} p50"] <= found[f"{name} p99"] <= found[f"{name} max"]
    live = row["live"]
    assert (live["live rows"], live["prompts"]) == (2, 1)
    assert live["p99 over step"] == pytest.approx(live["gap ms p99"] / live["step ms"], rel=0.01)


@pytest.mark.parametrize("text", ["", "x", "1/", "1/x", "1+graph", "1/8+", "/8", "1/8+compile+compile"])
def test_a_wrong_contender(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OptionError, match="contender"):
        Setting.parse(text)
    with pytest.raises(SystemExit) as stopped:
        driver.main(["throughput", "--contender", text, "-o", str(tmp_path / "result.json")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["16", "1", "1/8", "2/8+compile", "4+compile"])
def test_contenders_are_written_as_they_are_read(text: str) -> None:
    assert str(Setting.parse(text)) == text


def test_a_file_of_something_else_is_kept(tiny: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        driver.main(["throughput", "-o", str(tmp_path / "result.json")])
    assert stopped.value.code == 2
    assert "another file" in capsys.readouterr().err
    assert (tmp_path / "result.json").read_text() == "{}"


def test_figures(tmp_path: Path) -> None:
    batch = [
        {
            "part": "batch",
            "shape": shape,
            "budget": budget,
            "contender": name,
            "fill": "",
            "chunk": 640 if name == "1/8" else 0,
            "sampled tokens/s": 10 * budget,
        }
        for shape in ("a", "b")
        for budget in (8.0, 24.0)
        for name in (DYNAMIC, "16", "1", "1/8")
    ]
    waits = {f"{name} ms {part}": 5.0 for name in ("first token", "gap") for part in ("p50", "p99")}
    rates = [{"rate": rate, **waits} for rate in (1.0, 2.0)]
    served = [
        {"part": "arrivals", "shape": "a", "contender": "1", "chunk": chunk, "rates": rates} for chunk in (0, 640)
    ]
    (tmp_path / "throughput.json").write_text(json.dumps({"results": [*batch, *served]}))
    driver.main(["plots", "--results", str(tmp_path), "--images", str(tmp_path)])
    texts = {
        path.stem: {"".join(node.itertext()).strip() for node in ElementTree.fromstring(path.read_bytes()).iter()}
        for path in tmp_path.glob("*.svg")
    }
    assert set(texts) == {"throughput", "arrivals"}
    assert {"a", "b", DYNAMIC, "vkvx 1/8, chunks of 640", "24"} <= texts["throughput"]
    assert {"a, vkvx 1, p50", "a, vkvx 1, chunks of 640, p99", "gap between tokens, ms"} <= texts["arrivals"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_budget_holds_all_that_the_process_takes() -> None:
    torch.zeros(1, device="cuda")
    available, total = torch.cuda.mem_get_info()
    size = total - available + (512 << 20)
    with memory.Budget(size) as budget:
        weights = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
        work = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
        del work
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
        assert budget.holds()
        found = memory.parts(weights.nbytes, 0)
    held = found.total - found.outside
    assert 192 << 20 <= held <= budget.limit()
    assert (found.weights, found.working >= 64 << 20) == (128 << 20, True)
    assert 0 < budget.left() <= size - found.total
    del weights
    memory.free()
    torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
