"""Gemma 3, Gemma 4 and PaliGemma: what their configs say of layers, what is refused, patches that are averaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import CASES
from PIL import Image

from vkvx import ExportOptions
from vkvx.errors import ModelError, OptionError
from vkvx.manifest import LayerInfo, Manifest
from vkvx.models.graph.metric import FLOOR, model_metrics
from vkvx.models.pictures.pooled import PooledPatches
from vkvx.models.presets import preset_config
from vkvx.models.random_checkpoint import write_checkpoint
from vkvx.models.registry import FAMILIES, resolve
from vkvx.runtime.sessions.session import Session


def family_of(config: Any) -> Any:
    return FAMILIES[config.architectures[0]]


def layers(preset: str) -> tuple[LayerInfo, ...]:
    config = preset_config(preset)
    return family_of(config).layers(config)  # type: ignore[no-any-return]


def test_layers_with_windows() -> None:
    sliding = LayerInfo(kv_heads=2, head_dim=64, scale=48**-0.5, sliding_window=24, visual_mask="run")
    full = LayerInfo(kv_heads=2, head_dim=64, scale=48**-0.5, visual_mask="run")
    assert layers("tiny-gemma3") == (sliding, full, sliding)


def test_layers_of_prompts_that_see_themselves() -> None:
    plain = LayerInfo(kv_heads=2, head_dim=64, scale=0.125, visual_mask="prefix")
    assert layers("tiny-paligemma") == (plain, plain)
    sliding, full = layers("tiny-paligemma2")
    assert (sliding.sliding_window, full.sliding_window, sliding.softcap, full.softcap) == (24, 0, 5.0, 5.0)
    assert {sliding.visual_mask, full.visual_mask} == {"prefix"}


def test_layers_with_heads_of_their_own_and_shared_keys() -> None:
    sliding = LayerInfo(kv_heads=2, head_dim=64, scale=1.0, sliding_window=24, visual_mask="run")
    assert layers("tiny-gemma4") == (sliding, sliding, LayerInfo(kv_heads=1, head_dim=96, scale=1.0))
    small = layers("tiny-gemma4-e")
    assert [layer.keys_of for layer in small] == [None, None, None, 1, 1, 2]
    assert [layer.head_dim for layer in small] == [64, 64, 96] * 2
    assert {layer.visual_mask for layer in small} == {"causal"}


def set_text(name: str, value: object) -> Callable[[Any], None]:
    return lambda config: setattr(config.text_config, name, value)


@pytest.mark.parametrize(
    ("preset", "change", "words"),
    [
        ("tiny-gemma3", set_text("use_bidirectional_attention", True), "sees later text"),
        ("tiny-gemma3", lambda config: setattr(config, "mm_tokens_per_image", 25), "pooled evenly"),
        ("tiny-paligemma", set_text("use_bidirectional_attention", False), "earlier ones only"),
        ("tiny-gemma4", set_text("enable_moe_block", True), r"experts \(enable_moe_block\)"),
        ("tiny-gemma4", set_text("use_bidirectional_attention", "all"), "sees later text"),
        ("tiny-gemma4", lambda config: setattr(config, "vision_config", None), "no vision tower"),
        ("tiny-gemma4", set_text("rope_parameters", {"full_attention": {"rope_type": "dynamic"}}), "type 'dynamic'"),
    ],
)
def test_what_is_refused(preset: str, change: Callable[[Any], None], words: str) -> None:
    config = preset_config(preset)
    family_of(config).check(config)
    change(config)
    with pytest.raises(ModelError, match=words):
        family_of(config).check(config)


@pytest.mark.parametrize(
    ("preset", "name", "value", "words"),
    [
        ("tiny-gemma3", "do_pan_and_scan", True, "set do_pan_and_scan to false"),
        ("tiny-gemma3", "size", {"height": 56, "width": 56}, r"pictures of \[56\] pixels, the vision tower takes 112"),
        ("tiny-gemma4", "pooling_kernel_size", 2, "pooled by 2; the tower takes 16 and 3"),
    ],
)
def test_processors_that_do_not_fit(preset: str, name: str, value: object, words: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", preset_config(preset))
    source = resolve(tmp_path / "c")
    files = source.processor()
    setattr(files.images, name, value)
    files.save(tmp_path / "c")
    with pytest.raises(ModelError, match=words):
        source.processor()


def test_metrics_of_norms_that_add_one(tmp_path: Path) -> None:
    """Of the weight of the first norm and of queries, which a product with 1 + w tells from one with w."""
    write_checkpoint(tmp_path / "c", preset_config("tiny-gemma3"), dtype="float32")
    source = resolve(tmp_path / "c")
    model = source.family.model_class().from_pretrained(source.directory, dtype=torch.float32)
    attention = model.model.language_model.layers[0].self_attn
    with torch.no_grad():
        attention.q_norm.weight.copy_(torch.linspace(-0.5, 0.5, 64))
    metrics = model_metrics(source.family, model, source.info("float32"))
    # The rotary embedding turns channels i and i + 32 into each other, so that their sum is what is left.
    found = (metrics.key[0].float().diagonal(dim1=1, dim2=2) - FLOOR).unflatten(1, (2, 32)).sum(1)
    query = (attention.q_proj.weight * 2).unflatten(0, (4, 64))  # all weights of the first norm are 1
    moment = (query @ query.transpose(1, 2)).diagonal(dim1=1, dim2=2)
    moment = moment / moment.mean(1, keepdim=True) * (1 + attention.q_norm.weight) ** 2
    expected = moment.unflatten(0, (2, 2)).mean(1)
    expected = (expected / expected.mean(1, keepdim=True)).unflatten(1, (2, 32)).sum(1)
    torch.testing.assert_close(found, expected.detach(), rtol=5e-3, atol=5e-3)


def test_torch_runs_bundles_whose_layers_share_keys(exports: Any) -> None:
    (case,) = (case for case in CASES if case.preset == "tiny-gemma4-e")
    bundle = exports.bundle(exports.family(case), dtype="float32", text_bits=case.text_bits)
    manifest = Manifest.load(bundle)
    assert (len(manifest.model.layers), manifest.model.cached_layers) == (6, 3)
    assert len(manifest.quantization.key_bits) == 3
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 150, 3), np.uint8))
    answers = []
    for backend in ("onnxruntime", "torch"):
        with Session.load(bundle, slots=1, visual_tokens=384, text_tokens=128, backend=backend) as session:
            made = session.generate("<image>What is it?", picture, max_new_tokens=8, ignore_eos=True)
            answers.append(made.token_ids)
    assert answers[0] == answers[1]


def test_bits_of_layers_without_a_cache_are_refused() -> None:
    config = preset_config("tiny-gemma4-e")
    info = family_of(config).info(config, "float16")
    with pytest.raises(OptionError, match="names layer 3; the model has layers 0 to 2"):
        ExportOptions(bits_per_layer="3:8").resolve(info.cached_layers, info.typical_tokens)


def test_patches_that_are_averaged() -> None:
    pooled = PooledPatches(2, "<b>", "<e>")
    row, column = np.divmod(np.arange(4 * 6), 6)
    positions = np.full((1, 30, 2), -1)  # six places of padding
    positions[0, :24] = np.stack([column, row], 1)
    pixels = np.arange(30, dtype=np.float32).reshape(1, 30, 1)
    encoded = pooled.encode({"pixel_values": pixels, "image_position_ids": positions}, "x")
    assert (encoded.tokens, encoded.text) == (6, "<b>xxxxxx<e>")
    assert encoded.arrays["pixel_values"].ravel().tolist() == list(range(24))
    index = encoded.arrays["pool_index"]
    assert index.tolist() == [[12 * r + 2 * c, 12 * r + 2 * c + 1, 12 * r + 2 * c + 6, 12 * r + 2 * c + 7]
                              for r in range(2) for c in range(3)]  # fmt: skip
    visual = np.array([0, 1, 1, 0, 1, 0], bool)
    assert pooled.split(np.zeros(6, int), visual) == (2, 1)
