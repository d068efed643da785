"""Decoder layers of known kinds as a few kernels, for calls of few positions: decode steps.

transformers' modules hold the weights and run all other calls. A layer is fused where its class and those of its parts
are listed here, and their attributes are what the kernels compute; others run as they are. Roundings between what is
fused fall away, so results are a little nearer to exact ones than those of the modules.
"""

from __future__ import annotations

import logging
import os
import shutil
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from vkvx.models.graph import decoder
from vkvx.runtime.backends.torch.projections import Merged

if TYPE_CHECKING:
    from vkvx.runtime.backends.torch.step_kernels import Kernels

POSITIONS = 8
"""Most positions of a row in calls that are fused."""
PLAIN = ("input_layernorm", "post_attention_layernorm")
SANDWICH = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
"""Norms of a layer in the order of their use; of four, two follow the attention and the MLP."""
LAYERS = {
    **dict.fromkeys(("Llama", "Mistral", "Granite", "Qwen2", "Qwen3", "Qwen2VL", "Qwen2_5_VL"), PLAIN),
    **dict.fromkeys(("Qwen3VLText", "PaddleOCR", "Gemma"), PLAIN),
    **dict.fromkeys(("Gemma2", "Gemma3"), SANDWICH),
}
"""Names of classes of transformers, less ``DecoderLayer``, ``Attention``, ``MLP`` and ``RMSNorm``."""
ALIGNED = 8
"""For products in 16 bits whose columns are no multiple of this cuBLAS takes kernels of an earlier kind: 1.0 ms for 100
rows and a head of 92,553 x 4,096, where reading the weights takes 0.2."""
HEAD_NORMS = ("q_norm", "k_norm")
ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu"}

_log = logging.getLogger(__name__)


class Norm(NamedTuple):
    """An RMS norm: its weight [width], to which ``shift`` is added."""

    weight: Tensor
    eps: float
    shift: float


