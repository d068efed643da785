"""The torch reference of the operator against the slow NumPy oracle, and what the operator's text promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import CACHES, INPUTS, MASKS, Arrays, Dims, attributes_for, check, empty_state, new_call
from oracle import Attributes
from torch_calls import TORCH_TYPES, arguments, arrays, in_order, run_op, same_bits, tensors

from vkvx.format import METRIC_QUANTIZERS, QUANTIZERS, SCORE_CORRECTIONS

OWN_LEVELS = tuple(name for name in QUANTIZERS if name not in METRIC_QUANTIZERS)
PARAMS = ("visual_key_params", "visual_value_params")

# calls on one cache: scattered slots, idle rows, no to three pictures per row, decode steps with and without an empty
# group, a prefill between them, later turns with and without pictures
CONVERSATION: tuple[tuple[list[tuple[int, str]], dict[str, int]], ...] = (
    ([(3, "t4 p128 t2"), (-1, "t2 p9"), (0, "t3"), (5, "p100 t1 p20 _2 p30 t2"), (2, "")], {"spare": 2}),
    ([(5, "t1"), (3, "t1"), (0, "t1")], {}),
    ([(1, "t2 p60 t3")], {}),
    ([(0, "t1"), (1, "t1"), (-1, ""), (3, "t1"), (5, "t1")], {"empty_groups": 1}),
    ([(0, "t1 p40 t2 p20"), (3, "t5"), (-1, "t1"), (1, "_3")], {"empty_groups": 1, "spare": 1}),
    ([(1, "t1"), (0, "t1")], {}),
)


def run_and_check(inputs: Arrays, attributes: Attributes, dims: Dims) -> Arrays:
    """One call of both ops, compared with each other and with the oracle; returns the state afterwards."""
    named = tensors(inputs, dims.float_type)
    before = {name: t.clone() for name, t in named.items()}
    results = run_op(named, attributes)
    for name in INPUTS:
        assert same_bits(named[name], before[name]), f"the functional op changed {name}"
    output = torch.ops.vkvx.visual_kv_attention_(*in_order(named), **arguments(attributes))
    assert same_bits(output, results["output"])
    for name in INPUTS:
        assert same_bits(named[name], results[name] if name in CACHES else before[name])
    assert results["output"].dtype == TORCH_TYPES[dims.float_type]
    return check(inputs, arrays(results), attributes, dims)


def converse(attributes: Attributes, dims: Dims, seed: int = 0, sharpness: float = 1.0) -> Arrays:
    rng = np.random.default_rng(seed)
    state = empty_state(dims, attributes, rng)
    for rows, padding in CONVERSATION:
        inputs = new_call(rows, state, dims, attributes, rng, sharpness=sharpness, **padding)
        state = run_and_check(inputs, attributes, dims)
    return state


# --- against the oracle -----------------------------------------------------------------------------------------------

BIT_PAIRS = [(1, 1), (2, 2), (4, 4), (8, 8), (1, 4), (8, 2)]
CASES = [
    # (bits, quantizer, correction, query heads, KV heads, head dim, float type): every pair of bits with every
    # quantizer and every correction, the rest in turn
    (
        *pair,
        quantizer,
        SCORE_CORRECTIONS[(i + j) % 3],
        *((4, 2), (4, 1), (2, 2))[(i + 2 * j) % 3],
        32 * (1 + (i + j) % 2),
        t,
    )
    for i, pair in enumerate(BIT_PAIRS)
    for j, (quantizer, t) in enumerate(zip(OWN_LEVELS, ("float32", "float16", "bfloat16", "float32"), strict=True))
]


@pytest.mark.parametrize(("kb", "vb", "quantizer", "correction", "hq", "hkv", "d", "float_type"), CASES)
def test_conversations_agree_with_the_oracle(
    kb: int, vb: int, quantizer: str, correction: str, hq: int, hkv: int, d: int, float_type: str
) -> None:
    attributes = attributes_for(kb, vb, quantizer=quantizer, score_correction=correction, scale=d**-0.5)
    dims = Dims(query_heads=hq, kv_heads=hkv, head_dim=d, float_type=float_type)
    state = converse(attributes, dims)
    assert state["visual_count"].tolist() == [
        [40, 20, 0, 0],
        [60, 0, 0, 0],
        [0, 0, 0, 0],
        [128, 0, 0, 0],
        [0, 0, 0, 0],
        [100, 20, 30, 0],
    ]
    assert state["text_count"].tolist() == [9, 7, 0, 13, 0, 5]


@pytest.mark.parametrize(
    ("float_type", "more"), [("float16", {}), ("bfloat16", {"sliding_window": 3, "visual_mask": "run"})]
)
def test_text_rows_of_8_bits_agree_with_the_oracle(float_type: str, more: dict[str, object]) -> None:
    converse(attributes_for(1, 1, text_bits=8, **more), Dims(float_type=float_type))


@pytest.mark.parametrize("float_type", TORCH_TYPES)
@pytest.mark.parametrize("correction", SCORE_CORRECTIONS)
def test_conversations_at_16_bits_agree_with_the_oracle(float_type: str, correction: str) -> None:
    attributes = attributes_for(16, 16, score_correction=correction)
    dims = Dims(text_rows=170, float_type=float_type)
    state = converse(attributes, dims)
    assert state["text_count"].tolist() == [69, 67, 0, 141, 0, 155]


@pytest.mark.parametrize("more", MASKS, ids=str)
@pytest.mark.parametrize(("bits", "float_type"), [(1, "float32"), (4, "float16"), (16, "float32")])
def test_windows_masks_and_softcaps_agree_with_the_oracle(more: dict[str, object], bits: int, float_type: str) -> None:
    attributes = attributes_for(bits, bits, **more)
    dims = Dims(text_rows=170, float_type=float_type)
    converse(attributes, dims, sharpness=2.0)
    plain = attributes_for(bits, bits)
    inputs = new_call(
        [(1, "t2 p40 t5")],
        empty_state(dims, attributes, np.random.default_rng(1)),
        dims,
        attributes,
        np.random.default_rng(1),
    )
    changed = run_op(tensors(inputs, float_type), attributes)["output"]
    inputs.pop("window_start", None)
    assert (changed - run_op(tensors(inputs, float_type), plain)["output"]).abs().max() > 1e-2


@pytest.mark.parametrize("sharpness", [0.2, 6.0])
@pytest.mark.parametrize("correction", SCORE_CORRECTIONS)
def test_corrections_on_flat_and_sharp_scores(correction: str, sharpness: float) -> None:
    """Flat scores make `affine` clamp its slope, sharp ones make `expected` reach its limit."""
    for tau, limit in ((3.0, 3.0), (0.0, 0.1), (8.0, 50.0)):
        attributes = attributes_for(1, 2, score_correction=correction, tau=tau, correction_limit=limit)
        dims = Dims(slots=2)
        rng = np.random.default_rng(1)
        state = empty_state(dims, attributes, rng)
        for rows in ([(1, "t2 p150 t2")], [(1, "t3")]):
            inputs = new_call(rows, state, dims, attributes, rng, sharpness=sharpness)
            state = run_and_check(inputs, attributes, dims)


def test_corrections_differ_from_none() -> None:
    outputs = []
    for correction in SCORE_CORRECTIONS:
        attributes = attributes_for(1, 1, score_correction=correction)
        rng = np.random.default_rng(1)
        state = empty_state(Dims(), attributes, rng)
        state = run_and_check(new_call([(1, "t2 p150 t2")], state, Dims(), attributes, rng), attributes, Dims())
        outputs.append(run_op(tensors(new_call([(1, "t1")], state, Dims(), attributes, rng)), attributes)["output"])
    for i in range(3):
        assert (outputs[i] - outputs[i - 1]).abs().max() > 1e-3


ROW = st.lists(
    st.one_of(
        st.integers(0, 4).map("t{}".format),
        st.sampled_from(["p1", "p127", "p128", "p129", "p40", "p0"]),
        st.integers(1, 3).map("_{}".format),
    ),
    max_size=4,
).map(" ".join)


@given(
    st.lists(st.lists(ROW, min_size=1, max_size=4), min_size=1, max_size=3),
    st.permutations(range(5)),
    st.sampled_from([1, 2, 4, 8, 16]),
    st.sampled_from(OWN_LEVELS),
    st.sampled_from(SCORE_CORRECTIONS),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_random_calls_agree_with_the_oracle(
    calls: list[list[str]], order: list[int], bits: int, quantizer: str, correction: str, seed: int
) -> None:
    attributes = attributes_for(bits, bits, quantizer=quantizer, score_correction=correction)
    dims = Dims(slots=4, query_heads=2, kv_heads=1, groups=24, text_rows=1700 if bits == 16 else 60)
    rng = np.random.default_rng(seed)
    state = empty_state(dims, attributes, rng)
    for rows in calls:
        # slot 4 of the permutation stands for an idle row
        slots = [slot if slot < 4 else -1 for slot in order]
        call = new_call(list(zip(slots, rows, strict=False)), state, dims, attributes, rng, spare=seed % 2)
        state = run_and_check(call, attributes, dims)


@pytest.mark.parametrize("group_size", [256, 384])
def test_groups_of_several_tiles(group_size: int) -> None:
    attributes = attributes_for(2, 1, group_size=group_size)
    dims = Dims(slots=3, groups=3)
    rng = np.random.default_rng(group_size)
    state = empty_state(dims, attributes, rng)
    for rows in ([(2, "t1 p300 t1"), (0, "p130")], [(0, "t2"), (2, "t1")]):
        state = run_and_check(new_call(rows, state, dims, attributes, rng), attributes, dims)
    assert state["visual_count"][2].tolist() == ([256, 44, 0] if group_size == 256 else [300, 0, 0])


def test_rewound_counts() -> None:
    """What the runtime has rewound past is overwritten, and affects nothing before."""
    attributes, dims = attributes_for(1, 1), Dims()
    state = converse(attributes, dims)
    state["text_count"][3] -= 4
    state["visual_count"][5, 1:] = 0
    rng = np.random.default_rng(9)
    inputs = new_call([(5, "t1 p50 t1"), (3, "t2")], state, dims, attributes, rng)
    state = run_and_check(inputs, attributes, dims)
    assert state["visual_count"][5].tolist() == [100, 50, 0, 0]
    assert state["text_count"][3] == 11


# --- what affects nothing ---------------------------------------------------------------------------------------------


def filled(bits: int, **more: object) -> tuple[Attributes, Dims, Arrays]:
    attributes = attributes_for(bits, bits, **more)
    dims = Dims(text_rows=220 if bits == 16 else 40)
    return attributes, dims, converse(attributes, dims)


LIVE = [(5, "t2 p40 t1"), (-1, ""), (3, "t1"), (0, "p20 t3"), (2, "t2")]


@pytest.mark.parametrize("correction", SCORE_CORRECTIONS)
@pytest.mark.parametrize("bits", [1, 4, 16])
def test_garbage_past_the_counts_changes_nothing(bits: int, correction: str) -> None:
    attributes, dims, state = filled(bits, score_correction=correction)
    inputs = new_call(LIVE, state, dims, attributes, np.random.default_rng(2), spare=3)
    poisoned = {name: a.copy() for name, a in inputs.items()}
    rng = np.random.default_rng(3)
    for slot in range(dims.slots):
        texts = inputs["text_count"][slot]
        for name in ("text_key", "text_value"):
            poisoned[name][slot, :, texts:] = rng.choice([0.0, np.inf, -np.inf, 1e30, np.nan])
        groups = int((inputs["visual_count"][slot] > 0).sum())
        for name in PARAMS:
            poisoned[name][slot, :, groups:] = rng.choice([0.0, np.inf, -np.inf, 6e4, np.nan])
        for name in ("visual_key", "visual_value"):
            poisoned[name][slot, :, groups:] = -1
    one, other = (run_op(tensors(i), attributes) for i in (inputs, poisoned))
    assert same_bits(one["output"], other["output"])
    check(poisoned, arrays(other), attributes, dims)
    if bits != 16:  # padding inside a group: the words may hold anything, too, in a cache written by someone else
        count = inputs["visual_count"][5, 0]
        assert count < 128
        poisoned["visual_key"][5, :, 0, :, count:] = -1
        assert same_bits(one["output"], run_op(tensors(poisoned), attributes)["output"])


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 0.0])
@pytest.mark.parametrize("bits", [1, 16])
def test_garbage_at_padding_positions_changes_nothing(bits: int, garbage: float) -> None:
    attributes, dims, state = filled(bits)
    one, other = (
        run_op(
            tensors(new_call(LIVE, state, dims, attributes, np.random.default_rng(2), spare=3, garbage=g)), attributes
        )
        for g in (1.0, garbage)
    )
    for name in ("output", *CACHES):
        assert same_bits(one[name], other[name]), name


@pytest.mark.parametrize("bits", [1, 2, 16])
def test_rows_of_a_batch_get_what_they_get_alone(bits: int) -> None:
    attributes, dims, state = filled(bits)
    inputs = new_call(LIVE, state, dims, attributes, np.random.default_rng(4))
    together = run_op(tensors(inputs), attributes)
    for b, (slot, _) in enumerate(LIVE):
        single = inputs | {n: inputs[n][b : b + 1] for n in INPUTS[:6]}
        alone = run_op(tensors(single), attributes)
        torch.testing.assert_close(together["output"][b : b + 1], alone["output"], rtol=1e-6, atol=1e-6)
        for name in CACHES:
            for other in range(dims.slots):
                want = alone[name][other] if other == slot else torch.from_numpy(inputs[name][other])
                if other == slot or other not in [s for s, _ in LIVE]:
                    assert same_bits(together[name][other], want), (name, other)


@pytest.mark.parametrize("bits", [1, 16])
def test_the_slot_changes_nothing(bits: int) -> None:
    attributes, dims, state = filled(bits)
    inputs = new_call(LIVE, state, dims, attributes, np.random.default_rng(4))
    order = np.random.default_rng(5).permutation(dims.slots)  # slot s moves to order[s]
    moved = dict(inputs)
    for name in INPUTS[6:]:
        moved[name] = np.empty_like(inputs[name])
        moved[name][order] = inputs[name]
    moved["slot"] = np.where(inputs["slot"] < 0, -1, order[inputs["slot"]]).astype(np.int32)
    one, other = (run_op(tensors(i), attributes) for i in (inputs, moved))
    assert same_bits(one["output"], other["output"])
    for name in CACHES:
        assert same_bits(one[name], other[name][torch.from_numpy(order)]), name


def test_a_call_of_idle_rows_does_nothing() -> None:
    attributes, dims, state = filled(1)
    inputs = new_call([(-1, "t3 p20"), (-1, "t1")], state, dims, attributes, np.random.default_rng(4))
    results = run_op(tensors(inputs), attributes)
    assert not results["output"].any()
    for name in CACHES:
        assert same_bits(results[name], tensors(inputs)[name])


@given(st.lists(st.integers(1, 39), max_size=4, unique=True).map(sorted))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_cuts_change_nothing_at_16_bits(cuts: list[int]) -> None:
    attributes, dims = attributes_for(16, 16), Dims(slots=2, text_rows=40)
    rng = np.random.default_rng(6)
    state = empty_state(dims, attributes, rng)
    whole = new_call([(1, "t4 p20 t5 p8 t3")], state, dims, attributes, rng)
    want = run_op(tensors(whole), attributes)
    outputs = []
    for start, end in zip([0, *cuts], [*cuts, 40], strict=True):
        part = dict(whole)
        for name in ("query", "key", "value"):
            part[name] = whole[name][:, :, start:end]
        for name in ("visual_index", "text_index"):
            index = whole[name][0]
            part[name] = np.array([[i - start for i in index if start <= i < end]], np.int32).reshape(1, -1)
        part.update(state)
        results = run_op(tensors(part), attributes)
        outputs.append(results["output"])
        state = arrays({n: results[n] for n in CACHES}) | {
            "visual_count": state["visual_count"],
            "text_count": np.array([0, end], np.int32),
        }
    torch.testing.assert_close(torch.cat(outputs, 2), want["output"], rtol=1e-5, atol=1e-6)
    for name in ("text_key", "text_value"):
        assert same_bits(torch.from_numpy(state[name][1, :, :40]), want[name][1, :, :40])


def test_cuts_at_group_ends_see_dequantised_pictures() -> None:
    """At 1 bit a cut does change the output: a later call reads the picture from the packed cache."""
    attributes, dims = attributes_for(1, 1), Dims(slots=1)
    rng = np.random.default_rng(6)
    state = empty_state(dims, attributes, rng)
    whole = new_call([(0, "p128 t4")], state, dims, attributes, rng)
    want = run_op(tensors(whole), attributes)
    first = whole | {n: whole[n][:, :, :128] for n in ("query", "key", "value")}
    first["text_index"] = np.full((1, 1), -1, np.int32)
    state = run_and_check(first, attributes, dims)
    second = whole | {n: whole[n][:, :, 128:] for n in ("query", "key", "value")} | state
    second.update(visual_index=np.zeros((1, 0), np.int32), text_index=np.arange(4, dtype=np.int32)[None])
    results = run_op(tensors(second), attributes)
    for name in CACHES:
        assert same_bits(results[name], want[name])
    assert (results["output"] - want["output"][:, :, 128:]).abs().max() > 1e-3
