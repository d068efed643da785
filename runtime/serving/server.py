"""Serves one session to many threads: requests join and leave its slots between steps (continuous batching)."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from vkvx.errors import InputError, VkvxError
from vkvx.runtime.sessions.generation import Chunk, Generation, Request, Scheduler
from vkvx.runtime.sessions.processor import Pictures, listed
from vkvx.runtime.sessions.sampling import GenerationOptions
from vkvx.runtime.sessions.session import Session


class Answer:
    """What a request gets: iterate over its chunks as they come, or wait for :meth:`result`."""

    def __init__(self, server: Server, request: Request) -> None:
        self._server = server
        self._request = request
        self._chunks: queue.SimpleQueue[Chunk | VkvxError] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks up to the last, which holds the whole generation. Raises VkvxError if the request failed."""
        while True:
            chunk = self._chunks.get()
            if isinstance(chunk, VkvxError):
                raise chunk
            yield chunk
            if chunk.generation is not None:
                return

    def result(self) -> Generation:
        """Wait for the whole answer."""
        *_, last = self
        assert last.generation is not None
        return last.generation

    def cancel(self) -> None:
        """End the request; its slot is free after the step that runs."""
        self._server._cancel(self)


class Server:
    """A thread that runs the steps of a session for requests from any thread; the session is its own until it closes.

    A request that would not fit an empty slot is refused at once; others wait for a slot. What one gets does not depend
    on the others. If a step fails, all running requests get its error and their slots are free again.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._scheduler = Scheduler(session.backend)
        self._answers: dict[int, Answer] = {}
        self._changed = threading.Condition()
        self._joining: list[Answer] = []
        self._leaving: list[Answer] = []
        self._preparing = threading.Lock()
        self._closed = False
        self._count = 0
        self._thread = threading.Thread(target=self._serve, name="vkvx-server", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: str,
        images: Pictures = None,
        *,
        options: GenerationOptions | None = None,
        **changes: Any,
    ) -> Answer:
        """Queue a prompt, as in :meth:`Session.generate`. Raises InputError, OptionError and CapacityError at once."""
        session = self._session
        pictures = listed(images)
        chosen = session.options(options, changes)
        with self._preparing:  # tokenizers are not made for several threads
            prepared = session.processor.prepare(prompt, pictures)
        with self._changed:
            if self._closed:
                raise InputError("the server is closed; start another one")
            request = Request(self._count, prepared, chosen, session.processor, session.backend)
            request.check()
            self._count += 1
            answer = Answer(self, request)
            self._joining.append(answer)
            self._changed.notify()
        return answer

    def close(self) -> None:
        """End all requests and the thread. The session stays open."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _cancel(self, answer: Answer) -> None:
        with self._changed:
            self._leaving.append(answer)
            self._changed.notify()

    def _serve(self) -> None:
        while self._take_changes():
            if not self._scheduler.busy:
                continue
            try:
                chunks = self._scheduler.step()
            except Exception as error:  # whatever a backend raises belongs to those who wait for it
                self._fail(error if isinstance(error, VkvxError) else VkvxError(f"{type(error).__name__}: {error}"))
                continue
            for chunk in chunks:
                answer = self._answers[chunk.row]
                if chunk.generation is not None:
                    del self._answers[chunk.row]
                answer._chunks.put(chunk)
        self._fail(InputError("the server was closed before the answer ended"))

    def _take_changes(self) -> bool:
        """Let requests join and leave; wait if there is nothing to do. False once the server is closed."""
        with self._changed:
            while not (self._closed or self._joining or self._leaving or self._scheduler.busy):
                self._changed.wait()
            joining, self._joining = self._joining, []
            leaving, self._leaving = self._leaving, []
        for answer in joining:
            self._answers[answer._request.row] = answer
            self._scheduler.submit(answer._request)
        for answer in leaving:
            if self._answers.pop(answer._request.row, None) is not None:
                self._scheduler.cancel(answer._request)
                answer._chunks.put(InputError("the request was cancelled"))
        return not self._closed

    def _fail(self, error: VkvxError) -> None:
        self._scheduler.close()
        answers, self._answers = self._answers, {}
        for answer in answers.values():
            answer._chunks.put(error)
