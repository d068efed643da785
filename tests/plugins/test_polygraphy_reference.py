"""The references in Polygraphy's runner: nodes with all kinds of inputs give what the torch ops give, to the bit."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from function_calls import mixed_call, model_for
from onnx import helper
from operator_cases import Dims, attributes_for
from polygraphy.backend.pluginref import PluginRefRunner
from torch_calls import run_op, same_bits, tensors

from vkvx.plugins import delta_rule, operator, polygraphy_reference, torch_delta_rule  # noqa: F401 (registers)


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    polygraphy_reference.register()
    with PluginRefRunner(gs.import_onnx(model)) as runner:
        return list(runner.infer(inputs).values())


@pytest.mark.parametrize("more", [{"quantizer": "shaped"}, {"sliding_window": 40}], ids=["metrics", "window"])
def test_attention(more: dict[str, object]) -> None:
    dims, attributes = Dims(), attributes_for(1, 2, **more)
    numbers = {name: float(np.float32(x)) for name, x in asdict(attributes).items() if isinstance(x, float)}
    attributes = replace(attributes, **numbers)  # attributes of ONNX are FP32
    inputs = mixed_call(attributes, dims)
    expected = run_op(tensors(inputs), attributes)
    found = run(model_for(attributes, dims), inputs)
    for name, array in zip(expected, found, strict=True):
        assert same_bits(torch.from_numpy(array), expected[name]), name


def test_the_delta_rule() -> None:
    random = torch.Generator().manual_seed(0)
    sizes = {"B": 2, "H": 3, "S": 5, "K": 16, "V": 24}
    given = [torch.rand([sizes[d] for d in t.shape], generator=random) / 4 for t in delta_rule.INPUTS]
    given[3] = -given[3]
    names = [t.name for t in delta_rule.INPUTS]
    node = helper.make_node(delta_rule.NAME, names, ["output", "new_state"], domain=operator.DOMAIN)
    info = [helper.make_tensor_value_info(t.name, onnx.TensorProto.FLOAT, t.shape) for t in delta_rule.INPUTS]
    made = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in node.output]
    model = helper.make_model(helper.make_graph([node], "rule", info, made))
    found = run(model, {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)})
    for array, expected in zip(found, torch.ops.vkvx.gated_delta_rule(*given), strict=True):
        assert same_bits(torch.from_numpy(array), expected)
