"""A loaded package on a device: generate, chat, score, report memory.

    with load("build/demo") as session:
        for piece in session.stream("The capital of France is", max_tokens=16):
            print(piece, end="")

The cache of keys and values survives between calls: a prompt that starts like the text before it pays only for what is new.
A session serves one call at a time: another thread waits for its turn, and the thread of an unfinished stream is told to finish it.
"""

from __future__ import annotations

import codecs
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgeq.errors import RuntimeFailure, TokenizerError, UsageError
from edgeq.package import Package, resolve_artifact
from edgeq.runtime.device import parse_device
from edgeq.runtime.llama import ALL_LAYERS, LlamaContext, LlamaModel
from edgeq.runtime.memory import Memory, kv_bytes, process_memory
from edgeq.runtime.sampling import Sampler, Sampling

MAX_DEFAULT_N_CTX = 4096
_SCORE_ROWS = 64  # logits rows a session asks for at once: llama.cpp reserves memory for that many

FinishReason = Literal["stop", "length"]
Messages = Sequence[Mapping[str, Any]]


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

    finish_reason: "stop" for an end-of-generation token or a stop string, "length" when max_tokens or the context ran out.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text, "tokens": list(self.tokens), "finish_reason": self.finish_reason, "timings": self.timings.to_json()}


class Stream(Iterator[str]):
    """Text pieces of a running generation. `completion` is None until the last piece has been taken. Closing it early frees the session."""

    def __init__(self, pieces: Generator[str, None, Completion]) -> None:
        self._pieces = pieces
        self.completion: Completion | None = None

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            if end.value is not None:
                self.completion = end.value
            raise StopIteration from None

    def close(self) -> None:
        self._pieces.close()


def load(
    path: Path | str, *, n_ctx: int | None = None, threads: int | None = None, kv_type: str | None = None, device: str = "cpu"
) -> Session:
    """Load a package folder or a GGUF file for generation.

    n_ctx: tokens of context; by default what the package was planned for, else the model's own up to 4096. kv_type: of the cache; by
    default what the package was planned for, else f16. threads: by default every core this process may use. device: "cpu", "cuda" or
    "cuda:N".
    Raises PackageError, SourceError, UnsupportedError, RuntimeFailure or MissingDependency.
    """
    artifact, package = resolve_artifact(Path(path))
    gpu = parse_device(device)
    model = LlamaModel.load(artifact, gpu_layers=0 if gpu is None else ALL_LAYERS, main_gpu=gpu or 0)
    try:
        return Session(model, n_ctx=n_ctx or default_n_ctx(model, package), threads=threads, kv_type=kv_type or default_kv_type(package))
    except BaseException:
        model.close()
        raise


def default_n_ctx(model: LlamaModel, package: Package | None) -> int:
    """The context a package was planned for, else the model's own up to MAX_DEFAULT_N_CTX tokens."""
    planned = package.manifest["export"].get("n_ctx") if package is not None else None
    return planned or min(model.n_ctx_train, MAX_DEFAULT_N_CTX)


def default_kv_type(package: Package | None) -> str:
    """The type of cache a package was planned for, else f16."""
    return (package.manifest["export"].get("kv_type") if package is not None else None) or "f16"


