"""Vision towers in parts: live rows decode between them, and what leaves or fails there takes nothing with it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes import FakeBackend, FakeProcessor, manifest

from vkvx.errors import RequestCancelledError, ServerClosedError
from vkvx.runtime.serving.server import Server
from vkvx.runtime.sessions import scheduler
from vkvx.runtime.sessions.generation import Chunk, Failure, Request
from vkvx.runtime.sessions.sampling import GenerationOptions
from vkvx.runtime.sessions.session import Session

PROMPT, PICTURES, LAYERS = "a<image> and <image>", [1.0, 4.0], 4


@pytest.fixture(autouse=True, params=[0, 1, 3], ids=["host", "ahead", "parts"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many parts prompts are launched in, where the backend chooses tokens; 0 where the host does."""
    monkeypatch.setattr(FakeBackend, "samples", request.param > 0)
    monkeypatch.setattr(FakeBackend, "parts", request.param)
    monkeypatch.setattr(FakeBackend, "layers", LAYERS)
    return int(request.param)


class Trace:
    """A scheduler whose requests are submitted one by one; what they gave, and what ran.

    Only its own clock runs: a layer of a tower takes ``layer_seconds``, a step one second.
    """

    layer_seconds = 0.0

    def __init__(self, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.backend: Any = FakeBackend(manifest(), slots)
        self.scheduler, self.processor = scheduler.Scheduler(self.backend), FakeProcessor()
        self.tokens, self.errors = dict[int, list[int]](), dict[int, Exception]()
        self.events, self.now = list[str](), 0.0
        encode, step, encode_in_parts = FakeBackend.encode, FakeBackend.step, FakeBackend.encode_in_parts
        monkeypatch.setattr(scheduler, "time", SimpleNamespace(perf_counter=lambda: self.now))

        def encoding_in_parts(backend: FakeBackend, inputs: Any) -> Any:
            parts = encode_in_parts(backend, inputs)
            for _ in range(LAYERS - 1):
                next(parts)
                self.events.append("part")
                self.now += self.layer_seconds
                yield
            return (yield from parts)

        def encoding(backend: FakeBackend, inputs: Any) -> np.ndarray:
            self.events.append("encoded")
            return encode(backend, inputs)

        def stepping(backend: FakeBackend, call: Any, embeds: Any) -> np.ndarray:
            self.events.append("step" if call.input_ids.shape[1] == 1 else "prompt")
            self.now += 1
            return step(backend, call, embeds)

        monkeypatch.setattr(FakeBackend, "encode_in_parts", encoding_in_parts)
        monkeypatch.setattr(FakeBackend, "encode", encoding)
        monkeypatch.setattr(FakeBackend, "step", stepping)

    def submit(self, row: int, prompt: str, pictures: list[float], count: int = 6) -> Request:
        prepared = self.processor.prepare(prompt, pictures)
        options = GenerationOptions(max_new_tokens=count, ignore_eos=True)
        request = Request(row, prepared, options, self.processor, self.backend)  # type: ignore[arg-type]
        self.scheduler.submit(request)
        self.tokens[row] = []
        return request

    def steps(self, count: int) -> None:
        for _ in range(count):
            for result in self.scheduler.step():
                if isinstance(result, Chunk):
                    self.tokens[result.row] += result.token_ids
                else:
                    assert isinstance(result, Failure)
                    self.errors[result.row] = result.error

    def until_within_a_tower(self) -> None:
        for _ in range(9):
            self.steps(1)
            if self.backend.towers:
                return
        raise AssertionError("no tower stands between two of its layers")


def alone(prompt: str, pictures: list[float], count: int = 6) -> list[int]:
    """The tokens of a request that nobody runs beside."""
    backend: Any = FakeBackend(manifest(), 1)
    session = Session(backend.manifest, backend, FakeProcessor())  # type: ignore[arg-type]
    return list(session.generate(prompt, pictures or None, max_new_tokens=count, ignore_eos=True).token_ids)


def test_rows_decode_between_the_parts_of_a_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(PROMPT, PICTURES)
    trace = Trace(2, monkeypatch)
    trace.submit(0, PROMPT, PICTURES, 3)  # nobody waits, so nothing comes between
    trace.steps(1)
    assert trace.events[:2] == ["encoded", "prompt"]
    trace.steps(6)
    trace.submit(1, "first", [], 500)
    trace.steps(4)
    trace.events.clear()
    trace.submit(2, PROMPT, PICTURES)
    trace.steps(60)
    begun = trace.events.index("part")
    assert trace.events[begun : begun + 2 * LAYERS] == ["part", "step"] * (LAYERS - 1) + ["encoded", "step"]
    assert trace.tokens[2] == expected
    length = trace.backend.cache.length(0)
    assert len(trace.tokens[1]) >= length - len("first") - 2  # each step gave it a token, and is read but for the last
    trace.scheduler.close()
    assert trace.backend.cache.free_slots == (0, 1)


def test_rows_get_the_time_that_the_host_takes_for_a_part(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it runs parts itself: where it launches them, the next step comes behind them in any case."""
    expected = alone(PROMPT, PICTURES)
    trace = Trace(2, monkeypatch)
    trace.layer_seconds = 3.5
    trace.submit(1, "first", [], 500)
    trace.steps(4)
    trace.events.clear()
    trace.submit(2, PROMPT, PICTURES)
    trace.steps(60)
    places = [place for place, event in enumerate(trace.events) if event == "part"]
    assert np.diff(places).tolist() == [1 + (1 if parts else 4)] * (LAYERS - 2)
    assert trace.tokens[2] == expected


@pytest.mark.parametrize("others", [0, 1])
def test_a_request_that_leaves_within_a_tower(others: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that started with it go on, and it leaves nothing behind."""
    expected = alone("<image>?", [5.0])
    trace = Trace(3, monkeypatch)
    trace.submit(0, "first", [], 900)
    trace.steps(3)
    leaving = trace.submit(1, PROMPT, PICTURES)
    if others:
        trace.submit(2, "<image>?", [5.0])
    trace.until_within_a_tower()
    trace.scheduler.cancel(leaving)
    assert trace.backend.towers == 0
    assert len(trace.backend.cache.free_slots) == 2 - others
    if not others:
        trace.submit(2, "<image>?", [5.0])
    trace.steps(60)
    assert trace.tokens[1] == []
    assert trace.tokens[2] == expected
    # So does the end of all.
    trace.submit(3, PROMPT, PICTURES)
    trace.until_within_a_tower()
    trace.scheduler.close()
    assert trace.backend.towers == 0
    assert trace.backend.cache.free_slots == (0, 1, 2)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_picture_that_fails_ends_its_request_only(bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of those that start together it belongs to; where 2, it comes alone."""
    expected = alone("<image>?", [5.0])
    trace = Trace(3, monkeypatch)
    trace.submit(0, "first", [], 900)
    trace.steps(3)
    given = [("<image>!", [-1.0]), ("<image>?", [5.0])]
    for row, one in enumerate([given[:1], given, given[::-1]][(bad + 1) % 3], start=1):
        trace.submit(row, *one)
    trace.steps(60)
    assert [str(error) for error in trace.errors.values()] == ["no such picture"]
    (failed,) = trace.errors
    assert [tokens for row, tokens in trace.tokens.items() if row not in (0, failed)] == [expected] * (bad != 2)
    assert len(trace.tokens[0]) > 40
    trace.scheduler.close()
    assert trace.backend.cache.free_slots == (0, 1, 2)


def test_an_answer_is_cancelled_while_its_picture_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """From another thread, through a server, which then closes within the tower of the next."""
    backend: Any = FakeBackend(manifest(), 2, text_tokens=4096)
    session = Session(backend.manifest, backend, FakeProcessor())  # type: ignore[arg-type]
    within, encode = threading.Event(), FakeBackend.encode_in_parts

    def encoding(self: FakeBackend, inputs: Any) -> Any:
        parts = encode(self, inputs)
        yield next(parts)
        within.set()
        yield from parts

    monkeypatch.setattr(FakeBackend, "layers", 2000)
    monkeypatch.setattr(FakeBackend, "encode_in_parts", encoding)
    with Server(session) as server:
        live = server.submit("first", max_new_tokens=4000, ignore_eos=True)
        live.chunk(0)
        stuck = server.submit(PROMPT, PICTURES)
        assert within.wait(60)
        stuck.cancel()
        with pytest.raises(RequestCancelledError):
            stuck.result()
        assert backend.towers == 0
        within.clear()
        another = server.submit(PROMPT, PICTURES)
        assert within.wait(60)
    for answer in (live, another):
        with pytest.raises(ServerClosedError):
            answer.result()
    assert backend.towers == 0
    assert backend.cache.free_slots == (0, 1)
