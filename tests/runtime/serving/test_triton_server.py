"""The model of `vkvx deploy triton` in a real Triton Inference Server on a CPU."""

from __future__ import annotations

import base64
import json
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest
import triton_server
import tritonclient.grpc as grpc
from samples import Page
from triton_server import TritonServer

from vkvx import Session
from vkvx.runtime.serving.deploy import write_triton_repository

pytestmark = pytest.mark.skipif(
    not triton_server.FOLDER.exists(), reason="needs Triton's server: `python tests/helpers/triton_server.py`"
)
PROMPT = "Transcribe the page."
LENGTH = 12


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """With the models "tiny", which is loaded, and "modern", whose Python has numpy 2."""
    repository = tmp_path_factory.mktemp("triton")
    options: dict[str, Any] = {"slots": 2, "threads": 1}
    write_triton_repository(tiny_bundle, repository, name="tiny", environment=str(triton_server.ENVIRONMENT), **options)
    write_triton_repository(tiny_bundle, repository, name="modern", reference=str(tiny_bundle), **options)
    with triton_server.running(repository, repository / "log.txt") as found:
        found.post("repository/models/tiny/load")
        yield found


@pytest.fixture(scope="module")
def expected(tiny_bundle: Path, pages: list[Page]) -> Callable[..., str]:
    """``expected(page, **options)``: the answer of a session."""
    session = Session.load(tiny_bundle, backend="onnxruntime", threads=1)
    prompt = session.format([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}])
    return lambda page, **options: session.generate(prompt, [page.path], **options).text


