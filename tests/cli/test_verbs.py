"""The verbs on a real bundle."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import run_process
from samples import Page

from vkvx import ExportOptions
from vkvx.cli import export, validate
from vkvx.manifest import Manifest

QUESTION = "Transcribe the page."


# export


def test_export_prints_a_summary(
    cli: Callable, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("export", checkpoint, "--bits", "4", "--key-bits", "2")
    assert result.code == 0, result.err
    output = Path("tiny-random-mixed")  # the default: no number of bits is true of keys and values
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    assert f"next          vkvx run {output}" in result.out
    manifest = Manifest.load(output)
    assert (manifest.quantization.key_bits, manifest.quantization.value_bits) == ((2,) * 2, (4,) * 2)
    assert all(line.startswith("export: ") for line in result.err.splitlines())

    again = cli("export", "tiny-llava", "-o", output, "--force", "--json")
    assert again.code == 0, again.err
    summary = json.loads(again.out)
    manifest = Manifest.load(output)
    assert manifest.quantization.key_bits == (1,) * 4
    assert summary["bundle"] == str(output)
    assert summary["compression"] > 12
    assert summary["bytes"] == sum(info.bytes for info in manifest.files.values())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "tiny-llava-1bit"),
        ({"bits": 16}, "tiny-llava-16bit"),
        ({"key_bits": 2, "value_bits": 2}, "tiny-llava-2bit"),
        ({"key_bits": 2}, "tiny-llava-mixed"),
        ({"bits_per_layer": "0:8,1-:2"}, "tiny-llava-mixed"),
    ],
)
def test_default_names_of_bundles_are_true(options: dict[str, Any], name: str) -> None:
    assert export._default_output("models/tiny-llava", ExportOptions(**options)) == Path(name)


def test_export_options_reach_the_manifest(cli: Callable, tmp_path: Path) -> None:
    options = "--bits-per-layer 0-1:8,2-:1 --group-size 256 --quantizer quantile --quantile-alpha 0.1 --opset 19"
    options += " --score-correction affine --tau 2 --dtype float32"
    result = cli("export", "tiny-llava", "-o", tmp_path / "out", *options.split())
    assert result.code == 0, result.err
    manifest = Manifest.load(tmp_path / "out")
    quantization = manifest.quantization
    assert quantization.key_bits == quantization.value_bits == (8, 8, 1, 1)
    assert (quantization.group_size, quantization.quantizer, quantization.tau) == (256, "quantile", 2.0)
    assert quantization.quantile_alpha_key == (0.1,) * 4
    assert quantization.score_correction == "affine"
    assert manifest.model.dtype == "float32"
    assert manifest.graphs["decoder"].opset == 19
    shown = cli("inspect", tmp_path / "out").out
    assert "layers 0-1               keys 8 bit, values 8 bit, quantile at 0.1 and 0.1" in shown
    assert "layers 2-3               keys 1 bit, values 1 bit, quantile at 0.1 and 0.1" in shown
    assert "score correction affine, tau 2" in shown


# run


def test_run_reads_a_page_as_a_user_would(tiny_bundle: Path, pages: list[Page]) -> None:
    result = run_process("run", tiny_bundle, QUESTION, "--image", pages[0].path)
    assert result.code == 0, result.err
    assert result.out == pages[0].truth + "\n"
    speed, visual, text, backend = result.err.splitlines()
    assert "tokens/s (eos)" in speed
    manifest = Manifest.load(tiny_bundle)
    each = manifest.layout.visual_bytes_per_picture() / 576
    assert visual.startswith("576 visual tokens in ")
    assert f"{each:,.0f} bytes each, {manifest.layout.sixteen_bit_bytes_per_picture(1):,} in 16 bits" in visual
    assert "cache in use" in text
    assert backend.startswith("ran in onnxruntime on CPU: ")


def test_run_in_torch(cli: Callable, tiny_bundle: Path, pages: list[Page]) -> None:
    result = cli(
        "run", tiny_bundle, QUESTION, "--image", pages[0].path, "--json", "--backend", "torch", "--provider", "cpu"
    )
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["text"] == pages[0].truth
    assert (found["backend"], found["provider"], found["backend_reason"]) == ("torch", "cpu", "it was asked for")


def test_run_json(cli: Callable, tiny_bundle: Path, pages: list[Page]) -> None:
    result = cli("run", tiny_bundle, QUESTION, "--image", pages[1].path, "--json", "--threads", "1")
    assert result.code == 0, result.err
    assert result.err == ""
    found = json.loads(result.out)
    assert len(found["text"].split()) == 4
    assert found["visual_tokens"] == 576
    assert found["visual_bytes"] == Manifest.load(tiny_bundle).layout.visual_bytes_per_picture()
    assert found["visual_bytes"] * 12 <= found["sixteen_bit_bytes_per_visual_token"] * 576
    assert found["tokens_per_second"] > 0
    assert found["finish_reason"] == "eos"
    assert (found["backend"], found["provider"]) == ("onnxruntime", "cpu")
    assert found["backend_reason"]


def test_run_with_a_raw_prompt(cli: Callable, tiny_bundle: Path, pages: list[Page]) -> None:
    plain = cli("run", tiny_bundle, "Read row 2.", "--image", pages[0].path)
    raw = cli("run", tiny_bundle, "USER: <image>\nRead row 2. ASSISTANT:", "--raw-prompt", "--image", pages[0].path)
    assert plain.code == raw.code == 0, raw.err
    assert plain.out == raw.out
    assert len(plain.out.strip()) == 6


def test_run_with_pictures_where_the_prompt_says(cli: Callable, tiny_bundle: Path, pages: list[Page]) -> None:
    ask = ("--image", pages[0].path, "--image", pages[1].path, "--json", "--max-new-tokens", "3", "--no-verify")
    placed = json.loads(cli("run", tiny_bundle, r"Compare <image> with <image>, not <\image>.", *ask).out)
    prompt = "USER: Compare <image>\n with <image>\n, not <\\image>. ASSISTANT:"
    raw = json.loads(cli("run", tiny_bundle, prompt, "--raw-prompt", *ask).out)
    assert (placed["token_ids"], placed["prompt_tokens"]) == (raw["token_ids"], raw["prompt_tokens"])
    assert placed["visual_tokens"] == 2 * 576


def test_run_makes_room_for_a_long_prompt(cli: Callable, tiny_bundle: Path) -> None:
    result = cli("run", tiny_bundle, "word " * 230, "--max-new-tokens", "1", "--json", "--no-verify")
    assert result.code == 0, result.err
    assert json.loads(result.out)["prompt_tokens"] > 1024 + 100
    longer = cli("run", tiny_bundle, "word " * 900, "--json", "--no-verify")
    assert longer.code == 2
    assert "the model knows 4096; shorten the prompt, or lower max_new_tokens=" in longer.err


def test_run_reads_pipes_and_files(
    cli: Callable, tiny_bundle: Path, pages: list[Page], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pipe(data: bytes, terminal: bool = False) -> None:
        stream = TextIOWrapper(BytesIO(data))
        monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False) if terminal else None
        monkeypatch.setattr(sys, "stdin", stream)

    (tmp_path / "question.txt").write_bytes(f"\ufeff{QUESTION}\n".encode())
    options = ("--json", "--max-new-tokens", "6", "--no-verify")
    pipe(pages[0].path.read_bytes())
    found = cli("run", tiny_bundle, "--prompt-file", tmp_path / "question.txt", "--image", "-", *options)
    assert found.code == 0, found.err
    answer = json.loads(found.out)
    assert answer["text"] == pages[0].truth[:5]  # and a space, which does not show
    assert len(answer["token_ids"]) == 6
    pipe(QUESTION.encode())
    same = cli("run", tiny_bundle, "--prompt-file", "-", "--image", pages[0].path, *options)
    assert json.loads(same.out)["token_ids"] == answer["token_ids"]
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for data, arguments, words in (
        (b"", ("What?", "--image", "-"), "the picture from stdin cannot be read as a picture"),
        (b"", ("What?", "--image", "-", "--image", "-"), "give --image - once"),
        (b"", ("--prompt-file", "-", "--image", "-"), "both read stdin"),
        (b"", ("What?", "--prompt-file", "-"), "both PROMPT and --prompt-file"),
        (b"", (), "neither PROMPT nor --prompt-file"),
        (b"", ("--prompt-file", tmp_path / "none"), "no file at"),
        (b"", ("--prompt-file", tmp_path), "cannot read"),
        (b"", ("--prompt-file", tmp_path / "latin.txt"), "is not UTF-8 text (unexpected end of data at byte 3)"),
    ):
        pipe(data)
        refused = cli("run", tiny_bundle, *arguments)
        assert refused.code == 2
        assert words in refused.err
    pipe(b"", terminal=True)
    assert "is a terminal" in cli("run", tiny_bundle, "What?", "--image", "-").err


def test_run_without_a_picture(cli: Callable, tiny_bundle: Path) -> None:
    result = cli("run", tiny_bundle, "How many rows has a page?")
    assert result.code == 0, result.err
    assert result.out.strip()
    assert "visual" not in result.err


def test_run_makes_room_for_many_pictures(cli: Callable, tiny_bundle: Path, pages: list[Page]) -> None:
    images = [argument for page in (*pages, *pages) for argument in ("--image", page.path)][:12]
    result = cli("run", tiny_bundle, "What?", *images, "--max-new-tokens", "2", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["visual_tokens"] == 6 * 576


def test_run_stops_and_samples_as_asked(cli: Callable, tiny_bundle: Path, pages: list[Page]) -> None:
    ask = ("run", tiny_bundle, QUESTION, "--image", pages[0].path, "--json", "--no-verify")
    stopped = json.loads(cli(*ask, "--stop", "\n").out)
    assert (stopped["text"], stopped["finish_reason"]) == (pages[0].truth.split()[0], "stop")
    limit = ("--max-new-tokens", "12")
    short = json.loads(cli(*ask, *limit).out)
    assert (short["new_tokens"], short["finish_reason"]) == (12, "length")
    assert pages[0].truth.startswith(short["text"])
    hot = ("--temperature", "50", *limit)
    first, again, other = (json.loads(cli(*ask, *hot, "--seed", seed).out)["text"] for seed in ("1", "1", "2"))
    assert first == again != other
    assert json.loads(cli(*ask, *hot, "--top-k", "1").out)["text"] == short["text"]


def test_run_at_16_bits(cli: Callable, bundle_factory: Callable[..., Path], pages: list[Page]) -> None:
    bundle = bundle_factory(bits=16)
    result = cli("run", bundle, QUESTION, "--image", pages[0].path, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["text"] == pages[0].truth
    assert found["bytes_per_visual_token"] == found["sixteen_bit_bytes_per_visual_token"]
    assert "16 bits, not quantised" in cli("inspect", bundle).out


# inspect


def test_inspect(cli: Callable, tiny_bundle: Path) -> None:
    manifest = Manifest.load(tiny_bundle)
    result = cli("inspect", tiny_bundle, "--verify")
    assert result.code == 0, result.err
    assert "every file matches its SHA-256" in result.out
    assert "layers 0-3               keys 1 bit, values 1 bit, shaped" in result.out
    assert f"{manifest.layout.bits_per_element():.3f}" in result.out
    found = json.loads(cli("inspect", tiny_bundle, "--json").out)
    assert sum(found["parts"].values()) == found["bytes"]
    assert (
        sum(path.stat().st_size for path in tiny_bundle.rglob("*") if path.is_file())
        == found["bytes"] + (tiny_bundle / "vkvx.json").stat().st_size
    )
    assert found["cache"]["compression"] >= 12
    assert found["graphs"]["decoder"]["operators"]["vkvx::VisualKVAttention"] == 4
    (function,) = found["graphs"]["decoder"]["functions"]
    assert function["name"] == "vkvx::VisualKVAttention"
    assert function["nodes"] > 50
    assert found["graphs"]["vision"]["functions"] == []


def test_inspect_agrees_with_the_live_cache(cli: Callable, tiny_bundle: Path, pages: list[Page]) -> None:
    shown = json.loads(cli("inspect", tiny_bundle, "--json").out)["cache"]
    used = json.loads(cli("run", tiny_bundle, "Read row 1.", "--image", pages[0].path, "--json").out)
    assert used["visual_bytes"] == shown["bytes_per_picture"]
    assert used["text_bytes"] == used["text_tokens"] * shown["bytes_per_text_token"]


# validate


def test_validate(cli: Callable, tiny_bundle: Path, pages: list[Page]) -> None:
    result = cli("validate", tiny_bundle, "--steps", "2", "--image", pages[2].path)
    assert result.code == 0, result.out + result.err
    lines = result.out.splitlines()
    assert all(line.startswith("✓ ") for line in lines[:-1])
    assert lines[-1].endswith("comparisons are within tolerance")
    assert any("image_embeds" in line for line in lines)
    own = ("--model", tiny_bundle)  # its own weights, where the checkpoint is gone
    every = cli("validate", tiny_bundle, *own, "--steps", "1", "--image", pages[2].path, "--per-layer").out.splitlines()
    assert every[-1].endswith("comparisons are within tolerance")
    assert any("visual_key, layer 3" in line for line in every)
    assert len(every) > len(lines)


def test_validate_fails_where_tolerances_are_too_small(cli: Callable, tiny_bundle: Path, pages: list[Page]) -> None:
    zero = ("--atol", "0", "--rtol", "0")
    result = cli("validate", tiny_bundle, "--steps", "1", *zero, "--image", pages[0].path, "--json")
    assert result.code == 1
    found = json.loads(result.out)
    assert found["passed"] is False
    failed = [check for check in found["checks"] if not check["passed"]]
    assert failed
    assert found["first_divergent_layer"] == min(
        check["layer"] for check in failed if check["layer"] is not None and check["phase"] == "prefill"
    )


def test_validate_finds_weights_that_differ(
    cli: Callable, tiny_bundle: Path, tmp_path: Path, pages: list[Page]
) -> None:
    """The bundle is intact and another checkpoint is given: the layer that was changed is named."""
    from safetensors.torch import load_file, save_file

    from vkvx.models.registry import TINY_LLAVA

    other = tmp_path / "other"
    shutil.copytree(TINY_LLAVA, other, ignore=shutil.ignore_patterns("pages", "*.py", "__pycache__"))
    weights = load_file(other / "model.safetensors")
    (name,) = [key for key in weights if key.endswith("layers.2.self_attn.k_proj.weight") and "vision" not in key]
    weights[name] = weights[name] * 1.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    image = ("--image", pages[0].path)
    result = cli("validate", tiny_bundle, "--model", other, "--steps", "1", *image)
    assert result.code == 1
    # Levels of `shaped` lie so wide apart that those of smaller keys leave no larger errors; the stored RMS differs.
    assert "\n✗ prefill          visual_key_rms, layer 2 " in result.out
    assert result.out.endswith("layer 2 is the first that diverges\n")


def test_lines_without_layers_show_the_worst() -> None:
    def check(name: str, layer: int, difference: float, tolerance: float) -> SimpleNamespace:
        passed = difference <= tolerance
        return SimpleNamespace(
            name=name, phase="prefill", layer=layer, max_difference=difference, tolerance=tolerance, passed=passed
        )

    fine = [check("a", 0, 1, 10), check("a", 1, 5, 10), check("a", 2, 2, 10)]
    failing = [check("b", 0, 1, 10), check("b", 1, 11, 10), check("b", 2, 99, 10)]
    chosen: list[Any] = validate.worst_of_layers([*fine, *failing])  # type: ignore[list-item]
    assert [(entry.name, entry.layer) for entry in chosen] == [("a", 1), ("b", 1)]
