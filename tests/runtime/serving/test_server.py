"""The server: answers as those of one request alone, joining, leaving, refusals, failures."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from cut_backend import CutBackend
from fakes import FakeBackend, FakeProcessor, manifest

from vkvx import (
    BusyError,
    CapacityError,
    DeadlineError,
    OptionError,
    RequestCancelledError,
    ServerClosedError,
    VkvxError,
)
from vkvx.runtime.serving import server as serving
from vkvx.runtime.serving.answer import Answer
from vkvx.runtime.serving.server import Server
from vkvx.runtime.sessions import scheduler as scheduling
from vkvx.runtime.sessions.generation import Failure, Request
from vkvx.runtime.sessions.sampling import GenerationOptions
from vkvx.runtime.sessions.scheduler import Scheduler
from vkvx.runtime.sessions.session import Session


def session(slots: int = 3, kind: type[FakeBackend] = FakeBackend) -> Session:
    facts = manifest()
    return Session(facts, kind(facts, slots), FakeProcessor())  # type: ignore[arg-type]


def test_each_request_gets_what_it_gets_alone() -> None:
    prompts = [f"[question {i}]" for i in range(17)]
    alone = [session(1).generate(prompt, max_new_tokens=12 + i) for i, prompt in enumerate(prompts)]
    loaded = session()
    with Server(loaded) as server, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: server.submit(prompts[i], max_new_tokens=12 + i).result(), range(17)))
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in alone]
    assert loaded.backend.cache.free_slots == (0, 1, 2)
    sizes = {len(call.slot) for call in loaded.backend.calls}  # type: ignore[attr-defined]
    assert max(sizes) > 1, "no two requests ever ran together"


def test_a_request_joins_while_another_runs() -> None:
    loaded = session()
    entered, go_on = threading.Event(), threading.Event()
    step = loaded.backend.step

    def slow(call, embeds):  # type: ignore[no-untyped-def]
        if len(loaded.backend.calls) == 3:  # type: ignore[attr-defined]
            entered.set()
            assert go_on.wait(30)
        return step(call, embeds)

    loaded.backend.step = slow  # type: ignore[method-assign]
    with Server(loaded) as server:
        first = server.submit("[first]", max_new_tokens=30, ignore_eos=True)
        assert entered.wait(30)
        second = server.submit("<image>second", [1.0], max_new_tokens=5, ignore_eos=True)
        go_on.set()
        texts = second.result(), first.result()
    widths = [len(call.slot) for call in loaded.backend.calls]  # type: ignore[attr-defined]
    assert widths[:4] == [1, 1, 1, 1]
    assert widths.count(2) == 4  # the second's steps after its prefill run with the first's
    assert (
        texts[0].token_ids == session(1).generate("<image>second", [1.0], max_new_tokens=5, ignore_eos=True).token_ids
    )
    assert texts[1].token_ids == session(1).generate("[first]", max_new_tokens=30, ignore_eos=True).token_ids


def test_chunks_stream_and_end_with_the_generation() -> None:
    with Server(session()) as server:
        chunks = list(server.submit("[stream]", max_new_tokens=6, ignore_eos=True))
    assert [chunk.generation is None for chunk in chunks] == [True] * 5 + [False]
    assert chunks[-1].generation is not None
    assert chunks[-1].generation.text == "".join(chunk.text for chunk in chunks)


def test_a_cancelled_request_frees_its_slot() -> None:
    loaded = session(1)
    with Server(loaded) as server:
        endless = server.submit("[endless]", max_new_tokens=900, ignore_eos=True)
        waiting = server.submit("[next]", max_new_tokens=3)
        endless.chunk(0)
        endless.cancel()
        assert waiting.result().token_ids
        with pytest.raises(RequestCancelledError):
            endless.result()
    assert loaded.backend.cache.free_slots == (0,)


def test_the_end_of_an_answer_stays() -> None:
    with Server(session()) as server:
        answer = server.submit("[x]", max_new_tokens=5)
        assert answer.result() is answer.result()
        failed = server.submit("[x]", max_new_tokens=900, ignore_eos=True)
        failed.cancel()
        for _ in range(2):
            with pytest.raises(RequestCancelledError):
                failed.result()


def test_wrong_requests_are_refused_at_once() -> None:
    with Server(session()) as server:
        with pytest.raises(CapacityError):
            server.submit("[x]", max_new_tokens=100_000)
        with pytest.raises(OptionError):
            server.submit("[x]", heat=1)
        assert server.submit("[x]", max_new_tokens=2).result().token_ids
    with pytest.raises(ServerClosedError, match="start another"):
        server.submit("[x]")


def test_a_row_that_fails_ends_its_own_request_only(caplog: pytest.LogCaptureFixture) -> None:
    prompts = [*(f"[question {i}]" for i in range(4)), "<image>[five]"]
    alone = [session(1).generate(prompt, [1.0] * (i == 4), max_new_tokens=20) for i, prompt in enumerate(prompts)]
    loaded = session()
    loaded.backend.nan_after = "[bad]"  # type: ignore[attr-defined]
    with Server(loaded) as server:
        answers = [server.submit(prompt, max_new_tokens=20) for prompt in prompts[:2]]
        nan = server.submit("[bad]", max_new_tokens=20)
        refused = server.submit("<image>", [-1.0], max_new_tokens=20)
        answers += [server.submit(prompt, max_new_tokens=20) for prompt in prompts[2:4]]
        answers.append(server.submit(prompts[4], [1.0], max_new_tokens=20))
        assert [answer.result().token_ids for answer in answers] == [one.token_ids for one in alone]
        with pytest.raises(VkvxError, match="nan among the logits"):
            nan.result()
        with pytest.raises(VkvxError, match="RuntimeError: no such picture") as caught:
            refused.result()
        assert loaded.backend.cache.free_slots == (0, 1, 2)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert caught.value.__cause__.__traceback__ is not None
    records = [record for record in caplog.records if record.name == "vkvx.runtime.serving"]
    assert all(record.levelno == logging.ERROR and record.exc_info for record in records)
    messages = sorted(record.getMessage() for record in records)
    assert len(messages) == 2
    assert messages[0].startswith(f"request {nan.number} failed: the decoder returned nan")
    assert messages[1] == f"request {refused.number} failed: RuntimeError: no such picture"


def test_a_failed_step_ends_its_requests_only(caplog: pytest.LogCaptureFixture) -> None:
    loaded = session()
    step = loaded.backend.step

    def broken(call, embeds):  # type: ignore[no-untyped-def]
        if len(loaded.backend.calls) == 2:  # type: ignore[attr-defined]
            loaded.backend.calls.append(call)  # type: ignore[attr-defined]
            raise RuntimeError("out of order")
        return step(call, embeds)

    loaded.backend.step = broken  # type: ignore[method-assign]
    with Server(loaded) as server:
        with pytest.raises(VkvxError, match="out of order") as caught:
            server.submit("[x]", max_new_tokens=9, ignore_eos=True).result()
        assert isinstance(caught.value.__cause__, RuntimeError)
        (record,) = caplog.records
        assert record.getMessage() == "a step failed, and with it requests 0: RuntimeError: out of order"
        assert record.exc_info
        assert record.exc_info[1] is caught.value.__cause__
        assert loaded.backend.cache.free_slots == (0, 1, 2)
        assert len(server.submit("[y]", max_new_tokens=9, ignore_eos=True).result().token_ids) == 9


def test_closing_ends_what_runs() -> None:
    server = Server(session())
    answer = server.submit("[long]", max_new_tokens=900, ignore_eos=True)
    answer.chunk(0)
    server.close()
    with pytest.raises(ServerClosedError):
        answer.result()


@pytest.mark.parametrize("where", ["_take_changes", "cancel"])
def test_a_server_whose_thread_fails_tells_all_who_wait(where: str, caplog: pytest.LogCaptureFixture) -> None:
    loaded = session(1)
    server = Server(loaded)

    def fail(*_: object) -> bool:
        raise ZeroDivisionError("unforeseen")

    if where == "cancel":
        server._scheduler.cancel = fail  # type: ignore[assignment]
    running = server.submit("[running]", max_new_tokens=900, ignore_eos=True)
    waiting = server.submit("[waiting]", max_new_tokens=900, ignore_eos=True)
    running.chunk(0)
    if where == "cancel":
        running.cancel()
    else:
        server._take_changes = fail  # type: ignore[method-assign]
    for answer in (running, waiting):
        with pytest.raises(VkvxError, match="unforeseen") as caught:
            answer.result()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(VkvxError, match=r"has failed \(ZeroDivisionError: unforeseen\); start another"):
        server.submit("[x]")
    server.close()
    assert loaded.backend.cache.free_slots == (0,)
    (record,) = caplog.records
    assert record.getMessage() == "the server has failed, and with it requests 0, 1: ZeroDivisionError: unforeseen"


def test_a_request_that_joins_a_failing_server_is_told() -> None:
    server = Server(session())
    schedule = server._scheduler.submit

    def fail(request: Request) -> None:
        if request.row == 1:
            raise ZeroDivisionError("unforeseen")
        schedule(request)

    server._scheduler.submit = fail  # type: ignore[method-assign]
    with server._lock:  # all three join at once
        answers = [server.submit("[x]", max_new_tokens=900, ignore_eos=True) for _ in range(3)]
    for answer in answers:
        with pytest.raises(VkvxError, match="unforeseen"):
            answer.result()


def test_an_answer_can_be_read_again_and_by_many() -> None:
    with Server(session()) as server:
        answer = server.submit("[x]", max_new_tokens=6, ignore_eos=True)
        with ThreadPoolExecutor(4) as pool:
            read = list(pool.map(lambda _: [chunk.text for chunk in answer], range(4)))
        assert read == [[chunk.text for chunk in answer]] * 4
        assert answer.result() is answer.result(timeout=0)
        with pytest.raises(IndexError, match="6 chunks"):
            answer.chunk(6)


def held_back(loaded: Session, after: int) -> threading.Event:
    """Lets the backend's steps wait, after so many of them, until the event is set."""
    go_on, step = threading.Event(), loaded.backend.step

    def slow(call, embeds):  # type: ignore[no-untyped-def]
        assert len(loaded.backend.calls) < after or go_on.wait(30)  # type: ignore[attr-defined]
        return step(call, embeds)

    loaded.backend.step = slow  # type: ignore[method-assign]
    return go_on


