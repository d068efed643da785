"""Which calls the CUDA kernels take, and the parameters that they get; nothing here runs on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from operator_cases import Dims, attributes_for, empty_state, new_call
from torch_calls import tensors

from vkvx.plugins import torch_cuda
from vkvx.plugins.library import QUANTIZERS
from vkvx.plugins.operator import OperatorAttributes


def call(quantizer: str, group_size: int, rows: str, head_dim: int = 32) -> tuple[dict[str, torch.Tensor], object]:
    dims = Dims(slots=1, query_heads=1, kv_heads=1, head_dim=head_dim, groups=1)
    attributes = attributes_for(1, 1, quantizer=quantizer, group_size=group_size)
    rng = np.random.default_rng(1)
    inputs = new_call([(0, rows)], empty_state(dims, attributes, rng), dims, attributes, rng)
    return tensors(inputs), OperatorAttributes(quantizer=quantizer, group_size=group_size)


@pytest.mark.parametrize(
    ("quantizer", "group_size", "rows", "head_dim", "taken"),
    [
        ("shaped", 4096, "p5 t1", 32, True),
        ("shaped", 4224, "p5 t1", 32, False),
        ("shaped", 4224, "t2", 32, True),
        ("lloyd", 4224, "p5 t1", 32, True),
        ("lloyd", 128, "t2", 256, True),
        ("lloyd", 128, "t2", 288, False),
    ],
)
def test_which_calls_are_taken(
    monkeypatch: pytest.MonkeyPatch, quantizer: str, group_size: int, rows: str, head_dim: int, taken: bool
) -> None:
    monkeypatch.setattr(torch_cuda, "kernels", object)
    named, attributes = call(quantizer, group_size, rows, head_dim)
    assert torch_cuda.takes(named, attributes) is taken  # type: ignore[arg-type]
    monkeypatch.setattr(torch_cuda, "kernels", lambda: None)
    assert not torch_cuda.takes(named, attributes)  # type: ignore[arg-type]


@pytest.mark.parametrize("quantizer", ["lloyd", "shaped"])
def test_metrics_go_to_the_kernels(quantizer: str) -> None:
    named, attributes = call(quantizer, 128, "p5 t1")
    params = torch_cuda._params(named, attributes, torch.empty_like(named["query"]))  # type: ignore[arg-type]
    assert params.quantizer == QUANTIZERS[quantizer]
    for name in ("key_metric", "value_metric", "rotation"):
        assert getattr(params, name) == (named[name].data_ptr() if name in named else None)
