"""Definition of the operator ``vkvx::GatedDeltaRule``, version 1: the recurrence of gated delta-rule linear attention.

``docs/operator.md`` has the semantics. The torch op, the ONNX schema and the function are built from this table.
Nothing here needs torch.
"""

from __future__ import annotations

from vkvx.plugins.operator import TensorDefinition

NAME = "GatedDeltaRule"
CHUNK = 64
"""Positions that are computed at once: the recurrence between them becomes products of matrices."""

_STATE = TensorDefinition("state", "float32", ("B", "H", "K", "V"), "what the rows remember")

INPUTS = (
    TensorDefinition("query", "float32", ("B", "H", "S", "K"), "queries, scaled"),
    TensorDefinition("key", "float32", ("B", "H", "S", "K"), "keys, at most of length 1"),
    TensorDefinition("value", "float32", ("B", "H", "S", "V"), "values"),
    TensorDefinition("decay", "float32", ("B", "H", "S"), "logarithm of what is kept of the state, at most 0"),
    TensorDefinition("beta", "float32", ("B", "H", "S"), "how much of a key's value is replaced, 0 to 1"),
    _STATE,
)
OUTPUTS = (TensorDefinition("output", "float32", ("B", "H", "S", "V"), "what the queries read"), _STATE)
