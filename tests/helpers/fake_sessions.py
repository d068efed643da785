"""Sessions over the fake backend."""

from __future__ import annotations

import threading
from typing import Any

from fakes import FakeBackend, FakeProcessor, manifest

from vkvx.runtime.sessions.generation import Generation
from vkvx.runtime.sessions.session import Session


def session(slots: int = 1, bits: int = 1, kind: type[FakeBackend] = FakeBackend, **options: Any) -> Session:
    positions = options.pop("max_positions", 4096)
    fake = manifest(bits, max_positions=positions)
    return Session(fake, kind(fake, slots, **options), FakeProcessor())  # type: ignore[arg-type]


def backend_of(loaded: Session) -> FakeBackend:
    backend = loaded.backend
    assert isinstance(backend, FakeBackend)
    return backend


def scripted(text: str | bytes, slots: int = 1) -> Session:
    """A session that answers this, byte by byte, whatever it is asked in brackets."""
    loaded = session(slots)
    backend_of(loaded).script = list(text.encode() if isinstance(text, str) else text)
    return loaded


def tokens(generation: Generation) -> tuple[Any, ...]:
    return generation.token_ids, generation.text, generation.finish_reason


def held_back(loaded: Session, after: int) -> threading.Event:
    """Lets the backend's steps wait, after so many of them, until the event is set."""
    go_on, step = threading.Event(), loaded.backend.step

    def slow(call, embeds):  # type: ignore[no-untyped-def]
        assert len(loaded.backend.calls) < after or go_on.wait(30)  # type: ignore[attr-defined]
        return step(call, embeds)

    loaded.backend.step = slow  # type: ignore[method-assign]
    return go_on


def break_step(loaded: Session, after: int) -> None:
    """Makes the backend's step after so many of them fail, once."""
    step = loaded.backend.step

    def broken(call, embeds):  # type: ignore[no-untyped-def]
        if len(loaded.backend.calls) == after:  # type: ignore[attr-defined]
            loaded.backend.calls.append(call)  # type: ignore[attr-defined]
            raise RuntimeError("out of order")
        return step(call, embeds)

    loaded.backend.step = broken  # type: ignore[method-assign]
