"""Files of public benchmarks, of the same form in small, as JSON lines for ``vkvx eval``; and their metrics by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from vkvx.evaluation.convert import BENCHMARKS, CAPTION, LETTER, SHORT, VIDEO_CAPTION, main
from vkvx.evaluation.metrics import CHOICE_METRICS, TEXT_METRICS
from vkvx.evaluation.tasks import open_task

PEOPLE = ["stop"] * 3 + ["Stop."] * 2 + ["go"] * 5
OCR = [
    {"dataset_name": "IIIT5K", "image_path": "a.jpg", "question": "what is written?", "answers": ["PRIVATE"], "id": 0},
    {"dataset_name": "HME100k", "image_path": "b.jpg", "question": "Write it in LaTeX.", "answers": "x ^ { 2 }"},
]
MMMU: list[dict[str, Any]] = [
    {
        "id": "validation_Art_1",
        "question": "Which is older, <image 1> or <image 2>?",
        "options": "['the first', \"the second's\"]",
        "question_type": "multiple-choice",
        "answer": "B",
        "image_1": "a.jpg",
        "image_2": "b.jpg",
        "image_3": None,
    },
    {
        "id": "validation_Math_2",
        "question": "How many in <image 1>?",
        "options": "[]",
        "question_type": "open",
        "answer": "['3', 'three']",
        "image_1": "a.jpg",
    },
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
    "mmmu": (
        MMMU,
        [
            {
                "images": ["a.jpg", "b.jpg"],
                "prompt": f"{MMMU[0]['question']}\n(A) the first\n(B) the second's\n{LETTER}",
                "answers": ["B"],
                "choices": ["the first", "the second's"],
            },
            {"image": "a.jpg", "prompt": f"How many in <image 1>?{SHORT}", "answers": ["3", "three"]},
        ],
    ),
    "vatex": (
        [{"videoID": "film_000001_000011", "enCap": ["A man runs.", "Somebody runs."], "chCap": ["x"]}],
        [{"video": "film_000001_000011.mp4", "prompt": VIDEO_CAPTION, "answers": ["A man runs.", "Somebody runs."]}],
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
    """A folder with two pictures and a video; nothing looks into them here."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg", "film_000001_000011.mp4"):
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
    assert lines == [placed(line) for line in expected]
    metric = capsys.readouterr().out.split("--metrics ")[1].strip()
    task = open_task(None, output, None, [metric])
    samples = list(task.samples(range(task.count)))
    assert [sample.answers for sample in samples] == [tuple(line["answers"]) for line in expected]
    assert [sample.choices for sample in samples] == [tuple(line.get("choices", ())) for line in expected]
    # A right answer gets all points: the first of them, or the letter.
    scores = task.scorers[metric]([sample.answers[0] for sample in samples], [sample.answers for sample in samples])
    assert all(scores == 1) if metric != "cider" else scores.shape == (task.count,)


def placed(line: dict[str, Any]) -> dict[str, Any]:
    """The line with its paths as those of a file in a folder beside that of the pictures."""
    found = dict(line)
    for kind in ("image", "video"):
        if kind in line:
            found[kind] = f"../pictures/{line[kind]}"
    if "images" in line:
        found["images"] = [f"../pictures/{name}" for name in line["images"]]
    return found


