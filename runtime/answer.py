"""One answer as it grows: tokens in, text out as soon as it is certain, until it ends."""

from __future__ import annotations

import codecs
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Literal

from edgeq.runtime.engine import Model

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Where the time of a generation went, in seconds.

    prompt_tokens: length of the prompt; reused_tokens: those of them that were in the cache already. prefill_s: computing the rest.
    ttft_s: from the call to the first token. decode_s: all tokens after the first.
    """

    prompt_tokens: int
    reused_tokens: int
    prefill_s: float
    ttft_s: float
    decode_s: float
    new_tokens: int

    @property
    def prefill_tok_s(self) -> float | None:
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_s if self.prefill_s else None

    @property
    def decode_tok_s(self) -> float | None:
        """Tokens after the first per second; None when there are none."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 and self.decode_s else None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "prefill_tok_s": self.prefill_tok_s, "decode_tok_s": self.decode_tok_s}


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a generation produced. tokens: every sampled id but an end-of-generation one; text: without the stop string.

    finish_reason: "stop" for an end-of-generation token, a stop token or a stop string, "length" when max_tokens or the context ran out,
    "cancelled" when someone ended it.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text, "tokens": list(self.tokens), "finish_reason": self.finish_reason, "timings": self.timings.to_json()}


class Answer:
    """Tokens and text so far. budget: most tokens it may have. finish_reason: None while it grows."""

    def __init__(self, model: Model, *, budget: int, stops: tuple[str, ...] = (), stop_tokens: Collection[int] = ()) -> None:
        self.model, self.budget, self.stop_tokens = model, budget, frozenset(stop_tokens)
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._parts: list[str] = []
        self._buffer = TextBuffer(stops)

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def take(self, token: int) -> str:
        """Text that is certain after this token, which may be the last one."""
        if self.model.is_eog(token) or token in self.stop_tokens:
            return self.end("stop")
        self.tokens.append(token)
        piece = self._said(self._buffer.push(self.model.token_to_piece(token)))
        if self._buffer.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.budget:
            piece += self.end("length")
        return piece

    def end(self, reason: FinishReason) -> str:
        """Take no more; what was held back is text now."""
        self.finish_reason = reason
        return self._said(self._buffer.flush())

    def _said(self, piece: str) -> str:
        if piece:
            self._parts.append(piece)
        return piece


class TextBuffer:
    """Bytes of tokens in, text out: whole characters only, and nothing that may yet turn out to belong to a stop string."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops, self.stopped = stops, False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, piece: bytes) -> str:
        """Text that is certain after this piece."""
        return self._release(self._decoder.decode(piece))

    def flush(self) -> str:
        """What is left at the end; bytes that never became a character are U+FFFD."""
        if self.stopped:
            return ""
        out = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = ("" if self.stopped else self._held), ""
        return out + rest

    def _release(self, text: str) -> str:
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = max((_overlap(self._held, stop) for stop in self.stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, less than the whole of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