class Client:
    """A gRPC stream, and what comes back on it."""

    def __init__(self, server: TritonServer) -> None:
        self._client = grpc.InferenceServerClient(server.grpc)
        self._results: queue.Queue[tuple[Any, Any]] = queue.Queue()

    def __enter__(self) -> Client:
        self._client.start_stream(lambda result, error: self._results.put((result, error)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.close()

    def ask(self, number: int = 0, parameters: dict[str, Any] | None = None, **fields: Any) -> Client:
        """Send a request; fields are lists of bytes or text, or numbers."""
        inputs = []
        for name, value in fields.items():
            data = np.array(value if isinstance(value, list) else [value])
            kind = {"b": "BOOL", "i": "INT32", "f": "FP32"}.get(data.dtype.kind, "BYTES")
            data = data.astype({"BYTES": np.object_, "INT32": np.int32, "FP32": np.float32}.get(kind, data.dtype))
            inputs.append(grpc.InferInput(name, list(data.shape), kind))
            inputs[-1].set_data_from_numpy(data)
        self._client.async_stream_infer("tiny", inputs, request_id=str(number), parameters=parameters)
        return self

    def next(self) -> tuple[int, str, str]:
        """Number, text and finish reason of the next response; reason "error" with its message as the text."""
        result, error = self._results.get(timeout=120)
        if error is not None:
            return -1, error.message(), "error"
        text, reason = (result.as_numpy(name)[0].decode() for name in ("text", "finish_reason"))
        return int(result.get_response().id), text, reason

    @property
    def has_ended(self) -> bool:
        """Whether a response that waits here is the last of a request."""
        waiting = [self.next() for _ in range(self._results.qsize())]
        return any(reason for _, _, reason in waiting)

    def answers(self, count: int = 1) -> list[str]:
        """The whole answers, or errors, of so many requests."""
        texts: dict[int, str] = {}
        ended = 0
        while ended < count:
            number, text, reason = self.next()
            texts[number] = texts.get(number, "") + text
            ended += bool(reason)
        return [texts[number] for number in sorted(texts)]


def over_http(server: TritonServer, **fields: Any) -> Any:
    """The response of ``generate``; the message of an error."""
    try:
        return json.loads(server.post("models/tiny/generate", json.dumps(fields).encode()))
    except HTTPError as error:
        return json.loads(error.read())["error"]


def data_of(page: Page) -> bytes:
    return Path(page.path).read_bytes()


def test_answers_are_those_of_a_session(server: TritonServer, expected: Callable[..., str], pages: list[Page]) -> None:
    """Three requests over two slots, one of them as a stream; then with a picture in base64 and as an address."""
    with Client(server) as client:
        for number, page in enumerate(pages[:3]):
            fields = {"prompt": PROMPT, "images": data_of(page), "max_new_tokens": LENGTH}
            client.ask(number, stream=number == 1, **fields)
        texts = client.answers(3)
    assert texts == [expected(page, max_new_tokens=LENGTH) for page in pages[:3]]
    encoded = base64.b64encode(data_of(pages[3])).decode()
    text = expected(pages[3], max_new_tokens=LENGTH)
    assert text
    assert text == text.lstrip()
    for images in ([encoded], f"data:image/png;base64,{encoded}"):
        assert over_http(server, prompt=PROMPT, images=images, max_new_tokens=LENGTH)["text"] == text
    fields = {"prompt": PROMPT, "images": encoded, "max_new_tokens": LENGTH, "stream": True}
    events = server.post("models/tiny/generate_stream", json.dumps(fields).encode()).decode().split("data: ")[1:]
    assert len(events) == LENGTH
    assert "".join(json.loads(event)["text"] for event in events) == text


def test_wrong_requests_get_an_error_of_one_line(server: TritonServer, pages: list[Page]) -> None:
    picture = data_of(pages[0])
    cut, many = base64.b64encode(picture[:5000]).decode(), [base64.b64encode(picture).decode()] * 5
    for fields, message in [
        ({"prompt": PROMPT, "max_tokens": 4}, "unknown field 'max_tokens': give some of prompt, images, "),
        ({"prompt": PROMPT, "parameters": {"n": 2}}, "unknown field 'n'"),
        ({"max_new_tokens": 4}, "'prompt' is missing"),
        ({"prompt": PROMPT, "images": [cut]}, "picture 1 cannot be read as a picture (image file is truncated)"),
        ({"prompt": PROMPT, "images": ["https://a.example/b.png"]}, "picture 1 is an address"),
        ({"prompt": PROMPT, "images": many}, "the pictures need 5 groups of 640 visual tokens, the cache has 4"),
        ({"prompt": "\ud800"}, "surrogate"),  # Triton's own parser
    ]:
        error = over_http(server, **fields)
        assert message in error
        assert "\n" not in error
    with Client(server) as client:
        assert client.ask(prompt=b"a\xed\xa0\x80").answers() == [
            "'prompt' is not valid UTF-8 (invalid continuation byte at byte 1)"
        ]
        (error,) = client.ask(prompt=PROMPT, parameters={"max_tokens": 4}).answers()
        assert "unknown field 'max_tokens'" in error
        assert client.ask(prompt="What is 1 + 1?").answers() == ["2"]


def test_a_cancelled_request_gives_its_slot_to_the_next(server: TritonServer) -> None:
    endless = {"prompt": "What?", "max_new_tokens": 900, "ignore_eos": True, "stream": True}
    with Client(server) as running:
        with Client(server) as cancelled:
            for client in (cancelled, running):
                assert client.ask(**endless).next()[2] == ""  # it has one of the two slots
        with Client(server) as waiting:
            assert waiting.ask(prompt="What is 1 + 1?").answers() == ["2"]
            assert not running.has_ended


def test_a_model_can_be_unloaded_and_loaded_again(server: TritonServer) -> None:
    before = over_http(server, prompt="What is 1 + 1?")
    server.post("repository/models/tiny/unload")
    assert not server.is_ready("models/tiny")
    server.post("repository/models/tiny/load")
    assert server.is_ready("models/tiny")
    assert over_http(server, prompt="What is 1 + 1?") == before


def test_with_numpy_2_the_model_refuses_to_load(server: TritonServer) -> None:
    with pytest.raises(HTTPError) as caught:
        server.post("repository/models/modern/load")
    error = json.loads(caught.value.read())["error"]
    assert f"this Triton cannot read arrays of numpy {np.__version__}; run `pip install 'numpy<2'`" in error
    assert not server.is_ready("models/modern")
