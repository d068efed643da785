"""Bundles that the tests share, exported once a session, and the pages that come with tiny-llava."""

from __future__ import annotations

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
    """``bundle_factory(bits=2, dtype="float32")``: tiny-llava with these ExportOptions; not to be changed."""
    made: dict[tuple[tuple[str, Any], ...], Path] = {}

    def make(**options: Any) -> Path:
        from vkvx import ExportOptions, export_model

        key = tuple(sorted(options.items()))
        if key not in made:
            output = tmp_path_factory.mktemp("bundle") / "tiny-llava"
            export_model("tiny-llava", output, ExportOptions(**options))
            made[key] = output
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_bundle(bundle_factory: Callable[..., Path]) -> Path:
    """tiny-llava with all defaults: FP16, a visual cache of 1 bit; not to be changed."""
    return bundle_factory()
