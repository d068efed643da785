"""A server under load: deadlines, requests that end anywhere, several answers of one prompt, many requests."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from cut_backend import CutBackend
from fake_sessions import held_back, session
from fakes import FakeBackend, FakeProcessor, manifest

from vkvx import BusyError, DeadlineError, OptionError, RequestCancelledError, VkvxError
from vkvx.runtime.serving import server as serving
from vkvx.runtime.serving.answer import Answer
from vkvx.runtime.serving.server import Server
from vkvx.runtime.sessions import scheduler as scheduling
from vkvx.runtime.sessions.generation import Failure, Request
from vkvx.runtime.sessions.sampling import GenerationOptions
from vkvx.runtime.sessions.scheduler import Scheduler
from vkvx.runtime.sessions.session import Session


@pytest.mark.parametrize("where", ["waiting", "encoding", "prompt", "answer"])
@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_request_ends_wherever_it_is(where: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that stands still until the request is where it is meant to be."""
    loaded = session(1)
    loaded.prefill_chunk = 128
    backend, now = loaded.backend, [0.0]
    monkeypatch.setattr(serving.time, "perf_counter", lambda: now[0])
    encoded, step, encode = list[int](), backend.step, backend.encode
    answers = list[Answer]()
    prepare = loaded.processor.prepare

    def apart(*given, **options):  # type: ignore[no-untyped-def]
        prepared = prepare(*given, **options)
        pictures = prepared.vision_calls[0]["pixel_values"] if prepared.vision_calls else ()
        return replace(prepared, vision_calls=tuple({"pixel_values": one[None]} for one in pictures))

    def end() -> None:
        if how == "cancel":
            answers[0].cancel()
        now[0] = 100.0 if how == "deadline" else now[0]

    def seen_step(call, embeds):  # type: ignore[no-untyped-def]
        ready.wait(30)
        if where == "prompt" and call.input_ids.shape[1] > 1:
            assert backend.cache.length(0) < 300, "the rest of the prompt is never fed"
            end()
        return step(call, embeds)

    def seen_encode(pixels):  # type: ignore[no-untyped-def]
        ready.wait(30)
        encoded.append(1)
        if where == "encoding":
            end()
        return encode(pixels)

    ready = threading.Event()
    loaded.processor.prepare, backend.step, backend.encode = apart, seen_step, seen_encode  # type: ignore[method-assign]
    with Server(loaded) as server:
        other = server.submit("[other]", max_new_tokens=3, ignore_eos=True) if where == "waiting" else None
        answers.append(server.submit("<image><image>[x]", [1.0, 2.0], max_new_tokens=800, ignore_eos=True, deadline=50))
        if where == "waiting":
            end()
        ready.set()
        if where == "answer":
            answers[0].chunk(2, timeout=30)
            end()
        expected = RequestCancelledError if how == "cancel" else DeadlineError
        with pytest.raises(expected, match="cancelled" if how == "cancel" else "after 50 s; raise deadline"):
            answers[0].result(timeout=30)
        assert other is None or len(other.result(timeout=30).token_ids) == 3
        assert len(server.submit("[next]", max_new_tokens=3, ignore_eos=True).result(timeout=30).token_ids) == 3
        stats = server.stats
    assert (stats.cancelled, stats.expired) == ((1, 0) if how == "cancel" else (0, 1))
    assert (stats.live, stats.waiting, stats.failed) == (0, 0, 0)
    assert backend.cache.free_slots == (0,)
    assert len(encoded) == {"waiting": 0, "encoding": 1}.get(where, 2 if where == "answer" else len(encoded))


def test_deadlines_are_times_to_come() -> None:
    with Server(session()) as server:
        for wrong in (0, -1.0, float("nan")):
            with pytest.raises(OptionError, match="deadline must be more than 0 seconds"):
                server.submit("[x]", deadline=wrong)


@pytest.mark.parametrize(
    ("slots", "limit", "samples"), [(1, None, True), (3, 128, False), (3, None, True), (8, 128, True), (8, None, False)]
)
def test_several_answers_take_one_prefill(slots: int, limit: int | None, samples: bool) -> None:
    options = [GenerationOptions(max_new_tokens=7, temperature=1.0, seed=i, logprobs=True) for i in range(5)]
    single, loaded = session(1, kind=CutBackend), session(slots, kind=CutBackend)  # whose tokens depend on cuts
    single.prefill_chunk = loaded.prefill_chunk = limit
    alone, backend = [single.generate("<image>[x]", [1.0], options=one) for one in options], loaded.backend
    backend.samples = samples  # type: ignore[misc]
    with Server(loaded) as server:
        running = server.submit("[other]", max_new_tokens=30, ignore_eos=True)
        running.chunk(0)
        answers = server.submit_several("<image>[x]", [1.0], options=options)
        found = [answer.result(30) for answer in answers]
        other = single.generate("[other]", max_new_tokens=30, ignore_eos=True)
        assert running.result(30).token_ids == other.token_ids
        stats = server.stats
    for a, b in zip(alone, found, strict=True):
        assert (a.token_ids, a.logprobs, a.prompt_tokens) == (b.token_ids, b.logprobs, b.prompt_tokens)
    prefills = sum(1 for call in backend.calls if (call.visual_index >= 0).any())  # type: ignore[attr-defined]
    pieces = 1 if limit is None else 2
    if slots == 8:
        assert prefills == pieces
        assert [one.reused_tokens for one in found] == [0] + [found[0].prompt_tokens] * 4
    assert prefills <= 5 * pieces
    assert backend.cache.free_slots == tuple(range(slots))
    assert (stats.submitted, stats.finished, stats.waiting, stats.live) == (6, 6, 0, 0)


