"""The server: answers as those of one request alone, joining, leaving, refusals, failures."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fakes import FakeBackend, FakeProcessor, manifest

from vkvx import CapacityError, InputError, OptionError, VkvxError
from vkvx.runtime.serving.server import Server
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


def test_wrong_requests_are_refused_at_once() -> None:
    with Server(session()) as server:
        with pytest.raises(CapacityError):
            server.submit("[x]", max_new_tokens=100_000)
        with pytest.raises(OptionError):
            server.submit("[x]", heat=1)
        assert server.submit("[x]", max_new_tokens=2).result().token_ids
    with pytest.raises(InputError, match="closed"):
        server.submit("[x]")


def test_a_failed_step_ends_its_requests_only() -> None:
    loaded = session()
    step = loaded.backend.step

    def broken(call, embeds):  # type: ignore[no-untyped-def]
        if len(loaded.backend.calls) == 2:  # type: ignore[attr-defined]
            loaded.backend.calls.append(call)  # type: ignore[attr-defined]
            raise RuntimeError("out of order")
        return step(call, embeds)

    loaded.backend.step = broken  # type: ignore[method-assign]
    with Server(loaded) as server:
        with pytest.raises(VkvxError, match="out of order"):
            server.submit("[x]", max_new_tokens=9, ignore_eos=True).result()
        assert loaded.backend.cache.free_slots == (0, 1, 2)
        assert len(server.submit("[y]", max_new_tokens=9, ignore_eos=True).result().token_ids) == 9


def test_closing_ends_what_runs() -> None:
    server = Server(session())
    answer = server.submit("[long]", max_new_tokens=900, ignore_eos=True)
    next(iter(answer))
    server.close()
    with pytest.raises(InputError, match="closed"):
        answer.result()
