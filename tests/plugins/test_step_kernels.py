"""`vkvx_step` against the attention and then the append: the same output and the same caches, to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_calls import Case, make
from torch import Tensor

from vkvx.format import CACHE_NAMES
from vkvx.plugins import torch_cuda
from vkvx.plugins.library import KERNELS, Params

pytestmark = [pytest.mark.gpu, pytest.mark.kernels]

PLAIN = {"groups": 0, "counts": [[], [], [], []], "key_bits": 16, "value_bits": 16, "correction": "none"}
CASES = {
    "one position": Case(ratio=4),
    "one position, full text rows": Case(ratio=4, key_bits=4, text=[100, 98, 99, 0]),
    "one position, text rows of 8 bits": Case(ratio=5, text_bits=8, text=[100, 98, 99, 0]),
    "seven heads": Case(ratio=7, key_bits=2, value_bits=2),
    "one head, bf16": Case(dtype=torch.bfloat16, head_dim=128),
    "eight positions with padding": Case(ratio=2, positions=8, padding=[[], [0], [7], [6, 7]]),
    "parts of columns": Case(ratio=7, positions=3, head_dim=96),
    "wide heads": Case(ratio=2, positions=2, head_dim=256),
    "widest heads": Case(head_dim=512, positions=3),
    "full text rows": Case(positions=3, text=[100, 98, 99, 0]),
    "affine": Case(ratio=4, correction="affine"),
    "a window": Case(sliding_window=40, positions=2),
    "16 bits": Case(positions=4, padding=[[], [0], [2], [1]], **PLAIN),
    "FP32": Case(dtype=torch.float32, positions=2),
    "pictures": Case(positions=8, pictures=[(1, 4)]),
    "many positions": Case(positions=70),
    "text rows of 8 bits": Case(ratio=4, positions=3, text_bits=8, padding=[[], [0], [2], [1]]),
    "text rows of 8 bits, bf16, full": Case(dtype=torch.bfloat16, head_dim=256, text_bits=8, text=[100, 98, 99, 0]),
}


def run(case: Case, tensors: dict[str, Tensor], *, at_once: bool, splits: int) -> dict[str, Tensor]:
    """The output, NaN before, and the caches afterwards; those in `tensors` stay."""
    library = torch_cuda.kernels()
    assert library is not None
    found = {name: x.clone() if name in CACHE_NAMES else x for name, x in tensors.items()}
    output = torch.full(tensors["query"].shape, torch.nan, dtype=tensors["query"].dtype, device="cuda")
    params = Params.of(found, case.attributes, output)
    params.kernel, params.splits = KERNELS["auto"], splits
    size = library.workspace_bytes(params)
    workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")
    params.workspace, params.workspace_bytes = workspace.data_ptr(), size
    stream = torch.cuda.current_stream().cuda_stream
    if at_once:
        library.step(params, stream)
    else:
        library.attention(params, stream)
        library.append(params, stream)
    torch.cuda.synchronize()
    return {"output": output} | {name: x for name, x in found.items() if name in CACHE_NAMES}


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_attention_and_then_the_append(name: str) -> None:
    case = CASES[name]
    tensors = make(case)
    tensors["slot"][2] = -1
    for splits in (0, 1, 3, 9):
        apart = run(case, tensors, at_once=False, splits=splits)
        together = run(case, tensors, at_once=True, splits=splits)
        for key, x in apart.items():
            assert torch.equal(x.view(torch.uint8), together[key].view(torch.uint8)), f"{key}, {splits} splits"
        stored = (apart["text_key"].view(torch.uint8) != tensors["text_key"].view(torch.uint8)).any()
        assert stored, "the call stored nothing"


def test_a_step_of_a_planes_kernel_stores_its_token() -> None:
    case = replace(CASES["one position"], ratio=1)
    tensors = make(case)
    found = run(case, tensors, at_once=True, splits=0)
    for row, slot in enumerate(tensors["slot"].tolist()):
        count = int(tensors["text_count"][slot])
        if count < case.text_rows:
            assert torch.equal(found["text_key"][slot, :, count], tensors["key"][row, :, 0])
            assert torch.equal(found["text_value"][slot, :, count], tensors["value"][row, :, 0])
