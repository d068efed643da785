"""The decoder graph run eagerly: at 16 bits it is the plain Hugging Face model; counts; where embeddings go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vkvx.cache_layout import CacheLayout
from vkvx.errors import ModelError
from vkvx.export.options import ExportOptions
from vkvx.graph_specs import decoder_inputs, decoder_outputs
from vkvx.manifest import Manifest
from vkvx.models.graph.decoder import DecoderGraph, attend, place_embeds
from vkvx.models.graph.metric import model_metrics
from vkvx.models.registry import resolve
from vkvx.plugins.operator import OperatorAttributes, layer_attributes
from vkvx.runtime.backends.torch.loading import load_reference
from vkvx.runtime.calls import Row, build_call
from vkvx.runtime.calls import place_embeds as gather_embeds


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    source = resolve(checkpoint)
    return source.family.model_class().from_pretrained(source.directory, dtype=torch.float32).eval()


class Decoder:
    """A DecoderGraph over caches of its own, full of NaN where nothing is stored."""

    def __init__(self, checkpoint: Path, model: Any, slots: int, groups: int, rows: int, **options: Any) -> None:
        source = resolve(checkpoint)
        self.info = source.info("float32")
        q = ExportOptions(**options).resolve(self.info.cached_layers, self.info.typical_tokens)
        attributes = layer_attributes(q, self.info.layers[0].scale)
        family = source.family
        metrics = model_metrics(family, model, self.info)
        pairs = tuple(zip(metrics.key, metrics.value, strict=True)) if attributes[0].needs_metrics else ()
        self.graph = DecoderGraph(model, family, attributes, pairs)
        packed = q.key_bits[0] != 16
        tiles = groups * q.group_size // 128 if packed else 0
        groups = groups if packed else 0
        self.caches = []
        for layer in range(self.info.cached_layers):
            for dtype, shape in CacheLayout(self.info, q).layer_tensors(layer, slots, tiles, groups, rows).values():
                fill = -1 if dtype == "int32" else torch.nan
                self.caches.append(torch.full(shape, fill, dtype=getattr(torch, dtype)))
        self.visual_count = torch.zeros(slots, groups, dtype=torch.int32)
        self.text_count = torch.zeros(slots, dtype=torch.int32)
        self.group_size = q.group_size

    def __call__(self, rows: Sequence[Row], image_embeds: Tensor | None = None) -> Tensor:
        call = build_call(rows, group_size=self.group_size, image_token_id=3)
        shape = (*call.visual_index.shape, self.info.hidden_size)
        embeds = np.zeros(shape, np.float32) if image_embeds is None else gather_embeds(call, image_embeds.numpy())
        arrays = [call.input_ids, call.position_ids, embeds, call.visual_index, call.text_index]
        arrays += [call.last_index, call.slot]
        inputs = [torch.from_numpy(array) for array in arrays]
        with torch.no_grad():
            logits, self.visual_count, self.text_count, *self.caches = self.graph(
                *inputs, self.visual_count, self.text_count, *self.caches
            )
        return logits


def pixels(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(seed))


def plain_logits(model: Any, ids: list[int], images: Tensor | None) -> Tensor:
    """The last position's logits of the unchanged transformers model."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), pixel_values=images).logits[:, -1].float()


def image_embeds(model: Any, images: Tensor) -> Tensor:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.cat(list(model.model.get_image_features(images).pooler_output))


PICTURE = [3] * 16