def test_waiting_for_a_result_can_end() -> None:
    loaded = session()
    go_on = held_back(loaded, 2)
    with Server(loaded) as server:
        answer = server.submit("[x]", max_new_tokens=5, ignore_eos=True)
        with pytest.raises(TimeoutError, match="cancel"):
            answer.result(timeout=0.01)
        go_on.set()
        assert len(answer.result(timeout=30).token_ids) == 5


@pytest.mark.parametrize("how", ["break", "drop"])
def test_an_answer_that_nobody_reads_is_cancelled(how: str) -> None:
    loaded = session(1)
    with Server(loaded) as server:
        answer = server.submit("[endless]", max_new_tokens=900, ignore_eos=True)
        if how == "break":
            for _ in answer:
                break
            with pytest.raises(RequestCancelledError):
                answer.result(timeout=30)
        del answer
        assert server.submit("[next]", max_new_tokens=3).result(timeout=30).token_ids
        assert server.stats.cancelled == 1
        assert len(loaded.backend.calls) < 900  # type: ignore[attr-defined]


def test_requests_that_were_cancelled_while_they_waited_never_run() -> None:
    loaded = session(1)
    go_on = held_back(loaded, 1)
    with Server(loaded) as server:
        first = server.submit("[first]", max_new_tokens=4, ignore_eos=True)
        first.chunk(0)
        waiting = [server.submit("<image>", [1.0], max_new_tokens=4) for _ in range(24)]
        last = server.submit("[last]", max_new_tokens=4, ignore_eos=True)
        for answer in waiting:
            answer.cancel()
        go_on.set()
        assert len(last.result(30).token_ids) == len(first.result(30).token_ids) == 4
    assert len(loaded.backend.calls) == 8  # type: ignore[attr-defined]


