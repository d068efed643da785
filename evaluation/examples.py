"""Some samples of an evaluation with their pictures, right answers, and what each setting answered."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vkvx.evaluation.records import Records
from vkvx.evaluation.settings import Setting
from vkvx.evaluation.tasks import Sample, Task
from vkvx.runtime.sessions.pictures import Picture, load_picture
from vkvx.runtime.sessions.videos import open_clip

SIDE, PICTURES, QUALITY = 360, 4, 80
"""Pixels of a picture's longer side, pictures of a sample at most, quality of their JPEG."""


@dataclass(frozen=True)
class Example:
    """A sample. ``pictures`` are ``data:`` URIs of small JPEGs, some of ``picture_count``; frames of a video count.

    ``given`` has by setting the answer and its score by ``metric``, 0 to 1 as in the table.
    """

    place: str
    prompt: str
    pictures: tuple[str, ...]
    picture_count: int
    answers: tuple[str, ...]
    metric: str
    given: dict[str, tuple[str, float]]


def choose_examples(records: Records, settings: Sequence[Setting], task: Task, count: int) -> list[Example]:
    """So many samples, in their order: those that settings answer differently come before others."""
    found = {setting.name: records.of(setting.name, task.count) for setting in settings}
    metric = task.metrics[0]
    scores = {
        name: task.scorers[metric]([entry.text for entry in listed], [entry.answers for entry in listed])
        for name, listed in found.items()
    }
    texts = [{listed[index].text for listed in found.values()} for index in range(task.count)]
    chosen = sorted(sorted(range(task.count), key=lambda index: len(texts[index]) == 1)[:count])
    examples = []
    for sample in task.samples(chosen):
        index = sample.index
        given = {name: (listed[index].text.strip(), float(scores[name][index])) for name, listed in found.items()}
        examples.append(_example(sample, metric, given))
    return examples


def _example(sample: Sample, metric: str, given: dict[str, tuple[str, float]]) -> Example:
    shown: list[Picture] = list(sample.pictures[:PICTURES])
    count = len(sample.pictures)
    for video in sample.videos:
        clip = open_clip(video)
        shown += clip.frames(np.unique(np.linspace(0, clip.total - 1, PICTURES).astype(np.int64)))
        count += clip.total
    pictures = tuple(_small(picture) for picture in shown)
    return Example(sample.place, sample.prompt, pictures, count, sample.answers, metric, given)


def _small(picture: Picture) -> str:
    image = load_picture(picture)
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
