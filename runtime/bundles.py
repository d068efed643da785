"""Bundles as everything in the runtime reads them."""

from __future__ import annotations

from pathlib import Path

from vkvx.errors import BundleError
from vkvx.manifest import Manifest
from vkvx.models.pictures.kinds import check_pictures


def load_manifest(directory: str | Path) -> Manifest:
    """The manifest of a bundle, once its parts are known to agree: model, cache, pictures, and what graphs are said to
    take and make. Files are looked at, not read. Raises BundleError.

    That the graphs do what is said of them is for :func:`vkvx.graph_files.read_graph`, the tokenizer for
    :class:`vkvx.runtime.sessions.processor.Processor`.
    """
    manifest = Manifest.load(directory)
    try:
        check_pictures(manifest)
    except BundleError as error:
        raise BundleError(f"{directory}: {error}") from error
    return manifest
