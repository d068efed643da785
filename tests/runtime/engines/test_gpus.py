"""Which GPUs there are, and that TensorRT builds on the one that the engines are for."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from doubles import Cuda, Logger, install_cuda

from vkvx.errors import BuildError, DependencyError, DeviceError
from vkvx.runtime.engines import build as engine_build
from vkvx.runtime.engines import network
from vkvx.runtime.engines.build import build_engines
from vkvx.runtime.engines.gpus import Gpu, capabilities, find_gpus, list_gpus, use_gpu
from vkvx.runtime.engines.library import TensorRTLibrary
from vkvx.runtime.engines.log import Log
from vkvx.runtime.engines.manifest import EngineInfo
from vkvx.runtime.engines.options import BuildOptions
from vkvx.runtime.engines.progress import BuildProgress

MIXED = ("9.0", "8.9", "9.0")


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """Three GPUs of two kinds."""
    return install_cuda(monkeypatch, Cuda(*MIXED, memory=1 << 30))


def test_gpus_are_those_of_cuda_in_its_order_and_none_is_touched(mixed: Cuda) -> None:
    found = list_gpus()
    assert found == find_gpus() == [Gpu(i, "Stand-in", name, 1 << 30) for i, name in enumerate(MIXED)]
    assert capabilities(found) == ["9.0", "8.9"]
    assert str(found[1]) == "Stand-in (GPU 1)"
    assert not mixed.touched
    mixed.capabilities = []
    assert list_gpus() == []
    with pytest.raises(DependencyError, match="no CUDA-capable device"):
        find_gpus()


def test_without_cuda_python_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list_gpus() == []
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 9.0, 81559, NVIDIA X\necho 8.9, 24564, NVIDIA Y, small\n")
    program.chmod(0o755)
    assert list_gpus() == [Gpu(0, "NVIDIA X", "9.0", 81559 << 20), Gpu(1, "NVIDIA Y, small", "8.9", 24564 << 20)]
    program.write_text("#!/bin/sh\necho no driver\nexit 9\n")
    assert list_gpus() == []


def test_each_thread_has_a_gpu_of_its_own(mixed: Cuda) -> None:
    gpus = find_gpus()
    use_gpu(gpus[1])
    seen: list[int] = []
    thread = threading.Thread(target=lambda: (seen.append(mixed.current), use_gpu(gpus[2]), seen.append(mixed.current)))
    thread.start()
    thread.join()
    assert (seen, mixed.current) == ([0, 2], 1)
    with pytest.raises(DeviceError, match=r"CUDA cannot use Stand-in \(GPU 9\)"):
        use_gpu(replace(gpus[0], index=9))


def library() -> TensorRTLibrary:
    """As much of a TensorRT as a build needs until it makes a network."""
    names = {"ILogger": Logger, "Builder": lambda logger: None, "IBuilderConfig": None, "HardwareCompatibilityLevel": 1}
    return TensorRTLibrary("tensorrt", SimpleNamespace(**names), "10.9.0.34")


@pytest.mark.parametrize(("given", "index"), [((), 0), (("8.9",), 1), (("9.0",), 0)])
def test_engines_are_built_on_a_gpu_of_their_kind(
    own_bundle: Path, mixed: Cuda, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], index: int
) -> None:
    used: list[int] = []

    def build(job: Any, name: str, builder: Any, log: Log, partial: Path, progress: Any) -> EngineInfo:
        used.append(mixed.current)
        assert job.gpu.index == index
        raise BuildError("far enough")

    monkeypatch.setattr(engine_build, "load", lambda *_, **__: library())
    monkeypatch.setattr(engine_build, "check_options", lambda *_, **__: None)
    monkeypatch.setattr(engine_build, "_check_memory", lambda predicted: None)
    monkeypatch.setattr(engine_build, "_build_network", build)
    monkeypatch.setattr(network, "_serialize", lambda *_: True)
    with pytest.raises(BuildError, match="far enough"):
        build_engines(own_bundle, BuildOptions("tensorrt", given, plugin_free=True))
    assert used == [index]


def test_the_thread_that_builds_uses_the_gpu(mixed: Cuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    used: list[int] = []
    monkeypatch.setattr(network, "_serialize", lambda *_: used.append(mixed.current) or True)
    tensorrt = library()
    log, graph = Log(tensorrt.module), network.Network(None, None, 0)
    for gpu in (find_gpus()[1], None):
        progress = BuildProgress("engine", lambda *_: None)
        network.build_engine(tensorrt, None, log, graph, SimpleNamespace(), tmp_path / "engine", progress, gpu)
    assert used == [1, 0]
