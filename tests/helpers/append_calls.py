"""Calls of the append kernels on random tokens and poisoned caches, and the comparison with plain torch."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vkvx.format import CACHE_NAMES, QUANTILE_ALPHA
from vkvx.plugins import torch_cuda, torch_op
from vkvx.plugins.library import Params
from vkvx.plugins.operator import OperatorAttributes
from vkvx.plugins.reference import quantization

GUARD = 4096


@dataclass
class Append:
    """A call of rows that bring groups with these numbers of tokens, and `text` text tokens each."""

    quantizer: str = "lloyd"
    key_bits: int = 1
    value_bits: int = 1
    head_dim: int = 128
    kv_heads: int = 2
    dtype: torch.dtype = torch.float16
    group_size: int = 256
    counts: list[list[int]] = field(default_factory=lambda: [[256, 219], [1], [], [77, 256]])
    filled: list[int] = field(default_factory=lambda: [1, 0, 2, 0])
    text: int = 3
    slots: int = 6
    groups: int = 4
    shift: float = 2.0
    positions_first: bool = True
    rotary: tuple[int, int] = (0, 0)
    text_bits: int = 16
    seed: int = field(default_factory=lambda: random.randrange(2**31))

    @property
    def attributes(self) -> OperatorAttributes:
        return OperatorAttributes(
            key_bits=self.key_bits,
            value_bits=self.value_bits,
            group_size=self.group_size,
            quantizer=self.quantizer,
            quantile_alpha_key=QUANTILE_ALPHA[self.key_bits],
            quantile_alpha_value=QUANTILE_ALPHA[self.value_bits],
            shrink_key=0.5,
            shrink_value=0.7,
            scale=self.head_dim**-0.5,
            rotary_dim=self.rotary[0],
            rotary_interleaved=self.rotary[1],
            text_bits=self.text_bits,
        )


def make(case: Append, device: str = "cuda") -> dict[str, Tensor]:
    """Inputs by name; padding positions and all of the caches past the counts are NaN or random words."""
    gen = torch.Generator(device).manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, device=device)

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=gen, device=device).to(torch.int32)

    rows, d, g, size, heads = len(case.counts), case.head_dim, case.groups, case.group_size, case.kv_heads
    order = torch.randperm(case.slots, generator=gen, device=device)[:rows].to(torch.int32)
    call_groups = max(len(c) for c in case.counts)
    visual = torch.full((rows, call_groups, size), -1, dtype=torch.int32)
    length = max(sum(c) for c in case.counts) + case.text + 1
    text = torch.full((rows, case.text), -1, dtype=torch.int32)
    visual_count = torch.zeros(case.slots, g, dtype=torch.int32)
    text_count = torch.zeros(case.slots, dtype=torch.int32)
    used = torch.zeros(rows, length, dtype=torch.bool)
    for row, counts in enumerate(case.counts):
        at = 0
        for group, count in enumerate(counts):
            visual[row, group, :count] = torch.arange(at, at + count)
            at += count
        text[row] = torch.arange(at, at + case.text)
        used[row, : at + case.text] = True
        visual_count[int(order[row]), : case.filled[row]] = size - 1
        text_count[int(order[row])] = row
    t: dict[str, Tensor] = {}
    for name in ("query", "key", "value"):
        spread = (0.7 * normal(1, 1, heads, d)).exp()
        shift = case.shift * normal(1, 1, heads, d) * (torch.rand(d, generator=gen, device=device) < 0.3)
        x = (normal(rows, length, heads, d) * spread + shift).to(case.dtype)
        x[~used.to(device)] = torch.nan
        t[name] = x.transpose(1, 2)
        if not case.positions_first:
            t[name] = t[name].contiguous()
    t |= {"visual_index": visual.flatten(1).to(device), "text_index": text.to(device), "slot": order}
    lead = (case.slots, heads)
    t["visual_key"] = words(*lead, g * size // 128, case.key_bits, 128, d // 32)
    t["visual_key_params"] = torch.full((*lead, g, 3, d), torch.nan, dtype=torch.float16, device=device)
    t["visual_value"] = words(*lead, g * size // 128, case.value_bits, d, 4)
    t["visual_value_params"] = torch.full((*lead, g, 2, d), torch.nan, dtype=torch.float16, device=device)
    t["visual_count"] = visual_count.to(device)
    for name in ("text_key", "text_value"):
        if case.text_bits == 8:
            t[name] = words(*lead, case.text + rows, d // 4 + 1)
        else:
            t[name] = torch.full((*lead, case.text + rows, d), torch.nan, dtype=case.dtype, device=device)
    t["text_count"] = text_count.to(device)
    if case.attributes.needs_metrics:
        for name in ("key_metric", "value_metric"):
            root = normal(heads, d, d) * torch.exp(-torch.arange(d, device=device) / (d / 6))
            metric = root @ root.transpose(1, 2)
            metric = metric / metric.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
            t[name] = (metric + 0.1 * torch.eye(d, device=device)).half()
        angle = normal(rows, d // 2).repeat(1, 2) * 3
        turned = torch.arange(d, device=device) < (case.rotary[0] or d)
        t["rotation"] = torch.stack([angle.cos().where(turned, 1.0), angle.sin().where(turned, 0.0)], 1)
    return {definition.name: t[definition.name] for definition in case.attributes.inputs}


def append(tensors: dict[str, Tensor], attributes: OperatorAttributes) -> dict[str, Tensor]:
    """The caches after vkvx_append; no byte around them may change, and the workspace is random but for its zeros."""
    library = torch_cuda.kernels()
    assert library is not None
    named, buffers = dict(tensors), []
    for name in CACHE_NAMES:
        x = tensors[name]
        size = x.numel() * x.element_size()
        buffer = torch.full((size + 2 * GUARD,), 0xA5, dtype=torch.uint8, device="cuda")
        named[name] = buffer[GUARD : GUARD + size].view(x.dtype).view(x.shape)
        named[name].copy_(x)
        buffers.append(buffer)
    output = torch.empty(tensors["query"].shape, dtype=tensors["query"].dtype, device="cuda")
    params = Params.of(named, attributes, output)
    size = library.workspace_bytes(params)
    workspace = torch.randint(0, 255, (size + GUARD,), dtype=torch.uint8, device="cuda")
    workspace[: 4 * 16384] = 0
    workspace[size:] = 0xA5
    params.workspace, params.workspace_bytes = workspace.data_ptr(), size
    library.append(params, torch.cuda.current_stream().cuda_stream)
    for buffer in buffers:
        assert (buffer[:GUARD] == 0xA5).all()
        assert (buffer[-GUARD:] == 0xA5).all()
    assert (workspace[size:] == 0xA5).all()
    assert not workspace[: 4 * 16384].any()
    return {name: named[name] for name in CACHE_NAMES}


def reference(tensors: dict[str, Tensor], attributes: OperatorAttributes, patch: Any) -> dict[str, Tensor]:
    """The caches after the operator in plain torch."""
    with patch.context() as p:
        p.setattr(torch_cuda, "takes", lambda *_: False)
        results = torch_op.visual_kv_attention(*tensors.values(), **attributes.to_dict())
    return dict(zip(CACHE_NAMES, results[1:], strict=True))


def ulp16(x: Tensor) -> Tensor:
    """Distance of FP16 numbers around x, float64."""
    exponent = torch.floor(torch.log2(x.abs().clamp(min=2.0**-14, max=65504.0)))
    return torch.exp2(exponent - 10)


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.view(integer), b.view(integer))


def compare(case: Append, tensors: dict[str, Tensor], results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Groups and text rows that the call appends, and that nothing else was written."""
    untouched = {name: torch.ones(x.shape, dtype=torch.bool, device=x.device) for name, x in results.items()}
    metrics = torch_op._read_metrics(tensors, case.attributes) if case.attributes.needs_metrics else None
    tiles = case.group_size // 128
    for row, counts in enumerate(case.counts):
        slot = int(tensors["slot"][row])
        first = int(tensors["text_count"][slot])
        for name in ("text_key", "text_value"):
            rows = slice(first, first + case.text)
            untouched[name][slot, :, rows] = False
            assert same_bits(results[name][slot, :, rows], expected[name][slot, :, rows])
        start = 0
        for g, count in enumerate(counts):
            group = case.filled[row] + g
            part = slice(group * tiles, (group + 1) * tiles)
            for name, bits, unpack in (
                ("key", case.key_bits, quantization.unpack_keys),
                ("value", case.value_bits, quantization.unpack_values),
            ):
                x = quantization.sanitize(tensors[name][row, :, start : start + count]).double()
                codes = [unpack(r[f"visual_{name}"][slot, :, part]).double() for r in (results, expected)]
                assert not codes[0][:, count:].any(), "bits of padding are set"
                params = [r[f"visual_{name}_params"][slot, :, group].double() for r in (results, expected)]
                metric = None
                if metrics is not None:
                    metric = (metrics.key[row, :, 0] if name == "key" else metrics.value[:, 0]).double()
                compare_group(case, x, bits, [c[:, :count] for c in codes], params, metric)
                untouched[f"visual_{name}"][slot, :, part] = False
                untouched[f"visual_{name}_params"][slot, :, group] = False
            start += count
    for name, kept in untouched.items():
        assert same_bits(results[name][kept], tensors[name][kept]), f"{name} written elsewhere"


