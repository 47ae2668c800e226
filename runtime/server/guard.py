"""What holds for every request before any endpoint sees it: the key, room for it, its size, and the time it takes to arrive.

Written as plain ASGI (https://asgi.readthedocs.io), so that streams pass through untouched and an endpoint can still hear its client leave.
A body that is too large is refused by its announced length, or while it arrives; some of the rest is read and dropped, because a client
that is still sending when the connection closes never sees the answer.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgeq.runtime.server.api_error import ApiError, queue_full, shutting_down
from edgeq.runtime.server.generation import Generations
from edgeq.runtime.server.metrics import Counter

OPEN_PATHS = frozenset({"/health"})  # answered without a key
_DROPPED_BYTES, _DROPPED_S = 32 << 20, 2.0  # of a refused body


@dataclass(frozen=True, kw_only=True)
class Limits:
    """api_key: None asks for none. max_request_bytes: of a body. arrival_s: for a body to arrive."""

    api_key: str | None
    max_request_bytes: int
    arrival_s: float


class RefusedBody(HTTPException):
    """An ApiError that passes through the reading of bodies, where other exceptions become a 400."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.status, error.message, error.headers)
        self.error = error


class Guard:
    """Middleware around the endpoints. requests: counts by path (of `paths`, else "other") and status."""

    def __init__(self, app: ASGIApp, *, limits: Limits, generations: Generations, requests: Counter, paths: Collection[str]) -> None:
        self._app, self._limits, self._generations = app, limits, generations
        self._requests, self._paths = requests, frozenset(paths)
        self._posts = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = "none"  # of a client that left before an answer

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        posts = scope["method"] == "POST"
        self._posts += posts
        try:
            self._check(scope)
            await self._app(scope, self._arriving(receive), send_and_note)
        except ApiError as err:
            await _drop(receive)
            await error_response(err)(scope, receive, send_and_note)
        finally:
            self._posts -= posts
            self._requests.add(path=self._label(scope["path"]), status=status)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        key = self._limits.api_key
        if key is not None and scope["path"] not in OPEN_PATHS and not _is_key(headers.get("authorization", ""), key):
            raise ApiError(
                401,
                "this server wants its API key, as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if scope["method"] != "POST":
            return
        if self._generations.draining:
            raise shutting_down()
        if self._posts > self._generations.max_open:
            raise queue_full(self._generations.retry_after_s())
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._limits.max_request_bytes:
            raise self._too_large()

    def _arriving(self, receive: Receive) -> Receive:
        """`receive` with the limits of a body."""
        n_bytes, deadline, complete = 0, asyncio.get_running_loop().time() + self._limits.arrival_s, False

        async def limited() -> Message:
            nonlocal n_bytes, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                late = ApiError(
                    408,
                    f"the body did not arrive within {self._limits.arrival_s:g} s",
                    code="request_timeout",
                    headers={"Connection": "close"},
                )
                raise RefusedBody(late) from None
            n_bytes += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if n_bytes > self._limits.max_request_bytes:
                await _drop(receive)
                raise RefusedBody(self._too_large())
            return message

        return limited

    def _too_large(self) -> ApiError:
        message = f"the body is larger than the {self._limits.max_request_bytes} bytes that this server takes"
        return ApiError(413, message, code="request_too_large")

    def _label(self, path: str) -> str:
        path = "/v1/models" if path.startswith("/v1/models/") else path
        return path if path in self._paths else "other"


def error_response(err: ApiError) -> JSONResponse:
    return JSONResponse(err.to_json(), err.status, headers=err.headers)


async def leaving(receive: Receive) -> None:
    """Ends when the client has gone. Only once the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _is_key(authorization: str, key: str) -> bool:
    """Whether a header holds the key; takes as long for a near miss as for a far one."""
    scheme, _, given = authorization.partition(" ")
    return hmac.compare_digest(given.strip().encode("utf-8", "replace"), key.encode()) and scheme.lower() == "bearer"


async def _drop(receive: Receive) -> None:
    """Read a body to its end, as far as that is little work."""
    n_bytes, more = 0, True
    try:
        async with asyncio.timeout(_DROPPED_S):
            while more and n_bytes < _DROPPED_BYTES:
                message = await receive()
                n_bytes += len(message.get("body", b""))
                more = message.get("more_body", False)
    except TimeoutError:
        return
