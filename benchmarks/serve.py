"""A server under load: many clients over several adapters at once, and what strangers send.

    python benchmarks/serve.py PACKAGE|--tiny [--requests 500] [--clients 16] [--tokens 24] [--prompts 8] [--slots 4]
                               [--threads N] [-o results.json]

single       every (model, prompt) once, by one client after another: the texts that all later answers must equal (temperature 0)
load         --requests requests in a seeded random order from --clients clients, over the model and all its adapters, through chat and
             completions, whole and streamed, by the official `openai` client. Reported: wrong answers; p50 and p99 of the time to the whole
             answer and, of streams, to the first text, waiting in the queue included; answers and tokens per second
rss          resident memory of the server's process before the load, after it, and after the same again; after every abuse, up to six,
             until one leaves it as it was. A leak grows every time, what an allocator keeps for the next time only now and then
abuse        malformed bodies, prompts that do not fit, bodies that are too large, unknown models, clients that leave before the answer and
             in the middle of it: the status each must get, and that all slots are free at the end
end          SIGTERM while an answer runs: the answer is finished, and the process ends with status 0

PACKAGE should hold two or more kept adapters; --tiny makes one with random weights (needs this repository's tests folder). The server is a
process of its own, on loopback. Exit status 1 when anything is not as it must be. Needs edgeq[server], a runtime, and openai.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import psutil

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = (
    "The harbour lights of the island",
    "Once upon a time there was a ship",
    "def read(path):",
    "Write one sentence about rain.",
    "SELECT name FROM",
    "The capital of France is",
    "My grandmother kept three clocks",
    "1, 2, 3, 5, 8,",
)
GROWTH_LIMIT = 16 << 20  # bytes, in the last round
ABUSES = 6  # at most, until memory grows no more
START_S, END_S = 120.0, 60.0

Key = tuple[str, str, bool]  # model, prompt, through the chat template


@dataclass(frozen=True)
class Answer:
    """text: of the whole answer. seconds, first_s: from sending the request; first_s only of streams."""

    text: str
    tokens: int
    seconds: float
    first_s: float | None


class Server:
    """`edgeq serve` as a process, from its first line on."""

    def __init__(self, package: Path, *options: str) -> None:
        command = [sys.executable, "-m", "edgeq.cli", "serve", str(package), "--port", "0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self.process.stdout is not None
        timer = threading.Timer(START_S, self.process.kill)
        timer.start()
        self.line = self.process.stdout.readline()
        timer.cancel()
        if not self.line:
            raise SystemExit(f"error: the server did not start (status {self.process.wait()})")
        self.url = self.line.split()[-1]
        self.address = (urlsplit(self.url).hostname or "", urlsplit(self.url).port or 0)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=END_S * 5)

    def get(self, path: str) -> str:
        return httpx2.get(f"http://{self.address[0]}:{self.address[1]}{path}").text

    def rss(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    def metric(self, name: str) -> float:
        return next(float(line.split()[-1]) for line in self.get("/metrics").splitlines() if line.startswith(f"{name} "))

    def end(self) -> int:
        """The status it ends with when it is told to."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(END_S)


@contextlib.contextmanager
def serving(package: Path, *options: str) -> Iterator[Server]:
    server = Server(package, *options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()
        if server.process.stdout is not None:
            server.process.stdout.close()


def ask(client: openai.OpenAI, key: Key, *, tokens: int, stream: bool) -> Answer:
    model, prompt, chat = key
    began, first_s, parts, n_tokens = time.perf_counter(), None, [], 0
    options: dict[str, Any] = {"model": model, "max_tokens": tokens, "temperature": 0, "stream": stream}
    if stream:
        options["stream_options"] = {"include_usage": True}
    if chat:
        reply = client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **options)
    else:
        reply = client.completions.create(prompt=prompt, **options)
    if not stream:
        choice = reply.choices[0]
        text = (choice.message.content if chat else choice.text) or ""
        return Answer(text, reply.usage.completion_tokens, time.perf_counter() - began, None)
    for chunk in reply:
        if chunk.usage is not None:
            n_tokens = chunk.usage.completion_tokens
        piece = (chunk.choices[0].delta.content if chat else chunk.choices[0].text) if chunk.choices else None
        if piece:
            first_s = time.perf_counter() - began if first_s is None else first_s
            parts.append(piece)
    return Answer("".join(parts), n_tokens, time.perf_counter() - began, first_s)


