"""The server: answers as those of one request alone, joining, leaving, refusals, failures."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fakes import FakeBackend, FakeProcessor, manifest

from vkvx import CapacityError, InputError, OptionError, VkvxError
from vkvx.runtime.serving.server import Server
from vkvx.runtime.sessions.generation import Request
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
        next(iter(endless))
        endless.cancel()
        assert waiting.result().token_ids
        with pytest.raises(InputError, match="cancelled"):
            endless.result()
    assert loaded.backend.cache.free_slots == (0,)


def test_the_end_of_an_answer_stays() -> None:
    with Server(session()) as server:
        answer = server.submit("[x]", max_new_tokens=5)
        assert answer.result() is answer.result()
        failed = server.submit("[x]", max_new_tokens=900, ignore_eos=True)
        failed.cancel()
        for _ in range(2):
            with pytest.raises(InputError, match="cancelled"):
                failed.result()


def test_wrong_requests_are_refused_at_once() -> None:
    with Server(session()) as server:
        with pytest.raises(CapacityError):
            server.submit("[x]", max_new_tokens=100_000)
        with pytest.raises(OptionError):
            server.submit("[x]", heat=1)
        assert server.submit("[x]", max_new_tokens=2).result().token_ids
    with pytest.raises(InputError, match="closed"):
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
    next(iter(answer))
    server.close()
    with pytest.raises(InputError, match="closed"):
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
    next(iter(running))
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
    with server._changed:  # all three join at once
        answers = [server.submit("[x]", max_new_tokens=900, ignore_eos=True) for _ in range(3)]
    for answer in answers:
        with pytest.raises(VkvxError, match="unforeseen"):
            answer.result()
