"""Parts of the methods that ``cases.methods`` compares: coders of keys and values, metrics, score corrections.

A :class:`Coder` turns a layer's visual keys or values into what is left of them; ``combine`` makes a technique of one
for keys, one for values and a score correction. What the product has comes from the product. A *metric* H weighs an
error e as e . H e (``plugins/reference/shaping.py``); here it is a function of the layer: [B or 1, Hkv, D, D].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.simulation import Dense, Layer, Technique
from vkvx.format import BASELINE_BITS, QUANTILE_ALPHA, SHRINK_KEY, SHRINK_VALUE
from vkvx.plugins.reference import quantization, shaping

KEYS, VALUES = "keys", "values"
LayerMetric = Callable[[Layer], Tensor]
Correction = Callable[[Layer, Tensor], dict[str, Any]]
"""From a layer and what is left of its visual keys to fields of ``Dense``."""


@dataclass(eq=False)
class Coder:
    """What quantising leaves of a layer's visual keys or values [B, Hkv, n, D], and with how many bits. Remembered."""

    make: Callable[[Layer], tuple[Tensor, int]]

    def __call__(self, layer: Layer) -> tuple[Tensor, int]:
        if self not in layer.memo:
            layer.memo[self] = self.make(layer)
        return layer.memo[self]


def combine(keys: Coder, values: Coder, correction: Correction | None = None) -> Technique:
    """The technique that codes keys and values in these ways."""

    def technique(layer: Layer) -> Dense:
        (key, key_bits), (value, value_bits) = keys(layer), values(layer)
        fields = correction(layer, key) if correction else {}
        return Dense(key, value, key_bits, value_bits, **fields)

    return technique


def exact(which: str) -> Coder:
    """Leaves them as they are."""
    return Coder(lambda layer: (getattr(layer, which), BASELINE_BITS))


def quantized(which: str, quantizer: str, bits: int = 1) -> Coder:
    """A quantiser of the product without a metric, with its own alpha and gamma."""
    return Coder(lambda layer: (_product(getattr(layer, which), which, quantizer, bits), bits))


def by_layer(usual: Coder, others: dict[int, Coder]) -> Coder:
    """Another coder in some layers."""
    return Coder(lambda layer: others.get(layer.index, usual)(layer))


def shaped(which: str, metric: LayerMetric, bits: int = 1, step: float | None = None, sweeps: int = 1) -> Coder:
    """The product's ``shaped`` in a metric, if wanted with levels another number of deviations apart."""

    def make(layer: Layer) -> tuple[Tensor, int]:
        x = getattr(layer, which)
        found = shaping.shape(x, _all(x), bits, metric(layer), step=step, sweeps=sweeps)
        return quantization.decode(*found), bits

    return Coder(make)


def weighted(which: str) -> Coder:
    """Two levels by Lloyd's algorithm with weights: the attention to each token from the text after the picture.

    That is, for keys its sum over queries and query heads, for values the sum of its squares.
    """

    def make(layer: Layer) -> tuple[Tensor, int]:
        x = getattr(layer, which)
        attention = layer.attention_after if which == KEYS else layer.attention_after.square()
        weight = attention.unflatten(1, (x.shape[1], -1)).sum((2, 3)).unsqueeze(-1)
        threshold = (x * weight).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True)
        for _ in range(quantization.LLOYD_ITERATIONS):
            above = weight * (x > threshold)
            below = weight - above
            high, low = ((side * x).sum(-2, keepdim=True) / side.sum(-2, keepdim=True) for side in (above, below))
            threshold = (low + high) / 2
        return _encoded(x, (high - low).squeeze(-2), low.squeeze(-2), 1), 1

    return Coder(make)


def rotated(which: str, quantizer: str, *, centred: bool) -> Coder:
    """Channels mixed by a Hadamard matrix before they are quantised at 1 bit, and mixed back afterwards.

    ``centred`` takes the mean of each channel out before and adds it after.
    """

    def make(layer: Layer) -> tuple[Tensor, int]:
        x = getattr(layer, which)
        channels = x.shape[-1]
        pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=x.device) / math.sqrt(2)
        mixing = functools.reduce(torch.kron, [pair] * int(math.log2(channels)))
        mean = x.mean(-2, keepdim=True) if centred else torch.zeros_like(x[..., :1, :])
        return _product((x - mean) @ mixing, which, quantizer, 1) @ mixing.T + mean, 1

    return Coder(make)


def bias_corrected(values: Coder) -> Coder:
    """Adds to each channel the mean of what its values lost, weighted by the attention from the text after the picture.

    It goes into the offset, so it takes no room.
    """

    def make(layer: Layer) -> tuple[Tensor, int]:
        value, bits = values(layer)
        weight = layer.attention_after.unflatten(1, (value.shape[1], -1)).sum((2, 3)).unsqueeze(-1)
        lost = (weight * (layer.values - value)).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True)
        return value + lost, bits

    return Coder(make)


