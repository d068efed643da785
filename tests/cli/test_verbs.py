"""The verbs on a real bundle."""

from __future__ import annotations

import json
import os
import pty
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import run_process
from samples import Page

from vkvx import ExportOptions
from vkvx.cli import chat, export, terminal, validate
from vkvx.errors import InputError
from vkvx.manifest import Manifest

QUESTION = "Transcribe the page."


# export


def test_export_prints_a_summary(cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("export", "tiny-llava", "--bits", "4", "--key-bits", "2")
    assert result.code == 0, result.err
    output = Path("tiny-llava-mixed")  # the default: no number of bits is true of keys and values
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    assert f"next          vkvx run {output}" in result.out
    manifest = Manifest.load(output)
    assert (manifest.quantization.key_bits, manifest.quantization.value_bits) == ((2,) * 4, (4,) * 4)
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


# chat


def test_chat_from_a_pipe(tiny_bundle: Path, pages: list[Page]) -> None:
    lines = [
        f"/image {pages[0].path}",
        "Read row 1.",
        "Read row 2.",
        "/stats",
        f"/image {pages[0].path.parent / 'absent.png'}",
        "",
        "/nonsense",
        "/help",
        f"/image {pages[0].path}",
        "<image> and <image>?",
        "/drop",
        "What is <image>? </s>",
        "/reset",
        "/stats",
        "How many columns has a page?",
        "/quit",
        "this is never read",
    ]
    result = run_process("chat", tiny_bundle, stdin="\n".join(lines))
    assert result.code == 2, result.err  # of a pipe, where something was refused
    answers = result.out.splitlines()
    truth = pages[0].truth.split()
    assert answers[:2] == truth[:2]
    assert answers[3].startswith("576 visual tokens in ")
    assert "/reset        forget everything" in answers
    assert "0 text tokens in 0 B" in result.out
    assert "never" not in result.out
    assert "error: no picture at" in result.err
    assert "error: the prompt has 2 <image> and comes with 1 picture" in result.err
    assert "unknown command /nonsense" in result.err
    assert "Traceback" not in result.err


def test_chat_goes_on_after_a_message_that_does_not_fit(tiny_bundle: Path, pages: list[Page]) -> None:
    picture = f"/image {pages[0].path}"
    lines = [picture, picture, "Read row 1.", "/drop", picture, "Read row 1.", picture, "Read row 2."]
    options = ("--max-visual-tokens", "640", "--max-new-tokens", "20")
    result = run_process("chat", tiny_bundle, *options, stdin="\n".join(lines))
    assert result.code == 2
    assert result.out == pages[0].truth.split()[0] + "\n"
    assert result.err.count("waits for the next one, /drop takes it back") == 2
    assert result.err.count("/reset makes room") == 1
    assert "--max-visual-tokens" in result.err


@pytest.mark.parametrize(
    ("typed", "path"),
    [
        ("page.png", "page.png"),
        ("'my page.png'", "my page.png"),
        ('"my page.png"', "my page.png"),
        ("my\\ page.png ", "my page.png"),
        ("my page.png", "my page.png"),
        ("~/page.png", os.path.expanduser("~/page.png")),
    ],
)
def test_paths_as_terminals_paste_them(typed: str, path: str) -> None:
    assert str(chat._path("/image", typed)) == path


@pytest.mark.parametrize("typed", ["", "  ", "'a.png", "'a.png' 'b.png'"])
def test_paths_that_are_none(typed: str) -> None:
    with pytest.raises(InputError, match="path"):
        chat._path("/image", typed)


def test_tab_completes_commands_and_paths(tmp_path: Path) -> None:
    (tmp_path / "a page.png").touch()
    (tmp_path / "also").mkdir()
    assert chat.completions("/im") == ["/image "]
    assert chat.completions("/") == [f"{command} " for command in chat.COMMANDS]
    assert chat.completions("hello /im") == []
    assert chat.completions(f"/image {tmp_path}/a") == [f"/image {tmp_path}/a\\ page.png", f"/image {tmp_path}/also/"]
    assert chat.completions(f"/video {tmp_path}/a\\ p") == [f"/video {tmp_path}/a\\ page.png"]
    assert chat.completions("/reset x") == []


def test_control_characters_do_not_reach_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b[2Jb\x07\x9b\tc\r\nd\x7f\u2028e"
    monkeypatch.setattr(terminal.sys, "stdout", StringIO())
    assert terminal.printable(text) == text
    monkeypatch.setattr(terminal.sys.stdout, "isatty", lambda: True)
    assert terminal.printable(text) == "a[2Jb\tc\nd\u2028e"


def in_a_terminal(*command: object) -> tuple[int, int]:
    """A process in a pseudo-terminal: its number, and the terminal's."""
    pid, master = pty.fork()
    if pid == 0:
        os.execvpe(sys.executable, [sys.executable, "-m", "vkvx", *map(str, command)], os.environ | {"TERM": "dumb"})
    return pid, master


def read_until(master: int, text: str, seconds: float = 120.0) -> str:
    """What a terminal shows up to this text."""
    found, end = "", time.monotonic() + seconds
    while text not in found:
        ready, _, _ = select.select([master], [], [], max(0.0, end - time.monotonic()))
        assert ready, f"no {text!r} in {found!r}"
        found += os.read(master, 4096).decode(errors="replace")
    return found


def interrupt(master: int, text: str) -> str:
    """Press Ctrl-C until this text is shown: while readline works on a key, Python takes no notice of it."""
    for _ in range(60):
        os.write(master, b"\x03")
        if select.select([master], [], [], 2.0)[0]:
            return read_until(master, text)
    raise AssertionError(f"no {text!r}")


def test_ctrl_c_at_the_prompt_clears_the_line(tiny_bundle: Path) -> None:
    pid, master = in_a_terminal("chat", tiny_bundle, "--threads", "1", "--max-new-tokens", "3")
    read_until(master, "> ")
    os.write(master, b"never sent")
    read_until(master, "never sent")
    assert "Ctrl-D leaves" in interrupt(master, "> ")
    assert "Ctrl-D" not in interrupt(master, "> ")
    os.write(master, b"/nonsense\n")
    told = "unknown command /nonsense"
    before, _, after = read_until(master, told).partition(told)
    assert "never" not in before
    if "> " not in after:  # before the prompt, the terminal would take Ctrl-D for itself
        read_until(master, "> ")
    os.write(master, b"\x04")
    assert os.waitpid(pid, 0)[1] == 0
    os.close(master)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_nothing_half_written(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vkvx", "export", "tiny-llava", "-o", str(tmp_path / "out")]
    heeded = partial(signal.signal, number, signal.SIG_DFL)  # not under nohup
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeded) as process:
        while process.poll() is None and not any(tmp_path.iterdir()):
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    assert (process.returncode, err.splitlines()[-1]) == (130, "vkvx: error: interrupted")
    assert not any(tmp_path.iterdir())


def test_encodings_and_streams_that_lack_something(tiny_bundle: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "vkvx",
        "run",
        str(tiny_bundle),
        "caf\u00e9 \u4e2d?",
        "--max-new-tokens",
        "3",
        "--json",
    ]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for closed in ("<&-", "2>&-", ">&-"):
        shell = f"{shlex.join(command)} {closed}"
        assert subprocess.run(["sh", "-c", shell], capture_output=True, check=False).returncode == 0, closed
    broken = subprocess.run([*command[:5], b"\xff?"], capture_output=True, text=True, check=False)
    assert broken.returncode == 2
    assert broken.stderr.startswith("vkvx: error: a message is not valid Unicode")


def test_ctrl_c_stops_an_answer_and_not_the_chat(tiny_bundle: Path, pages: list[Page]) -> None:
    command = [sys.executable, "-u", "-m", "vkvx", "chat", str(tiny_bundle), "--threads", "1"]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"/image {pages[0].path}\n{QUESTION}\n")
        process.stdin.flush()
        begun = process.stdout.read(1)
        os.kill(process.pid, signal.SIGINT)
        out, _ = process.communicate("How many columns has a page?\n", timeout=120)
    out = begun + out
    assert process.returncode == 0
    assert out.splitlines()[-1].strip()
    # The answer may have ended before the signal came; if not, it says so.
    assert " [stopped]" in out or pages[0].truth in out


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
    assert "\n✗ prefill          visual_key_error, layer 2 " in result.out
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
