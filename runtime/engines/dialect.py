"""What ONNX a version of TensorRT takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dialect:
    """What a version of TensorRT takes. ``opset`` is the newest opset, None for any that a bundle may have."""

    version: str
    opset: int | None
    bfloat16: bool
    shape_and_reshape_attributes: bool
