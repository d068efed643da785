"""The operator's ONNX function as a model of one node, and its results against the torch op's on the same inputs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper
from operator_cases import CACHES, Arrays, Dims, empty_state, metric_of, new_call, same_bits
from oracle import Attributes, ulp16
from torch_calls import arrays, run_op, tensors

from vkvx.plugins import operator
from vkvx.plugins.function import DTYPES, attention_function
from vkvx.plugins.reference import quantization

TOLERANCE = {"float32": 1e-5, "float16": 1e-3}
"""Difference of outputs allowed, as a part of the largest output."""
SHAPED_TOLERANCE = {1: (0.97, 0.01), 2: (0.85, 0.01), 4: (0.8, 0.01), 8: (0.7, 0.05)}
"""By bits: the least part of equal codes of a group of ``shaped``, and the largest part by which its error differs.

Of 384 groups each of 20 to 128 tokens, the worst had 0.993, 0.936, 0.900, 0.831 and 0.0002, 0.004, 0.004, 0.023.
"""

# --- the function in a model of one node ------------------------------------------------------------------------------


def function_for(attributes: Attributes, dims: Dims, opset: int = 18, overload: str = "body") -> onnx.FunctionProto:
    return attention_function(
        operator.OperatorAttributes(**asdict(attributes)),
        query_heads=dims.query_heads,
        kv_heads=dims.kv_heads,
        head_dim=dims.head_dim,
        dtype=dims.float_type,
        opset=opset,
        overload=overload,
    )


def model_for(attributes: Attributes, dims: Dims, opset: int = 18) -> onnx.ModelProto:
    """One node with the names of the definition; caches come out as ``present_*``; all shapes but heads dynamic."""
    types = {**DTYPES, "int32": onnx.TensorProto.INT32, "T": DTYPES[dims.float_type]}
    bits = (1, 1) if attributes.key_bits == 16 else (attributes.key_bits, attributes.value_bits)
    sizes = {"Hq": dims.query_heads, "Hkv": dims.kv_heads, "D": dims.head_dim, "D/32": dims.head_dim // 32}
    sizes["D/4+1"] = dims.head_dim // 4 + 1
    sizes |= {"bk": bits[0], "bv": bits[1]}

    def info(definition: operator.TensorDefinition, name: str) -> onnx.ValueInfoProto:
        shape = [sizes.get(d, int(d) if d.isdigit() else d) for d in definition.shape]
        return helper.make_tensor_value_info(name, types[definition.dtype], shape)

    present = [f"present_{t.name}" if t.name in CACHES else t.name for t in operator.OUTPUTS]
    function = function_for(attributes, dims, opset)
    definition = operator.OperatorAttributes(**asdict(attributes))
    inputs = {t.name: t for t in definition.inputs}
    node = helper.make_node(
        operator.NAME,
        [t.name for t in definition.inputs],
        present,
        "attention",
        domain=operator.DOMAIN,
        overload=function.overload,
        **definition.to_dict(),
    )
    graph = helper.make_graph(
        [node],
        "one_layer",
        [info(t, t.name) for t in definition.inputs],
        [info(inputs.get(t.name, t), name) for t, name in zip(operator.OUTPUTS, present, strict=True)],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(operator.DOMAIN, operator.VERSION)]
    return helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)


@lru_cache(maxsize=8)
def session_for(attributes: Attributes, dims: Dims, opset: int = 18) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = model_for(attributes, dims, opset).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(inputs: Arrays, attributes: Attributes, dims: Dims, opset: int = 18) -> Arrays:
    """Results by name: ``output`` and the caches."""
    results = session_for(attributes, dims, opset).run(None, inputs)
    return dict(zip(("output", *CACHES), results, strict=True))


def run_in_place(inputs: Arrays, attributes: Attributes, dims: Dims) -> Arrays:
    """The same with each cache's buffer bound to its input and its output."""
    session = session_for(attributes, dims)
    buffers = {name: x.copy() for name, x in inputs.items()}
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x) for name, x in buffers.items()}
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("output", "cpu")
    for name in CACHES:
        binding.bind_ortvalue_output(f"present_{name}", values[name])
    session.run_with_iobinding(binding)
    return {"output": binding.copy_outputs_to_cpu()[0], **{name: buffers[name] for name in CACHES}}


