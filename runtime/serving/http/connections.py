"""Connections that do not wait for ever for clients that send the heads of requests slowly, or read nothing."""

from __future__ import annotations

import asyncio
import socket

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0
"""For the head of a request to come, from its first byte, or from the start of the connection."""
SILENT_SECONDS = 60
"""After which a client that says nothing is asked whether it is there, and one that takes nothing is given up."""


def watch(listener: socket.socket) -> None:
    """Let the system look after the connections of a listening socket, which inherit these options."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", SILENT_SECONDS), ("TCP_USER_TIMEOUT", 1000 * SILENT_SECONDS)):
        if hasattr(socket, option):  # of Linux
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


class Connection(H11Protocol):
    """A connection that is closed if the head of a request does not come in time. uvicorn limits what comes after."""

    _overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait."""
        super().connection_made(transport)
        self._overdue = self.loop.call_later(HEAD_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        """A part of a head, or of a body."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._overdue is None and not self.transport.is_closing():
            self._overdue = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _stop_waiting(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None
