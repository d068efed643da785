"""Which calls the CUDA kernels take, and the parameters that they get; nothing here runs on a GPU."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import pytest
import torch
from operator_cases import Dims, attributes_for, empty_state, new_call
from torch_calls import tensors

from vkvx.errors import VkvxError
from vkvx.plugins import torch_cuda
from vkvx.plugins.library import CORRECTIONS, DTYPES, QUANTIZERS, Params
from vkvx.plugins.operator import ALL_INPUTS, OperatorAttributes


def call(
    quantizer: str, group_size: int, rows: str, head_dim: int = 32
) -> tuple[dict[str, torch.Tensor], OperatorAttributes]:
    dims = Dims(slots=1, query_heads=1, kv_heads=1, head_dim=head_dim, groups=1)
    attributes = attributes_for(1, 1, quantizer=quantizer, group_size=group_size)
    rng = np.random.default_rng(1)
    inputs = new_call([(0, rows)], empty_state(dims, attributes, rng), dims, attributes, rng)
    return tensors(inputs), OperatorAttributes(quantizer=quantizer, group_size=group_size)


@pytest.mark.parametrize(
    ("quantizer", "group_size", "rows", "head_dim", "taken"),
    [
        ("shaped", 4224, "p5 t1", 32, True),
        ("lloyd", 4224, "p5 t1", 32, True),
        ("lloyd", 128, "t2", 512, True),
        ("lloyd", 128, "t2", 544, False),
    ],
)
def test_which_calls_are_taken(
    monkeypatch: pytest.MonkeyPatch, quantizer: str, group_size: int, rows: str, head_dim: int, taken: bool
) -> None:
    monkeypatch.setattr(torch_cuda, "kernels", object)
    named, attributes = call(quantizer, group_size, rows, head_dim)
    assert torch_cuda.takes(named, attributes) is taken
    monkeypatch.setattr(torch_cuda, "kernels", lambda: None)
    assert not torch_cuda.takes(named, attributes)


@pytest.mark.parametrize("quantizer", ["lloyd", "shaped"])
def test_parameters_of_a_call(quantizer: str) -> None:
    """Each field but the workspace and the choice of kernel, from what it is named after."""
    named, attributes = call(quantizer, 128, "p5 t1")
    output = torch.empty_like(named["query"])
    params = Params.of(named, attributes, output)
    assert (params.quantizer, params.correction) == (QUANTIZERS[quantizer], CORRECTIONS[attributes.score_correction])
    for name in ("key_bits", "value_bits", "group_size", "shrink_key", "quantile_alpha_value", "tau", "scale"):
        assert getattr(params, name) == pytest.approx(getattr(attributes, name)), name
    sizes = (params.rows, params.query_heads, params.positions, params.head_dim)
    assert sizes == named["query"].shape
    assert (params.slots, params.kv_heads, params.text_capacity, params.head_dim) == named["text_key"].shape
    assert params.visual_capacity == 128 * named["visual_key"].shape[2] == 128
    assert (params.visual_entries, params.text_entries) == (128, named["text_index"].shape[1])
    for name in ("query", "key", "value"):
        assert tuple(getattr(params, f"{name}_stride")) == named[name].stride()[:3]
    for definition in ALL_INPUTS:
        name = definition.name
        assert getattr(params, name) == (named[name].data_ptr() if name in named else None), name
    assert (params.output, params.dtype) == (output.data_ptr(), DTYPES["float32"])
    assert (params.workspace, params.kernel, params.splits) == (None, 0, 0)


def test_the_address_of_an_empty_tensor_is_not_null() -> None:
    named, attributes = call("lloyd", 128, "t1")
    assert named["visual_index"].numel() == 0
    assert Params.of(named, attributes, torch.empty_like(named["query"])).visual_index


class Captures:
    """A stand-in for streams that are captured at times, and the memory of their device."""

    def __init__(self) -> None:
        self.active, self.made = False, 0
        self.workspaces = torch_cuda.Workspaces(self._allocate, lambda: self.active)

    def _allocate(self, device: torch.device, size: int) -> torch.Tensor:
        assert not self.active
        self.made += 1
        return torch.zeros(size, dtype=torch.uint8, device=device)

    def get(self, size: int, *, stream: int = 1, captured: bool = False) -> torch.Tensor:
        """The workspace of a call."""
        self.active = captured
        return self.workspaces.get(CPU, stream, size)


CPU = torch.device("cpu")


def test_a_workspace_is_shared_by_the_calls_of_a_stream() -> None:
    captures = Captures()
    first = captures.get(100)
    assert captures.get(60) is first
    assert captures.get(100, captured=True) is first
    assert captures.get(100, stream=2) is not first
    assert captures.made == 2


@pytest.mark.parametrize("before", [[], [50]])
def test_a_capture_allocates_no_workspace(before: list[int]) -> None:
    """The graph would zero it at each replay, and own its memory."""
    captures = Captures()
    for size in before:
        captures.get(size)
    with pytest.raises(VkvxError, match="run the same call once before the capture") as caught:
        captures.get(100, captured=True)
    assert "\n" not in str(caught.value)
    captures.get(100)
    assert captures.get(100, captured=True).numel() == 100


def test_a_capture_takes_the_workspace_that_its_thread_warmed_up() -> None:
    """torch.cuda.graph captures on a stream of its own, so the call before it was on another one."""
    captures = Captures()
    warm = captures.get(100, stream=1)
    assert captures.get(100, stream=2, captured=True) is warm
    assert captures.get(100, stream=1) is not warm  # a replay may run beside what comes next on that stream
    with pytest.raises(VkvxError, match="in the same thread"):
        captures.get(101, stream=3, captured=True)
    other = threading.Thread(target=captures.get, args=(200,), kwargs={"stream": 4})
    other.start()
    other.join()
    with pytest.raises(VkvxError, match="in the same thread"):
        captures.get(200, stream=3, captured=True)
    assert captures.get(100, stream=2) is warm


def test_a_graph_keeps_its_workspace_from_other_captures() -> None:
    captures = Captures()
    captures.get(100, stream=1)
    captures.get(100, stream=2, captured=True)
    with pytest.raises(VkvxError):
        captures.get(100, stream=3, captured=True)


def test_outgrown_workspaces_stay_where_a_graph_has_them() -> None:
    captures = Captures()
    kept = []
    for size, captured in ((10, False), (20, True), (30, False), (40, True), (50, False)):
        kept.append(weakref.ref(captures.get(size)))
        if captured:
            captures.get(size, captured=True)
    assert [reference() is not None for reference in kept] == [False, True, False, True, True]
