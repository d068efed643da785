"""A server on a free port of this machine, in a thread, and requests to it without a client library."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from vkvx.runtime.serving.http.app import Service, Settings
from vkvx.runtime.serving.http.connections import Connection
from vkvx.runtime.serving.http.run import address_of, bind
from vkvx.runtime.sessions.session import Session


class Running:
    """A server that listens; ``url`` is its address."""

    def __init__(self, service: Service, url: str, port: int) -> None:
        self.service, self.url, self.port = service, url, port

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        """Status, body and headers of an answer. A body that is no bytes goes as JSON, and so come answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            found = response.read()
            is_json = response.headers.get("Content-Type", "").startswith("application/json")
            return response.status, json.loads(found) if is_json else found.decode(), response.headers
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """A line of /metrics."""
        _, text, _ = self.request("GET", "/metrics")
        return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).rpartition(" ")[2])


@contextmanager
def running(session: Session | None, settings: Settings | None = None) -> Iterator[Running]:
    """Serve a session, which stays open; None: as while a bundle is loading."""
    service = Service(settings or Settings())
    if session is not None:
        service.open(session)
    with bind("127.0.0.1", 0) as listener:
        config = uvicorn.Config(
            service.app, http=Connection, ws="none", lifespan="off", log_config=None, timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            yield Running(service, address_of(listener), listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(30)
            service.close()
            assert not thread.is_alive()
