"""What the verb `doctor` says of the CUDA library."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vkvx.cli import doctor
from vkvx.errors import DependencyError
from vkvx.plugins import build, fatbin
from vkvx.plugins import library as library_module

PTX, CUBIN = 1, 2


def fat_binary(*entries: tuple[int, int]) -> bytes:
    """A fat binary with an entry of 40 bytes of code for each (kind, compute capability)."""
    body = b"".join(struct.pack("<HHIQ12xI32x", kind, 0x101, 64, 40, arch) + b"\xaa" * 40 for kind, arch in entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the place of a build for 8.0, 8.9 and PTX for 9.0; it cannot be loaded."""
    monkeypatch.setenv(build.CACHE, str(tmp_path))
    monkeypatch.delenv(build.OVERRIDES[build.LIBRARY], raising=False)
    path = tmp_path / f"{build.source_hash()}-80" / build.LIBRARY
    path.parent.mkdir()
    path.write_bytes(b"\x7fELF" + bytes(60) + fat_binary((CUBIN, 89), (PTX, 90)) + b"between" + fat_binary((CUBIN, 80)))
    return path


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any file can be loaded."""
    monkeypatch.setattr(library_module, "KernelLibrary", lambda path: path)


def ability(cli: Callable, name: str = "CUDA kernels") -> dict[str, Any]:
    found = json.loads(cli("doctor", "--json").out)["works"]
    return next(entry for entry in found if entry["name"] == name)


def test_architectures_of_a_file(built: Path, tmp_path: Path) -> None:
    held = fatbin.architectures(built)
    assert held == ([80, 89], [90])
    assert [code for code in (75, 80, 86, 87, 89, 90, 120) if held.serve(code)] == [80, 86, 87, 89, 90, 120]
    for content in (b"", b"no code", fat_binary()[:10], fat_binary((CUBIN, 80))[:40]):
        (tmp_path / "other").write_bytes(content)
        assert fatbin.architectures(tmp_path / "other") == ([], [])


def test_no_library(cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.CACHE, str(tmp_path))
    monkeypatch.delenv(build.OVERRIDES[build.LIBRARY], raising=False)
    out = cli("doctor").out
    assert "  CUDA library: not built\n" in out
    assert "  ✗ CUDA kernels: not built\n      vkvx plugin build\n" in out
    monkeypatch.setenv(build.OVERRIDES[build.LIBRARY], str(tmp_path / "gone.so"))
    assert (
        f"✗ CUDA kernels: {build.OVERRIDES[build.LIBRARY]} names {tmp_path / 'gone.so'}, which is no file"
        in cli("doctor").out
    )


def test_a_library_that_cannot_be_loaded(cli: Callable, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = cli("doctor").out
    assert f"  CUDA library: {built}, cannot be loaded, for 8.0, 8.9, PTX for 9.0 and newer\n" in out
    assert f"✗ CUDA kernels: cannot load {built}" in out
    assert ability(cli)["advice"] == "vkvx plugin build --force"
    monkeypatch.setenv(build.OVERRIDES[build.LIBRARY], str(built))
    assert ability(cli)["advice"] == f"unset {build.OVERRIDES[build.LIBRARY]}"


def test_a_library_of_another_version(cli: Callable, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise DependencyError(f"{path} has version 0 of the C interface")

    monkeypatch.setattr(library_module, "KernelLibrary", refuse)
    assert ability(cli)["reason"] == f"{built} has version 0 of the C interface"


@pytest.mark.usefixtures("loads")
def test_a_library_and_gpus(cli: Callable, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "nvidia_devices", list)
    found = json.loads(cli("doctor", "--json").out)
    assert found["cuda_library"] == {
        "path": str(built),
        "capabilities": ["8.0", "8.9"],
        "ptx": ["9.0"],
        "abi_version": library_module.ABI_VERSION,
        "reason": "",
        "advice": "",
    }
    assert ability(cli)["reason"] == "no NVIDIA GPU found"
    for devices, works in ((["NVIDIA X, 8.6"], True), (["NVIDIA X, 7.5"], False), (["A, 7.5", "B, 12.0"], True)):
        monkeypatch.setattr(doctor, "nvidia_devices", lambda devices=devices: devices)
        assert ability(cli)["works"] is works
    monkeypatch.setattr(doctor, "nvidia_devices", lambda: ["NVIDIA X, 7.5"])
    assert ability(cli)["reason"] == "the library has no code for compute capability 7.5"
    assert ability(cli)["advice"] == "vkvx plugin build --arch 7.5"
    assert f"C interface {library_module.ABI_VERSION}, for 8.0, 8.9" in cli("doctor").out


def test_the_operator_of_onnxruntime(cli: Callable, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, override = "kernels in onnxruntime", build.OVERRIDES[build.ONNXRUNTIME]
    monkeypatch.delenv(override, raising=False)
    entry = {"name": name, "works": False}
    expected = {"reason": "not built", "advice": "vkvx plugin build --onnxruntime"}
    assert ability(cli, name) == entry | expected
    library = built.with_name(build.ONNXRUNTIME)
    library.write_bytes(b"no library")
    found = ability(cli, name)
    assert found["works"] is False
    assert f"cannot load {library}: " in found["reason"]
    assert found["reason"].endswith("build it again with `vkvx plugin build --onnxruntime --force`")
    monkeypatch.setenv(override, str(built.with_name("gone.so")))
    assert f"{override} names" in ability(cli, name)["reason"]
