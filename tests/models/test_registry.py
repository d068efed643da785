"""Finding a checkpoint: aliases, directories, hub ids, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import CASES
from variants import VARIANTS

from vkvx.errors import ModelError
from vkvx.models.presets import preset_config
from vkvx.models.refusals import REFUSALS
from vkvx.models.registry import (
    ALIASES,
    FAMILIES,
    HUB_ID,
    family_of,
    origin_for,
    resolve,
    resolve_origin,
    sample_pages,
)
from vkvx.runtime.checks.check import check_model

Edit = Callable[[dict[str, Any]], None]
LLAVA = "LlavaForConditionalGeneration"
RELATIVES = {(LLAVA, one.decoder) for one in VARIANTS}
"""Decoders that tests/families/test_llava_variants.py compares with transformers, besides the matrix of families."""


def edited(checkpoint: Path, directory: Path, edit: Edit) -> Path:
    """A copy of the checkpoint's config.json with changes."""
    config = json.loads((checkpoint / "config.json").read_text())
    edit(config)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_alias() -> None:
    source = resolve("tiny-llava")
    assert (source.name, source.origin, source.revision) == ("tiny-llava", "tiny-llava", None)
    info = source.info("float16")
    assert (info.tokens_per_picture, info.layers[0].head_dim, info.image_token_id, info.eos_token_ids) == (
        576,
        64,
        3,
        (2,),
    )
    assert resolve(info.source).directory == source.directory


