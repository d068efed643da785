"""Requests that arrive at a server while others run: waiting times for first tokens, gaps between tokens."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.lib.serving import Rows, own_draws
from vkvx.runtime.serving.answer import Answer
from vkvx.runtime.serving.server import Server
from vkvx.runtime.sessions.session import Session


@dataclass
class Timed:
    """A request: when it was submitted, and when each of its tokens was there, in seconds."""

    answer: Answer
    submitted: float
    times: list[float] = field(default_factory=list)

    @classmethod
    def submit(cls, server: Server, prompt: int, **options: Any) -> Timed:
        """Submit a prompt; the server's own thread notes the times, so that no reader takes time from it."""
        begun = time.perf_counter()
        timed = cls(server.submit(str(prompt), **own_draws(prompt, options)), begun)
        timed.answer._stream.listen(lambda: timed.times.append(time.perf_counter()))
        return timed

    def gaps(self, since: float = 0.0, until: float = float("inf")) -> np.ndarray:
        """Seconds between its tokens, of those that came within a span of time."""
        return np.diff([at for at in self.times if since <= at <= until])


def warm_up(session: Session, rows: int) -> float:
    """Let the session meet every number of rows that may run together; the seconds that takes."""
    begun = time.perf_counter()
    filled = Rows(session, rows)
    for count in range(1, rows + 1):
        filled.steps(count, 2)
    filled.close()
    return time.perf_counter() - begun


def poisson(session: Session, rate: float, seconds: float, answer: int, seed: int = 0) -> dict[str, Any]:
    """Requests at random times, ``rate`` a second on average, for so many seconds; all are answered in the end."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, int(rate * seconds * 2) + 8))
    arrivals = arrivals[arrivals < seconds]
    with Server(session) as server:
        begun = time.perf_counter()
        requests = []
        for number, at in enumerate(arrivals):
            time.sleep(max(0.0, begun + at - time.perf_counter()))
            requests.append(Timed.submit(server, number, max_new_tokens=answer))
        for request in requests:
            request.answer.result()
        ended = time.perf_counter()
    _check(requests, answer)
    firsts = [request.times[0] - request.submitted for request in requests]
    gaps = np.concatenate([request.gaps() for request in requests])
    return {
        "rate": rate,
        "requests": len(requests),
        "tokens/s": round(len(requests) * answer / (ended - begun)),
        **_percentiles("first token ms", firsts),
        **_percentiles("gap ms", gaps),
    }


def interference(session: Session, live: int, prompts: int, every: float) -> dict[str, Any]:
    """Gaps of ``live`` rows that decode, without other requests, and while ``prompts`` arrive ``every`` seconds."""
    with Server(session) as server:
        rows = [Timed.submit(server, row, max_new_tokens=_longest(session)) for row in range(live)]
        _until(lambda: all(row.times for row in rows))
        quiet = time.perf_counter() + 0.2
        time.sleep(0.2 + every)
        begun = time.perf_counter()
        arriving = []
        for number in range(prompts):
            time.sleep(max(0.0, begun + number * every - time.perf_counter()))
            arriving.append(Timed.submit(server, live + number, max_new_tokens=8))
        for request in arriving:
            request.answer.result()
        ended = time.perf_counter()
        lasted = all(row.times[-1] > ended - every for row in rows)
        for row in rows:
            row.answer.cancel()
    if not lasted:
        raise SystemExit(f"live rows ended before the prompts did: give them more room than {_longest(session)} tokens")
    undisturbed = np.concatenate([row.gaps(quiet, begun) for row in rows])
    disturbed = np.concatenate([row.gaps(begun, ended) for row in rows])
    median = float(np.median(undisturbed))
    return {
        "live rows": live,
        "prompts": prompts,
        "step ms": round(1000 * median, 2),
        **_percentiles("gap ms", disturbed),
        "p99 over step": round(float(np.percentile(disturbed, 99)) / median, 2),
        **_percentiles("first token ms", [one.times[0] - one.submitted for one in arriving]),
    }


def _longest(session: Session) -> int:
    """The longest answer that a slot has room for behind the prompt."""
    load = session.processor.workload  # type: ignore[attr-defined]
    cache = session.backend.cache
    return int(cache.text_capacity) - (load.text if cache.layout.is_packed else load.prompt)


def _until(condition: Any) -> None:
    while not condition():
        time.sleep(0.005)


def _check(requests: Iterable[Timed], tokens: int) -> None:
    for request in requests:
        if len(request.times) != tokens:
            raise SystemExit(f"{len(request.times)} times of {tokens} tokens were noted")


def _percentiles(name: str, seconds: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median, 99th percentile and maximum in milliseconds."""
    found = 1000 * np.percentile(np.asarray(seconds), [50, 99, 100])
    return {f"{name} {part}": round(float(value), 2) for part, value in zip(("p50", "p99", "max"), found, strict=True)}
