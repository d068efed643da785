"""What /metrics tells, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vkvx.runtime.serving.server import Server
from vkvx.runtime.sessions.session import Session

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_GAP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """Counters of the HTTP side; those of session and server are read when somebody asks."""

    def __init__(self, opened: Callable[[], tuple[Session, Server] | None]) -> None:
        """``opened`` gives session and server, None while they are loading."""
        self._registry = CollectorRegistry()
        self._registry.register(_Opened(opened))
        self.first_token = Histogram(
            "vkvx_time_to_first_token_seconds",
            "From the arrival of a request to the first token of an answer",
            buckets=_FIRST_TOKEN,
            registry=self._registry,
        )
        self.gap = Histogram(
            "vkvx_time_between_tokens_seconds",
            "Between two tokens of an answer",
            buckets=_GAP,
            registry=self._registry,
        )
        self.responses = Counter(
            "vkvx_http_responses", "Responses by path and status", ("path", "status"), registry=self._registry
        )

    def page(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)


class _Opened(Collector):
    def __init__(self, opened: Callable[[], tuple[Session, Server] | None]) -> None:
        self._opened = opened

    def collect(self) -> Iterator[Metric]:
        opened = self._opened()
        if opened is None:
            return
        session, server = opened
        stats, cache = server.stats, session.backend.cache
        used = set(range(cache.slots)) - {*cache.free_slots}
        yield GaugeMetricFamily("vkvx_slots", "Rows that can run at once", stats.slots)
        yield GaugeMetricFamily("vkvx_rows_live", "Requests that run", stats.live)
        yield GaugeMetricFamily("vkvx_rows_waiting", "Requests that wait for a slot", stats.waiting)
        yield GaugeMetricFamily("vkvx_cache_bytes", "Bytes of the cache", cache.allocated_bytes)
        yield GaugeMetricFamily("vkvx_cache_used_bytes", "Bytes that hold tokens", sum(map(cache.bytes_used, used)))
        yield CounterMetricFamily("vkvx_prompt_tokens", "Tokens of prompts", value=stats.prompt_tokens)
        yield CounterMetricFamily("vkvx_new_tokens", "Tokens of answers", value=stats.new_tokens)
        yield CounterMetricFamily(
            "vkvx_reused_prompts", "Prompts that went on from what a slot held", value=stats.reused_prompts
        )
        yield CounterMetricFamily("vkvx_reused_tokens", "Tokens that they did not feed", value=stats.reused_tokens)
        ends = CounterMetricFamily("vkvx_requests", "Requests by how they ended", labels=("end",))
        for end in ("finished", "failed", "cancelled", "expired", "refused"):
            ends.add_metric((end,), getattr(stats, end))
        yield ends
