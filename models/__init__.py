"""Model families that vkvx knows, and the bundled tiny-llava. See :mod:`vkvx.models.registry`."""