def error_feedback(which: str, metric: LayerMetric, widening: float) -> Coder:
    """One pass over the channels, each making up for the errors of those before, by the Cholesky factor of H.

    That is the order of work of GPTQ (arXiv 2210.17323), with 1 bit and Lloyd's levels, moved apart.
    """

    def make(layer: Layer) -> tuple[Tensor, int]:
        x = getattr(layer, which)
        scale, low = (row.unsqueeze(-1) for row in _widened(x, widening))
        factor = torch.linalg.cholesky(metric(layer))
        factor = factor / factor.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)  # H is factor * diagonal * factor^T
        target = x.transpose(-1, -2)
        left, error = torch.empty_like(target), torch.zeros_like(target)
        for c in reversed(range(target.shape[-2])):
            wanted = target[..., c, :] + (factor[..., c + 1 :, c, None] * error[..., c + 1 :, :]).sum(-2)
            code = ((wanted - low[..., c, :]) / scale[..., c, :]).round().clamp(0, 1)
            left[..., c, :] = low[..., c, :] + scale[..., c, :] * code
            error[..., c, :] = target[..., c, :] - left[..., c, :]
        return left.transpose(-1, -2), 1

    return Coder(make)


# Metrics


def regularised(moment: Tensor, floor: float) -> Tensor:
    """[..., D, D] scaled to a mean diagonal of 1, with ``floor`` added to the diagonal."""
    scale = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return moment / scale + floor * torch.eye(moment.shape[-1], device=moment.device)


def second_moment(query: Tensor, kv_heads: int) -> Tensor:
    """Mean of q q^T over positions and the query heads of a KV head: query [B, Hq, S, D] to [B, Hkv, D, D]."""
    grouped = query.unflatten(1, (kv_heads, -1)).flatten(2, 3)
    return grouped.transpose(-1, -2) @ grouped / grouped.shape[2]


def prompt_metric(part: Callable[[Layer], Tensor], floor: float) -> LayerMetric:
    """The second moment of some queries of the page's own prompt."""
    return lambda layer: regularised(second_moment(part(layer), layer.key.shape[1]), floor)


# Score corrections


def expected(limit: float) -> Correction:
    """The product's, from the RMS of each channel's residual."""

    def correction(layer: Layer, key: Tensor) -> dict[str, Any]:
        return {"rms": quantization.residual_rms(layer.keys, _all(key), _as_codes(key)), "limit": limit}

    return correction


def expected_in_metric(metric: LayerMetric, limit: float) -> Correction:
    """The product's for ``shaped``, whose RMS are scaled so that they tell the error of scores."""

    def correction(layer: Layer, key: Tensor) -> dict[str, Any]:
        rms = shaping.shaped_rms(layer.keys, _all(key), _as_codes(key), metric(layer))
        return {"rms": rms, "limit": limit}

    return correction


def expected_by_covariance(limit: float) -> Correction:
    """With the full covariance of the channels' rests in place of the squares of their RMS."""

    def correction(layer: Layer, key: Tensor) -> dict[str, Any]:
        residual = layer.keys - key
        channels = residual.shape[-1]
        covariance = (residual.transpose(-1, -2) @ residual / residual.shape[-2]).half().float()
        return {"covariance": covariance, "limit": limit, "extra": channels * (channels - 1)}

    return correction


def affine(taus: Sequence[float]) -> Correction:
    """CalibQuant's, with a tau for each layer."""
    return lambda layer, key: {"tau": taus[layer.index]}


# Parts


def _all(x: Tensor) -> Tensor:
    """The mask of a group without padding."""
    return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)


def _as_codes(x: Tensor) -> quantization.Quantized:
    """Dequantised [..., n, D] as codes of scale 1, for functions of the product that compare with the original."""
    one = torch.ones_like(x[..., 0, :], dtype=torch.float16)
    return quantization.Quantized(x, one, torch.zeros_like(one))


def _product(x: Tensor, which: str, quantizer: str, bits: int) -> Tensor:
    gamma = (SHRINK_KEY if which == KEYS else SHRINK_VALUE)[bits]
    return quantization.decode(
        *quantization.quantize(x, _all(x), bits, quantizer, alpha=QUANTILE_ALPHA[bits], gamma=gamma)
    )


def _encoded(x: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """What the format leaves of x with levels of another origin, scale and offset [..., D]."""
    scale, offset = scale.half(), offset.half()
    return quantization.decode(quantization.encode(x, scale, offset, bits), scale, offset)


def _widened(x: Tensor, widening: float) -> tuple[Tensor, Tensor]:
    """Lloyd's two levels as scale and offset [..., D] FP32, their distance times ``widening`` about their middle."""
    scale, offset = (row.float() for row in quantization.levels(x, _all(x), 1, "lloyd"))
    return widening * scale, offset + (1 - widening) * scale / 2
