"""The vision graph: from pixels as the image processor gives them to embeddings in the decoder's space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vkvx.manifest import ModelInfo, TensorSpec
from vkvx.models.family import Family


class VisionGraph(nn.Module):
    """Tower and projector. Pixels come in float32 and are cast to the model's dtype."""

    def __init__(self, model: Any, family: Family, dtype: torch.dtype):
        super().__init__()
        # The plain formula: what other implementations become in ONNX is the same with more nodes.
        model.set_attn_implementation({"vision_config": "eager"})
        self.model, self.family, self.dtype = model, family, dtype
        self.constants = family.vision_constants(model)
        for name, tensor in self.constants.items():
            self.register_buffer(name, tensor.to(model.device), persistent=False)

    def forward(self, *pixel_inputs: Tensor) -> Tensor:
        """Pixel inputs as the family describes them; returns image_embeds [tokens of all pictures, hidden]."""
        cast = (x.to(self.dtype) if x.is_floating_point() else x for x in pixel_inputs)
        return self.family.image_embeds(self.model, *cast, **{name: getattr(self, name) for name in self.constants})


def vision_outputs(model: ModelInfo, rows: str) -> tuple[TensorSpec, ...]:
    """Output of the vision graph; ``rows`` says how many tokens all pictures have, such as ``"256*P"``."""
    return (TensorSpec("image_embeds", model.dtype, (rows, model.hidden_size)),)
