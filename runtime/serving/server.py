"""Serves one session to many threads: requests join and leave its slots between steps (continuous batching)."""

from __future__ import annotations

import copy
import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from vkvx.errors import InputError, VkvxError, describe
from vkvx.runtime.sessions.generation import Chunk, Failure, Generation, Request, Scheduler
from vkvx.runtime.sessions.pictures import Pictures, listed
from vkvx.runtime.sessions.sampling import GenerationOptions
from vkvx.runtime.sessions.session import Session
from vkvx.runtime.sessions.videos import Video, listed_videos

LOG = logging.getLogger("vkvx.runtime.serving")
"""Each failure is one record, with the numbers of the requests it ended and the traceback."""


class Answer:
    """What a request gets: iterate over its chunks as they come, or wait for :meth:`result`.

    ``number`` is the request's in the log of the server.
    """

    def __init__(self, server: Server, request: Request) -> None:
        self._server = server
        self._request = request
        self.number = request.row
        self._chunks: queue.SimpleQueue[Chunk | VkvxError] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks up to the last, which holds the whole generation. Raises VkvxError if the request failed.

        What came once does not come again, except the last chunk or the error.
        """
        while True:
            chunk = self._chunks.get()
            if isinstance(chunk, VkvxError):
                self._chunks.put(chunk)  # the end stays, for whoever else waits or asks again
                raise chunk
            if chunk.generation is not None:
                self._chunks.put(chunk)
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
    on the others: if something of one request fails (its pictures, its logits, its text), its answer raises a VkvxError
    from the cause, its slot is free again, and the others go on. If a whole step fails, all requests that run or wait
    get its error, and all slots are free again. If the thread itself fails, they do too, and the server takes no more
    requests. The logger ``vkvx.runtime.serving`` has each failure with its traceback.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._scheduler = Scheduler(session.backend)
        self._answers: dict[int, Answer] = {}
        self._changed = threading.Condition()
        self._joining: list[Answer] = []
        self._leaving: list[Answer] = []
        self._closed = False
        self._broken: BaseException | None = None  # what ended the thread, if not close()
        self._count = 0
        self._thread = threading.Thread(target=self._serve, name="vkvx-server", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: str,
        images: Pictures = None,
        videos: str | Path | Sequence[Video] | None = None,
        *,
        options: GenerationOptions | None = None,
        **changes: Any,
    ) -> Answer:
        """Queue a prompt, as in :meth:`Session.generate`. Raises InputError, OptionError and CapacityError at once.

        Raises VkvxError if the server's thread has failed.
        """
        session = self._session
        chosen = session.options(options, changes)
        prepared = session.processor.prepare(
            prompt, listed(images), listed_videos(videos), limits=chosen.limits, fps=chosen.fps
        )
        with self._changed:
            if self._broken is not None:
                raise VkvxError(
                    f"the server has failed ({describe(self._broken)}); start another one"
                ) from self._broken
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
        try:
            while self._take_changes():
                if self._scheduler.busy:
                    self._step()
            self._end_all(InputError("the server was closed before the answer ended"))
        except BaseException as error:  # nothing may end the thread while clients wait for it
            with self._changed:
                self._broken = error
                self._answers.update((answer.number, answer) for answer in self._joining)
            LOG.critical("the server has failed, and with it %s: %s", self._numbers(), describe(error), exc_info=error)
            self._end_all(error)

    def _step(self) -> None:
        try:
            results = self._scheduler.step()
        except Exception as error:  # whatever a backend raises belongs to those who wait for it
            LOG.error("a step failed, and with it %s: %s", self._numbers(), describe(error), exc_info=error)
            self._end_all(error)
            return
        for result in results:
            if isinstance(result, Failure):
                LOG.error("request %d failed: %s", result.row, describe(result.error), exc_info=result.error)
                self._answers.pop(result.row)._chunks.put(_for_client(result.error))
            else:
                answer = self._answers[result.row]
                if result.generation is not None:
                    del self._answers[result.row]
                answer._chunks.put(result)

    def _take_changes(self) -> bool:
        """Let requests join and leave; wait if there is nothing to do. False once the server is closed."""
        with self._changed:
            while not (self._closed or self._joining or self._leaving or self._scheduler.busy):
                self._changed.wait()
            for answer in self._joining:
                self._answers[answer.number] = answer
                self._scheduler.submit(answer._request)
            self._joining.clear()
            for answer in self._leaving:
                if answer.number in self._answers:
                    self._scheduler.cancel(answer._request)
                    del self._answers[answer.number]
                    answer._chunks.put(InputError("the request was cancelled"))
            self._leaving.clear()
            return not self._closed

    def _end_all(self, error: BaseException) -> None:
        """Free all slots, and give the error to all who wait."""
        answers, self._answers = self._answers, {}
        try:
            self._scheduler.close()
        finally:
            for answer in answers.values():
                answer._chunks.put(_for_client(error))

    def _numbers(self) -> str:
        return f"requests {', '.join(map(str, self._answers))}" if self._answers else "no request"


def _for_client(error: BaseException) -> VkvxError:
    """A VkvxError from this one: each client gets its own, since to raise an error changes its traceback."""
    own = copy.copy(error) if isinstance(error, VkvxError) else VkvxError(describe(error))
    own.__cause__ = error if error.__traceback__ else None  # what was never raised tells nothing more
    return own
