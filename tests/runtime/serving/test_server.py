"""The server: answers as those of one request alone, joining, leaving, refusals, failures."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_sessions import break_step, held_back
from fakes import FakeBackend, FakeProcessor, manifest

from vkvx import (
    BusyError,
    CapacityError,
    OptionError,
    RequestCancelledError,
    ServerClosedError,
    VkvxError,
)
from vkvx.runtime.serving.server import Server
from vkvx.runtime.sessions import scheduler as scheduling
from vkvx.runtime.sessions.generation import Failure, Request
from vkvx.runtime.sessions.sampling import GenerationOptions
from vkvx.runtime.sessions.scheduler import Scheduler
from vkvx.runtime.sessions.session import Session


def session(slots: int = 3) -> Session:
    facts = manifest()
    return Session(facts, FakeBackend(facts, slots), FakeProcessor())  # type: ignore[arg-type]


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
    break_step(loaded, after=2)
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