def test_the_queue_is_bounded_and_counted() -> None:
    loaded = session(1)
    go_on = held_back(loaded, 1)
    with Server(loaded, max_waiting=2) as server:
        answers = [server.submit("[a]", max_new_tokens=3, ignore_eos=True)]
        answers[0].chunk(0)
        answers += [server.submit("[b]", max_new_tokens=3, ignore_eos=True) for _ in range(2)]
        with pytest.raises(BusyError, match="2 requests wait"):
            server.submit("[c]")
        stats = server.stats
        assert (stats.slots, stats.live, stats.waiting, stats.submitted, stats.refused) == (1, 1, 2, 3, 1)
        go_on.set()
        prompts = [answer.result(30).prompt_tokens for answer in answers]
        stats = server.stats
    assert (stats.finished, stats.live, stats.waiting, stats.first_tokens, stats.new_tokens) == (3, 0, 0, 3, 9)
    assert stats.prompt_tokens == sum(prompts)
    assert stats.first_token_seconds > 0
    with pytest.raises(OptionError, match="max_waiting"):
        Server(loaded, max_waiting=0)


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


def test_coroutines_read_answers_without_threads() -> None:
    alone = session(1).generate("[x]", max_new_tokens=9, ignore_eos=True)

    async def read(server: Server) -> tuple[list[str], tuple[int, ...], int]:
        answers = [server.submit("[x]", max_new_tokens=9, ignore_eos=True) for _ in range(5)]
        texts = [chunk.text async for chunk in answers[0]]
        results = await asyncio.gather(*answers)
        endless = server.submit("[endless]", max_new_tokens=900, ignore_eos=True)
        task = asyncio.ensure_future(endless._whole())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(RequestCancelledError):
            await endless
        return texts, results[4].token_ids, threading.active_count()

    before = threading.active_count()
    with Server(session()) as server:
        texts, tokens, threads = asyncio.run(read(server))
    assert "".join(texts) == alone.text
    assert tokens == alone.token_ids
    assert threads == before + 1  # the server's


