"""What a model is asked: the bundled pages of digits, or questions of a JSON Lines file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vkvx.errors import InputError, OptionError
from vkvx.evaluation.metrics import DIGIT_METRICS, TEXT_METRICS
from vkvx.manifest import Progress
from vkvx.packages import missing
from vkvx.runtime.sessions.pictures import Picture, load_picture
from vkvx.runtime.sessions.processor import Processor

DIGITS_PROMPT = "Transcribe the page."
DIGITS_SAMPLES = 100
DEFAULT_TEXT_METRICS = ("exact", "f1")


@dataclass(frozen=True)
class Sample:
    """A question about one or more pictures, and the answers that are right."""

    index: int
    prompt: str
    pictures: tuple[Picture, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """``count`` samples, made when they are needed. ``identity`` differs for tasks that ask other things."""

    name: str
    identity: str
    count: int
    metrics: tuple[str, ...]
    make: Callable[[int], Sample]

    def samples(self, indices: Sequence[int]) -> Iterator[Sample]:
        """The samples of these indices."""
        return (self.make(index) for index in indices)


def open_task(
    name: str | None,
    data: str | Path | None,
    samples: int | None,
    metrics: Sequence[str] | None,
    progress: Progress | None = None,
) -> Task:
    """The task ``digits``, or the one in a JSON Lines file; of its samples the first ``samples``.

    Raises OptionError for unknown names and for combinations that mean nothing, InputError for a file that cannot be
    used: the message then starts with the file's name and line.
    """
    if samples is not None and samples < 1:
        raise OptionError(f"samples= (--samples) {samples} is not supported; give at least 1")
    if data is None:
        if name not in (None, "digits"):
            raise OptionError(f"unknown task '{name}'; give task= (--task) digits, or data= (--data) FILE.jsonl")
        if metrics is not None:
            raise OptionError("metrics= (--metrics) has no effect on digits; leave it out, or give data= (--data)")
        return _digits(DIGITS_SAMPLES if samples is None else samples)
    if name is not None:
        raise OptionError(f"task= (--task) {name} has no effect with data= (--data); give one of the two")
    chosen = tuple(dict.fromkeys(DEFAULT_TEXT_METRICS if metrics is None else metrics))
    for metric in chosen:
        if metric not in TEXT_METRICS:
            raise OptionError(f"unknown metric '{metric}'; give metrics= (--metrics) some of {','.join(TEXT_METRICS)}")
    if not chosen:
        raise OptionError(f"no metric is given; give metrics= (--metrics) some of {','.join(TEXT_METRICS)}")
    return _questions(Path(data), samples, chosen, progress)


def _digits(count: int) -> Task:
    try:
        from sklearn import datasets  # noqa: F401 (what the pages are drawn from)
    except ImportError as error:
        raise missing("sklearn", error) from error
    from vkvx.models.tiny_llava import data

    def make(index: int) -> Sample:
        page = data.page(index, "test")
        return Sample(index, DIGITS_PROMPT, (page.image,), (data.transcription(page.digits),))

    return Task("digits", "digits, held-out pages", count, tuple(DIGIT_METRICS), make)


def _questions(path: Path, count: int | None, metrics: tuple[str, ...], progress: Progress | None) -> Task:
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8-sig").split("\n")  # not splitlines(): text may hold other line ends
    except FileNotFoundError:
        raise InputError(f"no file at {path}; give data= (--data) a file of JSON lines") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}); data= (--data) is JSON lines") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()][:count]
    if not numbered:
        raise InputError(f"{path} has no samples; give lines of {_EXAMPLE}")
    found: list[Sample] = []
    for done, (number, line) in enumerate(numbered):
        if progress is not None:
            progress("check pictures", done, len(numbered))
        found.append(_read_line(path, number, line, index=done))
    if progress is not None:
        progress("check pictures", len(numbered), len(numbered))
    return Task(path.name, hashlib.sha256(content).hexdigest(), len(found), metrics, found.__getitem__)


_EXAMPLE = '{"image": "a.png", "prompt": "What is this?", "answers": ["a cat"]}'


def _read_line(path: Path, number: int, line: str, index: int) -> Sample:
    """One sample; its pictures are decoded once, so that a damaged one is told before anything runs."""
    where = f"{path}:{number}"
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); write {_EXAMPLE}") from error
    if not isinstance(entry, Mapping):
        raise InputError(f"{where}: an object is expected; write {_EXAMPLE}")
    if ("image" in entry) == ("images" in entry):
        state = "both 'image' and 'images'" if "image" in entry else "neither 'image' nor 'images'"
        raise InputError(f"{where}: {state}; give one of the two")
    names = [entry["image"]] if "image" in entry else entry["images"]
    if not _are_texts(names) or not names:
        raise InputError(f"{where}: 'image' must be a path and 'images' a list of at least one")
    if "prompt" not in entry or not isinstance(entry["prompt"], str) or not entry["prompt"]:
        raise InputError(f"{where}: 'prompt' must be text; write {_EXAMPLE}")
    answers = entry.get("answers")
    if not _are_texts(answers) or not answers:
        raise InputError(f"{where}: 'answers' must be a list of at least one text; write {_EXAMPLE}")
    pictures = tuple(path.parent / name for name in names)
    for picture in pictures:
        try:
            load_picture(picture)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    return Sample(index, entry["prompt"], pictures, tuple(answers))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def prompt_of(sample: Sample, processor: Processor) -> str:
    """The whole prompt, by the chat template as in ``vkvx run``; for a model without one, the pictures come first.

    The sample's prompt is text: what looks like a placeholder in it is none.
    """
    content: list[dict[str, str]] = [{"type": "image"}] * len(sample.pictures)
    message = {"role": "user", "content": [*content, {"type": "text", "text": sample.prompt}]}
    return processor.format([message]) if processor.has_chat_template else processor.plain(message)
