"""``vkvx build``: the engines of a bundle, in a directory that is there whole or not at all.

A directory is built once for the same inputs: its manifest holds the hash of all that it depends on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vkvx import __version__
from vkvx.errors import BuildError, DependencyError, EngineError, StorageError
from vkvx.graph_files import read_graph
from vkvx.manifest import FileInfo, Manifest, Progress, sha256
from vkvx.plugins import build as plugin_build
from vkvx.runtime.bundles import load_manifest
from vkvx.runtime.engines.gpus import Gpu, list_gpus, use_gpu
from vkvx.runtime.engines.gpus import capabilities as capabilities_of
from vkvx.runtime.engines.library import PLUGIN_LIBRARIES, TensorRTLibrary, load, plugin
from vkvx.runtime.engines.limits import build_profiles, resolve_limits
from vkvx.runtime.engines.log import Log
from vkvx.runtime.engines.manifest import (
    DECODER,
    FILE_NAME,
    FOLDER,
    FORMAT,
    VISION,
    EngineInfo,
    EngineManifest,
    EngineTensor,
    Limits,
    PluginInfo,
    Profile,
    bundle_hash,
    directory_name,
)
from vkvx.runtime.engines.memory import available_memory, build_memory, peak_memory
from vkvx.runtime.engines.network import add_profile, build_engine, check_tensors, parse
from vkvx.runtime.engines.options import (
    EMBED,
    BuildOptions,
    check_options,
    choose_capabilities,
    configure,
)
from vkvx.runtime.engines.progress import BuildProgress
from vkvx.storage import Kind, check_output, check_room, new_directory, write_file

KIND = Kind("engine directory", FILE_NAME, FORMAT, "give another output= (--output)")
ORDER = (DECODER, VISION)
ENGINE_REVISION = 1
"""Raise it with every change of the code that makes other engines from the same bundle and options: engines of an older
revision are built anew. A test names the modules that may do so, and notices when one of them has changed."""


@dataclass(frozen=True)
class BuildResult:
    """What :func:`build_engines` did. ``predicted_memory`` and ``peak_memory`` are main memory, in bytes."""

    directory: Path
    manifest: EngineManifest
    built: bool
    predicted_memory: int
    peak_memory: int | None


@dataclass(frozen=True)
class _Job:
    """A build with everything decided; ``plugin`` and what follows from it are found last."""

    bundle: Path
    manifest: Manifest
    library: TensorRTLibrary
    capabilities: tuple[str, ...]
    limits: Limits
    profiles: tuple[Profile, ...]
    options: BuildOptions
    verbose: bool
    gpu: Gpu | None
    plugin: Path | None = None
    plugin_info: PluginInfo | None = None
    key: str = ""

    @property
    def directory(self) -> Path:
        if self.options.output is not None:
            return self.options.output.expanduser().absolute()
        return self.bundle / FOLDER / directory_name(self.library.backend, self.capabilities)


def build_engines(
    bundle: str | Path,
    options: BuildOptions,
    progress: Progress = lambda stage, done, total: None,
    *,
    notice: Callable[[str], None] = lambda text: None,
    verbose: bool = False,
) -> BuildResult:
    """Build vision and decoder engines into ``options.output``, unless that was done for the same inputs.

    By default that is a directory in ``BUNDLE/engines``, where sessions look for engines.
    ``notice`` gets lines for the person who waits, such as that the plugin is compiled first; ``verbose`` prints the
    log of TensorRT. Raises BundleError, OptionError, CapacityError, DependencyError, BuildError, EngineError and
    StorageError.
    """
    job = _plan(Path(bundle), options, verbose)
    predicted = predicted_memory(job.library, job.bundle, job.manifest, plugin_free=options.plugin_free)
    kind = replace(KIND, owned=options.output is None)
    with _lock(job.directory, create=kind.owned):
        check_output(job.directory, True, kind)
        job = _with_plugin(job, notice)  # it may have to be compiled, so only now that engines can be written
        found = None if options.force else _up_to_date(job)
        if found is not None:
            return BuildResult(job.directory, found, False, predicted, None)
        _check_memory(predicted)
        check_room(job.directory.parent, 2 * sum(_weight_bytes(job.bundle, job.manifest).values()))
        with new_directory(job.directory, force=True, kind=kind) as partial:
            manifest = _build(job, partial, progress)
    return BuildResult(job.directory, manifest, True, predicted, peak_memory())


def predicted_memory(library: TensorRTLibrary, bundle: Path, manifest: Manifest, *, plugin_free: bool) -> int:
    """Bytes of main memory that a build takes at most; measured with TensorRT for RTX and 8.6."""
    return build_memory(
        max(_weight_bytes(bundle, manifest).values()),
        streams=library.writes_streams,
        plain_layers=len(manifest.model.layers) if plugin_free and manifest.layout.is_packed else 0,
    )


def _plan(bundle: Path, options: BuildOptions, verbose: bool) -> _Job:
    manifest = load_manifest(bundle)
    if manifest.model.linear_layers:
        raise BuildError(
            f"{len(manifest.model.linear_layers)} layers of the model are linear attention, whose states no engine "
            "updates in place; run the bundle with --backend torch or onnxruntime"
        )
    gpus = list_gpus()
    native = capabilities_of(gpus)
    library = load(options.backend, has_gpu=bool(native))
    capabilities = choose_capabilities(library, options.compute_capabilities, native)
    check_options(library, options, has_gpu=bool(native))
    weights = sum(_weight_bytes(bundle, manifest).values())
    own = [gpu for gpu in gpus if gpu.compute_capability in capabilities]
    memory = min((gpu.memory for gpu in own), default=None) if set(capabilities) <= set(native) else None
    limits = resolve_limits(manifest, options.limits, weights, memory)
    # Without the plugin, the operator's function stands in, which reduces over the entries of a call.
    empty = library.takes_empty_tensors and not options.plugin_free
    profiles = build_profiles(manifest, limits, empty_indices=empty)
    # TensorRT builds for the GPU that is current. Where all are of one kind, that needs no choice, nor cuda-python.
    gpu = own[0] if library.needs_gpu and len(native) > 1 else None
    return _Job(bundle, manifest, library, capabilities, limits, profiles, options, verbose, gpu)


def _with_plugin(job: _Job, notice: Callable[[str], None]) -> _Job:
    options = job.options
    path = None if options.plugin_free else _find_plugin(job.library, options, job.capabilities, notice)
    info = None if path is None else PluginInfo(path.name, sha256(path), options.plugin == EMBED)
    key = _cache_key(job.bundle, job.library, job.capabilities, job.limits, options, info)
    return replace(job, plugin=path, plugin_info=info, key=key)


def _find_plugin(
    library: TensorRTLibrary, options: BuildOptions, capabilities: tuple[str, ...], notice: Callable[[str], None]
) -> Path:
    """The plugin's library; compiled now if there is none for these compute capabilities."""
    if options.plugin not in (None, EMBED):
        path = Path(options.plugin)
        if not path.is_file():
            raise DependencyError(f"--plugin {path} is no file; give the path of a plugin, or leave it out")
        return path
    name = PLUGIN_LIBRARIES[library.plugin_interface]
    architectures = [capability.replace(".", "") for capability in capabilities]
    found = plugin_build.find_library(name, architectures)
    if found is not None:
        return found
    headers = plugin_build.find_headers()
    if headers is None or plugin_build.plugin_of(headers) != name:
        raise DependencyError(
            f"{name}, the plugin for {library.name}, is not built for {', '.join(capabilities)}; run "
            f"`vkvx plugin build --arch {','.join(architectures)} --tensorrt-headers DIR` with the folder of its "
            "headers, or give --plugin FILE"
        )
    notice(f"compiling {name} for compute capability {', '.join(capabilities)}; it is kept for later builds")
    return plugin_build.build_plugin(",".join(architectures), headers)


