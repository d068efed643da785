"""Layers of linear attention by the gated delta rule (Gated DeltaNet, arXiv 2412.06464), over states kept by slot.

The weights are those of transformers' modules, whose own forward calls have a Python loop over chunks, which cannot be
exported for any length, and know neither slots nor rows of different lengths. So :func:`mixing` lends the modules
another forward for the time of a call: projections, convolution and norms as theirs, the recurrence as one operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vkvx.plugins import torch_delta_rule  # noqa: F401 (registers the operator)

State = Sequence[Tensor]
"""Of a layer: ``conv_state`` [Bc, channels, kernel - 1] and ``recurrent_state`` FP32 [Bc, heads, K, V]."""
NORM_FLOOR = 1e-6
"""Added to the square of the length of queries and keys, as transformers does."""


class LinearStates:
    """The states of one forward call, and which part of each row counts.

    A row's tokens come first and padding follows. Padding changes no state, and neither does an idle row; a slot that
    holds nothing starts from zeros, whatever its states are.
    """

    def __init__(
        self,
        states: Mapping[int, State],
        slot: Tensor,
        lengths: Tensor,
        empty: Tensor,
        *,
        in_place: bool = False,
    ) -> None:
        """``states`` by layer; ``slot`` INT32 [B], -1 for idle rows; ``lengths`` INT [B] are the tokens of each row;
        ``empty`` BOOL [Bc], which slots hold nothing. With ``in_place`` states are updated as they are.
        """
        self.states = states
        self.presents: dict[int, State] = {}
        self._in_place = in_place
        live = slot >= 0
        self._row = slot.clamp(min=0)
        self._lengths = torch.where(live, lengths, 0)
        self._starts = empty.index_select(0, self._row) & live
        # Where rows are idle another row is written twice; where all are, slot 0 gets back what it had.
        donor = live.int().argmax(0)
        self._written = torch.where(live, torch.arange(slot.shape[0], device=slot.device), donor)
        self._target = self._row.index_select(0, self._written)

    def __call__(self, layer: int, module: Any, hidden: Tensor) -> Tensor:
        """What ``module``, that of layer ``layer``, makes of hidden states [B, S, hidden]: the same shape."""
        before = [self._read(state) for state in self.states[layer]]
        output, *after = gated_delta_net(module, hidden, self._lengths, *before)
        self.presents[layer] = [self._write(state, new) for state, new in zip(self.states[layer], after, strict=True)]
        return output

    def _read(self, state: Tensor) -> Tensor:
        """The state of each row, zeros where its slot holds nothing yet."""
        starts = self._starts.reshape(-1, *(1 for _ in state.shape[1:]))
        return torch.where(starts, 0.0, state.index_select(0, self._row))

    def _write(self, state: Tensor, new: Tensor) -> Tensor:
        index, new = (self._target.long(),), new.index_select(0, self._written)
        return state.index_put_(index, new) if self._in_place else state.index_put(index, new)


def gated_delta_net(
    module: Any, hidden: Tensor, lengths: Tensor, conv_state: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A Gated DeltaNet layer of transformers on hidden states [B, S, hidden], of which ``lengths`` [B] a row count.

    ``conv_state`` [B, channels, kernel - 1] are the inputs of the convolution before the call, ``state`` FP32
    [B, heads, K, V] is that of the recurrence. Returns the output, as large as ``hidden``, and both states behind the
    tokens that count.
    """
    positions, kept = hidden.shape[1], conv_state.shape[2]
    window = torch.cat([conv_state, module.in_proj_qkv(hidden).transpose(1, 2)], 2)
    last = lengths.unsqueeze(1) + torch.arange(kept, device=lengths.device)
    new_conv_state = window.gather(2, last.unsqueeze(1).expand(-1, window.shape[1], -1).long())
    mixed = F.conv1d(window, module.conv1d.weight, module.conv1d.bias, groups=window.shape[1])
    sizes = (module.key_dim, module.key_dim, module.value_dim)
    query, key, value = F.silu(mixed.float()).split(sizes, 1)  # [B, channels, S]
    query, key = (_unit(_heads(x, module.num_k_heads, module.num_v_heads)) for x in (query, key))
    counts = (torch.arange(positions, device=lengths.device) < lengths.unsqueeze(1)).unsqueeze(1)  # [B, 1, S]
    beta = module.in_proj_b(hidden).float().sigmoid().transpose(1, 2)
    step = F.softplus(module.in_proj_a(hidden).float() + module.dt_bias.float())
    decay = (step * -module.A_log.float().exp()).transpose(1, 2)
    output, new_state = torch.ops.vkvx.gated_delta_rule(
        query * module.head_k_dim**-0.5,
        key,
        _heads(value, module.num_v_heads, module.num_v_heads),
        torch.where(counts, decay, 0.0),
        torch.where(counts, beta, 0.0),
        state,
    )
    output = output.transpose(1, 2).to(hidden.dtype)  # [B, S, heads, V]
    gate = module.in_proj_z(hidden).unflatten(2, (module.num_v_heads, -1))
    return module.out_proj(module.norm(output, gate).flatten(2)), new_conv_state, new_state


def _heads(x: Tensor, heads: int, wanted: int) -> Tensor:
    """Channels [B, heads * D, S] as [B, wanted, S, D]: each head serves a run of those wanted."""
    x = x.unflatten(1, (heads, 1, -1)).transpose(3, 4)
    return x.expand(-1, -1, wanted // heads, -1, -1).flatten(1, 2)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_FLOOR)


@contextmanager
def mixing(modules: Mapping[int, Any], states: LinearStates | None) -> Iterator[None]:
    """Let the modules of linear attention, by layer, go by ``states``, which is None where there are none."""

    def forward(layer: int, module: Any) -> Callable[..., Tensor]:
        assert states is not None
        return lambda hidden_states, **others: states(layer, module, hidden_states)

    try:
        for layer, module in modules.items():
            module.forward = forward(layer, module)
        yield
    finally:
        for module in modules.values():
            vars(module).pop("forward", None)
