"""A transformers model without its weights, for tracing and for counting parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from vkvx.errors import ModelError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "int32": torch.int32}


def build_model(model_class: Any, config: Any, dtype: str) -> Any:
    """A transformers model in evaluation mode; its weights are fake (no memory), its computed buffers are real."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        with torch.device("meta"):
            model = model_class(config).eval()
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
    finally:
        torch.set_default_dtype(default)
    model.tie_weights()
    _stored_buffers_as_parameters(model)
    _compute_buffers(model, model)
    return model.requires_grad_(False)


def fake_weight(model: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor without memory beside the weights of ``model``, for one that is computed after the export."""
    with next(p.fake_mode for p in model.parameters() if isinstance(p, FakeTensor)):
        return torch.empty(tuple(shape), dtype=dtype)


def _stored_buffers_as_parameters(model: nn.Module) -> None:
    """Make parameters of buffers that a checkpoint holds: an export takes parameters for weights."""
    for module in model.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                delattr(module, name)
                module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))


def _compute_buffers(module: nn.Module, owner: Any) -> None:
    """Give buffers that no checkpoint holds (rotary frequencies) their values, the way transformers does it itself."""
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        owner = module
    names = module._non_persistent_buffers_set
    for name in names:
        fake = getattr(module, name)
        # NaN, or the smallest integer, stands for "not computed".
        unset = torch.nan if fake.is_floating_point() else torch.iinfo(fake.dtype).min
        setattr(module, name, torch.full(fake.shape, unset, dtype=fake.dtype))
    if names:
        with torch.no_grad():
            owner._init_weights(module)
    for name in names:
        value = getattr(module, name)
        if (value.isnan() if value.is_floating_point() else value == torch.iinfo(value.dtype).min).any():
            raise ModelError(f"transformers does not compute the buffer {name} of {type(module).__name__}; upgrade it")
    for child in module.children():
        _compute_buffers(child, owner)
