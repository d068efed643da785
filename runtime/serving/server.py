"""Serves one session to many threads: requests join and leave its slots between steps (continuous batching)."""

from __future__ import annotations

import atexit
import logging
import math
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from vkvx.errors import (
    BusyError,
    DeadlineError,
    OptionError,
    RequestCancelledError,
    ServerClosedError,
    VkvxError,
    describe,
)
from vkvx.runtime.serving.answer import Answer, ChunkStream
from vkvx.runtime.sessions.generation import Chunk, Failure, Request
from vkvx.runtime.sessions.pictures import Pictures, listed
from vkvx.runtime.sessions.processor import Prepared
from vkvx.runtime.sessions.sampling import GenerationOptions
from vkvx.runtime.sessions.scheduler import Scheduler
from vkvx.runtime.sessions.session import Session
from vkvx.runtime.sessions.videos import Video, listed_videos

LOG = logging.getLogger("vkvx.runtime.serving")
"""Each failure is one record, with the numbers of the requests it ended and the traceback."""
MAX_WAITING = 256


@dataclass(frozen=True)
class ServerStats:
    """What a server does now, and what it has done since it started.

    ``waiting`` requests have no slot yet, ``live`` ones have one of ``slots``. All else only grows: requests that were
    ``submitted``, and of them those that ``finished``, ``failed``, were ``cancelled`` or ``expired`` (their deadlines
    passed); those ``refused`` because too many waited; tokens of prompts and of answers; ``first_tokens`` requests that
    got their first token, after ``first_token_seconds`` in all since they were submitted; ``reused_prompts`` that went
    on from a sequence in a slot, which saved feeding ``reused_tokens``.
    """

    slots: int
    waiting: int = 0
    live: int = 0
    submitted: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    first_tokens: int = 0
    first_token_seconds: float = 0.0
    reused_prompts: int = 0
    reused_tokens: int = 0


@dataclass
class _Running:
    """A request that has not ended, when it was submitted and when it has to have ended, by ``time.perf_counter``."""

    request: Request
    stream: ChunkStream
    submitted: float
    deadline: float
    is_started: bool = False


