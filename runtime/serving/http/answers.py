"""Answers in OpenAI's form: whole, and as events of a stream."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vkvx.cache_layout import CacheLayout
from vkvx.errors import VkvxError
from vkvx.runtime.serving.answer import Answer
from vkvx.runtime.serving.http.errors import explain
from vkvx.runtime.serving.http.metrics import Metrics
from vkvx.runtime.sessions.generation import Chunk, Generation
from vkvx.runtime.sessions.processor import Processor

KEEP_ALIVE_SECONDS = 15.0
"""A stream that has nothing to say for so long says that it lives: proxies close silent ones."""
_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}
_LEAST_LOGPROB = -9999.0
"""JSON has no infinity."""


@dataclass
class Reply:
    """One request under way: the answers to its prompts, as many to each, prompt after prompt.

    ``prompt_tokens`` are those of all prompts, each counted once, and ``picture_lengths`` the visual tokens among them.
    """

    model: str
    is_chat: bool
    prompt_tokens: int
    picture_lengths: Sequence[int]
    answers: Sequence[Answer]
    choices: int
    """Answers to each prompt."""
    processor: Processor
    layout: CacheLayout
    metrics: Metrics
    arrived: float
    """When the request came, by ``time.perf_counter``."""
    wants_logprobs: bool = False
    includes_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: secrets.token_hex(12))

    def cancel(self) -> None:
        """End all answers that have not ended."""
        for answer in self.answers:
            answer.cancel()

    async def whole(self) -> dict[str, Any]:
        """The body of an answer in one. Raises the error of the first answer that fails; the others end then."""
        try:
            done = await asyncio.gather(*map(self._read, range(len(self.answers))))
        finally:
            self.cancel()
        choices = [self._whole_choice(index, generation) for index, generation in enumerate(done)]
        return self._object("", choices, usage=self._usage(done))

    async def events(self) -> AsyncGenerator[str, None]:
        """Server-sent events, up to ``[DONE]``; an error that comes after the first is an event, and the last."""
        chunks: asyncio.Queue[tuple[int, Chunk] | Exception | None] = asyncio.Queue()
        task = asyncio.ensure_future(self._feed(lambda index, chunk: chunks.put_nowait((index, chunk)), chunks.put))
        place, done = [0] * len(self.answers), dict[int, Generation]()
        try:
            if self.is_chat:
                for index in range(len(self.answers)):
                    yield self._event([{"index": index, "delta": {"role": "assistant", "content": ""}}])
            while True:
                try:
                    item = await asyncio.wait_for(chunks.get(), KEEP_ALIVE_SECONDS)
                except asyncio.TimeoutError:
                    yield ": waiting\n\n"
                    continue
                if item is None:
                    break
                if isinstance(item, Exception):
                    yield _data(explain(item, is_logged=isinstance(item, VkvxError))[1])
                    return
                index, chunk = item
                if chunk.generation is not None:
                    done[index] = chunk.generation
                if choice := self._choice_of_chunk(index, chunk, place):
                    yield self._event([choice])
            if self.includes_usage:
                yield self._event([], usage=self._usage([done[index] for index in range(len(done))]))
            yield "data: [DONE]\n\n"
        finally:
            task.cancel()
            self.cancel()

    async def _feed(
        self, put: Callable[[int, Chunk], None], end: Callable[[Exception | None], Awaitable[None]]
    ) -> None:
        try:
            await asyncio.gather(*(self._read(index, put) for index in range(len(self.answers))))
        except Exception as error:
            await end(error)
        else:
            await end(None)

    async def _read(self, index: int, put: Callable[[int, Chunk], None] | None = None) -> Generation:
        """An answer, chunk by chunk, with the times between them."""
        before = None
        async for chunk in self.answers[index]:
            now = time.perf_counter()
            if before is None:
                self.metrics.first_token.observe(now - self.arrived)
            else:
                self.metrics.gap.observe(now - before)
            before = now
            if put is not None:
                put(index, chunk)
        assert chunk.generation is not None
        return chunk.generation

    def _object(self, suffix: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.is_chat else "text_completion"
        number = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.number}"
        return {
            "id": number,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        for choice in choices:
            choice.setdefault("finish_reason", None)
            choice.setdefault("logprobs", None)
        if self.includes_usage:
            more.setdefault("usage", None)
        return _data(self._object(".chunk", choices, **more))

    def _whole_choice(self, index: int, done: Generation) -> dict[str, Any]:
        logprobs = self._logprobs(done.token_ids, done.logprobs, 0) if self.wants_logprobs else None
        text: dict[str, Any] = {"text": done.text}
        if self.is_chat:
            text = {"message": {"role": "assistant", "content": done.text, "refusal": None}}
        return {"index": index, **text, "logprobs": logprobs, "finish_reason": _REASONS[done.finish_reason]}

    def _choice_of_chunk(self, index: int, chunk: Chunk, place: list[int]) -> dict[str, Any] | None:
        """What a chunk adds to a stream, None for nothing; ``place`` counts the characters of tokens so far."""
        found: dict[str, Any] = {"index": index}
        if self.wants_logprobs:
            found["logprobs"] = self._logprobs(chunk.token_ids, chunk.logprobs, place[index])
            place[index] += sum(map(len, self._pieces(chunk.token_ids)))
        elif not chunk.text and chunk.finish_reason is None:
            return None
        found |= {"delta": {"content": chunk.text} if chunk.text else {}} if self.is_chat else {"text": chunk.text}
        if chunk.finish_reason is not None:
            found["finish_reason"] = _REASONS[chunk.finish_reason]
        return found

    def _pieces(self, token_ids: Iterable[int]) -> list[str]:
        return [self.processor.decode([token]) for token in token_ids]

    def _logprobs(self, token_ids: Sequence[int], values: Sequence[float] | None, start: int) -> dict[str, Any]:
        pieces = self._pieces(token_ids)
        known = [max(_LEAST_LOGPROB, value) for value in values or ()]
        if self.is_chat:
            pairs = zip(pieces, known, strict=True)
            return {
                "content": [
                    {"token": piece, "logprob": value, "bytes": list(piece.encode()), "top_logprobs": []}
                    for piece, value in pairs
                ],
                "refusal": None,
            }
        offsets = [start + sum(map(len, pieces[:count])) for count in range(len(pieces))]
        return {"tokens": pieces, "token_logprobs": known, "top_logprobs": None, "text_offset": offsets}

    def _usage(self, done: Sequence[Generation]) -> dict[str, Any]:
        """Tokens of the prompts and of all answers; and the bytes that the pictures take."""
        lengths, total = self.picture_lengths, self.prompt_tokens
        new_tokens = sum(len(one.token_ids) for one in done)
        reused = [one.reused_tokens for one in done]
        # Of the answers to a prompt one had it fed, and the others were forked from that one.
        cached = sum(min(reused[start : start + self.choices]) for start in range(0, len(reused), self.choices))
        return {
            "prompt_tokens": total,
            "completion_tokens": new_tokens,
            "total_tokens": total + new_tokens,
            "prompt_tokens_details": {
                "cached_tokens": cached,
                "visual_tokens": sum(lengths),
                "text_tokens": total - sum(lengths),
                "visual_bytes": self.layout.visual_bytes(lengths),
                "sixteen_bit_visual_bytes": sum(map(self.layout.sixteen_bit_bytes_per_picture, lengths)),
            },
        }


def _data(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
