"""What the tests of engines share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from doubles import Cuda, TensorRT, install_cuda, install_tensorrt


@pytest.fixture
def own_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may add engines to."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """A GPU of compute capability 9.0 with 4 GiB, of main memory."""
    return install_cuda(monkeypatch, Cuda())


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch, cuda: Cuda) -> TensorRT:
    """TensorRT 10.9, of onnxruntime."""
    return install_tensorrt(monkeypatch, cuda)
