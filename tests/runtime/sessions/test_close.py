"""A session that is closed: twice, with conversations and streams that still run, in every backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeBackend, FakeProcessor, manifest

from vkvx.errors import InputError
from vkvx.runtime.serving.server import Server
from vkvx.runtime.sessions.session import Session

CLOSED = "the session is closed; open the bundle again"


@pytest.fixture
def session() -> Session:
    info = manifest()
    processor: Any = FakeProcessor()
    return Session(info, FakeBackend(info, slots=2), processor)


def uses(session: Session) -> list[Callable[[], Any]]:
    return [
        lambda: session.generate("Hello"),
        lambda: session.stream("Hello"),
        session.conversation,
    ]


def test_use_after_close(session: Session) -> None:
    session.close()
    session.close()
    for use in uses(session):
        with pytest.raises(InputError, match=CLOSED):
            use()


def test_conversations_end_with_their_session(session: Session) -> None:
    talk = session.conversation()
    list(talk.ask("Hello", max_new_tokens=2))
    answer = talk.ask("And then?", max_new_tokens=50)
    next(answer)
    session.close()
    with pytest.raises(InputError, match=CLOSED):
        next(answer)
    for use in (lambda: talk.ask("Hello"), lambda: talk.generate("Hello"), talk.fork, lambda: talk.slot):
        with pytest.raises(InputError, match=CLOSED):
            use()
    talk.close()
    talk.close()


def test_streams_end_with_their_session(session: Session) -> None:
    stream = session.stream(["Hello", "and", "more"], max_new_tokens=50)
    next(stream)
    session.close()
    with pytest.raises(InputError, match=CLOSED):
        list(stream)
    waiting = session.backend.cache
    assert waiting.free_slots == (0, 1)


def test_a_server_tells_those_who_wait(session: Session) -> None:
    with Server(session) as server:
        session.close()
        with pytest.raises(InputError, match=CLOSED):
            server.submit("Hello", max_new_tokens=200).result()


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_every_backend_lets_go(tiny_bundle: Path, backend: str) -> None:
    session = Session.load(tiny_bundle, backend=backend, provider="cpu", verify=False)
    assert session.backend.device == "CPU"
    session.generate("Hello", max_new_tokens=2)
    session.close()
    session.close()
    assert not session.backend.cache.buffers
    with pytest.raises(InputError, match=CLOSED):
        session.generate("Hello")