def test_sixteen_bits_are_the_plain_model(checkpoint: Path, model: Any) -> None:
    """Prefill of two rows, one with two pictures; decode; a second turn with a picture in the other row."""
    images = pixels(3)
    embeds = image_embeds(model, images)
    first = [1, 50, *PICTURE, 60, *PICTURE, 61]
    second = [1, 70, 71]
    expected = [plain_logits(model, first, images[:2]), plain_logits(model, second, None)]
    decoded = [plain_logits(model, [*first, 80], images[:2]), plain_logits(model, [*second, 81], None)]
    turn = [*second, 81, 90, *PICTURE, 91]
    later = plain_logits(model, turn, images[2:])
    decoder = Decoder(checkpoint, model, slots=3, groups=2, rows=64, bits=16)
    logits = decoder([Row(2, np.array(first), (16, 16)), Row(0, np.array(second))], embeds[:32])
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-4)
    logits = decoder([Row(0, np.array([81]), (), 3), Row(2, np.array([80]), (), len(first))])
    torch.testing.assert_close(logits, torch.cat(decoded[::-1]), rtol=1e-4, atol=1e-4)
    logits = decoder([Row(-1, np.array([], int)), Row(0, np.array(turn[4:]), (16,), 4)], embeds[32:])
    torch.testing.assert_close(logits[1:], later, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(logits).all()
    assert decoder.text_count.tolist() == [len(turn), 0, len(first) + 1]
    assert logits.dtype == torch.float32


def test_a_first_call_is_exact_at_one_bit(checkpoint: Path, model: Any) -> None:
    """A call sees its own tokens at full precision: quantisation shows in the next call only."""
    images = pixels(2)
    embeds = image_embeds(model, images)
    ids = [1, 50, *PICTURE, 60, *PICTURE, 61]
    expected, decoded = plain_logits(model, ids, images), plain_logits(model, [*ids, 80], images)
    decoder = Decoder(checkpoint, model, slots=1, groups=3, rows=16, bits=1)
    logits = decoder([Row(0, np.array(ids), (16, 16))], embeds)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert decoder.visual_count.tolist() == [[16, 16, 0]]
    assert decoder.text_count.tolist() == [4]
    logits = decoder([Row(0, np.array([80]), (), len(ids))])
    assert torch.isfinite(logits).all()
    difference = (logits - decoded).abs().max()
    assert 1e-3 < difference < decoded.abs().max()


def test_eight_bits_stay_close(checkpoint: Path, model: Any) -> None:
    images = pixels(1)
    ids = [1, *PICTURE, 61]
    decoded = plain_logits(model, [*ids, 80], images)
    embeds = image_embeds(model, images)
    decoder = Decoder(checkpoint, model, slots=1, groups=1, rows=16, bits=8)
    decoder([Row(0, np.array(ids), (16,))], embeds)
    logits = decoder([Row(0, np.array([80]), (), len(ids))])
    torch.testing.assert_close(logits, decoded, rtol=0, atol=0.02 * float(decoded.abs().max()))


def counts(
    checkpoint: Path, model: Any, bits: int, visual_index: list[list[int]], text_index: list[list[int]], slot: list[int]
) -> tuple[list[list[int]], list[int]]:
    decoder = Decoder(checkpoint, model, slots=3, groups=3, rows=6, bits=bits)
    visual_count = torch.tensor([[128, 5, 0], [0, 0, 0], [7, 7, 7]], dtype=torch.int32)
    index = [torch.tensor(entries, dtype=torch.int32) for entries in (visual_index, text_index, slot)]
    result = decoder.graph._updated_counts(
        *index, visual_count if bits != 16 else visual_count[:, :0], torch.tensor([1, 5, 0], dtype=torch.int32), 6
    )
    assert all(tensor.dtype == torch.int32 for tensor in result)
    return result[0].tolist(), result[1].tolist()


def group(valid: int) -> list[int]:
    return [*range(valid), *[-1] * (128 - valid)]


@pytest.mark.parametrize(
    ("visual_index", "text_index", "slot", "visual_count", "text_count"),
    [
        # What does not fit is dropped: slot 0 has room for one group of two, slot 2 for none.
        ([group(9) + group(3)], [[200, 201]], [0], [[128, 5, 9], [0, 0, 0], [7, 7, 7]], [3, 5, 0]),
        ([group(9) + group(3)], [[-1, -1]], [2], [[128, 5, 0], [0, 0, 0], [7, 7, 7]], [1, 5, 0]),
        ([group(128) + group(3)], [[200, 201]], [1], [[128, 5, 0], [128, 3, 0], [7, 7, 7]], [1, 6, 0]),
        # Two rows, out of order; an idle one between.
        (
            [group(4), group(9), group(0)],
            [[200, -1], [200, 201], [0, 1]],
            [1, -1, 0],
            [[128, 5, 0], [4, 0, 0], [7, 7, 7]],
            [3, 6, 0],
        ),
        ([[]], [[0]], [0], [[128, 5, 0], [0, 0, 0], [7, 7, 7]], [2, 5, 0]),
        ([[]], [[]], [-1], [[128, 5, 0], [0, 0, 0], [7, 7, 7]], [1, 5, 0]),
    ],
)
def test_counts(
    checkpoint: Path,
    model: Any,
    visual_index: list[list[int]],
    text_index: list[list[int]],
    slot: list[int],
    visual_count: list[list[int]],
    text_count: list[int],
) -> None:
    assert counts(checkpoint, model, 1, visual_index, text_index, slot) == (visual_count, text_count)


def test_at_sixteen_bits_text_counts_both_kinds(checkpoint: Path, model: Any) -> None:
    assert counts(checkpoint, model, 16, [[0, 1, -1]], [[2, -1]], [0]) == ([[], [], []], [4, 5, 0])
    assert counts(checkpoint, model, 16, [[0, 1]], [[2]], [-1])[1] == [1, 5, 0]


def test_place_embeds() -> None:
    embeds = torch.arange(2 * 5 * 3, dtype=torch.float32).reshape(2, 5, 3)
    visual = -torch.arange(1, 2 * 4 * 3 + 1, dtype=torch.float32).reshape(2, 4, 3)
    visual[0, 1] = visual[1, 2:] = torch.nan  # padding may be anything
    index = torch.tensor([[0, -1, 3, 4], [2, 1, -1, -1]], dtype=torch.int32)
    placed = place_embeds(embeds, visual, index)
    expected = embeds.clone()
    for row, entries in enumerate(index.tolist()):
        for entry, position in enumerate(entries):
            if position >= 0:
                expected[row, position] = visual[row, entry]
    assert torch.equal(placed, expected)
    empty = place_embeds(embeds, visual[:, :0], index[:, :0])
    assert torch.equal(empty, embeds)


def test_other_scales_are_refused(checkpoint: Path, model: Any) -> None:
    decoder = Decoder(checkpoint, model, slots=1, groups=1, rows=4, bits=1)
    model.model.language_model.layers[1].self_attn.scaling = 1.0
    try:
        with pytest.raises(ModelError, match=r"layer 1 scales its scores by 1\.0"):
            decoder([Row(0, np.array([1]))])
    finally:
        model.model.language_model.layers[1].self_attn.scaling = decoder.info.layers[0].scale


def attention_layer(causal: bool = True) -> Any:
    """Layer 0 of a model of 64 positions."""
    layer: Any = nn.Module()
    layer.layer_idx, layer.is_causal = 0, causal
    layer.config = SimpleNamespace(max_position_embeddings=64)
    return layer


@pytest.mark.parametrize("window", [64, 65])
def test_a_window_over_all_positions_is_none(window: int) -> None:
    tensors = (torch.zeros(1, 1, 1, 32),) * 3

    class Plain:
        attributes = (OperatorAttributes(),)

        def __call__(self, layer: int, query: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return query

    options: dict[str, Any] = {"scaling": 1.0, "vkvx_attention": Plain()}
    output, _ = attend(attention_layer(), *tensors, None, sliding_window=window, **options)
    assert output.shape == (1, 1, 1, 32)


@pytest.mark.parametrize(
    ("declared", "causal", "given", "words"),
    [
        ({}, True, {"sliding_window": 24}, "layer 0 attends with sliding_window 24, expected 0"),
        ({}, True, {"sliding_window": 63}, "layer 0 attends with sliding_window 63, expected 0"),
        ({"sliding_window": 24}, True, {"sliding_window": 64}, "sliding_window 64, expected 24"),
        ({"sliding_window": 24}, True, {"sliding_window": 25}, "sliding_window 25, expected 24"),
        ({"sliding_window": 24}, True, {"sliding_window": None}, "sliding_window 0, expected 24"),
        ({}, True, {"softcap": 50.0}, r"softcap 50\.0, expected 0"),
        ({}, False, {}, "attend both ways, expected to earlier ones only"),
        ({"visual_mask": "prefix"}, True, {}, "attend to earlier ones only, expected both ways"),
        ({}, True, {"s_aux": torch.zeros(4)}, "s_aux"),
    ],
)
def test_other_attention_than_declared_is_refused(
    declared: dict[str, Any], causal: bool, given: dict[str, Any], words: str
) -> None:
    attention = SimpleNamespace(attributes=[OperatorAttributes(**declared)])
    layer = attention_layer(causal)
    tensors = (torch.zeros(1, 1, 1, 32),) * 3
    with pytest.raises(ModelError, match=words):
        attend(layer, *tensors, None, scaling=1.0, vkvx_attention=attention, **given)


def test_a_layer_that_bypasses_the_attention_function_is_noticed(checkpoint: Path, model: Any) -> None:
    decoder = Decoder(checkpoint, model, slots=1, groups=1, rows=4, bits=1)
    model.set_attn_implementation("eager")
    with pytest.raises(ModelError, match="not every layer of LlamaModel"):
        decoder([Row(0, np.array([1]))])


def test_specs_name_all_tensors(checkpoint: Path) -> None:
    source = resolve(checkpoint)
    info = source.info("float16")
    q = ExportOptions(bits_per_layer="1:8").resolve(info.cached_layers, info.typical_tokens)
    layout = CacheLayout(info, q)
    inputs, outputs = decoder_inputs(layout), decoder_outputs(layout)
    names = ["input_ids", "position_ids", "visual_embeds", "visual_index", "text_index", "last_index", "slot"]
    assert [spec.name for spec in inputs[:10]] == [*names, "visual_count", "text_count", "past.0.visual_key"]
    assert [spec.name for spec in outputs[:4]] == [
        "logits",
        "visual_count_out",
        "text_count_out",
        "present.0.visual_key",
    ]
    assert len(inputs) == 9 + 12
    assert {spec.name: spec.shape for spec in inputs}["past.1.visual_value"] == ("Bc", 2, "T", 8, 64, 4)
    for past, present in zip(inputs[9:], outputs[3:], strict=True):
        assert past.name.replace("past", "present") == present.name
        assert (past.dtype, past.shape) == (present.dtype, present.shape)


def test_reference_is_a_backend(checkpoint: Path, model: Any, baseline_bundle: Path) -> None:
    """In FP16, as the bundle: close to the FP32 model."""
    reference = load_reference(
        resolve(checkpoint), Manifest.load(baseline_bundle), slots=2, visual_tokens=16, text_tokens=8
    )
    images = pixels(1)
    embeds = reference.encode({"pixel_values": images.numpy()})
    expected_embeds = image_embeds(model, images).numpy()
    assert embeds.dtype == np.float16
    np.testing.assert_allclose(embeds, expected_embeds, rtol=0, atol=0.02 * np.abs(expected_embeds).max())
    ids = [1, *PICTURE, 61]
    call = build_call([Row(1, np.array(ids), (16,))], group_size=128, image_token_id=3)
    logits = reference.step(call, gather_embeds(call, embeds))
    expected = plain_logits(model, ids, images).numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=0.02 * np.abs(expected).max())
    assert reference.cache.text_count.tolist() == [0, 18]
    call = build_call([Row(1, np.array([70]), (), 18)], group_size=128, image_token_id=3)
    logits = reference.step(call, None)
    expected = plain_logits(model, [*ids, 70], images).numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=0.02 * np.abs(expected).max())


def test_reference_of_another_model_is_refused(baseline_bundle: Path) -> None:
    with pytest.raises(ModelError, match="has layers 4, the bundle's model has 2"):
        load_reference(resolve("tiny-llava"), Manifest.load(baseline_bundle))
