"""The model repository: its config by Triton's own schema, and the model with a real bundle."""

from __future__ import annotations

import json
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format, text_format
from samples import Page
from tritonclient.grpc import model_config_pb2

from vkvx import OptionError, Session, StorageError
from vkvx.runtime.serving.deploy import triton_config, write_triton_repository

PROMPT = "Transcribe the page."


def parsed(text: str) -> Any:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


@pytest.mark.parametrize(("gpus", "kind"), [(None, "KIND_AUTO"), ((), "KIND_CPU"), ((0, 3), "KIND_GPU")])
def test_config_is_what_triton_reads(gpus: tuple[int, ...] | None, kind: str) -> None:
    config = parsed(triton_config("a.model", gpus=gpus, instances=2, slots=5, visual_tokens=640, bundle='b "c"'))
    assert (config.name, config.backend, config.max_batch_size) == ("a.model", "python", 0)
    assert config.model_transaction_policy.decoupled
    (group,) = config.instance_group
    assert model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind) == kind
    assert (group.count, tuple(group.gpus)) == (2, tuple(gpus or ()))
    values = {name: entry.string_value for name, entry in config.parameters.items()}
    assert values == {"bundle": 'b "c"', "backend": "auto", "slots": "5", "visual_tokens": "640"}
    assert [entry.name for entry in config.input if not entry.optional] == ["prompt"]
    assert {entry.name for entry in config.output} == {"text", "finish_reason", "token_ids"}


