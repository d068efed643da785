"""Sessions over models of random weights, and steps of many rows through them.

Pictures go through the vision tower and the decoder as in any session; only tokenizer and image processor are replaced:
prompts are prepared beforehand. Many rows are made from one: its slot of the cache is copied to the others, each row
then goes its own way by its first token.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vkvx import ExportOptions
from vkvx.cache_layout import tensor_bytes
from vkvx.errors import OptionError, VkvxError
from vkvx.format import auto_group_size
from vkvx.manifest import Graph, Manifest, ModelInfo
from vkvx.models.family import Family
from vkvx.models.pictures.base import prompt_positions
from vkvx.models.pictures.kinds import open_pictures
from vkvx.models.registry import family_of, resolve
from vkvx.runtime.sessions.generation import Request
from vkvx.runtime.sessions.processor import Prepared
from vkvx.runtime.sessions.sampling import GenerationOptions
from vkvx.runtime.sessions.scheduler import run
from vkvx.runtime.sessions.session import Session

STEPS, WARM_UP = 32, 8
WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"temperature": 0.8, "top_p": 0.9}}
SIXTEEN = 16


@dataclass(frozen=True)
class Setting:
    """Bits of visual and of text rows, and whether decode steps are compiled; written "1", "1/8", "1+compile"."""

    bits: int
    text_bits: int = SIXTEEN
    compiled: bool = False

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Raises OptionError for what is none."""
        found = re.fullmatch(r"(\d+)(?:/(\d+))?(\+compile)?", text)
        if found is None:
            raise OptionError(f"contender '{text}' is not understood; write bits such as 1, 1/8 or 1/8+compile")
        return cls(int(found[1]), int(found[2] or SIXTEEN), bool(found[3]))

    def __str__(self) -> str:
        rows = "" if self.text_bits == SIXTEEN else f"/{self.text_bits}"
        return f"{self.bits}{rows}{'+compile' if self.compiled else ''}"

    def options(self, tokens_per_picture: int) -> ExportOptions:
        """Those of an export."""
        size: str | int = "auto" if self.bits == SIXTEEN else auto_group_size(tokens_per_picture)
        return ExportOptions(bits=self.bits, text_bits=self.text_bits, group_size=size)


@dataclass(frozen=True)
class Workload:
    """A model's shape and its requests: pictures of so many tokens each, text around them, and an answer."""

    preset: str
    pictures: int
    picture_tokens: int
    text: int = 64
    answer: int = 266

    @property
    def visual(self) -> int:
        """Visual tokens of a prompt."""
        return self.pictures * self.picture_tokens

    @property
    def prompt(self) -> int:
        """Tokens of a prompt."""
        return self.visual + self.text


