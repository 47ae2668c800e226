"""Work done by threads a little ahead of who takes its results, so that memory does not grow with the work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy.typing as npt

Result = npt.NDArray[Any]
Job = Callable[[], Result]


class Ahead:
    """Jobs whose results are taken in order, more or less, computed a little ahead of that."""

    def __init__(self, pool: ThreadPoolExecutor, jobs: Iterable[Job], most: int) -> None:
        """most: jobs under way or waiting to be taken at one time."""
        self._pool, self._waiting, self._most = pool, deque(enumerate(jobs)), most
        self._running: dict[int, Future[Result]] = {}
        self._start(-1)

    def take(self, number: int) -> Result:
        """The result of a job, once."""
        self._start(number)
        found = self._running.pop(number)
        self._start(-1)
        return found.result()

    def _start(self, number: int) -> None:
        """As many jobs as may be under way, and this one in any case."""
        while self._waiting and (len(self._running) < self._most or (number >= 0 and number not in self._running)):
            i, job = self._waiting.popleft()
            self._running[i] = self._pool.submit(job)


def take_all(ahead: Ahead, start: int, stop: int) -> Iterator[Result]:
    return (ahead.take(number) for number in range(start, stop))
