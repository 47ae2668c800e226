"""A batcher that says what it is told to, for tests of the server's own behaviour; and a client of an ASGI application in this process."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace

import httpx2

from edgeq.errors import ContextOverflow, QueueFull
from edgeq.runtime.answer import Completion, Timings
from edgeq.runtime.server.app import About, build_app
from edgeq.runtime.server.generation import Generations
from edgeq.runtime.server.guard import Limits

N_CTX = 100
KEY = "a key"


class FakeJob:
    """Gives `pieces` one by one; from number `hold` on it waits for `go` or a cancel. broken: what to raise after the pieces."""

    def __init__(self, pieces, *, hold=None, broken=None):
        self.pieces, self.hold, self.broken = pieces, hold, broken
        self.go, self.cancelled, self.left = threading.Event(), threading.Event(), threading.Event()
        self.completion = None

    def __iter__(self):
        try:
            for i, piece in enumerate(self.pieces):
                while self.hold is not None and i >= self.hold and not self.go.wait(0.005):
                    if self.cancelled.is_set():
                        return
                yield piece
            if self.broken is not None:
                raise self.broken
            timings = Timings(prompt_tokens=7, reused_tokens=2, prefill_s=0.1, ttft_s=0.1, decode_s=0.1, new_tokens=len(self.pieces))
            tokens = tuple(range(len(self.pieces)))
            self.completion = Completion(text="".join(self.pieces), tokens=tokens, finish_reason="stop", timings=timings)
        finally:
            self.left.set()

    def cancel(self):
        self.cancelled.set()


class FakeEngine:
    """Remembers what was asked of it. make: makes the next job."""

    def __init__(self):
        self.asked, self.jobs, self.closed = [], [], False
        self.make = lambda: FakeJob(["Hel", "lo"])
        self.stats = SimpleNamespace(queued=3, active=2)

    def submit(self, prompt, *, adapter=None, **options):
        self.asked.append({"prompt": prompt, "adapter": adapter, **options})
        if len(prompt) > N_CTX:
            raise ContextOverflow(f"a prompt of {len(prompt)} tokens does not fit the context of {N_CTX} tokens.")
        job = self.make()
        if job is None:
            raise QueueFull("full")
        self.jobs.append(job)
        return job

    def close(self, *, wait=True):
        self.closed = True


class Served:
    """An application over a fake engine. Requests run on one event loop, which ends with each `call` or `together`."""

    def __init__(self, *, api_key=None, slots=2, max_queue=2, timeout_s=5.0, max_request_bytes=4096, arrival_s=5.0):
        self.engine = FakeEngine()
        self.generations = Generations(
            self.engine,
            models={"m": None, "m:sql": "sql"},
            render=lambda conversation: [len(message["content"]) for message in conversation],
            slots=slots,
            max_queue=max_queue,
            timeout_s=timeout_s,
        )
        limits = Limits(api_key=api_key, max_request_bytes=max_request_bytes, arrival_s=arrival_s)
        self.app = build_app(self.generations, limits, About(n_ctx=N_CTX, rate=0.2, runtime="llama.cpp", started=1700000000))

    def run(self, work):
        """work(client) -> an awaitable, on an event loop of its own."""

        async def main():
            transport = httpx2.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
                return await work(client)

        return asyncio.run(main())

    def call(self, method, path, **request):
        return self.run(lambda client: client.request(method, path, **request))

    def post(self, path, body, **request):
        return self.call("POST", path, json=body, **request)

    def chat(self, **fields):
        return self.post("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields})

    def complete(self, **fields):
        return self.post("/v1/completions", {"model": "m", "prompt": "hi", **fields})

    def converse(self, messages, path="/v1/chat/completions", method="POST", after=None):
        """Raw ASGI: `messages` (or what awaits one) are what the server receives, in order; then it waits for ever. after: what to await
        on the same event loop when the server is done. -> (status | None, body)."""
        sent = []

        async def main():
            queue = list(messages)

            async def receive():
                if not queue:
                    return await asyncio.Event().wait()
                message = await queue[0]() if callable(queue[0]) else queue[0]  # one that stops waiting here loses nothing
                queue.pop(0)
                return message

            async def send(message):
                sent.append(message)

            scope = {
                "type": "http",
                "asgi": {"version": "3.0", "spec_version": "2.3"},
                "http_version": "1.1",
                "method": method,
                "path": path,
                "raw_path": path.encode(),
                "query_string": b"",
                "headers": [(b"content-type", b"application/json")],
                "scheme": "http",
                "server": ("test", 80),
                "client": ("test", 1),
                "root_path": "",
            }
            await self.app(scope, receive, send)
            if after is not None:
                await after()

        asyncio.run(main())
        status = next((message["status"] for message in sent if message["type"] == "http.response.start"), None)
        return status, b"".join(message.get("body", b"") for message in sent)


def events_of(text):
    """Documents of a body of server-sent events, whose last is [DONE] unless it is an error."""
    data = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    if data[-1] == "[DONE]":
        return [json.loads(item) for item in data[:-1]], True
    return [json.loads(item) for item in data], False