class Prompts:
    """In place of a processor: a prompt is the number of its text; answers are decoded by tiny-llava's tokenizer."""

    placeholder_ids: tuple[int, ...]

    def __init__(self, workload: Workload, family: Family, config: Any, info: ModelInfo) -> None:
        from transformers import AutoTokenizer

        self.workload, self._info = workload, info
        self.placeholder_ids = (info.image_token_id,)
        self._tokenizer = AutoTokenizer.from_pretrained(resolve("tiny-llava").directory)
        kinds = open_pictures(info.pictures)
        example = kinds.example(family.pixel_inputs(config), workload.picture_tokens)
        assert example.tokens == workload.picture_tokens
        self._encoded = [example] * workload.pictures
        self._calls = kinds.join(self._encoded)

    def prepare(self, prompt: str, *pictures: Any, **options: Any) -> Prepared:
        """The workload's pictures, two tokens of text behind each, and the rest of the text."""
        load = self.workload
        rng = np.random.default_rng(int(prompt))
        text = iter(rng.integers(10, min(1000, self._info.vocab_size), load.text))
        image, ids = [self._info.image_token_id] * load.picture_tokens, list[int]()
        for _ in range(load.pictures):
            ids += [*image, next(text), next(text)]
        tokens = np.array([*ids, *text], np.int32)
        positions = prompt_positions(tokens == self._info.image_token_id, self._encoded)
        lengths = (load.picture_tokens,) * load.pictures
        digests = tuple(one.digest for one in self._encoded)
        return Prepared(tokens, self._calls, lengths, positions, picture_digests=digests)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, whatever their numbers."""
        known = len(self._tokenizer)
        return self._tokenizer.decode([token % known for token in token_ids])  # type: ignore[no-any-return]


class Model:
    """A model of random weights and what sessions need of it.

    transformers' own calls come first: the backend merges projections of the model.
    """

    def __init__(self, workload: Workload, model: Any) -> None:
        self.workload, self.model = workload, model
        self.family = family_of(model)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.info = self.family.info(model.config, self.dtype)
        self.prompts = Prompts(workload, self.family, model.config, self.info)

    @property
    def weights(self) -> int:
        """Bytes of all parameters."""
        held = {id(one): one.numel() * one.element_size() for one in self.model.parameters()}
        return sum(held.values())

    @cached_property
    def metrics(self) -> tuple[tuple[Any, Any], ...]:
        """Key and value metric of each cache, as an export would store them."""
        from vkvx.models.graph.metric import model_metrics

        found = model_metrics(self.family, self.model, self.info)
        return tuple(zip(found.key, found.value, strict=True))

    def manifest(self, setting: Setting) -> Manifest:
        """As an export with the default quantiser would write it. Raises OptionError."""
        tokens = self.workload.picture_tokens
        quantization = setting.options(tokens).resolve(self.info.cached_layers, (tokens,))
        graphs = {"vision": Graph("", 18, self.family.pixel_inputs(self.model.config), ())}
        return Manifest("", 1, self.info, quantization, graphs, ".", {})

    def capacity(self, setting: Setting, answer: int | None = None) -> tuple[int, int]:
        """Visual and text tokens that a slot must hold: a prompt, and its answer of so many tokens."""
        load, quantization = self.workload, self.manifest(setting).quantization
        text = load.text + (answer or load.answer)
        if setting.bits == SIXTEEN:
            return load.visual, text
        size = quantization.group_size
        return load.pictures * -(-load.picture_tokens // size) * size, text

    def slot_bytes(self, setting: Setting) -> int:
        """Bytes of the cache for one row."""
        visual, text = self.capacity(setting)
        sizes = (0, visual + text) if setting.bits == SIXTEEN else (visual, text)
        return sum(tensor_bytes(*tensor) for tensor in self.manifest(setting).layout.tensors(1, *sizes).values())

    def open(self, setting: Setting, slots: int, answer: int | None = None, chunk: int = 0) -> Session:
        """A session with so many rows and chunks of prefills (0: none). Raises CapacityError, OptionError."""
        from vkvx.runtime.backends.torch.backend import TorchBackend

        manifest = self.manifest(setting)
        metrics = self.metrics if setting.bits != SIXTEEN else ()
        visual, text = self.capacity(setting, answer)
        backend = TorchBackend(
            *(self.model, self.family, manifest, metrics), slots=slots, visual_tokens=visual, text_tokens=text
        )
        try:
            if setting.compiled:
                backend.compile()
            if chunk:
                backend.capture_prefills(chunk)
        except VkvxError:
            backend.close()
            raise
        return Session(manifest, backend, self.prompts, prefill_chunk=chunk or None)  # type: ignore[arg-type]


class Rows:
    """Rows of a session that all hold the workload's prompt: steps of any number of them, again and again."""

    def __init__(self, session: Session, count: int) -> None:
        """Runs the prompt of row 0 through the session, and copies its slot. Raises CapacityError."""
        self.session, self.count = session, count
        self._cache = session.backend.cache
        first = session.conversation()
        first.generate("0", max_new_tokens=1, ignore_eos=True)
        slots = [first.slot, *(self._cache.acquire() for _ in range(1, count))]
        for slot in slots[1:]:
            self._cache.fork(first.slot, slot)
        self._slots, self._conversation = slots, first
        self._history = list(first.token_ids[: self._cache.length(first.slot)])

    def _rewind(self) -> None:
        for slot in self._slots:
            self._cache.retract(slot, self._cache.length(slot) - len(self._history))

    def requests(self, count: int, **options: Any) -> list[Request]:
        """A request for each of the first ``count`` rows, which go on from the prompt by different tokens."""
        self._rewind()
        return [self._request(row, self.session.options(None, own_draws(row, options))) for row in range(count)]

    def _request(self, row: int, options: GenerationOptions) -> Request:
        prepared = Prepared(np.array([10 + row], np.int32), (), ())
        session = self.session
        given = {"slot": self._slots[row], "history": list(self._history)}
        request = Request(row, prepared, options, session.processor, session.backend, **given)  # type: ignore[arg-type]
        request.check()
        return request

    def steps(self, count: int, steps: int, **options: Any) -> list[list[int]]:
        """Tokens of so many steps of the first ``count`` rows: [steps][rows]."""
        tokens: list[dict[int, int]] = []
        requests = self.requests(count, max_new_tokens=self.room, **options)
        with closing(run(self.session.backend, requests)) as chunks:
            for chunk in chunks:
                if not tokens or chunk.row in tokens[-1]:
                    if len(tokens) == steps:
                        break
                    tokens.append({})
                tokens[-1][chunk.row] = chunk.token_ids[0]
        return [[step[row] for row in range(count)] for step in tokens]

    def logits(self, fed: Sequence[Sequence[int]], *, captured: bool) -> np.ndarray:
        """Logits FP32 [steps, rows, V] of the backend behind these tokens [steps][rows], by captured steps or eager."""
        from vkvx.runtime.calls import build_call

        self._rewind()
        backend: Any = self.session.backend
        steps, found = backend._steps, []
        backend._steps = steps if captured else None
        try:
            for tokens in fed:
                pairs = zip(self._slots, tokens, strict=False)
                rows = [self._cache.row(slot, np.array([token], np.int32)) for slot, token in pairs]
                call = build_call(rows, group_size=self._cache.group_size, image_token_id=-1)
                found.append(backend.step(call, None))
        finally:
            backend._steps = steps
        return np.stack(found)

    @property
    def room(self) -> int:
        """Tokens that the rows have room for behind the prompt."""
        return int(self._cache.text_capacity - self._cache.text_count[self._slots[0]])

    def milliseconds(self, count: int, **options: Any) -> float:
        """Of a step that the first ``count`` rows take part in: the median, from result to result."""
        requests = self.requests(count, max_new_tokens=self.room, **options)
        with closing(run(self.session.backend, requests)) as chunks:
            return step_milliseconds(chunks, count - 1)

    def close(self) -> None:
        """Give the slots back."""
        for slot in self._slots[1:]:
            self._cache.release(slot)
        self._conversation.close()


