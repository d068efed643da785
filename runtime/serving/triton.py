"""The model of Triton's Python backend: a bundle behind a server, as `vkvx deploy triton` sets it up.

Runs inside Triton Inference Server only, which brings ``triton_python_backend_utils``. One instance is one process with
a session of its own; requests share its slots.
"""

from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from vkvx.errors import InputError, VkvxError
from vkvx.runtime.serving.server import Answer, Server
from vkvx.runtime.sessions.sampling import GenerationOptions

OPTIONS = {
    "max_new_tokens": "TYPE_INT32",
    "temperature": "TYPE_FP32",
    "top_k": "TYPE_INT32",
    "top_p": "TYPE_FP32",
    "repetition_penalty": "TYPE_FP32",
    "seed": "TYPE_INT64",
    "stop": "TYPE_STRING",
    "ignore_eos": "TYPE_BOOL",
}
"""Optional inputs: the fields of GenerationOptions, and their types."""


class TritonPythonModel:
    """What Triton calls. Inputs and outputs are those of :func:`vkvx.runtime.serving.deploy.triton_config`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle on the instance's device."""
        import triton_python_backend_utils as utils

        from vkvx.runtime.sessions.session import Session

        self._utils = utils
        if args["model_instance_kind"] == "GPU":
            # An instance is a process, so the device is chosen before CUDA starts in it.
            os.environ["CUDA_VISIBLE_DEVICES"] = args["model_instance_device_id"]
        parameters = {
            name: entry["string_value"] for name, entry in json.loads(args["model_config"])["parameters"].items()
        }
        version = Path(args["model_repository"]) / args["model_version"]
        settings: dict[str, Any] = {
            name: int(parameters[name]) for name in ("slots", "visual_tokens", "text_tokens") if name in parameters
        }
        try:
            session = Session.load(version / parameters["bundle"], backend=parameters["backend"], **settings)
        except VkvxError as error:
            raise utils.TritonModelException(str(error)) from error
        self._session = session
        self._server = Server(session)

    def execute(self, requests: list[Any]) -> None:
        """Queue the requests; their answers are sent from threads of their own, as the steps bring them."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                answer = self._submit(request)
            except VkvxError as error:
                self._send_error(sender, error)
                continue
            stream = self._value(request, "stream")
            threading.Thread(
                target=self._send,
                args=(sender, request, answer, bool(stream) if stream is not None else False),
                daemon=True,
            ).start()

    def finalize(self) -> None:
        """End what still runs, and close the bundle."""
        self._server.close()
        self._session.close()

    def _submit(self, request: Any) -> Answer:
        options: dict[str, Any] = {}
        for name in OPTIONS:
            value = self._value(request, name, whole=name == "stop")
            if value is not None:
                options[name] = tuple(text.decode() for text in value) if name == "stop" else value
        prompt = self._value(request, "prompt")
        images = [_picture(data) for data in self._value(request, "images", whole=True) or []]
        raw = self._value(request, "raw_prompt")
        text = prompt.decode()
        if not raw:
            content = [{"type": "image"}] * len(images)
            text = self._session.format([{"role": "user", "content": [*content, {"type": "text", "text": text}]}])
        return self._server.submit(text, images, options=self._session.options(GenerationOptions(), options))

    def _value(self, request: Any, name: str, *, whole: bool = False) -> Any:
        """The first entry of an input as a Python object, or all of them; None if the request lacks it."""
        tensor = self._utils.get_input_tensor_by_name(request, name)
        if tensor is None:
            return None
        entries = tensor.as_numpy().ravel().tolist()
        return entries if whole else entries[0] if entries else None

    def _send(self, sender: Any, request: Any, answer: Answer, stream: bool) -> None:
        final = self._utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        tokens: list[int] = []
        try:
            for chunk in answer:
                if request.is_cancelled():
                    answer.cancel()
                done = chunk.generation
                tokens += chunk.token_ids
                if stream and done is None:
                    sender.send(self._response(chunk.text, "", chunk.token_ids))
                elif done is not None:
                    text, ids = (chunk.text, chunk.token_ids) if stream else (done.text, tokens)
                    sender.send(self._response(text, done.finish_reason, ids), flags=final)
        except VkvxError as error:
            self._send_error(sender, error)

    def _response(self, text: str, reason: str, token_ids: Any) -> Any:
        tensor = self._utils.Tensor
        return self._utils.InferenceResponse(
            output_tensors=[
                tensor("text", np.array([text.encode()], dtype=np.object_)),
                tensor("finish_reason", np.array([reason.encode()], dtype=np.object_)),
                tensor("token_ids", np.array(token_ids, np.int32)),
            ]
        )

    def _send_error(self, sender: Any, error: VkvxError) -> None:
        response = self._utils.InferenceResponse(error=self._utils.TritonError(str(error)))
        sender.send(response, flags=self._utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _picture(data: bytes) -> Any:
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
    except Exception as error:  # pillow raises many types for damaged files
        raise InputError(f"an entry of 'images' is no readable picture ({error}); send the bytes of a file") from error
    return picture
