"""Measures what quantising the visual cache costs, and records what a model looks at. Names are loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vkvx.evaluation.calibration import calibrate
    from vkvx.evaluation.result import Result
    from vkvx.evaluation.run import evaluate

_HOMES = {"Result": "result", "calibrate": "calibration", "evaluate": "run"}

__all__ = ["Result", "calibrate", "evaluate"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vkvx.evaluation' has no attribute {name!r}")
    return getattr(import_module(f"vkvx.evaluation.{_HOMES[name]}"), name)
