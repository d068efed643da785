"""The verb `plugin`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vkvx.plugins import build


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of builds for compute capability 9.0, which is empty."""
    monkeypatch.setenv(build.CACHE, str(tmp_path))
    for name in build.OVERRIDES.values():
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / f"{build.source_hash()}-90"
    folder.mkdir(parents=True)
    return folder


def test_path(cli: Callable, builds: Path) -> None:
    options = {build.LIBRARY: [], build.TENSORRT: ["--tensorrt"], build.TENSORRT8: ["--tensorrt8"]}
    options[build.ONNXRUNTIME] = ["--onnxruntime"]
    for name, option in options.items():
        result = cli("plugin", "path", *option)
        assert result.code == 2
        assert f"{name} is not built; run `vkvx plugin build" in result.err
        (builds / name).touch()
        assert cli("plugin", "path", *option).out == f"{builds / name}\n"


def test_build(cli: Callable, builds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (build.LIBRARY, build.KERNELS, build.TENSORRT, build.TENSORRT8, build.ONNXRUNTIME):
        (builds / name).touch()
    headers = tmp_path / "include"
    headers.mkdir()
    (headers / "NvInferRuntime.h").touch()
    for version, name in (("10.14", build.TENSORRT), ("8.6", build.TENSORRT8)):
        numbers = zip(("MAJOR", "MINOR"), version.split("."), strict=True)
        lines = [f"#define NV_TENSORRT_{part} {number} //!< version\n" for part, number in numbers]
        (headers / "NvInferVersion.h").write_text("".join(lines))
        result = cli("plugin", "build", "--arch", "90", "--tensorrt-headers", str(tmp_path))
        assert result.out == f"{builds / build.LIBRARY}\n{builds / name}\n"
    monkeypatch.setattr(build, "find_headers", lambda given: None)
    result = cli("plugin", "build", "--arch", "90")
    assert result.out == f"{builds / build.LIBRARY}\n"
    assert "TENSORRT_ROOT" in result.err
    assert "kernel-lens" in result.err
    result = cli("plugin", "build", "--arch", "90", "--onnxruntime")
    assert result.out == f"{builds / build.LIBRARY}\n{builds / build.ONNXRUNTIME}\n"
    assert cli("plugin", "build", "--arch", "sm90").code == 2
    assert cli("plugin").code == 2


def test_headers_that_are_none(cli: Callable, builds: Path, tmp_path: Path) -> None:
    result = cli("plugin", "build", "--arch", "90", "--tensorrt-headers", str(tmp_path))
    assert result.code == 2
    assert "no NvInferRuntime.h" in result.err
