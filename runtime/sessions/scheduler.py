"""The loop that turns prepared prompts into tokens: admit, prefill, decode, leave.

Where a backend chooses tokens itself, one call is under way while the host reads the tokens of the one before. So an
end-of-sequence token or a stop string is noticed when its row has been fed once more: what comes of that is dropped.

Prompts that are fed in pieces take one call a piece; between them rows that have their prompts go on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import numpy as np

from vkvx.errors import BatchError
from vkvx.runtime.backends.base import Backend, SamplingBackend, check_open
from vkvx.runtime.calls import build_call
from vkvx.runtime.sessions.generation import Chunk, Failure, Generation, Request
from vkvx.runtime.sessions.sampling import Choice

_PREFILL_POSITIONS = 4096
"""Prompts run together while rows times the longest, or its next piece, stay below this, and below the limit of a
piece if there is one: it bounds the memory of a prefill."""


@dataclass
class _Flight:
    """A call that was launched; ``tokens`` gives what was chosen for each of its requests, or waits for it: None for
    those whose prompts go on."""

    requests: list[Request]
    tokens: Callable[[], Sequence[Choice | Exception | None]]
    is_prefill: bool
    started: float


class Scheduler:
    """Requests over the slots of one backend. They join and leave between steps, so a batch is never waited for.

    Prompts do not starve answers: after a prefill, or a piece of one, rows that were running before get as much time as
    it took. ``prefill_chunk`` is the limit of a piece that the requests were given.
    """

    def __init__(self, backend: Backend, prefill_chunk: int | None = None) -> None:
        self._backend = backend
        self._positions = min(_PREFILL_POSITIONS, prefill_chunk or _PREFILL_POSITIONS)
        self._waiting = deque[Request]()
        self._live = list[Request]()
        self._flight: _Flight | None = None
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
        return len(self._waiting)

    @property
    def live(self) -> int:
        """Requests that run."""
        return len(self._live)

    def submit(self, request: Request) -> None:
        """Queue a request that was checked; it starts as soon as a slot is free."""
        self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """End a request before its end, if it has not ended."""
        if request in self._waiting:
            self._waiting.remove(request)
        elif request in self._live:
            self._leave(request)

    def step(self) -> list[Chunk | Failure]:
        """Start what may start, launch one call, and return what the call before it added.

        Where the backend does not choose tokens itself, or cannot for a request, that is the same call. Rows that
        finished or failed have left by then. A row fails alone, and the others go on. What is raised is an error of the
        whole call, or InputError if the backend was closed.
        """
        check_open(self._backend)
        results = list[Chunk | Failure]()
        self._skip_idle_time()
        next_ones = islice(self._waiting, len(self._backend.cache.free_slots) + 1)
        ahead = self._backend.samples and not any(one.needs_host for one in (*self._live, *next_ones))
        if not ahead:
            self._collect(results)
        launched = self._launch(results, ahead)
        if ahead:
            self._collect(results)
        self._flight = launched
        if not ahead:
            self._collect(results)
        if not self._live:
            self._flight = None  # what is under way belongs to nobody
        self._left = time.perf_counter()
        return results

    def close(self) -> None:
        """End all requests."""
        self._waiting.clear()
        self._flight, self._owed = None, 0.0
        while self._live:
            self._live.pop().leave()

    def _skip_idle_time(self) -> None:
        """Between steps others have the thread: what they take is no time of the call that is under way."""
        if self._flight is not None:
            idle = time.perf_counter() - self._left
            self._flight.started += idle
            self._last_result += idle

    def _launch(self, results: list[Chunk | Failure], ahead: bool) -> _Flight | None:
        started = time.perf_counter()
        is_decoding = self._is_decoding
        starting = self._start()
        if starting:  # the host waits for vision towers and prompts; tokens of others come before
            self._collect(results)
            started = time.perf_counter()
        embeds = list[Any]()
        for request in list(starting):
            try:
                embeds += request.encode()
            except Exception as error:
                starting.remove(request)
                results.append(self._fail(request, error))
        requests = starting or [one for one in self._live if one.wants_more and not one.is_prefilling]
        if not requests:
            return None
        tokens = _launch(self._backend, requests, embeds, ahead)
        return _Flight(requests, tokens, is_prefill=bool(starting) and is_decoding, started=started)

    def _start(self) -> list[Request]:
        """Requests whose prompts, or next pieces, run next."""
        live, waiting = self._live, self._waiting
        is_paid = self._owed <= 0 and not (self._flight is not None and self._flight.is_prefill)
        if self._is_decoding and not is_paid:
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
    def _is_decoding(self) -> bool:
        return not all(request.is_prefilling for request in self._live)

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

    def _collect(self, results: list[Chunk | Failure]) -> None:
        """Read the tokens of the call that is under way, if one is, for the requests that are still there."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        choices = flight.tokens()
        now = time.perf_counter()
        seconds = now - max(flight.started, self._last_result)
        self._last_result = now
        self._owed = seconds if flight.is_prefill else max(0.0, self._owed - seconds)
        for request, choice in zip(flight.requests, choices, strict=True):
            if request not in self._live:
                continue
            if choice is None:
                request.note_piece(seconds)
                continue
            try:
                results.append(request.accept(choice, seconds))
            except Exception as error:
                results.append(self._fail(request, error))
            else:
                if request.finish_reason:
                    self._leave(request)

    def _fail(self, request: Request, error: Exception) -> Failure:
        self._leave(request)
        return Failure(request.row, error)

    def _leave(self, request: Request) -> None:
        self._live.remove(request)
        request.leave()
        if not self._live:
            self._flight, self._owed = None, 0.0  # what is under way belongs to nobody


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
    backend: Backend, requests: Sequence[Request], embeds: Sequence[Any], ahead: bool
) -> Callable[[], Sequence[Choice | Exception | None]]:
    """Run a call; what is returned gives the tokens, which may not be chosen yet: None where a prompt goes on."""
    manifest = backend.manifest
    rows = [request.next_row() for request in requests]
    size, image_token = manifest.quantization.group_size, manifest.model.image_token_id
    call = build_call(rows, group_size=size, image_token_id=image_token)
    placed = backend.place(call, embeds) if embeds else None
    ends = [not request.is_prefilling for request in requests]
    if not ahead:
        logits = backend.step(call, placed)
        return lambda: [
            _choose(request, row) if end else None for request, row, end in zip(requests, logits, ends, strict=True)
        ]
    choices = [request.prepare_choice() for request in requests]
    pending = cast(SamplingBackend, backend).launch(call, placed, choices)

    def tokens() -> list[Choice | Exception | None]:
        found, logprobs = pending.result()
        return [
            Choice(int(token), float(logprob) if request.options.logprobs else None) if end else None
            for request, token, logprob, end in zip(requests, found, logprobs, ends, strict=True)
        ]

    return tokens


def _choose(request: Request, logits: np.ndarray) -> Choice | Exception:
    try:
        return request.choose(logits)
    except Exception as error:
        return error
