"""Types that a version of TensorRT does not know, or does not keep to."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassError, PassResult, PostconditionError

from vkvx.errors import BuildError
from vkvx.plugins.operator import NAME


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


class PluginTypes(InPlacePass):
    """Tells the plugin the model's type, by the attribute ``model_dtype``.

    TensorRT 8.6 takes all that is computed for FP32 until it chooses formats. Where the plugin takes FP32, too, the
    FP16 caches would be copied to FP32 and back in each step.
    """

    def call(self, model: ir.Model) -> PassResult:
        """See the class."""
        nodes = _plugin_nodes(model)
        for node in nodes:
            query = node.inputs[0]
            if query is None or query.dtype is None:
                raise PassError(f"the query of {node.name} has no type")
            node.attributes["model_dtype"] = ir.AttrString("model_dtype", _NAMES[query.dtype])
        return PassResult(model, bool(nodes))

    def ensures(self, model: ir.Model) -> None:
        """Every node of the plugin has the attribute."""
        if nodes := [node for node in _plugin_nodes(model) if "model_dtype" not in node.attributes]:
            raise PostconditionError(f"{nodes[0].name} has no model_dtype")


_NAMES = {ir.DataType.FLOAT16: "float16", ir.DataType.FLOAT: "float32"}


def _plugin_nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == NAME]