def _cache_key(
    bundle: Path,
    library: TensorRTLibrary,
    capabilities: tuple[str, ...],
    limits: Limits,
    options: BuildOptions,
    info: PluginInfo | None,
) -> str:
    """SHA-256 of what the engines depend on. Files count by the hashes that the bundle's manifest holds."""
    parts = {
        "vkvx": __version__,
        "code": ENGINE_REVISION,
        "bundle": bundle_hash(bundle),
        "backend": library.backend,
        "version": library.version,
        "capabilities": capabilities,
        "limits": asdict(limits),
        "options": options.recorded(),
        "plugin": info and (info.sha256, info.embedded),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _lock(directory: Path, create: bool) -> Iterator[None]:
    """Keep other builds out of a directory; EngineError if one is running. A killed build holds no lock.

    Its parent is made with ``create``. Raises StorageError if it cannot be written to.
    """
    from filelock import FileLock, Timeout

    try:
        if create:
            directory.parent.mkdir(exist_ok=True)
        elif not directory.parent.is_dir():
            raise StorageError(f"{directory.parent} is no directory; create it, or {KIND.remedy}")
        lock = FileLock(directory.parent / f".{directory.name}.lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise EngineError(f"another build of {directory} is running; wait for its end, then run this again") from None
    except OSError as error:
        raise StorageError(
            f"cannot write to {directory.parent}: {error.strerror}; change its rights, or {KIND.remedy}"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _up_to_date(job: _Job) -> EngineManifest | None:
    """The manifest of the directory if it was built from the same inputs and its files are there."""
    try:
        found = EngineManifest.load(job.directory)
    except EngineError:
        return None
    return found if found.cache_key == job.key else None


def _weight_bytes(bundle: Path, manifest: Manifest) -> dict[str, int]:
    """Bytes of the weights of each engine: external data that its graph refers to."""
    sizes = {}
    for name in ORDER:
        model = read_graph(bundle, manifest, name)
        entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
        sizes[name] = sum(int(entry.value) for entry in entries if entry.key == "length")
    return sizes


def _check_memory(predicted: int) -> None:
    free = available_memory()
    if free is not None and predicted > free:
        raise BuildError(
            f"the build takes about {predicted / 2**30:.1f} GiB of main memory, {free / 2**30:.1f} GiB are free; "
            "end other programs, or build on a larger machine and copy the engines"
        )


def _build(job: _Job, partial: Path, progress: Progress) -> EngineManifest:
    """Build both engines into the directory ``partial`` and write its manifest."""
    engines: dict[str, EngineInfo] = {}
    tensors: list[EngineTensor] = []
    aliases: dict[str, str] = {}
    for name in ORDER:
        engines[name] = _build_one(job, name, partial, progress)
        graph = job.manifest.graphs[name]
        for kind, specs in (("input", graph.inputs), ("output", graph.outputs)):
            tensors += [EngineTensor(spec.name, kind, spec.dtype, spec.shape, name) for spec in specs]
        aliases |= {s.name: f"past.{s.name.removeprefix('present.')}" for s in graph.outputs if "present." in s.name}
    if job.plugin is not None and job.plugin_info is not None and not job.plugin_info.embedded:
        shutil.copyfile(job.plugin, partial / job.plugin_info.file)
    files = {path.name: FileInfo(path.stat().st_size, sha256(path)) for path in sorted(partial.iterdir())}
    manifest = EngineManifest(
        vkvx_version=__version__,
        operator_version=job.manifest.operator_version,
        backend=job.library.backend,
        library_version=job.library.version,
        compute_capabilities=job.capabilities,
        bundle_hash=bundle_hash(job.bundle),
        plugin=job.plugin_info,
        limits=job.limits,
        empty_visual_index=job.library.takes_empty_tensors and not job.options.plugin_free,
        engines=engines,
        profiles=job.profiles,
        tensors=tuple(tensors),
        aliases=aliases,
        files=files,
        options=job.options.recorded(),
        cache_key=job.key,
    )
    manifest.save(partial)
    return manifest


def _build_one(job: _Job, name: str, partial: Path, progress: Progress) -> EngineInfo:
    """Build one engine into ``partial``."""
    if job.gpu is not None:
        use_gpu(job.gpu)
    log = Log(job.library.module, job.verbose)
    builder = job.library.module.Builder(log.logger)
    if job.plugin is None or name != DECODER:
        return _build_network(job, name, builder, log, partial, progress)
    with plugin(job.library, builder, log, job.plugin):
        return _build_network(job, name, builder, log, partial, progress)


def _build_network(job: _Job, name: str, builder: Any, log: Log, partial: Path, progress: Progress) -> EngineInfo:
    """The network and its plugins end with this call, before the plugin's library goes."""
    from vkvx.runtime.engines.lowering import legalise

    library, graph = job.library, job.manifest.graphs[name]
    path = job.bundle / graph.file
    proto = legalise(path, library.dialect, plugin_free=job.options.plugin_free)
    network = parse(library, builder, log, proto, path)
    check_tensors(library, network, graph)
    expected = len(job.manifest.model.layers) if name == DECODER and job.plugin is not None else 0
    if network.plugin_layers != expected:
        raise BuildError(
            f"{graph.file} has {network.plugin_layers} plugin layers, expected {expected}, one a decoder layer; "
            "export the model again"
        )
    config = configure(library, builder, job.options, job.capabilities)
    for profile in job.profiles:
        if profile.engine == name:
            add_profile(builder, config, profile)
    if expected and job.plugin_info is not None and job.plugin_info.embedded:
        config.plugins_to_serialize = [str(job.plugin)]
    _load_timing_cache(job, config)
    file, watch = f"{name}.engine", BuildProgress(f"{name} engine", progress)
    build_engine(library, builder, log, network, config, partial / file, watch, job.gpu)
    _save_timing_cache(job, config)
    return EngineInfo(file, network.layers, network.plugin_layers)


def _load_timing_cache(job: _Job, config: Any) -> None:
    path = job.options.timing_cache
    if path is None:
        return
    try:
        contents = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise StorageError(f"cannot read --timing-cache {path}: {error.strerror}") from error
    cache = config.create_timing_cache(contents)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise BuildError(f"{job.library.name} cannot use --timing-cache {path}; remove it, or give another file")


def _save_timing_cache(job: _Job, config: Any) -> None:
    if job.options.timing_cache is not None:
        write_file(job.options.timing_cache, memoryview(config.get_timing_cache().serialize()))
