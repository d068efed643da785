"""The operators' references in Polygraphy's plug-in reference runner: ``polygraphy run NODE.onnx --pluginref``.

Polygraphy calls :func:`register` whenever it runs, by an entry point of this package: what it takes from there are
options of its command line, of which there are none here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vkvx.plugins import delta_rule, operator


def register() -> list[Any]:
    """Tell the runner both operators. Their graphs may hold nothing else but what it knows itself."""
    from polygraphy.backend.pluginref.references import register as registers

    registers(operator.NAME)(attention)
    registers(delta_rule.NAME)(gated_delta_rule)
    return []


def attention(attributes: dict[str, Any], *arrays: np.ndarray) -> list[np.ndarray]:
    """A node ``VisualKVAttention``: arrays and results in the order of the node, attributes as in ONNX."""
    from vkvx.plugins import torch_op  # noqa: F401 (registers the operator)

    chosen = operator.OperatorAttributes(**attributes)
    named = {definition.name: array for definition, array in zip(chosen.inputs, arrays, strict=True)}
    given = [named.get(definition.name) for definition in operator.ALL_INPUTS]
    return _call("visual_kv_attention", given, chosen.to_dict())


def gated_delta_rule(attributes: dict[str, Any], *arrays: np.ndarray) -> list[np.ndarray]:
    """A node ``GatedDeltaRule``, which has no attributes: arrays and results in the order of the node."""
    from vkvx.plugins import torch_delta_rule  # noqa: F401 (registers the operator)

    return _call("gated_delta_rule", arrays, attributes)


def _call(name: str, arrays: Sequence[np.ndarray | None], attributes: dict[str, Any]) -> list[np.ndarray]:
    import torch

    tensors = [None if array is None else torch.from_numpy(array.copy()) for array in arrays]
    return [tensor.numpy() for tensor in getattr(torch.ops.vkvx, name)(*tensors, **attributes)]