# --- what a call appends, and the comparison --------------------------------------------------------------------------


@dataclass(frozen=True)
class Appended:
    """What one row of a call adds to its slot: text rows from `text_start` on, and groups of visual tokens."""

    row: int
    slot: int
    text_start: int
    text: np.ndarray  # positions
    first_group: int
    groups: list[np.ndarray]  # positions


def appended_by(inputs: Arrays, attributes: Attributes) -> list[Appended]:
    result = []
    for row, slot in enumerate(inputs["slot"]):
        if slot < 0:
            continue
        visual, text = inputs["visual_index"][row], inputs["text_index"][row]
        if attributes.key_bits == 16:
            text, visual = np.sort(np.concatenate([visual, text])), visual[:0]
        groups = [g[g >= 0] for g in visual.reshape(-1, attributes.group_size)]
        first = int((inputs["visual_count"][slot] > 0).sum())
        start = int(inputs["text_count"][slot])
        result.append(Appended(row, int(slot), start, text[text >= 0], first, [g for g in groups if len(g)]))
    return result


def counts_after(inputs: Arrays, attributes: Attributes) -> Arrays:
    visual, text = inputs["visual_count"].copy(), inputs["text_count"].copy()
    for new in appended_by(inputs, attributes):
        text[new.slot] += len(new.text)
        for g, positions in enumerate(new.groups):
            visual[new.slot, new.first_group + g] = len(positions)
    return {"visual_count": visual, "text_count": text}


def used_parts(caches: Arrays, counts: Arrays, slot: int, attributes: Attributes) -> list[np.ndarray]:
    """The parts of a slot's caches that its counts cover (whole groups of visual tokens)."""
    groups = int((counts["visual_count"][slot] > 0).sum())
    tiles = groups * attributes.group_size // 128
    ends = {"visual_key": tiles, "visual_value": tiles, "text_key": counts["text_count"][slot]}
    ends |= {"visual_key_params": groups, "visual_value_params": groups, "text_value": counts["text_count"][slot]}
    return [caches[name][slot, :, : ends[name]] for name in CACHES]


def compare(inputs: Arrays, results: Arrays, expected: Arrays, attributes: Attributes, dims: Dims) -> Arrays:
    """Check a call's results against the torch op's and the rules for caches; the state after the call."""
    output, wanted = results["output"].astype(np.float64), expected["output"].astype(np.float64)
    assert np.isfinite(output).all()
    assert np.abs(output - wanted).max(initial=0.0) <= TOLERANCE[dims.float_type] * np.abs(wanted).max(initial=1e-6)
    assert not output[wanted == 0].any()

    counts = counts_after(inputs, attributes)
    live = {int(slot) for slot in inputs["slot"] if slot >= 0}
    for slot in range(dims.slots):
        if slot not in live:
            assert all(same_bits(results[name][slot], inputs[name][slot]) for name in CACHES), f"slot {slot} written"
        else:
            before = used_parts(inputs, inputs, slot, attributes)
            after = used_parts(results, inputs, slot, attributes)
            assert all(map(same_bits, before, after)), f"slot {slot}: cached tokens changed"
    for new in appended_by(inputs, attributes):
        rows = slice(new.text_start, new.text_start + len(new.text))
        for name in ("text_key", "text_value"):
            assert same_bits(results[name][new.slot, :, rows], expected[name][new.slot, :, rows]), name
        for g, positions in enumerate(new.groups):
            for name in ("key", "value"):
                x = inputs[name][new.row][:, positions]
                metric = metric_of(inputs, name, new.row, attributes)
                compare_group(name, x, new.slot, new.first_group + g, results, expected, attributes, metric)
    return {name: results[name] for name in CACHES} | counts


