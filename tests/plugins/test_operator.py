"""The operator's ONNX function in onnxruntime's CPU provider against the torch op, on identical inputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from function_calls import (
    appended_by,
    call_and_compare,
    codes_of,
    compare_group,
    counts_after,
    mixed_call,
    run,
    run_in_place,
    used_parts,
)
from operator_cases import (
    CACHES,
    INPUTS,
    MASKS,
    Arrays,
    Dims,
    attributes_for,
    empty_state,
    metric_of,
    new_call,
    same_bits,
)
from oracle import Attributes
from torch_calls import arrays, run_op, tensors

from vkvx.format import QUANTIZERS, SCORE_CORRECTIONS
from vkvx.plugins.reference import quantization, shaping

# calls on one cache: scattered slots, idle rows, no to three groups per row, decode steps with and without an empty
# group, later turns with pictures beside decode steps of other rows, rows with padding
CONVERSATION: tuple[tuple[list[tuple[int, str]], dict[str, int]], ...] = (
    ([(3, "t4 p128 t2"), (-1, "t2 p9"), (0, "t3"), (5, "p100 t1 p20 _2 p30 t2"), (2, "")], {"spare": 2}),
    ([(5, "t1"), (3, "t1"), (0, "t1")], {}),
    ([(0, "t1"), (1, "t1"), (-1, ""), (3, "t1"), (5, "t1")], {"empty_groups": 1}),
    ([(0, "t1 p40 t2 p20"), (3, "t5"), (-1, "t1"), (1, "_3"), (5, "_1 t1")], {"empty_groups": 1, "spare": 1}),
    ([(1, "t1"), (0, "t1")], {}),
)


def converse(attributes: Attributes, dims: Dims, seed: int = 0, opset: int = 18) -> Arrays:
    rng = np.random.default_rng(seed)
    state = empty_state(dims, attributes, rng)
    for rows, padding in CONVERSATION:
        inputs = new_call(rows, state, dims, attributes, rng, garbage=np.nan, **padding)
        state = call_and_compare(inputs, attributes, dims, opset)
    return state


# --- agreement with the torch op --------------------------------------------------------------------------------------

HEADS = ((2, 2, 32), (4, 1, 64), (8, 2, 32), (1, 1, 128))
CASES = [
    (bits, quantizer, correction, HEADS[(i + j + k) % 4], ("float16", "float32")[(i + j + k // 2) % 2])
    for i, bits in enumerate((1, 2, 4, 8))
    for j, quantizer in enumerate(QUANTIZERS)
    for k, correction in enumerate(SCORE_CORRECTIONS)
]


@pytest.mark.parametrize(("bits", "quantizer", "correction", "heads", "float_type"), CASES)
def test_conversations_agree(
    bits: int, quantizer: str, correction: str, heads: tuple[int, int, int], float_type: str
) -> None:
    hq, hkv, d = heads
    attributes = attributes_for(bits, bits, quantizer=quantizer, score_correction=correction, scale=d**-0.5)
    dims = Dims(query_heads=hq, kv_heads=hkv, head_dim=d, float_type=float_type)
    state = converse(attributes, dims)
    assert state["visual_count"].tolist() == [
        [40, 20, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [128, 0, 0, 0],
        [0, 0, 0, 0],
        [100, 20, 30, 0],
    ]
    assert state["text_count"].tolist() == [9, 2, 0, 13, 0, 6]


@pytest.mark.parametrize("float_type", ["float16", "float32"])
@pytest.mark.parametrize("heads", HEADS)
def test_sixteen_bits_agree(heads: tuple[int, int, int], float_type: str) -> None:
    hq, hkv, d = heads
    dims = Dims(query_heads=hq, kv_heads=hkv, head_dim=d, float_type=float_type, text_rows=180)
    attributes = attributes_for(16, 16, scale=d**-0.5)
    state = converse(attributes, dims)
    assert state["text_count"].tolist() == [69, 2, 0, 141, 0, 156]
    assert state["visual_key"].shape[2] == 0


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "correction"), [(1, 8, "affine"), (8, 1, "expected"), (4, 2, "none"), (2, 4, "expected")]
)
@pytest.mark.parametrize("quantizer", ["lloyd", "shaped"])
def test_key_and_value_bits_may_differ(key_bits: int, value_bits: int, correction: str, quantizer: str) -> None:
    attributes = attributes_for(key_bits, value_bits, score_correction=correction, quantizer=quantizer)
    converse(attributes, Dims(), seed=1)


@pytest.mark.parametrize("more", MASKS, ids=str)
@pytest.mark.parametrize(("bits", "quantizer", "opset"), [(1, "lloyd", 18), (2, "shaped", 17), (16, "lloyd", 21)])
def test_windows_masks_and_softcaps(more: dict[str, object], bits: int, quantizer: str, opset: int) -> None:
    attributes = attributes_for(bits, bits, quantizer=quantizer, **more)
    converse(attributes, Dims(text_rows=180, query_heads=8, float_type="float16"), opset=opset)


@pytest.mark.parametrize(("bits", "quantizer"), [(1, "lloyd"), (1, "shaped"), (16, "lloyd")])
def test_long_decode_and_a_second_picture(bits: int, quantizer: str) -> None:
    """A picture of LLaVA's size in one group of five tiles, 64 decode steps, a second turn with another one."""
    attributes = attributes_for(bits, bits, quantizer=quantizer, group_size=640, scale=64**-0.5)
    rows = 90 if bits == 1 else 1300
    dims = Dims(slots=2, query_heads=2, kv_heads=2, head_dim=64, groups=3, text_rows=rows, float_type="float16")
    rng = np.random.default_rng(0)
    state = empty_state(dims, attributes, rng)
    for layout in ("t5 p576 t9", *["t1"] * 64, "t2 p576 t3", "t1"):
        inputs = new_call([(1, layout)], state, dims, attributes, rng)
        state = call_and_compare(inputs, attributes, dims)
    assert state["text_count"][1] == 84 + (0 if bits == 1 else 1152)


