"""Documents that the API answers with, as plain values. `created` is a Unix time in seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgeq.runtime.answer import Completion

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The head of one answer: what all its documents repeat."""

    endpoint: Literal["chat", "completions"]
    id: str
    created: int
    model: str

    def whole(self, completion: Completion) -> dict[str, Any]:
        text, reason = completion.text, completion.finish_reason
        if self.endpoint == "chat":
            message = {"role": "assistant", "content": text, "refusal": None}
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
            kind = "chat.completion"
        else:
            choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
            kind = "text_completion"
        return {**self._head(kind), "choices": [choice], "usage": usage(completion)}

    def opening(self) -> dict[str, Any] | None:
        """The chunk before the first text: a chat names the role."""
        return self._chunk({"role": "assistant", "content": ""}, None) if self.endpoint == "chat" else None

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text}, None) if self.endpoint == "chat" else self._chunk({"text": text}, None)

    def ending(self, completion: Completion) -> dict[str, Any]:
        return self._chunk({} if self.endpoint == "chat" else {"text": ""}, completion.finish_reason)

    def closing_usage(self, completion: Completion) -> dict[str, Any]:
        """The last chunk of a stream that was asked for its usage."""
        return {**self._head(self._chunk_kind), "choices": [], "usage": usage(completion)}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.endpoint == "chat" else "text_completion"

    def _chunk(self, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        body = {"delta": content} if self.endpoint == "chat" else content
        return {**self._head(self._chunk_kind), "choices": [{"index": 0, **body, "logprobs": None, "finish_reason": reason}]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage(completion: Completion) -> dict[str, Any]:
    """Tokens: of the prompt, and those generated, without the one that ends a text."""
    timings, n_new = completion.timings, len(completion.tokens)
    return {
        "prompt_tokens": timings.prompt_tokens,
        "completion_tokens": n_new,
        "total_tokens": timings.prompt_tokens + n_new,
        "prompt_tokens_details": {"cached_tokens": timings.reused_tokens},
    }


def model_card(name: str, *, created: int, n_ctx: int, rate: float | None) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "edgeq", "meta": {"n_ctx": n_ctx, "rate": rate}}


def model_list(cards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": list(cards)}


def event(document: dict[str, Any]) -> bytes:
    """One server-sent event (https://html.spec.whatwg.org/multipage/server-sent-events.html): JSON has no line breaks of its own."""
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"
