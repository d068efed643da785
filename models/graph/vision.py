"""The vision graph: from pixels as the image processor gives them to embeddings in the decoder's space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vkvx.manifest import ModelInfo, TensorSpec
from vkvx.models.family import Adapter


class VisionGraph(nn.Module):
    """Tower and projector. Pixels come in float32 and are cast to the model's dtype."""

    def __init__(self, model: Any, adapter: Adapter, dtype: torch.dtype):
        super().__init__()
        # The plain formula: what other implementations become in ONNX is the same with more nodes.
        model.set_attn_implementation({"vision_config": "eager"})
        self.model, self.adapter, self.dtype = model, adapter, dtype

    def forward(self, *pixel_inputs: Tensor) -> Tensor:
        """Pixel inputs as the adapter describes them; returns image_embeds [tokens of all pictures, hidden]."""
        cast = (x.to(self.dtype) if x.is_floating_point() else x for x in pixel_inputs)
        return self.adapter.image_embeds(self.model, *cast)


def vision_outputs(model: ModelInfo) -> tuple[TensorSpec, ...]:
    """Output of the vision graph; Np is the number of tokens of all pictures."""
    return (TensorSpec("image_embeds", model.dtype, ("Np", model.hidden_size)),)
