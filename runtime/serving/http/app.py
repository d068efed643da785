"""The paths of the server, as an ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from vkvx.errors import BusyError, RequestCancelledError, VkvxError, describe
from vkvx.runtime.serving.answer import Answer
from vkvx.runtime.serving.http import openapi, page, schema
from vkvx.runtime.serving.http.answers import Reply
from vkvx.runtime.serving.http.errors import HEADERS, RequestError, explain
from vkvx.runtime.serving.http.metrics import Metrics
from vkvx.runtime.serving.http.pictures import PictureSources
from vkvx.runtime.serving.http.schema import ChatRequest, CompletionRequest
from vkvx.runtime.serving.server import MAX_WAITING, Server
from vkvx.runtime.sessions.processor import Prepared
from vkvx.runtime.sessions.sampling import GenerationOptions, default_options
from vkvx.runtime.sessions.session import Session

BODY_SECONDS, FIRST_SECONDS, BODY_RATE = 60.0, 10.0, 16 << 10
"""For a client to send its body: ``FIRST_SECONDS``, and then as long as it has sent so many bytes a second, up to
``BODY_SECONDS``. It holds a place in the queue meanwhile."""
_EVENT_STREAM = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Proxies pass on each event as it comes."""


@dataclass(frozen=True)
class Settings:
    """What an operator chooses. ``name`` None is the bundle's; ``deadline`` is in seconds.

    ``own_hosts_only`` refuses names of other hosts.
    """

    name: str | None = None
    api_key: str | None = None
    pictures: PictureSources = field(default_factory=PictureSources)
    max_body: int = 64 << 20
    max_waiting: int = MAX_WAITING
    deadline: float | None = None
    own_hosts_only: bool = False


