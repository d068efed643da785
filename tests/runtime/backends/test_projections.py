"""Merged projections: the products of those that were apart, in as much memory."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn

from vkvx.runtime.backends.torch import projections


class Block(nn.Module):
    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, size, bias=bias) for size in (8, 4, 4))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]


def test_projections_are_freed_as_they_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(Block(bias=bias) for bias in (True, False, True)))
    x = torch.randn(2, 6)
    expected = [block(x) for block in model]
    old = [[weakref.ref(one) for one in block.children()] for block in model]
    alive: list[list[bool]] = []
    fit = projections._fit

    def noting(given: list[Any]) -> bool:
        alive.append([any(one() is not None for one in block) for block in old])
        return fit(given)

    monkeypatch.setattr(projections, "_fit", noting)
    assert projections.merge_projections(model) == 3
    # Those of a block are gone when the next one is looked at.
    assert alive == [[True, True, True], [False, True, True], [False, False, True]]
    for block, parts in zip(model, expected, strict=True):
        for found, part in zip(block(x), parts, strict=True):
            torch.testing.assert_close(found, part)
