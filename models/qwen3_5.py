"""Qwen3.5: a decoder of which three layers in four are linear attention, with a state in place of keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vkvx.errors import ModelError
from vkvx.manifest import LayerInfo, LinearInfo
from vkvx.models.qwen3_vl import Qwen3VL

if TYPE_CHECKING:
    from torch import Tensor

ACTIVATION = "silu"
"""Of the convolution in front of the recurrence."""


class Qwen35(Qwen3VL):
    """``Qwen3_5ForConditionalGeneration``, dense: Qwen3-VL's tower without deepstack; queries come with a gate."""

    title = "Qwen3.5"
    aliases = {f"qwen3.5-{size}b": f"Qwen/Qwen3.5-{size}B" for size in ("0.8", "2", "4", "9", "27")}
    architecture = "Qwen3_5ForConditionalGeneration"
    text_models = tested_models = ("qwen3_5_text",)
    norm_shift = 1.0

    def check(self, config: Any) -> None:
        """The state needs a layer of attention beside it, whose counts tell how long a sequence is."""
        super().check(config)
        text = config.text_config
        if text.hidden_act != ACTIVATION:
            raise ModelError(f"linear attention with '{text.hidden_act}' is not supported; '{ACTIVATION}' is")
        if "full_attention" not in text.layer_types:
            raise ModelError("a decoder of linear attention alone keeps no pictures; transformers runs it as it is")

    def layers(self, config: Any) -> tuple[LayerInfo, ...]:
        """Full attention where the config says so, else a state."""
        text = config.text_config
        (attention, *_) = super().layers(config)
        keys = text.linear_num_key_heads * text.linear_key_head_dim
        linear = LinearInfo(
            conv_channels=2 * keys + text.linear_num_value_heads * text.linear_value_head_dim,
            conv_width=text.linear_conv_kernel_dim - 1,
            heads=text.linear_num_value_heads,
            key_dim=text.linear_key_head_dim,
            value_dim=text.linear_value_head_dim,
        )
        return tuple(
            attention if kind == "full_attention" else LayerInfo(0, 0, 0.0, linear=linear) for kind in text.layer_types
        )

    def deepstack(self, config: Any) -> int:
        """None."""
        return 0

    def image_embeds(self, model: Any, *pixel_inputs: Tensor, **constants: Tensor) -> Tensor:
        """The tower's output alone."""
        return self.tower(model, *pixel_inputs).pooler_output
