"""Runs a bundle in onnxruntime: its answers, and its next-token distributions along the answers of its checkpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vkvx.evaluation.records import Record
from vkvx.evaluation.settings import Setting
from vkvx.evaluation.tasks import Sample, prepare, prompt_of
from vkvx.manifest import Manifest
from vkvx.runtime.calls import build_call
from vkvx.runtime.sessions.pieces import cut
from vkvx.runtime.sessions.processor import Prepared, Processor
from vkvx.runtime.sessions.sampling import GenerationOptions
from vkvx.runtime.sessions.session import Session

if TYPE_CHECKING:
    from torch import Tensor

    from vkvx.evaluation.torch_runner import Batch

_ROUNDING = 128
"""Text rows of a slot are a multiple of this, so that a somewhat longer sample does not open the bundle again."""


class BundleRunner:
    """A bundle with a slot for each sample of a batch; it is opened when it is known how large these must be."""

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        provider: str,
        batch: int,
        max_new_tokens: int,
        *,
        cut_after_pictures: bool = False,
    ) -> None:
        """``provider`` is cpu or cuda. Raises BundleError for a damaged processor."""
        self.manifest = manifest
        self.processor = Processor.of_bundle(bundle, manifest)
        self.max_new_tokens = max_new_tokens
        self._bundle, self._provider, self._slots = bundle, provider, batch
        self._cut_after_pictures = cut_after_pictures
        self._session: Session | None = None

    def measure(self, samples: Sequence[Sample], setting: Setting, reference: Batch | None) -> list[Record]:
        """A record a sample; with ``reference``, the same samples run by the checkpoint, they are compared with it.

        Raises InputError for prompts and pictures that cannot be used, CapacityError for those that are too long.
        """
        prompts = [prompt_of(sample, self.processor) for sample in samples]
        positions = self.manifest.model.max_positions
        prepared = [prepare(sample, self.processor, positions, self.max_new_tokens) for sample in samples]
        session = self._open(prepared)
        pictures = [list(sample.pictures) for sample in samples]
        videos = [list(sample.videos) for sample in samples]
        begun = time.perf_counter()
        # Greedy, whatever the checkpoint asks for.
        options = [GenerationOptions(max_new_tokens=self.max_new_tokens, fps=sample.fps) for sample in samples]
        generations = session.generate(prompts, pictures, videos, options=options)
        seconds = time.perf_counter() - begun
        found = None if reference is None else _follow(session, prepared, reference.answers)
        records = []
        for row, (sample, generation) in enumerate(zip(samples, generations, strict=True)):
            tokens = list(generation.token_ids)
            hits = count = divergence = equal = None
            if reference is not None and found is not None:
                answer = reference.answers[row]
                hits, divergence = _compare(reference.expected[row], found[row], answer)
                count, equal = len(answer), tokens == answer
            lengths = prepared[row].picture_lengths
            records.append(
                Record(
                    sample=sample.index,
                    setting=setting.name,
                    text=generation.text,
                    tokens=tokens,
                    answers=list(sample.answers),
                    equal=equal,
                    hits=hits,
                    count=count,
                    kl=divergence,
                    attention=None,
                    visual_bytes=self.manifest.layout.visual_bytes(lengths),
                    elements=sum(lengths) * self.manifest.layout.elements_per_token,
                    seconds=seconds / len(samples),
                )
            )
        return records

    def close(self) -> None:
        """Drop graphs and cache."""
        if self._session is not None:
            self._session.close()

    def _open(self, prepared: Sequence[Prepared]) -> Session:
        """A session whose slots have room for each prompt with its answer."""
        size = self.manifest.quantization.group_size
        visual = text = 0
        for entry in prepared:
            needed = len(entry.token_ids) + self.max_new_tokens - 1
            visual = max(visual, sum(-(-length // size) * size for length in entry.picture_lengths))
            text = max(text, needed - sum(entry.picture_lengths))
        if self._session is not None:
            cache = self._session.backend.cache
            if self.manifest.layout.is_packed:
                fits = visual <= cache.visual_capacity and text <= cache.text_capacity
            else:
                fits = visual + text <= cache.text_capacity
            if fits:
                return self._session
            self._session.close()
        self._session = Session.load(
            self._bundle,
            backend="onnxruntime",
            provider=self._provider,
            slots=self._slots,
            visual_tokens=visual,
            text_tokens=-(-text // _ROUNDING) * _ROUNDING,
            cut_after_pictures=self._cut_after_pictures,
            reuse=False,  # which rounds otherwise
            verify=False,
        )
        return self._session


def _follow(session: Session, prepared: Sequence[Prepared], answers: Sequence[list[int]]) -> list[np.ndarray]:
    """Logits FP32 [tokens, V] before each token of the given answers: a prompt at a time, then a token per step.

    Prompts are cut as the session cuts them.
    """
    backend, manifest, model = session.backend, session.manifest, session.manifest.model
    cache, size = backend.cache, session.manifest.quantization.group_size
    slots = [cache.acquire() for _ in prepared]
    found: list[list[np.ndarray]] = [[] for _ in prepared]
    try:
        for row, (slot, entry) in enumerate(zip(slots, prepared, strict=True)):
            encoded = [backend.encode(inputs) for inputs in entry.vision_calls]
            count = sum(entry.picture_lengths)
            for piece in cut(entry.token_ids, entry.picture_lengths, manifest, None, session.cut_after_pictures):
                feed = [piece.row(cache, slot, entry.token_ids, entry.positions, 0, embeds=count)]
                call = build_call(feed, group_size=size, image_token_id=model.image_token_id)
                logits = backend.step(call, backend.place(call, encoded) if piece.picture_lengths else None)[0]
            found[row].append(logits)
        for step in range(max(map(len, answers)) - 1):
            rows = [row for row, answer in enumerate(answers) if step < len(answer) - 1]
            feed = [cache.row(slots[row], np.array([answers[row][step]], np.int32)) for row in rows]
            call = build_call(feed, group_size=size, image_token_id=model.image_token_id)
            for row, logits in zip(rows, backend.step(call, None), strict=True):
                found[row].append(logits)
    finally:
        for slot in slots:
            cache.release(slot)
    stacked = [np.stack(rows).astype(np.float32) for rows in found]
    for logits in stacked:
        logits[:, session.processor.placeholder_ids] = -np.inf  # never chosen, as in a session
    return stacked


def _compare(expected: Tensor, logits: np.ndarray, answer: Sequence[int]) -> tuple[int, float]:
    import torch

    from vkvx.evaluation.torch_runner import compare

    return compare(expected, torch.from_numpy(logits).to(expected.device), answer)
