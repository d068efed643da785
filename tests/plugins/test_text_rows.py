"""Text rows of 8 bits: the words of odd rows, in torch and in the ONNX function, against the oracle's, to the bit."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from function_calls import call_and_compare, mixed_call
from onnx import helper
from onnxruntime import InferenceSession
from operator_cases import Dims, attributes_for, bfloat16

from vkvx.plugins.function import text_rows as function
from vkvx.plugins.function.builder import FLOAT, INT32, Builder
from vkvx.plugins.reference import text_rows as reference

DIM = 32


def odd_rows() -> np.ndarray:
    """FP32 [rows, 32]: zeros, NaN, infinities, the least and the largest scales, ties, and random rows of all sizes."""
    rng = np.random.default_rng(3)
    rows = [np.zeros(DIM), np.full(DIM, np.nan), np.full(DIM, -np.inf), np.where(np.arange(DIM) == 5, np.nan, 2.0)]
    rows += [np.linspace(-top, top, DIM) for top in (65504.0, 65480.0, 7e4, 127 * 2.0**-25, 128 * 2.0**-25)]
    rows.append(np.r_[127.0, np.arange(DIM - 1) - 15.5])  # scale 1: codes between two integers
    rows.append(np.where(np.arange(DIM) == 7, 1e-30, 0.0))
    rows += [np.exp(rng.uniform(-18, 11)) * rng.standard_normal(DIM) for _ in range(300)]
    return np.float32(rows)


@pytest.mark.parametrize("float_type", ["float32", "float16", "bfloat16"])
def test_words_are_those_of_the_oracle(float_type: str) -> None:
    rows = odd_rows()
    with np.errstate(over="ignore"):
        rows = bfloat16(rows) if float_type == "bfloat16" else rows.astype(float_type)
    words = np.stack([oracle.pack_row(row) for row in rows])
    given = torch.from_numpy(rows).to(getattr(torch, float_type))
    found = reference.encode(given)
    np.testing.assert_array_equal(found, words)
    read = np.stack([oracle.unpack_row(row, "float32") for row in words])
    np.testing.assert_array_equal(reference.decode(found), read)
    # Half a step, where the scale was rounded to a normal FP16 number, and the rounding of the scale at the end.
    clean = oracle.sanitise(rows)
    step = np.abs(clean).max(1, keepdims=True) / 127
    normal = step[:, 0] >= 2.0**-14
    assert np.all(np.abs(read - clean)[normal] <= (step / 2 + 127 * oracle.ulp16(step) / 2)[normal] * (1 + 2.0**-20))


def test_words_of_the_function_are_those_of_the_reference() -> None:
    rows = odd_rows().reshape(1, 1, -1, DIM)
    b = Builder(18)
    words = function.encode(b, "rows", DIM)
    read = function.decode(b, words, DIM)
    infos = [
        helper.make_tensor_value_info(*value) for value in (("rows", FLOAT, [1, 1, "n", DIM]), (words, INT32, None))
    ]
    graph = helper.make_graph(b.nodes, "rows", infos[:1], [infos[1], helper.make_tensor_value_info(read, FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    found, numbers = InferenceSession(model.SerializeToString()).run(None, {"rows": rows})
    wanted = reference.encode(torch.from_numpy(rows))
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(numbers, reference.decode(wanted))
    assert InferenceSession(model.SerializeToString()).run(None, {"rows": rows[:, :, :0]})[0].shape == (1, 1, 0, 9)


@pytest.mark.parametrize("more", [{}, {"sliding_window": 3, "visual_mask": "run"}], ids=str)
def test_the_function_on_caches_of_text_codes(more: dict[str, object]) -> None:
    attributes, dims = attributes_for(1, 2, text_bits=8, **more), Dims(float_type="float16")
    call_and_compare(mixed_call(attributes, dims), attributes, dims)
