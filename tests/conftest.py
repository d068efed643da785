"""What tests of several folders share: bundles (exported once per run), builds, stand-ins for TensorRT."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from doubles import Cuda, TensorRT, install_cuda, install_tensorrt
from samples import Page, bundled_pages

pytest_plugins = ["matrix"]


@pytest.fixture(scope="session")
def pages() -> list[Page]:
    """The bundled pages."""
    return bundled_pages()


def _shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the processes of one run of pytest-xdist share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def kernel_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with libvkvx and the archive of its kernels, for one architecture; compiled once a run, if need be."""
    from vkvx.plugins import build

    if (found := build.find_library()) is not None and found.with_name(build.KERNELS).is_file():
        return found.parent
    if shutil.which("nvcc") is None or shutil.which("cmake") is None:
        pytest.skip("needs nvcc and CMake")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(build.CACHE, str(_shared_folder(tmp_path_factory) / "plugins"))
        if not build.native_architectures():  # nothing runs the kernels: they are compiled, but hardly optimised
            patch.setenv("CUDAFLAGS", "-Xcicc -O1 -Xptxas -O0")
        return build.build("90").parent


@pytest.fixture(scope="session")
def plugin_builds(request: pytest.FixtureRequest, exports: Any) -> Any:
    """The TensorRT plugins and the harness that calls them, see ``plugin_calls.Builds``; compiled once a run."""
    import plugin_calls

    if plugin_calls.PREBUILT in os.environ:
        return plugin_calls.Builds(Path(os.environ[plugin_calls.PREBUILT]))
    kernels = request.getfixturevalue("kernel_build") / "libvkvx_kernels.a"
    return plugin_calls.Builds(exports.once("plugin-builds", partial(plugin_calls.compile_plugins, kernels)))


@pytest.fixture(scope="session")
def onnxruntime_stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The custom operator of onnxruntime for its CPU provider, see ``onnxruntime_calls``."""
    from onnxruntime_calls import build_stub

    return build_stub(tmp_path_factory.mktemp("onnxruntime"))


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Checkpoints and bundles that a run makes once, see ``exports.Exports``."""
    from exports import Exports

    return Exports(_shared_folder(tmp_path_factory))


@pytest.fixture(scope="session")
def bundle_factory(exports: Any) -> Callable[..., Path]:
    """``bundle_factory(bits=2, dtype="float32")``: tiny-llava with these ExportOptions; not to be changed."""
    return partial(exports.bundle, "tiny-llava")


@pytest.fixture(scope="session")
def tiny_bundle(bundle_factory: Callable[..., Path]) -> Path:
    """tiny-llava with all defaults: FP16, a visual cache of 1 bit; not to be changed."""
    return bundle_factory()


@pytest.fixture(scope="session")
def checkpoint(exports: Any) -> Path:
    """A random LLaVA of two layers and 16 tokens per picture; float32 weights in three shards; not to be changed."""
    from vkvx.models.presets import preset_config
    from vkvx.models.random_checkpoint import write_checkpoint

    def make(path: Path) -> None:
        write_checkpoint(path, preset_config("tiny"), dtype="float32", shard_bytes=1_000_000)

    path: Path = exports.once("tiny-random", make)
    return path


@pytest.fixture(scope="session")
def mixed_bundle(exports: Any, checkpoint: Path) -> Path:
    """Of the random checkpoint: FP32, 8 bits in layer 0 and 1 bit in layer 1; not to be changed."""
    bundle: Path = exports.bundle(checkpoint, dtype="float32", bits_per_layer="0:8")
    return bundle


@pytest.fixture(scope="session")
def baseline_bundle(exports: Any, checkpoint: Path) -> Path:
    """Of the random checkpoint: FP16 from FP32 weights, 16 bits, opset 17; not to be changed."""
    bundle: Path = exports.bundle(checkpoint, bits=16, opset=17)
    return bundle


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
    return install_cuda(monkeypatch, Cuda("9.0"))


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch, cuda: Cuda) -> TensorRT:
    """TensorRT 10.9, of onnxruntime."""
    return install_tensorrt(monkeypatch, cuda)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``kernels`` need a GPU for torch and a built library."""
    marked = [item for item in items if item.get_closest_marker("kernels")]
    if not marked:
        return
    import torch

    from vkvx.plugins import build

    missing = "an NVIDIA GPU" if not torch.cuda.is_available() else None
    if missing is None and build.find_library() is None:
        missing = "the library, see `vkvx plugin build`"
    for item in marked:
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"needs {missing}"))
