"""What the torch reference of the operator refuses, and what torch expects of an op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from operator_cases import CACHES, Dims, attributes_for, check, empty_state, new_call
from oracle import visual_kv_attention
from torch import Tensor
from torch_calls import arguments, arrays, run_op, same_bits, tensors

from vkvx.errors import CapacityError, OptionError


@pytest.mark.parametrize("op", ["visual_kv_attention", "visual_kv_attention_"])
@pytest.mark.parametrize(
    ("bits", "rows", "fits"),
    [
        (1, "p128 p128 p128 p1", "p128 p128 p128"),  # slot 0 holds one group of four already
        (1, "t39", "t38"),
        (1, "t38 p385", "t38 p384"),
        (16, "p20 t20", "p20 t19"),
    ],
)
def test_overflow_is_refused_and_changes_nothing(op: str, bits: int, rows: str, fits: str) -> None:
    attributes = attributes_for(bits, bits)
    dims = Dims(slots=2, text_rows=40)
    rng = np.random.default_rng(0)
    state = empty_state(dims, attributes, rng)
    start = "t1" if bits == 16 else "t2 p3"
    inputs = new_call([(0, start), (1, start)], state, dims, attributes, rng)
    state = check(inputs, arrays(run_op(tensors(inputs), attributes)), attributes, dims)
    call = getattr(torch.ops.vkvx, op)
    named = tensors(new_call([(1, "t1"), (0, rows)], state, dims, attributes, rng))
    before = {name: t.clone() for name, t in named.items()}
    with pytest.raises(CapacityError):
        call(*named.values(), **arguments(attributes))
    for name, t in named.items():
        assert same_bits(t, before[name]), f"{name} was changed"
    call(*tensors(new_call([(1, "t1"), (0, fits)], state, dims, attributes, rng)).values(), **arguments(attributes))


def test_the_oracle_drops_what_does_not_fit() -> None:
    """The kernels and the ONNX function must do so; the torch op refuses."""
    attributes, dims = attributes_for(1, 1), Dims(slots=2, groups=2, text_rows=4)
    rng = np.random.default_rng(0)
    state = empty_state(dims, attributes, rng)
    inputs = new_call([(1, "t3 p300 t3")], state, dims, attributes, rng)
    result = visual_kv_attention(inputs, attributes, dims.float_type)
    roomy = replace(dims, groups=3, text_rows=6)
    want = run_op(tensors(inputs | empty_state(roomy, attributes, rng)), attributes)
    np.testing.assert_allclose(result.output, want["output"].numpy(), atol=1e-5)
    assert result.visual_count.tolist() == [[0, 0], [128, 128]]
    assert result.text_count.tolist() == [0, 4]
    assert np.array_equal(result.caches["text_key"][1], want["text_key"][1, :, :4].numpy())


@pytest.mark.parametrize(
    "wrong",
    [
        {"key_bits": 3},
        {"value_bits": 0},
        {"key_bits": 16},
        {"value_bits": 16},
        {"group_size": 100},
        {"group_size": 0},
        {"group_size": -128},
        {"quantizer": "kmeans"},
        {"score_correction": "linear"},
        {"quantile_alpha_key": 0.5},
        {"quantile_alpha_value": -0.1},
        {"shrink_key": 0.0},
        {"shrink_value": 1.5},
        {"tau": -1.0},
        {"tau": float("nan")},
        {"correction_limit": 0.0},
        {"softcap": -30.0},
        {"sliding_window": -4},
        {"visual_mask": "none"},
    ],
)
def test_attributes_that_nobody_supports_are_refused(wrong: dict[str, float]) -> None:
    attributes, dims = attributes_for(1, 1), Dims(slots=2)
    rng = np.random.default_rng(0)
    named = tensors(new_call([(1, "t2")], empty_state(dims, attributes, rng), dims, attributes, rng))
    with pytest.raises(OptionError) as caught:
        torch.ops.vkvx.visual_kv_attention(*named.values(), **(arguments(attributes) | wrong))
    assert "\n" not in str(caught.value)


def _cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda named: named[name].to(dtype)


def _part(name: str, dim: int, size: int) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda named: named[name].narrow(dim, 0, size)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("query", _part("query", 3, 16)),
        ("query", _part("query", 1, 3)),
        ("query", _part("query", 2, 2)),
        ("query", lambda named: named["query"][0]),
        ("key", _cast("key", torch.float16)),
        ("key", _part("key", 1, 1)),
        ("value", _part("value", 2, 1)),
        ("visual_index", _cast("visual_index", torch.int64)),
        ("visual_index", _part("visual_index", 1, 100)),
        ("text_index", _cast("text_index", torch.int64)),
        ("text_index", _part("text_index", 0, 1)),
        ("slot", _cast("slot", torch.int64)),
        ("slot", _part("slot", 0, 1)),
        ("visual_key", _cast("visual_key", torch.uint8)),
        ("visual_key", _part("visual_key", 2, 2)),
        ("visual_key", _part("visual_key", 3, 1)),
        ("visual_key_params", _cast("visual_key_params", torch.float32)),
        ("visual_key_params", _part("visual_key_params", 3, 2)),
        ("visual_value", _part("visual_value", 5, 2)),
        ("visual_value_params", _part("visual_value_params", 0, 1)),
        ("visual_count", _part("visual_count", 1, 2)),
        ("visual_count", _cast("visual_count", torch.int64)),
        ("text_key", _cast("text_key", torch.float16)),
        ("text_value", _part("text_value", 2, 9)),
        ("text_count", _part("text_count", 0, 1)),
    ],
)
def test_tensors_of_another_shape_or_type_are_refused(name: str, wrong: Callable[[dict[str, Tensor]], Tensor]) -> None:
    attributes, dims = attributes_for(2, 2), Dims(slots=3)
    rng = np.random.default_rng(0)
    state = empty_state(dims, attributes, rng)
    named = tensors(new_call([(1, "t2 p4"), (0, "t3")], state, dims, attributes, rng))
    run_op(named, attributes)
    named[name] = wrong(named)
    with pytest.raises(OptionError) as caught:
        run_op(named, attributes)
    assert "\n" not in str(caught.value)


def test_visual_caches_beside_16_bits_are_refused() -> None:
    packed, baseline = attributes_for(1, 1), attributes_for(16, 16)
    rng = np.random.default_rng(0)
    named = tensors(new_call([(1, "t2 p4")], empty_state(Dims(), packed, rng), Dims(), packed, rng))
    with pytest.raises(OptionError):
        run_op(named, baseline)


@pytest.mark.parametrize(("quantizer", "others"), [("shaped", "lloyd"), ("lloyd", "shaped")])
def test_metrics_go_with_the_quantisers_that_need_them(quantizer: str, others: str) -> None:
    attributes, dims = attributes_for(1, 1, quantizer=quantizer), Dims(slots=3)
    rng = np.random.default_rng(0)
    inputs = new_call([(1, "t2 p4")], empty_state(dims, attributes, rng), dims, attributes, rng)
    run_op(tensors(inputs), attributes)
    with pytest.raises(OptionError, match=r"(needs|takes no) key_metric, value_metric, rotation"):
        run_op(tensors(inputs), attributes_for(1, 1, quantizer=others))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("key_metric", _part("key_metric", 0, 1)),
        ("key_metric", _cast("key_metric", torch.float32)),
        ("value_metric", _part("value_metric", 2, 16)),
        ("rotation", _part("rotation", 0, 1)),
        ("rotation", _part("rotation", 1, 1)),
        ("rotation", _cast("rotation", torch.float16)),
    ],
)
def test_metrics_of_another_shape_or_type_are_refused(name: str, wrong: Callable[[dict[str, Tensor]], Tensor]) -> None:
    attributes, dims = attributes_for(2, 2, quantizer="shaped"), Dims(slots=3)
    rng = np.random.default_rng(0)
    named = tensors(new_call([(1, "t2 p4"), (0, "t3")], empty_state(dims, attributes, rng), dims, attributes, rng))
    named[name] = wrong(named)
    with pytest.raises(OptionError, match=f"^{name} must be"):
        run_op(named, attributes)


# --- as a torch op ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "quantizer"), [(1, "lloyd"), (1, "shaped"), (16, "lloyd")])
@pytest.mark.parametrize("op", ["visual_kv_attention", "visual_kv_attention_"])
def test_opcheck(op: str, bits: int, quantizer: str) -> None:
    attributes, dims = attributes_for(bits, bits, quantizer=quantizer), Dims(slots=3)
    rng = np.random.default_rng(0)
    state = empty_state(dims, attributes, rng)
    for name in CACHES:  # opcheck compares caches before and after with ==, which NaN fails
        state[name] = np.zeros_like(state[name])
    named = tensors(new_call([(2, "t2 p4"), (0, "t3")], state, dims, attributes, rng))
    torch.library.opcheck(getattr(torch.ops.vkvx, op).default, tuple(named.values()), arguments(attributes))


def test_fake_tensors_get_the_real_shapes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    attributes, dims = attributes_for(4, 1), Dims(slots=3, float_type="float16")
    rng = np.random.default_rng(0)
    state = empty_state(dims, attributes, rng)
    named = tensors(new_call([(2, "t2 p4"), (0, "t3")], state, dims, attributes, rng), "float16")
    real = run_op(named, attributes)
    with FakeTensorMode() as mode:
        fake = run_op({name: mode.from_tensor(t) for name, t in named.items()}, attributes)
    for name, t in real.items():
        assert (fake[name].shape, fake[name].dtype) == (t.shape, t.dtype)
