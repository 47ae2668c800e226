"""Many requests on one model: a queue, a thread that works it off, and answers that are computed together where the runtime can.

    with Batcher(session, slots=4) as batcher:
        jobs = [batcher.submit(prompt, adapter="sql", max_tokens=64) for prompt in prompts]
        texts = [job.result().text for job in jobs]

slots=1       one request after another through the session itself, which reuses what prompts have in common. A request's greedy answer is
              the one that it gets alone, whatever came before (`Session.exact`).
slots > 1     llama.cpp only: that many sequences of one set of adapters share every llama_decode, each with a cache of its own and
              nothing reused. Kernels round sums of several sequences in another order than those of one, so every computation has as
              many rows as there are slots, and an answer is the same in any company: on SmolLM2-135M in Q4_0 on a CPU, 1000 requests of
              16 clients to a server of 4 slots gave the answers that each gave alone; with as many rows as requests 30 differed.
              It need not be the answer of another number of slots. In ONNX Runtime requests still run one at a time.

Adapters act on a whole computation, so requests wait for those of other adapters. Of one set at most BYPASS * slots are let in while a
request for another one is at the head of the queue; then what runs is finished, and that one has its turn.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from edgeq.errors import QueueFull, RuntimeFailure, UsageError
from edgeq.runtime.adapters import ActiveAdapters, AdapterChoice, scales_of
from edgeq.runtime.answer import Answer, Completion, Timings
from edgeq.runtime.lanes import Lanes
from edgeq.runtime.llama import LlamaModel
from edgeq.runtime.sampling import Sampler
from edgeq.runtime.session import Ask, Session

BYPASS = 4
_IDLE_S = 0.5

Scales = tuple[tuple[str, float], ...]


@dataclass
class Stats:
    """queued: waiting; active: being answered. done, cancelled, failed: ended so far. tokens_in, tokens_out: of answers that are done."""

    queued: int = 0
    active: int = 0
    done: int = 0
    cancelled: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


class Job:
    """One request: iterating gives text as it comes, and blocks until there is some. `completion` is there once it has ended well.

    One that was cancelled ends its iteration early and has none.
    """

    def __init__(self, ask: Ask, scales: Scales) -> None:
        self.ask, self.scales = ask, scales
        self.completion: Completion | None = None
        self.cancelled = threading.Event()
        self.began = time.perf_counter()
        self._pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self._ended: BaseException | None = None
        self._over = False

    def __iter__(self) -> Iterator[str]:
        while (piece := self._next(None)) is not None:
            yield piece

    def result(self, timeout: float | None = None) -> Completion:
        """The whole answer. Raises what went wrong, RuntimeFailure for a cancelled one, TimeoutError after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._next(None if deadline is None else max(0.0, deadline - time.monotonic())) is not None:
            pass
        if self.completion is None:
            raise RuntimeFailure("the request was cancelled.")
        return self.completion

    def cancel(self) -> None:
        """From any thread: free its place before its next token. One that has ended stays as it is."""
        self.cancelled.set()

    def put(self, piece: str) -> None:
        if piece:
            self._pieces.put(piece)

    def end(self, outcome: Completion | BaseException | None) -> None:
        """Once. None: cancelled."""
        if isinstance(outcome, Completion):
            self.completion = outcome
        self._pieces.put(outcome if isinstance(outcome, BaseException) else None)

    def _next(self, timeout: float | None) -> str | None:
        if not self._over:
            try:
                piece = self._pieces.get(timeout=timeout)
            except queue.Empty:
                raise TimeoutError("the answer is not complete yet") from None
            if isinstance(piece, str):
                return piece
            self._over, self._ended = True, piece
        if self._ended is not None:
            raise self._ended
        return None


