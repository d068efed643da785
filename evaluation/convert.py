"""From the files of public benchmarks to the JSON lines of ``vkvx eval --data``.

    python -m vkvx.evaluation.convert docvqa val_v1.0.json --images DIR -o docvqa.jsonl

Nothing is downloaded. Prompts are the benchmark's questions, where its users do so with a request for a short answer.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import string
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vkvx.errors import InputError, OptionError, StorageError, VkvxError
from vkvx.packages import missing
from vkvx.runtime.sessions.videos import SUFFIXES
from vkvx.storage import check_file, write_file

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
CAPTION = "Describe the picture in one sentence."
VIDEO_CAPTION = "Describe the video in one sentence."
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", "")
"""Of files; a folder of frames has none."""
PARQUET = ".parquet"
LINES = ".jsonl"


@dataclass(frozen=True)
class Inline:
    """A picture that the benchmark's file holds, and the name that its file gets."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Question:
    """What is asked of pictures, by their names or inline, or of a video, and what is right.

    ``choices`` as in :class:`vkvx.evaluation.tasks.Sample`.
    """

    pictures: list[str | Inline]
    text: str
    answers: list[str]
    choices: list[str] | None = None


@dataclass(frozen=True)
class Benchmark:
    """``read`` gives the questions of a file's JSON or rows; ``metric`` is its authors'; ``file`` tells which file."""

    read: Callable[[Any], Iterator[Question]]
    metric: str
    file: str
    of_videos: bool = False


def _docvqa(data: Any) -> Iterator[Question]:
    for entry in data["data"]:
        yield Question([entry["image"]], entry["question"] + SHORT, entry["answers"])


def _textvqa(data: Any) -> Iterator[Question]:
    for entry in data["data"]:
        yield Question([f"{entry['image_id']}.jpg"], entry["question"] + SHORT, entry["answers"])


def _chartqa(data: Any) -> Iterator[Question]:
    for entry in data:
        yield Question([entry["imgname"]], entry["query"] + SHORT, [str(entry["label"])])


def _ocrbench(data: Any, formulas: bool = False) -> Iterator[Question]:
    for entry in data:
        if (entry["dataset_name"] == "HME100k") == formulas:
            answers = entry["answers"]
            yield Question(
                [entry["image_path"]], entry["question"], answers if isinstance(answers, list) else [answers]
            )


def _ocrbench_formulas(data: Any) -> Iterator[Question]:
    yield from _ocrbench(data, formulas=True)


def _coco(data: Any) -> Iterator[Question]:
    captions: dict[Any, list[str]] = {}
    for entry in data["annotations"]:
        captions.setdefault(entry["image_id"], []).append(entry["caption"])
    for entry in data["images"]:
        yield Question([entry["file_name"]], CAPTION, captions[entry["id"]])


def _vatex(data: Any) -> Iterator[Question]:
    for entry in data:
        yield Question([entry["videoID"]], VIDEO_CAPTION, entry["enCap"])


def _mmmu(data: Any) -> Iterator[Question]:
    """Rows with ``image_1`` to ``image_7``; options, and several right answers, are Python lists in text."""
    for entry in data:
        given = [(i, entry.get(f"image_{i}")) for i in range(1, 8)]
        pictures = [_mmmu_picture(f"{entry['id']}_{i}", picture) for i, picture in given if picture is not None]
        if entry["question_type"] != "multiple-choice":
            answers = _listed(entry["answer"]) if entry["answer"].startswith("[") else [entry["answer"]]
            yield Question(pictures, entry["question"] + SHORT, answers)
            continue
        choices = _listed(entry["options"])
        lettered = zip(string.ascii_uppercase, choices, strict=False)
        options = "".join(f"\n({letter}) {choice}" for letter, choice in lettered)
        letters = string.ascii_uppercase[: len(choices)]
        answers = [entry["answer"]] if entry["answer"] in tuple(letters) else []
        yield Question(pictures, f"{entry['question']}{options}\n{LETTER}", answers, choices)


def _mmmu_picture(name: str, picture: Any) -> str | Inline:
    if isinstance(picture, str):
        return picture
    return Inline(f"{name}{Path(picture.get('path') or '').suffix or '.png'}", picture["bytes"])


def _listed(value: Any) -> list[str]:
    return [str(item) for item in (ast.literal_eval(value) if isinstance(value, str) else value)]