def test_several_files(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON lines beside JSON; all questions go into one file."""
    (tmp_path / "one.json").write_text(json.dumps(MMMU[:1]), encoding="utf-8")
    (tmp_path / "two.jsonl").write_text(json.dumps(MMMU[1]) + "\n\n", encoding="utf-8")
    sources = [str(tmp_path / name) for name in ("one.json", "two.jsonl")]
    output = tmp_path / "all.jsonl"
    assert main(["mmmu", *sources, "--images", str(images), "-o", str(output)]) == 0
    assert "2 questions; " in capsys.readouterr().out
    assert [json.loads(line)["answers"] for line in output.read_text().splitlines()] == [["B"], ["3", "three"]]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """MMMU as it is published: a Parquet file that holds the pictures."""
    given = [{"bytes": b"first", "path": "x.jpg"}, {"bytes": b"second", "path": None}]
    entries = [
        {**{f"image_{i}": None for i in range(1, 8)}, **entry, "image_1": given[0], "image_2": second}
        for entry, second in zip(MMMU, (given[1], None), strict=True)
    ]
    path = tmp_path / "validation-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(entries), path)
    return path


def test_pictures_of_a_parquet_file(rows: Path, tmp_path: Path) -> None:
    """They are written beside each other, by the question's id; a second time they are there, and are the same."""
    output, folder = tmp_path / "mmmu.jsonl", tmp_path / "new"
    for _ in range(2):
        assert main(["mmmu", str(rows), "--images", str(folder), "-o", str(output)]) == 0
    first, second = (json.loads(line) for line in output.read_text(encoding="utf-8").splitlines())
    assert first["images"] == ["new/validation_Art_1_1.jpg", "new/validation_Art_1_2.png"]
    assert second["image"] == "new/validation_Math_2_1.jpg"
    assert (folder / "validation_Art_1_2.png").read_bytes() == b"second"
    assert first["choices"] == ["the first", "the second's"]


def test_another_picture_is_not_replaced(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "validation_Art_1_1.jpg").write_bytes(b"mine")
    assert main(["mmmu", str(rows), "--images", str(folder), "-o", str(tmp_path / "out.jsonl")]) == 2
    assert "is another picture; give images= (--images) another folder" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["validation_Art_1_1.jpg"]
    assert not (tmp_path / "out.jsonl").exists()


def test_two_questions_of_one_id(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same picture twice is fine, a second one under the name of the first is not."""
    output = tmp_path / "out.jsonl"
    assert main(["mmmu", str(rows), str(rows), "--images", str(tmp_path / "new"), "-o", str(output)]) == 0
    entry = {**MMMU[1], "id": MMMU[0]["id"], "image_1": {"bytes": b"third", "path": "x.jpg"}}
    parquet.write_table(pyarrow.Table.from_pylist([entry]), tmp_path / "more.parquet")
    sources, other = [str(rows), str(tmp_path / "more.parquet")], tmp_path / "other"
    assert main(["mmmu", *sources, "--images", str(other), "-o", str(output)]) == 2
    assert "more.parquet: question 1: another question has its id" in capsys.readouterr().err
    assert not other.exists()


def test_a_file_where_the_pictures_go(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.jsonl"
    assert main(["mmmu", str(rows), "--images", str(rows), "-o", str(output)]) == 2
    assert "give images= (--images) another" in capsys.readouterr().err
    assert not output.exists()


def test_a_file_that_is_no_parquet(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "test.parquet"
    source.write_bytes(b"PAR1 not really")
    assert main(["mmmu", str(source), "--images", str(images), "-o", str(tmp_path / "out.jsonl")]) == 2
    assert "is not Parquet" in capsys.readouterr().err


def test_videos_that_are_gone(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of frames is a video as well; what is neither is refused, or left out if that is wanted."""
    (images / "frames_000000_000010").mkdir()
    names = ("gone_000000_000010", "frames_000000_000010")
    source = tmp_path / "vatex.json"
    source.write_text(json.dumps([{"videoID": name, "enCap": ["A dog."]} for name in names]), encoding="utf-8")
    command = ["vatex", str(source), "--images", str(images), "-o", str(tmp_path / "out.jsonl")]
    assert main(command) == 2
    assert re.search("no video, nor a folder of its frames, at .*gone_.*--skip-missing", capsys.readouterr().err)
    assert main([*command, "--skip-missing"]) == 0
    assert "1 questions, 1 left out; " in capsys.readouterr().out
    line = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    assert line["video"] == "pictures/frames_000000_000010"


def test_frames_of_videos(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some frames of a folder as pictures, from the first to the last; or how many a second there are."""
    folder = images / "film_000001_000011"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number:03}.png").write_bytes(b"")
    (folder / "notes.txt").write_bytes(b"")
    source = tmp_path / "vatex.json"
    source.write_text(json.dumps(FILES["vatex"][0]), encoding="utf-8")
    output = tmp_path / "out.jsonl"
    command = ["vatex", str(source), "--images", str(images), "-o", str(output)]
    assert main([*command, "--frames", "3"]) == 2  # the file comes before the folder
    assert "(--frames) takes them of folders, not of" in capsys.readouterr().err
    assert main([*command, "--fps", "2"]) == 0
    line = json.loads(output.read_text(encoding="utf-8"))
    assert (line["video"], line["fps"]) == ("pictures/film_000001_000011.mp4", 2)
    assert next(open_task(None, output, None, None).samples([0])).fps == 2
    (images / "film_000001_000011.mp4").unlink()
    assert main([*command, "--frames", "3"]) == 0
    line = json.loads(output.read_text(encoding="utf-8"))
    assert line["images"] == [f"pictures/film_000001_000011/{number:03}.png" for number in (0, 4, 9)]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("coco", ["--fps", "1"], "(--fps) has no effect on pictures"),
        ("vatex", ["--fps", "1", "--frames", "2"], "give one"),
        ("vatex", ["--frames", "0"], "(--frames) 0 is not supported"),
        ("vatex", ["--fps", "nan"], "(--fps) nan is not supported"),
    ],
)
def test_options_without_effect(
    name: str, options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "x.json", "--images", str(tmp_path), "-o", str(tmp_path / "out.jsonl"), *options]) == 2
    assert words in capsys.readouterr().err


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
        ("mmmu", [{**MMMU[0], "answer": "?"}], "question 1 lacks"),
        ("mmmu", [{**MMMU[0], "answer": "AB"}], "question 1 lacks"),
        ("mmmu", [{**MMMU[0], "options": "['a'"}], "has not the form of mmmu"),
        ("mmmu", [{**MMMU[1], "image_1": None}], "question 1 lacks"),
        ("mmmu", [{**MMMU[1], "id": "../x", "image_1": {"bytes": 1, "path": None}}], "question 1 lacks"),
        ("vatex", [{"videoID": "film_000001_000011"}], "has not the form of vatex"),
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


CHOICES = ["a red cat", "a dog", "none of both", "a bird"]


@pytest.mark.parametrize(
    ("given", "choices", "answers", "score"),
    [
        ("B", CHOICES, ["B"], 1),
        ("B.", CHOICES, ["A"], 0),
        ("(B) a dog", CHOICES, ["B"], 1),
        ("Not (A) but (B).", CHOICES, ["B"], 1),  # the last one counts
        ("A (B)", CHOICES, ["B"], 1),  # brackets before words
        ("I say that it is B because of C", CHOICES, ["B"], 0),
        ("The animal that I see is A dog", CHOICES, ["A"], 1),  # as its authors' rules have it
        ("What can be seen here is a bird.", CHOICES, ["D"], 1),  # by its text, in more than five words
        ("a bird", CHOICES, ["D"], 1 / 4),  # too short for that: one of four is drawn
        ("", CHOICES[:2], ["A"], 1 / 2),
        ("E", CHOICES, ["A"], 1 / 4),
        ("30", [], ["30"], 1),
        ("36 watts", [], ["36"], 1),
        ("The result is 1,234 watts", [], ["1234.00"], 1),
        ("x = 2 and so y = 3.1415", [], ["3.14"], 1),  # two places
        ("x = 2 and so y = 3.1415", [], ["2"], 0),  # the shortest text behind a key word
        ("The answer is Paris.", [], ["paris"], 1),
        ("It is Paris, France", [], ["Rome", "Paris"], 1),
        ("The answer is x", [], ["y"], 0),
        ("Thus it is 1.5e3", [], ["1500"], 1),
        ("b", [], ["b"], 1),
        ("abba", [], ["b"], 0),  # a letter only as a word
        ("so 4\nfinal 5", [], ["4"], 1),  # each line says something
    ],
)
def test_mmmu(given: str, choices: list[str], answers: list[str], score: float) -> None:
    assert CHOICE_METRICS["mmmu"]([choices], [given], [answers])[0] == pytest.approx(score)