def own_draws(row: int, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a row whose answer does not end early; draws of its own where it is sampled."""
    return {"ignore_eos": True, **({"seed": row} if "temperature" in options else {}), **options}


def step_milliseconds(chunks: Any, row: int) -> float:
    """The median of times from a chunk of a row to its next, behind the first ones."""
    times: list[float] = []
    for chunk in chunks:
        if chunk.row == row:
            times.append(time.perf_counter())
            if len(times) > WARM_UP + STEPS:
                break
    return 1000 * statistics.median(np.diff(times)[WARM_UP:])


def first_token_milliseconds(session: Session, repeats: int = 3) -> float:
    """From a prompt, pictures and all, to its first token in a session where nothing else runs: the median."""
    times = []
    for _ in range(1 + repeats):
        begun = time.perf_counter()
        session.generate("0", max_new_tokens=1, ignore_eos=True)
        times.append(time.perf_counter() - begun)
    return 1000 * statistics.median(times[1:])


def prompts_at_once(session: Session, count: int, answer: int) -> tuple[float, float]:
    """``count`` prompts given at the same time: seconds to the first token of the last of them, and milliseconds of
    the steps after it."""
    begun = time.perf_counter()
    waiting, last, times = set(range(count)), 0.0, list[float]()
    prompts = [str(row) for row in range(count)]
    with closing(session.stream(prompts, max_new_tokens=answer, ignore_eos=True)) as chunks:
        for chunk in chunks:
            waiting.discard(chunk.row)
            if waiting:
                continue
            last = last or time.perf_counter() - begun
            if chunk.row == count - 1:
                times.append(time.perf_counter())
                if len(times) > WARM_UP + STEPS:
                    break
    return last, 1000 * statistics.median(np.diff(times)[WARM_UP:])
