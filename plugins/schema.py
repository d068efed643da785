"""The operators as ONNX schemas, built from their definition tables."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import onnx

from vkvx.plugins import delta_rule, operator

_OPTION = onnx.defs.OpSchema.FormalParameterOption
_FLOATS = ["tensor(float16)", "tensor(bfloat16)", "tensor(float)"]
_TEXT_ROWS = {definition.name for definition in operator.TEXT_ROWS_8}


@lru_cache(maxsize=1)
def operator_schema() -> onnx.defs.OpSchema:
    """Schema of ``vkvx::VisualKVAttention``. It is not registered: ``onnx.defs.register_schema`` does that."""
    return onnx.defs.OpSchema(
        operator.NAME,
        operator.DOMAIN,
        operator.VERSION,
        doc="Attention over a packed visual and a text cache, which are then extended by this call's tokens.",
        inputs=[
            *(_parameter(definition) for definition in operator.INPUTS),
            *(
                _parameter(definition, _OPTION.Optional)
                for definition in (*operator.METRIC_INPUTS, *operator.WINDOW_INPUTS)
            ),
        ],
        outputs=[_parameter(definition) for definition in operator.OUTPUTS],
        type_constraints=[
            ("T", _FLOATS, "The model's float type"),
            ("R", [*_FLOATS, "tensor(int32)"], "T, or words of codes with text_bits 8"),
        ],
        attributes=[
            onnx.defs.OpSchema.Attribute(name, onnx.helper.make_attribute(name, value))
            for name, value in operator.OperatorAttributes().to_dict().items()
        ],
    )


@lru_cache(maxsize=1)
def delta_rule_schema() -> onnx.defs.OpSchema:
    """Schema of ``vkvx::GatedDeltaRule``, not registered either."""
    return onnx.defs.OpSchema(
        delta_rule.NAME,
        operator.DOMAIN,
        operator.VERSION,
        doc="The recurrence of gated delta-rule linear attention.",
        inputs=[_parameter(definition) for definition in delta_rule.INPUTS],
        outputs=[_parameter(definition) for definition in delta_rule.OUTPUTS],
    )


def _parameter(definition: operator.TensorDefinition, kind: Any = _OPTION.Single) -> Any:
    dtype = "T" if definition.dtype == "T" else f"tensor({definition.dtype.replace('float32', 'float')})"
    if definition.name in _TEXT_ROWS:
        dtype = "R"
    shape = f"[{', '.join(definition.shape)}]"
    return onnx.defs.OpSchema.FormalParameter(definition.name, dtype, shape, param_option=kind)
