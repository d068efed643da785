"""What a model is asked: the bundled pages of digits, or questions of a JSON Lines file."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vkvx.errors import CapacityError, InputError, OptionError, VkvxError
from vkvx.evaluation.metrics import CHOICE_METRICS, DIGIT_METRICS, TEXT_METRICS, Scorer
from vkvx.runtime.sessions.pictures import Picture
from vkvx.runtime.sessions.processor import Prepared, Processor
from vkvx.runtime.sessions.text import check_text

DIGITS_PROMPT = "Transcribe the page."
DIGITS_SAMPLES = 100
DEFAULT_TEXT_METRICS = ("exact", "f1")
GIVEN_METRICS = (*TEXT_METRICS, *CHOICE_METRICS)
"""Of the questions of a file."""


@dataclass(frozen=True)
class Sample:
    """A question about pictures or a video, and the answers that are right; ``place`` tells people which it is.

    ``fps`` is how many frames a second are taken of a video file, or how many there were of a folder's frames.
    ``choices`` are the texts that a question of multiple choice offers, by their letters from A on.
    """

    index: int
    prompt: str
    pictures: tuple[Picture, ...]
    answers: tuple[str, ...]
    place: str = ""
    videos: tuple[Path, ...] = ()
    fps: float | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """``count`` samples, made when they are needed. ``identity`` differs for tasks that ask other things.

    ``is_given`` tells samples of a user, which may be anything, from our own.
    """

    name: str
    identity: str
    count: int
    metrics: tuple[str, ...]
    make: Callable[[int], Sample]
    is_given: bool = False

    @property
    def scorers(self) -> Mapping[str, Scorer]:
        """The metrics that there are for it; those that know the choices of questions take all samples in order."""
        if not self.is_given:
            return DIGIT_METRICS
        choices = [sample.choices for sample in self.samples(range(self.count))]
        return TEXT_METRICS | {name: partial(scorer, choices) for name, scorer in CHOICE_METRICS.items()}

    def samples(self, indices: Sequence[int]) -> Iterator[Sample]:
        """The samples of these indices."""
        return (self.make(index) for index in indices)


def open_task(
    name: str | None,
    data: str | Path | None,
    samples: int | None,
    metrics: Sequence[str] | None,
) -> Task:
    """The task ``digits``, or the one in a JSON Lines file; of its samples the first ``samples``.

    Pictures are not opened here, see :func:`prepare`. Raises OptionError for unknown names and for combinations that
    mean nothing, InputError for a file that cannot be used: the message then starts with the file's name and line.
    """
    if samples is not None and samples < 1:
        raise OptionError(f"samples= (--samples) {samples} is not supported; give at least 1")
    if data is None:
        if name not in (None, "digits"):
            raise OptionError(f"unknown task '{name}'; give task= (--task) digits, or data= (--data) FILE.jsonl")
        if metrics is not None:
            raise OptionError("metrics= (--metrics) has no effect on digits; leave it out, or give data= (--data)")
        return digits(DIGITS_SAMPLES if samples is None else samples)
    if name is not None:
        raise OptionError(f"task= (--task) {name} has no effect with data= (--data); give one of the two")
    chosen = tuple(dict.fromkeys(DEFAULT_TEXT_METRICS if metrics is None else metrics))
    for metric in chosen:
        if metric not in GIVEN_METRICS:
            raise OptionError(f"unknown metric '{metric}'; give metrics= (--metrics) some of {','.join(GIVEN_METRICS)}")
    if not chosen:
        raise OptionError(f"no metric is given; give metrics= (--metrics) some of {','.join(GIVEN_METRICS)}")
    return questions(Path(data), samples, chosen)


def digits(count: int, split: str = "test") -> Task:
    """The first pages of a split of :mod:`vkvx.models.tiny_llava.data`, to be transcribed."""
    from vkvx.models.tiny_llava import data

    def make(index: int) -> Sample:
        page = data.page(index, split)
        return Sample(index, DIGITS_PROMPT, (page.image,), (data.transcription(page.digits),), f"page {index}")

    name = "held-out" if split == "test" else "training"
    return Task("digits", f"digits, {name} pages", count, tuple(DIGIT_METRICS), make)


def questions(path: Path, count: int | None, metrics: tuple[str, ...], *, answered: bool = True) -> Task:
    """The questions of a JSON Lines file, the first ``count``; each with ``answers`` unless they need not be answered.

    Raises InputError as :func:`open_task` does.
    """
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
    found = [_read_line(path, number, line, index, answered) for index, (number, line) in enumerate(numbered)]
    identity = hashlib.sha256(content).hexdigest()
    return Task(path.name, identity, len(found), metrics, found.__getitem__, is_given=True)


_EXAMPLE = '{"image": "a.png", "prompt": "What is this?", "answers": ["a cat"]}'


def _read_line(path: Path, number: int, line: str, index: int, answered: bool) -> Sample:
    """One sample; that its pictures are there is all that is known of them."""
    where = f"{path}:{number}"
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); write {_EXAMPLE}") from error
    if not isinstance(entry, Mapping):
        raise InputError(f"{where}: an object is expected; write {_EXAMPLE}")
    given = [name for name in ("image", "images", "video") if name in entry]
    if len(given) != 1:
        both = f"both '{given[0]}' and '{given[1]}'" if given else ""
        state = both or "neither 'image' nor 'images' nor 'video'"
        raise InputError(f"{where}: {state}; give one of the three")
    names = entry["images"] if given == ["images"] else [entry[given[0]]]
    if not _are_texts(names) or not names:
        raise InputError(f"{where}: 'image' and 'video' must be a path and 'images' a list of at least one")
    if "prompt" not in entry or not isinstance(entry["prompt"], str) or not entry["prompt"]:
        raise InputError(f"{where}: 'prompt' must be text; write {_EXAMPLE}")
    answers = entry.get("answers", [] if not answered else None)
    if not _are_texts(answers) or not (answers or not answered):
        raise InputError(f"{where}: 'answers' must be a list of at least one text; write {_EXAMPLE}")
    choices = entry.get("choices", [])
    if not _are_texts(choices) or len(choices) > len(string.ascii_uppercase):
        raise InputError(f"{where}: 'choices' must be a list of at most 26 texts, which have the letters from A on")
    if choices and not set(answers) <= set(string.ascii_uppercase[: len(choices)]):
        raise InputError(f"{where}: with 'choices' the 'answers' must be letters, such as A")
    texts = (*((answer, "an answer") for answer in answers), *((choice, "a choice") for choice in choices))
    for text, what in ((entry["prompt"], "'prompt'"), *texts):
        try:
            check_text(text, what)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    paths = tuple(path.parent / name for name in names)
    noun = "video" if given == ["video"] else "picture"
    for one in paths:
        if not (one.is_file() or (noun == "video" and one.is_dir())):
            raise InputError(f"{where}: no {noun} at {one}; paths are relative to the file of samples")
    pictures, videos = ((), paths) if noun == "video" else (paths, ())
    fps = entry.get("fps")
    if fps is not None and not (videos and type(fps) in (int, float) and 0 < fps < float("inf")):
        raise InputError(f"{where}: 'fps' must be a positive number, of a 'video'")
    return Sample(index, entry["prompt"], pictures, tuple(answers), where, videos, fps, tuple(choices))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def prompt_of(sample: Sample, processor: Processor) -> str:
    """The whole prompt, by the chat template as in ``vkvx run``; without one, pictures and videos come first.

    The sample's prompt is text: what looks like a placeholder in it is none.
    """
    pictures, videos = [{"type": "image"}] * len(sample.pictures), [{"type": "video"}] * len(sample.videos)
    message = {"role": "user", "content": [*pictures, *videos, {"type": "text", "text": sample.prompt}]}
    return processor.format([message]) if processor.has_chat_template else processor.plain(message)


def prepare(
    sample: Sample, processor: Processor, max_positions: int, max_new_tokens: int, *, in_torch: bool = False
) -> Prepared:
    """Tokens and pixels of a sample. What is wrong with it is raised with its place in front.

    ``in_torch`` is for a checkpoint, which takes no videos here: Hugging Face's models have inputs of their own for
    them. Raises InputError for a prompt or a picture that cannot be used, CapacityError if it has no room with its
    answer.
    """
    if sample.videos and in_torch:
        raise InputError(
            f"{sample.place}: a video is taken by bundles alone; give frames as 'images', or a bundle without its "
            "checkpoint: reference=False (--no-reference)"
        )
    try:
        if sample.videos:
            processor.check_videos()
        prepared = processor.prepare(prompt_of(sample, processor), sample.pictures, sample.videos, fps=sample.fps)
    except VkvxError as error:
        raise type(error)(f"{sample.place}: {error}") from error
    needed = len(prepared.token_ids) + max_new_tokens - 1  # the last token is never fed
    if needed > max_positions:
        raise CapacityError(
            f"{sample.place}: prompt and answer take {needed} positions, {sum(prepared.picture_lengths)} of them for "
            f"pictures, the model knows {max_positions}; give fewer pictures, shorten the prompt, or lower "
            "max_new_tokens= (--max-new-tokens)"
        )
    return prepared
