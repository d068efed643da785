"""The append kernels against plain torch: levels, codes, text rows, and that nothing else is written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from append_calls import Append, append, check, make, same_bits
from torch import Tensor

from vkvx.errors import OptionError
from vkvx.format import QUANTIZERS
from vkvx.plugins import torch_cuda
from vkvx.plugins.library import Params

pytestmark = [pytest.mark.gpu, pytest.mark.kernels]

BITS = (1, 2, 4, 8)
SIZES: dict[int, list[list[int]]] = {
    128: [[128, 3], [1], [], [100, 128]],
    256: [[256, 219], [1], [], [77, 256]],
    640: [[576], [640, 17], [33], [2]],
    896: [[896, 640], [895], [31], [32, 896]],
    1024: [[1024], [1000, 1], [], [513]],
    1152: [[1152], [1025], [], [40]],
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [32, 96, 128, 256])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_against_torch(
    quantizer: str, bits: int, head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    mix = bits + head_dim // 32 + 2 * QUANTIZERS.index(quantizer) + (dtype != torch.float16)
    group_size = list(SIZES)[mix % len(SIZES)]
    other = BITS[(BITS.index(bits) + mix) % 4]
    case = Append(
        quantizer, bits, other, head_dim, dtype=dtype, group_size=group_size, counts=SIZES[group_size], seed=mix
    )
    check(replace(case, positions_first=mix % 2 == 0), monkeypatch)


@pytest.mark.parametrize("group_size", SIZES)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_sizes_of_groups(quantizer: str, group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(Append(quantizer, 1, 1, group_size=group_size, counts=SIZES[group_size]), monkeypatch)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_large_groups(quantizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for group_size in (2048, 4096):
        case = Append(quantizer, 1, 2, 64, 1, group_size=group_size, counts=[[group_size - 5]], groups=2, slots=2)
        check(case, monkeypatch)


def _few_numbers(t: dict[str, Tensor]) -> None:
    for name in ("key", "value"):
        t[name].copy_((t[name].float() * 1.5).round() / 2)


def _outliers(t: dict[str, Tensor]) -> None:
    for name in ("key", "value"):
        t[name][:, :, ::50] *= 300
        t[name][:, :, 1] = 3e4


def _large(t: dict[str, Tensor]) -> None:
    for name in ("key", "value"):
        t[name].mul_(1e4)


def _small(t: dict[str, Tensor]) -> None:
    for name in ("key", "value"):
        t[name].mul_(1e-5)


def _offset(t: dict[str, Tensor]) -> None:
    for name in ("key", "value"):
        t[name].mul_(0.05).add_(20)


def _two_lumps(t: dict[str, Tensor]) -> None:
    for name in ("key", "value"):
        t[name][:, :, ::3] += 40
        t[name][..., 5:9] = 2.5


def _not_numbers(t: dict[str, Tensor]) -> None:
    for name in ("key", "value"):
        t[name][:, 0, 3, 7] = torch.nan
        t[name][:, 0, 5, :4] = torch.tensor([torch.inf, -torch.inf, 65504, -65504])
        t[name][:, 1, :, 9] = torch.nan


@pytest.mark.parametrize("change", [_few_numbers, _outliers, _large, _small, _offset, _two_lumps, _not_numbers])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quantizer", ["minmax", "quantile", "shrink", "lloyd"])
def test_odd_numbers(quantizer: str, dtype: torch.dtype, change: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for bits in (1, 4):
        check(Append(quantizer, bits, bits, 64, dtype=dtype), monkeypatch, change)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [None, _outliers, _large, _small, _not_numbers])
@pytest.mark.parametrize("head_dim", [32, 96, 128, 160, 256, 512])
def test_text_rows_of_8_bits(head_dim: int, change: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of the reference, to the bit."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        case = Append(head_dim=head_dim, kv_heads=3, dtype=dtype, text_bits=8, counts=[[5], [1], [], [9]], text=5)
        check(case, monkeypatch, *([change] if change else []))  # type: ignore[list-item]


@pytest.mark.parametrize("change", [_outliers, _offset, _two_lumps])
def test_odd_numbers_shaped(change: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for bits in (1, 2):
        check(Append("shaped", bits, bits, 64), monkeypatch, change)  # type: ignore[arg-type]


@pytest.mark.parametrize("rotary", [(0, 1), (32, 0), (48, 1), (2, 1)])
def test_layouts_of_the_rotary_embedding(rotary: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for bits in (1, 4):
        check(Append("shaped", bits, bits, 64, rotary=rotary), monkeypatch)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("bits", [1, 4])
def test_rows_and_slots_change_nothing(quantizer: str, bits: int) -> None:
    case = Append(quantizer, bits, bits, group_size=640, counts=SIZES[640])
    tensors = make(case)
    together = append(tensors, case.attributes)
    for row in range(4):
        call = ("query", "key", "value", "visual_index", "text_index", "rotation")
        alone = {name: x[row : row + 1] if name in call else x.clone() for name, x in tensors.items()}
        here, there = int(tensors["slot"][row]), (int(tensors["slot"][row]) + 1) % case.slots
        alone["slot"] = torch.tensor([there], dtype=torch.int32, device="cuda")
        for name in ("visual_count", "text_count"):
            alone[name][there] = tensors[name][here]
        found = append(alone, case.attributes)
        for name, x in found.items():
            first = case.filled[row] if name.startswith("visual") else row
            first *= 5 if name in ("visual_key", "visual_value") else 1
            length = {"visual_key": 5, "visual_value": 5}.get(name, 1) * len(case.counts[row])
            length = case.text if name.startswith("text") else length
            part = slice(first, first + length)
            assert same_bits(x[there, :, part].clone(), together[name][here, :, part].clone()), name


@pytest.mark.parametrize("quantizer", ["lloyd", "shaped"])
def test_groups_that_do_not_fit_are_dropped(quantizer: str) -> None:
    case = Append(quantizer, filled=[4, 3, 4, 4])
    tensors = make(case)
    found = append(tensors, case.attributes)
    for name, x in found.items():
        if name.startswith("visual"):
            kept = torch.ones(x.shape[:3], dtype=torch.bool, device="cuda")
            per_group = 2 if name in ("visual_key", "visual_value") else 1
            kept[int(tensors["slot"][1]), :, 3 * per_group :] = False
            assert same_bits(x[kept], tensors[name][kept])


def test_shaped_needs_its_metrics() -> None:
    tensors = make(Append("shaped"))
    del tensors["rotation"]
    tensors["rotation"] = torch.empty(0, device="cuda")
    library = torch_cuda.kernels()
    assert library is not None
    params = Params.of(tensors, Append("shaped").attributes, torch.empty_like(tensors["query"]))
    params.rotation, params.workspace, params.workspace_bytes = None, 256, 1 << 40
    with pytest.raises(OptionError, match="rotation is a null pointer"):
        library.append(params, 0)