def compare_group(
    case: Append, x: Tensor, bits: int, codes: list[Tensor], params: list[Tensor], metric: Tensor | None
) -> None:
    """Levels, codes and key RMS of a group: x [Hkv, n, D], params [Hkv, 2 or 3, D], kernel first, then torch."""
    assert params[0].isfinite().all()
    scales, offsets = ([p[:, i : i + 1] for p in params] for i in (0, 1))
    rests = [x - (o + s * c) for o, s, c in zip(offsets, scales, codes, strict=True)]
    rounding = 2.0**-22 * x.abs().amax(1, keepdim=True)
    rms = rests[0].square().mean(1)
    # The offset of `shaped` is the mean of the tokens less that of scale times code.
    follows = [s * c.mean(1, keepdim=True) for s, c in zip(scales, codes, strict=True)]
    more = 0.0 if metric is None else (follows[0] - follows[1]).abs()
    # Two that differ by more than a unit may lie in different binades: the unit is that of the larger.
    unit = ulp16(torch.maximum(offsets[0].abs(), offsets[1].abs()))
    limits = 2 * ulp16(scales[1]) + rounding, 2 * unit + rounding + more
    off = [(p[0] - p[1]).abs() > limit for p, limit in zip((scales, offsets), limits, strict=True)]
    odd = off[0] | off[1]
    if metric is None:
        if case.quantizer == "lloyd":
            # A value beside a threshold may fall to either side, and the levels follow: another result that is as good.
            room = x.shape[1] * (rounding**2 + scales[1] ** 2 / 24) + 1e-30
            share = (rests[0].square().sum(1, keepdim=True) + room) / (rests[1].square().sum(1, keepdim=True) + room)
            assert abs(share.median() - 1) < 0.001, (share.median(), x.shape)
            assert share.mean() < 1.2, (share.mean(), x.shape)
            assert bits > 1 or odd.double().mean() < 0.1, (odd.double().mean(), x.shape)
        else:
            assert not odd.any(), (odd.nonzero()[:3], x.shape)
        ratio = (x - offsets[0]) / torch.where(scales[0] > 0, scales[0], torch.inf)
        certain = (ratio - ratio.floor() - 0.5).abs() > 1e-3
        assert torch.equal(codes[0][certain], ratio.round().clamp(0, 2**bits - 1)[certain])
        assert ((codes[0] - ratio.clamp(0, 2**bits - 1)).abs() < 0.502).all()
    else:
        assert not odd.any(), (odd.nonzero()[:3], x.shape)
        errors = [((r @ metric) * r).sum().item() for r in rests]
        spread = x - x.mean(1, keepdim=True)
        part = 0.05 if bits == 8 or x.shape[1] < 300 else 0.01
        room = part * errors[1] + 1e-6 * ((spread @ metric) * spread).sum().item()
        assert abs(errors[0] - errors[1]) <= room, (errors, x.shape)
        same = (codes[0] == codes[1]).double().mean().item()
        assert x.shape[1] < 20 or same >= {1: 0.95, 2: 0.7, 4: 0.6, 8: 0.5}[bits], (same, errors, x.shape)
        whole = ((rests[0] @ metric) * rests[0]).sum((1, 2)) / x.shape[1]
        apart = (rms * metric.diagonal(dim1=1, dim2=2)).sum(1)
        rms = rms * torch.where(apart > 0, whole / torch.where(apart > 0, apart, 1.0), 1.0)[:, None]
    if params[0].shape[1] == 3:
        wanted = rms.sqrt().clamp(max=65504.0)
        off_by = ((params[0][:, 2] - wanted).abs() - rounding[:, 0]) / ulp16(wanted)
        assert (off_by <= 2).all(), (off_by.max(), x.shape)


def check(case: Append, patch: Any, change: Callable[[dict[str, Tensor]], None] = lambda _: None) -> dict[str, Tensor]:
    """Append and compare; returns the caches."""
    tensors = make(case)
    change(tensors)
    results = append(tensors, case.attributes)
    compare(case, tensors, results, reference(tensors, case.attributes, patch))
    return results
