"""Ways to turn packed words into FP32 zeros and ones with standard ONNX operators.

``byte table`` is what the operator's function does (``vkvx.plugins.function.pack.unpack``). Each variant's result is
compared with NumPy's ``unpackbits`` next to its timing. Variants take turns, so that a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from vkvx.plugins.function.builder import FLOAT, INT32, INT64, UINT8, UINT32, Builder, Value
from vkvx.plugins.function.pack import unpack

OPSET = 18
SHAPES = {
    "tiny-llava, one layer's keys": (1, 2, 5, 1, 128, 2),
    "LLaVA-1.5-7B, one layer's keys": (1, 32, 5, 1, 128, 4),
}
_BYTES = np.arange(256)[:, None] >> np.arange(8) & 1
_HALVES = np.arange(2**16)[:, None] >> np.arange(16) & 1


def _byte_index(b: Builder, words: Value) -> Value:
    """Bytes of the words [..., 4] as INT32, by shifts."""
    shifts = np.array([0, 8, 16, 24], np.uint32)
    shifted = b.op("BitShift", b.unsqueeze(b.cast(words, UINT32), -1), shifts, direction="RIGHT")
    return b.cast(b.cast(shifted, UINT8), INT32)


def _shift_table(b: Builder, words: Value) -> Value:
    return b.op("Gather", _BYTES.astype(np.float32), _byte_index(b, words), axis=0)


def _uint8_table(b: Builder, words: Value) -> Value:
    divided = b.op("Div", b.unsqueeze(b.cast(words, UINT32), -1), np.array([1, 2**8, 2**16, 2**24], np.uint32))
    index = b.cast(b.cast(divided, UINT8), INT32)
    return b.cast(b.op("Gather", _BYTES.astype(np.uint8), index, axis=0), FLOAT)


def _int32_table(b: Builder, words: Value) -> Value:
    # Mod is never negative, so each difference is a multiple of 256 and the division exact; a negative last byte
    # counts from the end of the table.
    rest, parts, base = words, [], np.array(256, np.int32)
    for _ in range(3):
        low = b.op("Mod", rest, base)
        parts.append(b.unsqueeze(low, -1))
        rest = b.op("Div", b.op("Sub", rest, low), base)
    index = b.op("Concat", *parts, b.unsqueeze(rest, -1), axis=-1)
    return b.op("Gather", _BYTES.astype(np.float32), index, axis=0)


def _half_word_table(b: Builder, words: Value) -> Value:
    base = np.array(2**16, np.int32)
    low = b.op("Mod", words, base)
    high = b.op("Div", b.op("Sub", words, low), base)
    index = b.op("Concat", b.unsqueeze(low, -1), b.unsqueeze(high, -1), axis=-1)
    return b.op("Gather", _HALVES.astype(np.float32), index, axis=0)


def _int64_bits(b: Builder, words: Value) -> Value:
    unsigned = b.op("Mod", b.unsqueeze(b.cast(words, INT64), -1), 2**32)
    return b.cast(b.op("Mod", b.op("Div", unsigned, 2 ** np.arange(32)), 2), FLOAT)


def _uint32_bits(b: Builder, words: Value) -> Value:
    powers = (2 ** np.arange(32)).astype(np.uint32)
    shifted = b.op("Div", b.unsqueeze(b.cast(words, UINT32), -1), powers)
    return b.cast(b.op("Mod", shifted, np.array(2, np.uint32)), FLOAT)


def _shift_bits(b: Builder, words: Value) -> Value:
    shifts = np.arange(32).astype(np.uint32)
    shifted = b.op("BitShift", b.unsqueeze(b.cast(words, UINT32), -1), shifts, direction="RIGHT")
    return b.cast(b.op("BitwiseAnd", shifted, np.array(1, np.uint32)), FLOAT)


VARIANTS: dict[str, Callable[[Builder, Value], Value]] = {
    "byte table": unpack,
    "byte table, bytes by BitShift": _shift_table,
    "byte table of UINT8, then Cast": _uint8_table,
    "byte table, bytes by INT32 Mod and Div": _int32_table,
    "half-word table (4 MB)": _half_word_table,
    "bits by BitShift and BitwiseAnd": _shift_bits,
    "bits by UINT32 Div and Mod": _uint32_bits,
    "bits by INT64 Div and Mod": _int64_bits,
}


def _session(variant: Callable[[Builder, Value], Value], threads: int) -> onnxruntime.InferenceSession:
    b = Builder(OPSET)
    result = variant(b, "words")
    graph = helper.make_graph(
        b.nodes,
        "unpack",
        [helper.make_tensor_value_info("words", INT32, [None] * 6)],
        [helper.make_tensor_value_info(result, TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--repeats", type=int, default=50, help="runs of each variant (default 50)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of an operator (default: all)")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Median milliseconds of each variant for each shape, and the ratio to the first variant's."""
    rows = []
    rng = np.random.default_rng(0)
    sessions = {name: _session(variant, arguments.threads) for name, variant in VARIANTS.items()}
    for shape_name, shape in SHAPES.items():
        words = rng.integers(-(2**31), 2**31, shape).astype(np.int32)
        expected = np.unpackbits(words.view(np.uint8), bitorder="little").astype(np.float32)
        exact: dict[str, bool] = {}
        times: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for _ in range(arguments.repeats + 1):
            for name, session in sessions.items():
                start = time.perf_counter()
                (result,) = session.run(None, {"words": words})
                times[name].append(time.perf_counter() - start)
                exact[name] = exact.get(name, True) and np.array_equal(result.ravel(), expected)
        # The first run of each allocates its memory.
        medians = {name: 1e3 * statistics.median(measured[1:]) for name, measured in times.items()}
        base = next(iter(medians.values()))
        rows += [
            {
                "shape": shape_name,
                "variant": name,
                "median_ms": round(median, 3),
                "fastest_ms": round(1e3 * min(times[name][1:]), 3),
                "ratio": round(median / base, 2),
                "exact": exact[name],
            }
            for name, median in medians.items()
        ]
    return rows
