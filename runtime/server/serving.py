"""A process that serves: one socket, one session, and an orderly end.

On SIGTERM or SIGINT the server answers new requests with 503, `/health` too, finishes what runs within a limit, ends the rest with an error
and leaves with status 0. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

import uvicorn

from edgeq.errors import UsageError
from edgeq.runtime.adapters import AdapterChoice
from edgeq.runtime.batcher import Batcher
from edgeq.runtime.engine import runtime_of
from edgeq.runtime.server.app import About, build_app
from edgeq.runtime.server.generation import Generations
from edgeq.runtime.server.guard import Limits
from edgeq.runtime.session import Session

_ARRIVAL_S = 30.0  # for a request's body
_FAREWELL_S = 2.0  # for errors to reach those whose answers were cut off


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """name: of the model; adapters are name:adapter. slots: generations at once. max_queue: more that may wait. timeout_s: for a request,
    waiting included. grace_s: for what runs when the server is told to end. api_key: None asks for none."""

    name: str
    slots: int = 4
    max_queue: int = 64
    timeout_s: float = 300.0
    grace_s: float = 30.0
    max_request_bytes: int = 1 << 20
    api_key: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise UsageError("the name of the model is empty. Give --name.")
        if self.api_key is not None and not self.api_key.strip():
            raise UsageError("the API key is empty. Leave it out, or give one.")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one. Raises UsageError when the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as err:
        raise UsageError(f"cannot listen on {host}:{port}: {err}. Give another --host or --port; --port 0 takes a free one.") from err


def url_of(listening: socket.socket) -> str:
    """Base URL for clients of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def model_names(session: Session, name: str) -> dict[str, AdapterChoice]:
    """What clients may ask for: the model alone, and it with each adapter."""
    return {name: None, **{f"{name}:{adapter.name}": adapter.name for adapter in session.adapters}}


@contextlib.contextmanager
def generations_of(session: Session, settings: ServerSettings) -> Iterator[Generations]:
    """Generations over a session, which belongs to them until the end."""
    generations = Generations(
        Batcher(session, slots=settings.slots, max_queue=settings.max_queue),
        models=model_names(session, settings.name),
        render=session.chat_prompt,
        slots=settings.slots,
        max_queue=settings.max_queue,
        timeout_s=settings.timeout_s,
    )
    try:
        yield generations
    finally:
        generations.close()


def serve(session: Session, settings: ServerSettings, listening: socket.socket, *, on_ready: Callable[[], None] = lambda: None) -> None:
    """Serve until a signal ends it. on_ready: called once when requests are answered. The session stays open."""
    with generations_of(session, settings) as generations:
        limits = Limits(
            api_key=settings.api_key, max_request_bytes=settings.max_request_bytes, arrival_s=min(_ARRIVAL_S, settings.timeout_s)
        )
        about = About(n_ctx=session.n_ctx, rate=session.rate, runtime=runtime_of(session.model.path), started=int(time.time()))
        config = uvicorn.Config(
            build_app(generations, limits, about),
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(_FAREWELL_S),
        )
        EndingServer(config, generations, grace_s=settings.grace_s, on_ready=on_ready).run(sockets=[listening])


class EndingServer(uvicorn.Server):
    """uvicorn, which on a signal first goes on answering (with 503) until what runs has ended."""

    def __init__(self, config: uvicorn.Config, generations: Generations, *, grace_s: float, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._generations, self._grace_s, self._on_ready = generations, grace_s, on_ready
        self._told_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Instead of uvicorn's, which closes the door at once and raises the signal again at the end."""
        if self._told_at is not None:
            self.should_exit = self.force_exit = True
        self._told_at = self._told_at or time.monotonic()
        self._generations.drain()

    async def on_tick(self, counter: int) -> bool:
        """Every tenth of a second."""
        if self._told_at is not None:
            late = time.monotonic() - self._told_at >= self._grace_s
            if late:
                self._generations.abort()
                await asyncio.sleep(0)
            self.should_exit = self.should_exit or late or not self._generations.busy
        return await super().on_tick(counter)