class Service:
    """The state behind the paths: a session and a server, once they are open."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics(lambda: self._opened)
        self._opened: tuple[Session, Server] | None = None
        self._is_stopping = False
        self._preparing = 0
        self._created = int(time.time())

    def open(self, session: Session) -> None:
        """Serve a session, which stays the caller's to close, after :meth:`close`."""
        self._opened = session, Server(session, max_waiting=self.settings.max_waiting)

    def close(self) -> None:
        """End all answers."""
        self._is_stopping = True
        if self._opened is not None:
            self._opened[1].close()

    @cached_property
    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            self._route("/", self._page),
            self._route("/health", self._health),
            self._route("/metrics", self._metrics),
            self._route("/openapi.json", self._openapi),
            self._route("/v1/models", self._models),
            self._route("/v1/models/{name:path}", self._models),
            self._route("/v1/chat/completions", self._chat, "POST"),
            self._route("/v1/completions", self._complete, "POST"),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _no_path})

    def _route(self, path: str, endpoint: Callable[[Request], Awaitable[Response]], method: str = "GET") -> Route:
        """A path whose errors become responses, and whose responses are counted."""

        async def run(request: Request) -> Response:
            try:
                self._check_sender(request)
                response = await endpoint(request)
            except Exception as error:  # whatever it is, the client gets an answer
                response = _refusal(error)
            self.metrics.responses.labels(path, response.status_code).inc()
            return response

        return Route(path, run, methods=[method])

    def _check_sender(self, request: Request) -> None:
        """Raise RequestError for a wrong key, and for a page elsewhere whose host name was made to lead here."""
        if self.settings.own_hosts_only and not _is_own(request.headers.get("host", "")):
            raise RequestError(
                "this server answers to localhost and to IP addresses only", status=403, code="wrong_host"
            )
        key = self.settings.api_key
        if key is None or not request.url.path.startswith("/v1/"):
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(given.strip().encode(), key.encode()):
            raise RequestError(
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'", None, 401, "invalid_api_key"
            )

    def _ready(self) -> tuple[Session, Server]:
        if self._is_stopping:
            raise RequestError("the server is stopping", None, 503, "stopping")
        if self._opened is None:
            raise RequestError("the model is loading; try again later", None, 503, "loading")
        if (failure := self._opened[1].failure) is not None:
            raise RequestError(f"the server has failed ({describe(failure)}); start it again", None, 503, "failed")
        return self._opened

    def _model(self, session: Session) -> str:
        return self.settings.name or session.manifest.model.name

    async def _page(self, request: Request) -> Response:
        return page.response()

    async def _health(self, request: Request) -> Response:
        session, _ = self._ready()
        return JSONResponse({"status": "ok", "model": self._model(session)})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _openapi(self, request: Request) -> Response:
        name = self.settings.name if self._opened is None else self._model(self._opened[0])
        return JSONResponse(openapi.description(name))

    async def _models(self, request: Request) -> Response:
        session, _ = self._ready()
        name = self._model(session)
        model = {"id": name, "object": "model", "created": self._created, "owned_by": "vkvx"}
        wanted = request.path_params.get("name")
        if wanted is None:
            return JSONResponse({"object": "list", "data": [model]})
        self._check_model(wanted, name)
        return JSONResponse(model)

    def _check_model(self, wanted: str, name: str) -> None:
        if wanted != name:
            raise RequestError(f"there is no model '{wanted[:100]}'; this is '{name}'", "model", 404, "model_not_found")

    async def _chat(self, request: Request) -> Response:
        def prepare(body: ChatRequest, session: Session) -> list[Prepared]:
            messages, addresses = body.conversation()
            pictures = self.settings.pictures.load(addresses)
            limits = _options(body, session)[0].limits
            return [session.processor.prepare(session.format(messages), pictures, limits=limits, room=session.room)]

        return await self._generate(request, ChatRequest, prepare)

    async def _complete(self, request: Request) -> Response:
        def prepare(body: CompletionRequest, session: Session) -> list[Prepared]:
            return [session.processor.prepare(prompt) for prompt in body.prompt]

        return await self._generate(request, CompletionRequest, prepare)

    async def _generate(
        self,
        request: Request,
        kind: type[schema.Body],
        prepare: Callable[[schema.Body, Session], list[Prepared]],
    ) -> Response:
        arrived = time.perf_counter()
        session, server = self._ready()
        with self._place(server):
            body = schema.read(kind, await self._body(request))
            self._check_model(body.model, self._model(session))
            reply = await asyncio.to_thread(self._submit, body, prepare, session, server, arrived)
        if body.stream:
            return StreamingResponse(
                _while_there(request, reply), media_type="text/event-stream", headers=_EVENT_STREAM
            )
        watcher = asyncio.ensure_future(_watch(request, reply))
        try:
            return JSONResponse(await reply.whole())
        except VkvxError as error:
            return _refusal(error, is_logged=True)
        finally:
            watcher.cancel()

    @contextlib.contextmanager
    def _place(self, server: Server) -> Any:
        """Count a request that is not in the queue yet. Raises BusyError before anything of it is read."""
        if self._preparing + server.stats.waiting >= self.settings.max_waiting:
            raise BusyError(f"{self.settings.max_waiting} requests wait already; try again later")
        self._preparing += 1
        try:
            yield
        finally:
            self._preparing -= 1

    async def _body(self, request: Request) -> bytes:
        """The body. Raises RequestError for one that is no JSON by its type, too large or too slow."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # Pages of other sites may send any other type without being asked first.
            raise RequestError("the body must be JSON: send the header 'Content-Type: application/json'", None, 415)
        most = self.settings.max_body
        too_large = RequestError(
            f"the body has more than {most:,} bytes; send smaller pictures", None, 413, "too_large"
        )
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            raise too_large

        found, begun, blocks = bytearray(), time.monotonic(), aiter(request.stream())
        try:
            while True:
                end = begun + min(BODY_SECONDS, FIRST_SECONDS + len(found) / BODY_RATE)
                found += await asyncio.wait_for(anext(blocks), end - time.monotonic())
                if len(found) > most:
                    raise too_large
        except StopAsyncIteration:
            return bytes(found)
        except asyncio.TimeoutError:
            raise RequestError(
                f"the body comes too slowly: {len(found):,} bytes in {time.monotonic() - begun:.0f} s", None, 408
            ) from None
        except ClientDisconnect:
            raise RequestCancelledError("the client went away") from None

    def _submit(
        self,
        body: schema.Body,
        prepare: Callable[[schema.Body, Session], list[Prepared]],
        session: Session,
        server: Server,
        arrived: float,
    ) -> Reply:
        options = _options(body, session)
        prompts = prepare(body, session)
        wanted, most = len(prompts) * len(options), self.settings.max_waiting
        if wanted > most:
            raise RequestError(f"the request asks for {wanted} answers, of which {most} may wait here; ask for fewer")
        deadline = self.settings.deadline
        answers = list[Answer]()  # if one is refused, the others are dropped, and so cancelled
        for prompt in prompts:
            answers += server.submit_several(prompt, options=options, deadline=deadline, since=arrived)
        return Reply(
            self._model(session),
            isinstance(body, ChatRequest),
            sum(len(prompt.token_ids) for prompt in prompts),
            [length for prompt in prompts for length in prompt.picture_lengths],
            answers,
            len(options),
            session.processor,
            session.manifest.layout,
            self.metrics,
            arrived,
            wants_logprobs=body.wants_logprobs,
            includes_usage=body.includes_usage,
        )


def _refusal(error: Exception, *, is_logged: bool = False) -> Response:
    status, body = explain(error, is_logged=is_logged)
    return JSONResponse(body, status, HEADERS.get(status))


def _options(body: schema.Body, session: Session) -> list[GenerationOptions]:
    return body.options(default_options(session.manifest, body.limit))


def _is_own(host: str) -> bool:
    """Whether a Host header is localhost or an IP address."""
    name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name.lower() == "localhost"


async def _watch(request: Request, reply: Reply) -> None:
    """Cancel the answers once the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    reply.cancel()


async def _while_there(request: Request, reply: Reply) -> AsyncIterator[str]:
    watcher = asyncio.ensure_future(_watch(request, reply))
    try:
        async with contextlib.aclosing(reply.events()) as events:
            async for event in events:
                yield event
    finally:
        watcher.cancel()


async def _no_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: f"there is no path {request.url.path[:100]}", 405: f"{request.method} is not for this path"}
    status, body = explain(RequestError(words.get(error.status_code, error.detail), None, error.status_code))
    return JSONResponse(body, status, error.headers)
