"""The vision graph: from pixels as the image processor gives them to embeddings in the decoder's space."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vkvx.models.family import Family

EAGER, FUSED = "eager", "sdpa"
"""Attention implementations of towers: the plain formula, which in ONNX has the fewest nodes, and torch's kernels,
which take no memory for the scores of all pairs of patches."""
PACKED, PACKED_FUSED = "vkvx_flash_vision", "vkvx_flash_vision_fused"
"""The same for towers of packed patches: :func:`_packed_attention`. transformers gives what stands for the lengths of
segments to names with "flash" in them."""


@dataclass(frozen=True)
class Whole:
    """In place of the lengths of segments: all patches attend to each other."""


@dataclass(frozen=True)
class Windows:
    """In place of the lengths of segments: patches attend within windows.

    ``patches`` INT [W, K] are those of each window, -1 fills up; ``place`` INT [N] is where each patch stands in it.
    """

    patches: Tensor
    place: Tensor


def use_packed_attention(model: Any, *, fused: bool = False) -> None:
    """Let the tower of ``model`` attend as :class:`Whole` and :class:`Windows` say."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, _packed_attention)
    AttentionInterface.register(PACKED_FUSED, partial(_packed_attention, fused=True))
    model.set_attn_implementation({"vision_config": PACKED_FUSED if fused else PACKED})


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Whole | Windows,
    fused: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query, key and value [1, H, N, D]; returns [1, N, H, D]."""
    if isinstance(cu_seq_lens_q, Whole):
        if fused:
            return scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None
        weights = torch.softmax(query @ key.transpose(2, 3) * scaling, dim=-1, dtype=torch.float32).to(query.dtype)
        return (weights @ value).transpose(1, 2), None
    patches, place = cu_seq_lens_q.patches, cu_seq_lens_q.place
    chosen = patches.clamp(min=0).flatten()
    # [H, W, K, D]: a window is far smaller than the square of all patches.
    parts = (x[0].index_select(1, chosen).unflatten(1, (-1, patches.shape[1])) for x in (query, key, value))
    query, key, value = parts
    missing = torch.where(patches < 0, torch.finfo(query.dtype).min, 0.0).to(query.dtype)
    scores = query @ key.transpose(2, 3) * scaling + missing[:, None, :]
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    output = (weights @ value).flatten(1, 2).index_select(1, place)
    return output.transpose(0, 1).unsqueeze(0), None


def resampled(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Rows [N, hidden] of a table [entries, hidden]: sums of rows ``index`` [N, taps] times ``weight`` [N, taps].

    In FP32, tap by tap: all taps at once would take the memory of as many pictures.
    """
    rows = [
        table.index_select(0, i).float() * w.unsqueeze(1)
        for i, w in zip(index.unbind(1), weight.unbind(1), strict=True)
    ]
    return sum(rows[1:], rows[0]).to(table.dtype)


class VisionGraph(nn.Module):
    """Tower and projector. Pixels come in float32 and are cast to the model's dtype.

    With ``fused`` the tower attends by torch's kernels, but for windows, whose scores are few.
    """

    def __init__(self, model: Any, family: Family, dtype: torch.dtype, *, fused: bool = False):
        super().__init__()
        if family.packed_vision:
            use_packed_attention(model, fused=fused)
        else:
            model.set_attn_implementation({"vision_config": FUSED if fused else EAGER})
        self.model, self.family, self.dtype, self.fused = model, family, dtype, fused
        self.constants = family.vision_constants(model)
        for name, tensor in self.constants.items():
            self.register_buffer(name, tensor.to(model.device), persistent=False)

    def forward(self, *pixel_inputs: Tensor) -> Tensor:
        """Pixel inputs as the family describes them; returns image_embeds [tokens of all pictures, hidden]."""
        cast = (x.to(self.dtype) if x.is_floating_point() else x for x in pixel_inputs)
        constants = {name: getattr(self, name) for name in self.constants}
        with _kernels() if self.fused else nullcontext():
            return self.family.image_embeds(self.model, *cast, **constants)


def _kernels() -> AbstractContextManager[None]:
    """torch's attention by any kernel but cuDNN's, which makes a plan for each new size of picture."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
