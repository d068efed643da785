"""The model repository: its config by Triton's own schema, and the model with a real bundle."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import json_format, text_format
from samples import Page
from tritonclient.grpc import model_config_pb2

from vkvx import OptionError, Session, StorageError
from vkvx.errors import InputError
from vkvx.runtime.serving import triton
from vkvx.runtime.serving.deploy import triton_config, write_triton_repository

PROMPT = "Transcribe the page."


def parsed(text: str) -> Any:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


@pytest.mark.parametrize(("gpus", "kind"), [(None, "KIND_AUTO"), ((), "KIND_CPU"), ((0, 3), "KIND_GPU")])
def test_config_is_what_triton_reads(gpus: tuple[int, ...] | None, kind: str) -> None:
    options: dict[str, Any] = {
        "slots": 5,
        "visual_tokens": 640,
        "prefill_chunk": 896,
        "cut_after_pictures": True,
        "reuse": False,
        "max_waiting": 9,
        "deadline": 2.5,
        "threads": 3,
        "environment": "/envs/a b",
    }
    config = parsed(triton_config("a.model", gpus=gpus, instances=2, bundle='b "c"', **options))
    assert (config.name, config.backend, config.max_batch_size) == ("a.model", "python", 0)
    assert config.model_transaction_policy.decoupled
    (group,) = config.instance_group
    assert model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind) == kind
    assert (group.count, tuple(group.gpus)) == (2, tuple(gpus or ()))
    values = {name: entry.string_value for name, entry in config.parameters.items()}
    options = {
        "slots": "5",
        "visual_tokens": "640",
        "prefill_chunk": "896",
        "cut_after_pictures": "true",
        "reuse": "false",
        "max_waiting": "9",
        "deadline": "2.5",
        "threads": "3",
        "EXECUTION_ENV_PATH": "/envs/a b",
    }
    assert values == {"bundle": 'b "c"', "backend": "auto", **options}
    assert {entry.name for entry in config.input if list(entry.dims) == [-1]} == {"images", "stop"}
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


def test_a_deployed_bundle_is_a_copy(tiny_bundle: Path, tmp_path: Path) -> None:
    """ONNX readers refuse weights that have hard links, in the bundle that was linked as well."""
    seen: list[tuple[str, int, int]] = []
    model = write_triton_repository(tiny_bundle, tmp_path, name="tiny", progress=lambda *done: seen.append(done))
    names = [path.relative_to(tiny_bundle) for path in tiny_bundle.rglob("*") if path.is_file()]
    assert len(names) > 8
    for name in names:
        original, copy = tiny_bundle / name, model / "1/bundle" / name
        assert copy.read_bytes() == original.read_bytes()
        assert (original.stat().st_nlink, copy.stat().st_nlink) == (1, 1)
    for bundle in (tiny_bundle, model / "1/bundle"):
        for graph in ("decoder.onnx", "vision.onnx"):
            assert onnx.load(bundle / graph).graph.initializer
    total = sum((tiny_bundle / name).stat().st_size for name in names)
    assert seen[-1] == ("copy", total, total)


def test_no_room_is_told_before_anything_is_copied(
    cli: Callable, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=1000))
    monkeypatch.setattr("vkvx.runtime.serving.deploy.can_share_blocks", lambda *_: False)
    done = cli("deploy", "triton", tiny_bundle, "-o", tmp_path / "models")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert f"the output takes 11.4 MB, {tmp_path / 'models'} has" in done.err
    assert "or give --reference, which copies nothing" in done.err
    assert not list((tmp_path / "models").iterdir())
    monkeypatch.setattr("vkvx.runtime.serving.deploy.can_share_blocks", lambda *_: True)
    assert cli("deploy", "triton", tiny_bundle, "-o", tmp_path / "models").code == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"threads": 0},
        {"threads": 2, "gpus": (0,)},
        {"threads": 2, "backend": "rtx"},
        {"gpus": (), "backend": "tensorrt"},
        {"environment": "relative"},
        {"environment": "$$TRITON_MODEL_DIRECTORYs"},
        {"name": "a/b"},
        {"slots": 0},
        {"instances": 0},
        {"gpus": (0, 0)},
        {"backend": "tensorflow"},
        {"reference": "relative"},
        {"text_tokens": 0},
        {"prefill_chunk": 1},
        {"max_waiting": 0},
        {"deadline": 0.0},
        {"deadline": float("nan")},
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

        @classmethod
        def from_dlpack(cls, name: str, data: np.ndarray) -> Utils.Tensor:
            return cls(name, data)

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

    def __init__(self, fields: str = "", /, **inputs: Any) -> None:
        self.inputs = inputs
        self.fields = fields
        self.responses: list[Any] = []
        self.cancelled = False
        self._done = threading.Event()

    def get_response_sender(self) -> Request:
        return self

    def parameters(self) -> str:
        return self.fields

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


def opened(bundle: Path, repository: Path, **options: Any) -> Any:
    """The model of a bundle, as Triton initializes it on a CPU; it imports Triton's module."""
    options = {"name": "tiny", "backend": "onnxruntime", "slots": 2, "gpus": (), **options}
    folder = write_triton_repository(bundle, repository, **options)
    loaded = triton.TritonPythonModel()
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
    return loaded


