"""The torch ops called with NumPy inputs by name."""

from __future__ import annotations

from dataclasses import asdict

import torch
from operator_cases import ALL_INPUTS, CACHES, Arrays
from oracle import Attributes
from torch import Tensor

import vkvx.plugins.torch_op  # noqa: F401  (registers the ops)

TORCH_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def tensors(inputs: Arrays, float_type: str = "float32") -> dict[str, Tensor]:
    out = {name: torch.from_numpy(inputs[name].copy()) for name in inputs}
    for name in ("query", "key", "value", "text_key", "text_value"):
        if out[name].dtype.is_floating_point:
            out[name] = out[name].to(TORCH_TYPES[float_type])
    return out


def arrays(named: dict[str, Tensor]) -> Arrays:
    return {name: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for name, t in named.items()}


def bits_of(t: Tensor) -> Tensor:
    return t.view({2: torch.int16, 4: torch.int32}[t.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits_of(a), bits_of(b))


def arguments(attributes: Attributes) -> dict[str, object]:
    return asdict(attributes)


def in_order(named: dict[str, Tensor]) -> list[Tensor | None]:
    """The inputs of the torch ops, None for one that the call does not have."""
    return [named.get(name) for name in ALL_INPUTS]


def run_op(named: dict[str, Tensor], attributes: Attributes) -> dict[str, Tensor]:
    results = torch.ops.vkvx.visual_kv_attention(*in_order(named), **arguments(attributes))
    return dict(zip(("output", *CACHES), results, strict=True))
