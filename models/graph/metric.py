"""The metrics of the quantiser ``shaped``, from a model's weights: what counts as an error of a key and of a value.

*Keys.* A query is R W (g * x), with x the normalised hidden state, g the weight of the norm, W the query projection and
R the rotary embedding of its position. With x taken as white, its second moment is R W diag(g^2) W^T R^T. Cached keys
meet queries of many later positions, so the moment is averaged over positions after the call's last one, the nearest
having the most weight. The operator turns the average to where a call ends.

*Values.* An error e of a value shows as W e behind the output projection W of each query head: W^T W.

Both are summed over the query heads of a KV head. Nothing of that needs data; a model's own directions do the work.
Where `vkvx calibrate` has recorded what queries a model really has and what they attend to, its moments take the place
of that of white states, with a part of it as the prior, and query heads count by what they take from pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from vkvx.manifest import LayerInfo, ModelInfo
from vkvx.models.family import AttentionWeights, Family
from vkvx.models.graph.moments import Moments, head_weights, mixed, prior_share
from vkvx.plugins.reference.shaping import rotate

REACH = 4096
"""Positions after a call whose queries count, evenly on a logarithmic scale. (Answers are short, chats are long.)"""
METRICS_FILE = "vkvx-metrics.safetensors"
"""In a bundle: FP16 tensors ``key.{layer}`` and ``value.{layer}``, [Hkv, D, D]."""
FLOOR = 0.1
"""Added to the diagonal, whose mean is 1: the weights say nothing about what the hidden states prefer."""
PRIOR_SAMPLES = 0.5
"""As many recorded answers count as much as the weights."""
NEAR, NEAR_SHARE, FAR = 32, 0.3, 2048
"""Distances that recorded queries are turned to: 1 to ``NEAR``, evenly on a logarithmic scale, for the answer itself,
count this part, and 1 to ``FAR``, evenly in their square root, the rest."""


@dataclass(frozen=True)
class Metrics:
    """Metrics of keys and values of each cache, FP16 [Hkv, D, D], and the rotary embedding of each attention layer."""

    key: tuple[Tensor, ...]
    value: tuple[Tensor, ...]
    rotary: Mapping[int, Rotary]

    def rotations(self, positions: Tensor) -> dict[int, Tensor]:
        """Cosine and sine by layer at a position of each row, positions [B]: FP32 [B, 2, D]."""
        return rotations(self.rotary, positions)


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of a layer with heads of ``head_dim``, and what it is to be told besides positions."""

    embedding: Any
    head_dim: int
    options: tuple[tuple[str, Any], ...] = ()


def layer_rotary(family: Family, model: Any) -> dict[int, Rotary]:
    """The rotary embedding of each attention layer of a model."""
    embedding, config = family.rotary_embedding(model), model.config
    return {
        i: Rotary(embedding, layer.head_dim, tuple(family.rotary_options(config, i).items()))
        for i, layer in enumerate(family.layers(config))
        if layer.linear is None
    }


def model_metrics(family: Family, model: Any, info: ModelInfo, moments: Moments | None = None) -> Metrics:
    """Metrics from the weights of a loaded model and its recorded ``moments``, on the devices of its layers."""
    rotary = layer_rotary(family, model)
    layers = (family.attention_weights(model, layer) for layer in info.caches)
    return Metrics(*compute_metrics(layers, rotary, info, moments), rotary)


