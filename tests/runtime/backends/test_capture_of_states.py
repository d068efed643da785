"""What captures do, without a GPU: a warm-up must not move states of linear attention on, graphs are not too many."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vkvx.runtime.backends.torch import capture
from vkvx.runtime.backends.torch.capture import DecodeSteps, Size


def test_the_warm_up_leaves_states_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    steps: Any = DecodeSteps.__new__(DecodeSteps)
    state, seen = torch.arange(6.0), []

    def forward(size: Size) -> tuple[Tensor, Tensor]:
        seen.append(state.clone())
        state.add_(1)
        return torch.zeros(size.rows), torch.zeros(size.rows, 3)

    vars(steps).update(_states=[state], _forward=forward, _pool=None, _stream=None, _logits=torch.zeros(2, 3))
    vars(steps).update(_is_compiled=False)
    assert steps._capture(Size(1, 1, sampled=False)) == "graph"
    assert [one.tolist() for one in seen] == [[0, 1, 2, 3, 4, 5]] * 2


def test_graphs_of_several_positions_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those used last; graphs of one position, one for each number of rows, stay."""
    monkeypatch.setattr(capture, "MOST_LONGER", 3)
    replayed: list[tuple[int, int]] = []

    class Graph:
        def __init__(self, size: Size) -> None:
            self.size = size

        def replay(self) -> None:
            replayed.append(self.size[:2])

    steps: Any = DecodeSteps.__new__(DecodeSteps)
    inputs = SimpleNamespace(send=lambda call, cache: None)
    vars(steps).update(_inputs=dict.fromkeys(range(1, 9), inputs), graphs=OrderedDict(), _capture=Graph, _cache=None)
    calls = [(1, 1), (1, 2), (2, 2), (2, 1), (1, 5), (1, 2), (1, 8), (2, 8), (1, 1)]
    for shape in calls:
        steps.launch(SimpleNamespace(input_ids=np.zeros(shape, np.int32)))
    assert replayed == calls
    assert [size[:2] for size in steps.graphs] == [(2, 1), (1, 2), (1, 8), (2, 8), (1, 1)]


def test_calls_that_are_captured() -> None:
    """Text, at most eight tokens a row; one where layers of linear attention have states; no idle rows."""
    steps: Any = DecodeSteps.__new__(DecodeSteps)
    for states, positions, visual, slots, expected in (
        ([], 1, 0, [0, 3], True),
        ([], 8, 0, [2], True),
        ([], 9, 0, [2], False),
        ([], 2, 640, [2], False),
        ([], 1, 0, [0, -1], False),
        (["state"], 1, 0, [0], True),
        (["state"], 2, 0, [0], False),
    ):
        steps._states = states
        ids, index = np.zeros((len(slots), positions)), np.zeros((len(slots), visual))
        call = SimpleNamespace(input_ids=ids, visual_index=index, slot=np.array(slots))
        assert steps.takes(call) == expected
