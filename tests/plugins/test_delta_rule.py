"""The gated delta rule: the torch op and the ONNX function against a loop in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor
from torch.nn.functional import normalize

from vkvx.errors import OptionError
from vkvx.plugins import torch_delta_rule  # noqa: F401 (registers the operator)
from vkvx.plugins.delta_rule import CHUNK, INPUTS, NAME, OUTPUTS
from vkvx.plugins.function.delta_rule import delta_rule_function
from vkvx.plugins.operator import DOMAIN
from vkvx.plugins.schema import delta_rule_schema

ROWS, HEADS, KEY, VALUE = 2, 3, 16, 24
Rule = Callable[..., tuple[Tensor, Tensor]]


def inputs(positions: int, seed: int = 0, decay: float = 2.0, same_keys: bool = False) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    key = normalize(noise(ROWS, HEADS, positions, KEY), dim=-1)
    if same_keys:
        key = key[:, :, :1].expand_as(key).contiguous()
    query, value = noise(ROWS, HEADS, positions, KEY) * KEY**-0.5, noise(ROWS, HEADS, positions, VALUE)
    share = torch.rand(2, ROWS, HEADS, positions, generator=random)
    return [query, key, value, -decay * share[0], 0.5 + 0.5 * share[1], noise(ROWS, HEADS, KEY, VALUE)]


def loop(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence, position by position."""
    query, key, value, decay, beta, state = (x.double().numpy() for x in tensors)
    outputs = []
    for i in range(query.shape[2]):
        state = state * np.exp(decay[:, :, i, None, None])
        written = beta[:, :, i, None] * (value[:, :, i] - np.einsum("bhk,bhkv->bhv", key[:, :, i], state))
        state = state + np.einsum("bhk,bhv->bhkv", key[:, :, i], written)
        outputs.append(np.einsum("bhk,bhkv->bhv", query[:, :, i], state))
    return torch.from_numpy(np.stack(outputs, 2)), torch.from_numpy(state)


def function(opset: int = 18) -> Rule:
    """The ONNX function, run by onnxruntime."""
    ort = pytest.importorskip("onnxruntime")
    node = helper.make_node(NAME, [t.name for t in INPUTS], ["output", "new_state"], domain=DOMAIN)
    given = [helper.make_tensor_value_info(t.name, onnx.TensorProto.FLOAT, t.shape) for t in INPUTS]
    made = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, t.shape)
        for name, t in zip(node.output, OUTPUTS, strict=True)
    ]
    model = helper.make_model(
        helper.make_graph([node], "rule", given, made),
        functions=[delta_rule_function(opset)],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        feed = {t.name: x.numpy() for t, x in zip(INPUTS, tensors, strict=True)}
        output, state = session.run(None, feed)
        return torch.from_numpy(output), torch.from_numpy(state)

    return run


@pytest.fixture(scope="module", params=["torch", "function", "function of opset 17"])
def rule(request: pytest.FixtureRequest) -> Rule:
    if request.param == "torch":
        return torch.ops.vkvx.gated_delta_rule  # type: ignore[no-any-return]
    return function(17 if "17" in request.param else 18)


@pytest.mark.parametrize("positions", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_against_a_loop_in_float64(rule: Rule, positions: int) -> None:
    tensors = inputs(positions)
    for found, expected in zip(rule(*tensors), loop(*tensors), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


def test_keys_that_are_all_alike(rule: Rule) -> None:
    """As those of an empty page: what one position writes the next ones replace, sixty times in a chunk."""
    tensors = inputs(2 * CHUNK, decay=0.0, same_keys=True)
    for found, expected in zip(rule(*tensors), loop(*tensors), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


def test_a_state_that_is_forgotten_at_once(rule: Rule) -> None:
    """Decays whose sums over a chunk no exponential of FP32 holds."""
    tensors = inputs(CHUNK + 9, decay=60.0)
    for found, expected in zip(rule(*tensors), loop(*tensors), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("cut", [1, 40, CHUNK, CHUNK + 20])
def test_calls_may_be_cut_anywhere(rule: Rule, cut: int) -> None:
    *sequences, state = inputs(CHUNK + 21)
    output, last = rule(*sequences, state)
    first, state = rule(*(x[:, :, :cut].contiguous() for x in sequences), state)
    second, state = rule(*(x[:, :, cut:].contiguous() for x in sequences), state)
    torch.testing.assert_close(torch.cat([first, second], 2), output, rtol=0, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", [1, CHUNK + 5])
def test_positions_that_write_nothing_leave_the_state_as_it_is(rule: Rule, positions: int) -> None:
    query, key, value, decay, beta, state = inputs(positions)
    assert torch.equal(rule(query, key, value, 0 * decay, 0 * beta, state)[1], state)
    part = [torch.cat([x[:, :, : positions // 2], 0 * x[:, :, positions // 2 :]], 2) for x in (decay, beta)]
    before = [x[:, :, : positions // 2].contiguous() for x in (query, key, value, decay, beta)]
    if positions > 1:
        _, expected = rule(*before, state)
        torch.testing.assert_close(rule(query, key, value, *part, state)[1], expected, rtol=0, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    tensors = inputs(4)
    for number, wrong, words in (
        (0, tensors[0].half(), "query must be torch.float32"),
        (3, tensors[3][..., :3], r"decay must be torch.float32 \[B = 2, H = 3, S = 4\]"),
        (5, tensors[5][0], r"state must be .*not torch.float32 \[3, 16, 24\]"),
    ):
        with pytest.raises(OptionError, match=words):
            torch.ops.vkvx.gated_delta_rule(*(wrong if i == number else x for i, x in enumerate(tensors)))


def test_schema_is_the_table() -> None:
    schema = delta_rule_schema()
    assert [entry.name for entry in schema.inputs] == [t.name for t in INPUTS]
    assert [entry.name for entry in schema.outputs] == [t.name for t in OUTPUTS]
