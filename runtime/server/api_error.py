"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}} with an HTTP status.

A message of the 400s says what to change. What fails inside is a 500 that says no more than that: paths and traces are for the log.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from edgeq.errors import ContextOverflow, EdgeqError, QueueFull, TokenizerError, UnsupportedError, UsageError

logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 408: "timeout_error", 504: "timeout_error"}


class ApiError(Exception):
    """An answer other than success. code: for programs; param: the field of the request that is at fault."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, dict(headers or {})

    def to_json(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def queue_full(retry_after_s: int) -> ApiError:
    message = f"every slot is taken and the queue is full. Try again in {retry_after_s} s."
    return ApiError(429, message, code="queue_full", headers={"Retry-After": str(retry_after_s)})


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})


def took_too_long(timeout_s: float) -> ApiError:
    message = (
        f"no whole answer within {timeout_s:g} s, waiting included. Ask for fewer tokens, or start the server with a longer --timeout."
    )
    return ApiError(504, message, code="timeout")


def from_edgeq(err: EdgeqError, *, retry_after_s: int) -> ApiError:
    """What a failed call of the session or the batcher is to the one who asked."""
    match err:
        case QueueFull():
            return queue_full(retry_after_s)
        case ContextOverflow():
            return ApiError(400, str(err), code="context_length_exceeded")
        case UsageError() | TokenizerError() | UnsupportedError():
            return ApiError(400, str(err))
        case _:
            return failed(err)


def failed(err: BaseException) -> ApiError:
    """A fault of ours."""
    logger.error("a request failed: %s: %s", type(err).__name__, err, exc_info=err)
    return ApiError(500, "the server failed to answer; its log says why", code="internal_error")
