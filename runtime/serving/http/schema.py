"""Bodies of requests, as OpenAI's interface has them. What no session can do is refused, by the name of its field."""

from __future__ import annotations

import reprlib
import secrets
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError, core_schema

from vkvx.runtime.serving.http.errors import RequestError
from vkvx.runtime.sessions.sampling import GenerationOptions, changed_options

MAX_CHOICES = 16
"""Answers to one prompt."""
MAX_PROMPTS = 64
"""Prompts of one request for completions."""
MAX_MESSAGES, MAX_PARTS, MAX_STOPS, _MAX_FIELDS = 1024, 256, 64, 64
"""Of a conversation, of a message, of an answer, of an object: as objects they take far more memory than in a body, and
so do errors, of which there is one for each field."""


class _Only:
    """A field that is known but not supported: null and ``harmless`` values, which change nothing, are taken."""

    def __init__(self, *harmless: Any, help: str) -> None:
        self._harmless, self._help = harmless, help

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self._harmless], "description": f"Nothing else is supported: {self._help}"}

    def _check(self, value: Any) -> Any:
        # Python takes false for 0, JSON does not.
        same = (one for one in self._harmless if isinstance(one, bool) == isinstance(value, bool))
        if value is not None and value not in same:
            raise PydanticCustomError("unsupported", "is not supported: {help}", {"help": self._help})
        return value


def _list_of_text(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_Texts = str | list[str]


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class _Body(BaseModel):
    """No type stands for another, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _is_small(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MAX_FIELDS:
            raise PydanticCustomError(
                "fields", "has {count} fields, most of which are not known; leave them out", {"count": len(value)}
            )
        return value


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ImageUrl(_Body):
    url: str
    detail: Annotated[Any, _Only("auto", "high", help="give max_pixels in place of it")] = None


class ImagePart(_Body):
    type: Literal["image_url"]
    image_url: ImageUrl


def _kind_of_part(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"~{kind}"


_Part = Annotated[
    Annotated[TextPart, Tag("~text")] | Annotated[ImagePart, Tag("~image_url")],
    Discriminator(
        _kind_of_part,
        custom_error_type="part",
        custom_error_message='must be {"type": "text", "text": "..."} or {"type": "image_url", "image_url": {...}}',
    ),
]
_NoTools = Annotated[Any, _Only([], help="there are no tools")]


class Message(_Body):
    """One of a conversation. Answers of this server may be given back as they came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[_Part],
        FailFast(),
        Field(min_length=1, max_length=MAX_PARTS),
        BeforeValidator(_parts, json_schema_input_type=str | list[_Part]),
    ]
    refusal: Annotated[Any, _Only(help="answers have no refusals")] = None
    annotations: Annotated[Any, _Only([], help="answers have no annotations")] = None
    audio: Annotated[Any, _Only(help="there is no audio")] = None
    function_call: _NoTools = None
    tool_calls: _NoTools = None


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: Annotated[Any, _Only(False, help="leave it out")] = None


