"""``vkvx serve`` as a process, and ``vkvx chat --url``."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from commands import Result
from samples import Page

from vkvx import Session


def test_serve_and_chat(
    cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, pages: list[Page]
) -> None:
    """It listens before the bundle is open, answers, and ends by SIGTERM with an answer in one piece."""
    command = [sys.executable, "-m", "vkvx", "serve", str(tiny_bundle), "--port", "0", "--threads", "1", "--slots", "2"]
    command.append("--cut-after-pictures")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"VKVX_API_KEY": "key"})
    try:
        assert process.stderr is not None
        found = re.match(r"listens at (http://127\.0\.0\.1:\d+), loads ", process.stderr.readline())
        assert found is not None
        with pytest.raises(urllib.error.HTTPError) as loading:
            urllib.request.urlopen(f"{found[1]}/health", timeout=30)
        assert json.load(loading.value)["error"]["code"] == "loading"
        assert process.stderr.readline().startswith("tiny-llava is ready in onnxruntime on CPU")
        lines = [
            f"/image {pages[0].path}",
            "Read row 2.",
            "Read row 1.",
            "/stats",
            "/video x",
            "/reset",
            "/stats",
            "/quit",
        ]
        url = ("--url", f"{found[1]}/v1", "--max-new-tokens", "20")
        monkeypatch.setattr("sys.stdin", StringIO("\n".join(lines)))
        chat = cli("chat", *url, "--api-key", "key")
        assert chat.code == 2, chat.err  # of a pipe, where the video was refused
        assert chat.out.splitlines()[:2] == pages[0].truth.split()[1::-1]
        assert "576 visual tokens in 85.0 KiB, 1.1 MiB in 16 bits" in chat.out
        found_cached = re.search(r" (\d+) of them in the cache already", chat.out)
        assert found_cached is not None
        assert int(found_cached[1]) > 576
        assert chat.out.endswith("no answer yet\n")
        assert "error: a server takes no videos" in chat.err
        refused = cli("chat", *url, "--api-key", "other")
        assert (refused.code, refused.out) == (2, "")
        assert "the API key is missing or wrong" in refused.err
        body = {"model": "tiny-llava", "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
        headers = {"Content-Type": "application/json", "Authorization": "Bearer key"}
        request = urllib.request.Request(f"{found[1]}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.readline().startswith(b"data: {")
            process.send_signal(signal.SIGTERM)
            assert answer.read().endswith(b"data: [DONE]\n\n")
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()


def test_wrong_options_of_serve(cli: Callable[..., Result], tiny_bundle: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, words in (
            (("--port", port), f"cannot listen on 127.0.0.1:{port}"),
            (("--port", 70000), "--port must be 0 to 65535"),
            (("--max-waiting", 0), "--max-waiting must be at least 1"),
            (("--grace", "nan"), "--grace must be 0 to 86400 seconds, got nan"),
            (("--grace", "inf"), "--grace must be 0 to 86400 seconds, got inf"),
            (("--name", ""), "--name is empty"),
            (("--allow-hosts", "a.example:99999"), "--allow-hosts a.example:99999 is no host"),
            (("--allow-hosts", "*.example"), "--allow-hosts *.example is no host"),
            (("--deadline", 0), "--deadline must be more than 0"),
            (("--max-body", 5), "--max-body 5 has no unit"),
            (("--grace", -1), "--grace must be 0 to 86400"),
            (("--api-key", ""), "--api-key must be visible ASCII"),
            (("--allow-local-files", tmp_path / "absent"), "is no directory"),
            (("--allow-hosts", "http://a"), "is no host"),
        ):
            result = cli("serve", tiny_bundle, *options)
            assert (result.code, result.out) == (2, "")
            assert words in result.err
    result = cli("serve", tmp_path / "absent")
    assert (result.code, "absent" in result.err) == (2, True)


def test_a_bundle_that_does_not_open_ends_the_server(cli: Callable[..., Result], tiny_bundle: Path) -> None:
    result = cli("serve", tiny_bundle, "--port", 0, "--slots", 0)
    assert (result.code, "slots must be at least 1" in result.err) == (2, True)


def test_reuse_can_be_turned_off(
    cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path
) -> None:
    kept = []

    def serve(load: Callable[[], Session], settings: object, **_: object) -> None:
        with load() as session:
            kept.append(session.kept)

    monkeypatch.setattr("vkvx.runtime.serving.http.run.serve", serve)
    for options in ((), ("--no-reuse",)):
        assert cli("serve", tiny_bundle, "--no-verify", *options).code == 0
    assert kept[0] is not None
    assert kept[1] is None


def test_wrong_options_of_chat(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", StringIO())
    for options, words in (
        ((), "neither BUNDLE nor --url; give one of the two"),
        (("bundle", "--url", "http://127.0.0.1:1"), "both BUNDLE and --url"),
        (("--url", "127.0.0.1:8000"), "is no address; give one such as"),
        (("--url", "http://127.0.0.1:1"), "no server at http://127.0.0.1:1 (Connection refused); start one"),
        (("--url", "http://127.0.0.1:1", "--threads", 2), "--threads has no effect with --url"),
        (("bundle", "--api-key", "x"), "--api-key is for a server"),
    ):
        result = cli("chat", *options)
        assert (result.code, result.out) == (2, "")
        assert words in result.err


def test_small_packets_are_sent_at_once() -> None:
    """A connection that the server accepts does not wait for acknowledgements of what it sent before."""
    from vkvx.runtime.serving.http.run import bind

    with bind("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
