"""How much the ONNX function works on: what is cached for the rows of a call, not what the cache has room for."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from function_calls import model_for, used_parts
from operator_cases import CACHES, Arrays, Dims, attributes_for, empty_state, new_call, same_bits
from oracle import Attributes

SMALL = Dims(slots=4, groups=4, text_rows=120, head_dim=64)
LARGE = replace(SMALL, slots=9, groups=33, text_rows=700)
BITS = [(1, 1), (2, 8), (16, 16)]


def cached(counts: dict[int, tuple[int, int]], dims: Dims, attributes: Attributes) -> Arrays:
    """A cache with (groups, text rows) by slot; what lies past the counts is NaN, or bits drawn at random."""
    state = empty_state(dims, attributes, np.random.default_rng(1))
    for slot, (groups, rows) in counts.items():
        if attributes.key_bits != 16:
            state["visual_count"][slot, :groups] = np.where(np.arange(groups) % 2, 128, 77)
        state["text_count"][slot] = rows
    drawn = np.random.default_rng(2)
    for slot in counts:
        for part in used_parts(state, state, slot, attributes):
            whole = part.dtype.kind == "i"
            part[...] = drawn.integers(0, 2**31, part.shape) if whole else np.abs(drawn.normal(size=part.shape))
    return state


def profiled(inputs: Arrays, attributes: Attributes, dims: Dims, folder: Path) -> tuple[Arrays, list[dict[str, Any]]]:
    """Results by name, and what onnxruntime says of each node that ran, also in branches and loops."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    options.intra_op_num_threads = 1
    model = model_for(attributes, dims).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    results = dict(zip(("output", *CACHES), session.run(None, inputs), strict=True))
    events = json.loads(Path(session.end_profiling()).read_text())
    return results, [e["args"] for e in events if e["cat"] == "Node" and "output_size" in e["args"]]


def columns(nodes: list[dict[str, Any]]) -> int:
    """Over how many keys, cached and new, padding included, each query attends."""
    (softmax,) = (node for node in nodes if node["op_name"] == "Softmax")
    (shape,) = softmax["output_type_shape"][0].values()
    return int(shape[-1])


@pytest.mark.parametrize(("key_bits", "value_bits"), BITS)
@pytest.mark.parametrize(
    ("counts", "slots", "groups", "text_rows"),
    [
        ({0: (1, 3), 1: (0, 9), 2: (3, 20), 3: (2, 2)}, [0, 1], 1, 9),
        ({0: (1, 3), 1: (0, 9), 2: (3, 20), 3: (2, 2)}, [3, -1, 0], 2, 3),
        ({0: (4, 119), 1: (2, 5)}, [-1, 1], 2, 5),
        ({0: (2, 7)}, [1, -1], 1, 1),  # nothing cached: what is least, and masked
        ({0: (4, 119), 1: (2, 5)}, [0, 1], 4, 119),
    ],
)
def test_attention_is_over_the_longest_row(
    key_bits: int,
    value_bits: int,
    counts: dict[int, tuple[int, int]],
    slots: list[int],
    groups: int,
    text_rows: int,
    tmp_path: Path,
) -> None:
    attributes = attributes_for(key_bits, value_bits)
    state = cached(counts, SMALL, attributes)
    inputs = new_call([(slot, "t1") for slot in slots], state, SMALL, attributes, np.random.default_rng(0))
    results, nodes = profiled(inputs, attributes, SMALL, tmp_path)
    assert columns(nodes) == (0 if key_bits == 16 else groups * attributes.group_size) + text_rows + 2
    assert np.isfinite(results["output"]).all()


@pytest.mark.parametrize(("key_bits", "value_bits"), BITS)
@pytest.mark.parametrize("layout", ["t1", "t2 p90 t1"])
def test_no_node_works_on_the_capacity(key_bits: int, value_bits: int, layout: str, tmp_path: Path) -> None:
    """In a larger cache all nodes make as much as in a small one, and the same results.

    Left out are counts, updated caches, which sessions write in place, and views of caches.
    """
    attributes = attributes_for(key_bits, value_bits, score_correction="affine")
    counts, slots = {0: (1, 3), 1: (2, 9), 2: (0, 0), 3: (3, 20)}, (1, -1, 2)
    counted = len(slots) * LARGE.groups * np.dtype(np.int64).itemsize
    made, outputs = [], []
    for dims in (SMALL, LARGE):
        rows = [(slot, layout if slot == 1 else "t1") for slot in slots]
        inputs = new_call(rows, cached(counts, dims, attributes), dims, attributes, np.random.default_rng(0))
        results, nodes = profiled(inputs, attributes, dims, tmp_path)
        sizes = [(node["op_name"], int(node["output_size"])) for node in nodes]
        made.append(Counter((op, size) for op, size in sizes if op not in ("Reshape", "ScatterND") and size > counted))
        outputs.append(results["output"])
    assert made[0] == made[1]
    assert len(made[0]) > 10
    assert same_bits(*outputs)
