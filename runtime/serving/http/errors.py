"""Errors in OpenAI's form: which status and code an error of the package has."""

from __future__ import annotations

import logging
from typing import Any

from vkvx.errors import (
    BusyError,
    CapacityError,
    DeadlineError,
    InputError,
    OptionError,
    RequestCancelledError,
    ServerClosedError,
    VkvxError,
    describe,
)

LOG = logging.getLogger("vkvx.runtime.serving")


class RequestError(VkvxError):
    """A request that is refused, with the HTTP status, and with the field that is wrong if it is one."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


_STATUS: dict[type[VkvxError], tuple[int, str | None]] = {
    BusyError: (429, "queue_full"),
    DeadlineError: (504, "deadline"),
    ServerClosedError: (503, "stopping"),
    RequestCancelledError: (499, "cancelled"),
    CapacityError: (400, "context_length_exceeded"),
    InputError: (400, None),
    OptionError: (400, None),
}
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_LATER, _NO_MORE = {"Retry-After": "1"}, {"Connection": "close"}
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 408: _NO_MORE, 413: _NO_MORE, 429: _LATER, 503: _LATER}
"""By status. What is left of a body that is refused is not read."""


def explain(error: Exception, *, is_logged: bool = False) -> tuple[int, dict[str, Any]]:
    """Status and body for an error. What the client cannot help is logged, and not told beyond its own message.

    Those of answers ``is_logged`` by the server behind.
    """
    param, message = None, describe(error)
    if isinstance(error, RequestError):
        status, code, param = error.status, error.code, error.param
    else:
        status, code = next((found for kind, found in _STATUS.items() if isinstance(error, kind)), (500, None))
    if status == 500 and not is_logged:
        LOG.error("a request failed: %s", message, exc_info=error)
    if status == 500 and not isinstance(error, VkvxError):
        message = "the server has a defect; its log has the traceback"
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}
