"""The loop that turns prepared prompts into tokens: admit, prefill, decode, leave.

Where a backend chooses tokens itself, one call is under way while the host reads the tokens of the one before. So an
end-of-sequence token or a stop string is noticed when its row has been fed once more: what comes of that is dropped.

Prompts that are fed in pieces take one call a piece; between them rows that have their prompts go on. So they do
between the parts of a vision tower, or of a call, that a backend launches one by one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

import numpy as np

from vkvx.errors import BatchError
from vkvx.runtime.backends.base import Backend, CallInParts, DividedTower, SamplingBackend, check_open
from vkvx.runtime.calls import build_call
from vkvx.runtime.sessions.generation import Chunk, Failure, Generation, Request
from vkvx.runtime.sessions.sampling import Choice

_PREFILL_POSITIONS = 4096
"""Prompts run together while rows times the longest, or its next piece, stay below this, and below the limit of a
piece if there is one: it bounds the memory of a prefill."""


@dataclass
class _Flight:
    """A call that was launched; ``tokens`` gives what was chosen for each of its requests, or waits for it: None for
    those whose prompts go on. ``parts`` were launched first, if it has any."""

    requests: list[Request]
    tokens: Callable[[], Sequence[Choice | Exception | None]]
    is_prefill: bool
    started: float
    parts: CallInParts | None = None


@dataclass
class _Prompts:
    """Prompts, or pieces of some, that are launched part by part, each by an item of ``parts``: their pictures, then
    the call, which is ``flight`` from its first part on. ``since`` is when the last part began; ``failed`` are requests
    whose pictures did, no longer among ``requests``."""

    requests: list[Request]
    started: float
    since: float
    parts: Generator[None, None, None] = field(init=False)
    flight: _Flight | None = None
    failed: list[tuple[Request, Exception]] = field(default_factory=list)


class Scheduler:
    """Requests over the slots of one backend. They join and leave between steps, so a batch is never waited for.

    Prompts do not starve answers: after a prefill, or a piece of one, rows that were running before get as much time as
    it took; a vision tower or a prefill that a backend launches in parts has a step of theirs after each part, or, if
    the host itself runs the part, as many as take that long. ``prefill_chunk`` is the limit of a piece that the
    requests were given.
    """

    def __init__(self, backend: Backend, prefill_chunk: int | None = None) -> None:
        self._backend = backend
        self._positions = min(_PREFILL_POSITIONS, prefill_chunk or _PREFILL_POSITIONS)
        self._waiting = deque[Request]()
        self._live = list[Request]()
        self._following = 0  # followers that have neither a slot nor a place among those who wait
        self._flights = deque[_Flight]()  # launched, tokens not read
        self._prompts: _Prompts | None = None  # parts of it are still to be launched
        self._results = list[Chunk | Failure]()  # of the step that runs
        self._ahead = False  # whether tokens of a call may be read after the next is launched
        self._last_result = 0.0  # when the tokens of a call were read last
        self._left = 0.0  # when the last step ended
        self._owed = 0.0  # seconds of decoding, before the next prefill

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._waiting or self._live)

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting) + self._following

    @property
    def live(self) -> int:
        """Requests that run."""
        return len(self._live)

    def submit(self, request: Request) -> None:
        """Queue a request that was checked, with its followers; it starts as soon as a slot is free."""
        self._waiting.append(request)
        self._following += len(request.followers)

    def cancel(self, request: Request) -> None:
        """End a request before its end, if it has not ended."""
        if request in self._waiting:
            self._lead(request, self._waiting.index(request) + 1)
            self._waiting.remove(request)
        elif request in self._live:
            self._leave(request, keep=True)
        else:
            for leader in (*self._waiting, *self._live):
                if request in leader.followers:
                    leader.followers.remove(request)
                    self._following -= 1

    def step(self) -> list[Chunk | Failure]:
        """Start what may start, launch one call, and return what the call before it added.

        Where the backend does not choose tokens itself, or cannot for a request, that is the same call. Rows that
        finished or failed have left by then. A row fails alone, and the others go on. What is raised is an error of the
        whole call, or InputError if the backend was closed.
        """
        check_open(self._backend)
        results = self._results = []
        self._skip_idle_time()
        next_ones = islice(self._waiting, len(self._backend.cache.free_slots) + 1)
        self._ahead = self._backend.samples and not any(one.needs_host for one in (*self._live, *next_ones))
        if not self._ahead:
            if self._prompts is not None and self._prompts.flight is not None:
                self._advance(to_its_end=True)
            self._collect(results)
        # What a step before the last part of a call gave is not held back until that part is done.
        launched = len(self._flights) < 2 and self._launch()
        self._collect(results, but=max(int(launched), len(self._flights) - 1) if self._ahead else 0)
        self._left = time.perf_counter()
        return results

    def close(self) -> None:
        """End all requests."""
        self._waiting.clear()
        self._following = 0
        self._forget()
        while self._live:
            self._live.pop().leave()

    def _forget(self) -> None:
        """What is under way belongs to nobody."""
        self._flights.clear()
        self._owed = 0.0
        self._drop_prompts()

    def _drop_prompts(self) -> None:
        """Free what parts hold. Pictures that are encoded stay so, and other requests among them start anew."""
        prompts, self._prompts = self._prompts, None
        if prompts is not None:
            prompts.parts.close()

    def _skip_idle_time(self) -> None:
        """Between steps others have the thread: what they take is no time of the calls that are under way."""
        idle = time.perf_counter() - self._left
        flights, prompts = list(self._flights), self._prompts
        self._last_result += idle if flights else 0.0
        if prompts is not None:
            prompts.started += idle
            flights += [] if prompts.flight is None else [prompts.flight]
        for flight in flights:
            flight.started += idle

    def _launch(self) -> bool:
        """Launch what runs next, a prompt or a part of one, or a step, or both; whether a call was launched whole."""
        started = time.perf_counter()
        if self._prompts is None and (starting := self._start()):
            self._prompts = _Prompts(starting, started, started)
            self._prompts.parts = self._parts(self._prompts)
        launched = self._advance()
        if launched and self._flights[-1].parts is None:
            return True
        decoding = self._decoding
        if decoding:
            started = time.perf_counter()
            flight = _launch(self._backend, decoding, [], self._ahead, is_prefill=False, started=started)
            self._flights.append(flight)
        return launched or bool(decoding)

    def _parts(self, prompts: _Prompts) -> Generator[None, None, None]:
        """Launch prompts; yields where a step may be launched."""
        requests, embeds = prompts.requests, list[Any]()
        in_parts = bool(self._decoding) and isinstance(self._backend, DividedTower)
        if not in_parts:  # the host waits for the tower; tokens of others come before
            self._collect(self._results)
            prompts.since = time.perf_counter()
        for request in list(requests):
            try:
                embeds += yield from request.encode(in_parts=in_parts)
            except Exception as error:
                requests.remove(request)
                prompts.failed.append((request, error))
        if not requests:
            return
        if in_parts:  # and now for the call
            self._collect(self._results)
            for request in requests:
                request.note_piece(prompts.since - prompts.started)
            prompts.since = time.perf_counter()
        is_prefill = bool(self._decoding)
        flight = _launch(self._backend, requests, embeds, self._ahead, is_prefill=is_prefill, started=prompts.since)
        prompts.flight = flight
        while flight.parts is not None and flight.parts.advance():
            yield
        self._flights.append(flight)

    def _advance(self, to_its_end: bool = False) -> bool:
        """Launch the next part of prompts, if there are any, or all if no row waits; whether the last was."""
        while (prompts := self._prompts) is not None:
            is_waited_for = bool(self._decoding) and not to_its_end
            if is_waited_for and prompts.flight is None and self._owed > 0:
                return False
            begun = prompts.since = time.perf_counter()
            is_done = next(prompts.parts, True)
            if is_waited_for and prompts.flight is None and not self._ahead:
                self._owed += time.perf_counter() - begun
            if is_done:
                self._prompts = None
            self._results += [self._fail(*one) for one in prompts.failed]
            prompts.failed.clear()
            if is_done:
                return prompts.flight is not None
            if is_waited_for:
                return False
        return False

    def _start(self) -> list[Request]:
        """Requests whose prompts, or next pieces, run next."""
        live, waiting = self._live, self._waiting
        is_paid = self._owed <= 0 and not any(flight.is_prefill for flight in self._flights)
        if self._prompts is not None or (self._decoding and not is_paid):
            return []
        starting = list[Request]()
        for request in [one for one in live if one.is_prefilling]:
            if self._fits(request, starting):
                starting.append(request)
        while waiting and self._may_start(waiting[0], starting):
            starting.append(waiting.popleft())
            live.append(starting[-1])
            starting[-1].admit()
        return starting

    @property
    def _decoding(self) -> list[Request]:
        """Requests that a step is to be launched for."""
        busy = () if self._prompts is None else self._prompts.requests
        return [one for one in self._live if one.wants_more and not one.is_prefilling and one not in busy]

    def _may_start(self, request: Request, starting: Sequence[Request]) -> bool:
        if not starting and not self._live:
            return True  # if there is no slot, acquiring one says so
        if request.owns_slot and not self._backend.cache.free_slots:
            return False
        return self._fits(request, starting)

    def _fits(self, request: Request, starting: Sequence[Request]) -> bool:
        """Whether the prompt of a request runs in one call with those of others."""
        limits = self._backend.limits
        if limits is not None and len(starting) >= limits.batch_size:
            return False
        longest = max(one.next_length for one in (request, *starting))
        return not starting or longest * (len(starting) + 1) <= self._positions

    def _collect(self, results: list[Chunk | Failure], but: int = 0) -> None:
        """Read the tokens of the calls that are under way, ``but`` the last ones, for requests that are still there."""
        while len(self._flights) > but:
            self._read(self._flights.popleft(), results)

    def _read(self, flight: _Flight, results: list[Chunk | Failure]) -> None:
        choices = flight.tokens()
        now = time.perf_counter()
        seconds = now - max(flight.started, self._last_result)
        self._last_result = now
        if flight.parts is None:
            self._owed = seconds if flight.is_prefill else max(0.0, self._owed - seconds)
        else:  # steps came between
            seconds = now - flight.started
        live = set(self._live)
        for request, choice in zip(flight.requests, choices, strict=True):
            if request not in live:
                continue
            if choice is None:
                request.note_piece(seconds)
                continue
            if request.followers:
                self._fork(request, results, seconds)
            self._accept(request, choice, seconds, results)

    def _accept(
        self, request: Request, choice: Choice | Exception, seconds: float, results: list[Chunk | Failure]
    ) -> None:
        try:
            results.append(request.accept(choice, seconds))
        except Exception as error:
            results.append(self._fail(request, error))
        else:
            if request.finish_reason:
                self._leave(request, keep=True)

    def _fork(self, leader: Request, results: list[Chunk | Failure], seconds: float) -> None:
        """Let followers take slots as ``leader`` has its prompt in one; those that find none wait as others do."""
        starting = leader.followers[: len(self._backend.cache.free_slots)]
        del leader.followers[: len(starting)]
        self._following -= len(starting)
        for follower in starting:
            follower.follow(leader)
            self._live.append(follower)
        self._lead(leader, 0)
        for follower in starting:
            try:
                choice: Choice | Exception = follower.choose_first()
            except Exception as error:
                choice = error
            self._accept(follower, choice, seconds, results)

    def _lead(self, leader: Request, place: int) -> None:
        """Let the first follower of a request lead the others, at this place among those who wait."""
        if leader.followers:
            first, *others = leader.followers
            leader.followers, first.followers = [], others
            self._waiting.insert(place, first)
            self._following -= 1

    def _fail(self, request: Request, error: Exception) -> Failure:
        self._leave(request, keep=False)
        return Failure(request.row, error)

    def _leave(self, request: Request, *, keep: bool) -> None:
        self._live.remove(request)
        self._lead(request, 0)
        request.leave(keep=keep)
        if self._prompts is not None and request in self._prompts.requests:
            self._drop_prompts()
        if not self._live:
            self._forget()


def run(
    backend: Backend, requests: Sequence[Request], prefill_chunk: int | None = None
) -> Generator[Chunk, None, None]:
    """Run requests to their ends, as many at a time as there are slots, and yield what each step adds.

    The row of a request is its index. A finished row leaves, and the next request takes its slot while the others go
    on. Closing the iterator ends all rows. The error of a request that is alone is raised as it is; among several, the
    others go on to their ends first, and a BatchError with their answers is raised then.
    """
    scheduler = Scheduler(backend, prefill_chunk)
    for request in requests:
        scheduler.submit(request)
    errors: dict[int, Exception] = {}
    generations: list[Generation | None] = [None] * len(requests)
    try:
        while scheduler.busy:
            for result in scheduler.step():
                if isinstance(result, Failure):
                    errors[result.row] = result.error
                else:
                    generations[result.row] = result.generation
                    yield result
    finally:
        scheduler.close()
    if errors and len(requests) == 1:
        raise errors[0]
    if errors:
        raise BatchError(errors, generations) from errors[min(errors)]


def _launch(
    backend: Backend,
    requests: Sequence[Request],
    embeds: Sequence[Any],
    ahead: bool,
    *,
    is_prefill: bool,
    started: float,
) -> _Flight:
    """Run a call, whose tokens may not be chosen yet, or prepare it if the backend launches it in parts."""
    manifest = backend.manifest
    rows = [request.next_row() for request in requests]
    size, image_token = manifest.quantization.group_size, manifest.model.image_token_id
    call = build_call(rows, group_size=size, image_token_id=image_token)
    placed = backend.place(call, embeds) if embeds else None
    ends = [not request.is_prefilling for request in requests]
    if not ahead:
        logits = backend.step(call, placed)
        chosen = [
            _choose(request, row) if end else None for request, row, end in zip(requests, logits, ends, strict=True)
        ]
        return _Flight(list(requests), lambda: chosen, is_prefill, started)
    choices = [request.prepare_choice() for request in requests]
    pending = cast(SamplingBackend, backend).launch(call, placed, choices)

    def tokens() -> list[Choice | Exception | None]:
        found, logprobs = pending.result()
        return [
            Choice(int(token), float(logprob) if request.options.logprobs else None) if end else None
            for request, token, logprob, end in zip(requests, found, logprobs, ends, strict=True)
        ]

    parts = pending if isinstance(pending, CallInParts) else None
    return _Flight(list(requests), tokens, is_prefill, started, parts)


def _choose(request: Request, logits: np.ndarray) -> Choice | Exception:
    try:
        return request.choose(logits)
    except Exception as error:
        return error
