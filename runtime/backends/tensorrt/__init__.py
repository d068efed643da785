"""The backends of TensorRT and TensorRT for RTX."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from vkvx.errors import EngineError, OptionError, VkvxError
from vkvx.manifest import Manifest
from vkvx.runtime.backends.base import Backend, Candidate, against_gpu
from vkvx.runtime.backends.tensorrt.search import Found, find_engines
from vkvx.runtime.engines.library import MODULES
from vkvx.runtime.engines.manifest import BACKENDS


def find(bundle: Path, manifest: Manifest, provider: str, threads: int | None) -> list[Candidate]:
    """The engines of a bundle that a GPU of this machine runs. See :mod:`vkvx.runtime.backends.registry`."""
    unwanted = against_gpu(provider, threads)
    if unwanted is not None:
        option = "provider='cpu' (--provider cpu)" if provider == "cpu" else "threads (--threads), which a CPU has"
        error = OptionError(f"engines run on a GPU, not with {option}; leave it out, or choose another --backend")
        return [_refused(name, unwanted, error) for name in BACKENDS]
    found = find_engines(bundle)
    return [_candidate(bundle, manifest, name, found.get(name)) for name in BACKENDS]


def _candidate(bundle: Path, manifest: Manifest, name: str, found: Found | VkvxError | None) -> Candidate:
    if found is None:
        remedy = f"run `vkvx build {bundle} --backend {name}` on this machine"
        return _refused(name, "", EngineError(f"{bundle} has no engines of '{name}'; {remedy}"))
    if isinstance(found, VkvxError):
        return _refused(name, str(found).partition(";")[0], found)
    module = MODULES[name]
    against = None if find_spec(module) is not None else f"its engines need the Python module {module}"
    opener = partial(_open, bundle, manifest, found)
    limits = found.manifest.limits
    return Candidate(name, f"the bundle has engines for {found.gpu}", against, opener, limits, found.gpu.index)


def _open(
    bundle: Path,
    manifest: Manifest,
    found: Found,
    *,
    slots: int,
    visual_tokens: int,
    text_tokens: int,
    verify: bool,
) -> Backend:
    from vkvx.runtime.backends import golden
    from vkvx.runtime.backends.tensorrt.backend import TensorRTBackend
    from vkvx.runtime.backends.tensorrt.device import Device
    from vkvx.runtime.backends.tensorrt.engine import open_engines

    found.manifest.check_graphs(manifest.graphs)
    device = Device(found.gpu)
    engines = open_engines(found.directory, found.manifest, verify=verify)
    capacity = {"slots": slots, "visual_tokens": visual_tokens, "text_tokens": text_tokens}
    backend = TensorRTBackend(manifest, engines, device, **capacity)
    if verify:
        try:
            backend.golden = golden.check(backend, [found.directory, bundle])
        except BaseException:
            backend.close()
            raise
    return backend


def _refused(name: str, against: str, error: VkvxError) -> Candidate:
    """What cannot be opened, and says why."""

    def refuse(**_: object) -> NoReturn:
        raise error

    return Candidate(name, "", against, refuse, check=refuse)
