"""Bundles that the tests share, exported once a run, and the pages that come with tiny-llava."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from samples import Page, bundled_pages


@pytest.fixture(scope="session")
def pages() -> list[Page]:
    """The bundled pages."""
    return bundled_pages()


@pytest.fixture(scope="session")
def bundle_factory(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``bundle_factory(bits=2, dtype="float32")``: tiny-llava with these ExportOptions; not to be changed.

    The processes of pytest-xdist share what one of them has exported.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def make(**options: Any) -> Path:
        from vkvx import ExportOptions, export_model

        name = "-".join(["bundle", *(f"{key}_{value}" for key, value in sorted(options.items()))]).replace("/", "_")
        output = shared / name.replace(":", "_")
        with output.with_name(f"{output.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not output.exists():  # an export appears whole or not at all
                export_model("tiny-llava", output, ExportOptions(**options))
        return output

    return make


@pytest.fixture(scope="session")
def tiny_bundle(bundle_factory: Callable[..., Path]) -> Path:
    """tiny-llava with all defaults: FP16, a visual cache of 1 bit; not to be changed."""
    return bundle_factory()
