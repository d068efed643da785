"""A server of ``vkvx serve`` in a process of its own, and a client that notes when tokens come."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True)
class Outcome:
    """Of one request: its status, the texts of its answers, seconds to the first token and to the end, and usage."""

    status: int
    texts: tuple[str, ...]
    first: float
    whole: float
    usage: dict[str, Any]


class Served:
    """A server that is ready."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port

    def connect(self) -> http.client.HTTPConnection:
        """A connection, for one client."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)

    @property
    def resident(self) -> int:
        """Bytes of main memory that the process holds."""
        text = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        (found,) = re.findall(r"^VmRSS:\s+(\d+) kB", text, re.MULTILINE)
        return int(found) << 10

    def metrics(self) -> dict[str, float]:
        """Lines of /metrics by name and labels."""
        connection = self.connect()
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}


@contextmanager
def serving(bundle: Path, options: Sequence[str] = ()) -> Iterator[Served]:
    """Serve a bundle on a free port."""
    command = [sys.executable, "-m", "vkvx", "serve", str(bundle), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        match = re.match(r"listens at http://127\.0\.0\.1:(\d+)", line := process.stderr.readline())
        if match is None or " is ready " not in (line := process.stderr.readline()):
            raise RuntimeError(f"the server does not start: {line}")
        yield Served(process, int(match[1]))
    finally:
        process.terminate()
        process.wait(600)


def chat(text: str, picture: Any = None, system: str | None = None, **options: Any) -> dict[str, Any]:
    """A body for :data:`CHAT`, with a picture (PIL) before the text if one is given."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if picture is not None:
        file = io.BytesIO()
        picture.save(file, "PNG")
        address = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": address}})
    before = [] if system is None else [{"role": "system", "content": system}]
    return {"model": "tiny-llava", "messages": [*before, {"role": "user", "content": content}], **options}


def ask(connection: http.client.HTTPConnection, path: str, body: dict[str, Any]) -> Outcome:
    """Send a request and read its answer, which may be a stream; without one the first token comes with the last."""
    begun = time.perf_counter()
    connection.request("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if not response.headers["Content-Type"].startswith("text/event-stream"):
        found = json.loads(response.read())
        seconds = time.perf_counter() - begun
        texts = tuple(one["message"]["content"] if path == CHAT else one["text"] for one in found.get("choices", ()))
        return Outcome(response.status, texts, seconds, seconds, found.get("usage") or {})
    texts, first, usage = dict[int, str](), 0.0, dict[str, Any]()
    while line := response.readline():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise RuntimeError(f"a stream ends with {event['error']['message']}")
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
            first = first or (time.perf_counter() - begun if piece else 0.0)
            texts[choice["index"]] = texts.get(choice["index"], "") + piece
    whole = time.perf_counter() - begun
    return Outcome(response.status, tuple(texts[i] for i in sorted(texts)), first or whole, whole, usage)