def load(server: Server, expected: dict[Key, str], *, n_requests: int, n_clients: int, tokens: int) -> dict[str, Any]:
    """Requests from many clients at once, beside the answers that they must get."""
    rng = random.Random(0)
    keys = sorted(expected)
    work = [(keys[i % len(keys)], i % 2 == 0) for i in range(n_requests)]
    rng.shuffle(work)
    shares = [work[i::n_clients] for i in range(n_clients)]

    def one_client(share: Sequence[tuple[Key, bool]]) -> list[tuple[Key, Answer]]:
        with server.client() as client:
            return [(key, ask(client, key, tokens=tokens, stream=stream)) for key, stream in share]

    began = time.perf_counter()
    with ThreadPoolExecutor(n_clients) as pool:
        answers = [pair for pairs in pool.map(one_client, shares) for pair in pairs]
    seconds = time.perf_counter() - began
    wrong = [(key, answer.text, expected[key]) for key, answer in answers if answer.text != expected[key]]
    return {
        "requests": len(answers),
        "clients": n_clients,
        "wrong": len(wrong),
        "first_wrong": wrong[0] if wrong else None,
        "answer_s": quantiles([answer.seconds for _, answer in answers]),
        "first_text_s": quantiles([answer.first_s for _, answer in answers if answer.first_s is not None]),
        "requests_per_s": len(answers) / seconds,
        "tokens_per_s": sum(answer.tokens for _, answer in answers) / seconds,
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p50 and p99, by the nearest rank."""
    ordered = sorted(values)
    return {"p50": statistics.median(ordered), "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]}


def post(server: Server, path: str, content: bytes, kind: str = "application/json") -> int:
    return httpx2.post(f"{server.url}{path}", content=content, headers={"Content-Type": kind}, timeout=END_S).status_code


def abuse(server: Server, model: str, *, rounds: int = 10) -> dict[str, Any]:
    """What must be refused, and clients that leave. Statuses seen, by kind of request."""

    def body(**fields: Any) -> bytes:
        return json.dumps({"model": model, "prompt": "hi", "max_tokens": 8, **fields}).encode()

    seen = {
        "malformed": {post(server, "/completions", content) for content in (b"", b"{", b"[]", b"\xff", b"{}", body(prompt=3), body(n=2))},
        "not_json": {post(server, "/completions", body(), "text/plain")},
        "huge_prompt": {post(server, "/completions", body(prompt="long " * 100_000)), post(server, "/completions", body(max_tokens=10**9))},
        "one_endless_word": {post(server, "/completions", body(prompt="a" * 500_000))},
        "too_large": {post(server, "/completions", body(prompt="x" * (2 << 20)))},
        "unknown_model": {post(server, "/completions", body(model="nobody"))},
        "unknown_path": {post(server, "/nowhere", body())},
    }
    with socket.create_connection(server.address, timeout=END_S) as connection:
        connection.sendall(b"\x16\x03\x01 no HTTP at all\r\n\r\n")
        seen["no_http"] = {int(connection.recv(64).split()[1])}
    for i in range(rounds):
        leave(server, body(stream=True, max_tokens=64), after_first_bytes=i % 2 == 0)
        leave(server, body(max_tokens=64), after_first_bytes=False)
    deadline = time.monotonic() + END_S
    while (busy := server.metric("edgeq_generations_active") + server.metric("edgeq_generations_queued")) and time.monotonic() < deadline:
        time.sleep(0.1)
    return {"statuses": {name: sorted(statuses) for name, statuses in seen.items()}, "left": 2 * rounds, "busy_slots": busy}


def leave(server: Server, body: bytes, *, after_first_bytes: bool) -> None:
    """Send a request and hang up."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(server.address, timeout=END_S) as connection:
        connection.sendall(head.encode() + body)
        if after_first_bytes:
            connection.recv(1)


def ends_well(server: Server, key: Key, expected: str, *, tokens: int) -> bool:
    """Whether an answer that runs when the server is told to end is finished, and the server then ends with status 0."""
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, client, key, tokens=tokens, stream=True)
        time.sleep(0.02)
        status = server.end()
        return status == 0 and running.result().text == expected


