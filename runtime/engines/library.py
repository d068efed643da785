"""TensorRT, or TensorRT for RTX, imported when first asked for: its version, what it offers, its plugins.

Everything that differs between TensorRT 8.6, 10, 11 and RTX when engines are built is said here or in
``vkvx.runtime.engines.lowering``. Nothing here needs a GPU, except where TensorRT itself does.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

from vkvx.errors import DependencyError, EngineError, OptionError, VkvxError
from vkvx.plugins import operator
from vkvx.runtime.engines.dialect import Dialect
from vkvx.runtime.engines.log import Log
from vkvx.runtime.engines.manifest import BACKENDS

MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
PACKAGES = {"tensorrt": "tensorrt", "rtx": "tensorrt-rtx-cu13"}
NAMES = {"tensorrt": "TensorRT", "rtx": "TensorRT for RTX"}
_RTX_LIBRARIES, _RTX_SONAME = "tensorrt_rtx_libs", "libtensorrt_rtx.so"
PLUGIN_LIBRARIES = {3: "libvkvx_tensorrt.so", 2: "libvkvx_tensorrt8.so"}
"""The plugin's file by the interface it implements, IPluginV3 or IPluginV2DynamicExt."""
REBUILD = "run `vkvx build BUNDLE --force`"
"""What helps against an engine that cannot be used."""


