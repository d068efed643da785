"""Text rows of 8 bits: keys or values of a token and KV head as INT8 codes with one FP16 scale, in INT32 words.

The reference, in torch; ``docs/format.md`` has the specification to the bit. A row of D channels takes D/4 + 1 words:
four codes a word, the first in the lowest byte, then the bits of the scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vkvx.format import TEXT_SCALE_MOST, TEXT_TOP
from vkvx.plugins.reference.quantization import sanitize


def encode(x: Tensor) -> Tensor:
    """Rows [..., D] of any float type to words INT32 [..., D/4 + 1]; D is a multiple of 4.

    NaN counts as 0, what lies beyond FP16 as its largest number.
    """
    x = sanitize(x)
    # A division by a number on the device: torch divides by one on the host as by its reciprocal.
    top = torch.tensor(float(TEXT_TOP), device=x.device)
    scale = (x.abs().amax(-1, keepdim=True) / top).half().clamp(max=TEXT_SCALE_MOST)
    step = scale.float()
    codes = (x / torch.where(step > 0, step, 1.0)).round().clamp(-TEXT_TOP, TEXT_TOP)
    codes = torch.where(step > 0, codes, 0.0).to(torch.int8)
    bits = scale.contiguous().view(torch.int16).to(torch.int32)
    return torch.cat([codes.contiguous().view(torch.int32), bits], -1)


def decode(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Words INT32 [..., D/4 + 1] to code times scale [..., D], the product rounded to ``dtype``: the model's, T."""
    codes = words[..., :-1].contiguous().view(torch.int8)
    scale = words[..., -1:].to(torch.int16).contiguous().view(torch.float16)
    return (codes.float() * scale.float()).to(dtype)
