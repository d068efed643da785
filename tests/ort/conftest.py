"""Bundles of the bundled model, exported once for all tests that run them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports tiny-llava with the given options, each combination once."""
    from vkvx.export import ExportOptions, export_model

    made: dict[tuple[Any, ...], Path] = {}

    def make(**options: Any) -> Path:
        key = tuple(sorted(options.items()))
        if key not in made:
            path = tmp_path_factory.mktemp("bundles") / "tiny"
            export_model("tiny-llava", path, ExportOptions(**options))
            made[key] = path
        return made[key]

    return make
