"""vkvx: multimodal LLMs as ONNX bundles whose visual KV cache takes 1, 2, 4 or 8 bits per element.

The names below are the public Python API. They are loaded on first use, so that `import vkvx` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "BatchError": "vkvx.errors",
    "BundleError": "vkvx.errors",
    "BusyError": "vkvx.errors",
    "CapacityError": "vkvx.errors",
    "Conversation": "vkvx.runtime.sessions.session",
    "DeadlineError": "vkvx.errors",
    "DependencyError": "vkvx.errors",
    "ExportOptions": "vkvx.export.options",
    "Generation": "vkvx.runtime.sessions.session",
    "GenerationOptions": "vkvx.runtime.sessions.sampling",
    "InputError": "vkvx.errors",
    "Manifest": "vkvx.manifest",
    "ModelError": "vkvx.errors",
    "NumericError": "vkvx.errors",
    "OptionError": "vkvx.errors",
    "RequestCancelledError": "vkvx.errors",
    "Server": "vkvx.runtime.serving.server",
    "ServerClosedError": "vkvx.errors",
    "Session": "vkvx.runtime.sessions.session",
    "StorageError": "vkvx.errors",
    "VkvxError": "vkvx.errors",
    "calibrate": "vkvx.evaluation",
    "evaluate": "vkvx.evaluation",
    "export_model": "vkvx.export.bundle",
    "quantize_visual_cache": "vkvx.runtime.transformers.plug_in",
    "validate_bundle": "vkvx.runtime.checks.validate",
}

if TYPE_CHECKING:
    from vkvx.errors import (
        BatchError,
        BundleError,
        BusyError,
        CapacityError,
        DeadlineError,
        DependencyError,
        InputError,
        ModelError,
        NumericError,
        OptionError,
        RequestCancelledError,
        ServerClosedError,
        StorageError,
        VkvxError,
    )
    from vkvx.evaluation import calibrate, evaluate
    from vkvx.export.bundle import export_model
    from vkvx.export.options import ExportOptions
    from vkvx.manifest import Manifest
    from vkvx.runtime.checks.validate import validate_bundle
    from vkvx.runtime.serving.server import Server
    from vkvx.runtime.sessions.sampling import GenerationOptions
    from vkvx.runtime.sessions.session import Conversation, Generation, Session
    from vkvx.runtime.transformers.plug_in import quantize_visual_cache

__all__ = [
    "BatchError",
    "BundleError",
    "BusyError",
    "CapacityError",
    "Conversation",
    "DeadlineError",
    "DependencyError",
    "ExportOptions",
    "Generation",
    "GenerationOptions",
    "InputError",
    "Manifest",
    "ModelError",
    "NumericError",
    "OptionError",
    "RequestCancelledError",
    "Server",
    "ServerClosedError",
    "Session",
    "StorageError",
    "VkvxError",
    "__version__",
    "calibrate",
    "evaluate",
    "export_model",
    "quantize_visual_cache",
    "validate_bundle",
]


def __getattr__(name: str) -> Any:
    if name == "quantization":  # the module that docs/format.md shows
        return import_module("vkvx.plugins.reference.quantization")
    if name not in _HOMES:
        raise AttributeError(f"module 'vkvx' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
