"""Turns a checkpoint into a bundle: :func:`vkvx.export_model` with :class:`vkvx.ExportOptions`."""