class Server:
    """A thread that runs the steps of a session for requests from any thread; the session is its own until it closes.

    A request that would not fit an empty slot is refused at once; others wait for a slot, first come, first served, at
    most ``max_waiting`` of them. Prompts take no more than half of the time while answers run. What a request gets does
    not depend on the others: if something of one fails (its pictures, its logits, its text), its answer raises a
    VkvxError from the cause, its slot is free again, and the others go on. If a whole step fails, all requests that run
    or wait get its error, and all slots are free again. If the thread itself fails, they do too, and the server takes
    no more requests. The logger ``vkvx.runtime.serving`` has each failure with its traceback.

    A process that ends closes its servers: after the step that runs.
    """

    def __init__(self, session: Session, *, max_waiting: int = MAX_WAITING) -> None:
        """Raises OptionError for a ``max_waiting`` below 1."""
        if max_waiting < 1:
            raise OptionError(f"max_waiting must be at least 1, got {max_waiting}")
        self._session = session
        self._max_waiting = max_waiting
        self._scheduler = Scheduler(session.backend, session.prefill_chunk)
        self._running: dict[int, _Running] = {}
        self._lock = threading.RLock()
        self._joining: dict[int, _Running] = {}
        # Numbers of requests to cancel; None wakes the thread. To put takes no lock: an answer may be dropped anywhere.
        self._events: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._leaving = set[int]()  # those of them that the thread has read
        self._closed = False
        self._broken: BaseException | None = None  # what ended the thread, if not close()
        self._stats = ServerStats(session.backend.cache.slots)
        self._thread = threading.Thread(target=self._serve, name="vkvx-server", daemon=True)
        self._thread.start()
        # A thread that the interpreter stops inside of a backend's C++ aborts the process.
        atexit.register(self.close)

    def submit(
        self,
        prompt: str | Prepared,
        images: Pictures = None,
        videos: str | Path | Sequence[Video] | None = None,
        *,
        options: GenerationOptions | None = None,
        deadline: float | None = None,
        since: float | None = None,
        **changes: Any,
    ) -> Answer:
        """Queue a prompt, as in :meth:`Session.generate`. Raises InputError, OptionError and CapacityError at once.

        What :meth:`Processor.prepare` made of a prompt and its pictures may stand for them.
        An answer that has not ended ``deadline`` seconds after this is called raises DeadlineError, whether it waits,
        runs, or has its pictures encoded. ``since``, by ``time.perf_counter``, is when the request came, if that was
        earlier: deadline and time to the first token count from there.

        Raises BusyError if too many requests wait, ServerClosedError after :meth:`close`, and VkvxError if the
        server's thread has failed.
        """
        chosen = self._session.options(options, changes)
        return self._queue(prompt, images, videos, [chosen], deadline, since)[0]

    def submit_several(
        self,
        prompt: str | Prepared,
        images: Pictures = None,
        videos: str | Path | Sequence[Video] | None = None,
        *,
        options: Sequence[GenerationOptions],
        deadline: float | None = None,
        since: float | None = None,
    ) -> list[Answer]:
        """Queue a prompt for several answers, one for each of ``options``, whose seeds may differ; as :meth:`submit`.

        The prompt is fed once, for those that find a free slot then; each gets what it gets alone. Limits of pixels and
        frames are to be the same in all.
        """
        if not options or len({(one.limits, one.fps) for one in options}) > 1:
            raise OptionError("options must be at least one, with the same limits of pixels and fps in all")
        if len(options) > self._max_waiting:
            raise OptionError(f"options must be at most {self._max_waiting} (max_waiting), got {len(options)}")
        return self._queue(prompt, images, videos, options, deadline, since)

    def _queue(
        self,
        prompt: str | Prepared,
        images: Pictures,
        videos: str | Path | Sequence[Video] | None,
        options: Sequence[GenerationOptions],
        deadline: float | None,
        since: float | None,
    ) -> list[Answer]:
        session, submitted = self._session, time.perf_counter() if since is None else since
        if deadline is not None and not deadline > 0:
            raise OptionError(f"deadline must be more than 0 seconds, got {deadline}")
        with self._lock:
            self._check_open()
        prepared = prompt
        if not isinstance(prepared, Prepared):
            prepared = session.processor.prepare(
                *(prepared, listed(images), listed_videos(videos)),
                limits=options[0].limits,
                fps=options[0].fps,
                room=session.room,
            )
        with self._lock:
            self._check_open()
            first = self._stats.submitted
            requests = [
                session.request(number, prepared, one, partial(self._check_wanted, number))
                for number, one in enumerate(options, first)
            ]
            leader, *leader.followers = requests
            waiting = self._scheduler.waiting + len(self._joining)
            if waiting + len(requests) > self._max_waiting:
                self._count(refused=len(requests))
                raise BusyError(f"{waiting} requests wait already; try again later (max_waiting={self._max_waiting})")
            self._count(submitted=len(requests), prompt_tokens=len(prepared.token_ids))
            end = math.inf if deadline is None else submitted + deadline
            answers = []
            for request in requests:
                stream = ChunkStream()
                self._joining[request.row] = _Running(request, stream, submitted, end)
                answers.append(Answer(request.row, stream, self._events.put))
        self._events.put(None)
        return answers

    @property
    def failure(self) -> BaseException | None:
        """What ended the thread, if it was not :meth:`close`: no request is answered any more."""
        return self._broken

    @property
    def stats(self) -> ServerStats:
        """Counters, for a page of metrics."""
        with self._lock:
            waiting = self._scheduler.waiting + len(self._joining)
            kept = self._session.kept
            reused = {} if kept is None else {"reused_prompts": kept.hits, "reused_tokens": kept.tokens}
            return replace(self._stats, waiting=waiting, live=self._scheduler.live, **reused)

    def close(self) -> None:
        """End all requests and the thread. The session stays open."""
        with self._lock:
            self._closed = True
        self._events.put(None)
        self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._broken is not None:
            raise VkvxError(f"the server has failed ({describe(self._broken)}); start another one") from self._broken
        if self._closed:
            raise ServerClosedError("the server is closed; start another one")

    def _serve(self) -> None:
        try:
            while self._take_changes():
                if self._scheduler.busy:
                    self._step()
            self._end_all(ServerClosedError("the server was closed before the answer ended"))
        except BaseException as error:  # nothing may end the thread while clients wait for it
            with self._lock:
                self._broken = error
                self._running.update(self._joining)
            LOG.critical("the server has failed, and with it %s: %s", self._numbers(), describe(error), exc_info=error)
            self._end_all(error)

    def _step(self) -> None:
        try:
            results = self._scheduler.step()
        except Exception as error:  # whatever a backend raises belongs to those who wait for it
            LOG.error("a step failed, and with it %s: %s", self._numbers(), describe(error), exc_info=error)
            self._end_all(error)
            return
        with self._lock:
            for result in results:
                if isinstance(result, Failure):
                    self._fail(result)
                else:
                    self._hand_over(result)

    def _hand_over(self, chunk: Chunk) -> None:
        running = self._running[chunk.row]
        self._count(new_tokens=len(chunk.token_ids), finished=int(chunk.generation is not None))
        if not running.is_started:
            running.is_started = True
            self._count(first_tokens=1, first_token_seconds=time.perf_counter() - running.submitted)
        if chunk.generation is not None:
            del self._running[chunk.row]
        running.stream.put(chunk)

    def _fail(self, failure: Failure) -> None:
        error, running = failure.error, self._running.pop(failure.row)
        if isinstance(error, (RequestCancelledError, DeadlineError)):
            self._count_early(error)
        else:
            LOG.error("request %d failed: %s", failure.row, describe(error), exc_info=error)
            self._count(failed=1)
        running.stream.fail(error)

    def _take_changes(self) -> bool:
        """Let requests join and leave; wait if there is nothing to do. False once the server is closed."""
        self._read_events(wait=not self._scheduler.busy and not self._closed)
        with self._lock:
            followers = {one for running in self._joining.values() for one in running.request.followers}
            for number, running in self._joining.items():
                self._running[number] = running
                if running.request not in followers:
                    self._scheduler.submit(running.request)
            self._joining.clear()
            for number in list(self._running):
                if (error := self._unwanted(number)) is not None:
                    running = self._running[number]
                    self._scheduler.cancel(running.request)
                    del self._running[number]
                    self._count_early(error)
                    running.stream.fail(error)
            self._leaving.clear()
            return not self._closed

    def _read_events(self, *, wait: bool) -> None:
        """Note which requests are to be cancelled."""
        while wait or not self._events.empty():
            if (number := self._events.get()) is not None:
                self._leaving.add(number)
            wait = False

    def _unwanted(self, number: int) -> VkvxError | None:
        """Why a request is to end now, if it is."""
        if number in self._leaving:
            return RequestCancelledError("the request was cancelled")
        running, now = self._running[number], time.perf_counter()
        if now < running.deadline:
            return None
        seconds = running.deadline - running.submitted
        return DeadlineError(f"the answer has not ended after {seconds:g} s; raise deadline, or ask when less runs")

    def _check_wanted(self, number: int, *_: object) -> None:
        """Between two calls of the vision tower: raise what ends the request, if it is to end now."""
        self._read_events(wait=False)
        if (error := self._unwanted(number)) is not None:
            raise error

    def _count_early(self, error: VkvxError) -> None:
        expired = isinstance(error, DeadlineError)
        self._count(expired=int(expired), cancelled=int(not expired))

    def _end_all(self, error: BaseException) -> None:
        """Free all slots, and give the error to all who wait."""
        with self._lock:
            ended, self._running = self._running, {}
            self._count(failed=len(ended))
        try:
            self._scheduler.close()
        finally:
            for running in ended.values():
                running.stream.fail(error)

    def _count(self, **more: float) -> None:
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + by for name, by in more.items()})

    def _numbers(self) -> str:
        return f"requests {', '.join(map(str, self._running))}" if self._running else "no request"
