"""What the tests of engines share: the plugin that they are built with, and stand-ins for GPU and TensorRT."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from doubles import Cuda, TensorRT, install_cuda, install_tensorrt


@pytest.fixture(scope="session")
def plugin_file(plugin_builds: Any) -> Path:
    """The plugin for TensorRT 10, 11 and RTX."""
    path: Path = plugin_builds.plugin(3)
    return path


@pytest.fixture
def own_copy(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a bundle to where a test may change it."""
    return lambda bundle: Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture
def own_bundle(tiny_bundle: Path, own_copy: Callable[[Path], Path]) -> Path:
    """A copy of the tiny bundle that a test may add engines to."""
    return own_copy(tiny_bundle)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """A GPU of compute capability 9.0 with 4 GiB, of main memory."""
    return install_cuda(monkeypatch, Cuda())


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch, cuda: Cuda) -> TensorRT:
    """TensorRT 10.9, of onnxruntime."""
    return install_tensorrt(monkeypatch, cuda)
