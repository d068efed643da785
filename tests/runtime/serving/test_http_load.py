"""The HTTP server over a stand-in for a model: slots, queues, clients that go away, states, pictures from elsewhere."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_sessions import break_step, held_back
from fakes import FakeBackend, FakeProcessor, manifest
from http_server import Running, running

from vkvx.errors import InputError, OptionError
from vkvx.runtime.serving.http import app, connections, pictures
from vkvx.runtime.serving.http.app import Settings
from vkvx.runtime.serving.http.pictures import PictureSources, is_public
from vkvx.runtime.sessions.session import Session

CHAT = "/v1/chat/completions"


def session(slots: int = 1) -> Session:
    facts = manifest()
    return Session(facts, FakeBackend(facts, slots), FakeProcessor())  # type: ignore[arg-type]


def body(text: str = "x", **options: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": text}], "ignore_eos": True, **options}


def slow_down(loaded: Session) -> None:
    """Steps take some time, in which a client can go away."""
    step = loaded.backend.step

    def slow(call, embeds):  # type: ignore[no-untyped-def]
        time.sleep(0.01)
        return step(call, embeds)

    loaded.backend.step = slow  # type: ignore[method-assign]


def send(server: Running, request: dict[str, Any]) -> socket.socket:
    """A client that has sent a request and reads nothing."""
    data = json.dumps(request).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def until(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot(stream: bool) -> None:
    loaded = session()
    slow_down(loaded)
    with running(loaded) as server:
        connection = send(server, body("[endless]", max_tokens=900, stream=stream))
        if stream:
            assert b"200 OK" in connection.recv(64)
        until(lambda: server.metric("vkvx_rows_live") == 1)
        connection.close()
        until(lambda: server.metric("vkvx_rows_live") == 0)
        assert server.metric('vkvx_requests_total{end="cancelled"}') == 1
        status, answer, _ = server.request("POST", CHAT, body(max_tokens=3))
        assert (status, answer["usage"]["completion_tokens"]) == (200, 3)
        assert len(loaded.backend.calls) < 900  # type: ignore[attr-defined]


def test_a_client_that_goes_away_leaves_the_queue() -> None:
    loaded = session()
    slow_down(loaded)
    with running(loaded) as server:
        first = send(server, body("[first]", max_tokens=60))
        until(lambda: server.metric("vkvx_rows_live") == 1)
        second = send(server, body("[second]", max_tokens=60, stream=True))
        until(lambda: server.metric("vkvx_rows_waiting") == 1)
        second.close()
        assert b"200 OK" in first.recv(64)
        first.close()
        assert server.metric('vkvx_requests_total{end="cancelled"}') == 1
    assert len(loaded.backend.calls) == 60  # type: ignore[attr-defined]


def test_a_full_queue() -> None:
    loaded = session()
    go_on = held_back(loaded, 1)
    with running(loaded, Settings(max_waiting=2)) as server:
        clients = [send(server, body("[first]", max_tokens=4))]
        until(lambda: server.metric("vkvx_rows_live") == 1)
        clients.append(send(server, body("[second]", max_tokens=4)))
        until(lambda: server.metric("vkvx_rows_waiting") == 1)
        status, answer, headers = server.request("POST", CHAT, body(n=2, temperature=1.0))
        assert (status, answer["error"]["code"], headers["Retry-After"]) == (429, "queue_full", "1")
        assert answer["error"]["type"] == "rate_limit_error"
        go_on.set()
        assert [b"200 OK" in client.recv(64) for client in clients] == [True, True]
        for client in clients:
            client.close()
        until(lambda: server.metric("vkvx_rows_live") + server.metric("vkvx_rows_waiting") == 0)


def test_a_deadline() -> None:
    loaded = session()
    slow_down(loaded)
    with running(loaded, Settings(deadline=0.1)) as server:
        status, answer, _ = server.request("POST", CHAT, body(max_tokens=900))
        assert (status, answer["error"]["code"], answer["error"]["type"]) == (504, "deadline", "server_error")
        assert server.metric('vkvx_requests_total{end="expired"}') == 1
        assert server.request("POST", CHAT, body(max_tokens=1))[0] == 200


def test_a_deadline_counts_from_the_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the place in the queue: pictures and text were prepared before."""
    loaded = session()
    prepare = loaded.processor.prepare

    def slow(*given: Any, **options: Any) -> Any:
        time.sleep(0.2)
        return prepare(*given, **options)

    monkeypatch.setattr(loaded.processor, "prepare", slow)
    with running(loaded, Settings(deadline=0.1)) as server:
        status, answer, _ = server.request("POST", CHAT, body(max_tokens=1))
        assert (status, answer["error"]["code"]) == (504, "deadline")
        assert "has not ended after 0.1 s" in answer["error"]["message"]
    assert not loaded.backend.calls  # type: ignore[attr-defined]


