"""Questions from files, and what is wrong with them, by line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from samples import Page

from vkvx.errors import CapacityError, InputError, OptionError
from vkvx.evaluation.tasks import Sample, open_task, prepare


@pytest.fixture
def write(tmp_path: Path, pages: list[Page]) -> Callable[..., Path]:
    """A file of these lines; ``page.png`` and ``bad.png`` lie beside it."""
    (tmp_path / "page.png").write_bytes(pages[0].path.read_bytes())
    (tmp_path / "bad.png").write_bytes(pages[0].path.read_bytes()[:3000])

    def call(*lines: Any) -> Path:
        path = tmp_path / "questions.jsonl"
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return path

    return call


GOOD = {"image": "page.png", "prompt": "What?", "answers": ["x", "y"]}


def test_questions(write: Callable[..., Path]) -> None:
    unusual = json.dumps({**GOOD, "prompt": "Wh\u2028at?"}, ensure_ascii=False)
    path = write(unusual, "", {"images": ["page.png", "page.png"], "prompt": "Two?", "answers": ["z"], "id": 7}, GOOD)
    task = open_task(None, path, 2, ["f1", "anls", "f1"])
    assert (task.name, task.count, task.metrics) == ("questions.jsonl", 2, ("f1", "anls"))
    first, second = task.samples([0, 1])
    assert (first.prompt, first.answers, len(first.pictures)) == ("Wh\u2028at?", ("x", "y"), 1)
    assert second.pictures == (path.parent / "page.png",) * 2
    assert [sample.place for sample in (first, second)] == [f"{path}:1", f"{path}:3"]
    assert open_task(None, path, None, None).metrics == ("exact", "f1")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "an object is expected"),
        ({**GOOD, "images": ["page.png"]}, "both 'image' and 'images'"),
        ({"prompt": "What?", "answers": ["x"]}, "neither 'image' nor 'images'"),
        ({**GOOD, "video": "film.mp4"}, "both 'image' and 'video'; give one of the three"),
        ({**GOOD, "image": 3}, "'image' and 'video' must be a path"),
        ({"video": "film.mp4", "prompt": "What?", "answers": ["x"]}, "no video at .*film.mp4"),
        ({"video": "page.png", "fps": 0, "prompt": "What?", "answers": ["x"]}, "'fps' must be a positive number"),
        ({**GOOD, "fps": 2}, "'fps' must be a positive number, of a 'video'"),
        ({**GOOD, "choices": ["a", 3], "answers": ["A"]}, "'choices' must be a list of at most 26 texts"),
        ({**GOOD, "choices": ["a", "b"], "answers": ["C"]}, "'answers' must be letters"),
        ({**GOOD, "choices": ["a", "b"], "answers": ["AB"]}, "'answers' must be letters"),
        ({"images": [], "prompt": "What?", "answers": ["x"]}, "at least one"),
        ({"image": "page.png", "answers": ["x"]}, "'prompt' must be text"),
        ({**GOOD, "prompt": ""}, "'prompt' must be text"),
        ({"image": "page.png", "prompt": "What?"}, "'answers' must be a list"),
        ({**GOOD, "answers": "x"}, "'answers' must be a list"),
        ({**GOOD, "answers": []}, "at least one text"),
        ({**GOOD, "image": "absent.png"}, "no picture at .*absent.png"),
        ({**GOOD, "prompt": "caf\ud800"}, "'prompt' is not valid Unicode"),
        ({**GOOD, "answers": ["x", "\udfff"]}, "an answer is not valid Unicode"),
    ],
)
def test_a_bad_line_is_named(write: Callable[..., Path], line: Any, words: str) -> None:
    with pytest.raises(InputError, match=rf"questions\.jsonl:2: .*{words}"):
        open_task(None, write(GOOD, line), None, None)


def test_what_is_wrong_with_a_sample_comes_with_its_place() -> None:
    """Of what only a model's processor knows, from the prompt or from a picture, or of its room."""

    class Wrong:
        has_chat_template = False

        def plain(self, message: Any) -> str:
            return str(message["content"][-1]["text"])

        def prepare(self, prompt: str, pictures: object, videos: object, fps: float | None) -> Any:
            if prompt == "short":
                return SimpleNamespace(token_ids=[0] * 30, picture_lengths=(16,))
            raise InputError("the prompt has 2 <image>")

    processor: Any = Wrong()
    sample = Sample(6, "short", ("page.png",), ("x",), "questions.jsonl:7")
    assert len(prepare(sample, processor, 32, 3).token_ids) == 30
    with pytest.raises(
        CapacityError, match=r"^questions\.jsonl:7: prompt and answer take 33 .* 16 of them .* knows 32"
    ):
        prepare(sample, processor, 32, 4)
    with pytest.raises(InputError, match=r"^questions\.jsonl:7: the prompt has 2 <image>$"):
        prepare(replace(sample, prompt="other"), processor, 32, 3)
    film = replace(sample, pictures=(), videos=(Path("film.mp4"),))
    with pytest.raises(InputError, match=r"^questions\.jsonl:7: a video is taken by bundles alone; .*--no-reference"):
        prepare(film, processor, 32, 3, in_torch=True)


def test_a_file_of_the_name_of_a_task(write: Callable[..., Path]) -> None:
    path = write(GOOD)
    task = open_task(None, path.rename(path.with_name("digits")), None, ["anls"])
    assert task.scorers["anls"](["x"], [["x", "y"]]) == [1.0]


def test_files_that_hold_nothing(write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no samples"):
        open_task(None, write(""), None, None)
    with pytest.raises(InputError, match="no file at"):
        open_task(None, tmp_path / "absent", None, None)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        open_task(None, tmp_path / "binary", None, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("chess", None, None, None), "unknown task 'chess'"),
        (("digits", "x.jsonl", None, None), "\\(--task\\) digits has no effect"),
        ((None, None, None, ["f1"]), "\\(--metrics\\) has no effect"),
        ((None, None, 0, None), "\\(--samples\\) 0"),
        ((None, "x.jsonl", None, ["bleu"]), "unknown metric 'bleu'"),
    ],
)
def test_arguments_that_are_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        open_task(*arguments)


def test_digits_are_held_out_pages(pages: list[Page]) -> None:
    task = open_task(None, None, 2, None)
    assert [sample.answers[0] for sample in task.samples([0, 1])] == [page.truth for page in pages[:2]]
    assert (task.name, task.count, open_task("digits", None, None, None).count) == ("digits", 2, 100)