@pytest.mark.parametrize(
    ("bits", "rotary_dim", "rotary_interleaved"), [(1, 0, 0), (4, 0, 0), (1, 0, 1), (2, 32, 0), (1, 48, 1)]
)
def test_shaped_groups_of_three_tiles(bits: int, rotary_dim: int, rotary_interleaved: int) -> None:
    """Up to three groups per row beside none, with a smaller error in the metric than nearest levels leave."""
    rotary = {"rotary_dim": rotary_dim, "rotary_interleaved": rotary_interleaved}
    shaped = attributes_for(bits, bits, quantizer="shaped", group_size=384, **rotary)
    dims = Dims(query_heads=2, head_dim=64, float_type="float16")
    rng = np.random.default_rng(4)
    state = empty_state(dims, shaped, rng)
    inputs = new_call([(1, "t2 p384 p500 t1"), (0, "t3"), (4, "p30")], state, dims, shaped, rng, garbage=np.nan)
    if rotary_dim:
        inputs["rotation"][:, 0, rotary_dim:], inputs["rotation"][:, 1, rotary_dim:] = 1, 0
    call_and_compare(inputs, shaped, dims)
    errors, nearest = metric_errors(inputs, run(inputs, shaped, dims), shaped)
    # See test_shaping.py: no step of the pass over the channels adds to the error.
    assert all(errors[name] < nearest[name] for name in ("key", "value")), (errors, nearest)


def metric_errors(inputs: Arrays, results: Arrays, attributes: Attributes) -> tuple[dict[str, float], dict[str, float]]:
    """The sum of e . H e over the tokens of all groups of a call, of keys and of values; and with nearest codes."""
    sums, nearest = {"key": 0.0, "value": 0.0}, {"key": 0.0, "value": 0.0}
    for new in appended_by(inputs, attributes):
        for g, positions in enumerate(new.groups):
            for name in sums:
                group, metric = new.first_group + g, metric_of(inputs, name, new.row, attributes)
                levels = results[f"visual_{name}_params"][new.slot, :, group, :2].astype(np.float64)
                codes = codes_of(name, results, new.slot, group, attributes)[:, : len(positions)]
                x = inputs[name][new.row][:, positions]
                residual = x - (levels[:, 1:] + levels[:, :1] * codes)
                sums[name] += ((residual @ metric) * residual).sum()
                tokens, h = torch.from_numpy(x).float(), torch.from_numpy(metric).float()
                bits, everyone = getattr(attributes, f"{name}_bits"), torch.ones(x.shape[:-1], dtype=torch.bool)
                found = shaping._levels(tokens, everyone, bits, shaping.level_distance(h, bits))
                residual = x - quantization.decode(quantization.encode(tokens, *found, bits), *found).numpy()
                nearest[name] += ((residual @ metric) * residual).sum()
    return sums, nearest