@pytest.mark.parametrize("ended", [[0], [2], [0, 1], [0, 1, 2, 3]])
def test_others_go_on_where_the_first_of_several_answers_ends(ended: list[int]) -> None:
    options = [GenerationOptions(max_new_tokens=7, temperature=1.0, seed=i) for i in range(4)]
    loaded = session(1)
    go_on = held_back(loaded, 1)
    with Server(loaded) as server:
        server.submit("[other]", max_new_tokens=3).chunk(0)
        answers = server.submit_several("<image>[x]", [1.0], options=options)
        assert server.stats.waiting == 4
        for number in ended:
            answers[number].cancel()
        go_on.set()
        for number, answer in enumerate(answers):
            if number in ended:
                with pytest.raises(RequestCancelledError):
                    answer.result(30)
            else:
                alone = session(1).generate("<image>[x]", [1.0], options=options[number])
                assert answer.result(30).token_ids == alone.token_ids
        assert (server.stats.live, server.stats.waiting) == (0, 0)
    assert loaded.backend.cache.free_slots == (0,)


def test_several_answers_fail_as_one_does() -> None:
    loaded = session(8)
    loaded.backend.nan_after = "[bad]"  # type: ignore[attr-defined]
    options = [GenerationOptions(max_new_tokens=7, seed=i) for i in range(3)]
    with Server(loaded, max_waiting=3) as server:
        for given, wrong in (("[bad]", "nan among the logits"), ("<image>", "no such picture")):
            for answer in server.submit_several(given, [-1.0] * ("<image>" in given), options=options):
                with pytest.raises(VkvxError, match=wrong):
                    answer.result(30)
        assert server.stats.failed == 6
        different = [options[0], replace(options[0], fps=2.0)]
        for wrong_options, words in (([], "at least one"), (different, "at least one"), (options * 2, "at most 3")):
            with pytest.raises(OptionError, match=words):
                server.submit_several("[x]", options=wrong_options)
    assert loaded.backend.cache.free_slots == tuple(range(8))


def test_many_mixed_requests_leave_nothing_behind() -> None:
    """Of all kinds, from many threads at once; those that end get what they get alone, and all slots are free again."""
    questions = [f"[system prompt of all]<image>[{i}]" if i % 3 else f"[text alone, number {i}]" for i in range(12)]
    pictures = [[float(i % 4)] * (i % 3 > 0) for i in range(12)]
    alone = [session(1).generate(*one, max_new_tokens=9) for one in zip(questions, pictures, strict=True)]
    facts = manifest(16)
    loaded = Session(facts, FakeBackend(facts, 3), FakeProcessor(), prefill_chunk=200, reuse=True)  # type: ignore[arg-type]
    loaded.backend.nan_after = "[bad]"  # type: ignore[attr-defined]
    ended = Counter[str]()

    def submit(*given: Any, **options: Any) -> Answer:
        while True:
            try:
                return server.submit(*given, **options)
            except BusyError:
                time.sleep(0.001)  # and try again later

    def ask(number: int) -> None:
        kind, question = number % 8, number % 12
        prompt, images, given = questions[question], pictures[question], {"max_new_tokens": 9}
        if kind == 1:
            given["deadline"] = 1e-6  # type: ignore[assignment]
        if kind == 2:
            prompt, images = ("[bad]", []) if number % 3 else ("<image>", [-1.0])
        if kind in (3, 4):
            given = {"max_new_tokens": 900, "ignore_eos": True}
        try:
            answer = submit(prompt, images, **given)
            if kind == 3:
                answer.cancel()
            if kind == 4:
                next(iter(answer))  # and go away
                return
            assert answer.result(30).token_ids == alone[question].token_ids
            ended["finished"] += 1
        except VkvxError as error:
            ended[type(error).__name__] += 1

    with Server(loaded, max_waiting=6) as server, ThreadPoolExecutor(12) as pool:
        list(pool.map(ask, range(240)))
        assert server.submit(questions[0], max_new_tokens=9).result(30).token_ids == alone[0].token_ids
        stats = server.stats
    assert loaded.backend.cache.free_slots == (0, 1, 2)
    assert (stats.live, stats.waiting) == (0, 0)
    assert stats.submitted == stats.finished + stats.failed + stats.cancelled + stats.expired
    assert ended["RequestCancelledError"] == sum(number % 8 == 3 for number in range(240))
    assert min(ended["finished"], stats.failed, stats.cancelled, stats.expired, stats.reused_prompts) > 0
    assert stats.reused_tokens >= 16 * stats.reused_prompts
    assert (server._running, server._joining, server._leaving) == ({}, {}, set())


def test_a_long_prompt_in_pieces_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """First come, first served: short prompts that come later do not overtake it for ever, nor stop each other."""
    loaded = session(2)
    now, step = [0.0], loaded.backend.step
    monkeypatch.setattr(scheduling.time, "perf_counter", lambda: now[0])

    def timed(call, embeds):  # type: ignore[no-untyped-def]
        now[0] += 1.0 if call.input_ids.shape[1] > 1 else 0.1
        return step(call, embeds)

    loaded.backend.step = timed  # type: ignore[method-assign]
    scheduler = Scheduler(loaded.backend, 128)
    lengths = [10, 900, *[10] * 12]
    for row, length in enumerate(lengths):
        prepared = loaded.processor.prepare("x" * length)
        options = GenerationOptions(max_new_tokens=3, ignore_eos=True)
        scheduler.submit(Request(row, prepared, options, loaded.processor, loaded.backend, prefill_chunk=128))
    first = list[int]()
    while scheduler.busy:
        for result in scheduler.step():
            assert not isinstance(result, Failure)
            if result.row not in first:
                first.append(result.row)
    assert sorted(first) == list(range(14))
    assert first.index(1) <= 1, "the second that came is the second that is served"