class GenerationRequest(_Body):
    """What both kinds of requests share. Sampling that is not given is as the bundle's checkpoint says."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[
        list[str] | None,
        Field(max_length=MAX_STOPS),
        BeforeValidator(_list_of_text, json_schema_input_type=_Texts | None),
    ] = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    ignore_eos: bool | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    presence_penalty: Annotated[Any, _Only(0, help="give repetition_penalty in place of it")] = None
    frequency_penalty: Annotated[Any, _Only(0, help="give repetition_penalty in place of it")] = None
    logit_bias: Annotated[Any, _Only({}, help="no token can be preferred")] = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    """These two are for the client's own records and change nothing."""

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities of the tokens chosen are wanted."""
        raise NotImplementedError

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer."""
        return self.max_tokens

    def options(self, base: GenerationOptions) -> list[GenerationOptions]:
        """Of each answer to a prompt. Raises OptionError and RequestError.

        Seeds follow one another; without a seed each request has another one. What has no effect on the likeliest
        token is dropped, since clients send it with each request.
        """
        names = {"max_new_tokens": self.limit, "min_new_tokens": self.min_tokens, "logprobs": self.wants_logprobs}
        plain = ("temperature", "top_p", "top_k", "repetition_penalty", "no_repeat_ngram_size")
        names |= {name: getattr(self, name) for name in (*plain, "ignore_eos", "min_pixels", "max_pixels")}
        given: dict[str, Any] = {name: value for name, value in names.items() if value is not None}
        if self.stop is not None:
            given["stop"] = tuple(self.stop)
        chosen = changed_options(GenerationOptions(**{**_fields(base), **given}), {})
        if chosen.temperature == 0:
            return [chosen] * self.choices
        first = secrets.randbits(63) if self.seed is None else self.seed
        return [changed_options(chosen, {"seed": (first + answer) % 2**64}) for answer in range(self.choices)]

    def check(self) -> None:
        """Raise RequestError for fields that do not go together."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options has no effect without stream; leave it out", "stream_options")
        most = GenerationOptions.max_new_tokens if self.limit is None else self.limit
        if self.min_tokens is not None and self.min_tokens > most:
            raise RequestError(
                f"min_tokens {self.min_tokens} is more than max_tokens, which is {most}; give limits in this order",
                "min_tokens",
            )


class ChatRequest(GenerationRequest):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Any, _Only(0, help="log-probabilities are those of the tokens chosen")] = None
    response_format: Annotated[Any, _Only({"type": "text"}, help="answers are text")] = None
    modalities: Annotated[Any, _Only(["text"], help="answers are text")] = None
    tools: _NoTools = None
    functions: _NoTools = None
    tool_choice: Annotated[Any, _Only("none", "auto", help="there are no tools")] = None
    parallel_tool_calls: Annotated[Any, _Only(True, False, help="there are no tools")] = None
    store: Annotated[Any, _Only(False, help="nothing is stored")] = None

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> None:
        super().check()
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise RequestError("max_tokens and max_completion_tokens differ; give one of them", "max_completion_tokens")

    def conversation(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Messages for :meth:`Session.format`, and the addresses of their pictures in order."""
        messages, addresses = [], []
        for message in self.messages:
            content = list[dict[str, str]]()
            for part in message.content:
                if isinstance(part, TextPart):
                    content.append({"type": "text", "text": part.text})
                else:
                    content.append({"type": "image"})
                    addresses.append(part.image_url.url)
            role = "system" if message.role == "developer" else message.role
            messages.append({"role": role, "content": content})
        return messages, addresses


class CompletionRequest(GenerationRequest):
    """Body of /v1/completions: prompts as they are, in which special tokens count."""

    prompt: Annotated[
        list[str],
        FailFast(),
        Field(min_length=1, max_length=MAX_PROMPTS),
        BeforeValidator(_list_of_text, json_schema_input_type=_Texts),
    ]
    logprobs: Annotated[Any, _Only(0, help="give 0 for those of the tokens chosen")] = None
    echo: Annotated[Any, _Only(False, help="the answer comes without the prompt")] = None
    best_of: Annotated[Any, _Only(1, help="give n for several answers")] = None
    suffix: Annotated[Any, _Only(help="text is only continued")] = None

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None


Body = TypeVar("Body", bound=GenerationRequest)


def read(kind: type[Body], body: bytes) -> Body:
    """The body of a request. Raises RequestError that names the first field that is wrong."""
    try:
        found = kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0]) from None
    found.check()
    return found


def _refusal(error: ErrorDetails) -> RequestError:
    path = ""
    for part in error["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("~"):  # the name of a case of a union
            path += f".{part}" if path else part
    kind, words = error["type"], error["msg"]
    if kind == "json_invalid":
        return RequestError(f"the body is no JSON: {error['ctx']['error']}", None)
    if not path and kind == "fields":
        return RequestError(f"the body {words}", None)
    if not path:
        return RequestError("the body must be a JSON object", None)
    if kind == "missing":
        words = "is missing"
    elif kind == "extra_forbidden":
        words = "is not known here; leave it out"
    elif words.startswith("Input should"):
        words = f"{words.replace('Input should', 'must', 1)}, got {reprlib.repr(error['input'])}"
    elif kind not in ("unsupported", "part", "fields"):
        words = f"is wrong: {words}"
    return RequestError(f"{path} {words}", path)


def _fields(options: GenerationOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in options.__dataclass_fields__}