BENCHMARKS = {
    "docvqa": Benchmark(_docvqa, "anls", "val_v1.0.json"),
    "textvqa": Benchmark(_textvqa, "vqa", "TextVQA_0.5.1_val.json"),
    "chartqa": Benchmark(_chartqa, "relaxed", "test_human.json or test_augmented.json"),
    "ocrbench": Benchmark(_ocrbench, "contains", "OCRBench.json, all but its formulas"),
    "ocrbench-formulas": Benchmark(_ocrbench_formulas, "contains-formula", "OCRBench.json, its 100 formulas"),
    "coco": Benchmark(_coco, "cider", "captions_val2014.json or another of that form"),
    "mmmu": Benchmark(_mmmu, "mmmu", "validation files, Parquet or the same rows as JSON"),
    "vatex": Benchmark(_vatex, "cider", "vatex_validation_v1.0.json or another of that form", of_videos=True),
}
"""By the names that the command line takes."""


def convert(
    name: str,
    sources: Sequence[Path],
    images: Path,
    output: Path,
    *,
    skip_missing: bool = False,
    fps: float | None = None,
    frames: int | None = None,
) -> tuple[int, int]:
    """Write the JSON lines of a benchmark's files; returns how many, and how many were left out.

    ``images`` is the folder that the names of pictures and videos are relative to, and which pictures go to that lie in
    the files; ``output`` gets paths relative to itself. With ``skip_missing`` questions whose picture or video is not
    there are left out. ``fps`` goes into each line of a video, see :class:`vkvx.evaluation.tasks.Sample`; ``frames``
    makes pictures of videos, so many of a folder's, as far apart as can be. Raises InputError for a file of another
    form and for missing pictures, OptionError for what has no effect, DependencyError for a Parquet file without
    pyarrow, StorageError for what cannot be written.
    """
    _check_options(BENCHMARKS[name], fps, frames)
    check_file(output, "output= (--output)")
    lines: list[str] = []
    inline: dict[Path, bytes] = {}
    skipped, of_videos = 0, BENCHMARKS[name].of_videos
    for source in sources:
        for number, question in enumerate(_questions(BENCHMARKS[name], name, source), 1):
            where = f"{source}: question {number}"
            _check(question, where, BENCHMARKS[name].file)
            found = [_place(picture, images, of_videos, inline, where) for picture in question.pictures]
            lost = [str(picture) for picture, path in zip(question.pictures, found, strict=True) if path is None]
            if lost and skip_missing:
                skipped += 1
            elif lost:
                noun = "video, nor a folder of its frames," if of_videos else "picture"
                raise InputError(
                    f"{where}: no {noun} at {images / lost[0]}; give images= (--images) the folder that they lie in, "
                    "or skip_missing= (--skip-missing) to leave such questions out"
                )
            else:
                paths = [path for path in found if path is not None]
                paths = paths if frames is None else _frames(paths[0], frames, where)
                as_video = of_videos and frames is None
                lines.append(_line(question, [os.path.relpath(path, output.parent) for path in paths], as_video, fps))
    if not lines:
        given = ", ".join(map(str, sources))
        raise InputError(f"{given} has no questions of {name}; give its {BENCHMARKS[name].file}")
    if inline:
        _make_folder(images)
    for path, content in inline.items():
        write_file(path, content)
    write_file(output, "".join(lines))
    return len(lines), skipped


def _check_options(benchmark: Benchmark, fps: float | None, frames: int | None) -> None:
    given = [name for name, value in (("fps", fps), ("frames", frames)) if value is not None]
    if given and not benchmark.of_videos:
        raise OptionError(f"{given[0]}= (--{given[0]}) has no effect on pictures; leave it out")
    if len(given) == 2:
        raise OptionError("fps= (--fps) has no effect on frames that become pictures: frames= (--frames); give one")
    if (fps is not None and not 0 < fps < float("inf")) or (frames is not None and frames < 1):
        raise OptionError(f"{given[0]}= (--{given[0]}) {fps or frames} is not supported; give a positive number")


def _questions(benchmark: Benchmark, name: str, source: Path) -> list[Question]:
    try:
        return list(benchmark.read(_content(source)))
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror or error}; give its file") from error
    except (KeyError, TypeError, IndexError, AttributeError, SyntaxError) as error:
        raise InputError(f"{source} has not the form of {name} ({error!r}); give its {benchmark.file}") from error
    except (ValueError, RecursionError) as error:
        kind = "Parquet" if source.suffix == PARQUET else "JSON"
        raise InputError(f"{source} is not {kind} ({error}); give the benchmark's {benchmark.file}") from error


