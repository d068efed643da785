"""Runs the HTTP server in this thread: loads the bundle beside it, and stops it without breaking off answers."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import replace

import uvicorn

from vkvx.errors import OptionError
from vkvx.runtime.serving.http.app import Service, Settings
from vkvx.runtime.serving.http.connections import Connection, watch
from vkvx.runtime.sessions.session import Session

GRACE_SECONDS = 30.0
"""For answers that run when the server is to stop."""
_KEEP_ALIVE_SECONDS = 75
"""For a connection without a request: longer than proxies keep theirs, which may send into one that is being closed."""
_LONGEST_GRACE = 86400
_BACKLOG = 1024


def serve(
    load: Callable[[], Session],
    settings: Settings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    grace: float = GRACE_SECONDS,
    listening: Callable[[str], None] = lambda address: None,
    ready: Callable[[Session], None] = lambda session: None,
) -> None:
    """Serve what ``load`` opens until SIGINT or SIGTERM; it is closed then.

    The server listens at once, and answers 503 until the bundle is open. ``listening`` is called with the server's
    address, ``ready`` with the session, in another thread. ``port`` 0 takes a free one.

    Raises OptionError where it cannot listen, and what ``load`` raises.
    """
    if not 0 <= grace <= _LONGEST_GRACE:
        raise OptionError(f"--grace must be 0 to {_LONGEST_GRACE} seconds, got {grace:g}")
    with bind(host, port) as listener:
        is_local = is_loopback(listener.getsockname()[0])
        service = Service(replace(settings, own_hosts_only=is_local and settings.api_key is None))
        config = uvicorn.Config(
            service.app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=round(grace),
        )
        log = logging.getLogger("uvicorn.error")
        log.setLevel(logging.WARNING)
        log.addFilter(_is_no_end)
        server = uvicorn.Server(config)
        listening(address_of(listener))
        loader = _Loader(load, service, server, ready)
        loader.start()
        try:
            with contextlib.suppress(KeyboardInterrupt):  # uvicorn gives back the signal that it has obeyed
                asyncio.run(server.serve(sockets=[listener]))
        finally:
            loader.join()  # a model that is being loaded cannot be broken off
            service.close()
            if loader.session is not None:
                loader.session.close()
        if loader.error is not None:
            raise loader.error


def _is_no_end(record: logging.LogRecord) -> bool:
    """Answers that are broken off when the server has to stop are no defect."""
    return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)


class _Loader(threading.Thread):
    """Opens the session. If that fails, the server stops."""

    def __init__(
        self, load: Callable[[], Session], service: Service, server: uvicorn.Server, ready: Callable[[Session], None]
    ) -> None:
        super().__init__(name="vkvx-load")
        self._load, self._service, self._server, self._ready = load, service, server, ready
        self.session: Session | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.session = self._load()
            self._service.open(self.session)
            self._ready(self.session)
        except BaseException as error:  # raised again by the thread that waits
            self.error = error
            self._server.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises OptionError."""
    if not 0 <= port < 1 << 16:
        raise OptionError(f"--port must be 0 to 65535, got {port}")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
        # Connections inherit it; asyncio sets it for sockets of its own only. Else a first token waits 40 ms for an
        # acknowledgement of the headers.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        watch(listener)
        return listener
    except OSError as error:
        reason = error.strerror or str(error)
        raise OptionError(f"cannot listen on {host}:{port} ({reason}); give another --port or --host") from error


def is_loopback(address: str) -> bool:
    """Whether an IP address is this machine's own."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def address_of(listener: socket.socket) -> str:
    """Where a client on this machine finds the server."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
