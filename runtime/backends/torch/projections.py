"""Projections of one input as one matrix product: queries, keys and values; gate and up of a gated MLP.

A decode step reads all weights for a few rows: a product's start and end are a good part of it, and fewer of them, over
more columns, come nearer to what reading takes. transformers' modules stay what they are and call their projections by
name: the first of a group computes all, the others hand out their part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""In the order in which modules call them."""


class Merged(nn.Module):
    """Computes the projections of a group, and gives the first."""

    def __init__(self, projections: list[nn.Linear], parts: list[Tensor]) -> None:
        super().__init__()
        self.in_features = projections[0].in_features
        self.sizes = [one.out_features for one in projections]
        self.weight = nn.Parameter(torch.cat([one.weight.data for one in projections]), requires_grad=False)
        biases = [one.bias.data for one in projections if one.bias is not None]
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        first, *others = nn.functional.linear(x, self.weight, self.bias).split(self.sizes, dim=-1)
        self.parts[:] = others
        return first


class _Next(nn.Module):
    """Gives the next projection of the group."""

    def __init__(self, parts: list[Tensor]) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        return self.parts.pop(0)


def merge_projections(model: nn.Module) -> int:
    """Merge the projections of all modules that have a group of them; how many groups there were.

    Weights of a module are held twice only while it is merged.
    """
    merged = 0
    # Of all modules only those that change: a list of all would keep the old projections until the last one is merged.
    parents = [one for one in model.modules() if any(hasattr(one, name) for names in GROUPS for name in names)]
    for module in parents:
        for names in GROUPS:
            projections: list[Any] = [getattr(module, name, None) for name in names]
            if not all(type(one) is nn.Linear for one in projections) or not _fit(projections):
                continue
            parts: list[Tensor] = []
            setattr(module, names[0], Merged(projections, parts))
            for name in names[1:]:
                setattr(module, name, _Next(parts))
            merged += 1
    return merged


def _fit(projections: list[nn.Linear]) -> bool:
    """Whether they take the same input, and all have a bias or none."""
    inputs = {(one.in_features, one.weight.dtype, one.bias is None) for one in projections}
    return len(inputs) == 1
