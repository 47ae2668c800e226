"""The endpoints: a request in, checked; a generation started; its text out, whole or as server-sent events."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import psutil
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from edgeq import __version__
from edgeq.errors import EdgeqError
from edgeq.runtime.server import metrics
from edgeq.runtime.server.api_error import ApiError, failed, from_edgeq
from edgeq.runtime.server.generation import Generation, Generations, unless_gone
from edgeq.runtime.server.guard import Guard, Limits, RefusedBody, error_response, leaving
from edgeq.runtime.server.replies import DONE, Reply, event, model_card, model_list
from edgeq.runtime.server.schemas import ChatRequest, CompletionRequest, refusal

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/openapi.json")
_GONE = 499  # as nginx logs a client that left; nobody receives it


@dataclass(frozen=True, kw_only=True)
class About:
    """What the server says of its model. started: Unix time in seconds."""

    n_ctx: int
    rate: float | None
    runtime: str
    started: int


def build_app(generations: Generations, limits: Limits, about: About) -> FastAPI:
    """The application over running generations, for any ASGI server."""
    app = FastAPI(title="edgeq", version=__version__, docs_url=None, redoc_url=None)  # those pages load scripts from elsewhere
    requests = metrics.Counter("edgeq_http_requests_total", "Answered requests by path and status.")
    app.add_middleware(Guard, limits=limits, generations=generations, requests=requests, paths=PATHS)
    _add_error_handlers(app)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        conversation = body.conversation()
        return await answer("chat", body, request, lambda: generations.render(conversation))

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await answer("completions", body, request, body.text_or_ids())

    async def answer(endpoint: Any, body: ChatRequest | CompletionRequest, request: Request, prompt: Any) -> Response:
        head = "chatcmpl" if endpoint == "chat" else "cmpl"
        reply = Reply(endpoint=endpoint, id=f"{head}-{secrets.token_hex(12)}", created=int(time.time()), model=body.model)

        async def whole() -> Response:
            generation = await generations.start(body.model, prompt, body.options())
            try:
                return JSONResponse(reply.whole(await generation.result()))
            finally:
                generation.cancel()

        async def begun() -> Response:
            """Answered when the first text is there: until then a failure still has a status of its own."""
            generation = await generations.start(body.model, prompt, body.options())
            pieces = aiter(generation)
            try:
                first = await anext(pieces, None)
            except BaseException:
                generation.cancel()
                raise
            return EventStream(generation, events(reply, generation, first, pieces, include_usage=body.include_usage))

        work = begun() if body.stream else whole()
        return await unless_gone(work, leaving(request.receive)) or Response(status_code=_GONE)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return model_list([card(name) for name in generations.models])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        generations.check_model(name)
        return card(name)

    def card(name: str) -> dict[str, Any]:
        return model_card(name, created=about.started, n_ctx=about.n_ctx, rate=about.rate)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "draining"}, 503) if generations.draining else JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        stats = generations.engine.stats
        rss = psutil.Process().memory_info().rss
        facts = {"version": __version__, "model": next(iter(generations.models)), "runtime": about.runtime}
        lines = [
            *metrics.single("edgeq_info", "gauge", "What is served.", 1, facts),
            *requests.lines(),
            *generations.ended.lines(),
            *generations.tokens.lines(),
            *metrics.single("edgeq_generations_active", "gauge", "Generations that have a slot.", stats.active),
            *metrics.single("edgeq_generations_queued", "gauge", "Generations that wait for a slot.", stats.queued),
            *generations.seconds.lines(),
            *generations.ttft.lines(),
            *metrics.single("process_resident_memory_bytes", "gauge", "Resident memory of the server.", rss),
        ]
        return Response("\n".join(lines) + "\n", media_type=metrics.CONTENT_TYPE)

    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, err: ApiError) -> Response:
        return error_response(err)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, err: RequestValidationError) -> Response:
        return error_response(refusal(err.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, err: HTTPException) -> Response:
        if isinstance(err, RefusedBody):
            return error_response(err.error)
        hint = f". Endpoints: {', '.join(PATHS)}" if err.status_code in (404, 405) else ""
        return error_response(ApiError(err.status_code, f"{err.detail}{hint}", headers=err.headers))

    @app.exception_handler(EdgeqError)
    async def edgeq(request: Request, err: EdgeqError) -> Response:
        return error_response(from_edgeq(err, retry_after_s=1))

    @app.exception_handler(Exception)
    async def broken(request: Request, err: Exception) -> Response:
        return error_response(failed(err))


class EventStream(StreamingResponse):
    """Server-sent events of a generation, which ends with them, also when they end early or never begin."""

    def __init__(self, generation: Generation, content: AsyncIterator[bytes]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()


async def events(
    reply: Reply, generation: Generation, first: str | None, pieces: AsyncIterator[str], *, include_usage: bool
) -> AsyncIterator[bytes]:
    """All events of a stream. first: the first piece of text, None when there is none. An error on the way is the last event."""
    extra = {"usage": None} if include_usage else {}  # as the API has it in every chunk of such a stream

    def chunk(document: dict[str, Any]) -> bytes:
        return event({**document, **extra})

    opening = reply.opening()
    if opening is not None:
        yield chunk(opening)
    try:
        if first is not None:
            yield chunk(reply.piece(first))
            async for piece in pieces:
                yield chunk(reply.piece(piece))
    except ApiError as err:
        yield event(err.to_json())
        return
    completion = generation.completion
    assert completion is not None
    yield chunk(reply.ending(completion))
    if include_usage:
        yield event(reply.closing_usage(completion))
    yield DONE