def test_an_alias_hides_a_directory_of_its_name(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(checkpoint, tmp_path / "tiny-llava")
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny-llava").directory != (tmp_path / "tiny-llava").resolve()
    assert resolve("./tiny-llava").directory == (tmp_path / "tiny-llava").resolve()


def test_directory(checkpoint: Path) -> None:
    source = resolve(checkpoint)
    assert (source.name, source.origin) == ("tiny-random", str(checkpoint.resolve()))
    info = source.info("bfloat16")
    assert (info.tokens_per_picture, len(info.layers), info.query_heads, info.layers[0].kv_heads) == (16, 2, 4, 2)
    assert (info.dtype, info.eos_token_ids, info.pad_token_id) == ("bfloat16", (2,), 0)


def test_a_bundle_finds_its_checkpoint_again(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the way there from the bundle, if that does not tell how the whole disk is laid out."""
    checkpoint = Path(shutil.copytree(checkpoint, tmp_path / "in" / "tiny-random"))
    source = resolve(checkpoint)
    for bundle in (tmp_path / "in" / "bundle", tmp_path / "in" / "some" / "bundle"):
        origin = origin_for(source, bundle)
        assert origin in ("../tiny-random", "../../tiny-random")
        info = replace(source.info("float16"), source=origin)
        bundle.mkdir(parents=True)
        assert resolve_origin(bundle, info, None, "do without").directory == source.directory
        monkeypatch.chdir(bundle.parent)
        assert resolve_origin(Path("bundle"), info, None, "do without").directory == source.directory
        with pytest.raises(
            ModelError,
            match=r"exported from is not there \(.*tiny-random.*\); give model= \(--model\) .* or do without$",
        ):
            resolve_origin(tmp_path / "bundle", info, None, "do without")
        assert resolve_origin(tmp_path / "bundle", info, str(checkpoint), "").directory == source.directory
    assert origin_for(source, Path("/nowhere/bundle")) == ""
    with pytest.raises(ModelError, match=r"where the checkpoint 'tiny-random' is; give model= \(--model\)"):
        resolve_origin(tmp_path, replace(info, source=""), None, "do without")
    tiny = resolve("tiny-llava")
    assert origin_for(tiny, tmp_path) == "tiny-llava"
    assert resolve_origin(tmp_path, tiny.info("float16"), None, "").directory == tiny.directory
    old = replace(info, source=str(checkpoint.resolve()))  # as bundles were written before
    assert resolve_origin(tmp_path, old, None, "").directory == source.directory


def test_generation_config_may_list_ends(checkpoint: Path, tmp_path: Path) -> None:
    edited(checkpoint, tmp_path, lambda config: None)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7], "pad_token_id": null}')
    source = resolve(tmp_path)
    info = source.info("float16")
    assert info.eos_token_ids == (2, 7)
    assert info.pad_token_id == 0


def test_aliases_name_checkpoints_of_known_families() -> None:
    assert len(ALIASES) == sum(len(family.aliases) for family in FAMILIES.values())
    for alias, target in ALIASES.items():
        assert re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", alias)
        assert target.is_dir() if isinstance(target, Path) else HUB_ID.fullmatch(target)
    assert len(set(map(str, ALIASES.values()))) == len(ALIASES)


def test_decoders_said_to_be_tested_are() -> None:
    configs = [preset_config(case.preset) for case in CASES]
    cases = {(config.architectures[0], config.text_config.model_type) for config in configs}
    assert {architecture for architecture, _ in cases} == set(FAMILIES)
    said = {(name, decoder) for name, family in FAMILIES.items() for decoder in family.tested_models}
    assert said == cases | RELATIVES
    assert all(set(family.tested_models) <= set(family.text_models) for family in FAMILIES.values())


def test_sample_pages() -> None:
    pages = sample_pages()
    assert len(pages) >= 2
    assert all(page.suffix == ".png" for page in pages)


def test_unknown_alias_lists_the_known_ones() -> None:
    with pytest.raises(ModelError) as caught:
        resolve("llama")
    assert all(alias in str(caught.value) for alias in ALIASES)


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c", "~/absent-model", "..", "a\\b"])
def test_paths_that_hold_no_checkpoint(name: str) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve(name)


def test_a_file_is_no_checkpoint(checkpoint: Path) -> None:
    with pytest.raises(ModelError, match="is not a directory"):
        resolve(checkpoint / "config.json")


def test_revision_of_a_directory_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ModelError, match="--revision"):
        resolve(checkpoint, revision="main")


def test_unsupported_architecture_is_named_with_those_that_work(checkpoint: Path, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config.update(architectures=["BertModel"], model_type="bert")

    with pytest.raises(ModelError, match=r"BertModel is not supported; supported: .*LlavaForConditionalGeneration"):
        resolve(edited(checkpoint, tmp_path, change))


def test_no_architecture(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none \(model type llava\)"):
        resolve(edited(checkpoint, tmp_path, lambda config: config.pop("architectures")))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("text_config", {"head_dim": 40}, r"head dim is 40.*multiple of 32"),
        ("text_config", {"model_type": "gemma"}, r"'gemma' decoder is not supported; llama, mistral, qwen2 or"),
        ("text_config", {"model_type": "mistral", "sliding_window": 4095}, "window of 4095 .*one of at least 4096"),
        (
            "text_config",
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0},
            "window of 64 tokens of 4096",
        ),
        ("text_config", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        (
            "vision_config",
            {"model_type": "dinov2"},
            r"'dinov2' tower is not supported; clip_vision_model, siglip_vision_model or",
        ),
        (None, {"image_token_index": 512}, "image token 512 is not among the decoder's 512 tokens"),
        (None, {"quantization_config": {"quant_method": "gptq"}}, "weights are quantised"),
        (None, {"vision_feature_select_strategy": "best"}, "transformers cannot read"),
    ],
)
def test_refused_configs(
    checkpoint: Path, tmp_path: Path, part: str | None, changes: dict[str, Any], message: str
) -> None:
    def change(config: dict[str, Any]) -> None:
        (config if part is None else config[part]).update(changes)

    with pytest.raises(ModelError, match=message) as caught:
        resolve(edited(checkpoint, tmp_path, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_model.bin",
        "adapter_model-00001-of-00002.safetensors",
        "adapters.safetensors",
        "pytorch_lora_weights.safetensors",
        "style/adapter_config.json",
    ],
)
def test_adapters_are_not_ignored(checkpoint: Path, tmp_path: Path, whole: bool, name: str) -> None:
    if whole:
        edited(checkpoint, tmp_path, lambda config: None)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"peft_type": "LORA"}')
    with pytest.raises(ModelError, match=rf"adapter \({re.escape(name)}\).*merge it with merge_and_unload") as caught:
        resolve(tmp_path)
    assert "\n" not in str(caught.value)
    assert check_model(tmp_path).reason == str(caught.value)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("text_config", {"model_type": "mistral", "sliding_window": 4096}),  # as long as the model's positions
        ("text_config", {"model_type": "mistral", "sliding_window": 5000}),
        ("text_config", {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4096}),
        ("text_config", {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 8}),
        ("text_config", {"model_type": "qwen3"}),
        ("vision_config", {"image_size": 57}),
    ],
)
def test_accepted_configs(checkpoint: Path, tmp_path: Path, part: str, changes: dict[str, Any]) -> None:
    source = resolve(edited(checkpoint, tmp_path, lambda config: config[part].update(changes)))
    info = source.info("float16")
    assert (info.sliding_window, info.tokens_per_picture) == (0, 16)


def test_a_bundle_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "vkvx.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is a bundle.*give the checkpoint"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("InternVLChatModel", "give the same model in transformers' own format, .*OpenGVLab/InternVL3-8B-hf"),
        ("LlavaLlamaForCausalLM", "llava-hf/llava-1.5-7b-hf"),
        ("MiniCPMV", "exists only as remote code, which cannot be exported"),
        ("Qwen3VLMoeForConditionalGeneration", "choose experts for each token.*give a dense model such as qwen3-vl-8b"),
        ("MllamaForConditionalGeneration", "cross attention"),
    ],
)
def test_architectures_that_are_refused_with_a_reason(
    checkpoint: Path, tmp_path: Path, architecture: str, words: str
) -> None:
    edited(checkpoint, tmp_path, lambda config: config.update(architectures=[architecture]))
    for trust in (False, True):
        with pytest.raises(ModelError, match=f"architecture {architecture} is not supported: .*{words}"):
            resolve(tmp_path, trust_remote_code=trust)
    checked = check_model(tmp_path)
    assert not checked.supported
    assert checked.reason == f"architecture {architecture} is not supported: {REFUSALS[architecture]}"


def test_a_loaded_model_is_refused_with_the_same_reason() -> None:
    model = type("MllamaForConditionalGeneration", (), {})()
    with pytest.raises(ModelError, match=r"MllamaForConditionalGeneration are not supported: .*cross attention"):
        family_of(model)


def test_what_transformers_lists_is_supported_or_refused_with_a_reason() -> None:
    """A new release of transformers may list more: each wants a family, or a line in models/refusals.py."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as LISTED

    architectures = {name for names in LISTED.values() for name in ([names] if isinstance(names, str) else names)}
    assert architectures - set(FAMILIES) - set(REFUSALS) == set()
    assert set(FAMILIES) & set(REFUSALS) == set(), "supported now: drop the line"
    outside = {name for name in REFUSALS if not hasattr(transformers, name)}
    assert {name for name in outside if "code" not in REFUSALS[name]} == set(), "transformers has no such class"
    assert all(
        "\n" not in reason and ("; give " in reason or "`vkvx models`" in reason) for reason in REFUSALS.values()
    )


@pytest.mark.parametrize("part", [None, "text_config"])
@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("awq", "AWQ"),
        ("gptq", "GPTQ"),
        ("fp8", "FP8"),
        ("bitsandbytes", "bitsandbytes"),
        ("compressed-tensors", "compressed-tensors"),
    ],
)
def test_quantised_weights_are_refused_by_method(
    checkpoint: Path, tmp_path: Path, part: str | None, method: str, name: str
) -> None:
    def change(config: dict[str, Any]) -> None:
        (config if part is None else config[part]).update(quantization_config={"quant_method": method, "bits": 4})

    with pytest.raises(ModelError, match=rf"quantised \({name}\); give the one that it was made from"):
        resolve(edited(checkpoint, tmp_path, change))