def _content(source: Path) -> Any:
    """The JSON of a file, or its rows."""
    if source.suffix == PARQUET:
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise missing("pyarrow", error) from error
        return parquet.read_table(source).to_pylist()
    text = source.read_text(encoding="utf-8")
    if source.suffix == LINES:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return json.loads(text)


def _check(question: Question, where: str, file: str) -> None:
    texts = [question.text, *(name.name if isinstance(name, Inline) else name for name in question.pictures)]
    contents = [picture.content for picture in question.pictures if isinstance(picture, Inline)]
    lists = [question.answers, [] if question.choices is None else question.choices]
    are_texts = all(isinstance(listed, list) and all(isinstance(x, str) for x in listed) for listed in lists)
    are_there = question.pictures and question.answers and all(isinstance(x, bytes) for x in contents)
    if not (are_texts and are_there and all(isinstance(text, str) for text in texts)):
        raise InputError(f"{where} lacks its text, picture or answers; give {file}")


def _place(picture: str | Inline, images: Path, of_videos: bool, inline: dict[Path, bytes], where: str) -> Path | None:
    """Where a picture or video lies, None if nowhere; what is ``inline`` will be written there."""
    if isinstance(picture, Inline):
        path = images / picture.name
        if path.parent != images:
            raise InputError(f"{where}: its id makes no file name: '{picture.name}'; give an untouched file")
        if inline.get(path, picture.content) != picture.content:
            raise InputError(f"{where}: another question has its id; give an untouched file")
        if path.exists() and not (path.is_file() and path.read_bytes() == picture.content):
            raise InputError(f"{where}: {path} is another picture; give images= (--images) another folder")
        inline[path] = picture.content
        return path
    if not of_videos:
        return images / picture if (images / picture).is_file() else None
    paths = [images / f"{picture}{suffix}" for suffix in VIDEO_SUFFIXES]
    return next((path for path in paths if (path.is_file() if path.suffix else path.is_dir())), None)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot make the folder {path} ({error.strerror}); give images= (--images) another"
        ) from error


def _frames(folder: Path, count: int, where: str) -> list[Path]:
    """So many frames of a video, the first and the last among them; all if there are no more."""
    if not folder.is_dir():
        raise InputError(f"{where}: frames= (--frames) takes them of folders, not of {folder}; make one of its frames")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"{where}: the folder {folder} holds no frames; give PNG, JPEG or WebP files")
    return [found[round(i)] for i in np.linspace(0, len(found) - 1, min(count, len(found)))]


def _line(question: Question, names: list[str], is_video: bool, fps: float | None) -> str:
    kind = "video" if is_video else "image" if len(names) == 1 else "images"
    paths = [Path(name).as_posix() for name in names]
    entry: dict[str, Any] = {kind: paths if kind == "images" else paths[0]}
    if fps is not None:
        entry["fps"] = fps
    entry |= {"prompt": question.text, "answers": question.answers}
    if question.choices is not None:
        entry["choices"] = question.choices
    return json.dumps(entry, ensure_ascii=False) + "\n"


def build_parser() -> argparse.ArgumentParser:
    """The parser of :func:`main`."""
    parser = argparse.ArgumentParser(prog="python -m vkvx.evaluation.convert", description=__doc__.split("\n")[0])
    parser.add_argument("benchmark", choices=BENCHMARKS, help="whose files they are")
    parser.add_argument("file", type=Path, nargs="+", help="its files, JSON, JSON lines (.jsonl) or Parquet (.parquet)")
    parser.add_argument("--images", type=Path, required=True, help="folder of its pictures or videos")
    parser.add_argument("--skip-missing", action="store_true", help="leave out questions whose picture is not there")
    parser.add_argument("--fps", type=float, help="frames a second: taken of files, or as there were in folders")
    parser.add_argument("--frames", type=int, help="make pictures of so many frames of each video's folder")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file of JSON lines to write")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: see the module."""
    options = build_parser().parse_args(arguments)
    try:
        count, skipped = convert(
            options.benchmark,
            options.file,
            options.images,
            options.output,
            skip_missing=options.skip_missing,
            fps=options.fps,
            frames=options.frames,
        )
    except VkvxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    left = f", {skipped} left out" if skipped else ""
    metric = BENCHMARKS[options.benchmark].metric
    print(f"{count} questions{left}; vkvx eval MODEL --data {options.output} --metrics {metric}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
