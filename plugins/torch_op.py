"""``torch.ops.vkvx.visual_kv_attention``: the operator in torch; in plain torch on any device, which is its reference.

Two ops share one body: the functional one returns updated caches (reference, export), the other (trailing underscore)
updates them in place and returns the output alone. On CUDA tensors both run the kernels of ``vkvx.plugins``, if built.
``docs/operator.md`` has the semantics; shapes are those of ``plugins/operator.py``.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vkvx.errors import CapacityError, OptionError
from vkvx.format import CACHE_NAMES, TILE
from vkvx.plugins import torch_cuda
from vkvx.plugins.operator import ALL_INPUTS, INPUTS, METRIC_INPUTS, WINDOW_INPUTS, OperatorAttributes
from vkvx.plugins.reference import quantization, shaping, text_rows

MASKED = -1e30
"""Score of what must not be attended to; finite, so that a row without any token stays free of NaN."""


class CallIndices(NamedTuple):
    """What the indices of a call mean for its rows: B rows, S positions, g call groups of group_size tokens."""

    live: Tensor  # [B] bool, the row has a slot
    row: Tensor  # [B] int64, cache row, 0 for idle rows
    visual_position: Tensor  # [B, g, group_size] int64, 0 on padding
    visual_valid: Tensor  # [B, g, group_size] bool
    text_position: Tensor  # [B, Nt'] int64; at 16 bits all tokens, otherwise the text tokens
    text_valid: Tensor  # [B, Nt'] bool
    token: Tensor  # [B, S] bool, the position is a token of this call
    last: Tensor  # [B, S] int64, the last position of the call that the position sees


class MetricInputs(NamedTuple):
    """What counts as an error of a key and of a value, FP32: [B, Hkv, 1, D, D] and [Hkv, 1, D, D]."""

    key: Tensor
    value: Tensor


class Cache(NamedTuple):
    """The rows of the caches that a call uses, gathered: first axis B."""

    visual_key: Tensor
    visual_key_params: Tensor
    visual_value: Tensor
    visual_value_params: Tensor
    visual_count: Tensor
    text_key: Tensor
    text_value: Tensor
    text_count: Tensor


def _read_call(
    visual_index: Tensor, text_index: Tensor, slot: Tensor, positions: int, attributes: OperatorAttributes
) -> CallIndices:
    live = slot >= 0
    visual_valid = (visual_index >= 0) & live[:, None]
    text_valid = (text_index >= 0) & live[:, None]
    # Padding is written to a spare column that is cut off.
    token = torch.zeros(slot.shape[0], positions + 1, dtype=torch.bool, device=slot.device)
    for index, valid in ((visual_index, visual_valid), (text_index, text_valid)):
        token.scatter_(1, torch.where(valid, index, positions).long(), True)
    token = token[:, :positions]
    last = _last_seen(text_index, text_valid, visual_index, visual_valid, positions, attributes.visual_mask)
    if attributes.is_packed:
        text_position = torch.where(text_valid, text_index, 0).long()
        groups = visual_index.shape[1] // attributes.group_size
    else:
        # Tokens first, in ascending position.
        text_position = (~token).to(torch.uint8).sort(dim=1, stable=True).indices
        text_valid = token.gather(1, text_position)
        groups = 0
    entries = groups * attributes.group_size
    shape = (groups, attributes.group_size)
    return CallIndices(
        live,
        slot.clamp(min=0).long(),
        torch.where(visual_valid, visual_index, 0).long()[:, :entries].unflatten(1, shape),
        visual_valid[:, :entries].unflatten(1, shape),
        text_position,
        text_valid,
        token,
        last,
    )


def _last_seen(
    text_index: Tensor, text_valid: Tensor, visual_index: Tensor, visual_valid: Tensor, positions: int, mask: str
) -> Tensor:
    """The last position of its call that each position sees, [B, S]; padding within that is told apart elsewhere."""
    own = torch.arange(positions, device=text_index.device).expand(text_index.shape[0], positions)
    if mask == "causal":
        return own
    if mask == "prefix":
        return torch.full_like(own, positions - 1)
    spare = own.new_zeros(own.shape[0], positions + 1)
    text = spare.scatter(1, torch.where(text_valid, text_index, positions).long(), 1)[:, :positions]
    visual = spare.scatter(1, torch.where(visual_valid, visual_index, positions).long(), 1)[:, :positions]
    # A run ends before the next text token: the least position of one from here on.
    ends = torch.where(text > 0, own, positions).flip(1).cummin(1).values.flip(1) - 1
    return torch.where(visual > 0, ends, own)


def _repeat_heads(x: Tensor, query_heads: int) -> Tensor:
    """[B, Hkv, ...] to [B, Hq, ...]: each KV head serves a run of query heads."""
    return x.repeat_interleave(query_heads // x.shape[1], dim=1)


def _visual_scores(query: Tensor, cache: Cache, valid: Tensor, attributes: OperatorAttributes) -> tuple[Tensor, Tensor]:
    """Corrected scores [B, Hq, S, C] of cached visual tokens, and their values [B, Hq, C, D], FP32."""
    size, heads = attributes.group_size, query.shape[1]
    # Parameters of empty groups may be anything, NaN included.
    filled = (cache.visual_count > 0)[:, None, :, None, None]
    key_params = torch.where(filled, cache.visual_key_params.float(), 0.0)
    value_params = torch.where(filled, cache.visual_value_params.float(), 0.0)
    key = quantization.unpack_keys(cache.visual_key).unflatten(2, (-1, size))
    value = quantization.unpack_values(cache.visual_value).unflatten(2, (-1, size))
    key = quantization.decode(key, key_params[..., 0, :], key_params[..., 1, :]).flatten(2, 3)
    value = quantization.decode(value, value_params[..., 0, :], value_params[..., 1, :]).flatten(2, 3)
    scores = query @ _repeat_heads(key, heads).transpose(-1, -2) * attributes.scale
    if attributes.score_correction == "expected":
        deviation = key_params[..., 2, :].square()
        variance = query.square() @ _repeat_heads(deviation, heads).transpose(-1, -2)
        excess = 0.5 * attributes.scale**2 * variance
        correction = excess / (1.0 + excess / attributes.correction_limit)
        scores = scores + correction.repeat_interleave(size, dim=-1)
    elif attributes.score_correction == "affine" and scores.shape[-1]:
        mask = valid[:, None, None, :]
        low = scores.masked_fill(~mask, torch.inf).amin(-1, keepdim=True)
        high = scores.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
        spans = high > low
        slope = ((high - attributes.tau - low) / torch.where(spans, high - low, 1.0)).clamp(min=0.0)
        scores = torch.where(spans, low + (scores - low) * slope, scores)
    return scores, _repeat_heads(value, heads)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: CallIndices,
    cache: Cache,
    window_start: Tensor | None,
    attributes: OperatorAttributes,
) -> Tensor:
    """Attention of the call's tokens over the cached ones and over themselves: [B, Hq, S, D] FP32."""
    heads, positions = query.shape[1:3]
    q = torch.where(call.token[:, None, :, None], query.float(), 0.0)
    scores, values = [], []

    def add(s: Tensor, v: Tensor, seen: Tensor) -> None:
        """s [B, Hq, S, n], v [B, Hq, n, D], seen [B, 1 or S, n]: what is not seen may be NaN in both."""
        if attributes.softcap:
            s = attributes.softcap * torch.tanh(s / attributes.softcap)
        scores.append(torch.where(seen[:, None], s, MASKED))
        values.append(torch.where(seen.any(1)[:, None, :, None], v, 0.0))

    if attributes.is_packed and cache.visual_count.shape[1]:
        entry = torch.arange(attributes.group_size, device=query.device)
        visual_valid = (entry < cache.visual_count[..., None]).flatten(1)
        s, v = _visual_scores(q, cache, visual_valid, attributes)
        seen = visual_valid[:, None]
        if window_start is not None:
            seen = seen & (torch.arange(seen.shape[2], device=q.device) >= window_start[:, 0, :, None])
        add(s, v, seen)
    row = torch.arange(cache.text_key.shape[2], device=query.device)
    cached = (row < cache.text_count[:, None])[:, None]
    position = torch.arange(positions, device=query.device)
    own = call.token[:, None] & (position <= call.last[:, :, None])
    if window_start is not None:
        cached = cached & (row >= window_start[:, 1, :, None])
        if attributes.visual_mask != "prefix":
            own = own & (position[:, None] - position < attributes.sliding_window)
    text = (cache.text_key, cache.text_value)
    if not attributes.keeps_text:
        text = (text_rows.decode(text[0], key.dtype), text_rows.decode(text[1], key.dtype))
    for k, v, seen in (
        (*text, cached),
        (key, value, own),
    ):
        k = torch.where(seen.any(1)[:, None, :, None], k.float(), 0.0)
        add(q @ _repeat_heads(k, heads).transpose(-1, -2) * attributes.scale, _repeat_heads(v.float(), heads), seen)
    weights = torch.cat(scores, -1).softmax(-1)
    return torch.where(call.token[:, None, :, None], weights @ torch.cat(values, 2), 0.0)