def test_repository_appears_whole_or_not_at_all(tiny_bundle: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    model = write_triton_repository(tiny_bundle, repository, name="tiny", backend="onnxruntime")
    assert sorted(path.name for path in model.iterdir()) == ["1", "config.pbtxt"]
    assert (model / "1/bundle/vkvx.json").read_bytes() == (tiny_bundle / "vkvx.json").read_bytes()
    with pytest.raises(StorageError, match="--force"):
        write_triton_repository(tiny_bundle, repository, name="tiny", backend="onnxruntime")
    write_triton_repository(
        tiny_bundle, repository, name="tiny", backend="onnxruntime", reference="/bundles/tiny", force=True
    )
    assert sorted(path.name for path in (model / "1").iterdir()) == ["model.py"]
    (repository / "mine").mkdir()
    (repository / "mine/notes.txt").touch()
    with pytest.raises(StorageError, match="no model of vkvx"):
        write_triton_repository(tiny_bundle, repository, name="mine", backend="onnxruntime", force=True)
    assert sorted(path.name for path in repository.iterdir()) == ["mine", "tiny"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "a/b"},
        {"slots": 0},
        {"instances": 0},
        {"gpus": (0, 0)},
        {"backend": "tensorflow"},
        {"reference": "relative"},
        {"text_tokens": 0},
    ],
)
def test_wrong_options_are_refused(tiny_bundle: Path, tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        write_triton_repository(tiny_bundle, tmp_path / "models", **{"backend": "onnxruntime", **wrong})
    assert not (tmp_path / "models").exists()


class Utils(types.ModuleType):
    """What Triton's Python backend gives a model, as far as this one uses it."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1

    class TritonModelException(Exception):
        pass

    class TritonError(Exception):
        pass

    class Tensor:
        def __init__(self, name: str, data: np.ndarray) -> None:
            self.name, self._data = name, data

        def as_numpy(self) -> np.ndarray:
            return self._data

    class InferenceResponse:
        def __init__(self, output_tensors: Any = (), error: Exception | None = None) -> None:
            self.outputs = {tensor.name: tensor.as_numpy().tolist() for tensor in output_tensors}
            self.error = error

    @staticmethod
    def get_input_tensor_by_name(request: Any, name: str) -> Any:
        return Utils.Tensor(name, request.inputs[name]) if name in request.inputs else None


class Request:
    """A request, and the responses to it."""

    def __init__(self, **inputs: Any) -> None:
        self.inputs = inputs
        self.responses: list[Any] = []
        self.cancelled = False
        self._done = threading.Event()

    def get_response_sender(self) -> Request:
        return self

    def is_cancelled(self) -> bool:
        return self.cancelled

    def send(self, response: Any, flags: int = 0) -> None:
        assert not self._done.is_set(), "a response after the final one"
        self.responses.append(response)
        if flags == Utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            self._done.set()

    def wait(self) -> list[Any]:
        assert self._done.wait(120), "no final response"
        return self.responses


def strings(*values: str | bytes) -> np.ndarray:
    return np.array([v.encode() if isinstance(v, str) else v for v in values], np.object_)


@pytest.fixture
def model(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Utils("triton_python_backend_utils"))
    folder = write_triton_repository(tiny_bundle, tmp_path, name="tiny", backend="onnxruntime", slots=2, gpus=())
    from vkvx.runtime.serving.triton import TritonPythonModel

    loaded = TritonPythonModel()
    config = json_format.MessageToDict(parsed((folder / "config.pbtxt").read_text()), preserving_proto_field_name=True)
    loaded.initialize(
        {
            "model_config": json.dumps(config),
            "model_repository": str(folder),
            "model_version": "1",
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
        }
    )
    yield loaded
    loaded.finalize()


def test_answers_are_those_of_a_session(model: Any, tiny_bundle: Path, pages: list[Page]) -> None:
    files = [Path(page.path).read_bytes() for page in pages[:3]]
    limit = np.array([12], np.int32)
    whole = [Request(prompt=strings(PROMPT), images=strings(data), max_new_tokens=limit) for data in files]
    stream = Request(prompt=strings(PROMPT), images=strings(files[0]), max_new_tokens=limit, stream=np.array([True]))
    model.execute([*whole, stream])
    with Session.load(tiny_bundle, backend="onnxruntime") as session:
        prompt = session.format([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}])
        for request, page in zip(whole, pages, strict=False):
            expected = session.generate(prompt, [page.path], max_new_tokens=12)
            (response,) = request.wait()
            assert response.outputs["text"] == [expected.text.encode()]
            assert response.outputs["finish_reason"] == [expected.finish_reason.encode()]
            assert response.outputs["token_ids"] == list(expected.token_ids)
    responses = stream.wait()
    assert len(responses) > 2
    assert b"".join(r.outputs["text"][0] for r in responses) == whole[0].responses[0].outputs["text"][0]
    assert [bool(r.outputs["finish_reason"][0]) for r in responses] == [False] * (len(responses) - 1) + [True]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"images": strings(b"no picture")}, "picture 1 cannot be read"),
        ({"temperature": np.array([-1.0], np.float32)}, "temperature"),
        ({"max_new_tokens": np.array([100_000], np.int32)}, "max_new_tokens"),
    ],
)
def test_wrong_requests_get_the_error(model: Any, inputs: dict[str, Any], message: str) -> None:
    request = Request(prompt=strings(PROMPT), **inputs)
    model.execute([request])
    (response,) = request.wait()
    assert message in str(response.error)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"prompt": strings(b"\xff")}, "'prompt' is not valid UTF-8"),
        ({"prompt": np.array([7], np.int32)}, "'prompt' must be a string in UTF-8, got int"),
        ({"stop": strings("a", b"b\xff")}, "'stop' is not valid UTF-8 (invalid start byte at byte 1)"),
        ({"max_new_tokens": strings("many")}, "whole number"),
        ({"images": np.array([7], np.int32)}, "picture 1 must be"),
        ({"stream": None}, "AttributeError"),
    ],
)
def test_a_wrong_request_leaves_the_others_of_its_batch_alone(model: Any, inputs: dict[str, Any], message: str) -> None:
    before, after = (Request(prompt=strings(PROMPT), max_new_tokens=np.array([4], np.int32)) for _ in range(2))
    wrong = Request(**{"prompt": strings(PROMPT), **inputs})
    model.execute([before, wrong, after])
    assert message in str(wrong.wait()[0].error)
    for request in (before, after):
        (response,) = request.wait()
        assert response.error is None
        assert len(response.outputs["token_ids"]) == 4


class Broken(Request):
    """A request whose client cannot be sent a second response, except errors."""

    def send(self, response: Any, flags: int = 0) -> None:
        if self.responses and response.error is None:
            raise BrokenPipeError("gone")
        super().send(response, flags)


def long(kind: type[Request] = Request) -> Request:
    """A request that runs until it is stopped."""
    limit, yes = np.array([900], np.int32), np.array([True])
    return kind(prompt=strings(PROMPT), max_new_tokens=limit, ignore_eos=yes, stream=yes)


def test_a_cancelled_request_gets_a_final_response(model: Any) -> None:
    cancelled = long()
    cancelled.cancelled = True
    model.execute([cancelled])
    assert "cancelled" in str(cancelled.wait()[-1].error)


def test_a_client_that_is_gone_frees_its_slot(model: Any) -> None:
    gone = [long(Broken), long(Broken)]
    model.execute(gone)  # they take all slots
    for request in gone:
        assert "BrokenPipeError: gone" in str(request.wait()[-1].error)
    request = Request(prompt=strings(PROMPT), max_new_tokens=np.array([2], np.int32))
    model.execute([request])
    assert request.wait()[-1].error is None


def test_requests_that_still_run_at_the_end_get_a_final_response(model: Any) -> None:
    requests = [long() for _ in range(3)]
    model.execute(requests)
    model.finalize()
    for request in requests:
        assert request._done.is_set()
        assert "closed" in str(request.responses[-1].error)
    model._session.close = lambda: None  # the fixture ends the model once more


def test_a_damaged_bundle_fails_the_load(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Utils("triton_python_backend_utils"))
    from vkvx.runtime.serving.triton import TritonPythonModel

    parameters = {"bundle": {"string_value": str(tmp_path)}, "backend": {"string_value": "onnxruntime"}}
    arguments = {"model_repository": "/", "model_version": "1", "model_instance_kind": "CPU"}
    with pytest.raises(Utils.TritonModelException, match=r"vkvx\.json"):
        TritonPythonModel().initialize({**arguments, "model_config": json.dumps({"parameters": parameters})})


def test_backend_is_chosen_in_the_server_by_default(cli: Callable, tiny_bundle: Path, tmp_path: Path) -> None:
    assert cli("deploy", "triton", tiny_bundle, "-o", tmp_path / "models", "--name", "tiny").code == 0
    config = parsed((tmp_path / "models/tiny/config.pbtxt").read_text())
    assert config.parameters["backend"].string_value == "auto"


def test_the_verb(cli: Callable, tiny_bundle: Path, tmp_path: Path) -> None:
    arguments = ("deploy", "triton", tiny_bundle, "-o", tmp_path / "models", "--backend", "onnxruntime")
    done = cli(*arguments, "--gpus", "0,1", "--name", "tiny", "--json")
    assert json.loads(done.out) == {"model": "tiny", "directory": str(tmp_path / "models/tiny")}
    assert list(parsed((tmp_path / "models/tiny/config.pbtxt").read_text()).instance_group[0].gpus) == [0, 1]
    for wrong in ((), ("--gpus", "x"), ("--name", "a b", "--force")):
        refused = cli(*arguments, "--name", "tiny", *wrong)
        assert refused.code == 2
        assert refused.err.startswith("vkvx: error: ")
        assert refused.err.count("\n") == 1
