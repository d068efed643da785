"""``vkvx serve`` on tiny-llava: throughput and waiting times by clients, memory over many requests, and reuse.

Answers are compared with those of a session without reuse and without company: all of them must be equal. Clients are
threads of this process, on the cores that the server uses, too.

``load``: clients that each ask again when they have their answer, about text or a picture, greedily. ``soak``: requests
of mixed kinds by many clients; some go away in mid-stream, one is killed. The server's memory is read after the first
tenth, when all buffers have been used, and in the end. ``reuse``: two questions about a picture of 576 tokens, and the
time to the first token of each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.lib.http_client import CHAT, COMPLETIONS, Outcome, Served, ask, chat, serving

PARTS = ("load", "soak", "reuse")
QUESTIONS = [f"Read row {number}." for number in range(1, 9)]
TOKENS = 16
CUT = ("--cut-after-pictures",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--part", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64], help="of load")
    parser.add_argument("--seconds", type=float, default=20.0, help="of load, for each number of clients")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--requests", type=int, default=10_000, help="of soak")
    parser.add_argument("--pictures", type=int, default=12, help="of reuse")


def run(arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Rows of the tables."""
    from vkvx import ExportOptions, export_model

    rows = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        bundles = {bits: Path(folder) / str(bits) for bits in (1, 16)}
        for bits, bundle in bundles.items():
            export_model("tiny-llava", bundle, ExportOptions(bits=bits))
        machine = ("--slots", str(arguments.slots), "--no-verify")
        if "load" in arguments.part:
            for row in _load(bundles[1], machine, arguments):
                rows.append(row)
                yield rows
        if "soak" in arguments.part:
            rows.append(_soak(bundles[1], machine, arguments.requests))
            yield rows
        if "reuse" in arguments.part:
            for bits, options in ((1, CUT), (16, ())):
                rows.append(_reuse(bundles[bits], bits, (*machine, *options), arguments.pictures))
                yield rows