@pytest.mark.parametrize("opset", [17, 21, 23])
def test_other_opsets(opset: int) -> None:
    for attributes in (
        attributes_for(2, 2, quantizer="quantile", score_correction="affine"),
        attributes_for(1, 2, quantizer="shaped"),
        attributes_for(16, 16),
    ):
        converse(attributes, Dims(text_rows=180), opset=opset)


@pytest.mark.parametrize("correction", SCORE_CORRECTIONS)
def test_sharp_scores(correction: str) -> None:
    attributes = attributes_for(1, 1, score_correction=correction, scale=32**-0.5)
    dims = Dims(float_type="float32")
    rng = np.random.default_rng(2)
    state = empty_state(dims, attributes, rng)
    for rows in ([(0, "t3 p128 t2"), (1, "p1")], [(0, "t4"), (1, "t4")]):
        inputs = new_call(rows, state, dims, attributes, rng, sharpness=8.0)
        state = call_and_compare(inputs, attributes, dims)


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_constant_and_non_finite_channels(bits: int, quantizer: str) -> None:
    attributes = attributes_for(bits, bits, quantizer=quantizer)
    dims = Dims(float_type="float16")
    rng = np.random.default_rng(3)
    inputs = new_call([(4, "t2 p70"), (1, "p5 t3")], empty_state(dims, attributes, rng), dims, attributes, rng)
    for name in ("key", "value"):
        x = inputs[name]
        x[..., 0] = 0.0
        x[..., 1] = -3.25
        x[..., 2] = 65504.0
        x[..., 3] = 6e-8
        x[:, :, 4::7, 4] = np.nan
        x[:, :, 4::5, 5] = np.inf
        x[:, :, 4::5, 6] = -np.inf
        x[:, :, 4, 7] = 60000.0
    with np.errstate(invalid="ignore"):
        expected = arrays(run_op(tensors(inputs, "float16"), attributes))
        results = run(inputs, attributes, dims)
    for new in appended_by(inputs, attributes):
        for group, positions in enumerate(new.groups):
            for name in ("key", "value"):
                x = inputs[name][new.row][:, positions]
                metric = metric_of(inputs, name, new.row, attributes)
                compare_group(name, x, new.slot, group, results, expected, attributes, metric)
                levels = results[f"visual_{name}_params"][new.slot, :, group]
                assert np.array_equal(levels[:, 0, :3], np.zeros_like(levels[:, 0, :3]))
                assert np.array_equal(levels[0, 1, :3], np.array([0, -3.25, 65504], np.float16))


@pytest.mark.parametrize("float_type", ["float16", "float32"])
def test_a_level_beyond_the_fp16_range(float_type: str) -> None:
    """Rounding puts the upper level of 7 and 65504 at 7 + 3 * 21840 = 65527, which FP16 would make infinite."""
    attributes = attributes_for(2, 2, quantizer="minmax", scale=1.0)
    dims = Dims(query_heads=2, float_type=float_type)
    rng = np.random.default_rng(0)
    state = empty_state(dims, attributes, rng)
    inputs = new_call([(1, "p20 t1")], state, dims, attributes, rng)
    inputs["key"][:], inputs["value"][:] = 0.0, 7.0
    inputs["key"][:, :, :10, 0], inputs["value"][:, :, :10] = 16.0, 65504.0
    state = call_and_compare(inputs, attributes, dims)
    inputs = new_call([(1, "t1")], state, dims, attributes, rng)
    inputs["query"][:] = 4.0
    inputs["key"][:], inputs["value"][:] = 0.0, 0.0
    call_and_compare(inputs, attributes, dims)
    top = run(inputs, attributes, dims)["output"]
    assert np.abs(top - (65504.0 if float_type == "float16" else 65527.0)).max() < 0.1


