"""The packed cache in a transformers model: the same tokens as a bundle, as plain generate() at 16 bits, and alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from samples import CHECKPOINT, Page
from torch import Tensor

import vkvx
from vkvx import InputError, ModelError, OptionError, Session, quantize_visual_cache
from vkvx.runtime.transformers.cache import PackedVisualCache

ROOT = Path(__file__).parents[3]
TRANSCRIBE = "USER: <image>\nTranscribe the page. ASSISTANT:"
FOLLOW_UP = " USER: <image>\nRead row 2. ASSISTANT:"
IMAGE_TOKEN = 3
TOKENS = 576


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype="float32").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def processor() -> Any:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(CHECKPOINT, backend="pil")
    processor.tokenizer.padding_side = "left"
    return processor


def prepare(processor: Any, prompts: Sequence[str], pages: Sequence[Page]) -> dict[str, Tensor]:
    pictures = [Image.open(page.path) for page in pages] or None
    return dict(processor(text=list(prompts), images=pictures, padding=True, return_tensors="pt"))


def answer(model: Any, inputs: dict[str, Tensor], tokens: int = 32, **options: Any) -> Any:
    return model.generate(**inputs, max_new_tokens=tokens, return_dict_in_generate=True, **options)


def new_tokens(result: Any, inputs: dict[str, Tensor]) -> list[list[int]]:
    return result.sequences[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize(
    "options", [{"bits": 1}, {"bits": 4}, {"bits": 16}, {"key_bits": 2, "value_bits": 1, "text_bits": 8}], ids=str
)
def test_tokens_are_those_of_the_bundle(
    model: Any, processor: Any, pages: list[Page], bundle_factory: Callable[..., Path], options: dict[str, int]
) -> None:
    with (
        Session.load(bundle_factory(**options, dtype="float32"), provider="cpu", threads=1) as session,
        quantize_visual_cache(model, **options),
    ):
        for page in pages[:2]:
            inputs = prepare(processor, [TRANSCRIBE], [page])
            result = answer(model, inputs)
            expected = session.generate(TRANSCRIBE, page.path, max_new_tokens=32)
            assert new_tokens(result, inputs) == [list(expected.token_ids)]
            assert processor.decode(expected.token_ids, skip_special_tokens=True).strip() == page.truth


def test_a_second_turn_is_that_of_a_conversation(
    model: Any, processor: Any, pages: list[Page], bundle_factory: Callable[..., Path]
) -> None:
    """Another picture comes with the second turn; the history is given as ids, the cache as past_key_values."""
    bundle = bundle_factory(bits=1, dtype="float32")
    with Session.load(bundle, provider="cpu", threads=1) as session, session.conversation() as chat:
        expected = [
            list(chat.generate(TRANSCRIBE, pages[0].path, max_new_tokens=32).token_ids),
            list(chat.generate(FOLLOW_UP, pages[2].path, max_new_tokens=16).token_ids),
        ]
        history = list(chat.token_ids)
    with quantize_visual_cache(model) as handle:
        cache = handle.new_cache()
        first = prepare(processor, [TRANSCRIBE], pages[:1])
        result = answer(model, first, past_key_values=cache)
        assert result.past_key_values is cache
        assert new_tokens(result, first) == expected[:1]
        later = processor.tokenizer(FOLLOW_UP.replace("<image>", "<image>" * TOKENS), add_special_tokens=False)
        ids = torch.cat([result.sequences, torch.tensor([later["input_ids"]])], 1)
        second = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": prepare(processor, [FOLLOW_UP], pages[2:3])["pixel_values"],
        }
        result = answer(model, second, 16, past_key_values=cache)
    assert new_tokens(result, second) == expected[1:]
    assert result.sequences[0].tolist()[: len(history)] == history
    assert cache.visual_tokens == [2 * TOKENS]
    assert cache._visual_count.tolist() == [[TOKENS, TOKENS]]


def test_sixteen_bits_are_plain_generate(model: Any, processor: Any, pages: list[Page]) -> None:
    inputs = prepare(processor, [TRANSCRIBE], pages[3:])
    greedy, beams = answer(model, inputs), answer(model, inputs, 12, num_beams=3)
    plain = model(**inputs).logits
    with quantize_visual_cache(model, bits=16):
        assert torch.equal(answer(model, inputs).sequences, greedy.sequences)
        assert torch.equal(answer(model, inputs, 12, num_beams=3).sequences, beams.sequences)
        torch.testing.assert_close(model(**inputs).logits, plain, rtol=1e-4, atol=1e-4)


def test_the_call_that_brings_a_picture_is_exact(model: Any, processor: Any, pages: list[Page]) -> None:
    """Quantisation shows in the next call only; padding on the right does not matter."""
    inputs = prepare(processor, [TRANSCRIBE], pages[:1])
    plain = model(**inputs)
    later = model(input_ids=torch.tensor([[50]]), past_key_values=plain.past_key_values).logits
    padded = {name: torch.nn.functional.pad(inputs[name], (0, 5)) for name in ("input_ids", "attention_mask")}
    with quantize_visual_cache(model):
        packed = model(**inputs)
        torch.testing.assert_close(packed.logits, plain.logits, rtol=1e-4, atol=1e-4)
        logits = model(input_ids=torch.tensor([[50]]), past_key_values=packed.past_key_values).logits
        assert 1e-3 < float((logits - later).abs().max()) < float(later.abs().max())
        result = model(**padded, pixel_values=inputs["pixel_values"])
        torch.testing.assert_close(result.logits[:, :-5], plain.logits, rtol=1e-4, atol=1e-4)
        mask = torch.nn.functional.pad(padded["attention_mask"], (0, 1), value=1)
        again = model(
            input_ids=torch.tensor([[50]]), attention_mask=mask, past_key_values=result.past_key_values
        ).logits
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-4)


def test_rows_of_a_padded_batch_are_as_alone(model: Any, processor: Any, pages: list[Page]) -> None:
    """No picture, one and two; then a second turn in which a row brings its first picture and another only text."""
    prompts = ["USER: How many? ASSISTANT:", TRANSCRIBE, "USER: <image>\n<image>\nRead row 1. ASSISTANT:"]
    rows = [pages[:0], pages[:1], pages[1:3]]
    options = {"output_logits": True, "min_new_tokens": 5}
    batch = prepare(processor, prompts, pages[:3])
    assert batch["attention_mask"][0, 0] == 0
    turn = processor.tokenizer(
        [FOLLOW_UP.replace("<image>", "<image>" * TOKENS), " USER: How many? ASSISTANT:"] * 2, add_special_tokens=False
    )
    turns = turn["input_ids"][:3]
    pixels = prepare(processor, [TRANSCRIBE] * 2, pages[2:])["pixel_values"]
    width = max(map(len, turns))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in turns])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in turns])
    with quantize_visual_cache(model):
        together = answer(model, batch, 5, **options)
        cache = together.past_key_values
        assert cache.visual_tokens == [0, TOKENS, 2 * TOKENS]
        assert cache._visual_count.tolist() == [[0, 0], [TOKENS, 0], [TOKENS, TOKENS]]
        # The token chosen last is not in the cache yet.
        known = torch.cat([cache.mask.long(), torch.ones(3, 1, dtype=torch.long)], 1)
        second = model(
            input_ids=torch.cat([together.sequences[:, -1:], ids], 1),
            attention_mask=torch.cat([known, mask], 1),
            pixel_values=pixels,
            past_key_values=cache,
        )
        assert cache.visual_tokens == [TOKENS, TOKENS, 3 * TOKENS]
        used = 0
        for row, prompt in enumerate(prompts):
            inputs = prepare(processor, [prompt], rows[row])
            alone = answer(model, inputs, 5, **options)
            assert new_tokens(alone, inputs)[0] == new_tokens(together, batch)[row]
            for step, logits in enumerate(alone.logits):
                torch.testing.assert_close(logits[0], together.logits[step][row], rtol=1e-3, atol=1e-3)
            picture = IMAGE_TOKEN in turns[row]
            result = model(
                input_ids=torch.cat([alone.sequences[:, -1:], torch.tensor([turns[row]])], 1),
                pixel_values=pixels[used : used + 1] if picture else None,
                past_key_values=alone.past_key_values,
            )
            used += picture
            torch.testing.assert_close(result.logits[0, -1], second.logits[row, -1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"bits": 8, "group_size": 128}, 0.02),
        ({"key_bits": 8, "value_bits": 4, "group_size": 256, "quantizer": "minmax", "score_correction": "none"}, 0.1),
        ({"bits": 4, "bits_per_layer": "1-2:8", "quantizer": "quantile", "quantile_alpha": 0.0}, 0.1),
    ],
)
def test_options_reach_the_cache(
    model: Any, processor: Any, pages: list[Page], options: dict[str, Any], tolerance: float
) -> None:
    """Several groups per picture, bits by layer: after two pictures a step is near that of plain attention."""
    inputs = prepare(processor, ["USER: <image><image>\nRead row 1. ASSISTANT:"], pages[:2])
    step = torch.tensor([[50]])
    plain = model(input_ids=step, past_key_values=model(**inputs).past_key_values).logits
    with quantize_visual_cache(model, **options) as handle:
        cache = model(**inputs).past_key_values
        packed = model(input_ids=step, past_key_values=cache).logits
    torch.testing.assert_close(packed, plain, rtol=0, atol=tolerance * float(plain.abs().max()))
    size = handle.layout.quantization.group_size
    assert cache._visual_count.sum(1).tolist() == [2 * TOKENS]
    assert cache._visual_count.max() == min(size, TOKENS)
    planes = [layer["visual_key"].shape[3] for layer in cache._buffers]
    assert planes == list(handle.layout.quantization.key_bits)
    assert {layer["visual_key"].dtype for layer in cache._buffers} == {torch.int32}


def test_bytes_of_a_picture(model: Any, processor: Any, pages: list[Page]) -> None:
    """85 KiB at 1 bit, in words on the heap, against 16 bits per element."""
    half = type(model).from_pretrained(CHECKPOINT, dtype="float16").eval()
    inputs = prepare(processor, [TRANSCRIBE], pages[:1])
    found = {}
    for bits in (1, 16):
        with quantize_visual_cache(half, bits):
            cache = half(**inputs).past_key_values
        found[bits] = cache.visual_bytes
        assert cache.text_bytes == (inputs["input_ids"].shape[1] - TOKENS) * 4 * 2 * 2 * 64 * 2
        assert cache.allocated_bytes < 1.5 * (cache.visual_bytes + cache.text_bytes) + 64 * 2048
    assert found == {1: 85 * 1024, 16: TOKENS * 2048}
    assert found[1] <= found[16] / 12


def test_capacity_grows(model: Any, processor: Any, pages: list[Page]) -> None:
    """Text is fed in pieces until the rows are full several times over: the last logits are those of one call."""
    ids = torch.randint(10, 400, (1, 300), generator=torch.Generator().manual_seed(0))
    plain = model(input_ids=ids).logits
    with quantize_visual_cache(model) as handle:
        cache = handle.new_cache()
        capacities = set()
        for piece in ids.split(50, 1):
            logits = model(input_ids=piece, past_key_values=cache).logits
            capacities.add(cache.allocated_bytes)
        assert cache.get_seq_length() == 300
        assert cache.visual_bytes == 0
        assert len(capacities) == 3  # 114, 214, 314 rows
        torch.testing.assert_close(logits, plain[:, 250:], rtol=1e-3, atol=1e-3)
        inputs = prepare(processor, [TRANSCRIBE], pages[:1])
        model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], past_key_values=cache)
        assert cache.visual_tokens == [TOKENS]


@pytest.mark.parametrize(("bits", "text_bits"), [(1, 8), (16, 16)])
def test_crop_and_reset(model: Any, processor: Any, pages: list[Page], bits: int, text_bits: int) -> None:
    inputs = prepare(processor, [TRANSCRIBE], pages[:1])
    step = torch.tensor([[50, 60, 70]])
    with quantize_visual_cache(model, bits, text_bits=text_bits):
        cache = model(**inputs).past_key_values
        length = cache.get_seq_length()
        expected = model(input_ids=step, past_key_values=cache).logits
        cache.crop(-3)
        assert cache.get_seq_length() == length
        assert torch.equal(model(input_ids=step, past_key_values=cache).logits, expected)
        with pytest.raises(OptionError, match=r"crop\(5\)"):
            cache.crop(5)
        if bits == 1:
            with pytest.raises(OptionError, match="cannot take back pictures"):
                cache.crop(-100)
        else:
            cache.crop(-20)  # into the picture
            assert cache.visual_tokens[0] + cache.text_tokens[0] == cache.get_seq_length() == length - 17
            assert cache.visual_tokens[0] < TOKENS
        cache.reset()
        assert (cache.get_seq_length(), cache.batch_size, cache.allocated_bytes) == (0, -1, 0)
        again = model(**inputs, past_key_values=cache)
        assert torch.equal(model(input_ids=step, past_key_values=again.past_key_values).logits, expected)


def test_remove_restores_the_model(model: Any, processor: Any, pages: list[Page]) -> None:
    inputs = prepare(processor, [TRANSCRIBE], pages[:1])
    before, implementation = model(**inputs).logits, model.config.text_config._attn_implementation
    handle = quantize_visual_cache(model)
    cache = model(**inputs).past_key_values
    assert isinstance(cache, PackedVisualCache)
    handle.remove()
    handle.remove()
    after = model(**inputs)
    assert torch.equal(after.logits, before)
    assert type(after.past_key_values).__name__ == "DynamicCache"
    assert model.config.text_config._attn_implementation == implementation
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    with pytest.raises(ModelError, match="call quantize_visual_cache"):
        model(input_ids=torch.tensor([[50]]), past_key_values=cache)


def test_a_failed_call_changes_nothing(model: Any, processor: Any, pages: list[Page]) -> None:
    inputs = prepare(processor, [TRANSCRIBE], pages[:1])
    step = torch.tensor([[50]])
    with quantize_visual_cache(model):
        cache = model(**inputs).past_key_values
        expected = model(input_ids=step, past_key_values=cache).logits
        cache.crop(-1)

        def fail(*_: Any) -> None:
            raise RuntimeError("stopped on purpose")

        hook = model.model.language_model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(**{**inputs, "attention_mask": None}, past_key_values=cache)
        hook.remove()
        assert cache.visual_tokens == [TOKENS]
        assert torch.equal(model(input_ids=step, past_key_values=cache).logits, expected)


def test_models_and_options_that_are_refused(model: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    with pytest.raises(ModelError, match="LlamaForCausalLM are not supported; supported: LlavaForConditional"):
        quantize_visual_cache(LlamaForCausalLM(small))
    with pytest.raises(OptionError, match="3 bits are not supported"):
        quantize_visual_cache(model, 3)
    with pytest.raises(OptionError, match="names layer 4; the model has layers 0 to 3"):
        quantize_visual_cache(model, bits_per_layer="4:1")
    with pytest.raises(OptionError, match="no effect at 16 bits"):
        quantize_visual_cache(model, 16, quantizer="minmax")
    assert not model._forward_hooks
    with quantize_visual_cache(model), pytest.raises(ModelError, match=r"remove\(\) that first"):
        quantize_visual_cache(model)


def test_calls_that_are_refused(model: Any, processor: Any, pages: list[Page]) -> None:
    from transformers import DynamicCache

    inputs = prepare(processor, [TRANSCRIBE], pages[:1])
    plain = model(**inputs).past_key_values
    step = torch.tensor([[50]])
    with quantize_visual_cache(model, 2):
        other = model(**inputs).past_key_values
    with quantize_visual_cache(model) as handle:
        cache = model(**inputs).past_key_values
        mask = torch.ones(1, cache.get_seq_length() + 1)
        for past in (plain, other):
            with pytest.raises(OptionError, match=r"give handle\.new_cache\(\)"):
                model(input_ids=step, past_key_values=past)
        for options in ({"cache_implementation": "static"}, {"past_key_values": DynamicCache()}):
            with pytest.raises(OptionError, match="cannot hold packed pictures"):
                answer(model, inputs, 2, **options)
        empty = DynamicCache()
        model(input_ids=step, past_key_values=empty)
        with pytest.raises(OptionError, match="cannot hold packed pictures"):
            model(input_ids=step, past_key_values=empty)
        with pytest.raises(OptionError, match="leave out output_attentions"):
            model(**inputs, output_attentions=True)
        with pytest.raises(InputError, match="give these, not inputs_embeds"):
            model(inputs_embeds=torch.zeros(1, 2, 256))
        with pytest.raises(InputError, match="the cache holds 1 rows, the call has 2"):
            model(input_ids=step.repeat(2, 1), past_key_values=cache)
        with pytest.raises(InputError, match=r"the attention mask has shape \[1, 1\]"):
            model(input_ids=step, attention_mask=mask[:, :1], past_key_values=cache)
        with pytest.raises(InputError, match="hides or shows other cached tokens"):
            model(input_ids=step, attention_mask=1 - mask, past_key_values=cache)
        with pytest.raises(InputError, match="500 visual tokens in a row are not made of whole pictures of 576"):
            model(input_ids=torch.full((1, 500), IMAGE_TOKEN), pixel_values=inputs["pixel_values"])
        with pytest.raises(ModelError, match="call the whole model"):
            model.model.language_model(input_ids=step)
        model.set_attn_implementation("eager")
        with pytest.raises(ModelError, match="not every layer used the packed cache"):
            model(input_ids=step, past_key_values=handle.new_cache())
        model.set_attn_implementation({"text_config": "vkvx"})
    model.set_attn_implementation("sdpa")


def test_attention_dropout_is_refused(model: Any) -> None:
    model.config.text_config.attention_dropout = 0.1
    model.train()
    try:
        with quantize_visual_cache(model), pytest.raises(ModelError, match=r"call model\.eval"):
            model(input_ids=torch.tensor([[50]]))
    finally:
        model.eval()
        model.config.text_config.attention_dropout = 0.0


def test_the_example_of_the_documentation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pages: list[Page]
) -> None:
    text = (ROOT / "docs" / "torch.md").read_text(encoding="utf-8")
    example, _ = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    monkeypatch.chdir(ROOT)
    exec(compile(example, "torch.md", "exec"), {})
    assert capsys.readouterr().out.strip() == f"{pages[0].truth}\n{85 * 1024} bytes of picture in the cache"
    assert f"# {85 * 1024}; unquantised {TOKENS * 4096}\n" in example


def test_public_name() -> None:
    assert "quantize_visual_cache" in vkvx.__all__
    assert "Cache" in [base.__name__ for base in PackedVisualCache.__mro__]