def test_prompts_do_not_starve_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With prompts always waiting, an answer that runs gets half of the time: by a clock that counts work."""
    loaded = session(4)
    now, step, kinds = [0.0], loaded.backend.step, list[bool]()

    def timed(call, embeds):  # type: ignore[no-untyped-def]
        kinds.append(call.input_ids.shape[1] > 1)
        now[0] += 1.0 if kinds[-1] else 0.1
        return step(call, embeds)

    loaded.backend.step = timed  # type: ignore[method-assign]
    monkeypatch.setattr(scheduling.time, "perf_counter", lambda: now[0])
    scheduler = Scheduler(loaded.backend)
    for row in range(12):
        prepared = loaded.processor.prepare("<image>question", [1.0])  # type: ignore[list-item]
        options = GenerationOptions(max_new_tokens=40 if row == 0 else 2, ignore_eos=True)
        scheduler.submit(Request(row, prepared, options, loaded.processor, loaded.backend))
    started = []
    while scheduler.busy:
        for result in scheduler.step():
            assert not isinstance(result, Failure)
            if result.row not in started:
                started.append(result.row)
    assert started == sorted(started)
    first = kinds.index(False)
    between = "".join("p" if kind else "d" for kind in kinds[first:]).split("p")[:-1]
    assert all(len(steps) >= 10 for steps in between[1:] if steps), between
    assert "pp" not in "".join("p" if kind else "d" for kind in kinds[1:])


@pytest.mark.parametrize(
    ("slots", "limit", "samples"), [(1, None, True), (3, 128, False), (3, None, True), (8, 128, True), (8, None, False)]
)
def test_several_answers_take_one_prefill(slots: int, limit: int | None, samples: bool) -> None:
    options = [GenerationOptions(max_new_tokens=7, temperature=1.0, seed=i, logprobs=True) for i in range(5)]
    single, loaded = session(1, CutBackend), session(slots, CutBackend)  # whose tokens depend on cuts
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
        with pytest.raises(BusyError):
            server.submit_several("[x]", options=options * 2)
        for wrong_options in ([], [options[0], replace(options[0], fps=2.0)]):
            with pytest.raises(OptionError, match="at least one"):
                server.submit_several("[x]", options=wrong_options)
        assert server.stats.refused == 6
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

    def ask(number: int) -> None:
        kind, question = number % 8, number % 12
        given = {"deadline": 1e-6} if kind == 1 else {}
        try:
            if kind == 2:
                prompt, images = ("[bad]", []) if number % 3 else ("<image>", [-1.0])
                server.submit(prompt, images, max_new_tokens=9).result(30)
            answer = server.submit(questions[question], pictures[question], max_new_tokens=9, **given)
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
        list(pool.map(ask, range(300)))
        assert server.submit(questions[0], max_new_tokens=9).result(30).token_ids == alone[0].token_ids
        stats = server.stats
    assert loaded.backend.cache.free_slots == (0, 1, 2)
    assert (stats.live, stats.waiting) == (0, 0)
    assert stats.submitted == stats.finished + stats.failed + stats.cancelled + stats.expired
    assert stats.refused == ended["BusyError"]
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


def test_a_process_may_end_without_closing() -> None:
    """In a backend's C++ a thread that the interpreter stops would abort the process."""
    code = """
import atexit, sys
from test_server import session
from vkvx import Server
atexit.register(lambda: print("alive" if server._thread.is_alive() else "gone"))
server = Server(session())
answer = server.submit("[endless]", max_new_tokens=900, ignore_eos=True)
answer.chunk(3)
"""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1] / "helpers")])}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "gone\n", "")
