"""What TensorRT says when it fails, as one-line errors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vkvx.errors import VkvxError

_NOISE = ("Cuda Runtime", "catchCudaError", "CUDA initialization failure", "CUDA driver version")
"""Errors that TensorRT for RTX logs, without consequence, on a machine without a GPU."""


class Log:
    """Collects the errors that TensorRT logs, and prints everything if ``verbose``. ``logger`` is for its classes."""

    def __init__(self, module: Any, verbose: bool = False) -> None:
        self.errors = errors = list[str]()

        class Logger(module.ILogger):
            def __init__(self) -> None:
                module.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                """Called by TensorRT, from any of its threads; must not raise."""
                if int(severity) <= int(module.ILogger.Severity.ERROR):
                    errors.append(" ".join(message.split()))
                if verbose:
                    print(f"{severity}: {message}", file=sys.stderr, flush=True)

        self.logger = Logger()

    @property
    def reason(self) -> str:
        """The first error, in one line; those that a missing GPU explains count only if there are no others."""
        telling = (one for one in self.errors if not any(words in one for words in _NOISE))
        return next(telling, self.errors[0] if self.errors else "it does not say why")

    @contextmanager
    def explain(self, kind: type[VkvxError], what: str, remedy: str = "") -> Iterator[None]:
        """Turn a failure inside the block into an error of ``kind``: what failed, TensorRT's reason, what helps."""
        self.errors.clear()
        try:
            yield
        except (_FailedError, RuntimeError, TypeError, ValueError) as error:
            reason = self.reason if self.errors or isinstance(error, _FailedError) else str(error)
            raise kind(f"{what}: {reason}" + (f"; {remedy}" if remedy else "")) from error

    @staticmethod
    def require(success: bool) -> None:
        """Raise inside :meth:`explain` unless a call succeeded; TensorRT tells by its result and the log."""
        if not success:
            raise _FailedError


class _FailedError(Exception):
    """A call of TensorRT returned failure."""