def compute_metrics(
    layers: Iterable[AttentionWeights], rotary: Mapping[int, Rotary], info: ModelInfo, moments: Moments | None = None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Metrics of keys and of values of each cache, FP16 [Hkv, D, D]; the layers that have one come one at a time."""
    windows = [(1.0, _logarithmic(REACH))]
    if moments is not None:
        near, far = _logarithmic(NEAR), np.unique((np.linspace(1, FAR**0.5, 64) ** 2).astype(np.int64))
        windows = [(NEAR_SHARE / len(near), near), ((1 - NEAR_SHARE) / len(far), far)]
    pairs = []
    for number, (weights, i) in enumerate(zip(layers, info.caches, strict=True)):
        device, layer = weights.query.device, info.layers[i]
        turns = [(factor, rotation(rotary[i], torch.from_numpy(one).to(device))) for factor, one in windows]
        moment, heads = _query_moment(weights, layer, info.query_heads), torch.ones(info.query_heads)
        if moments is not None:
            share = prior_share(moments.samples, PRIOR_SAMPLES)
            moment = mixed(moment, moments.query[number].to(device), share)
            heads = head_weights(moments.attention[number], share, layer.kv_heads)
        key = _normalised(_turned(moment, layer, turns))
        pairs.append((key, _value_metric(weights, layer, heads.to(device))))
    keys, values = zip(*pairs, strict=True)
    return keys, values


def rotations(rotary: Mapping[int, Rotary], positions: Tensor) -> dict[int, Tensor]:
    """Cosine and sine of each layer at positions [B]: FP32 [B, 2, D]; layers that are alike share a tensor."""
    made: dict[Rotary, Tensor] = {}
    for one in rotary.values():
        if one not in made:
            made[one] = rotation(one, positions)
    return {layer: made[one] for layer, one in rotary.items()}


def rotation(rotary: Rotary, positions: Tensor) -> Tensor:
    """Cosine and sine of a rotary embedding at positions [B]: FP32 [B, 2, D], 1 and 0 for channels it does not turn."""
    like = torch.zeros(1, dtype=torch.float32, device=positions.device)
    cosine, sine = rotary.embedding(like, positions.unsqueeze(1), **dict(rotary.options))
    missing = (0, rotary.head_dim - cosine.shape[-1])
    return torch.cat([pad(cosine, missing, value=1.0), pad(sine, missing)], 1)


def _query_moment(weights: AttentionWeights, layer: LayerInfo, query_heads: int) -> Tensor:
    """Second moment [Hkv, D, D] of queries at position 0 whose states are white noise; FP32."""
    query = weights.query.float() * (weights.norm.float() + weights.norm_shift)
    query = query.unflatten(0, (query_heads, -1))[:, : layer.head_dim]
    moment = query @ query.transpose(1, 2)
    if weights.query_bias is not None:
        bias = weights.query_bias.float().reshape(query_heads, -1, 1)[:, : layer.head_dim]
        moment = moment + bias @ bias.transpose(1, 2)
    if weights.query_norm is not None:  # each query has the norm's length, whatever its size was before
        size = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        norm = weights.query_norm.float() + weights.norm_shift
        moment = moment / size * torch.outer(norm, norm)
    return moment.unflatten(0, (layer.kv_heads, -1)).mean(1)


def _logarithmic(reach: int) -> np.ndarray:
    """Distances from 1 to ``reach``, even on a logarithmic scale."""
    return np.unique(np.geomspace(1, reach, 64).astype(np.int64))


def _turned(moment: Tensor, layer: LayerInfo, windows: Sequence[tuple[float, Tensor]]) -> Tensor:
    """A moment [Hkv, D, D] summed over windows: a factor, and the turns [n, 2, D] of positions that it is for."""
    whole = torch.zeros_like(moment)
    for factor, turns in windows:
        for cosine, sine in turns:
            whole += factor * rotate(moment, cosine, sine, layer.rotary_dim, layer.rotary_interleaved)
    return whole


def _value_metric(weights: AttentionWeights, layer: LayerInfo, heads: Tensor) -> Tensor:
    """W^T W, each of the query heads by its weight in ``heads`` [Hq]."""
    output = weights.output.float().reshape(-1, len(heads), layer.head_dim).transpose(0, 1)
    moment = output.transpose(1, 2) @ output * heads[:, None, None]
    return _normalised(moment.unflatten(0, (layer.kv_heads, -1)).mean(1))


def _normalised(metric: Tensor) -> Tensor:
    """Scaled to a mean diagonal of 1, and the floor added; FP16. A metric of zeros becomes that of plain distance."""
    size = metric.shape[-1]
    scale = metric.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    one = torch.eye(size, device=metric.device)
    metric = torch.where(scale > 0, metric / torch.where(scale > 0, scale, 1.0), one) + FLOOR * one
    return ((metric + metric.transpose(-1, -2)) / 2).half()
