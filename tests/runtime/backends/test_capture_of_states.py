"""What a capture does to states of linear attention, without a GPU: its warm-up must not move them on."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from vkvx.runtime.backends.torch.capture import DecodeSteps


def test_the_warm_up_leaves_states_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    steps: Any = DecodeSteps.__new__(DecodeSteps)
    state, seen = torch.arange(6.0), []

    def forward(rows: int) -> Tensor:
        seen.append(state.clone())
        state.add_(1)
        return torch.zeros(rows, 3)

    vars(steps).update(_states=[state], _forward=forward, _pool=None, _stream=None, _logits=torch.zeros(2, 3))
    vars(steps).update(_is_compiled=False, logits_graphs={})
    assert steps._capture(1, sampled=False) == "graph"
    assert [one.tolist() for one in seen] == [[0, 1, 2, 3, 4, 5]] * 2
