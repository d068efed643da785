"""Turns a checkpoint into a bundle: :func:`export_model` with :class:`ExportOptions`."""

from __future__ import annotations

from vkvx.export.bundle import export_model
from vkvx.export.options import ExportOptions

__all__ = ["ExportOptions", "export_model"]