def tiny_package(folder: Path) -> Path:
    """A package of a random model with two random adapters."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_served import served_package

    return served_package(folder / "tiny")


MUST = {
    "no_http": [400],
    "malformed": [400],
    "not_json": [400],
    "huge_prompt": [400],
    "one_endless_word": [400],
    "too_large": [413],
    "unknown_model": [404],
}


def measure(package: Path, arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """All results, and what is not as it must be."""
    options = ["--slots", str(arguments.slots)] + (["--threads", str(arguments.threads)] if arguments.threads else [])
    with serving(package, *options) as server:
        with server.client() as client:
            models = [model.id for model in client.models.list()]
            keys = [(model, prompt, chat) for model in models for prompt in PROMPTS[: arguments.prompts] for chat in (False, True)]
            expected = {key: ask(client, key, tokens=arguments.tokens, stream=False).text for key in keys}
        differ = len({tuple(expected[key] for key in keys if key[0] == model) for model in models})
        rss = {"load": [server.rss()], "abuse": []}
        loads = []
        for _ in range(2):
            loads.append(load(server, expected, n_requests=arguments.requests, n_clients=arguments.clients, tokens=arguments.tokens))
            rss["load"].append(server.rss())
        while len(rss["abuse"]) < 2 or (len(rss["abuse"]) < ABUSES and _growth(rss["abuse"]) > GROWTH_LIMIT):
            abused = abuse(server, models[0])
            rss["abuse"].append(server.rss())
        ended = ends_well(server, keys[0], expected[keys[0]], tokens=arguments.tokens)
    results = {"models": models, "slots": arguments.slots, "loads": loads, "rss_bytes": rss, "abuse": abused, "ended_well": ended}
    missed = [f"{load['wrong']} answers differ from the single client's, first {load['first_wrong']}" for load in loads if load["wrong"]]
    missed += [f"{name}: {abused['statuses'][name]}, not {want}" for name, want in MUST.items() if abused["statuses"][name] != want]
    if differ != len(models):
        missed.append("two models give the same texts, so that mixing them up would not show")
    for what, taken in rss.items():
        if _growth(taken) > GROWTH_LIMIT:
            missed.append(f"memory grew by {_growth(taken)} bytes during the last {what}, as it did before")
    if abused["busy_slots"]:
        missed.append(f"{abused['busy_slots']:g} slots are taken although every client has left")
    if not ended:
        missed.append("the server did not finish its last answer and end with status 0")
    return results, missed


def _growth(rss: list[int]) -> int:
    """In the last round."""
    return rss[-1] - rss[-2]


def show(results: dict[str, Any]) -> None:
    print(f"models: {', '.join(results['models'])}; {results['slots']} slots")
    for i, loaded in enumerate(results["loads"], 1):
        answer, first = loaded["answer_s"], loaded["first_text_s"]
        print(
            f"load {i}: {loaded['requests']} requests from {loaded['clients']} clients, {loaded['wrong']} wrong; "
            f"answer p50 {answer['p50']:.3f} s, p99 {answer['p99']:.3f} s; first text p50 {first['p50']:.3f} s, p99 {first['p99']:.3f} s; "
            f"{loaded['requests_per_s']:.1f} requests/s, {loaded['tokens_per_s']:.0f} tokens/s"
        )
    for what, taken in results["rss_bytes"].items():
        print(f"rss {'before and ' if what == 'load' else ''}after each {what}: {', '.join(f'{n / 2**20:.1f}' for n in taken)} MiB")
    print(f"abuse: {results['abuse']['statuses']}; {results['abuse']['left']} clients left, {results['abuse']['busy_slots']:g} slots taken")
    print(f"ended well: {results['ended_well']}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("package", type=Path, nargs="?")
    what.add_argument("--tiny", action="store_true")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        package = tiny_package(Path(folder)) if arguments.tiny else arguments.package
        results, missed = measure(package, arguments)
    show(results)
    for what_missed in missed:
        print(f"MISSED: {what_missed}")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({**results, "missed": missed}, indent=1, ensure_ascii=False))
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
