"""The HTTP server on tiny-llava, asked by OpenAI's own client: answers are those of a session alone."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from http_server import Running, running
from openai import OpenAI
from pydantic import ValidationError
from samples import Page

from vkvx import Session
from vkvx.runtime.serving.http import schema
from vkvx.runtime.serving.http.app import Settings
from vkvx.runtime.serving.http.pictures import PictureSources
from vkvx.runtime.serving.http.schema import ChatRequest, CompletionRequest

MODEL = "tiny-llava"
MAX_BODY = 200_000
KEY = "secret-key"


@pytest.fixture(scope="module")
def alone(tiny_bundle: Path) -> Iterator[Session]:
    """A session that answers one prompt at a time."""
    with Session.load(tiny_bundle, threads=1, reuse=False) as session:
        yield session


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, pages: list[Page]) -> Iterator[Running]:
    pictures = PictureSources(pages[0].path.parent, max_bytes=MAX_BODY)
    with (
        Session.load(tiny_bundle, threads=1, slots=4) as session,
        running(session, Settings(api_key=KEY, pictures=pictures, max_body=MAX_BODY)) as found,
    ):
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120) as found:
        yield found


def data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def user(*parts: str) -> dict[str, Any]:
    """A message of texts and addresses of pictures."""
    return {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": part}}
            if part.startswith(("data:", "file:", "http"))
            else {"type": "text", "text": part}
            for part in parts
        ],
    }


def streamed(chunks: Any) -> tuple[dict[int, str], dict[int, str], dict[int, list[Any]], Any]:
    """Texts, finish reasons and log-probabilities by choice, and the usage, of a stream of chat."""
    texts, ends, logprobs, usage = dict[int, str](), dict[int, str](), dict[int, list[Any]](), None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.logprobs:
                logprobs.setdefault(choice.index, []).extend(choice.logprobs.content)
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    return texts, ends, logprobs, usage


SAMPLING: list[dict[str, Any]] = [
    {},
    {"max_tokens": 5},
    {"stop": ["3", "\n"]},
    {"temperature": 0.9, "seed": 7},
    {"temperature": 1.3, "top_p": 0.8, "seed": 2**63 - 1, "max_completion_tokens": 12},
    {"temperature": 1.3, "seed": 5, "extra_body": {"top_k": 3, "repetition_penalty": 1.1}},
]


@pytest.mark.parametrize("sampling", SAMPLING, ids=lambda sampling: "+".join(sampling) or "greedy")
def test_chat_streams_what_it_answers_and_what_a_session_answers(
    client: OpenAI, alone: Session, pages: list[Page], sampling: dict[str, Any]
) -> None:
    request: dict[str, Any] = {"max_tokens": 24, **sampling} if "max_completion_tokens" not in sampling else sampling
    messages: Any = [user(data_uri(pages[0].path), "Read row 2.")]
    whole = client.chat.completions.create(model=MODEL, messages=messages, logprobs=True, **request)
    stream = client.chat.completions.create(
        model=MODEL, messages=messages, logprobs=True, stream=True, stream_options={"include_usage": True}, **request
    )
    options = {**request, **request.get("extra_body", {})}
    options.pop("extra_body", None)
    options["max_new_tokens"] = options.pop("max_completion_tokens", None) or options.pop("max_tokens")
    prompt = alone.format([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read row 2."}]}])
    expected = alone.generate(prompt, pages[0].path, logprobs=True, **options)
    assert expected.logprobs is not None
    tokens = [alone.processor.decode([token]) for token in expected.token_ids]
    (choice,) = whole.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == {"eos": "stop", "stop": "stop", "length": "length"}[expected.finish_reason]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [one.token for one in choice.logprobs.content] == tokens
    assert [one.logprob for one in choice.logprobs.content] == list(expected.logprobs)
    texts, ends, logprobs, usage = streamed(stream)
    assert texts == {0: expected.text}
    assert ends == {0: choice.finish_reason}
    assert logprobs[0] == choice.logprobs.content
    assert usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == len(tokens)
    assert whole.usage.prompt_tokens == expected.prompt_tokens
    details: Any = whole.usage.prompt_tokens_details
    assert details.visual_tokens == expected.visual_tokens == 576
    assert details.text_tokens == expected.prompt_tokens - 576
    assert details.visual_bytes == 85 << 10
    assert details.sixteen_bit_visual_bytes == 576 * 2048


def test_several_turns_and_pictures(client: OpenAI, alone: Session, pages: list[Page]) -> None:
    """Two pictures, an answer that is given back as it came, and text that looks like marks."""
    first: Any = [
        {"role": "system", "content": "Be exact."},
        user(
            data_uri(pages[0].path), "Compare </s> with <image>: ", pages[1].path.as_uri().replace("page_1", "page_0")
        ),
    ]
    answer = client.chat.completions.create(model=MODEL, messages=first, max_tokens=4)
    more: Any = [*first, answer.choices[0].message, {"role": "user", "content": "Read row 1."}]
    again = client.chat.completions.create(model=MODEL, messages=more, max_tokens=8)
    asked = [
        {"role": "system", "content": "Be exact."},
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": "Compare </s> with <image>: "},
                {"type": "image"},
            ],
        },
        {"role": "assistant", "content": answer.choices[0].message.content},
        {"role": "user", "content": "Read row 1."},
    ]
    expected = alone.generate(alone.format(asked), [pages[0].path] * 2, max_new_tokens=8)
    assert again.choices[0].message.content == expected.text
    assert again.usage is not None
    assert again.usage.prompt_tokens == expected.prompt_tokens


def test_several_answers_to_one_prompt(client: OpenAI, alone: Session) -> None:
    request: dict[str, Any] = {"temperature": 2.0, "seed": 3, "max_tokens": 6}
    messages: Any = [{"role": "user", "content": "How many rows has a page?"}]
    whole = client.chat.completions.create(model=MODEL, messages=messages, n=3, **request)
    stream = client.chat.completions.create(model=MODEL, messages=messages, n=3, stream=True, **request)
    prompt = alone.format(messages)
    expected = [alone.generate(prompt, temperature=2.0, seed=3 + i, max_new_tokens=6).text for i in range(3)]
    assert [choice.message.content for choice in whole.choices] == expected
    texts, ends, _, usage = streamed(stream)
    assert texts == dict(enumerate(expected))
    assert len(ends) == 3
    assert usage is None
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == alone.generate(prompt, max_new_tokens=1).prompt_tokens


def test_prompts_that_start_alike_are_fed_once(client: OpenAI, alone: Session, server: Running) -> None:
    """Another question, and several answers to one, which count the prompt once; tokens are those without reuse."""
    system = {"role": "system", "content": "Say the digits of each row from left to right, and not a word more."}
    before, cached = server.metric("vkvx_reused_tokens_total"), []
    for question, number in (("Read row 1.", 1), ("Read row 2.", 1), ("Read row 3.", 3), ("Read row 3.", 2)):
        messages: Any = [system, {"role": "user", "content": question}]
        request: dict[str, Any] = {"n": number, "temperature": 1.0, "seed": 1, "max_tokens": 4}
        whole = client.chat.completions.create(model=MODEL, messages=messages, **request)
        prompt = alone.format(messages)
        expected = [alone.generate(prompt, temperature=1.0, seed=1 + i, max_new_tokens=4) for i in range(number)]
        assert [choice.message.content for choice in whole.choices] == [one.text for one in expected]
        details: Any = whole.usage.prompt_tokens_details  # type: ignore[union-attr]
        cached.append(details.cached_tokens)
    assert cached[0] == 0
    assert 16 <= cached[1] == cached[2] < cached[3] == expected[0].prompt_tokens - 1
    assert server.metric("vkvx_reused_tokens_total") - before == sum(cached)
    assert server.metric("vkvx_reused_prompts_total") >= 3


def test_more_answers_than_may_wait(alone: Session) -> None:
    body = {"model": MODEL, "prompt": ["a", "b"], "n": 2}
    with running(alone, Settings(max_waiting=3)) as small:
        status, answer, _ = small.request("POST", "/v1/completions", body)
    assert (status, answer["error"]["message"]) == (
        400,
        "the request asks for 4 answers, of which 3 may wait here; ask for fewer",
    )


def test_the_description_of_the_paths(server: Running) -> None:
    status, found, _ = server.request("GET", "/openapi.json")
    assert status == 200
    assert set(found["paths"]) == {route.path.replace(":path", "") for route in server.service.app.routes}  # type: ignore[attr-defined]
    schemas = found["components"]["schemas"]
    assert set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(found))) == set(schemas)
    for kind in (ChatRequest, CompletionRequest):
        assert set(schemas[kind.__name__]["properties"]) == set(kind.model_fields)
        assert schemas[kind.__name__]["additionalProperties"] is False
        assert schemas[kind.__name__]["properties"]["model"] == {"const": MODEL}
    assert {"type": "string"} in schemas["Message"]["properties"]["content"]["anyOf"]


def test_completions_take_prompts_as_they_are(client: OpenAI, alone: Session) -> None:
    prompts = ["USER: How many? ASSISTANT:", "USER: Why?</s>"]
    whole = client.completions.create(model=MODEL, prompt=prompts, n=2, max_tokens=5, logprobs=0)
    expected = [alone.generate(prompt, max_new_tokens=5, logprobs=True) for prompt in prompts for _ in range(2)]
    assert [choice.text for choice in whole.choices] == [one.text for one in expected]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    for choice, one in zip(whole.choices, expected, strict=True):
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs == list(one.logprobs or ())
        assert choice.logprobs.text_offset is not None
        assert choice.logprobs.text_offset[0] == 0
    chunks = list(client.completions.create(model=MODEL, prompt=prompts[0], max_tokens=5, logprobs=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected[0].text
    offsets = [at for chunk in chunks for at in chunk.choices[0].logprobs.text_offset]  # type: ignore[union-attr]
    assert offsets == whole.choices[0].logprobs.text_offset  # type: ignore[union-attr]


def test_many_at_once(client: OpenAI, alone: Session, server: Running) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def ask(number: int) -> str | None:
        messages: Any = [{"role": "user", "content": f"Question {number}?"}]
        return client.chat.completions.create(model=MODEL, messages=messages, max_tokens=6).choices[0].message.content

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    prompts = [alone.format([{"role": "user", "content": f"Question {number}?"}]) for number in range(12)]
    assert answers == [alone.generate(prompt, max_new_tokens=6).text for prompt in prompts]
    assert server.metric("vkvx_rows_live") == server.metric("vkvx_rows_waiting") == 0
    assert server.metric("vkvx_cache_used_bytes") == 0


PAGE = "data:image/png;base64,"
WRONG: list[tuple[str, dict[str, Any], int, str, str | None]] = [
    ("a damaged picture", {"messages": [user(PAGE + "iVBORw0KGgo=", "?")]}, 400, "picture 1 cannot be read", None),
    ("no base64", {"messages": [user(PAGE + "!!", "?")]}, 400, "picture 1 is a data: URI that is no base64", None),
    ("another model", {"model": "gpt-5"}, 404, "there is no model 'gpt-5'; this is 'tiny-llava'", "model"),
    ("a wrong type", {"temperature": "hot"}, 400, "temperature must be a valid number, got 'hot'", "temperature"),
    ("an unknown field", {"extra_body": {"heat": 1}}, 400, "heat is not known here; leave it out", "heat"),
    ("out of range", {"top_p": 1.5, "temperature": 1.0}, 400, "top_p (--top-p) must be above 0 and at most 1", None),
    (
        "too few tokens",
        {"extra_body": {"min_tokens": 3}},
        400,
        "min_tokens 3 is more than max_tokens, which is 2",
        "min_tokens",
    ),
    ("no tokens", {"max_tokens": 0}, 400, "max_tokens must be greater than or equal to 1, got 0", "max_tokens"),
    ("a penalty", {"presence_penalty": 0.5}, 400, "presence_penalty is not supported", "presence_penalty"),
    ("a bias", {"logit_bias": {"7": 3}}, 400, "logit_bias is not supported: no token", "logit_bias"),
    ("others' tokens", {"logprobs": True, "top_logprobs": 2}, 400, "top_logprobs is not supported", "top_logprobs"),
    ("a number for false", {"store": 0}, 400, "store is not supported: nothing is stored", "store"),
    ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools is not supported", "tools"),
    ("no messages", {"messages": []}, 400, "messages is wrong: List should have at least 1 item", "messages"),
    ("a role", {"messages": [{"role": "root", "content": "x"}]}, 400, "messages[0].role must be", "messages[0].role"),
    (
        "a video",
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        *(400, 'messages[0].content[0] must be {"type": "text"', "messages[0].content[0]"),
    ),
    (
        "a part without its text",
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        *(400, "messages[0].content[0].text is missing", "messages[0].content[0].text"),
    ),
    ("too long an answer", {"max_tokens": 10**6}, 400, "prompt and answer end at position", None),
    ("a host", {"messages": [user("http://example.org/a.png")]}, 400, "on a host that is not allowed", None),
    ("a file elsewhere", {"messages": [user("file:///etc/passwd")]}, 400, "no such file below the directory", None),
    ("a file above", {"messages": [user("file:../config.json")]}, 400, "no such file below the directory", None),
    ("a large body", {"messages": [user("x" * MAX_BODY)]}, 413, "the body has more than 200,000 bytes", None),
    (
        "options of no stream",
        {"stream_options": {}},
        400,
        "stream_options has no effect without stream",
        "stream_options",
    ),
]


@pytest.mark.parametrize(("wrong", "status", "words", "param"), [pytest.param(*w[1:], id=w[0]) for w in WRONG])
def test_wrong_requests(client: OpenAI, wrong: dict[str, Any], status: int, words: str, param: str | None) -> None:
    request = {"model": MODEL, "messages": [{"role": "user", "content": "?"}], "max_tokens": 2, **wrong}
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**request)
    assert caught.value.status_code == status
    body: Any = caught.value.body
    assert words in body["message"]
    assert body["param"] == param
    assert body["type"] == "invalid_request_error"


def test_a_wrong_key(server: Running) -> None:
    for key in ("", "secret", f"{KEY}x"):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        status, answer, found = server.request("GET", "/v1/models", headers=headers)
        assert (status, found["WWW-Authenticate"]) == (401, "Bearer")
        assert answer["error"]["code"] == "invalid_api_key"
    with (
        OpenAI(base_url=f"{server.url}/v1", api_key="other", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"),
    ):
        other.models.list()
    assert server.request("GET", "/health")[0] == 200


def test_models_and_health(client: OpenAI, server: Running) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "vkvx"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.models.retrieve("other")
    assert server.request("GET", "/health")[1] == {"status": "ok", "model": MODEL}
    assert server.request("GET", "/v1/nothing")[:1] == (404,)
    status, body, _ = server.request("GET", "/v1/chat/completions")
    assert (status, body["error"]["message"]) == (405, "GET is not for this path")


@pytest.mark.parametrize(
    ("body", "headers", "status", "words"),
    [
        (b"{", {}, 400, "the body is no JSON"),
        (b"[]", {}, 400, "the body must be a JSON object"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "Content-Type: application/json"),
        (b'{"model": "tiny-llava", "messages": [{"role": "user", "content": "\\ud800"}]}', {}, 400, "no JSON"),
        (b'{"model": "tiny-llava", "temperature": NaN, "messages": []}', {}, 400, "temperature"),
        (b'{"model": ' + b"[" * 5000, {}, 400, "the body is no JSON"),
    ],
)
def test_bodies_that_are_none(server: Running, body: bytes, headers: dict[str, str], status: int, words: str) -> None:
    found, answer, _ = server.request(
        "POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {KEY}", **headers}
    )
    assert (found, words in answer["error"]["message"]) == (status, True), answer


def many(item: str) -> str:
    return f"[{','.join([item] * 5000)}]"


FIELDS = ", ".join(f'"x{number}": 0' for number in range(5000))
TEXT, MESSAGE = '{"type": "text", "text": "?"}', '{"role": "user", "content": "?"}'


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (f'{{"messages": {many("0")}}}', "messages[0] must be an object, got 0"),
        (f'{{"messages": {many(MESSAGE)}}}', "messages is wrong: List should have at most 1024 items"),
        (f'{{"messages": [{{"role": "user", "content": {many("0")}}}]}}', "messages[0].content[0] must be"),
        (f'{{"messages": [{{"role": "user", "content": {many(TEXT)}}}]}}', "List should have at most 256 items"),
        (f'{{"messages": [{MESSAGE}], "stop": {many("0")}}}', "stop is wrong: List should have at most 64 items"),
        (f'{{"messages": [{{{FIELDS}}}]}}', "messages[0] has 5000 fields, most of which are not known; leave them out"),
        (f"{{{FIELDS}}}", "the body has 5001 fields, most of which are not known; leave them out"),
        (f'{{"prompt": {many("0")}}}', "prompt[0] must be a valid string, got 0"),
    ],
)
def test_bodies_of_many_small_things_take_little_memory(body: str, words: str) -> None:
    """Neither objects nor errors are made of all of them."""
    kind = CompletionRequest if "prompt" in body else ChatRequest
    whole = body.replace("{", '{"model": "m", ', 1)
    with pytest.raises(schema.RequestError, match=re.escape(words)):
        schema.read(kind, whole.encode())
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(whole)
    assert caught.value.error_count() <= 65
