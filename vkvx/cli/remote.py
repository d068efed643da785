"""A chat with a server of ``vkvx serve``, over HTTP."""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkvx.cli import terminal
from vkvx.errors import CapacityError, InputError, OptionError, VkvxError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vkvx.runtime.sessions.videos import Video

KEY = "VKVX_API_KEY"
"""Environment variable with the key of the server."""
TIMEOUT = 60.0
"""Seconds of silence after which a server counts as gone; it says that it lives more often than that."""
_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
"""Options that the interface calls otherwise."""
_OF_THE_SERVER = ("threads", "max_visual_tokens", "max_text_tokens", "prefill_chunk", "cut_after_pictures", "no_verify")


def connect(args: argparse.Namespace, given: Mapping[str, Any]) -> Remote:
    """A chat by the options of the command line. Raises OptionError for those that only the server could honour."""
    idle = [name for name in _OF_THE_SERVER if getattr(args, name)]
    idle += [name for name in ("backend", "provider") if getattr(args, name) != "auto"]
    idle += [name for name in ("no_checkpoint_defaults", "fps") if getattr(args, name)]
    if idle:
        raise OptionError(
            f"--{idle[0].replace('_', '-')} has no effect with --url; leave it out, or give it to the server"
        )
    key = os.environ.get(KEY) if args.api_key is None else args.api_key
    return Remote(args.url, key, {_NAMES.get(name, name): value for name, value in given.items()})


class Remote:
    """A conversation that a server continues: all of it goes with each message."""

    def __init__(self, url: str, key: str | None, options: Mapping[str, Any]) -> None:
        """Raises VkvxError if the server does not answer, or does not want the key."""
        if not url.startswith(("http://", "https://")):
            raise OptionError(f"--url {url} is no address; give one such as http://127.0.0.1:8000")
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"} | (
            {} if key is None else {"Authorization": f"Bearer {key}"}
        )
        self._options = dict(options)
        self._messages: list[dict[str, Any]] = []
        self._figures: list[str] = []
        with self._send("/v1/models") as response:
            self.name = str(json.load(response)["data"][0]["id"])

    def ask(self, text: str, pictures: list[Image], videos: list[Video]) -> Generator[str, None, None]:
        """Pieces of the answer; errors of the message come at once."""
        from vkvx.runtime.sessions.processor import user_message

        left = iter(pictures)
        content = [
            part if part["type"] == "text" else {"type": "image_url", "image_url": {"url": _data_uri(next(left))}}
            for part in user_message(text, len(pictures))["content"]
        ]
        asked = [*self._messages, {"role": "user", "content": content}]
        body = {
            "model": self.name,
            "messages": asked,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._options,
        }
        begun = time.perf_counter()
        return self._answer(asked, self._send("/v1/chat/completions", body), begun)

    def video(self, path: Path) -> str:
        """Servers take no videos."""
        raise InputError("a server takes no videos; give some of the frames as pictures")

    def reset(self) -> None:
        """Forget everything."""
        self._messages, self._figures = [], []

    def figures(self) -> list[str]:
        """What the server told of the last answer."""
        return self._figures or ["no answer yet"]

    @property
    def has_answered(self) -> bool:
        """Whether there is something to forget."""
        return bool(self._messages)

    def _answer(self, asked: list[dict[str, Any]], response: Any, begun: float) -> Generator[str, None, None]:
        said, first = "", 0.0
        try:
            with response:
                for event in _events(response):
                    for choice in event["choices"]:
                        piece = choice["delta"].get("content") or ""
                        first = first or (time.perf_counter() if piece else 0.0)
                        said += piece
                        yield piece
                    if event.get("usage"):
                        self._note(event["usage"], begun, first or time.perf_counter())
        finally:
            if said:
                self._messages = [*asked, {"role": "assistant", "content": said}]

    def _note(self, usage: Mapping[str, Any], begun: float, first: float) -> None:
        tokens, prompt = usage["completion_tokens"], usage["prompt_tokens_details"]
        seconds = time.perf_counter() - first
        speed = (tokens - 1) / seconds if seconds > 0 else 0.0
        size = terminal.human_bytes
        self._figures = [
            f"{tokens} tokens at {speed:.1f} tokens/s, {usage['prompt_tokens']} tokens of prompt, "
            f"{prompt['cached_tokens']} of them in the cache already, the first after {first - begun:.2f} s"
        ]
        if prompt["visual_tokens"]:
            taken, plain = prompt["visual_bytes"], prompt["sixteen_bit_visual_bytes"]
            self._figures.append(f"{prompt['visual_tokens']} visual tokens in {size(taken)}, {size(plain)} in 16 bits")

    def _send(self, path: str, body: Any = None) -> Any:
        """An answer to read from. Raises what the server refuses, as an error of the package."""
        data = None if body is None else json.dumps(body).encode()
        try:
            return urllib.request.urlopen(
                urllib.request.Request(self._url + path, data, self._headers), timeout=TIMEOUT
            )
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(error.read(), error.code) from None
        except (OSError, ValueError) as error:
            cause = getattr(error, "reason", None) or error
            reason = getattr(cause, "strerror", None) or cause
            raise VkvxError(f"no server at {self._url} ({reason}); start one with `vkvx serve BUNDLE`") from None


def _events(response: Any) -> Iterator[dict[str, Any]]:
    """The events of a stream. Raises VkvxError for one that is an error, and for a stream that breaks off."""
    try:
        for line in response:
            name, _, value = line.decode().rstrip("\r\n").partition(": ")
            if name != "data":
                continue
            if value == "[DONE]":
                return
            event = json.loads(value)
            if "error" in event:
                raise VkvxError(event["error"]["message"])
            yield event
    except (OSError, ValueError) as error:
        raise VkvxError(f"the answer broke off ({error}); ask again") from None
    raise VkvxError("the answer broke off; ask again")


def _refusal(body: bytes, status: int) -> VkvxError:
    try:
        error = json.loads(body)["error"]
        kind = (
            CapacityError if error["code"] == "context_length_exceeded" else InputError if status == 400 else VkvxError
        )
        return kind(error["message"])
    except (ValueError, KeyError, TypeError):
        return VkvxError(f"the server answers with status {status}, and not as `vkvx serve` does; look at --url")


def _data_uri(picture: Image) -> str:
    """A picture as it is, without loss."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