def test_slow_heads_and_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection without a head is closed, and a body that comes by single bytes frees its place in the queue."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(app, "FIRST_SECONDS", 0.2)
    loaded = session()
    slow_down(loaded)
    with running(loaded, Settings(max_waiting=1)) as server:
        for head in (b"", b"GET /health HTTP/1.1\r\nHost"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
                connection.sendall(head)
                assert connection.recv(64) == b""
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200 OK")
            connection.sendall(b"GET /hea")  # the next of the same connection
            assert connection.recv(64) == b""
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{{"
            connection.sendall(head.encode())
            until(lambda: server.service._preparing == 1)
            assert server.request("POST", CHAT, body())[0] == 429
            answer = b"".join(iter(lambda: connection.recv(4096), b""))  # up to its end
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"the body comes too slowly: 1 bytes" in answer
        # An answer may take longer than a head.
        status, answer, _ = server.request("POST", CHAT, body("[endless]", max_tokens=60))
        assert (status, answer["usage"]["completion_tokens"]) == (200, 60)


def test_a_server_that_has_failed(caplog: pytest.LogCaptureFixture) -> None:
    loaded = session()
    with running(loaded) as server:
        assert server.service._opened is not None

        def fail() -> bool:
            raise ZeroDivisionError("unforeseen")

        server.service._opened[1]._take_changes = fail  # type: ignore[method-assign]
        assert server.request("POST", CHAT, body())[0] == 500
        for method, path in (("GET", "/health"), ("POST", CHAT)):
            status, answer, _ = server.request(method, path, body())
            assert (status, answer["error"]["code"]) == (503, "failed")
            assert "the server has failed (ZeroDivisionError: unforeseen)" in answer["error"]["message"]
    assert len(caplog.records) == 1


def test_while_it_loads_and_when_it_stops() -> None:
    with running(None) as server:
        for method, path in (("GET", "/health"), ("GET", "/v1/models"), ("POST", CHAT)):
            status, answer, headers = server.request(method, path, {})
            assert (status, answer["error"]["code"], headers["Retry-After"]) == (503, "loading", "1")
        assert server.request("GET", "/")[0] == server.request("GET", "/metrics")[0] == 200
        server.service.open(session())
        assert server.request("GET", "/health")[0] == 200
        server.service.close()
        assert server.request("GET", "/health")[1]["error"]["code"] == "stopping"


def test_a_step_that_fails_ends_a_stream_with_an_error(caplog: pytest.LogCaptureFixture) -> None:
    """The log has each failure once."""
    loaded = session()
    break_step(loaded, after=0)
    break_step(loaded, after=3)
    with running(loaded) as server:
        status, answer, _ = server.request("POST", CHAT, body(max_tokens=9))
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert "out of order" in answer["error"]["message"]
        assert len(caplog.records) == 1
        status, text, _ = server.request("POST", CHAT, body(max_tokens=9, stream=True))
        last = json.loads(text.strip().rpartition("data: ")[2])
        assert (status, last["error"]["type"]) == (200, "server_error")
        assert "out of order" in last["error"]["message"]
        status, answer, _ = server.request("POST", CHAT, body(max_tokens=9))
        assert (status, answer["usage"]["completion_tokens"]) == (200, 9)
    assert len(caplog.records) == 2


def test_a_silent_stream_says_that_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vkvx.runtime.serving.http.answers.KEEP_ALIVE_SECONDS", 0.01)
    loaded = session()
    go_on = held_back(loaded, 1)
    with running(loaded) as server:
        connection = send(server, body(max_tokens=2, stream=True))
        got = b""
        while b": waiting" not in got:
            got += connection.recv(4096)
        go_on.set()
        while b"[DONE]" not in got:
            got += connection.recv(4096)
        connection.close()


def test_pages_of_others_do_not_reach_a_local_server() -> None:
    with running(session(), Settings(own_hosts_only=True)) as server:
        for host, status in (("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.example", 403)):
            assert server.request("GET", "/health", headers={"Host": host})[0] == status


class _Pictures(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/picture")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"p" * (2000 if self.path == "/large" else 10))

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def host() -> Iterator[str]:
    """A web server on this machine."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pictures) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield f"localhost:{web.server_port}"
        web.shutdown()
        thread.join()


def test_pictures_of_allowed_hosts(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = PictureSources(hosts=("example.org", host.upper()), max_bytes=1000)
    with pytest.raises(InputError, match="private network"):
        sources.load([f"http://{host}/picture"])
    monkeypatch.setattr(pictures, "is_public", lambda address: True)
    assert sources.load([f"http://{host}/picture?a=b"]) == [b"p" * 10]
    for address, words in (
        (f"http://{host}/large", "more than 1,000 bytes"),
        (f"http://{host}/moved", "status 302; redirects are not followed"),
        (f"http://{host}/\x01", "cannot be fetched"),
        (f"https://{host}/picture", "cannot be fetched"),
        (f"http://user@{host}/picture", "not allowed"),
        ("http://example.org:81/", "not allowed"),
        ("http://example.org:x/", "not understood"),
        ("http://[/", "not understood"),
        ("ftp://example.org/", "must be a data: URI"),
        ("page.png", "must be a data: URI"),
        ("data:image/png;base64", "without a comma"),
    ):
        with pytest.raises(InputError, match=words):
            sources.load([address])
    with pytest.raises(InputError, match="at most 64"):
        sources.load(["data:,"] * 65)
    with pytest.raises(OptionError, match="no host"):
        PictureSources(hosts=("http://example.org",))


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:0a00:0001::", False),
    ],
)
def test_private_networks(address: str, public: bool) -> None:
    assert is_public(address) == public


def test_files_below_a_directory(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    (inside / "a b.png").write_bytes(b"picture")
    (tmp_path / "out.png").write_bytes(b"secret")
    (inside / "link.png").symlink_to(tmp_path / "out.png")
    (inside / "near.png").symlink_to("a b.png")
    (inside / "large.png").write_bytes(b"x" * 101)
    sources = PictureSources(inside, max_bytes=100)
    assert sources.load([f"file://{inside}/a%20b.png", "file:near.png"]) == [b"picture"] * 2
    for address in ("link.png", "../out.png", f"{tmp_path}/out.png", "%00", "", ".", "absent"):
        with pytest.raises(InputError, match="no such file below"):
            sources.load([f"file:{address}"])
    with pytest.raises(InputError, match="more than 100 bytes"):
        sources.load(["file:large.png"])
    with pytest.raises(InputError, match="not allowed here"):
        PictureSources().load([f"file://{inside}/a%20b.png"])
    with pytest.raises(OptionError, match="is no directory"):
        PictureSources(tmp_path / "out.png")
