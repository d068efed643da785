"""Building and finding the library, and its interface: what can be checked without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import tomllib

from vkvx.errors import DependencyError, OptionError, VkvxError
from vkvx.plugins import build
from vkvx.plugins.library import KERNELS, QUANTIZERS, KernelLibrary, Params


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for builds."""
    monkeypatch.setenv(build.CACHE, str(tmp_path / "cache"))
    for name in build.OVERRIDES.values():
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("given", "expected"),
    [("90", ["90"]), ("9.0,80, 8.0", ["80", "90"]), ("120,75", ["75", "120"]), ("all", list(build.ARCHITECTURES))],
)
def test_architectures(given: str, expected: list[str]) -> None:
    assert build.resolve_architectures(given) == expected


@pytest.mark.parametrize("given", ["", "h100", "90,", "70", "sm_90"])
def test_architectures_that_are_not_understood(given: str) -> None:
    with pytest.raises(OptionError, match="give native, all, or a list"):
        build.resolve_architectures(given)


def test_native_follows_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '9.0\\n8.6\\n9.0\\n'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert build.resolve_architectures("native") == ["86", "90"]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert build.resolve_architectures("native") == list(build.ARCHITECTURES)


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the front of the path, with an nvcc that knows two architectures."""
    folder = tmp_path / "bin"
    folder.mkdir()
    _write_program(folder / "nvcc", "printf 'compute_90\\ncompute_120\\n'")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def _write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_architectures_that_the_compiler_does_not_know(cache: Path, compiler: Path) -> None:
    with pytest.raises(
        OptionError, match=r"nvcc does not know compute capability 80, 999; give --arch some of 90, 120"
    ):
        build.build("80,90,999")
    assert not cache.exists()


@pytest.mark.parametrize("jobs", [0, -1])
def test_no_jobs(cache: Path, jobs: int) -> None:
    with pytest.raises(OptionError, match=rf"\(--jobs\) {jobs}"):
        build.build("90", jobs=jobs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_a_build_runs_ends_with_it(cache: Path, compiler: Path, tmp_path: Path, number: signal.Signals) -> None:
    """CMake starts compilers: these have to go, too."""
    started = tmp_path / "started"
    _write_program(compiler / "cmake", f"sleep 600 & echo $! > {started}.part; mv {started}.part {started}; wait")
    command = [sys.executable, "-m", "vkvx", "plugin", "build", "--arch", "90"]
    heeded = partial(signal.signal, number, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeded) as process:
        while process.poll() is None and not started.exists():
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "vkvx: error: interrupted\n")
    assert not list(cache.glob("build-*"))
    state = Path(f"/proc/{int(started.read_text())}/stat")
    ends = time.monotonic() + 60  # whoever adopts it takes note of its end
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_a_build_is_found_by_the_hash_of_its_sources(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.find_library() is None
    (cache / "0123456789abcdef-90").mkdir(parents=True)
    (cache / "0123456789abcdef-90" / build.LIBRARY).touch()
    assert build.find_library() is None
    ours = cache / f"{build.source_hash()}-90" / build.LIBRARY
    ours.parent.mkdir()
    ours.touch()
    assert build.find_library() == ours
    assert build.build("90") == ours
    monkeypatch.setattr(build, "SOURCES", cache)
    assert build.find_library() is None


def test_a_build_must_cover_what_is_asked(cache: Path) -> None:
    for name in ("80-90", "120"):
        folder = cache / f"{build.source_hash()}-{name}"
        folder.mkdir(parents=True)
        (folder / build.TENSORRT).touch()
    assert build.find_library(build.TENSORRT, ["90"]) == cache / f"{build.source_hash()}-80-90" / build.TENSORRT
    assert build.find_library(build.TENSORRT, ["90", "120"]) is None
    assert build.find_library(build.LIBRARY, ["90"]) is None


def test_the_library_can_be_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own.so"
    monkeypatch.setenv(build.OVERRIDES[build.LIBRARY], str(own))
    with pytest.raises(DependencyError, match=r"VKVX_LIBRARY names .*own\.so"):
        build.find_library()
    own.touch()
    assert build.find_library() == own
    with pytest.raises(DependencyError, match=r"cannot load .*own\.so"):
        KernelLibrary(own)


def test_messages_without_tools(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    if not Path("/usr/local/cuda/bin/nvcc").is_file():
        with pytest.raises(DependencyError, match="nvcc is missing; install the CUDA toolkit"):
            build.build("90")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    with pytest.raises(DependencyError, match="CMake is missing"):
        build.build("90")
    assert not cache.exists() or not list(cache.glob("build-*"))


def test_a_failed_build_leaves_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "cmake"
    program.write_text("#!/bin/sh\necho 'CMake Error: no such generator'\nexit 1\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "nvcc").touch()
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(DependencyError, match=r"nvcc cannot be run"):
        build.build("90")
    (tmp_path / "nvcc").write_text("#!/bin/sh\n")
    with pytest.raises(DependencyError, match=r"`cmake` failed to build.*no such generator"):
        build.build("90")
    assert not list(cache.glob("build-*"))
    assert build.find_library() is None


def test_every_source_is_hashed_and_packaged() -> None:
    """What CMake compiles, and what that includes: else a build of other sources would be taken for one of these."""
    root = Path(__file__).parents[2]
    read = [build.SOURCES / "CMakeLists.txt"]
    names = re.findall(r"[\w./]+\.(?:cu|cpp)\b", read[0].read_text())
    read += [
        path
        for name in names
        if (path := build.SOURCES / name).is_file() or (path := build.SOURCES / "tensorrt" / name).is_file()
    ]
    assert {"api.cpp", "append.cu", "operator.cpp", "plugin_v2.cpp", "plugin_v3.cpp"} <= {path.name for path in read}
    for path in read:
        included = re.findall(r'^\s*#include "([^"]+)"', path.read_text(), re.MULTILINE)
        read += [found for name in included if (found := (path.parent / name).resolve()) not in read]
    assert build.SOURCES / "operator_table.h" in read
    assert set(read) <= set(build.source_files())
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packaged = {
        path for pattern in settings["package-data"]["vkvx.plugins"] for path in (root / "plugins").glob(pattern)
    }
    assert set(read) <= packaged


@pytest.fixture(scope="module")
def library(kernel_build: Path) -> KernelLibrary:
    return KernelLibrary(kernel_build / build.LIBRARY)


def _params(**changes: object) -> Params:
    sizes: dict[str, object] = dict.fromkeys(
        ("rows", "positions", "slots", "text_entries", "key_bits", "value_bits"), 1
    )
    sizes |= {
        "query_heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "group_size": 128,
        "visual_capacity": 256,
        "text_bits": 16,
    }
    sizes |= {"text_capacity": 32, "tau": 3.0, "correction_limit": 3.0, "scale": 0.125}
    return Params(**(sizes | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 100}, "head_dim is 100; give a multiple of 32 up to 512"),
        ({"key_bits": 3}, "key_bits is 3"),
        ({"key_bits": 16}, "key_bits is 16"),
        ({"text_bits": 4}, "text_bits is 4; give 16 or 8"),
        ({"text_bits": 8, "key_bits": 16, "value_bits": 16, "visual_capacity": 0}, "text_bits is 8; give 16 where"),
        ({"query_heads": 5}, "query_heads is 5; give a multiple of kv_heads"),
        ({"group_size": 100}, "group_size is 100"),
        ({"visual_capacity": 100}, "visual_capacity is 100"),
        ({"visual_entries": 7}, "visual_entries is 7"),
        ({"dtype": 7}, "dtype is 7"),
        ({"quantizer": 9}, "quantizer is 9; give VKVX_MINMAX, VKVX_QUANTILE, VKVX_SHRINK, VKVX_LLOYD or VKVX_SHAPED"),
        ({"kernel": 9}, "kernel is 9; give VKVX_AUTO, "),
        ({"correction": -1}, "correction is -1"),
        ({"correction_limit": 0.0}, "correction_limit more than 0"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"splits": -1}, "splits is -1"),
    ],
)
def test_wrong_sizes_are_refused(library: KernelLibrary, changes: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        library.workspace_bytes(_params(**changes))


def test_another_struct_is_refused(library: KernelLibrary) -> None:
    params = _params()
    params.size -= 8
    with pytest.raises(OptionError, match="another size"):
        library.workspace_bytes(params)


def test_workspace_grows_with_the_call(library: KernelLibrary) -> None:
    small = library.workspace_bound(_params())
    large = library.workspace_bound(_params(rows=64, positions=1000))
    assert 0 < small < large
    assert library.workspace_bound(_params(correction=1)) > small


def test_bound_of_the_workspace_is_for_chosen_kernels_only(library: KernelLibrary) -> None:
    for changes in ({"kernel": KERNELS["plain"]}, {"splits": 2}):
        with pytest.raises(OptionError, match="known for kernel VKVX_AUTO and 0 splits only"):
            library.workspace_bound(_params(**changes))


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a device")
def test_without_a_device_the_workspace_is_that_of_all(library: KernelLibrary) -> None:
    assert library.workspace_bytes(_params()) == library.workspace_bound(_params())
    with pytest.raises(VkvxError, match="no CUDA device is current"):
        library.workspace_zeroed(_params())


def test_only_pictures_of_shaped_need_workspace_for_the_append(library: KernelLibrary) -> None:
    sizes = {
        (name, entries): library.workspace_bytes(
            _params(quantizer=QUANTIZERS[name], visual_entries=entries, rows=8, slots=8, query_heads=8, kv_heads=8)
        )
        for name in ("lloyd", "shaped")
        for entries in (0, 256)
    }
    shaped = sizes.pop(("shaped", 256))
    assert len(set(sizes.values())) == 1
    # Attention and append use the same memory, one after the other.
    assert shaped > sizes["lloyd", 0]
    assert shaped >= (8 * 8 + 8) * 2 * 64 * 64, "metrics of keys of each row and head, and of values of each head"
