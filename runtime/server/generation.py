"""Running generations on an event loop: models by name, one batcher's jobs as asynchronous text, deadlines, an orderly end.

The batcher works in a thread of its own and its jobs are read by blocking; here a thread per running job hands the pieces to the event
loop. All state of this module is touched on that loop only.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from edgeq.errors import EdgeqError
from edgeq.runtime.adapters import AdapterChoice
from edgeq.runtime.answer import Completion
from edgeq.runtime.server.api_error import ApiError, failed, from_edgeq, shutting_down, took_too_long
from edgeq.runtime.server.metrics import Counter, Histogram

T = TypeVar("T")

logger = logging.getLogger(__name__)

_ENTRANCES = 2  # threads that tokenize prompts: of short work, and no more of it at once than small devices have cores
_MAX_RETRY_S = 60


class Job(Protocol):
    """As `edgeq.runtime.batcher.Job`: iterating blocks and gives text; `completion` is there at the end unless the job was cancelled."""

    completion: Completion | None

    def __iter__(self) -> Iterator[str]: ...
    def cancel(self) -> None: ...


class Engine(Protocol):
    """As `edgeq.runtime.batcher.Batcher`. stats: has `queued` and `active`."""

    @property
    def stats(self) -> Any: ...
    def submit(self, prompt: Any, *, adapter: AdapterChoice = None, **options: Any) -> Job: ...
    def close(self, *, wait: bool = True) -> None: ...


class Generations:
    """Starts generations by model name and knows those that run.

    models: name -> adapter; the first is the model alone. render: a conversation -> token ids. slots: how many run at once; max_queue: how
    many more may wait. timeout_s: for one request, waiting included. Times of whole answers and of first texts are in `seconds` and `ttft`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        models: dict[str, AdapterChoice],
        render: Callable[[Any], list[int]],
        slots: int,
        max_queue: int,
        timeout_s: float,
    ) -> None:
        self.models, self.render, self.timeout_s = models, render, timeout_s
        self.slots, self.max_open = slots, slots + max_queue
        self.draining = False
        self.running: set[Generation] = set()
        self._starting = 0
        self.seconds = Histogram("edgeq_generation_seconds", "From a valid request to the end of its answer.")
        self.ttft = Histogram("edgeq_first_text_seconds", "From a valid request to the first text of its answer.")
        self.ended = Counter("edgeq_generations_total", "Generations by model and how they ended.")
        self.tokens = Counter("edgeq_tokens_total", "Tokens of whole answers, by model: prompt, cached (of those), completion.")
        self.engine = engine
        self._entrance = ThreadPoolExecutor(_ENTRANCES, "edgeq-submit")
        self._readers = ThreadPoolExecutor(2 * self.max_open, "edgeq-read")  # those of cancelled jobs leave a little later

    def retry_after_s(self) -> int:
        """When a slot may be free: the mean time of an answer times the number of those before, over the slots. 1 to 60 seconds."""
        guess = (self.seconds.mean or 1.0) * max(1, len(self.running) - self.slots) / self.slots
        return min(max(math.ceil(guess), 1), _MAX_RETRY_S)

    async def start(self, model: str, prompt: str | list[int] | Callable[[], list[int]], options: dict[str, Any]) -> Generation:
        """Queue one. prompt: text, token ids, or what makes them. Raises ApiError for an unknown model, and as `from_edgeq` says."""
        if self.draining:
            raise shutting_down()
        self.check_model(model)

        def submit() -> Job:
            given = prompt() if callable(prompt) else prompt
            return self.engine.submit(given, adapter=self.models[model], **options)

        began = time.monotonic()
        self._starting += 1
        submitted = asyncio.get_running_loop().run_in_executor(self._entrance, submit)
        try:
            job = await asyncio.shield(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(_cancel_unwanted)  # nobody would read that job
            raise
        except EdgeqError as err:
            raise from_edgeq(err, retry_after_s=self.retry_after_s()) from err
        except RecursionError as err:
            raise ApiError(400, "the request is nested too deeply") from err
        except Exception as err:
            raise failed(err) from err
        finally:
            self._starting -= 1
        generation = Generation(job, self, model, began)
        self.running.add(generation)
        self._readers.submit(generation.read)
        return generation

    def check_model(self, name: str) -> None:
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(404, f"no model is named {name!r}. There are: {known}", code="model_not_found", param="model")

    @property
    def busy(self) -> bool:
        return bool(self.running or self._starting)

    def drain(self) -> None:
        """Take no more; what runs goes on."""
        self.draining = True

    def abort(self) -> None:
        """End what runs: those who wait for it get an error."""
        self.draining = True
        for generation in self.running:
            generation.stop()

    def close(self) -> None:
        """End what runs and free the threads. The event loop may be gone already."""
        self.abort()
        self._entrance.shutdown(cancel_futures=True)
        self.engine.close()
        self._readers.shutdown()


class Generation:
    """One running job: an asynchronous iterator of text. `completion` is there when it has ended well."""

    def __init__(self, job: Job, owner: Generations, model: str, began: float) -> None:
        self.completion: Completion | None = None
        self._job, self._owner, self._model, self._began = job, owner, model, began
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + owner.timeout_s - (time.monotonic() - began)
        self._arrived: asyncio.Queue[str | BaseException | None] = asyncio.Queue()
        self._open = True

    def read(self) -> None:
        """In a thread: hand over all pieces, then None or what went wrong."""
        try:
            for piece in self._job:
                self._hand(piece)
        except Exception as err:
            self._hand(err)
        else:
            self._hand(None)

    def _hand(self, item: str | BaseException | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, item)
        except RuntimeError:
            logger.debug("the event loop is gone; a generation ends unheard")

    async def __aiter__(self) -> AsyncIterator[str]:
        """Raises ApiError: 504 at the deadline, 503 when the server ends first, 500 when the model fails."""
        first = True
        while True:
            try:
                async with asyncio.timeout_at(self._deadline):
                    item = await self._arrived.get()
            except TimeoutError:
                self._end("timeout")
                raise took_too_long(self._owner.timeout_s) from None
            if isinstance(item, EdgeqError):
                self._end("error")
                raise from_edgeq(item, retry_after_s=self._owner.retry_after_s()) from item
            if isinstance(item, BaseException):
                self._end("error")
                raise failed(item)
            if first:
                first = False
                self._owner.ttft.observe(time.monotonic() - self._began)
            if item is None:
                break
            yield item
        self.completion = self._job.completion
        if self.completion is None:  # stopped
            self._end("aborted")
            raise shutting_down()
        self._end(self.completion.finish_reason)

    async def result(self) -> Completion:
        """The whole of it. Raises as iterating does."""
        async for _ in self:
            pass
        assert self.completion is not None
        return self.completion

    def cancel(self) -> None:
        """Free its slot, because nobody listens any more. One that has ended stays as it is."""
        self._end("cancelled")

    def stop(self) -> None:
        """Free its slot, and tell the one who listens."""
        self._job.cancel()

    def _end(self, how: str) -> None:
        """Once: count it and let the job go."""
        if not self._open:
            return
        self._open = False
        owner = self._owner
        owner.running.discard(self)
        owner.ended.add(model=self._model, end=how)
        if self.completion is None:
            self._job.cancel()
            return
        owner.seconds.observe(time.monotonic() - self._began)
        timings = self.completion.timings
        counts = {"prompt": timings.prompt_tokens, "cached": timings.reused_tokens, "completion": len(self.completion.tokens)}
        for kind, n in counts.items():
            owner.tokens.add(n, model=self._model, kind=kind)


def _cancel_unwanted(submitted: asyncio.Future[Job]) -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()


async def unless_gone(work: Awaitable[T], gone: Awaitable[object]) -> T | None:
    """What `work` gives, or None when `gone` ends first; then the work is cancelled."""
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone)
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, leaving):
            each.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)
