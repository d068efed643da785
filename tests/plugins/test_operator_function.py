"""The function's protobuf: validity, overloads, the kernels it needs, and what is refused."""

from __future__ import annotations

from typing import Any

import onnx
import onnxruntime
import pytest
from function_calls import mixed_call, model_for, run
from onnx import inliner, shape_inference
from operator_cases import CACHES, MASKS, Dims, attributes_for, same_bits

from vkvx.errors import OptionError
from vkvx.format import QUANTIZERS
from vkvx.plugins import operator
from vkvx.plugins.function import attention_function


@pytest.mark.parametrize("float_type", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("bits", "quantizer"), [(1, "lloyd"), (4, "lloyd"), (2, "shaped"), (16, "lloyd")])
def test_the_model_is_valid(float_type: str, bits: int, quantizer: str) -> None:
    dims = Dims(float_type=float_type)
    model = model_for(attributes_for(bits, bits, quantizer=quantizer), dims)
    onnx.checker.check_model(model, full_check=True)
    function = model.functions[0]
    inputs = [*operator.INPUTS, *(operator.METRIC_INPUTS if quantizer == "shaped" else ())]
    assert list(function.input) == [t.name for t in inputs]
    assert list(function.attribute) == list(operator.OperatorAttributes().to_dict())
    names = [node.name for node in all_nodes(function.node)]
    assert all(names)
    assert len(set(names)) == len(names)


def test_bodies_are_told_apart_by_overload() -> None:
    """Two layers of one model with different bits, each called through its own body."""
    dims, pair = Dims(float_type="float32"), (attributes_for(1, 1), attributes_for(8, 4))
    models = [model_for(attributes, dims) for attributes in pair]
    shared = ("visual_index", "text_index", "slot", "visual_count", "text_count")
    both = models[0]
    for node in models[1].graph.node:
        node.name, node.overload = "other", "other"
        for names in (node.input, node.output):
            names[:] = [name if name in shared else f"{name}.1" for name in names]
        both.graph.node.append(node)
    for infos, target in ((models[1].graph.input, both.graph.input), (models[1].graph.output, both.graph.output)):
        for info in infos:
            if info.name not in shared:
                info.name = f"{info.name}.1"
                target.append(info)
    models[1].functions[0].overload = "other"
    both.functions.append(models[1].functions[0])
    session = onnxruntime.InferenceSession(both.SerializeToString(), providers=["CPUExecutionProvider"])
    calls = [mixed_call(attributes, dims) for attributes in pair]
    feed = calls[0] | {f"{name}.1": x for name, x in calls[1].items() if name not in shared}
    results = dict(zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True))
    for layer, (attributes, call) in enumerate(zip(pair, calls, strict=True)):
        alone = run(call, attributes, dims)
        for name, x in alone.items():
            key = (f"present_{name}" if name in CACHES else name) + (".1" if layer else "")
            assert same_bits(results[key], x), key


def all_nodes(nodes: Any) -> list[onnx.NodeProto]:
    found = []
    for node in nodes:
        found.append(node)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += all_nodes(attribute.g.node)
    return found


# Of the operators in the body, what onnxruntime's table of kernels lists for the type of the first data input in both
# the CPU and the CUDA provider (docs/OperatorKernels.md of onnxruntime 1.2x, opset 17 and later). "*": all that occur.
KERNELS = {
    "Add": "float int32 int64",
    "Sub": "float int32 int64",
    "Mul": "float int32 int64",
    "Div": "float int32 int64 uint32",
    "Max": "float int32 int64",
    "Min": "float int32 int64",
    "Clip": "float int64",
    "Relu": "float",
    "Floor": "float",
    "Round": "float",
    "Sqrt": "float",
    "Tanh": "float",
    "Softmax": "float",
    "MatMul": "float",
    "IsNaN": "float",
    "And": "bool",
    "Equal": "float int32 int64 bool",
    "Less": "float int32 int64",
    "LessOrEqual": "float int32 int64",
    "Greater": "float int32 int64",
    "ArgMax": "float",
    "ReduceMax": "float int32 int64",
    "ReduceMin": "float int32 int64",
    "ReduceSum": "float int32 int64",
    "TopK": "float int64",
    "Range": "float int64",
    "GatherND": "float float16 bfloat16 int64 bool",
    "Where": "float int32 int64",
    "Cast": "*",
    "Concat": "*",
    "Constant": "*",
    "ConstantOfShape": "*",
    "Gather": "*",
    "GatherElements": "*",
    "Identity": "*",
    "If": "*",
    "Reshape": "*",
    "Scan": "*",
    "ScatterND": "*",
    "Shape": "*",
    "Slice": "*",
    "Transpose": "*",
    "Unsqueeze": "*",
}


@pytest.mark.parametrize("float_type", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("opset", [17, 18])
def test_cpu_and_cuda_providers_have_every_kernel(float_type: str, opset: int) -> None:
    dims = Dims(float_type=float_type)
    cases = [
        attributes_for(b, b, quantizer=q, score_correction=c)
        for b in (1, 2)
        for q in QUANTIZERS
        for c in ("affine", "expected")
    ]
    masked = [attributes_for(bits, bits, **more) for bits in (1, 16) for more in MASKS]
    for attributes in (*cases, *masked, attributes_for(16, 16)):
        model = inliner.inline_local_functions(model_for(attributes, dims, opset))
        graph = shape_inference.infer_shapes(model, strict_mode=True).graph
        types: dict[str, int] = {}
        graphs = [graph]
        for inner in graphs:
            for info in (*inner.input, *inner.value_info, *inner.output):
                types[info.name] = info.type.tensor_type.elem_type
            graphs += [a.g for n in inner.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]
        for inner in graphs:
            for node in inner.node:
                listed = KERNELS[node.op_type]
                data = node.input[1] if node.op_type == "Where" else (node.input or node.output)[0]
                name = onnx.TensorProto.DataType.Name(types[data]).lower()
                assert listed == "*" or name in listed.split(), (node.op_type, name, node.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_heads": 3}, "3 query heads cannot share 2 KV heads"),
        ({"head_dim": 48}, "head dim 48"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"opset": 16}, "opset 16"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {"query_heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": "float16"}
    with pytest.raises(OptionError, match=message):
        attention_function(operator.OperatorAttributes(), **(sizes | change))
