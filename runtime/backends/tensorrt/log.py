"""What TensorRT says when it fails, as one-line errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vkvx.errors import VkvxError


class Log:
    """Collects what TensorRT complains about. ``logger`` is what its classes take."""

    def __init__(self, library: Any) -> None:
        errors: list[str] = []
        severe = (library.ILogger.Severity.ERROR, library.ILogger.Severity.INTERNAL_ERROR)

        class Logger(library.ILogger):
            def log(self, severity: Any, message: str) -> None:
                if severity in severe:
                    errors.append(" ".join(message.split()))

        self.errors = errors
        self.logger = Logger()

    @contextmanager
    def explain(self, kind: type[VkvxError], what: str, remedy: str = "") -> Iterator[None]:
        """Turn a failure inside the block into an error of ``kind``: what failed, TensorRT's reason, what helps."""
        self.errors.clear()
        try:
            yield
        except (_FailedError, RuntimeError, TypeError, ValueError) as error:
            reason = self.errors[0] if self.errors else str(error)
            raise kind(f"{what}: {reason}" + (f"; {remedy}" if remedy else "")) from error

    @staticmethod
    def require(success: bool) -> None:
        """Raise inside :meth:`explain` unless a call succeeded; TensorRT tells by its result and the log."""
        if not success:
            raise _FailedError("it gave no reason")


class _FailedError(Exception):
    """A call of TensorRT returned failure."""
