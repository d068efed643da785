"""``vkvx chat``, and what terminals do to verbs: keys, signals, encodings."""

from __future__ import annotations

import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from commands import run_process
from samples import Page

from vkvx.cli import chat, terminal
from vkvx.errors import InputError


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
    for closed in ("<&-", "2>&-", ">&-"):
        shell = ["sh", "-c", f"{shlex.join(command)} {closed}"]
        done = subprocess.run(shell, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), closed
    broken = subprocess.run([*command[:5], b"\xff?"], capture_output=True, text=True, check=False)
    assert broken.returncode == 2
    assert broken.stderr.startswith("vkvx: error: a message is not valid Unicode")


def test_ctrl_c_stops_an_answer_and_not_the_chat(tiny_bundle: Path, pages: list[Page]) -> None:
    command = [sys.executable, "-u", "-m", "vkvx", "chat", str(tiny_bundle), "--threads", "1"]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"/image {pages[0].path}\nTranscribe the page.\n")
        process.stdin.flush()
        begun = process.stdout.read(1)
        os.kill(process.pid, signal.SIGINT)
        out, _ = process.communicate("How many columns has a page?\n", timeout=120)
    out = begun + out
    assert process.returncode == 0
    assert out.splitlines()[-1].strip()
    # The answer may have ended before the signal came; if not, it says so.
    assert " [stopped]" in out or pages[0].truth in out