# --- rules of the operator --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "quantizer"), [(1, "lloyd"), (4, "lloyd"), (1, "shaped"), (16, "lloyd")])
@pytest.mark.parametrize("correction", SCORE_CORRECTIONS)
def test_nothing_past_the_counts_matters(bits: int, quantizer: str, correction: str) -> None:
    attributes, dims = attributes_for(bits, bits, quantizer=quantizer, score_correction=correction), Dims(text_rows=160)
    inputs = mixed_call(attributes, dims)
    clean = {name: x.copy() for name, x in inputs.items()}
    for slot in range(dims.slots):
        used = used_parts(clean, clean, slot, attributes)
        for name, part in zip(CACHES, used, strict=True):
            clean[name][slot, :, part.shape[1] :] = 0
    first, second = run(inputs, attributes, dims), run(clean, attributes, dims)
    assert same_bits(first["output"], second["output"])
    counts = counts_after(inputs, attributes)
    for slot in (0, 2, 5):
        parts = (used_parts(results, counts, slot, attributes) for results in (first, second))
        assert all(map(same_bits, *parts))
    assert bits == 16 or (first["visual_key"][2] < 0).any(), "no word has its top bit set"


@pytest.mark.parametrize(("bits", "quantizer"), [(1, "lloyd"), (1, "shaped"), (16, "lloyd")])
@pytest.mark.parametrize("float_type", ["float16", "float32"])
def test_one_buffer_for_input_and_output(bits: int, quantizer: str, float_type: str) -> None:
    attributes, dims = attributes_for(bits, bits, quantizer=quantizer), Dims(text_rows=160, float_type=float_type)
    inputs = mixed_call(attributes, dims)
    for rows in ([], [1]):
        call = inputs if not rows else one_row(inputs, rows[0])
        apart, in_place = run(call, attributes, dims), run_in_place(call, attributes, dims)
        assert all(same_bits(apart[name], in_place[name]) for name in apart)


def one_row(inputs: Arrays, row: int) -> Arrays:
    """One row of a call with its padding cut off."""
    rows = {name: inputs[name][row : row + 1] for name in (*INPUTS[:6], "rotation") if name in inputs}
    for name in ("visual_index", "text_index"):
        rows[name] = rows[name][:, rows[name][0] >= 0] if name == "text_index" else rows[name]
    if not (rows["visual_index"] >= 0).any():
        rows["visual_index"] = rows["visual_index"][:, :0]
    length = max(int(rows["text_index"].max(initial=0)), int(rows["visual_index"].max(initial=0))) + 1
    for name in ("query", "key", "value"):
        rows[name] = np.ascontiguousarray(rows[name][:, :, :length])
    return {**inputs, **rows}


@pytest.mark.parametrize(("bits", "quantizer"), [(1, "lloyd"), (2, "lloyd"), (1, "shaped"), (16, "lloyd")])
def test_a_row_gets_alone_what_it_gets_in_a_batch(bits: int, quantizer: str) -> None:
    attributes, dims = attributes_for(bits, bits, quantizer=quantizer), Dims(text_rows=160)
    inputs = mixed_call(attributes, dims)
    together = run(inputs, attributes, dims)
    counts = counts_after(inputs, attributes)
    for row, slot in enumerate(inputs["slot"]):
        call = one_row(inputs, row)
        alone = run(call, attributes, dims)
        length = call["query"].shape[2]
        np.testing.assert_allclose(alone["output"][0], together["output"][row, :, :length], rtol=1e-5, atol=1e-6)
        parts = (used_parts(results, counts, int(slot), attributes) for results in (alone, together))
        assert all(map(same_bits, *parts))


