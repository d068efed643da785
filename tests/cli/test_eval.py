"""``vkvx eval`` as a user runs it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from samples import Page

from vkvx import evaluation
from vkvx.cli import main
from vkvx.errors import StorageError
from vkvx.evaluation import html, tasks
from vkvx.evaluation import run as module
from vkvx.packages import extra

FAST = ("--device", "cpu", "--dtype", "float32", "--max-new-tokens", "30")


@pytest.fixture
def questions(tmp_path: Path, pages: list[Page]) -> Path:
    path = tmp_path / "questions.jsonl"
    line = {"image": str(pages[0].path), "prompt": "Read row 2.", "answers": [pages[0].truth.split("\n")[1]]}
    path.write_text(json.dumps(line) + "\n", encoding="utf-8")
    return path


def test_table_and_report(cli: Callable, tmp_path: Path, pages: list[Page]) -> None:
    report = tmp_path / "report.html"
    result = cli("eval", "tiny-llava", "--samples", "1", "--bits", "16,8", *FAST, "--html", report)
    assert result.code == 0, result.err
    text = report.read_text(encoding="utf-8")
    assert f"vkvx eval tiny-llava --samples 1 --bits 16,8 {' '.join(FAST)} --html {report}</code>" in text
    assert text.count('<img src="data:image/jpeg;base64,') == 1
    assert text.count(f"<td>{pages[0].truth}</td>") == 3  # right, and as both settings answer
    assert '<td data-title="digits %">100.00</td>' in text
    head, empty, titles, *rows = result.out.splitlines()
    assert (head, empty) == ("tiny-llava (torch, cpu, float32), digits: 1 sample", "")
    assert titles.split("  ")[0] == "setting"
    assert [title in titles for title in ("digits %", "exact % - 16 bits", "tokens %", "KL", "attention", "bits")]
    reference, packed = (row.split() for row in rows)
    assert reference[:4] == ["16", "bits", "100.00", "-"]  # no interval of one sample
    assert packed[:4] == ["8", "bits,", "shaped,", "expected"]
    assert packed[4:6] == ["100.00", "+0.00"]
    assert len({len(line.rstrip()) for line in (titles, *rows)}) == 1  # aligned


def test_results_are_told_even_if_the_report_fails(
    cli: Callable, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise StorageError("no room left")

    found = SimpleNamespace(to_json=lambda: {"figures": 1}, examples=[])
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: found)
    monkeypatch.setattr(html, "write_html", fail)
    result = cli("eval", "tiny-llava", "--data", questions, "--json", "--html", tmp_path / "report.html")
    assert (result.code, json.loads(result.out)) == (2, {"figures": 1})
    assert result.err.splitlines() == ["vkvx: error: no room left; only the report is missing"]


def test_a_sample_that_cannot_be_used_is_told_before_weights_are_read(
    cli: Callable, questions: Path, tmp_path: Path, pages: list[Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_Engine", None)
    output = tmp_path / "records.jsonl"
    arguments = ("eval", "tiny-llava", "--data", questions, "-o", output)
    result = cli(*arguments, "--max-new-tokens", "4000")
    assert result.code == 2
    assert f"error: {questions}:1: prompt and answer take " in result.err
    (tmp_path / "bad.png").write_bytes(pages[0].path.read_bytes()[:3000])
    line = {"image": "bad.png", "prompt": "What?", "answers": ["x"]}
    questions.write_text(f"{questions.read_text()}\n{json.dumps(line)}\n")
    result = cli(*arguments)
    assert result.code == 2
    assert f"error: {questions}:3: {tmp_path / 'bad.png'} cannot be read as a picture" in result.err
    assert not output.exists()


def test_packages_come_first(
    cli: Callable, questions: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures are not opened, and all that is missing is named at once."""
    monkeypatch.setattr(tasks, "prepare", None)
    for name in ("rapidfuzz", "pycocoevalcap", "sklearn", "torch", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    metrics = ("--metrics", "anls,cider")
    for arguments, absent in (
        (("tiny-llava", "--data", questions, *metrics), "'torch', 'rapidfuzz' and 'pycocoevalcap' are"),
        ((tiny_bundle, "--data", questions, "--no-reference"), "'onnxruntime' is"),
        (("tiny-llava",), "'torch' and 'scikit-learn' are"),
        (("tiny-llava", "--sensitivity"), "'torch' and 'scikit-learn' are"),
    ):
        result = cli("eval", *arguments)
        assert result.code == 2
        assert f"{absent} missing; run {extra('eval')}" in result.err


def test_json_is_all_there_is_on_stdout(cli: Callable, questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "records.jsonl"
    arguments = ("eval", "tiny-llava", "--data", questions, "--json", "-o", output, *FAST)
    settings = ("--bits", "1", "--quantizer", "shaped,minmax", "--setting", "bits=8,score-correction=none")
    result = cli(*arguments, *settings, "--metrics", "exact, anls,f1,cider")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert [setting["name"] for setting in document["settings"]] == [
        "16 bits",
        "1 bit, shaped, expected",
        "1 bit, minmax, expected",
        "8 bits, shaped, none",
    ]
    assert list(document["settings"][0]["metrics"]) == ["exact", "anls", "f1", "cider"]
    assert document["settings"][0]["metrics"]["exact"]["mean"] == 1
    again = cli(*arguments, *settings)  # other metrics need no other records
    assert json.loads(again.out)["settings"][3]["kl"] == document["settings"][3]["kl"]
    refused = cli(*arguments, "--bits", "2")
    assert (refused.code, json.loads(refused.out)["error"]["type"]) == (2, "StorageError")
    assert "is of another evaluation" in refused.err
    assert cli(*arguments, "--bits", "2", "--force").code == 0


def test_sensitivity(cli: Callable, questions: Path) -> None:
    arguments = ("eval", "tiny-llava", "--data", questions, "--sensitivity", "--budget", "2.5", *FAST)
    result = cli(*arguments)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[1].startswith("base: 1 bit, shaped, expected; KL ")
    assert [line.split()[:2] for line in lines[4:12]] == [[str(i), bits] for i in range(4) for bits in ("2", "4")]
    assert lines[-1].startswith("--bits 1 --bits-per-layer ")
    assert lines[-1].endswith(" of 2.50 bits per element)")
    other = cli(*arguments, "--json", "--bits", "4", "--quantizer", "minmax", "--budget", "6")
    document = json.loads(other.out)
    assert (document["format"], document["bits"], document["base"]) == (
        "vkvx-sensitivity",
        4,
        "4 bits, minmax, expected",
    )
    assert {step["bits"] for step in document["steps"]} == {8}


def test_ctrl_c_says_where_the_records_are(
    cli: Callable, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "records.jsonl"
    monkeypatch.setattr(module._Engine, "measure", stop)
    result = cli("eval", "tiny-llava", "--data", questions, "-o", output, *FAST)
    assert result.code == 130
    assert f"what is done is in {output}; the same command goes on from there" in result.err
    monkeypatch.undo()
    assert cli("eval", "tiny-llava", "--data", questions, "-o", output, *FAST).code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nosuchmodel"], "unknown model 'nosuchmodel'"),
        (["tiny-llava", "--task", "chess"], "unknown task 'chess'"),
        (["tiny-llava", "--samples", "0"], "samples= (--samples) 0"),
        (["tiny-llava", "--metrics", "f1"], "metrics= (--metrics) has no effect on digits"),
        (["tiny-llava", "--data", "/nowhere.jsonl"], "no file at /nowhere.jsonl"),
        (["tiny-llava", "--data", "QUESTIONS", "--task", "digits"], "(--task) digits has no effect with data="),
        (["tiny-llava", "--data", "QUESTIONS", "--metrics", "bleu"], "unknown metric 'bleu'"),
        (["tiny-llava", "--bits", "1,x"], "--bits 'x' is not understood"),
        (["tiny-llava", "--bits", "3"], "3 bits are not supported"),
        (["tiny-llava", "--tau", "2"], "tau= (--tau) has no effect with expected"),
        (["tiny-llava", "--group-size", "100"], "group size 100"),
        (["tiny-llava", "--bits-per-layer", "0:8", "--bits-per-layer", "7:8"], "names layer 7"),
        (["tiny-llava", "--setting", "quantiser=lloyd"], "'quantiser=lloyd' in --setting"),
        (["tiny-llava", "--batch", "0"], "--batch 0"),
        (["tiny-llava", "--budget", "2"], "--budget has no effect without --sensitivity"),
        (["tiny-llava", "--force"], "--force has no effect without --output or --html"),
        (["tiny-llava", "--sensitivity", "--force"], "--force has no effect without --output"),
        (["tiny-llava", "--sensitivity", "--bits", "16"], "--bits 16 has no effect with --sensitivity"),
        (["tiny-llava", "--html", "/nowhere/report.html"], "no directory for /nowhere/report.html"),
        (["tiny-llava", "--data", "QUESTIONS", "--html", "QUESTIONS"], "is no report of `vkvx eval`"),
        (["tiny-llava", "--data", "QUESTIONS", "--html", "QUESTIONS", "--force"], "is no report of `vkvx eval`"),
        (["tiny-llava", "-o", "new", "--html", "./new"], "--html and --output name the same file"),
        (["tiny-llava", "-o", "/nowhere/records.jsonl"], "/nowhere/records.jsonl"),
        (["tiny-llava", "-o", "QUESTIONS"], "holds no records of `vkvx eval`"),
        (["tiny-llava", "--no-reference"], "--no-reference has no effect on a checkpoint"),
        (["tiny-llava", "--sensitivity", "--html", "x"], "--html has no effect with --sensitivity"),
        (["tiny-llava", "--sensitivity", "--no-reference"], "leave out --no-reference"),
        (["tiny-llava", "--sensitivity", "--bits", "1,2"], "starts from one setting, not from 2"),
        (["tiny-llava", "--sensitivity", "--budget", "1"], "budget= (--budget) 1.0 is not above"),
        (["BUNDLE", "--bits", "2"], "a bundle has one setting, its own"),
        (["BUNDLE", "--dtype", "float32"], "dtype= (--dtype) has no effect on a bundle"),
        (["BUNDLE", "--sensitivity"], "--sensitivity needs a checkpoint"),
        (["BUNDLE", "--model", "nosuchmodel"], "unknown model 'nosuchmodel'"),
    ],
)
def test_mistakes_are_one_line(
    capfd: pytest.CaptureFixture[str], tiny_bundle: Path, questions: Path, arguments: list[str], words: str
) -> None:
    before = questions.read_bytes()
    places = {"BUNDLE": str(tiny_bundle), "QUESTIONS": str(questions)}
    code = main(["eval", *(places.get(argument, argument) for argument in arguments)])
    captured = capfd.readouterr()
    assert (code, captured.out) == (2, "")
    line = captured.err.splitlines()[-1]
    assert line.startswith("vkvx: error: ")
    assert words in line
    assert "Traceback" not in captured.err
    assert questions.read_bytes() == before
    assert sorted(path.name for path in questions.parent.iterdir()) == ["questions.jsonl"]
