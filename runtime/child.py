"""A Python process beside ours that runs llama.cpp or ONNX Runtime, so that an abort in C code ends it and not us.

It runs a module of edgeq as a script and answers JSON lines with JSON lines: requests on its stdin, answers on what was its stdout.
Everything else that it or C code prints goes to a log, whose last lines are quoted when it dies. It runs in a session of its own, so
that Ctrl-C reaches only the parent, which ends it; and it ends when its stdin does, at once and whatever it is doing, so that it never
outlives its parent.

The child's side is `serve`: an answer is any number of {"progress": n} and then {"result": ...}, or {"error": class name,
"arguments": [...]} for an EdgeqError.
"""

from __future__ import annotations

import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from edgeq import errors
from edgeq.errors import EdgeqError, MissingDependency, RuntimeFailure
from edgeq.runtime.closing import Closing

_LOG_LINES = 5
_LOG_LINE_CHARS = 300
_LOG_TAIL_BYTES = 1 << 14


def ignore(done: int) -> None:
    """The listener that does not listen."""


class Child(Closing):
    """A running child. `subject` is what its messages are about (an artifact's path), runtime what they say that it ran.

    arguments: its command line. inherit: file descriptors that it shares under the same numbers. patience_s: how long it may say
    nothing, neither answer nor progress, before it counts as hung; None waits for ever.
    """

    def __init__(
        self,
        module: str,
        subject: str,
        *,
        runtime: str = "llama.cpp",
        arguments: Sequence[str] = (),
        inherit: Sequence[int] = (),
        patience_s: float | None = None,
    ) -> None:
        self.subject, self._runtime = subject, runtime
        self._patience_s = patience_s
        self._received = b""
        self._ended: RuntimeFailure | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the child)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *arguments],  # -P: a folder named edgeq where the user stands is not ours
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                pass_fds=inherit,
                start_new_session=True,
                env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # an abort would start a debugger to print its stack
            )
        except BaseException:
            self._log.close()
            raise
        assert self._process.stdin and self._process.stdout
        self._requests, self._answers = self._process.stdin, self._process.stdout

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: Mapping[str, Any], *, doing: str | None = None, on_progress: Callable[[int], None] = ignore) -> Any:
        """Send a request and wait for its result. doing: what it is, for messages ("scoring 64 tokens").

        Raises the child's EdgeqError, after which it takes the next request; or RuntimeFailure when it died, hung or answered
        nonsense, after which, as after an interrupt, it is closed.
        """
        if self._ended is not None:
            raise self._ended
        try:
            answer = self._exchange(request, f" while {doing}" if doing else "", on_progress)
        except BaseException as err:  # the conversation is out of step
            self.close()
            if isinstance(err, RuntimeFailure):
                self._ended = err
            raise
        if "error" in answer:
            raise _error(answer["error"], answer["arguments"])
        return answer["result"]

    def close(self) -> None:
        """End the child, which has nothing to finish; closing twice is fine."""
        if self._log.closed:
            return
        self._ended = RuntimeFailure(f"{self.subject}: the process that ran {self._runtime} is closed. Start a new one.")
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):  # a request was still on its way
            self._requests.close()
        self._answers.close()
        self._log.close()

    def _exchange(self, request: Mapping[str, Any], doing: str, on_progress: Callable[[int], None]) -> Mapping[str, Any]:
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
        except BrokenPipeError:
            raise self._death(doing) from None
        while True:
            line = self._line(doing)
            try:
                answer = dict(json.loads(line))
            except (ValueError, TypeError) as err:
                raise RuntimeFailure(
                    f"{self.subject}: the process that ran {self._runtime} answered {line[:60]!r}{doing}, which is no answer. Run it again."
                ) from err
            if "progress" not in answer:
                return answer
            on_progress(answer["progress"])

    def _line(self, doing: str) -> bytes:
        """The child's next line, without its end."""
        deadline = None if self._patience_s is None else time.monotonic() + self._patience_s
        while b"\n" not in self._received:
            if deadline is not None and not _readable(self._answers.fileno(), deadline - time.monotonic()):
                raise RuntimeFailure(
                    f"{self.subject}: the process that ran {self._runtime} gave no sign of life for {self._patience_s:g} seconds{doing}; "
                    f"it was ended. It last said: {self._last_words()}"
                )
            data = os.read(self._answers.fileno(), 1 << 20)
            if not data:
                raise self._death(doing)
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _death(self, doing: str) -> RuntimeFailure:
        status = self._process.wait()
        how = f"exited with status {status}" if status >= 0 else f"was killed by {_signal_name(-status)}"
        hint = " That is often the system running out of memory." if status == -signal.SIGKILL else ""
        words = self._last_words()
        return RuntimeFailure(f"{self.subject}: the process that ran {self._runtime} {how}{doing}.{hint} It last said: {words}")

    def _last_words(self) -> str:
        """The last lines of the log, on one line."""
        start = max(0, os.fstat(self._log.fileno()).st_size - _LOG_TAIL_BYTES)
        lines = os.pread(self._log.fileno(), _LOG_TAIL_BYTES, start).decode("utf-8", "replace").splitlines()
        said = [line.strip()[:_LOG_LINE_CHARS] for line in lines if line.strip()]
        return " | ".join(said[-_LOG_LINES:]) or "nothing"


def serve(handle: Callable[[Mapping[str, Any]], Any]) -> None:
    """Answer requests until stdin ends. For the child's main block: takes stdout away from everyone else first.

    A handler that is a generator yields progress as numbers and returns its result.
    """
    answers = os.dup(1)
    os.dup2(2, 1)
    requests: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=[requests], daemon=True).start()

    def send(**answer: Any) -> None:
        data = json.dumps(answer).encode() + b"\n"
        while data:
            data = data[os.write(answers, data) :]

    while True:
        request = requests.get()
        try:
            result = handle(request)
            if isinstance(result, Generator):
                result = _run(result, lambda done: send(progress=done))
            send(result=result)
        except EdgeqError as err:
            send(error=type(err).__name__, arguments=[err.module, err.extra] if isinstance(err, MissingDependency) else [str(err)])


def _run(steps: Generator[int, None, Any], on_progress: Callable[[int], None]) -> Any:
    """The return value of a generator."""
    while True:
        try:
            on_progress(next(steps))
        except StopIteration as end:
            return end.value


def _listen(requests: queue.SimpleQueue[Mapping[str, Any]]) -> None:
    """Put every line of stdin into the queue, and end the process with it.

    Reads the descriptor itself: a lock held on sys.stdin would stop the interpreter's exit.
    """
    received = b""
    while data := os.read(0, 1 << 16):
        *lines, received = (received + data).split(b"\n")
        for line in lines:
            requests.put(json.loads(line))
    os._exit(0)


def _readable(file: int, timeout_s: float) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(file, selectors.EVENT_READ)
        return bool(selector.select(max(0.0, timeout_s)))


def _error(name: str, arguments: Sequence[str]) -> EdgeqError:
    """The child's error in this process."""
    return getattr(errors, name, EdgeqError)(*arguments)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