class Batcher:
    """Owns a session, which nobody else uses, until it is closed; the session stays open. max_queue: requests that may wait."""

    def __init__(self, session: Session, *, slots: int = 1, max_queue: int = 64) -> None:
        for name, value in (("slots", slots), ("max_queue", max_queue)):
            if value < 1:
                raise UsageError(f"{name} is {value}; expected at least 1")
        self.session, self.max_queue, self.stats = session, max_queue, Stats()
        session.know_package_adapters()
        together = slots > 1 and isinstance(session.model, LlamaModel)
        self.slots = slots if together else 1
        self._before = session.exact
        self._worker: _Together | _OneByOne = _Together(self) if together else _OneByOne(self)
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="edgeq-batcher", daemon=True)
        self._thread.start()

    def submit(self, prompt: str | Sequence[int], *, adapter: AdapterChoice = None, **options: Any) -> Job:
        """Queue a request. Options as for `Session.stream`. Thread-safe, and returns at once.

        Raises UsageError for what `Session.stream` would refuse and for unknown adapters, QueueFull when max_queue requests wait,
        RuntimeFailure when the batcher is closed.
        """
        ask = self.session.ask(prompt, **options)
        scales = scales_of(adapter)
        self.session.adapter_pool.check_known(scales)
        job = Job(ask, tuple(scales.items()))
        with self._changed:
            if self._closing:
                raise RuntimeFailure("the batcher is closed. Make a new one.")
            self._forget_cancelled()
            if len(self._queue) >= self.max_queue and self.stats.active + len(self._queue) >= self.max_queue + self.slots:
                raise QueueFull(f"{len(self._queue)} requests wait already. Try again later.")
            self._queue.append(job)
            self.stats.queued = len(self._queue)
            self._changed.notify()
        return job

    def close(self, *, wait: bool = True) -> None:
        """End: with `wait` when all requests are answered, without as soon as possible, cancelling them. Closing twice is fine."""
        with self._changed:
            self._closing = True
            if not wait:
                self._drop_queue()
                self._worker.cancel()
            self._changed.notify()
        self._thread.join()
        self.session.exact = self._before

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(wait=error is None)

    # What workers use, on the batcher's thread.

    def take(self, wanted: Scales | None) -> Job | None:
        """The next request with these adapters, or with any for None; None when there is none now."""
        with self._changed:
            self._forget_cancelled()
            job = next((job for job in self._queue if wanted in (None, job.scales)), None)
            if job is not None:
                self._queue.remove(job)
                self.stats.active += 1
            self.stats.queued = len(self._queue)
            return job

    def head(self) -> Scales | None:
        """What the request that has waited longest wants; None when none waits."""
        with self._changed:
            self._forget_cancelled()
            return self._queue[0].scales if self._queue else None

    def ended(self, job: Job, outcome: Completion | BaseException | None) -> None:
        with self._changed:
            self.stats.active -= 1
            if isinstance(outcome, Completion):
                self.stats.done += 1
                self.stats.tokens_in += outcome.timings.prompt_tokens
                self.stats.tokens_out += outcome.timings.new_tokens
            elif outcome is None:
                self.stats.cancelled += 1
            else:
                self.stats.failed += 1
        job.end(outcome)

    def _forget_cancelled(self) -> None:
        for job in [job for job in self._queue if job.cancelled.is_set()]:
            self._queue.remove(job)
            self.stats.cancelled += 1
            job.end(None)
        self.stats.queued = len(self._queue)

    def _drop_queue(self) -> None:
        for job in self._queue:
            job.cancel()
        self._forget_cancelled()

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    while not self._queue and not self._closing:
                        self._changed.wait(_IDLE_S)
                        self._forget_cancelled()
                    if not self._queue and self._closing:
                        return
                self._worker.serve()
        finally:
            self._worker.close()


