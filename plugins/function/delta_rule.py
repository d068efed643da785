"""``vkvx::GatedDeltaRule`` as a model-local ONNX function of standard ops. ``torch_delta_rule.py`` has the maths.

A decode step is a step of the recurrence. What is longer goes in chunks: what they do not need the state for is
computed for all of them at once, the rest is a Scan over chunks.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from vkvx.plugins.delta_rule import CHUNK, INPUTS, NAME, OUTPUTS
from vkvx.plugins.function.builder import FLOAT, Builder, Operand, Typed, Value
from vkvx.plugins.operator import DOMAIN

_HIDDEN = np.float32(-1e30)
"""Logarithm of what no position may see."""


def delta_rule_function(opset: int = 18) -> onnx.FunctionProto:
    """Build the function ``vkvx::GatedDeltaRule``. Its sizes are those of its inputs; the second output is
    ``new_state``."""
    b = Builder(opset)
    outputs = [OUTPUTS[0].name, "new_state"]
    step, chunks = b.branch(), b.branch()
    with b.scope("step"):
        then = step.graph("step", _step(step))
    with b.scope("chunks"):
        otherwise = chunks.graph("chunks", _chunks(chunks))
    b.add("If", [b.op("Equal", b.size("query", 2), 1)], outputs, then_branch=then, else_branch=otherwise)
    inputs = [definition.name for definition in INPUTS]
    return helper.make_function(DOMAIN, NAME, inputs, outputs, b.nodes, [helper.make_opsetid("", opset)])


def _step(b: Builder) -> list[Typed]:
    """One position: output and state."""
    state = b.op("Mul", "state", b.op("Exp", b.unsqueeze("decay", 3)))
    written = b.op("Mul", b.op("Sub", "value", b.op("MatMul", "key", state)), b.unsqueeze("beta", 3))
    state = b.op("Add", state, b.op("MatMul", b.transpose("key", 0, 1, 3, 2), written))
    return [(b.op("MatMul", "query", state), FLOAT, 4), (state, FLOAT, 4)]


def _chunks(b: Builder) -> list[Typed]:
    """Any number of positions: output and state."""
    positions = b.size("query", 2)
    missing = b.op("Mod", b.op("Sub", 0, positions), CHUNK)
    query, key, value = (_cut(b, name, missing, 4) for name in ("query", "key", "value"))  # [n, B, H, CHUNK, D]
    beta = b.unsqueeze(_cut(b, "beta", missing, 3), 4)
    total = b.op("CumSum", _cut(b, "decay", missing, 3), 3)  # [n, B, H, CHUNK]
    kept = b.op("Exp", b.unsqueeze(total, 4))
    # What is left of position j's decay at position i, 0 for later ones.
    seen = np.tril(np.ones((CHUNK, CHUNK), np.bool_))
    between = b.op("Where", seen, b.op("Sub", b.unsqueeze(total, 4), b.unsqueeze(total, 3)), _HIDDEN)
    between = b.op("Exp", between)
    weighted = b.op("Mul", key, beta)
    system = b.op("Mul", b.matmul_transposed(weighted, key, 5), between)
    inverse = _inverse(b, system)
    last = b.op("Gather", total, [CHUNK - 1], axis=3)
    left = b.op("Exp", b.unsqueeze(b.op("Sub", last, total), 4))
    sequences = {
        "fresh": b.op("MatMul", inverse, b.op("Mul", value, beta)),  # what is written to an empty state
        "reads": b.op("MatMul", inverse, b.op("Mul", weighted, kept)),  # and what the state makes of that
        "query": b.op("Mul", query, kept),
        "scores": b.op("Mul", b.matmul_transposed(query, key, 5), between),
        "key": b.transpose(b.op("Mul", key, left), 0, 1, 2, 4, 3),
        "kept": b.op("Exp", b.unsqueeze(last, 4)),
    }

    def chunk(b: Builder, state: Value, given: dict[str, Value]) -> list[Typed]:
        written = b.op("Sub", given["fresh"], b.op("MatMul", given["reads"], state))
        read, own = b.op("MatMul", given["query"], state), b.op("MatMul", given["scores"], written)
        new = b.op("Add", b.op("Mul", state, given["kept"]), b.op("MatMul", given["key"], written))
        return [(new, FLOAT, 4), (b.op("Add", read, own), FLOAT, 4)]

    typed: dict[str, Typed] = {name: (sequence, FLOAT, 5) for name, sequence in sequences.items()}
    state, output = b.scan("recurrence", ("state", FLOAT, 4), typed, chunk)
    output = b.transpose(output, 1, 2, 0, 3, 4)
    shape: list[Operand] = [b.op("Shape", "value", end=2), [-1], b.op("Shape", "value", start=3)]
    output = b.reshape(output, b.op("Concat", *shape, axis=0))
    return [(b.head(output, positions, 2), FLOAT, 4), (state, FLOAT, 4)]


def _cut(b: Builder, x: Value, missing: Value, rank: int) -> Value:
    """[B, H, S, ...] of this rank in chunks, the last one filled up with zeros: [n, B, H, CHUNK, ...]."""
    behind = np.eye(rank, dtype=np.int64)[2]  # one entry an axis: pads count those in front first
    x = b.op("Pad", x, b.op("Concat", [0] * rank, b.op("Mul", missing, behind), axis=0))
    shape: list[Operand] = [b.op("Shape", x, end=2), [-1, CHUNK], b.op("Shape", x, start=3)]
    x = b.reshape(x, b.op("Concat", *shape, axis=0))
    return b.transpose(x, 2, 0, 1, *range(3, rank + 1))


def _inverse(b: Builder, system: Value) -> Value:
    """The inverse of 1 + L, with L the part of ``system`` [..., CHUNK, CHUNK] below the diagonal.

    From the inverses of blocks on the diagonal to those of blocks twice their size: of [[1, 0], [L, 1]] in blocks it is
    [[X, 0], [-Y L X, Y]]. All intermediate results are parts of inverses, and these are small; powers of L are not.
    """
    place, size = np.arange(CHUNK), 1
    inverse = b.constant(np.eye(CHUNK, dtype=np.float32))
    while size < CHUNK:
        block = place // size
        below = (block % 2 == 1)[:, None] & (block[:, None] == block + 1)
        part = b.op("Mul", system, below.astype(np.float32))
        product = part if size == 1 else b.op("MatMul", inverse, b.op("MatMul", part, inverse))
        inverse, size = b.op("Sub", inverse, product), 2 * size
    return inverse
