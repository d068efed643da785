"""Files of public benchmarks, of the same form in small, as JSON lines for ``vkvx eval``; and their metrics by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vkvx.evaluation.convert import BENCHMARKS, CAPTION, SHORT, main
from vkvx.evaluation.metrics import TEXT_METRICS
from vkvx.evaluation.tasks import open_task

PEOPLE = ["stop"] * 3 + ["Stop."] * 2 + ["go"] * 5
OCR = [
    {"dataset_name": "IIIT5K", "image_path": "a.jpg", "question": "what is written?", "answers": ["PRIVATE"], "id": 0},
    {"dataset_name": "HME100k", "image_path": "b.jpg", "question": "Write it in LaTeX.", "answers": "x ^ { 2 }"},
]
FILES: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "docvqa": (
        {
            "dataset_name": "docvqa",
            "data": [{"questionId": 1, "question": "Date?", "image": "a.jpg", "answers": ["1 May"]}],
        },
        [{"image": "a.jpg", "prompt": f"Date?{SHORT}", "answers": ["1 May"]}],
    ),
    "textvqa": (
        {"data": [{"question": "what sign?", "image_id": "a", "answers": PEOPLE}]},
        [{"image": "a.jpg", "prompt": f"what sign?{SHORT}", "answers": PEOPLE}],
    ),
    "chartqa": (
        [
            {"imgname": "a.jpg", "query": "How many?", "label": "14"},
            {"imgname": "b.jpg", "query": "Which?", "label": "Yes"},
        ],
        [
            {"image": "a.jpg", "prompt": f"How many?{SHORT}", "answers": ["14"]},
            {"image": "b.jpg", "prompt": f"Which?{SHORT}", "answers": ["Yes"]},
        ],
    ),
    "ocrbench": (OCR, [{"image": "a.jpg", "prompt": "what is written?", "answers": ["PRIVATE"]}]),
    "ocrbench-formulas": (OCR, [{"image": "b.jpg", "prompt": "Write it in LaTeX.", "answers": ["x ^ { 2 }"]}]),
    "coco": (
        {
            "images": [{"id": 7, "file_name": "a.jpg"}],
            "annotations": [
                {"image_id": 7, "id": 1, "caption": "A cat."},
                {"image_id": 7, "id": 2, "caption": "A pet."},
            ],
        },
        [{"image": "a.jpg", "prompt": CAPTION, "answers": ["A cat.", "A pet."]}],
    ),
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with two pictures; nothing looks into them here."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(b"")
    return folder


def run(name: str, data: Any, images: Path, output: Path) -> int:
    source = images.parent / "source.json"
    source.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return main([name, str(source), "--images", str(images), "-o", str(output)])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_lines(name: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are what the file says, eval reads them, and the command that is printed has the benchmark's metric."""
    data, expected = FILES[name]
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / f"{name}.jsonl"
    assert run(name, data, images, output) == 0
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert lines == [{**line, "image": f"../pictures/{line['image']}"} for line in expected]
    metric = capsys.readouterr().out.split("--metrics ")[1].strip()
    task = open_task(None, output, None, [metric])
    assert [sample.answers for sample in task.samples(range(task.count))] == [
        tuple(line["answers"]) for line in expected
    ]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("docvqa", "{", "is not JSON"),
        (
            "docvqa",
            {"data": [{"question": "x", "image": "a.jpg"}]},
            "form of docvqa.*give its val_v1.0.json",
        ),
        ("docvqa", OCR, "has not the form of docvqa"),
        (
            "textvqa",
            {"data": [{"question": "x", "image_id": "c", "answers": ["y"]}]},
            "no picture at .*c.jpg; give images=",
        ),
        ("chartqa", [], "has no questions of chartqa"),
        ("ocrbench", [{**OCR[0], "answers": []}], "question 1 lacks"),
        ("coco", {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}, "has not the form of coco"),
    ],
)
def test_other_files_are_refused(
    name: str, data: Any, words: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    assert run(name, data, images, output) == 2
    assert re.search(words, capsys.readouterr().err)
    assert not output.exists()


@pytest.mark.parametrize(
    ("metric", "given", "answers", "score"),
    [
        ("relaxed", "10.5", ["10"], 1),
        ("relaxed", "10.51", ["10"], 0),
        ("relaxed", "12%", ["0.12"], 1),
        ("relaxed", "-95", ["-100"], 1),
        ("relaxed", "yes", ["Yes"], 1),
        ("relaxed", "about 10", ["10"], 0),
        ("relaxed", "0.01", ["0"], 0),
        ("relaxed", "0", ["0"], 1),
        ("contains", "The sign says PRIVATE\nproperty", ["private property"], 1),
        ("contains", "The sign", ["private"], 0),
        ("contains-formula", "$x^{2}$", ["x ^ { 2 }"], 1),
        ("contains-formula", "$X^{2}$", ["x ^ { 2 }"], 0),
        # Five of ten say it: leaving one of them out four remain, leaving out another five; three are enough.
        ("vqa", "stop", PEOPLE, 1),
        ("vqa", "Halt", PEOPLE, 0),
        # Two of ten: leaving one of them out gives a third, leaving out one of the other eight two thirds.
        ("vqa", "2", ["two", "2"] + ["x"] * 8, 0.6),
        ("vqa", "The red-car", ["red car"] * 10, 1),
        ("vqa", "1,000", ["1000"] * 10, 1),
        ("vqa", "3.5", ["35"] * 10, 0),
        ("vqa", "don't", ["dont"] * 10, 1),
    ],
)
def test_metrics(metric: str, given: str, answers: list[str], score: float) -> None:
    assert TEXT_METRICS[metric]([given], [answers])[0] == pytest.approx(score)
