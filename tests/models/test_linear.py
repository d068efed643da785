"""Layers of linear attention over states by slot, against transformers' own module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from vkvx.models.graph.linear import LinearStates, mixing
from vkvx.models.presets import preset_config

SLOTS = 3
WIDTH = preset_config("tiny-qwen3.5").text_config.hidden_size


@pytest.fixture(scope="module")
def module() -> Any:
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    torch.manual_seed(0)
    made = Qwen3_5GatedDeltaNet(preset_config("tiny-qwen3.5").text_config, 0).eval().requires_grad_(False)
    made.A_log.fill_(-3.0)
    made.dt_bias.normal_()
    return made


def hidden(positions: int, seed: int = 0) -> Tensor:
    return torch.randn(1, positions, WIDTH, generator=torch.Generator().manual_seed(seed))


class Slots:
    """States of one layer, and how many tokens each slot holds."""

    def __init__(self, module: Any, in_place: bool) -> None:
        self.module, self.in_place = module, in_place
        channels, kernel = module.conv1d.weight.shape[0], module.conv_kernel_size
        self.states = [
            torch.full((SLOTS, channels, kernel - 1), torch.nan),
            torch.full((SLOTS, module.num_v_heads, module.head_k_dim, module.head_v_dim), torch.nan),
        ]
        self.counts = torch.zeros(SLOTS, dtype=torch.int32)

    def __call__(self, rows: list[tuple[int, Tensor]], padding: int = 0) -> list[Tensor]:
        """Outputs of each row's tokens: slot, and hidden states [1, n, hidden]; padding is large numbers."""
        lengths = torch.tensor([x.shape[1] for _, x in rows], dtype=torch.int32)
        batch = torch.full((len(rows), int(lengths.max()) + padding, WIDTH), 1e3)
        for row, (_, x) in zip(batch, rows, strict=True):
            row[: x.shape[1]] = x[0]
        slot = torch.tensor([slot for slot, _ in rows], dtype=torch.int32)
        given = LinearStates({0: self.states}, slot, lengths, self.counts == 0, in_place=self.in_place)
        with mixing({0: self.module}, given):
            output = self.module(batch, cache_params=None, attention_mask=None)
        if self.in_place:
            assert all(a is b for a, b in zip(given.presents[0], self.states, strict=True))
        self.states = list(given.presents[0])
        for (number, _), length in zip(rows, lengths, strict=True):
            if number >= 0:
                self.counts[number] += length
        return [out[:length] for out, length in zip(output, lengths, strict=True)]


@pytest.fixture(params=[False, True], ids=["functional", "in place"])
def slots(request: pytest.FixtureRequest, module: Any) -> Slots:
    return Slots(module, request.param)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_rows_are_those_of_transformers(module: Any, slots: Slots) -> None:
    """Rows of different lengths in slots full of NaN; then steps; all as transformers has it, a sequence at a time."""
    lengths, steps = (70, 9), 3
    whole = [hidden(length + steps, seed) for seed, length in enumerate(lengths)]
    expected = [module(x)[0] for x in whole]
    first = slots([(2, whole[0][:, :70]), (0, whole[1][:, :9])], padding=5)
    for found, wanted in zip(first, expected, strict=True):
        close(found, wanted[: len(found)])
    for step in range(steps):
        fed = [(slot, x[:, n + step : n + step + 1]) for slot, x, n in zip((2, 0), whole, lengths, strict=True)]
        for found, wanted, n in zip(slots(fed), expected, lengths, strict=True):
            close(found, wanted[n + step : n + step + 1])


def test_states_are_those_of_transformers(module: Any, slots: Slots) -> None:
    config = preset_config("tiny-qwen3.5").text_config
    cache, x = DynamicCache(config=config), hidden(20)
    module(x, cache_params=cache)
    slots([(1, x)], padding=4)
    close(slots.states[1][1], cache.get_recurrent_state(0)[0])
    close(slots.states[0][1], cache.get_conv_state(0)[0, :, 1:])


@pytest.mark.parametrize("cut", [1, 2, 30, 64])
def test_calls_may_be_cut_anywhere(module: Any, slots: Slots, cut: int) -> None:
    x = hidden(80)
    expected = module(x)[0]
    parts = [*slots([(1, x[:, :cut])]), *slots([(1, x[:, cut:])], padding=2)]
    close(torch.cat(parts), expected)


def test_idle_rows_change_nothing(slots: Slots) -> None:
    x, nothing = hidden(12), hidden(0)
    slots([(0, x), (1, hidden(5, 1))])
    before = [state.clone() for state in slots.states]
    slots([(-1, nothing), (1, hidden(1, 2)), (-1, nothing)])
    for state, old in zip(slots.states, before, strict=True):
        assert torch.equal(state[0], old[0])
        assert not torch.equal(state[1], old[1])
    before = [state.clone() for state in slots.states]
    slots([(-1, nothing), (-1, nothing)], padding=3)
    for state, old in zip(slots.states, before, strict=True):
        assert torch.equal(state[:2], old[:2])


def test_a_slot_that_is_emptied_starts_anew(module: Any, slots: Slots) -> None:
    slots([(1, hidden(30, 5))])
    slots.counts[1] = 0
    x = hidden(7)
    (found,) = slots([(1, x)])
    close(found, module(x)[0])


def test_modules_are_lent_for_a_call_only(module: Any, slots: Slots) -> None:
    with pytest.raises(IndexError):
        slots([(SLOTS, hidden(3))])
    assert "forward" not in vars(module)