class _OneByOne:
    """Through the session."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher, self.session = batcher, batcher.session
        self.session.exact = True
        self._now: Scales | None = None
        self._bypassed = 0
        self._running: Job | None = None

    def serve(self) -> None:
        """Answer one request."""
        head = self.batcher.head()
        stay = self._now if head != self._now and self._bypassed < BYPASS else head
        job = self.batcher.take(stay) or self.batcher.take(None)
        if job is None:
            return
        self._bypassed = self._bypassed + 1 if job.scales != head else 0
        self._now, self._running = job.scales, job
        outcome: Completion | BaseException | None = None
        try:
            outcome = self._answered(job)
        except Exception as err:  # to the one who asked; the next request is another one's
            outcome = err
        finally:
            self._running = None
            self.batcher.ended(job, outcome)

    def _answered(self, job: Job) -> Completion | None:
        self.session.set_adapter(dict(job.scales))
        stream = self.session.answer(job.ask)
        for piece in stream:
            job.put(piece)
            if job.cancelled.is_set():
                stream.close()
                return None
        return None if job.cancelled.is_set() and stream.completion is None else stream.completion

    def cancel(self) -> None:
        if (job := self._running) is not None:
            job.cancel()

    def close(self) -> None:
        """There is nothing of its own."""


@dataclass
class _Run:
    """A request in a lane. token: the last one, which the lane has not seen yet."""

    job: Job
    answer: Answer
    sampler: Sampler
    began: float
    prefilled: float
    token: int = 0
    first: float = field(default_factory=time.perf_counter)


class _Together:
    """In lanes of a context of its own."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher, session = batcher, batcher.session
        assert isinstance(session.model, LlamaModel)
        self.session, self.model = session, session.model
        self.lanes = Lanes(
            session.model, slots=batcher.slots, n_ctx=session.n_ctx, threads=session.context.threads, kv_type=session.context.kv_type
        )
        self._adapters = ActiveAdapters(session.adapter_pool, self.lanes)
        self._free = list(range(batcher.slots))
        self._runs: dict[int, _Run] = {}
        self._bypassed = 0

    def serve(self) -> None:
        """Answer requests until none runs."""
        self._admit()
        while self._runs:
            self._step()
            self._admit()

    def cancel(self) -> None:
        for run in list(self._runs.values()):
            run.job.cancel()

    def close(self) -> None:
        for lane in list(self._runs):
            self._leave(lane, None)
        self._adapters.set(None)
        self.lanes.close()

    def _admit(self) -> None:
        """Let requests into free lanes: of the adapters of now, or of any when nothing runs."""
        while self._free:
            head = self.batcher.head()
            if head is None:
                return
            now = tuple(self._adapters.scales.items())
            if self._runs and head != now and self._bypassed >= BYPASS * self.batcher.slots:
                return
            job = self.batcher.take(now if self._runs else head)
            if job is None:
                return
            self._bypassed = self._bypassed + 1 if job.scales != head else 0
            self._enter(job)

    def _enter(self, job: Job) -> None:
        lane, began = self._free.pop(), time.perf_counter()
        sampler: Sampler | None = None
        try:
            self._adapters.set(dict(job.scales))
            segments = self._adapters.segments(job.ask.ids)
            for segment in segments:
                self._adapters.apply(segment.key)
                self.lanes.fill(lane, job.ask.ids[segment.start : segment.stop])
            sampler = Sampler(job.ask.sampling, self.lanes.context)
            run = _Run(job, job.ask.answer(self.model), sampler, began, time.perf_counter())
            self._runs[lane] = run
            self._sampled(lane, -1)
        except Exception as err:  # to the one who asked; the others go on
            if lane in self._runs:
                self._leave(lane, err)
                return
            if sampler is not None:
                sampler.close()
            self.lanes.free(lane)
            self._free.append(lane)
            self.batcher.ended(job, err)

    def _step(self) -> None:
        for lane, run in list(self._runs.items()):
            if run.job.cancelled.is_set():
                self._leave(lane, None)
        if not self._runs:
            return
        try:
            self.lanes.step({lane: run.token for lane, run in self._runs.items()})
        except RuntimeFailure as err:
            for lane in list(self._runs):
                self._leave(lane, err)
            return
        for lane in list(self._runs):
            try:
                self._sampled(lane, lane)
            except UsageError as err:  # its grammar cannot go on
                self._leave(lane, err)

    def _sampled(self, lane: int, row: int) -> None:
        """Take the next token of a lane from its row of logits."""
        run = self._runs[lane]
        run.token = run.sampler.sample(self.lanes.context, row)
        if not run.answer.tokens:
            run.first = time.perf_counter()
        run.job.put(run.answer.take(run.token))
        if run.answer.finish_reason is not None:
            self._leave(lane, self._completion(run))

    def _completion(self, run: _Run) -> Completion:
        answer = run.answer
        assert answer.finish_reason is not None
        timings = Timings(
            prompt_tokens=len(run.job.ask.ids),
            reused_tokens=0,
            prefill_s=run.prefilled - run.began,
            ttft_s=run.first - run.began,
            decode_s=time.perf_counter() - run.first,
            new_tokens=len(answer.tokens),
        )
        return Completion(text=answer.text, tokens=tuple(answer.tokens), finish_reason=answer.finish_reason, timings=timings)

    def _leave(self, lane: int, outcome: Completion | BaseException | None) -> None:
        run = self._runs.pop(lane)
        run.sampler.close()
        self.lanes.free(lane)
        self._free.append(lane)
        self.batcher.ended(run.job, outcome)