def tables(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By part."""
    found = {part: [one for one in rows if one["part"] == part] for part in PARTS}
    return {
        part: [{k: v for k, v in one.items() if k != "part"} for one in some] for part, some in found.items() if some
    }


def _expected(bundle: Path, bodies: Sequence[dict[str, Any]], pictures: Sequence[Any], *, cut: bool) -> list[str]:
    """What a session answers to these chats one by one, greedily."""
    from vkvx import Session

    found = []
    with Session.load(bundle, reuse=False, cut_after_pictures=cut, verify=False) as session:
        for body, picture in zip(bodies, pictures, strict=True):
            content = [{"type": part["type"].removesuffix("_url"), **({"text": part["text"]} if "text" in part else {})}
                       for part in body["messages"][0]["content"]]  # fmt: skip
            prompt = session.format([{"role": "user", "content": content}])
            found.append(session.generate(prompt, picture, temperature=0.0, max_new_tokens=body["max_tokens"]).text)
    return found


def _load(bundle: Path, machine: Sequence[str], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from vkvx.models.tiny_llava.data import page

    pages = [page(seed, "test").image for seed in range(8)]
    kinds = {
        "text": ([chat(question, max_tokens=TOKENS, stream=True) for question in QUESTIONS], [None] * 8),
        "picture": ([chat(QUESTIONS[i], one, max_tokens=TOKENS, stream=True) for i, one in enumerate(pages)], pages),
    }
    expected = {kind: _expected(bundle, *asked, cut=False) for kind, asked in kinds.items()}
    with serving(bundle, machine) as server:
        for kind, clients in itertools.product(kinds, arguments.clients):
            asked = list(zip(kinds[kind][0], expected[kind], strict=True))
            begun = time.perf_counter()
            ends = begun + arguments.seconds
            with ThreadPoolExecutor(clients) as pool:
                working = [pool.submit(_client, server, asked, number, ends) for number in range(clients)]
                done = [outcome for one in working for outcome in one.result()]
            seconds = time.perf_counter() - begun
            whole, first = ([getattr(one, name) * 1000 for one in done] for name in ("whole", "first"))
            yield {
                "part": "load",
                "requests": f"{kind}, {TOKENS} tokens at most",
                "clients": clients,
                "asked": len(done),
                "wrong": 0,
                "requests/s": round(len(done) / seconds, 2),
                "tokens/s": round(sum(one.usage["completion_tokens"] for one in done) / seconds, 1),
                "first token p50 ms": _quantile(first, 50),
                "first token p99 ms": _quantile(first, 99),
                "answer p50 ms": _quantile(whole, 50),
                "answer p99 ms": _quantile(whole, 99),
                "load average": round(os.getloadavg()[0], 1),
            }


def _client(server: Served, asked: Sequence[tuple[dict[str, Any], str]], number: int, ends: float) -> list[Outcome]:
    """Ask one after another until then, and compare each answer with the one expected."""
    connection, found = server.connect(), list[Outcome]()
    while time.perf_counter() < ends or not found:
        body, expected = asked[(number + len(found)) % len(asked)]
        outcome = ask(connection, CHAT, body | {"stream_options": {"include_usage": True}})
        if (outcome.status, outcome.texts) != (200, (expected,)):
            raise RuntimeError(f"{outcome} is not {expected!r}")
        found.append(outcome)
    return found


def _quantile(values: Sequence[float], percent: int) -> float:
    return round(sorted(values)[min(len(values) - 1, len(values) * percent // 100)], 1)


class _Kinds:
    """Requests of all kinds. A request is known by its number, so that answers to equal ones can be compared."""

    def __init__(self, server: Served) -> None:
        from vkvx.models.tiny_llava.data import page

        self._server, self._lock = server, threading.Lock()
        self._picture = page(0, "test").image
        self.answers = dict[str, tuple[str, ...]]()
        self.counts = Counter[str]()
        self.kinds: list[tuple[int, Callable[[Any, int], None]]] = [
            (30, self._text),
            (20, self._sampled),
            (10, self._several),
            (10, self._wrong),
            (10, self._leaves),
            (1, self._with_picture),
        ]

    def one(self, connection: Any, number: int) -> None:
        """Carry out a request. Raises RuntimeError for an answer that is not the one expected."""
        kind = random.Random(number).choices([k for _, k in self.kinds], [weight for weight, _ in self.kinds])[0]
        kind(connection, number)
        with self._lock:
            self.counts[kind.__name__.strip("_")] += 1

    def _same(self, name: str, outcome: Outcome) -> None:
        with self._lock:
            before = self.answers.setdefault(name, outcome.texts)
        if outcome.status != 200 or before != outcome.texts:
            raise RuntimeError(f"{name} got {outcome.texts} with {outcome.status}, before {before}")

    def _text(self, connection: Any, number: int) -> None:
        which = number % 8
        body = chat(QUESTIONS[which], max_tokens=4, stream=number % 2 == 0)
        self._same(f"text {which}", ask(connection, CHAT, body))

    def _sampled(self, connection: Any, number: int) -> None:
        body = chat(QUESTIONS[number % 8], system="Be exact. " * 5, max_tokens=4, temperature=1.0, seed=number % 50)
        self._same(f"sampled {number % 400}", ask(connection, CHAT, body | {"stream": number % 3 == 0}))

    def _several(self, connection: Any, number: int) -> None:
        body = {"model": "tiny-llava", "prompt": ["a b c", "1 2 3"], "n": 2, "temperature": 1.0, "seed": number % 9}
        self._same(f"several {number % 9}", ask(connection, COMPLETIONS, body | {"max_tokens": 3, "logprobs": 0}))

    def _wrong(self, connection: Any, number: int) -> None:
        changes: list[tuple[int, dict[str, Any]]] = [
            (400, {"temperature": "hot"}),
            (404, {"model": "other"}),
            (400, {"max_tokens": 10**6}),
            (400, {"logit_bias": {"1": 1}}),
            (
                400,
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]},
            ),
        ]
        status, change = changes[number % len(changes)]
        outcome = ask(connection, CHAT, chat("?", max_tokens=2) | change)
        if outcome.status != status:
            raise RuntimeError(f"{change} gives {outcome.status}, not {status}")

    def _leaves(self, connection: Any, number: int) -> None:
        own = self._server.connect()
        body = chat("Go on.", max_tokens=200, ignore_eos=True, stream=True)
        own.request("POST", CHAT, json.dumps(body).encode(), {"Content-Type": "application/json"})
        response = own.getresponse()
        response.readline()
        response.close()
        own.close()

    def _with_picture(self, connection: Any, number: int) -> None:
        self._same("picture", ask(connection, CHAT, chat("Read row 1.", self._picture, max_tokens=8)))


def _soak(bundle: Path, machine: Sequence[str], requests: int) -> dict[str, Any]:
    with serving(bundle, machine) as server:
        kinds = _Kinds(server)

        def send(numbers: range, clients: int) -> None:
            left = iter(numbers)
            lock = threading.Lock()

            def client(_: int) -> None:
                connection = server.connect()
                while True:
                    with lock:
                        number = next(left, None)
                    if number is None:
                        return
                    kinds.one(connection, number)

            with ThreadPoolExecutor(clients) as pool:
                list(pool.map(client, range(clients)))

        begun = time.perf_counter()
        send(range(requests // 10), 100)
        warm = server.resident
        _kill_a_client(server)
        send(range(requests // 10, requests), 16)
        seconds, end = time.perf_counter() - begun, server.resident
        while (metrics := server.metrics())["vkvx_rows_live"] + metrics["vkvx_rows_waiting"]:
            time.sleep(0.05)
        return {
            "part": "soak",
            "requests": requests + 1,
            "kinds": ", ".join(f"{count} {name}" for name, count in kinds.counts.most_common()),
            "clients": "100 at once, then 16",
            "wrong": 0,
            "status 500": sum(n for name, n in metrics.items() if 'status="500"' in name),
            "tokens of prompts reused": int(metrics["vkvx_reused_tokens_total"]),
            "cache bytes held in the end": int(metrics["vkvx_cache_used_bytes"]),
            "resident MiB after a tenth": round(warm / 2**20, 1),
            "in the end": round(end / 2**20, 1),
            "growth": round(end / warm - 1, 4),
            "seconds": round(seconds),
            "load average": round(os.getloadavg()[0], 1),
        }


def _kill_a_client(server: Served) -> None:
    """A process that reads a stream is killed; its slot has to become free."""
    body = chat("Go on.", max_tokens=400, ignore_eos=True, stream=True)
    program = (
        "import http.client, sys, time\n"
        f"c = http.client.HTTPConnection('127.0.0.1', {server.port})\n"
        f"c.request('POST', {CHAT!r}, {json.dumps(body)!r}, {{'Content-Type': 'application/json'}})\n"
        "print(c.getresponse().readline(), flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.perf_counter() + 60
    while server.metrics()["vkvx_rows_live"]:
        if time.perf_counter() > end:
            raise RuntimeError("the slot of a client that was killed does not become free")
        time.sleep(0.05)


def _reuse(bundle: Path, bits: int, options: Sequence[str], count: int) -> dict[str, Any]:
    from vkvx.models.tiny_llava.data import page

    pages = [page(seed, "test").image for seed in range(count)]
    bodies = [chat(question, one, max_tokens=8, stream=True) for one in pages for question in QUESTIONS[:2]]
    expected = _expected(bundle, bodies, [one for one in pages for _ in range(2)], cut=bits == 1)
    with serving(bundle, options) as server:
        connection = server.connect()
        ask(connection, CHAT, chat("?", page(count, "test").image, max_tokens=2))  # the first call is slow
        done = [ask(connection, CHAT, body | {"stream_options": {"include_usage": True}}) for body in bodies]
    wrong = sum(one.texts != (text,) for one, text in zip(done, expected, strict=True))
    if wrong:
        raise RuntimeError(f"{wrong} answers of {len(done)} are not those without reuse")
    cached = [one.usage["prompt_tokens_details"]["cached_tokens"] for one in done]
    first, second = (statistics.median(one.first * 1000 for one in done[start::2]) for start in (0, 1))
    return {
        "part": "reuse",
        "bits": bits,
        "pictures": count,
        "tokens of the second prompt": done[1].usage["prompt_tokens"],
        "of them reused": min(cached[1::2]),
        "first token ms, first question": round(first, 1),
        "second question": round(second, 1),
        "ratio": round(second / first, 3),
        "wrong": wrong,
        "load average": round(os.getloadavg()[0], 1),
    }