@pytest.mark.parametrize(("bits", "quantizer"), [(1, "lloyd"), (1, "shaped"), (16, "lloyd")])
def test_no_visual_entries_are_as_good_as_empty_groups(bits: int, quantizer: str) -> None:
    attributes, dims = attributes_for(bits, bits, quantizer=quantizer), Dims(text_rows=160)
    inputs = one_row(mixed_call(attributes, dims), 1)
    assert inputs["visual_index"].shape[1] == 0
    padded = {**inputs, "visual_index": np.full((1, attributes.group_size), -1, np.int32)}
    none, empty = run(inputs, attributes, dims), run(padded, attributes, dims)
    np.testing.assert_allclose(none["output"], empty["output"], rtol=1e-5, atol=1e-6)
    counts = counts_after(inputs, attributes)
    assert all(map(same_bits, used_parts(none, counts, 0, attributes), used_parts(empty, counts, 0, attributes)))


@pytest.mark.parametrize(("bits", "quantizer"), [(1, "lloyd"), (1, "shaped"), (16, "lloyd")])
def test_idle_calls_change_nothing(bits: int, quantizer: str) -> None:
    attributes, dims = attributes_for(bits, bits, quantizer=quantizer), Dims(text_rows=160)
    inputs = mixed_call(attributes, dims)
    idle = {**inputs, "slot": np.full(3, -1, np.int32)}
    nothing = {**idle, "visual_index": np.zeros((3, 0), np.int32), "text_index": np.zeros((3, 0), np.int32)}
    for call in (idle, nothing, {**nothing, "slot": inputs["slot"]}):
        for results in (run(call, attributes, dims), run_in_place(call, attributes, dims)):
            assert not results["output"].any()
            assert all(same_bits(results[name], inputs[name]) for name in CACHES)


@pytest.mark.parametrize(("bits", "quantizer"), [(1, "lloyd"), (1, "shaped"), (16, "lloyd")])
def test_what_does_not_fit_is_dropped(bits: int, quantizer: str) -> None:
    attributes, dims = (
        attributes_for(bits, bits, quantizer=quantizer),
        Dims(groups=3, text_rows=12, float_type="float16"),
    )
    roomy = replace(dims, groups=8, text_rows=200)
    if bits == 16:
        layouts = [(4, "t2 p9"), (1, "t12"), (3, "t1"), (-1, "t1")]
    else:
        layouts = [(4, "t9 p20 p30"), (1, "t12 p4 p5 p6"), (3, "t1"), (-1, "t1")]
    rng = np.random.default_rng(7)
    state = empty_state(dims, attributes, rng)
    inputs = new_call(layouts, state, dims, attributes, rng)
    results = run(inputs, attributes, dims)
    state = {name: results[name] for name in CACHES} | counts_after(inputs, attributes)

    second = [(1, "p3 t2"), (4, "t1 p7 p8 t5"), (2, "t1"), (-1, "t3")]
    call = new_call(second, state, dims, attributes, rng)
    results = run(call, attributes, dims)
    large = {name: x.copy() for name, x in empty_state(roomy, attributes, rng).items()}
    for name in (*CACHES, "visual_count"):
        part = tuple(slice(n) for n in state[name].shape)
        large[name][part] = state[name]
    large["text_count"] = state["text_count"]
    wanted = run({**call, **large}, attributes, roomy)
    # The order of a sum may depend on the capacity, the attention does not.
    np.testing.assert_allclose(results["output"], wanted["output"], rtol=2e-3, atol=1e-4)
    counts = counts_after({**call, **large}, attributes)
    capacity = {"visual_count": counts["visual_count"][:, :3], "text_count": np.minimum(counts["text_count"], 12)}
    if bits == 16:
        capacity["visual_count"] = capacity["visual_count"][:, :0]
    for slot in range(dims.slots):
        if slot in (1, 2, 4):
            assert all(map(same_bits, *(used_parts(r, capacity, slot, attributes) for r in (results, wanted)))), (
                f"slot {slot}"
            )
        else:
            assert all(same_bits(results[name][slot], state[name][slot]) for name in CACHES)

    # A call in which nothing fits: a full row beside an idle one.
    full = new_call([(1, "p3 t2" if bits == 1 else "t2"), (-1, "t1")], state, dims, attributes, rng)
    for results in (run(full, attributes, dims), run_in_place(full, attributes, dims)):
        assert all(same_bits(results[name], state[name]) for name in CACHES)
