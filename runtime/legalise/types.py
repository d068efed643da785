"""Types of values that a version of TensorRT does not know."""

from __future__ import annotations

import onnx_ir as ir

from vkvx.errors import BuildError


def check_types(model: ir.Model, *, bfloat16: bool, version: str) -> None:
    """Raise BuildError for BF16 values where there is no BF16, and for inputs and outputs of INT64."""
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    for value in values:
        if value.dtype == ir.DataType.BFLOAT16 and not bfloat16:
            raise BuildError(
                f"TensorRT {version} has no BF16, which {value.name} is; export the model with --dtype float16"
            )
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype == ir.DataType.INT64:
            raise BuildError(f"{value.name} is INT64, engines take INT32; export the model again")
