"""Calls of the attention kernels on random packed caches, and float64 attention over the same numbers."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vkvx.plugins import torch_cuda
from vkvx.plugins.library import KERNELS, Params
from vkvx.plugins.operator import OperatorAttributes
from vkvx.plugins.reference import text_rows


@dataclass
class Case:
    """A call: group counts and text count by row, which positions are padding, and which are pictures, from and to."""

    key_bits: int = 1
    value_bits: int = 1
    head_dim: int = 128
    kv_heads: int = 2
    ratio: int = 1
    positions: int = 1
    correction: str = "expected"
    dtype: torch.dtype = torch.float16
    group_size: int = 256
    counts: list[list[int]] = field(default_factory=lambda: [[256, 256, 219], [77], [], [256, 5, 256, 130]])
    text: list[int] = field(default_factory=lambda: [100, 0, 33, 61])
    padding: list[list[int]] = field(default_factory=lambda: [[], [0], [2], [1]])
    pictures: list[tuple[int, int]] = field(default_factory=list)
    sliding_window: int = 0
    visual_mask: str = "causal"
    softcap: float = 0.0
    text_bits: int = 16
    slots: int = 6
    groups: int = 4
    text_rows: int = 100
    seed: int = field(default_factory=lambda: random.randrange(2**31))

    @property
    def attributes(self) -> OperatorAttributes:
        return OperatorAttributes(
            key_bits=self.key_bits,
            value_bits=self.value_bits,
            group_size=self.group_size,
            score_correction=self.correction,
            scale=self.head_dim**-0.5,
            sliding_window=self.sliding_window,
            visual_mask=self.visual_mask,
            softcap=self.softcap,
            text_bits=self.text_bits,
        )


def make(case: Case, device: str = "cuda") -> dict[str, Tensor]:
    """Inputs by name. What lies past the counts, and at padding positions, is NaN."""
    gen = torch.Generator(device).manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, device=device)

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=gen, device=device).to(torch.int32)

    rows, s, d, g, n = len(case.counts), case.positions, case.head_dim, case.groups, case.text_rows
    lead = (case.slots, case.kv_heads)
    slot = torch.randperm(case.slots, generator=gen, device=device)[:rows].to(torch.int32)
    t: dict[str, Tensor] = {"slot": slot}
    tiles = g * case.group_size // 128
    t["visual_key"] = words(*lead, tiles, case.key_bits, 128, d // 32)
    t["visual_value"] = words(*lead, tiles, case.value_bits, d, 4)
    for name, bits, extra in (("key", case.key_bits, 1), ("value", case.value_bits, 0)):
        top = 2**bits - 1
        scale = (normal(*lead, g, 1, d) * 0.5).exp() * 2 / top
        offset = normal(*lead, g, 1, d) * (1.0 if extra else 0.2) - scale * top / 2
        rest = [scale * 0.3 * torch.rand(scale.shape, generator=gen, device=device)] * extra
        t[f"visual_{name}_params"] = torch.cat([scale, offset, *rest], 3).half()
    visual_count = torch.zeros(case.slots, g, dtype=torch.int32)
    text_count = torch.zeros(case.slots, dtype=torch.int32)
    for row, at in enumerate(slot.tolist()):
        visual_count[at, : len(case.counts[row])] = torch.tensor(case.counts[row], dtype=torch.int32)
        text_count[at] = case.text[row]
    for name in ("text_key", "text_value"):
        t[name] = normal(*lead, n, d).to(case.dtype)
        if case.text_bits == 8:  # rows of sizes that differ, and past the count any bits
            t[name] = text_rows.encode(t[name] * (0.3 * normal(*lead, n, 1)).exp())
    for at in range(case.slots):
        for name in ("text_key", "text_value"):
            past = t[name][at, :, text_count[at] :]
            past.copy_(torch.full_like(past, torch.nan) if past.is_floating_point() else words(*past.shape))
        for name in ("visual_key_params", "visual_value_params"):
            t[name][at, :, visual_count[at] == 0] = torch.nan
    t["visual_count"], t["text_count"] = visual_count.to(device), text_count.to(device)
    text_index, visual_index = (torch.full((rows, n), -1, dtype=torch.int32) for n in (s, 0))
    visual = {i for start, end in case.pictures for i in range(start, min(end, s))}
    if visual:
        entries = sum(-(-(end - start) // case.group_size) for start, end in case.pictures) * case.group_size
        visual_index = torch.full((rows, entries), -1, dtype=torch.int32)
    # As models make them: positions before heads in memory.
    for name, heads in (("query", case.kv_heads * case.ratio), ("key", case.kv_heads), ("value", case.kv_heads)):
        t[name] = normal(rows, s, heads, d).to(case.dtype).transpose(1, 2)
    for row in range(rows):
        pads = [i for i in case.padding[row] if i < s and s > 1]
        kept = [i for i in range(s) if i not in pads]
        texts = [i for i in kept if i not in visual]
        text_index[row, : len(texts)] = torch.tensor(texts, dtype=torch.int32)
        at = 0
        for start, end in case.pictures:
            picture = [i for i in kept if start <= i < end]
            visual_index[row, at : at + len(picture)] = torch.tensor(picture, dtype=torch.int32)
            at += -(-len(picture) // case.group_size) * case.group_size
        for name in ("query", "key", "value"):
            t[name][row, :, pads] = torch.nan
    t["text_index"] = text_index.to(device)
    t["visual_index"] = visual_index.to(device)
    if case.sliding_window:
        t["window_start"] = _window_start(case, s).to(device)
    return {definition.name: t[definition.name] for definition in case.attributes.inputs}


def _window_start(case: Case, positions: int) -> Tensor:
    """Ascending starts of each row: from the first token, from within what is cached, past all of it."""
    start = torch.zeros(len(case.counts), 2, positions, dtype=torch.int32)
    choose = random.Random(case.seed)
    for row, counts in enumerate(case.counts):
        for kind, filled in enumerate((len(counts) * case.group_size, case.text[row])):
            first = choose.choice([0, filled // 3, max(0, filled - 2 - positions), filled, choose.randint(0, filled)])
            steps = torch.tensor([choose.randint(0, 2) for _ in range(positions)]).cumsum(0)
            start[row, kind] = (first + steps).clamp(max=filled)
    return start


def attend(tensors: dict[str, Tensor], attributes: OperatorAttributes, kernel: str = "auto", splits: int = 0) -> Tensor:
    """The output of one kernel; its buffer is NaN before, the workspace random but for what has to be zero."""
    library = torch_cuda.kernels()
    assert library is not None
    output = torch.full(tensors["query"].shape, torch.nan, dtype=tensors["query"].dtype, device="cuda")
    params = Params.of(tensors, attributes, output)
    params.kernel, params.splits = KERNELS[kernel], splits
    size = library.workspace_bytes(params)
    workspace = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    workspace[: 4 * 16384] = 0
    params.workspace, params.workspace_bytes = workspace.data_ptr(), size
    for _ in range(2):  # the second run meets what the first one left
        output.fill_(torch.nan)
        library.attention(params, torch.cuda.current_stream().cuda_stream)
    return output


def _codes(words: Tensor, along_tokens: bool) -> Tensor:
    shifts = torch.arange(32, dtype=torch.int32, device=words.device)
    bits = ((words.unsqueeze(-1) >> shifts) & 1).flatten(-2).double()
    codes = sum((bits.select(-3, p) * 2**p for p in range(words.shape[-3])), torch.zeros((), device=words.device))
    return (codes.transpose(-1, -2) if along_tokens else codes).flatten(-3, -2)


def reference(t: dict[str, Tensor], a: OperatorAttributes) -> Tensor:
    """Attention in float64, row by row."""
    rows, heads, s, d = t["query"].shape
    kv = t["key"].shape[1]
    out = torch.zeros(rows, heads, s, d, dtype=torch.float64, device=t["query"].device)
    for b in range(rows):
        slot = int(t["slot"][b])
        if slot < 0:
            continue
        is_text, is_visual = (torch.zeros(s, dtype=torch.bool, device=out.device) for _ in range(2))
        for found, name in ((is_text, "text_index"), (is_visual, "visual_index")):
            index = t[name][b]
            found[index[index >= 0].long()] = True
        token = is_text | is_visual
        q = torch.where(token[:, None], t["query"][b].double(), 0.0).reshape(kv, -1, d)
        none = torch.zeros(2, s, dtype=torch.int32, device=out.device)
        visual_start, text_start = t["window_start"][b] if a.sliding_window else none

        def bounded(x: Tensor, start: Tensor, place: Tensor) -> Tensor:
            """Scores [Hkv, Hq/Hkv * S, n] of what is cached at these places, less those before a position's start."""
            x = a.softcap * torch.tanh(x / a.softcap) if a.softcap else x
            return torch.where((place >= start[:, None]).repeat(heads // kv, 1), x, -1e300)

        counts = [count for count in t["visual_count"][slot].tolist() if count]
        scores, values = [], []
        if counts:
            g, tiles = len(counts), len(counts) * a.group_size // 128
            kp, vp = (t[f"visual_{n}_params"][slot, :, :g].double().unsqueeze(3) for n in ("key", "value"))
            k = _codes(t["visual_key"][slot, :, :tiles], False).unflatten(1, (g, -1)) * kp[:, :, 0] + kp[:, :, 1]
            v = _codes(t["visual_value"][slot, :, :tiles], True).unflatten(1, (g, -1)) * vp[:, :, 0] + vp[:, :, 1]
            x = torch.einsum("hqd,hgnd->hqgn", q, k) * a.scale
            if a.score_correction == "expected":
                excess = 0.5 * a.scale**2 * torch.einsum("hqd,hgd->hqg", q**2, kp[:, :, 2, 0] ** 2)
                x = x + (excess / (1 + excess / a.correction_limit))[..., None]
            valid = torch.arange(a.group_size, device=out.device) < torch.tensor(counts, device=out.device)[:, None]
            x, v = x[:, :, valid], v[:, valid]
            if a.score_correction == "affine":
                low, high = x.amin(-1, True), x.amax(-1, True)
                x = low + (x - low) * ((high - a.tau - low) / (high - low)).clamp(min=0)
            scores.append(bounded(x, visual_start, torch.arange(valid.numel(), device=out.device)[valid.flatten()]))
            values.append(v)
        count = int(t["text_count"][slot])
        text_key, text_value = (t[f"text_{n}"][slot, :, :count] for n in ("key", "value"))
        if a.text_bits == 8:
            text_key, text_value = (text_rows.decode(x, t["query"].dtype) for x in (text_key, text_value))
        x = q @ text_key.double().transpose(1, 2) * a.scale
        scores.append(bounded(x, text_start, torch.arange(count, device=out.device)))
        values.append(text_value.double())
        key, value = (torch.where(token[:, None], t[n][b].double(), 0.0) for n in ("key", "value"))
        seen = _own_seen(is_text, is_visual, a) & token
        x = bounded(q @ key.transpose(1, 2) * a.scale, torch.zeros_like(text_start), torch.arange(s, device=out.device))
        scores.append(torch.where(seen.repeat(heads // kv, 1), x, -1e300))
        values.append(value)
        o = (torch.cat(scores, -1).softmax(-1) @ torch.cat(values, 1)).reshape(heads, s, d)
        out[b] = torch.where(token[:, None], o, 0.0)
    return out


def _own_seen(is_text: Tensor, is_visual: Tensor, a: OperatorAttributes) -> Tensor:
    """Which positions of the call each position sees by its mask and window: BOOL [S, S]."""
    place = torch.arange(len(is_text), device=is_text.device)
    causal = place <= place[:, None]
    if a.visual_mask == "prefix":
        return torch.ones_like(causal)
    if a.visual_mask == "run":
        run = is_text.cumsum(0)
        causal = causal | ((run == run[:, None]) & is_visual & is_visual[:, None])
    return causal & (place[:, None] - place < a.sliding_window) if a.sliding_window else causal


def error(output: Tensor, expected: Tensor) -> float:
    """The worst row's |output - expected| / |expected|; infinite where either has a NaN or a row of zeros differs."""
    worst = 0.0
    for x, y in zip(output.double(), expected, strict=True):
        size, off = float(y.norm()), float((x - y).norm())
        worst = max(worst, off / size if size else (torch.inf if off else 0.0))
        if off != off:
            return torch.inf
    return worst
