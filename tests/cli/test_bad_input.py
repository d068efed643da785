"""Whatever a user gets wrong: one typed line on stderr, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import listing, run_process
from samples import CHECKPOINT, Page

from vkvx.cli import main
from vkvx.manifest import FORMAT_VERSION, Manifest


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Run a command that must be refused; returns the message. ``tmp_path`` must look the same afterwards."""

    def call(*arguments: object) -> str:
        before = listing(tmp_path)
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        assert code == 2, captured.err
        assert captured.out == ""
        assert listing(tmp_path) == before
        errors = [line for line in captured.err.splitlines() if line.startswith("vkvx: error: ")]
        assert captured.err.splitlines()[-1:] == errors, captured.err  # one, and the last line
        assert "Traceback" not in captured.err
        return errors[0]

    return call


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of tiny-llava to damage."""
    copy = tmp_path / "checkpoint"
    copy.mkdir()
    for path in CHECKPOINT.iterdir():
        if path.suffix in (".json", ".jinja", ".safetensors"):
            shutil.copy(path, copy)
    return copy


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of a bundle to damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits", "3"], ["3 bits", "1, 2, 4 or 8"]),
        (["--key-bits", "5"], ["5 bits", "--key-bits"]),
        (["--value-bits", "16"], ["16 bits", "whole model"]),
        (["--group-size", "100"], ["group size 100", "128"]),
        (["--group-size", "some"], ["--group-size some", "auto"]),
        (["--bits-per-layer", "0:16"], ["16 bits", "(--bits)"]),
        (["--bits-per-layer", "0-9:8"], ["layer 9", "0 to 3"]),
        (["--bits-per-layer", "all"], ["'all'", "0-1:8,2-:1"]),
        (["--quantile-alpha", "0.1"], ["--quantile-alpha", "(--quantizer) quantile"]),
        (["--quantizer", "quantile", "--quantile-alpha", "0.5"], ["0.5", "less than 0.5"]),
        (["--tau", "1"], ["--tau", "(--score-correction) affine"]),
        (["--opset", "9"], ["opset 9", "17"]),
        (["--bits", "16", "--quantizer", "lloyd"], ["--quantizer", "16 bits"]),
        (["--revision", "main"], ["tiny-llava", "--revision"]),
        (["--cache-dir", "x"], ["tiny-llava", "leave out cache_dir= (--cache-dir)"]),
        (["--bits", "2", "--key-bits", "1", "--value-bits", "1"], ["(--bits) has no effect"]),
        (["--bits", "16", "--group-size", "256"], ["(--group-size) has no effect at 16 bits"]),
        (["--text-bits", "4"], ["4 bits", "(--text-bits) 16 or 8"]),
        (["--bits", "16", "--text-bits", "8"], ["(--text-bits) 8 is for text beside packed pictures", "leave it out"]),
    ],
)
def test_export_options(refused: Callable, tmp_path: Path, options: list[str], words: list[str]) -> None:
    message = refused("export", "tiny-llava", "-o", tmp_path / "out", *options)
    assert all(word in message for word in words), message


def test_unknown_alias(refused: Callable, tmp_path: Path) -> None:
    message = refused("export", "nosuchmodel", "-o", tmp_path / "out")
    assert all(word in message for word in ("nosuchmodel", "tiny-llava", "llava-13b", "local directory")), message


def test_no_network_for_a_hub_id(tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}  # nobody listens there
    arguments = ("export", "llava", "-o", tmp_path / "out", "--cache-dir", tmp_path / "cache")
    result = run_process(*arguments, environment=environment)
    assert result.code == 2
    assert result.err.count("\n") == 1, result.err
    assert result.err.startswith("vkvx: error: cannot download 'llava-hf/llava-1.5-7b-hf'")
    assert "give the directory of a checkpoint" in result.err
    assert not (tmp_path / "out").exists()


def test_unsupported_architecture(refused: Callable, tmp_path: Path, checkpoint: Path) -> None:
    edit(checkpoint / "config.json", lambda config: config.update(architectures=["GPTNeoXForCausalLM"]))
    message = refused("export", checkpoint, "-o", tmp_path / "out")
    assert "GPTNeoXForCausalLM" in message
    assert "LlavaForConditionalGeneration" in message


def test_head_dim_that_is_no_multiple_of_32(refused: Callable, tmp_path: Path, checkpoint: Path) -> None:
    edit(checkpoint / "config.json", lambda config: config["text_config"].update(head_dim=48))
    message = refused("export", checkpoint, "-o", tmp_path / "out")
    assert "48" in message
    assert "32" in message


def test_existing_output(refused: Callable, bundle: Path) -> None:
    before = (bundle / "vkvx.json").read_bytes()
    assert "--force" in refused("export", "tiny-llava", "-o", bundle)
    assert (bundle / "vkvx.json").read_bytes() == before


def test_output_that_is_no_bundle_is_never_replaced(refused: Callable, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    for force in ([], ["--force"]):
        assert "another output= (--output)" in refused("export", "tiny-llava", "-o", tmp_path / "out", *force)
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_output_in_a_directory_that_is_not_there(refused: Callable, tmp_path: Path) -> None:
    assert "create it" in refused("export", "tiny-llava", "-o", tmp_path / "absent" / "out")


def test_too_little_room_is_told_before_anything_is_written(
    refused: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, used=10**9, free=10**6))
    message = refused("export", "tiny-llava", "-o", tmp_path / "out")
    assert "1.0 MB left" in message
    assert "another disk" in message


def test_disk_that_fills_up_during_the_export(tmp_path: Path, bundle: Path) -> None:
    """A limit on the size of files stands for the full disk: the system refuses to write on in both cases."""
    before, manifest = listing(tmp_path), (bundle / "vkvx.json").read_bytes()
    program = (
        "import resource, sys; from vkvx.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); sys.exit(main(sys.argv[1:]))"
    )
    # float32 has to be written; a copy could share the blocks of the checkpoint.
    arguments = ["export", "tiny-llava", "-o", str(bundle), "--force", "--dtype", "float32"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"vkvx: error: no room left for {bundle}")
    assert "Traceback" not in done.stderr
    assert (listing(tmp_path), (bundle / "vkvx.json").read_bytes()) == (before, manifest)


def test_truncated_safetensors(refused: Callable, tmp_path: Path, checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    assert "model.safetensors" in refused("export", checkpoint, "-o", tmp_path / "out")


def test_checkpoint_without_weights(refused: Callable, tmp_path: Path, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert "safetensors" in refused("export", checkpoint, "-o", tmp_path / "out")


READERS = (("inspect",), ("run", "hello"), ("chat",), ("validate",))


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader[0])
def test_directory_that_is_no_bundle(refused: Callable, tmp_path: Path, reader: tuple[str, ...]) -> None:
    assert "no vkvx bundle" in refused(reader[0], tmp_path, *reader[1:])


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader[0])
def test_manifest_of_a_newer_version(refused: Callable, bundle: Path, reader: tuple[str, ...]) -> None:
    edit(bundle / "vkvx.json", lambda manifest: manifest.update(format_version=FORMAT_VERSION + 1))
    message = refused(reader[0], bundle, *reader[1:])
    assert f"format version {FORMAT_VERSION + 1}" in message
    assert "install a newer vkvx" in message


@pytest.mark.parametrize("reader", [("inspect", "--verify"), *READERS[1:]], ids=lambda reader: reader[0])
def test_file_whose_hash_differs(refused: Callable, bundle: Path, reader: tuple[str, ...]) -> None:
    path = bundle / "decoder.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    message = refused(reader[0], bundle, *reader[1:])
    assert "decoder.onnx" in message
    assert "SHA-256" in message


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader[0])
@pytest.mark.parametrize("path", ["../outside", "/etc/hostname", "processor/../../outside"])
def test_manifest_whose_paths_leave_the_bundle(
    refused: Callable, bundle: Path, reader: tuple[str, ...], path: str
) -> None:
    (bundle.parent / "outside").write_bytes(b"x")
    edit(bundle / "vkvx.json", lambda manifest: manifest["files"].update({path: {"bytes": 1, "sha256": "0" * 64}}))
    assert path in refused(reader[0], bundle, *reader[1:])


def test_missing_file(refused: Callable, bundle: Path) -> None:
    (bundle / "vision.onnx").unlink()
    assert "vision.onnx" in refused("inspect", bundle)


def test_graph_that_is_no_onnx(refused: Callable, bundle: Path) -> None:
    path = bundle / "decoder.onnx"
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert "decoder.onnx" in refused("inspect", bundle)
    assert "decoder.onnx" in refused("run", bundle, "hello", "--no-verify")


@pytest.mark.parametrize("verb", [("run", "What?"), ("validate",)], ids=lambda verb: verb[0])
def test_corrupt_image(
    refused: Callable, tiny_bundle: Path, tmp_path: Path, pages: list[Page], verb: tuple[str, ...]
) -> None:
    picture = tmp_path / "page.png"
    picture.write_bytes(pages[0].path.read_bytes()[:2000])
    message = refused(verb[0], tiny_bundle, *verb[1:], "--image", picture)
    assert "page.png" in message
    assert "PNG" in message


def test_missing_image(refused: Callable, tiny_bundle: Path, tmp_path: Path) -> None:
    assert "absent.png" in refused("run", tiny_bundle, "What?", "--image", tmp_path / "absent.png")


def test_prompt_without_a_placeholder(refused: Callable, tiny_bundle: Path, pages: list[Page]) -> None:
    message = refused("run", tiny_bundle, "What?", "--raw-prompt", "--image", pages[0].path)
    assert "0 <image>" in message
    assert "1 picture" in message


def test_placeholder_without_an_image(refused: Callable, tiny_bundle: Path) -> None:
    assert "1 <image>" in refused("run", tiny_bundle, "<image> What?", "--raw-prompt")


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (["--max-visual-tokens", "640", "--max-new-tokens", "4"], "--max-visual-tokens"),
        (["--max-text-tokens", "20"], "--max-text-tokens"),
        (["--max-new-tokens", "5000"], "--max-new-tokens"),
    ],
)
def test_more_tokens_than_capacity(
    refused: Callable, tiny_bundle: Path, pages: list[Page], options: list[str], flag: str
) -> None:
    images = ["--image", pages[0].path, "--image", pages[1].path]
    assert flag in refused("run", tiny_bundle, "What?", *images, *options)


@pytest.mark.parametrize("verb", [("run", "What?"), ("bench",)], ids=lambda verb: verb[0])
def test_pieces_shorter_than_a_group(refused: Callable, tiny_bundle: Path, verb: tuple[str, ...]) -> None:
    message = refused(verb[0], tiny_bundle, *verb[1:], "--prefill-chunk", "639")
    assert "prefill_chunk (--prefill-chunk) must be at least 640, the group size of the bundle, got 639" in message


@pytest.mark.parametrize(
    "option", [("--top-k", "5"), ("--top-p", "0.9"), ("--seed", "3")], ids=lambda option: option[0]
)
def test_choices_among_tokens_without_a_choice(refused: Callable, tiny_bundle: Path, option: tuple[str, str]) -> None:
    message = refused("run", tiny_bundle, "What?", *option)
    assert f"({option[0]}) has no effect at temperature 0" in message
    assert "(--temperature) as well" in message


def test_more_pictures_than_positions(refused: Callable, tiny_bundle: Path, pages: list[Page]) -> None:
    images = [word for page in pages[:4] * 2 for word in ("--image", page.path)]
    message = refused("run", tiny_bundle, "What?", *images)
    assert "the model knows 4096; give fewer or smaller pictures (8 take 4608 of these tokens), or " in message


@pytest.mark.parametrize("verb", [("run", "What?"), ("chat",), ("validate",), ("bench",)], ids=lambda verb: verb[0])
def test_a_backend_that_is_not_there_is_told_before_files_are_read(
    refused: Callable, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...]
) -> None:
    monkeypatch.setattr(Manifest, "verify", None)
    assert "has no engines of 'rtx'; run `vkvx build " in refused(verb[0], tiny_bundle, *verb[1:], "--backend", "rtx")


def test_options_that_no_turn_of_a_chat_could_take(refused: Callable, tiny_bundle: Path) -> None:
    assert "this one is none; leave them out" in refused("chat", tiny_bundle, "--max-pixels", "100000")
    assert "takes no videos" in refused("chat", tiny_bundle, "--fps", "2")


def test_a_chat_without_a_template(refused: Callable, bundle: Path) -> None:
    (bundle / "processor" / "chat_template.jinja").unlink()
    edit(bundle / "vkvx.json", lambda manifest: manifest["files"].pop("processor/chat_template.jinja"))
    assert "ask it by `vkvx run --raw-prompt`" in refused("chat", bundle)
    assert "give --raw-prompt to `vkvx run`" in refused("run", bundle, "What?")


def test_provider_that_is_not_there(refused: Callable, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "no CUDA provider" in refused("run", tiny_bundle, "What?", "--provider", "cuda")


def test_validate_without_the_checkpoint(
    refused: Callable, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(bundle / "vkvx.json", lambda manifest: manifest["model"].update(source=str(tmp_path / "gone")))
    monkeypatch.setattr(Manifest, "verify", None)
    message = refused("validate", bundle)
    assert f"'{tmp_path / 'gone'}' is not a directory" in message
    assert f"give model= (--model) with its place, or --model {bundle}, which" in message


def test_validate_layers_of_json(cli: Callable, tiny_bundle: Path) -> None:
    result = cli("validate", tiny_bundle, "--json", "--per-layer")
    assert result.code == 2
    assert "--per-layer has no effect with --json" in result.err


def test_validate_with_another_model(refused: Callable, tiny_bundle: Path) -> None:
    assert "nosuchmodel" in refused("validate", tiny_bundle, "--model", "nosuchmodel")
