"""The operator as an ONNX schema, built from its definition table."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import onnx

from vkvx.plugins import operator

_FLOATS = ["tensor(float16)", "tensor(bfloat16)", "tensor(float)"]


@lru_cache(maxsize=1)
def operator_schema() -> onnx.defs.OpSchema:
    """Schema of ``vkvx::VisualKVAttention``. It is not registered: ``onnx.defs.register_schema`` does that."""

    option = onnx.defs.OpSchema.FormalParameterOption

    def parameter(definition: operator.TensorDefinition, kind: Any = option.Single) -> Any:
        dtype = "T" if definition.dtype == "T" else f"tensor({definition.dtype.replace('float32', 'float')})"
        shape = f"[{', '.join(definition.shape)}]"
        return onnx.defs.OpSchema.FormalParameter(definition.name, dtype, shape, param_option=kind)

    return onnx.defs.OpSchema(
        operator.NAME,
        operator.DOMAIN,
        operator.VERSION,
        doc="Attention over a packed visual and a 16-bit text cache, which are then extended by this call's tokens.",
        inputs=[
            *(parameter(definition) for definition in operator.INPUTS),
            *(
                parameter(definition, option.Optional)
                for definition in (*operator.METRIC_INPUTS, *operator.WINDOW_INPUTS)
            ),
        ],
        outputs=[parameter(definition) for definition in operator.OUTPUTS],
        type_constraints=[("T", _FLOATS, "The model's float type")],
        attributes=[
            onnx.defs.OpSchema.Attribute(name, onnx.helper.make_attribute(name, value))
            for name, value in operator.OperatorAttributes().to_dict().items()
        ],
    )