def test_quantised_weights_of_a_loaded_model() -> None:
    """There transformers has made an object of ``quantization_config``."""
    from transformers import FineGrainedFP8Config, GPTQConfig

    for given, name in ((FineGrainedFP8Config(), "FP8"), (GPTQConfig(bits=4), "GPTQ")):
        config = preset_config("tiny")
        for part in (config, config.text_config):
            part.quantization_config = given
            with pytest.raises(ModelError, match=rf"quantised \({name}\)"):
                FAMILIES[LLAVA].check(config)
            del part.quantization_config


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("tiny-llava-next", {"vision_feature_select_strategy": "full"}, "'full' does not suit a 'clip_vision_model'"),
        ("tiny-llava-next", {"image_grid_pinpoints": [[56, 100]]}, r"\[56, 100\], which is not made of tiles of 56"),
        ("tiny-llava-onevision", {"vision_aspect_ratio": "pad"}, "'pad' is not supported; 'anyres_max_9' is"),
        ("tiny-pixtral", {"vision_feature_select_strategy": "default"}, "'default' is not supported; 'full' is"),
        ("tiny-mistral3", {"vision_feature_layer": -2}, "vision_feature_layer '-2' is not supported; '-1' is"),
        ("tiny-mistral3", {"spatial_merge_size": 1}, "spatial_merge_size 1 is not supported"),
        ("tiny-internvl", {"downsample_ratio": 0.3}, "scaled by 0.3, are not supported; square ones"),
    ],
)
def test_refused_traits_of_pictures(preset: str, changes: dict[str, Any], message: str) -> None:
    config = preset_config(preset)
    family = FAMILIES[config.architectures[0]].variant(config)
    family.check(config)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ModelError, match=message):
        family.check(config)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\xff", '{"architectures": 5}'])
def test_unreadable_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=r"cannot read .*config\.json"):
        resolve(tmp_path)


def test_without_a_network_a_directory_is_asked_for(tmp_path: Path) -> None:
    code = (
        "from vkvx.errors import ModelError\n"
        "from vkvx.models.registry import resolve\n"
        "try:\n    resolve('llava')\nexcept ModelError as error:\n    print(error)"
    )
    # Nothing listens on port 9: what a machine without a network comes to, whatever the network of this one.
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "cannot download 'llava-hf/llava-1.5-7b-hf'" in done.stdout
    assert "give the directory of a checkpoint" in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1


def test_a_cached_checkpoint_needs_no_network(checkpoint: Path, tmp_path: Path) -> None:
    """A hub cache as huggingface_hub lays it out: a snapshot of links, and a ref that names its commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "models--somebody--tiny"
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    for file in checkpoint.iterdir():
        (snapshot / file.name).symlink_to(file)
    code = (
        "from vkvx.models.registry import resolve\n"
        f"source = resolve('somebody/tiny', cache_dir={str(tmp_path)!r})\n"
        "print(source.name, source.origin, source.revision, len(list(source.directory.glob('*.safetensors'))))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["tiny", "somebody/tiny", commit, "3"]
