"""From the files of public benchmarks to the JSON lines of ``vkvx eval --data``.

    python -m vkvx.evaluation.convert docvqa val_v1.0.json --images DIR -o docvqa.jsonl

Nothing is downloaded. Prompts are the benchmark's questions, where its users do so with a request for a short answer.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vkvx.errors import InputError, VkvxError
from vkvx.storage import check_file, write_file

SHORT = "\nAnswer the question using a single word or phrase."
CAPTION = "Describe the picture in one sentence."
Question = tuple[str, str, list[str]]
"""Name of a picture, question, right answers."""


@dataclass(frozen=True)
class Benchmark:
    """``read`` gives the questions of a file's JSON; ``request`` stands behind each; ``metric`` is its authors'."""

    read: Callable[[Any], Iterator[Question]]
    request: str
    metric: str
    file: str


def _docvqa(data: Any) -> Iterator[Question]:
    for entry in data["data"]:
        yield entry["image"], entry["question"], entry["answers"]


def _textvqa(data: Any) -> Iterator[Question]:
    for entry in data["data"]:
        yield f"{entry['image_id']}.jpg", entry["question"], entry["answers"]


def _chartqa(data: Any) -> Iterator[Question]:
    for entry in data:
        yield entry["imgname"], entry["query"], [str(entry["label"])]


def _ocrbench(data: Any, formulas: bool = False) -> Iterator[Question]:
    for entry in data:
        if (entry["dataset_name"] == "HME100k") == formulas:
            answers = entry["answers"]
            yield entry["image_path"], entry["question"], answers if isinstance(answers, list) else [answers]


def _ocrbench_formulas(data: Any) -> Iterator[Question]:
    yield from _ocrbench(data, formulas=True)


def _coco(data: Any) -> Iterator[Question]:
    captions: dict[Any, list[str]] = {}
    for entry in data["annotations"]:
        captions.setdefault(entry["image_id"], []).append(entry["caption"])
    for entry in data["images"]:
        yield entry["file_name"], CAPTION, captions[entry["id"]]


BENCHMARKS = {
    "docvqa": Benchmark(_docvqa, SHORT, "anls", "val_v1.0.json"),
    "textvqa": Benchmark(_textvqa, SHORT, "vqa", "TextVQA_0.5.1_val.json"),
    "chartqa": Benchmark(_chartqa, SHORT, "relaxed", "test_human.json or test_augmented.json"),
    "ocrbench": Benchmark(_ocrbench, "", "contains", "OCRBench.json, all but its formulas"),
    "ocrbench-formulas": Benchmark(_ocrbench_formulas, "", "contains-formula", "OCRBench.json, its 100 formulas"),
    "coco": Benchmark(_coco, "", "cider", "captions_val2014.json or another of that form"),
}
"""By the names that the command line takes; ``file`` says which of the benchmark's files is meant."""


def convert(name: str, source: Path, images: Path, output: Path) -> int:
    """Write the JSON lines of a benchmark's file; returns how many.

    ``images`` is the folder that the names of pictures are relative to; ``output`` gets paths relative to itself.
    Raises InputError for a file of another form and for missing pictures, StorageError if it cannot be written.
    """
    benchmark = BENCHMARKS[name]
    check_file(output, "output= (--output)")
    try:
        found = list(benchmark.read(json.loads(source.read_text(encoding="utf-8"))))
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}; give its file") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is not JSON ({error}); give the benchmark's {benchmark.file}") from error
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{source} has not the form of {name} ({error!r}); give its {benchmark.file}") from error
    lines = []
    for number, (picture, question, answers) in enumerate(found, 1):
        texts = isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers)
        if not texts or not isinstance(question, str) or not isinstance(picture, str):
            raise InputError(f"{source}: question {number} lacks its text, picture or answers; give {benchmark.file}")
        path = images / picture
        if not path.is_file():
            raise InputError(f"{source}: no picture at {path}; give images= (--images) the folder that they lie in")
        entry = {
            "image": Path(os.path.relpath(path, output.parent)).as_posix(),
            "prompt": question + benchmark.request,
            "answers": answers,
        }
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    if not lines:
        raise InputError(f"{source} has no questions of {name}; give its {benchmark.file}")
    write_file(output, "".join(lines))
    return len(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: see the module."""
    parser = argparse.ArgumentParser(prog="python -m vkvx.evaluation.convert", description=__doc__.split("\n")[0])
    parser.add_argument("benchmark", choices=BENCHMARKS, help="whose file it is")
    parser.add_argument("file", type=Path, help="its JSON file")
    parser.add_argument("--images", type=Path, required=True, help="folder of its pictures")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file of JSON lines to write")
    options = parser.parse_args(arguments)
    try:
        count = convert(options.benchmark, options.file, options.images, options.output)
    except VkvxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    metric = BENCHMARKS[options.benchmark].metric
    print(f"{count} questions; vkvx eval MODEL --data {options.output} --metrics {metric}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