class Session:
    """A model with a context. Made by `load`; owns the model and closes it."""

    def __init__(self, model: LlamaModel, *, n_ctx: int, threads: int | None = None, kv_type: str = "f16") -> None:
        self.model = model
        self.context = LlamaContext(model, n_ctx=n_ctx, threads=threads, kv_type=kv_type, max_outputs=_SCORE_ROWS)
        self.last: Completion | None = None
        self._cached: list[int] = []
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._stream: Callable[[], Stream | None] = lambda: None  # the last stream, while someone still holds it
        self._closed = False

    @property
    def n_ctx(self) -> int:
        return self.context.n_ctx

    def close(self) -> None:
        """Free model and context, ending this thread's unfinished stream. Closing twice is fine."""
        if self._closed:
            return
        stream = self._stream()
        if stream is not None and self._holder == threading.get_ident():
            stream.close()
        with self._turn():
            self._closed = True
            self.model.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Stream:
        """Continue a prompt, piece by piece. Pieces are whole characters; joined they are `completion.text`.

        prompt: text (with the BOS the model wants; it may spell special tokens) or token ids. max_tokens: None goes on until the
        model ends or the context is full. temperature 0 takes the likeliest token; top_k, top_p, min_p and seed shape a draw.
        stop: strings that end the text and are left out of it. Raises UsageError at once for bad arguments and for a prompt that,
        with max_tokens, does not fit the context.
        """
        self._check_open()
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(stops):
            raise UsageError("a stop string is empty; leave it out")
        if max_tokens is not None and max_tokens < 1:
            raise UsageError(f"max_tokens is {max_tokens}; expected at least 1")
        ids = self._prompt_ids(prompt)
        self._check_room(len(ids), max_tokens)
        stream = Stream(self._generate(ids, max_tokens, sampling, stops))
        self._stream = weakref.ref(stream)
        return stream

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Completion:
        """Continue a prompt and return the whole result. Arguments and errors as for `stream`."""
        stream = self.stream(
            prompt, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, stop=stop
        )
        for _ in stream:
            pass
        assert stream.completion is not None
        return stream.completion

    def chat(self, messages: str | Messages, **options: Any) -> Completion:
        """Answer a conversation (or one user message) through the model's chat template. Options as for `generate`."""
        return self.generate(self.chat_prompt(messages), **options)

    def chat_prompt(self, messages: str | Messages) -> list[int]:
        """Token ids of a conversation up to where the assistant's answer begins, as the model's own template has it."""
        self._check_open()
        return self.model.tokenize(self.render_chat(messages), parse_special=True)

    def render_chat(self, messages: str | Messages) -> str:
        """A conversation in the model's own template. Raises TokenizerError when the model has none or it does not take these messages."""
        from edgeq.chat import render

        self._check_open()
        template = self.model.chat_template()
        if template is None:
            raise TokenizerError(f"{self.model.path}: the model has no chat template. Continue a text instead, without chat.")
        conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        bos, eos = (None if token is None else self.model.token_text(token) for token in (self.model.bos, self.model.eos))
        return render(template, conversation, add_generation_prompt=True, bos_token=bos, eos_token=eos)

    def score(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        """Log-probability of each token but the first, given those before it: float64 (n_tokens - 1,)."""
        self._check_open()
        tokens = self.model.check_tokens(ids)
        self._check_room(len(tokens), None)
        if len(tokens) < 2:
            raise UsageError(f"{len(tokens)} tokens cannot be scored; give at least two")
        scores = np.empty(len(tokens) - 1)
        with self._turn():
            self._cached = []
            for start, logits in self.context.iter_logits(tokens):
                targets = tokens[start + 1 : start + 1 + len(logits)]
                rows = logits[: len(targets)].astype(np.float64)
                top = rows.max(axis=1)
                total = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
                scores[start : start + len(targets)] = rows[np.arange(len(targets)), targets] - total
            self._cached = tokens.tolist()
        return scores

    def memory(self) -> Memory:
        """What this process and this session hold, in bytes."""
        self._check_open()
        return process_memory(model_bytes=self.model.size_bytes, kv_bytes=kv_bytes(self.model.facts, self.n_ctx, self.context.kv_type))

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeFailure(f"{self.model.path}: the session is closed. Load it again.")

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            ids = self.model.tokenize(prompt, add_special=True, parse_special=True)
            if not ids and self.model.bos is not None:
                ids = [self.model.bos]
        else:
            ids = self.model.check_tokens(prompt).tolist()
        if not ids:
            raise UsageError("the prompt is empty and the model has no BOS token to start from. Give some text.")
        return ids

    def _check_room(self, n_prompt: int, max_tokens: int | None) -> None:
        if n_prompt + (max_tokens or 0) > self.n_ctx:
            wanted = f" and {max_tokens} new tokens" if max_tokens else ""
            raise UsageError(
                f"a prompt of {n_prompt} tokens{wanted} does not fit the context of {self.n_ctx} tokens. "
                "Load with a larger n_ctx, or shorten the prompt or max_tokens."
            )

    def _generate(
        self, ids: list[int], max_tokens: int | None, sampling: Sampling, stops: tuple[str, ...]
    ) -> Generator[str, None, Completion]:
        """Yield text as soon as it is certain; the lock is held until the end or until the generator is closed."""
        with self._turn():
            self._check_open()
            began = time.perf_counter()
            reused = self._prefill(ids)
            prefilled = time.perf_counter()
            sampler, text = Sampler(sampling), _TextBuffer(stops)
            tokens: list[int] = []
            budget = self.n_ctx - len(ids) + 1 if max_tokens is None else max_tokens
            first = prefilled
            reason: FinishReason = "length"
            parts: list[str] = []
            try:
                while True:
                    token = sampler.sample(self.context)
                    if not tokens:
                        first = time.perf_counter()
                    if self.model.is_eog(token):
                        reason = "stop"
                        break
                    tokens.append(token)
                    piece = text.push(self.model.token_to_piece(token))
                    if piece:
                        parts.append(piece)
                        yield piece
                    if text.stopped:
                        reason = "stop"
                        break
                    if len(tokens) == budget:
                        break
                    self._cached.append(token)
                    self.context.decode([token])
            finally:
                del self._cached[self.context.n_past :]
                sampler.close()
            ended = time.perf_counter()
            if tail := text.flush():
                parts.append(tail)
                yield tail
            timings = Timings(
                prompt_tokens=len(ids),
                reused_tokens=reused,
                prefill_s=prefilled - began,
                ttft_s=first - began,
                decode_s=ended - first,
                new_tokens=len(tokens),
            )
            self.last = Completion(text="".join(parts), tokens=tuple(tokens), finish_reason=reason, timings=timings)
            return self.last

    def _prefill(self, ids: list[int]) -> int:
        """Bring the cache to hold exactly `ids`, with logits for the last; returns how many of them were in it before."""
        keep = min(_common_prefix(self._cached, ids), len(ids) - 1)
        keep = self.context.truncate(keep) if self._cached else 0
        if not keep:
            self.context.clear()
        self._cached = ids[:keep]
        try:
            logits = self.context.decode(ids[keep:])
        except BaseException:
            self._cached = ids[: self.context.n_past]
            raise
        self._cached = list(ids)
        if not np.isfinite(logits).all():
            raise RuntimeFailure(f"{self.model.path}: the model's outputs are not finite. Its weights are damaged; run edgeq verify.")
        return keep

    def _turn(self) -> _Turn:
        return _Turn(self)


class _Turn:
    """Exclusive use of a session: waits for other threads, refuses its own (which would wait for ever)."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __enter__(self) -> None:
        me = threading.get_ident()
        if not self.session._lock.acquire(blocking=self.session._holder != me):
            raise RuntimeFailure("the session is busy with an unfinished stream. Take its remaining pieces or close it first.")
        self.session._holder = me

    def __exit__(self, *_exc: object) -> None:
        self.session._holder = None
        self.session._lock.release()


class _TextBuffer:
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


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
