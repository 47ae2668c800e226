"""`edgeq serve` as a process, as the official `openai` client meets it: answers beside those of a session, refusals, load, the end."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from tiny_served import served_package

import edgeq
from edgeq.errors import UsageError
from edgeq.runtime.server import serving as server_module
from edgeq.runtime.server.serving import ServerSettings, listen, url_of

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve.py"
KEY = "a long and secret key"
CHAT = [{"role": "user", "content": "Where is the harbour?"}]
PROMPT = "The harbour lights"


@pytest.fixture(scope="module")
def script():
    """benchmarks/serve.py, which knows how to start a server."""
    spec = importlib.util.spec_from_file_location("serve_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return served_package(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def server(script, package):
    """A server of a cut package that wants a key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEQ_API_KEY", KEY)
        with script.serving(package, "--threads", "1", "--rate", "0.2", "--name", "m") as running:
            patch.undo()
            yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0, timeout=30) as made:
        yield made


@pytest.fixture(scope="module")
def session(package):
    with edgeq.load(package, threads=1, rate=0.2) as opened:
        yield opened


def test_what_it_says_when_it_is_ready(server):
    assert server.line == f"Serving m, m:poems, m:sql at {server.url}\n"
    assert server.url.startswith("http://127.0.0.1:")


def test_models(client):
    assert [model.id for model in client.models.list()] == ["m", "m:poems", "m:sql"]
    assert client.models.retrieve("m:sql").meta == {"n_ctx": 128, "rate": 0.2}


def test_answers_are_those_of_a_session(client, session):
    texts = set()
    for model, adapter in (("m", None), ("m:sql", "sql"), ("m:poems", "poems"), ("m", None)):
        session.set_adapter(adapter)
        wanted = session.generate(PROMPT, max_tokens=12)
        got = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
        assert got.choices[0].text == wanted.text
        assert got.choices[0].finish_reason == wanted.finish_reason
        assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (wanted.timings.prompt_tokens, len(wanted.tokens))
        texts.add(wanted.text)
        wanted = session.chat(CHAT, max_tokens=12)
        chat = client.chat.completions.create(model=model, messages=CHAT, max_completion_tokens=12, temperature=0)
        assert chat.choices[0].message.content == wanted.text
        assert chat.choices[0].message.role == "assistant"
    assert len(texts) == 3, "the adapters change the answer"


def test_draws_are_those_of_a_session(client, session):
    session.set_adapter("sql")
    options = {"max_tokens": 12, "temperature": 0.9, "top_p": 0.8, "seed": 11}
    wanted = session.generate(PROMPT, top_k=40, min_p=0.01, stop=["q"], **options)
    got = client.completions.create(model="m:sql", prompt=PROMPT, stop=["q"], extra_body={"top_k": 40, "min_p": 0.01}, **options)
    assert got.choices[0].text == wanted.text
    ids = session.model.tokenize(PROMPT, add_special=True)
    assert client.completions.create(model="m:sql", prompt=ids, max_tokens=4, temperature=0).usage.prompt_tokens == len(ids)


def test_streams(client, session):
    session.set_adapter("poems")
    wanted = session.chat(CHAT, max_tokens=12)
    with client.chat.completions.create(
        model="m:poems", messages=CHAT, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == wanted.text
    assert len(pieces) > 4, "it comes piece by piece"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == wanted.finish_reason
    assert chunks[-1].usage.completion_tokens == len(wanted.tokens)


def test_refusals_are_the_client_s_own_exceptions(server, client):
    with pytest.raises(openai.NotFoundError, match=r"no model is named 'm:code'\. There are: m, m:poems, m:sql"):
        client.chat.completions.create(model="m:code", messages=CHAT)
    with pytest.raises(openai.BadRequestError, match="does not fit the context of 128 tokens") as caught:
        client.completions.create(model="m", prompt="long " * 500)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="n: this server does not support it") as caught:
        client.chat.completions.create(model="m", messages=CHAT, n=2)
    assert caught.value.param == "n"
    with pytest.raises(openai.BadRequestError, match="logprobs: this server does not support it"):
        client.chat.completions.create(model="m", messages=CHAT, logprobs=True)
    with pytest.raises(openai.BadRequestError, match="the prompt is empty"):
        client.completions.create(model="m", prompt=[])
    with pytest.raises(openai.BadRequestError, match="token"):
        client.completions.create(model="m", prompt=[10**9])
    with (
        openai.OpenAI(base_url=server.url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError, match="this server wants its API key"),
    ):
        stranger.models.list()


def test_load_abuse_and_the_end(script, package):
    arguments = argparse.Namespace(requests=48, clients=16, tokens=12, prompts=2, slots=3, threads=1)
    results, missed = script.measure(package, arguments)
    assert missed == []
    assert [loaded["requests"] for loaded in results["loads"]] == [48, 48]
    assert results["abuse"]["statuses"]["unknown_path"] == [404]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_its_last_answer(script, package, number):
    with script.serving(package, "--threads", "1", "--slots", "1") as server, server.client() as client:
        chunks = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=100, temperature=0, stream=True)
        first = next(iter(chunks))
        server.process.send_signal(number)
        rest = list(chunks)
        assert server.process.wait(20) == 0
    assert first.choices[0].finish_reason is None
    assert rest[-1].choices[0].finish_reason is not None


def test_a_port_that_is_taken(run, package):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, out, err = run("serve", package, "--port", port)
    assert (status, out) == (2, "")
    assert f"cannot listen on 127.0.0.1:{port}: " in err
    assert "--port 0 takes a free one" in err


def test_a_host_that_is_none():
    with pytest.raises(UsageError, match=r"cannot listen on 192\.0\.2\.1:0: "):
        listen("192.0.2.1", 0)


def test_addresses():
    with listen("127.0.0.1", 0) as listening:
        assert url_of(listening) == f"http://127.0.0.1:{listening.getsockname()[1]}/v1"


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_an_address_of_ipv6():
    with listen("::1", 0) as listening:
        assert url_of(listening) == f"http://[::1]:{listening.getsockname()[1]}/v1"


def test_an_open_door_is_told(run, package, monkeypatch):
    seen = []
    monkeypatch.setattr(server_module, "serve", lambda session, settings, listening, on_ready: seen.append(settings) or on_ready())
    status, out, err = run("serve", package, "--host", "0.0.0.0", "--port", "0", "--name", "x", "--rate", "0.1", "--slots", "2")
    assert status == 0
    assert err == "warning: 0.0.0.0 is open to other computers, and no --api-key is set\nStopped.\n"
    assert out.startswith("Serving x, x:poems, x:sql at http://0.0.0.0:")
    assert seen == [ServerSettings(name="x", slots=2)]
    status, _, err = run("serve", package, "--host", "0.0.0.0", "--port", "0", "--api-key", "k")
    assert (status, err) == (0, "Stopped.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rate", "much"), "'much' is neither a number nor auto."),
        (("--timeout", "0"), "0.0 is not a number of seconds above 0."),
        (("--grace", "nan"), "nan is not a number of seconds above 0."),
        (("--name", ""), "the name of the model is empty. Give --name."),
        (("--api-key", " "), "the API key is empty. Leave it out, or give one."),
    ],
)
def test_bad_options(run, package, arguments, message):
    status, out, err = run("serve", package, *arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_without_its_libraries_it_says_how_to_get_them(package):
    code = "import sys; sys.modules['uvicorn'] = None; from edgeq.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "serve", package], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: uvicorn is not installed. Install it with: pip install 'edgeq[server]'\n"