class _Replacement:
    """In place of the forward method of a module, which it does not keep alive: its memory is freed at once."""

    def __init__(self, module: Any, kernels: Kernels) -> None:
        self._module, self._kernels = weakref.ref(module), kernels

    def _whole(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the module does by itself."""
        module: Any = self._module()
        result: Tensor = type(module).forward(module, *args, **kwargs)
        return result


class _FusedLayer(_Replacement):
    """A layer whose norms are those of ``norms``."""

    def __init__(self, layer: Any, norms: tuple[str, ...], kernels: Kernels) -> None:
        super().__init__(layer, kernels)
        attention, mlp = layer.self_attn, layer.mlp
        self._attention, self._head_dim = attention, attention.head_dim
        self._qkv, self._output = attention.q_proj, attention.o_proj
        self._gate_up, self._down = mlp.gate_proj, mlp.down_proj
        self._norms = [_norm(getattr(layer, name)) for name in norms]
        self._head_norms = [_norm(getattr(attention, name)) for name in HEAD_NORMS if hasattr(attention, name)]
        # Mistral's attention passes on what its config says, others keep it.
        window = attention.config if type(attention).__name__ == "MistralAttention" else attention
        self._options = {
            "scaling": attention.scaling,
            "sliding_window": getattr(window, "sliding_window", None),
            "softcap": getattr(attention, "attn_logit_softcapping", None),
        }
        self._factor = float(getattr(layer, "residual_multiplier", 1.0))
        self._activation = ACTIVATIONS[type(mlp.act_fn).__name__]

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = kwargs.get("position_embeddings")
        if args or given is None or hidden_states.shape[1] > POSITIONS or torch.compiler.is_compiling():
            return self._whole(hidden_states, *args, **kwargs)
        batch, positions, width = hidden_states.shape
        turns = [x.expand(batch, positions, -1).reshape(-1, self._head_dim) for x in given]
        hidden = hidden_states.reshape(-1, width)
        run = self._one if len(hidden) == 1 else self._many

        def attend(qkv: Tensor) -> Tensor:
            return self._attend(qkv, turns, (batch, positions), kwargs.get("vkvx_attention"))

        return run(hidden, attend).view(batch, positions, width)

    def _one(self, hidden: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        product, norms, factor = self._kernels.product, self._norms, self._factor
        attended = attend(product(hidden, self._qkv, norm=norms[0]))
        if len(norms) == 2:
            hidden = product(attended, self._output, residual=hidden, factor=factor)
            gated = product(hidden, self._gate_up, norm=norms[1], activation=self._activation)
            return product(gated, self._down, residual=hidden, factor=factor)
        hidden = self._kernels.norm_added(product(attended, self._output), hidden, norms[1])
        gated = product(hidden, self._gate_up, norm=norms[2], activation=self._activation)
        return self._kernels.norm_added(product(gated, self._down), hidden, norms[3])

    def _many(self, hidden: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        kernels, norms = self._kernels, self._norms
        attended = attend(_product(kernels.norm(hidden, norms[0]), self._qkv))
        output = _product(attended, self._output)
        if len(norms) == 2:
            hidden, normed = kernels.added_norm(output, hidden, norms[1], self._factor)
            gated = kernels.gate(_product(normed, self._gate_up), self._activation)
            if self._down.bias is not None:
                hidden.add_(self._down.bias, alpha=self._factor)
            return hidden.addmm_(gated, self._down.weight.t(), alpha=self._factor)
        hidden = kernels.norm_added(output, hidden, norms[1])
        gated = kernels.gate(_product(kernels.norm(hidden, norms[2]), self._gate_up), self._activation)
        return kernels.norm_added(_product(gated, self._down), hidden, norms[3])

    def _attend(self, qkv: Tensor, turns: list[Tensor], shape: tuple[int, int], attention: Any) -> Tensor:
        """Attention of qkv [tokens, (Hq + 2 Hkv) D]: [tokens, Hq D]."""
        dim = self._head_dim
        query, key, _ = (size // dim for size in self._qkv.sizes)
        self._kernels.rotate(qkv, turns, (query, key), self._head_norms)
        heads = qkv.view(*shape, -1, dim).transpose(1, 2)
        parts = heads[:, :query], heads[:, query : query + key], heads[:, query + key :]
        output, _ = decoder.attend(self._attention, *parts, None, vkvx_attention=attention, **self._options)
        return output.reshape(len(qkv), -1)


class _Head(_Replacement):
    """A head without bias."""

    def __call__(self, hidden: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._whole(hidden)
        module: Any = self._module()
        rows = hidden.reshape(-1, hidden.shape[-1])
        if len(rows) == 1:
            return self._kernels.product(rows, module).view(*hidden.shape[:-1], -1)
        if len(module.weight) % ALIGNED == 0:
            return self._whole(hidden)
        return aligned_product(rows, module.weight).unflatten(0, hidden.shape[:-1])


class _LastNorm(_Replacement):
    """The norm behind the layers."""

    def __call__(self, hidden: Tensor) -> Tensor:
        if hidden.shape[1] > POSITIONS or torch.compiler.is_compiling():
            return self._whole(hidden)
        return self._kernels.norm(hidden.reshape(-1, hidden.shape[-1]), _norm(self._module())).view(hidden.shape)


def fuse(text_model: nn.Module, head: nn.Module) -> int:
    """Let the layers of ``text_model`` that are known, its last norm and ``head`` run fused; how many layers do.

    Their projections are merged. Where Triton cannot compile, nothing is fused, and a line of the log says why.
    """
    kernels = _load_kernels(text_model)
    if isinstance(kernels, str):
        _log.warning("decode steps run as transformers' modules, which takes longer: %s", kernels)
        return 0
    layers: Any = text_model.layers
    found = [(layer, norms) for layer in layers if (norms := known_norms(layer)) is not None]
    for layer, norms in found:
        layer.forward = _FusedLayer(layer, norms, kernels)
    if len(found) == len(layers):
        last: Any = text_model.norm
        last.forward = _LastNorm(last, kernels)
    if type(head) is nn.Linear and head.bias is None and _is_small(head):
        head.forward = _Head(head, kernels)
    return len(found)


def _load_kernels(text_model: nn.Module) -> Kernels | str:
    """The kernels for the GPU of a model, or why there are none."""
    reason = no_compiler()
    if reason is not None:
        return reason
    from vkvx.runtime.backends.torch.step_kernels import Kernels

    weight = next(text_model.parameters())
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < (8, 0):
        return "Triton needs a GPU of compute capability 8.0"
    kernels = Kernels(capability >= (9, 0))
    try:
        kernels.gate(weight.new_zeros(1, 32), "silu")
    except Exception as error:  # Triton raises its own, and what the C compiler makes of a missing Python.h
        return f"Triton cannot compile ({str(error).strip().partition(chr(10))[0] or type(error).__name__})"
    return kernels


def known_norms(layer: Any) -> tuple[str, ...] | None:
    """The norms of a layer that is one of ``LAYERS`` with merged projections, None for any other."""
    prefix = type(layer).__name__.removesuffix("DecoderLayer")
    norms = LAYERS.get(prefix)
    if norms is None or not type(layer).__module__.startswith("transformers.models."):
        return None
    attention, mlp = layer.self_attn, layer.mlp
    names = {type(attention): f"{prefix}Attention", **{type(getattr(layer, one)): f"{prefix}RMSNorm" for one in norms}}
    merged, single = (attention.q_proj, mlp.gate_proj), (attention.o_proj, mlp.down_proj)
    known = (
        all(kind.__name__ == name for kind, name in names.items())
        and type(mlp).__name__ in (f"{prefix}MLP", "Qwen2MLP")
        and type(mlp.act_fn).__name__ in ACTIVATIONS
        and all(isinstance(one, Merged) for one in merged)
        and all(type(one) is nn.Linear for one in single)
        and all(map(_is_small, (*merged, *single)))
    )
    return norms if known else None


def aligned_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` [n, H] times ``weight`` [V, H], where V is no multiple of ``ALIGNED``: [n, V], whose rows start at one."""
    columns = len(weight)
    result = x.new_empty(len(x), -(-columns // ALIGNED) * ALIGNED)
    most = columns - columns % ALIGNED
    for part in (slice(most), slice(most, columns)):
        torch.mm(x, weight[part].T, out=result[:, part])
    return result[:, :columns]


def _product(x: Tensor, module: Any) -> Tensor:
    return nn.functional.linear(x, module.weight, module.bias)


def _is_small(module: Any) -> bool:
    """Whether kernels can count its weights in 32 bits."""
    return module.weight.numel() < 2**31


def _norm(module: Any) -> Norm:
    is_gemma = type(module).__name__.startswith("Gemma")
    return Norm(module.weight, module.eps if is_gemma else module.variance_epsilon, 1.0 if is_gemma else 0.0)


def no_compiler() -> str | None:
    """What Triton lacks on this machine, None if nothing."""
    if find_spec("triton") is None:
        return "the Python package 'triton' is missing"
    compilers = [os.environ.get("CC") or "", "gcc", "clang", "cc"]
    return None if any(map(shutil.which, filter(None, compilers))) else "there is no C compiler (gcc or clang, or CC)"