@dataclass(frozen=True)
class TensorRTLibrary:
    """An imported TensorRT. ``version`` is as the module says it, for example 1.7.1.116."""

    backend: str
    module: Any
    version: str

    @property
    def name(self) -> str:
        """Name and version, for people."""
        return f"{NAMES[self.backend]} {self.version}"

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version; those of TensorRT for RTX count from 1."""
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)

    @property
    def needs_gpu(self) -> bool:
        """Whether it builds engines only for the GPU of the machine."""
        return self.backend != "rtx"

    @property
    def is_strongly_typed(self) -> bool:
        """Whether layers compute in the types of the graph; if not, precisions have to be set."""
        return self.is_recent

    @property
    def is_recent(self) -> bool:
        """TensorRT 10 or newer, or TensorRT for RTX: INT64, BF16, IPluginV3; else TensorRT 8.6."""
        return self.backend == "rtx" or self.release >= (10, 0)

    @property
    def plugin_interface(self) -> int:
        """3 for IPluginV3 with aliased outputs, 2 for IPluginV2DynamicExt."""
        return 3 if self.is_recent else 2

    @property
    def takes_empty_tensors(self) -> bool:
        """Whether a profile may hold sizes of 0."""
        return self.is_recent

    @property
    def writes_streams(self) -> bool:
        """Whether it hands out an engine piece by piece."""
        return hasattr(self.module.Builder, "build_serialized_network_to_stream")

    @property
    def dialect(self) -> Dialect:
        """The ONNX that its parser takes."""
        recent = self.is_recent
        return Dialect(self.version, None if recent else 17, bfloat16=recent, shape_and_reshape_attributes=recent)

    def builder_flag(self, name: str, option: str) -> Any:
        """A ``BuilderFlag``; OptionError if the library has none of this name."""
        flag = getattr(self.module.BuilderFlag, name, None)
        if flag is None:
            raise OptionError(f"{self.name} offers no {option}; leave it out, or install a newer TensorRT")
        return flag

    def precision(self, dtype: str) -> Any:
        """Its data type for float16, bfloat16, float32, int32, int64 or bool."""
        types = self.module.DataType
        names = {"float16": "HALF", "bfloat16": "BF16", "float32": "FLOAT", "int32": "INT32", "int64": "INT64"}
        return getattr(types, names[dtype])

    def registry(self, owner: Any) -> Any:
        """The plugin registry that a ``Builder``, a ``Runtime`` or, as ``owner``, the whole module sees."""
        own = getattr(owner, "get_plugin_registry", None)
        return own() if own is not None else self.module.get_plugin_registry()

    def load_plugin(self, owner: Any, log: Log, path: Path, kind: type[VkvxError], remedy: str) -> Any:
        """Load a plugin library into the registry of ``owner``; its handle there. Raises ``kind`` if that fails."""
        with log.explain(kind, f"{self.name} cannot load the plugin {path}", remedy):
            handle = self.registry(owner).load_library(str(path.resolve()))
            log.require(handle is not None)
        return handle


def load_engine(runtime: Any, log: Log, path: Path) -> Any:
    """The engine in a file, for the current GPU of the thread. Raises EngineError if TensorRT does not take it."""
    with log.explain(EngineError, f"TensorRT cannot load {path}", REBUILD):
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        log.require(engine is not None)
    return engine


def load(backend: str, *, has_gpu: bool) -> TensorRTLibrary:
    """Import the library of a backend; ``auto`` is TensorRT where there is a GPU and that package, else RTX.

    Raises OptionError for an unknown backend, DependencyError for one that is missing or cannot be loaded.
    """
    if backend == "auto":
        candidates = BACKENDS if has_gpu else ("rtx",)
        found = [name for name in candidates if util.find_spec(MODULES[name]) is not None]
        if not found:
            other = "" if has_gpu or util.find_spec("tensorrt") is None else " (the package tensorrt needs a GPU)"
            raise DependencyError(
                f"no TensorRT that can build here{other}; run `pip install tensorrt-rtx-cu13`, which builds without a "
                "GPU, or `pip install tensorrt` on a machine with one"
            )
        backend = found[0]
    if backend not in BACKENDS:
        raise OptionError(f"unknown backend '{backend}' (--backend): give one of auto, {', '.join(BACKENDS)}")
    if backend == "rtx":
        _name_rtx_library()
    try:
        module = importlib.import_module(MODULES[backend])
    except ModuleNotFoundError as error:
        if error.name != MODULES[backend]:
            raise DependencyError(f"{NAMES[backend]} cannot be loaded: {error}") from error
        raise DependencyError(
            f"{NAMES[backend]} is not installed; run `pip install {PACKAGES[backend]}`, or choose another --backend"
        ) from error
    except (ImportError, OSError) as error:
        raise DependencyError(f"{NAMES[backend]} cannot be loaded: {error}") from error
    library = TensorRTLibrary(backend, module, str(module.__version__))
    if backend == "tensorrt" and library.release != (8, 6) and library.release < (10, 3):
        raise DependencyError(
            f"{library.name} cannot run the plugin's interface; install TensorRT 8.6, or 10.3 or newer"
        )
    return library


def _name_rtx_library() -> None:
    """Give the library in the wheel of TensorRT for RTX the name by which its ONNX parser loads it.

    The wheel has ``libtensorrt_rtx.so.1`` only. Without the other name the parser aborts the process when it meets a
    plugin node.
    """
    spec = util.find_spec(_RTX_LIBRARIES)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        link, library = Path(folder) / _RTX_SONAME, Path(folder) / f"{_RTX_SONAME}.1"
        if not library.is_file() or link.exists():
            continue
        try:
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.symlink(library.name, link)
        except OSError as error:
            raise DependencyError(
                f"the package tensorrt-rtx lacks {link}, and it cannot be added ({error.strerror}); "
                f"run `ln -s {library.name} {link}` with the rights to do so"
            ) from error


@contextlib.contextmanager
def plugin(library: TensorRTLibrary, builder: Any, log: Log, path: Path) -> Iterator[None]:
    """Load a plugin library into the registry of a builder; it leaves the registry in the end.

    Raises DependencyError if it cannot be loaded, or holds no creator of the operator.
    """
    remedy = "run `vkvx plugin build`, or give another --plugin"
    handle = library.load_plugin(builder, log, path, DependencyError, remedy)
    registry = library.registry(builder)
    try:
        if not _has_creator(registry):
            raise DependencyError(
                f"{path} holds no plugin {operator.NAME} that {library.name} can use; run `vkvx plugin build`, "
                f"or give --plugin with a {PLUGIN_LIBRARIES[library.plugin_interface]}"
            )
        yield
    except BaseException as error:
        # A network that the traceback keeps alive would end after the library that its plugins come from.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        registry.deregister_library(handle)


def _has_creator(registry: Any) -> bool:
    # all_creators sees one interface only in some versions, get_creator is missing in others.
    get = getattr(registry, "get_creator", None) or registry.get_plugin_creator
    return any(get(operator.NAME, str(operator.VERSION), domain) is not None for domain in (operator.DOMAIN, ""))
