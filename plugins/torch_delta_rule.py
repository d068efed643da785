"""``torch.ops.vkvx.gated_delta_rule``: the recurrence of gated delta-rule linear attention in plain torch.

For a position with query q, key k, value v, decay g and beta b, on the state M [K, V] (Yang, Kautz, Hatamizadeh: "Gated
Delta Networks: Improving Mamba2 with Delta Rule", arXiv 2412.06464)::

    M <- exp(g) M
    M <- M + k (b (v - k^T M))^T
    output = q^T M

Positions come in chunks (section 3.3 of the paper). With c the sum of decays from the start of a chunk, what each
position writes, u, solves a unit triangular system: u_i = b_i (v_i - exp(c_i) k_i^T M - sum_{j<i} exp(c_i - c_j)
(k_i . k_j) u_j), with M the state before the chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vkvx.errors import OptionError
from vkvx.plugins.delta_rule import CHUNK, INPUTS

_SCHEMA = f"({', '.join(f'Tensor {t.name}' for t in INPUTS)}) -> (Tensor, Tensor)"


@torch.library.custom_op("vkvx::gated_delta_rule", mutates_args=(), schema=_SCHEMA)
def gated_delta_rule(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, H, S, V] and the state [B, H, K, V] behind the last position, FP32; inputs are those of the table.

    A position with decay 0 and beta 0 leaves the state exactly as it is. Raises OptionError for shapes and dtypes that
    do not fit.
    """
    _check(tensors)
    state = tensors[-1]
    if tensors[0].shape[2] == 1:
        return _step(tensors[:-1], state)
    outputs = []
    for chunk in zip(*(tensor.split(CHUNK, 2) for tensor in tensors[:-1]), strict=True):
        output, state = _chunk(chunk, state)
        outputs.append(output)
    return torch.cat(outputs, 2), state


def _step(position: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
    """One position: output and state."""
    query, key, value, decay, beta = position
    state = state * decay.exp().unsqueeze(-1)
    written = (value - key @ state) * beta.unsqueeze(-1)
    state = state + key.transpose(-1, -2) @ written
    return query @ state, state


def _chunk(positions: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
    """Up to ``CHUNK`` positions: output and state."""
    query, key, value, decay, beta = positions
    total = decay.cumsum(-1)
    kept, size = total.exp().unsqueeze(-1), beta.unsqueeze(-1)
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).tril().exp().tril()
    system = size * (key @ key.transpose(-1, -2)) * between  # the solver takes the diagonal for ones
    known = size * (value - kept * (key @ state))
    written = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    output = kept * (query @ state) + (query @ key.transpose(-1, -2) * between) @ written
    left = (total[..., -1:] - total).exp().unsqueeze(-1)
    return output, kept[..., -1:, :] * state + (left * key).transpose(-1, -2) @ written


def _check(tensors: tuple[Tensor, ...]) -> None:
    dims: dict[str, int] = {}
    for definition, tensor in zip(INPUTS, tensors, strict=True):
        shape = dict(zip(definition.shape, tensor.shape, strict=False))
        fits = tensor.dim() == len(definition.shape) and tensor.dtype is torch.float32
        if not fits or any(dims.setdefault(symbol, size) != size for symbol, size in shape.items()):
            wanted = ", ".join(f"{x} = {dims[x]}" if x in dims else x for x in definition.shape)
            given = f"{tensor.dtype} {list(tensor.shape)}"
            raise OptionError(f"{definition.name} must be torch.float32 [{wanted}], not {given}")


@gated_delta_rule.register_fake
def _(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(tensors[2]), torch.empty_like(tensors[-1])