def _take(x: Tensor, position: Tensor) -> Tensor:
    """Rows of x [B, H, S, D] at position [B, n]: [B, H, n, D]."""
    index = position[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index)


def _read_metrics(named: dict[str, Tensor], attributes: OperatorAttributes) -> MetricInputs:
    """The metric of keys as the queries that follow the call's last position see it, and that of values."""
    cosine, sine = named["rotation"].unsqueeze(2).unbind(1)  # [B, 1, D]
    layout = (attributes.rotary_dim, bool(attributes.rotary_interleaved))
    key = shaping.rotate(named["key_metric"].unsqueeze(0), cosine, sine, *layout)
    return MetricInputs(key.unsqueeze(2), named["value_metric"].float().unsqueeze(1))


def _quantize(
    key: Tensor, value: Tensor, mask: Tensor, attributes: OperatorAttributes, metrics: MetricInputs | None
) -> tuple[quantization.Quantized, Tensor, quantization.Quantized]:
    """Quantised keys, the RMS of what they leave over, and quantised values of groups [B, Hkv, g, group_size, D]."""
    a = attributes
    if metrics is not None:
        k = shaping.shape(key, mask, a.key_bits, metrics.key)
        v = shaping.shape(value, mask, a.value_bits, metrics.value)
        return k, shaping.shaped_rms(key, mask, k, metrics.key), v
    k = quantization.quantize(key, mask, a.key_bits, a.quantizer, alpha=a.quantile_alpha_key, gamma=a.shrink_key)
    alpha, gamma = a.quantile_alpha_value, a.shrink_value
    v = quantization.quantize(value, mask, a.value_bits, a.quantizer, alpha=alpha, gamma=gamma)
    return k, quantization.residual_rms(key, mask, k), v


