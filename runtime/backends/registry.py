"""Which backends there are, which of them suits a bundle on this machine, and how one is opened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from vkvx.errors import OptionError
from vkvx.manifest import Manifest
from vkvx.runtime.backends.base import Backend, Candidate, check_machine
from vkvx.runtime.engines.manifest import BACKENDS as ENGINE_BACKENDS

_FOLDERS = {
    "tensorrt": ENGINE_BACKENDS,
    "torch": ("torch",),
    "onnxruntime": ("onnxruntime",),
}
"""The folders of this package that hold a backend, with the names of their backends, best first.

Each has a function ``find(bundle, manifest, provider, threads)`` that returns a Candidate for each of its names.
"""
BACKENDS = tuple(name for names in _FOLDERS.values() for name in names)


def candidates(
    bundle: Path, manifest: Manifest, provider: str = "auto", threads: int | None = None
) -> Iterator[Candidate]:
    """The backends for a bundle, best first: engines built for a GPU of this machine, torch on a GPU, onnxruntime.

    Each is looked at when it is asked for, and torch and TensorRT are loaded only where everything else speaks for
    them. Raises OptionError.
    """
    check_machine(provider, threads)
    for folder in _FOLDERS:
        yield from _find(folder, bundle, manifest, provider, threads)


def choose_backend(
    name: str, bundle: Path, manifest: Manifest, provider: str = "auto", threads: int | None = None
) -> Candidate:
    """The backend of a name, or for "auto" the one that serves the bundle best on this machine, with the reason.

    Raises OptionError, and what :attr:`Candidate.check` raises; what else is wrong is raised when it is opened.
    """
    if name not in ("auto", *BACKENDS):
        raise OptionError(f"unknown backend '{name}' (--backend): give one of auto, {', '.join(BACKENDS)}")
    if name != "auto":
        check_machine(provider, threads)
        folder = next(folder for folder, names in _FOLDERS.items() if name in names)
        found = next(one for one in _find(folder, bundle, manifest, provider, threads) if one.name == name)
        found.check()
        return replace(found, reason="it was asked for")
    reasons = dict[str, None]()
    for found in candidates(bundle, manifest, provider, threads):
        if found.against is None:
            break
        reasons[found.against] = None
    found.check()
    return replace(found, reason="; ".join(filter(None, [*reasons, found.reason])))


def open_backend(
    name: str,
    bundle: Path,
    manifest: Manifest,
    *,
    slots: int,
    visual_tokens: int,
    text_tokens: int,
    provider: str = "auto",
    threads: int | None = None,
    verify: bool = True,
) -> Backend:
    """Open a bundle in the backend of a name, or "auto".

    ``visual_tokens`` and ``text_tokens`` are those of a slot. ``verify`` has an effect on engines only: their files are
    compared with their SHA-256, and they have to reproduce the golden sample. Raises OptionError, DependencyError,
    BundleError, EngineError, DeviceError, CapacityError.
    """
    found = choose_backend(name, bundle, manifest, provider, threads)
    return found.open(slots=slots, visual_tokens=visual_tokens, text_tokens=text_tokens, verify=verify)


def _find(folder: str, bundle: Path, manifest: Manifest, provider: str, threads: int | None) -> list[Candidate]:
    return import_module(f"{__package__}.{folder}").find(bundle, manifest, provider, threads)
