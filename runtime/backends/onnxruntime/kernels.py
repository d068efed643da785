"""The custom operator of ``libvkvx_onnxruntime``, for the CUDA provider."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from vkvx.errors import DependencyError
from vkvx.manifest import Manifest
from vkvx.plugins import build
from vkvx.plugins.library import MAX_HEAD_DIM

COMMAND = "vkvx plugin build --onnxruntime"


def find(manifest: Manifest, provider: str) -> Path | None:
    """The library if it is built and takes the model's heads; else None, on a GPU with a warning that it is slow.

    Raises DependencyError if the variable that names it names no file.
    """
    if provider != "cuda":
        return None
    widest = max((layer.head_dim for layer in manifest.model.layers if layer.linear is None), default=0)
    path = build.find_library(build.ONNXRUNTIME)
    if path is not None and widest <= MAX_HEAD_DIM:
        return path
    reason = f"run `{COMMAND}`" if path is None else f"{path.name} has no kernel for heads of {widest}"
    warnings.warn(
        f"on a GPU onnxruntime runs attention over packed bits as standard operators, which is slow; {reason}",
        stacklevel=2,
    )
    return None


def register(ort: Any, options: Any, library: Path) -> None:
    """Make the operator known to sessions with these options. Raises DependencyError."""
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # onnxruntime's types have no common base
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DependencyError(
            f"onnxruntime {ort.__version__} cannot load {library}: {reason}; build it again with `{COMMAND} --force`"
        ) from error
