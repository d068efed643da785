"""The TensorRT module of a backend, and its log as one-line errors."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vkvx.errors import DependencyError, VkvxError

MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
"""Python module of each backend."""
_PACKAGES = {
    "tensorrt": "pip install tensorrt (10.9 or newer; on JetPack 6 the system has 8.6)",
    "rtx": "pip install tensorrt-rtx-cu13",
}


def load_library(backend: str) -> Any:
    """The module ``tensorrt`` or ``tensorrt_rtx``. Raises DependencyError."""
    try:
        return importlib.import_module(MODULES[backend])
    except ImportError as error:
        raise DependencyError(
            f"the backend '{backend}' needs the Python module {MODULES[backend]} ({error}): {_PACKAGES[backend]}"
        ) from error


class Library:
    def __init__(self, module):
        self.module, self.version = module, str(module.__version__)


def load(backend, *, has_gpu):
    return Library(load_library(backend))
