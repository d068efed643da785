"""A model with linear attention and the packed cache: its states go along as in transformers' own caches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vkvx import InputError, OptionError, quantize_visual_cache
from vkvx.models.presets import preset_config
from vkvx.models.random_checkpoint import write_checkpoint
from vkvx.runtime.transformers.plug_in import VisualCacheHandle

LINEAR = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import Qwen3_5ForConditionalGeneration

    directory: Path = tmp_path_factory.mktemp("checkpoints") / "qwen3.5"
    write_checkpoint(directory, preset_config("tiny-qwen3.5"), dtype="float32", seed=1)
    made = Qwen3_5ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    made.generation_config.eos_token_id = None
    return made.eval().requires_grad_(False)


@pytest.fixture
def handle(model: Any) -> Iterator[VisualCacheHandle]:
    with quantize_visual_cache(model, bits=16) as made:
        yield made


def tokens(count: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(10, 500, (rows, count), generator=torch.Generator().manual_seed(seed))


def plain(model: Any, ids: Tensor) -> Tensor:
    """Logits of the unchanged model."""
    return model(input_ids=ids).logits


def test_calls_go_on_where_others_ended(model: Any) -> None:
    ids = tokens(40, rows=2)
    expected = plain(model, ids)
    with quantize_visual_cache(model, bits=16) as handle:
        cache = handle.new_cache()
        parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split([25, 1, 14], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-4)
        assert cache.has_previous_state()
        assert [layer for layer, linear in enumerate(cache.is_linear) if linear] == list(range(LINEAR))
        states = sum(tensor.nbytes for layer in cache.states() for tensor in layer)
        assert 0 < states < cache.allocated_bytes
        cache.reset()
        assert not cache.has_previous_state()
        assert cache.allocated_bytes == 0
        again = model(input_ids=ids, past_key_values=cache).logits
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(plain(model, ids), expected, rtol=0, atol=0)


def test_beams_take_their_states_along(model: Any) -> None:
    ids, options = tokens(12, rows=2), {"max_new_tokens": 10, "num_beams": 3, "do_sample": False}
    expected = model.generate(input_ids=ids, **options)
    with quantize_visual_cache(model, bits=16):
        assert model.generate(input_ids=ids, **options).tolist() == expected.tolist()


def test_tokens_cannot_be_taken_back(model: Any, handle: VisualCacheHandle) -> None:
    cache = handle.new_cache()
    model(input_ids=tokens(9), past_key_values=cache)
    cache.crop(0)
    with pytest.raises(OptionError, match="linear attention; reset"):
        cache.crop(-1)
    states = cache.states()
    expected = model(input_ids=tokens(5, seed=1), past_key_values=cache).logits
    cache.rewind(5, states)
    assert torch.equal(model(input_ids=tokens(5, seed=1), past_key_values=cache).logits, expected)


def test_a_failed_call_ends_a_sequence(model: Any, handle: VisualCacheHandle) -> None:
    cache = handle.new_cache()
    expected = model(input_ids=tokens(9), past_key_values=cache).logits

    def fail(*_: Any) -> None:
        raise RuntimeError("stopped on purpose")

    hook = model.model.language_model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        model(input_ids=tokens(1), past_key_values=cache)
    hook.remove()
    with pytest.raises(InputError, match="reset"):
        model(input_ids=tokens(1), past_key_values=cache)
    cache.reset()
    assert torch.equal(model(input_ids=tokens(9), past_key_values=cache).logits, expected)
