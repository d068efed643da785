"""Which Python packages are there, and what to install for one that is missing."""

from __future__ import annotations

import importlib
import re
from importlib import metadata

from vkvx.errors import DependencyError

PIP_NAMES = {"PIL": "pillow", "cuda": "cuda-python", "onnx_ir": "onnx-ir", "sklearn": "scikit-learn"}
"""Modules whose package has another name."""


def pip_name(module: str) -> str:
    """The package that provides a module."""
    top = module.partition(".")[0]
    return PIP_NAMES.get(top, top)


def requirement(package: str) -> str:
    """A package with the versions that this vkvx allows, for example ``onnx<2,>=1.20``."""
    try:
        declared = metadata.requires("vkvx") or []
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        declared = []
    for line in declared:
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if name is not None and name.group().lower() == package.lower():
            return line.partition(";")[0].replace(" ", "")
    return package


def missing(module: str) -> DependencyError:
    """The error for a module that cannot be imported."""
    package = pip_name(module)
    return DependencyError(f"the Python package '{package}' is missing; run `pip install '{requirement(package)}'`")


def probe(module: str) -> tuple[str | None, str | None]:
    """Version of an installed package (None if it is missing) and why its import fails (None if it does not)."""
    try:
        version = metadata.version(pip_name(module))
    except metadata.PackageNotFoundError:
        version = None
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            return None, "not installed"
        return version, f"needs the module {error.name}"
    except Exception as error:  # a broken binary package raises anything
        return version, " ".join(f"{type(error).__name__}: {error}".split())
    return version or getattr(loaded, "__version__", "unknown"), None
