"""The plugin that engines are built with in tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def plugin_file(plugin_builds: Any) -> Path:
    """The plugin for TensorRT 10, 11 and RTX."""
    path: Path = plugin_builds.plugin(3)
    return path