def compare_group(
    name: str,
    x: np.ndarray,
    slot: int,
    group: int,
    results: Arrays,
    expected: Arrays,
    attributes: Attributes,
    metric: np.ndarray | None = None,
) -> None:
    """Levels, codes and key RMS of one appended group; x is [Hkv, n, D], the metric [Hkv, D, D].

    Without a metric levels are within 2 FP16 ulp, and codes those of the levels unless within 1e-3 of a half-integer.
    """
    count = x.shape[1]
    params, wanted = (r[f"visual_{name}_params"][slot, :, group] for r in (results, expected))
    assert np.isfinite(params).all()
    levels, wanted_levels = params[:, :2].astype(np.float64), wanted[:, :2].astype(np.float64)
    clean = np.clip(np.nan_to_num(x.astype(np.float64)), -65504, 65504)
    # FP32 sums of large values that cancel: less than a FP16 ulp unless the offset is tiny beside the values.
    rounding = 2.0**-22 * np.abs(clean).max(1, keepdims=True)
    codes = codes_of(name, results, slot, group, attributes)
    assert not codes[:, count:].any(), f"{name}: bits of padding are set"
    codes = codes[:, :count]
    scale, offset = levels[:, :1], levels[:, 1:]
    residual = clean - (offset + scale * codes)
    rms = np.sqrt((residual**2).mean(1))
    bits = attributes.key_bits if name == "key" else attributes.value_bits
    wanted_codes = codes_of(name, expected, slot, group, attributes)[:, :count]
    # The offset of `shaped` is the mean of the tokens less that of scale times code.
    follows = np.zeros_like(levels)
    if metric is not None:
        follows[:, 1] = np.abs(levels[:, 0] * codes.mean(1) - wanted_levels[:, 0] * wanted_codes.mean(1))
    assert np.all(np.abs(levels - wanted_levels) <= 2 * ulp16(wanted_levels) + rounding + follows), name
    if metric is None:
        ratio = (clean - offset) / np.where(scale > 0, scale, np.inf)
        certain = np.abs(ratio - np.floor(ratio) - 0.5) > 1e-3
        nearest = np.clip(np.round(ratio), 0, 2**bits - 1)
        assert np.array_equal(codes[certain], nearest[certain]), name
    else:
        wanted_rest = clean - (wanted_levels[:, 1:] + wanted_levels[:, :1] * wanted_codes)
        compare_shaped(bits, (codes, wanted_codes), (residual, wanted_rest), metric)
        whole = ((residual @ metric) * residual).sum((1, 2)) / count
        apart = (rms**2 * np.diagonal(metric, axis1=1, axis2=2)).sum(1)
        rms *= np.sqrt(whole / np.where(apart > 0, apart, 1.0))[:, None]
    if name == "key":
        assert np.all(np.abs(params[:, 2] - np.minimum(rms, 65504)) <= 2 * ulp16(rms) + rounding[:, 0]), "key RMS"


def codes_of(name: str, caches: Arrays, slot: int, group: int, attributes: Attributes) -> np.ndarray:
    """Codes [Hkv, group_size, D] of a group."""
    tiles = attributes.group_size // 128
    words = torch.from_numpy(caches[f"visual_{name}"][slot, :, group * tiles : (group + 1) * tiles].copy())
    return (quantization.unpack_keys if name == "key" else quantization.unpack_values)(words).numpy()


Pair = tuple[np.ndarray, np.ndarray]


def compare_shaped(bits: int, codes: Pair, rests: Pair, metric: np.ndarray) -> None:
    """Results and those of the torch op, each [Hkv, n, D], by their errors in the metric and by what is equal.

    Rounding that tips one code changes later codes of its token; both results are then equally good. Most groups have
    all codes equal; ``SHAPED_TOLERANCE`` says how far apart the worst are.
    """
    least, most = SHAPED_TOLERANCE[bits]
    assert (codes[0] == codes[1]).mean() >= least
    errors = [((residual @ metric) * residual).sum() for residual in rests]
    assert abs(errors[0] - errors[1]) <= most * errors[1] + 1e-9


def call_and_compare(inputs: Arrays, attributes: Attributes, dims: Dims, opset: int = 18) -> Arrays:
    expected = arrays(run_op(tensors(inputs, dims.float_type), attributes))
    return compare(inputs, run(inputs, attributes, dims, opset), expected, attributes, dims)


def mixed_call(attributes: Attributes, dims: Dims, seed: int = 5) -> Arrays:
    """A later turn: row 0 adds a picture to one, row 1 decodes, row 2 is new; what lies past the counts is poison."""
    rng = np.random.default_rng(seed)
    state = empty_state(dims, attributes, rng)
    inputs = new_call([(2, "t3 p90 t1"), (0, "p20 t4")], state, dims, attributes, rng)
    state = call_and_compare(inputs, attributes, dims)
    return new_call([(2, "t1 p30"), (0, "t1"), (5, "t2")], state, dims, attributes, rng)