def _append(
    caches: dict[str, Tensor],
    key: Tensor,
    value: Tensor,
    call: CallIndices,
    cache: Cache,
    attributes: OperatorAttributes,
    metrics: MetricInputs | None,
) -> None:
    """Quantise the call's pictures and write them, and the text rows, into the caches in place."""
    groups, size = call.visual_valid.shape[1:]
    rows = cache.text_count.long()[:, None] + torch.arange(call.text_valid.shape[1], device=key.device)
    filled = call.visual_valid.any(-1)
    target = (cache.visual_count > 0).sum(-1, keepdim=True) + torch.arange(groups, device=key.device)
    if (call.text_valid & (rows >= cache.text_key.shape[2])).any():
        raise CapacityError(f"the text cache holds {cache.text_key.shape[2]} rows and this call needs more")
    if (filled & (target >= cache.visual_count.shape[1])).any():
        raise CapacityError(
            f"the visual cache holds {cache.visual_count.shape[1]} groups of {size} tokens and this call needs more"
        )
    batch, entry = call.text_valid.nonzero(as_tuple=True)
    for name, new in (("text_key", key), ("text_value", value)):
        stored = _take(new, call.text_position)[batch, :, entry]
        caches[name][call.row[batch], :, rows[batch, entry]] = (
            stored if attributes.keeps_text else text_rows.encode(stored)
        )
    if not groups:
        return
    mask = call.visual_valid[:, None].expand(-1, key.shape[1], -1, -1)
    position = call.visual_position.flatten(1)
    key = _take(key, position).unflatten(2, (groups, size))
    value = _take(value, position).unflatten(2, (groups, size))
    k, rms, v = _quantize(key, value, mask, attributes, metrics)
    updates = {
        "visual_key": quantization.pack_keys(k.codes, attributes.key_bits),
        "visual_key_params": torch.stack([k.scale, k.offset, rms], -2),
        "visual_value": quantization.pack_values(v.codes, attributes.value_bits),
        "visual_value_params": torch.stack([v.scale, v.offset], -2),
    }
    batch, group = filled.nonzero(as_tuple=True)
    for name, update in updates.items():
        target_cache = caches[name]
        if name in ("visual_key", "visual_value"):
            # View whole groups: [Bc, Hkv, G, tiles of a group, ...]; update is [B, Hkv, g, tiles of a group, ...].
            target_cache = target_cache.unflatten(2, (-1, size // TILE))
        target_cache[call.row[batch], :, target[batch, group]] = update[batch, :, group]


def _check(tensors: dict[str, Tensor], attributes: OperatorAttributes) -> None:
    """Compare shapes and dtypes with the definition table (OptionError)."""
    dims: dict[str, int] = {"bk": attributes.key_bits, "bv": attributes.value_bits}
    if not attributes.is_packed:
        dims.update(bk=1, bv=1)
    model_dtype = tensors["query"].dtype
    if tuple(tensors) != tuple(t.name for t in attributes.inputs):
        wanted = {t.name for t in attributes.inputs}
        for what, optional in (
            (f"quantizer '{attributes.quantizer}'", METRIC_INPUTS),
            (f"sliding window {attributes.sliding_window}", WINDOW_INPUTS),
        ):
            named = {t.name for t in optional}
            if named & wanted != named & set(tensors):
                verb = "needs" if named <= wanted else "takes no"
                raise OptionError(f"{what} {verb} {', '.join(t.name for t in optional)}")
    for definition in attributes.inputs:
        tensor = tensors[definition.name]
        dtype = model_dtype if definition.dtype == "T" else getattr(torch, definition.dtype)
        expected = f"{definition.name} must be {dtype} [{', '.join(definition.shape)}]"
        if tensor.dtype != dtype or tensor.dim() != len(definition.shape):
            raise OptionError(f"{expected}, not {tensor.dtype} {list(tensor.shape)}")
        for symbol, size in zip(definition.shape, tensor.shape, strict=True):
            quotient, _, more = symbol.partition("+")
            name, _, divisor = quotient.partition("/")
            whole = (size - int(more or 0)) * int(divisor or 1)
            known = int(symbol) if symbol.isdigit() else dims.setdefault(name, whole)
            if whole != known:
                raise OptionError(f"{expected} with {name} = {known}, not {list(tensor.shape)}")
    if dims["Hq"] % dims["Hkv"]:
        raise OptionError(f"{dims['Hq']} query heads cannot share {dims['Hkv']} KV heads: give a multiple")
    if not attributes.is_packed and (dims["C"] or dims["G"]):
        raise OptionError(f"at 16 bits the visual cache must be empty, not of {dims['C']} tokens: text rows hold both")
    if attributes.is_packed and (dims["C"] != dims["G"] * attributes.group_size or dims["Nv"] % attributes.group_size):
        raise OptionError(
            f"visual capacity {dims['C']} and index length {dims['Nv']} must consist of whole groups of "
            f"{attributes.group_size} tokens, {dims['G']} of them in the cache"
        )


def _run(tensors: tuple[Tensor | None, ...], attributes: OperatorAttributes, in_place: bool) -> tuple[Tensor, ...]:
    names = (t.name for t in ALL_INPUTS)
    named = {name: tensor for name, tensor in zip(names, tensors, strict=False) if tensor is not None}
    _check(named, attributes)
    if named["query"].is_cuda and torch_cuda.takes(named, attributes):
        caches = {name: named[name] if in_place else named[name].clone() for name in CACHE_NAMES}
        return torch_cuda.run(named | caches, attributes), *caches.values()
    query, key, value = named["query"], named["key"], named["value"]
    call = _read_call(named["visual_index"], named["text_index"], named["slot"], query.shape[2], attributes)
    cache = Cache(*(named[name][call.row] for name in Cache._fields))
    live = call.live.to(torch.int32)
    cache = cache._replace(visual_count=cache.visual_count * live[:, None], text_count=cache.text_count * live)
    output = _attend(query, key, value, call, cache, named.get("window_start"), attributes)
    if query.dtype is torch.float16:
        # A mean of levels can lie a little beyond the largest FP16 number.
        output = output.clamp(-quantization.FP16_MAX, quantization.FP16_MAX)
    output = output.to(query.dtype)
    caches = {name: named[name] if in_place else named[name].clone() for name in CACHE_NAMES}
    metrics = _read_metrics(named, attributes) if call.visual_valid.shape[1] and attributes.needs_metrics else None
    _append(caches, key, value, call, cache, attributes, metrics)
    return output, *caches.values()


def _signature(in_place: bool) -> str:
    def annotate(name: str, index: int) -> str:
        return f"Tensor({chr(ord('a') + index)}!) {name}" if in_place and name in CACHE_NAMES else f"Tensor {name}"

    optional = [f"Tensor? {t.name}=None" for t in (*METRIC_INPUTS, *WINDOW_INPUTS)]
    inputs = ", ".join([*(annotate(t.name, i) for i, t in enumerate(INPUTS)), *optional])
    outputs = "Tensor" if in_place else f"({', '.join(['Tensor'] * (1 + len(CACHE_NAMES)))})"
    attributes = ", ".join(f"{f.type} {f.name}" for f in fields(OperatorAttributes))
    return f"({inputs}, *, {attributes}) -> {outputs}"


@torch.library.custom_op("vkvx::visual_kv_attention", mutates_args=(), schema=_signature(in_place=False))
def visual_kv_attention(*tensors: Tensor | None, **attributes: Any) -> tuple[Tensor, ...]:
    """Attention over the packed cache and append, functional: returns (output, *updated caches); see the module."""
    return _run(tensors, OperatorAttributes(**attributes), in_place=False)


@torch.library.custom_op("vkvx::visual_kv_attention_", mutates_args=CACHE_NAMES, schema=_signature(in_place=True))
def visual_kv_attention_(*tensors: Tensor | None, **attributes: Any) -> Tensor:
    """The same with the caches updated in place: returns the output."""
    return _run(tensors, OperatorAttributes(**attributes), in_place=True)[0]


@visual_kv_attention.register_fake
def _(*tensors: Tensor, **attributes: Any) -> tuple[Tensor, ...]:
    caches = dict(zip((t.name for t in INPUTS), tensors, strict=False))
    return torch.empty_like(tensors[0]), *(torch.empty_like(caches[name]) for name in CACHE_NAMES)


@visual_kv_attention_.register_fake
def _(*tensors: Tensor, **attributes: Any) -> Tensor:
    return torch.empty_like(tensors[0])
