"""The torch backend."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from vkvx.manifest import Manifest
from vkvx.models.checkpoint import CONFIG_FILE
from vkvx.packages import TORCH, missing, require
from vkvx.plugins.build import find_library
from vkvx.plugins.library import MAX_HEAD_DIM
from vkvx.runtime.backends.base import Backend, Candidate, against_gpu


def find(bundle: Path, manifest: Manifest, provider: str, threads: int | None) -> list[Candidate]:
    """torch, which runs bundles with a ``config.json``, and suits best on a GPU with ``libvkvx``.

    See :mod:`vkvx.runtime.backends.registry`.
    """

    def open_backend(*, slots: int, visual_tokens: int, text_tokens: int, verify: bool) -> Backend:
        try:
            from vkvx.runtime.backends.torch.loading import open_bundle
        except ImportError as error:
            raise missing("torch", error) from error
        capacity = {"slots": slots, "visual_tokens": visual_tokens, "text_tokens": text_tokens}
        return open_bundle(bundle, manifest, provider=provider, threads=threads, **capacity)

    def check() -> None:
        require("export", *TORCH)
        if provider == "cuda":
            from vkvx.runtime.backends.torch.loading import choose_device

            choose_device(provider)

    against = against_gpu(provider, threads) or _against(manifest)
    return [Candidate("torch", "there is a GPU, and libvkvx is built", against, open_backend, check=check)]


def _against(manifest: Manifest) -> str | None:
    if find_library() is None:
        return "libvkvx is not built (vkvx plugin build)"
    if (widest := max(layer.head_dim for layer in manifest.model.layers)) > MAX_HEAD_DIM:
        return f"libvkvx has no kernel for heads of {widest}"
    if CONFIG_FILE not in manifest.files:
        return "the bundle holds no config.json, which older exports left out"
    absent = next((name for name in TORCH if find_spec(name) is None), None)
    if absent is not None:
        return f"{absent} is not installed"
    try:
        import torch
    except (ImportError, OSError) as error:  # a package without the libraries that it needs
        return f"torch cannot be imported ({error})"
    return None if torch.cuda.is_available() else "torch finds no GPU"