@pytest.fixture(scope="module")
def model(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", Utils("triton_python_backend_utils"))
        loaded = opened(tiny_bundle, tmp_path_factory.mktemp("models"))
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


@pytest.mark.parametrize(
    ("fields", "unknown"),
    [('{"max_tokens": 8}', "max_tokens"), ('{"triton_a": 1, "n": "x"}', "n"), ('{"max_new_tokens_": true}', "max_new")],
)
def test_unknown_fields_are_refused(model: Any, fields: str, unknown: str) -> None:
    limit = np.array([2], np.int32)
    wrong = Request(fields, prompt=strings(PROMPT), max_new_tokens=limit)
    right = Request('{"triton_enable_empty_final_response": true}', prompt=strings(PROMPT), max_new_tokens=limit)
    model.execute([wrong, right])
    (response,) = wrong.wait()
    assert f"unknown field '{unknown}" in str(response.error)
    assert "give some of prompt, images, raw_prompt, stream, max_new_tokens, " in str(response.error)
    assert right.wait()[0].error is None


PICTURE = b"\x89PNG\r\n\x1a\n and more, \xff"
ENCODED = base64.b64encode(PICTURE)


@pytest.mark.parametrize(
    ("entry", "data"),
    [
        (PICTURE, PICTURE),
        (ENCODED, PICTURE),
        (ENCODED[:8] + b"\r\n" + ENCODED[8:] + b"\n", PICTURE),
        (b"data:image/png;base64," + ENCODED, PICTURE),
        (b"DATA:;Base64," + ENCODED.replace(b"=", b"%3D"), PICTURE),
        (b"data:image/svg+xml,%3Csvg%20", b"<svg "),
        (b"P1\n2 2\n0 1 1 0\n", b"P1\n2 2\n0 1 1 0\n"),  # a picture in plain text
        (b"not base64", b"not base64"),
        (ENCODED[:-1], ENCODED[:-1]),
        (7, 7),
    ],
)
def test_pictures_come_as_bytes_in_base64_or_as_data_uris(entry: Any, data: Any) -> None:
    assert triton._picture(1, entry) == data


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (b"https://a.example/b.png", "picture 2 is an address; give the picture itself, in base64 or as a data: URI"),
        (b"file:///etc/passwd", "picture 2 is an address"),
        (b"data:image/png;base64,a-_b", "picture 2 is a data: URI that is no base64"),
        (b"data:image/png;base64," + ENCODED[:-1], "picture 2 is a data: URI that is no base64"),
    ],
)
def test_other_pictures_are_refused(entry: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        triton._picture(2, entry)


@pytest.mark.parametrize(
    ("version", "answers", "reason"),
    [("2.4.6", False, r"numpy 2\.4\.6; run `pip install 'numpy<2'`"), ("2.4.6", True, None), ("1.26.4", False, None)],
)
def test_a_triton_that_cannot_read_arrays_fails_the_load(
    version: str, answers: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    utils = Utils("triton_python_backend_utils")
    monkeypatch.setattr("numpy.__version__", version)
    if not answers:
        tensor = type("Tensor", (), {"from_dlpack": staticmethod(lambda name, data: Utils.Tensor(name, data * 0))})
        monkeypatch.setattr(utils, "Tensor", tensor, raising=False)
    if reason is None:
        triton._check_numpy(utils)
    else:
        with pytest.raises(Utils.TritonModelException, match=reason):
            triton._check_numpy(utils)


def test_an_answer_has_a_deadline(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Utils("triton_python_backend_utils"))
    loaded = opened(tiny_bundle, tmp_path, deadline=1e-4)
    request = Request(prompt=strings("What is 1 + 1?"))
    loaded.execute([request])
    (response,) = request.wait()
    loaded.finalize()
    assert "has not ended after 0.0001 s" in str(response.error)


@pytest.mark.parametrize(("kind", "provider", "devices"), [("CPU", "cpu", None), ("GPU", "auto", "3")])
def test_an_instance_runs_where_triton_puts_it(
    kind: str, provider: str, devices: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Utils("triton_python_backend_utils"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    asked: dict[str, Any] = {}
    monkeypatch.setattr(Session, "load", lambda bundle, **settings: asked.update(settings))
    servers = []
    monkeypatch.setattr(triton, "Server", lambda session, max_waiting: servers.append(max_waiting))
    given: dict[str, Any] = {"threads": 3, "prefill_chunk": 640, "cut_after_pictures": True, "reuse": False}
    text = triton_config("a", max_waiting=7, **given)
    config = json_format.MessageToDict(parsed(text), preserving_proto_field_name=True)
    arguments = {"model_repository": "/", "model_version": "1", "model_config": json.dumps(config)}
    triton.TritonPythonModel().initialize({**arguments, "model_instance_kind": kind, "model_instance_device_id": "3"})
    assert asked == {"backend": "auto", "slots": 8, **given, "provider": provider}
    assert servers == [7]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == devices


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


def test_requests_that_still_run_at_the_end_get_a_final_response(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Utils("triton_python_backend_utils"))
    model = opened(tiny_bundle, tmp_path)
    requests = [long() for _ in range(3)]
    model.execute(requests)
    model.finalize()
    for request in requests:
        assert request._done.is_set()
        assert "closed" in str(request.responses[-1].error)


def test_a_damaged_bundle_fails_the_load(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Utils("triton_python_backend_utils"))
    parameters = {"bundle": {"string_value": str(tmp_path)}, "backend": {"string_value": "onnxruntime"}}
    arguments = {"model_repository": "/", "model_version": "1", "model_instance_kind": "CPU"}
    with pytest.raises(Utils.TritonModelException, match=r"vkvx\.json"):
        triton.TritonPythonModel().initialize({**arguments, "model_config": json.dumps({"parameters": parameters})})


def test_backend_is_chosen_in_the_server_by_default(cli: Callable, tiny_bundle: Path, tmp_path: Path) -> None:
    assert cli("deploy", "triton", tiny_bundle, "-o", tmp_path / "models", "--name", "tiny").code == 0
    config = parsed((tmp_path / "models/tiny/config.pbtxt").read_text())
    assert config.parameters["backend"].string_value == "auto"


def test_the_verb(cli: Callable, tiny_bundle: Path, tmp_path: Path) -> None:
    arguments = ("deploy", "triton", tiny_bundle, "-o", tmp_path / "models", "--backend", "onnxruntime")
    done = cli(*arguments, "--gpus", "0,1", "--name", "tiny", "--json")
    assert json.loads(done.out) == {"model": "tiny", "directory": str(tmp_path / "models/tiny")}
    assert list(parsed((tmp_path / "models/tiny/config.pbtxt").read_text()).instance_group[0].gpus) == [0, 1]
    environment = "$$TRITON_MODEL_DIRECTORY/python.tar.gz"
    assert cli(*arguments, "--name", "b", "--threads", "2", "--environment", environment).code == 0
    config = parsed((tmp_path / "models/b/config.pbtxt").read_text())
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU
    values = {name: entry.string_value for name, entry in config.parameters.items()}
    assert (values["threads"], values["EXECUTION_ENV_PATH"]) == ("2", environment)
    for wrong in ((), ("--gpus", "x"), ("--name", "a b", "--force")):
        refused = cli(*arguments, "--name", "tiny", *wrong)
        assert refused.code == 2
        assert refused.err.startswith("vkvx: error: ")
        assert refused.err.count("\n") == 1


def test_the_script_of_several_servers_names_what_is_missing(tmp_path: Path) -> None:
    """Before it starts a server or waits for one."""
    script = Path(__file__).parents[2] / "examples" / "serve" / "several.sh"
    environment = {"PATH": str(tmp_path), "VKVX_API_KEY": "secret"}
    done = subprocess.run(
        ["/bin/bash", script, "bundle", "cpu"], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "vkvx is not installed, or not on the PATH\n")
