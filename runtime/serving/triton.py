"""The model of Triton's Python backend: a bundle behind a server, as `vkvx deploy triton` sets it up.

Runs inside Triton Inference Server only, which brings ``triton_python_backend_utils``. One instance is one process with
a session of its own; requests share its slots.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np

from vkvx.errors import InputError, VkvxError, describe
from vkvx.runtime.serving.answer import Answer
from vkvx.runtime.serving.server import LOG, MAX_WAITING, Server

OPTIONS = {
    "max_new_tokens": "TYPE_INT32",
    "temperature": "TYPE_FP32",
    "top_k": "TYPE_INT32",
    "top_p": "TYPE_FP32",
    "repetition_penalty": "TYPE_FP32",
    "no_repeat_ngram_size": "TYPE_INT32",
    "min_new_tokens": "TYPE_INT32",
    "seed": "TYPE_INT64",
    "stop": "TYPE_STRING",
    "ignore_eos": "TYPE_BOOL",
    "min_pixels": "TYPE_INT64",
    "max_pixels": "TYPE_INT64",
}
"""Optional inputs: the fields of GenerationOptions but for those of videos and lists of tokens, and their types."""
LISTS = ("images", "stop")
"""Inputs of any length; the others have one entry."""
INPUTS = {
    "prompt": "TYPE_STRING",
    "images": "TYPE_STRING",
    "raw_prompt": "TYPE_BOOL",
    "stream": "TYPE_BOOL",
    **OPTIONS,
}
"""All inputs and their types; only ``prompt`` has to be there."""
_RESERVED = "triton_"
"""Begins the names of parameters that Triton itself puts into requests."""

CANCEL_SECONDS = 0.1
"""How often a request that waits is asked whether its client has gone."""


class TritonPythonModel:
    """What Triton calls. Inputs and outputs are those of :func:`vkvx.runtime.serving.deploy.triton_config`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle on the instance's device. Fails with a reason where no request could be answered."""
        import triton_python_backend_utils as utils

        from vkvx.runtime.sessions.session import Session

        self._utils = utils
        _check_numpy(utils)
        is_on_gpu = args["model_instance_kind"] == "GPU"
        if is_on_gpu:
            # An instance is a process, so the device is chosen before CUDA starts in it.
            os.environ["CUDA_VISIBLE_DEVICES"] = args["model_instance_device_id"]
        parameters = {
            name: entry["string_value"] for name, entry in json.loads(args["model_config"])["parameters"].items()
        }
        version = Path(args["model_repository"]) / args["model_version"]
        settings: dict[str, Any] = {
            name: int(parameters[name])
            for name in ("slots", "visual_tokens", "text_tokens", "prefill_chunk", "threads")
            if name in parameters
        }
        settings |= {name: parameters[name] == "true" for name in ("cut_after_pictures", "reuse") if name in parameters}
        settings |= {"backend": parameters["backend"], "provider": "auto" if is_on_gpu else "cpu"}
        try:
            session = Session.load(version / parameters["bundle"], **settings)
        except VkvxError as error:
            raise utils.TritonModelException(str(error)) from error
        self._session = session
        self._server = Server(session, max_waiting=int(parameters.get("max_waiting", MAX_WAITING)))
        self._deadline = float(parameters["deadline"]) if "deadline" in parameters else None
        self._threads: list[threading.Thread] = []

    def execute(self, requests: list[Any]) -> None:
        """Queue the requests; their answers are sent from threads of their own, as the steps bring them.

        A request that cannot be queued gets its error, and the others of the batch go on.
        """
        for request in requests:
            sender = request.get_response_sender()
            try:
                stream = bool(self._value(request, "stream"))
                answer = self._submit(request)
                thread = threading.Thread(target=self._answer, args=(sender, request, answer, stream), daemon=True)
                thread.start()
            except Exception as error:  # whatever a request brings, it is answered, and so are those after it
                self._send_error(sender, error)
                continue
            self._threads = [one for one in self._threads if one.is_alive()] + [thread]

    def finalize(self) -> None:
        """End what still runs, and close the bundle."""
        self._server.close()
        for thread in self._threads:  # until each has sent the end of its answer
            thread.join()
        self._session.close()

    def _submit(self, request: Any) -> Answer:
        arrived = time.perf_counter()
        _check_parameters(request.parameters())
        options: dict[str, Any] = {}
        for name in OPTIONS:
            value = self._value(request, name)
            if value is not None:
                options[name] = tuple(_text(name, entry) for entry in value) if name == "stop" else value
        text = _text("prompt", self._value(request, "prompt"))
        images = [_picture(number, entry) for number, entry in enumerate(self._value(request, "images") or [], 1)]
        if not self._value(request, "raw_prompt"):
            content = [{"type": "image"}] * len(images)
            text = self._session.format([{"role": "user", "content": [*content, {"type": "text", "text": text}]}])
        chosen = self._session.options(None, options)
        return self._server.submit(text, images, options=chosen, deadline=self._deadline, since=arrived)

    def _value(self, request: Any, name: str) -> Any:
        """The entry of an input as a Python object, all of them for one of ``LISTS``; None if the request lacks it."""
        tensor = self._utils.get_input_tensor_by_name(request, name)
        if tensor is None:
            return None
        entries = tensor.as_numpy().ravel().tolist()
        return entries if name in LISTS else entries[0] if entries else None

    def _answer(self, sender: Any, request: Any, answer: Answer, stream: bool) -> None:
        try:
            self._send(sender, request, answer, stream)
        except Exception as error:
            answer.cancel()  # if sending failed, nobody reads what is left
            self._send_error(sender, error)

    def _send(self, sender: Any, request: Any, answer: Answer, stream: bool) -> None:
        final = self._utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        tokens: list[int] = []
        done, index = None, 0
        while done is None:
            if request.is_cancelled():
                answer.cancel()
            try:
                chunk = answer.chunk(index, CANCEL_SECONDS)
            except TimeoutError:  # it still waits for a slot, or for a step
                continue
            index += 1
            done = chunk.generation
            tokens += chunk.token_ids
            if stream and done is None:
                sender.send(self._response(chunk.text, "", chunk.token_ids))
            elif done is not None:
                text, ids = (chunk.text, chunk.token_ids) if stream else (done.text, tokens)
                sender.send(self._response(text, done.finish_reason, ids), flags=final)

    def _response(self, text: str, reason: str, token_ids: Any) -> Any:
        tensor = self._utils.Tensor
        return self._utils.InferenceResponse(
            output_tensors=[
                tensor("text", np.array([text.encode()], dtype=np.object_)),
                tensor("finish_reason", np.array([reason.encode()], dtype=np.object_)),
                tensor("token_ids", np.array(token_ids, np.int32)),
            ]
        )

    def _send_error(self, sender: Any, error: Exception) -> None:
        if not isinstance(error, VkvxError):
            LOG.error("a request failed: %s", describe(error), exc_info=error)
        try:
            response = self._utils.InferenceResponse(error=self._utils.TritonError(describe(error)))
            sender.send(response, flags=self._utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as failure:  # there is nobody left to tell
            LOG.error("a response cannot be sent: %s", describe(failure), exc_info=failure)


def _check_numpy(utils: Any) -> None:
    """Raise the error of a model that cannot be loaded if Triton's Python backend cannot read arrays of this numpy.

    It was compiled for the array type of one major version of numpy. That of numpy 1 takes numpy 2's arrays for empty
    ones, or ends the process at the first request, and so up to Triton 24.10.
    """
    if int(np.__version__.partition(".")[0]) < 2:
        return
    sent = np.arange(1, 5, dtype=np.float32)
    if not np.array_equal(utils.Tensor.from_dlpack("probe", sent).as_numpy(), sent):
        raise utils.TritonModelException(
            f"this Triton cannot read arrays of numpy {np.__version__}; run `pip install 'numpy<2'` in the Python "
            "environment of the model, or take a newer Triton"
        )


def _check_parameters(found: str) -> None:
    """Raise InputError for parameters of a request: Triton makes those of every field that is no input."""
    unknown = [name for name in json.loads(found or "{}") if not name.startswith(_RESERVED)]
    if unknown:
        raise InputError(f"unknown field '{unknown[0]}': give some of {', '.join(INPUTS)}")


def _picture(number: int, entry: Any) -> Any:
    """The bytes of a picture file that comes as they are, in base64, or as a ``data:`` URI; what is none as it is."""
    if not isinstance(entry, bytes):
        return entry
    head, _, data = entry.partition(b",")
    is_uri = head[:5].lower() == b"data:"
    if b"://" in entry[:16]:
        raise InputError(f"picture {number} is an address; give the picture itself, in base64 or as a data: URI")
    if not is_uri:
        data = entry
    elif head.lower().endswith(b";base64"):
        data = unquote_to_bytes(data)
    else:
        return unquote_to_bytes(data)
    try:  # no picture file is all letters and digits
        return base64.b64decode(data.translate(None, b"\r\n"), validate=True)
    except binascii.Error as error:
        if is_uri:
            raise InputError(f"picture {number} is a data: URI that is no base64 ({error})") from None
        return entry


def _text(name: str, value: Any) -> str:
    if value is None:
        raise InputError(f"'{name}' is missing")
    if not isinstance(value, bytes):
        raise InputError(f"'{name}' must be a string in UTF-8, got {type(value).__name__}")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"'{name}' is not valid UTF-8 ({error.reason} at byte {error.start})") from error
