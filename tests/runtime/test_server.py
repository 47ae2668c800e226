"""The server's shapes and errors, over a fake batcher: what the API's documents promise, and what bad requests get."""

import asyncio
import contextlib
import json
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from server_fakes import KEY, FakeJob, Served, events_of

from edgeq.errors import RuntimeFailure, UnsupportedError
from edgeq.runtime.server.metrics import Counter, Histogram
from edgeq.runtime.server.schemas import ChatRequest, CompletionRequest, refusal
from edgeq.runtime.server.serving import EndingServer, listen, url_of


@pytest.fixture
def served():
    return Served()


def error(response, status):
    assert response.status_code == status, response.text
    said = response.json()["error"]
    assert said.keys() == {"message", "type", "param", "code"}
    return said


def test_a_chat(served):
    response = served.chat(max_completion_tokens=5, seed=-1)
    body = response.json()
    assert response.status_code == 200
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"]) == ("chat.completion", "m")
    assert body["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "Hello", "refusal": None}, "logprobs": None, "finish_reason": "stop"}
    ]
    assert body["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    [asked] = served.engine.asked
    assert asked == {
        "prompt": [2],
        "adapter": None,
        "max_tokens": 5,
        "temperature": 1.0,
        "top_k": None,
        "top_p": None,
        "min_p": None,
        "seed": 2**32 - 2,
        "stop": [],
    }


def test_a_completion_with_an_adapter_and_every_option(served):
    response = served.complete(
        model="m:sql", prompt=["hi"], max_tokens=3, temperature=0, top_p=0.5, top_k=4, min_p=0.1, seed=9, stop="x", user="someone", n=1
    )
    body = response.json()
    assert (body["object"], body["model"], body["choices"][0]["text"]) == ("text_completion", "m:sql", "Hello")
    assert body["choices"][0]["finish_reason"] == "stop"
    options = {"max_tokens": 3, "temperature": 0, "top_p": 0.5, "top_k": 4, "min_p": 0.1, "seed": 9, "stop": "x"}
    assert served.engine.asked == [{"prompt": "hi", "adapter": "sql", **options}]


def test_defaults_of_the_api(served):
    served.complete(prompt=[1, 2])
    served.complete(prompt=[[3, 4]], stop=None, n=None)
    served.chat()
    assert [asked["max_tokens"] for asked in served.engine.asked] == [16, 16, None]
    assert [asked["prompt"] for asked in served.engine.asked[:2]] == [[1, 2], [3, 4]]
    assert {asked["temperature"] for asked in served.engine.asked} == {1.0}


def test_messages_reach_the_template_as_it_knows_them():
    served, seen = Served(), []
    served.generations.render = lambda conversation: seen.append(conversation) or [1]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts, "name": "Ann", "refusal": None}]
    assert served.chat(messages=messages).status_code == 200
    assert seen == [[{"role": "system", "content": "be brief"}, {"role": "user", "content": "ab", "name": "Ann"}]]


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "integer"}}}, {"type": "integer"}),
    ],
)
def test_a_response_format_is_a_schema(served, response_format, schema):
    assert served.chat(response_format=response_format).status_code == 200
    assert served.engine.asked[0].get("json_schema") == schema


def test_a_streamed_chat(served):
    response = served.chat(stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks, done = events_of(response.text)
    assert done
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo"}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 4
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 9


def test_a_streamed_completion_without_usage(served):
    chunks, done = events_of(served.complete(stream=True).text)
    assert done
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Hel", "lo", ""]
    assert not any("usage" in chunk for chunk in chunks)


def test_an_answer_without_text_is_streamed_too(served):
    served.engine.make = lambda: FakeJob([])
    chunks, done = events_of(served.chat(stream=True).text)
    assert done
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, "stop"]


def test_models(served):
    listed = served.call("GET", "/v1/models").json()
    assert [card["id"] for card in listed["data"]] == ["m", "m:sql"]
    assert listed["data"][0] == {
        "id": "m",
        "object": "model",
        "created": 1700000000,
        "owned_by": "edgeq",
        "meta": {"n_ctx": 100, "rate": 0.2},
    }
    assert served.call("GET", "/v1/models/m:sql").json()["id"] == "m:sql"
    assert error(served.call("GET", "/v1/models/gone"), 404)["message"] == "no model is named 'gone'. There are: m, m:sql"


def test_the_description_of_the_endpoints(served):
    document = served.call("GET", "/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"} <= document["paths"].keys()
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"model", "messages", "max_completion_tokens", "response_format", "top_k"} <= fields.keys()


BAD = [
    ({"model": "gpt"}, 404, "model", "no model is named 'gpt'. There are: m, m:sql"),
    ({"model": None}, 400, "model", "model: missing; it is required"),
    ({"model": 3}, 400, "model", "model: Input should be a valid string"),
    ({"n": 2}, 400, "n", "n: this server does not support it. Leave it out or give 1."),
    ({"logprobs": True}, 400, "logprobs", "logprobs: this server does not support it. Leave it out or give False."),
    ({"logprobs": 0}, 400, "logprobs", "logprobs: this server does not support it. Leave it out or give False."),
    ({"top_logprobs": 3}, 400, "top_logprobs", "top_logprobs: this server does not support it. Leave it out."),
    ({"tools": [{}]}, 400, "tools", "tools: this server does not support it. Leave it out or give []."),
    ({"temprature": 1}, 400, "temprature", "temprature: this server does not know this parameter. Leave it out."),
    ({"temperature": 2.5}, 400, "temperature", "temperature: Input should be less than or equal to 2"),
    ({"temperature": "1"}, 400, "temperature", "temperature: Input should be a valid number"),
    ({"top_p": 1.5}, 400, "top_p", "top_p: Input should be less than or equal to 1"),
    ({"max_tokens": 0}, 400, "max_tokens", "max_tokens: Input should be greater than or equal to 1"),
    ({"max_tokens": True}, 400, "max_tokens", "max_tokens: Input should be a valid integer"),
    ({"stop": [""]}, 400, "stop", "stop: .*0: String should have at least 1 character"),
    ({"stop": ["x"] * 17}, 400, "stop", "stop: .*List should have at most 16 items"),
    ({"stream_options": {"x": 1}}, 400, "stream_options", "stream_options: x: Extra inputs are not permitted"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format", "response_format: a json_schema belongs to type json_schema"),
    ({"response_format": {"type": "xml"}}, 400, "response_format", "response_format: type: Input should be 'text', 'json_object' or"),
]


@pytest.mark.parametrize(("fields", "status", "param", "message"), BAD)
@pytest.mark.parametrize("endpoint", ["chat", "complete"])
def test_bad_fields(served, endpoint, fields, status, param, message):
    said = error(getattr(served, endpoint)(**fields), status)
    assert said["param"] == param
    assert re.match(message if ".*" in message else re.escape(message), said["message"]), said["message"]
    assert said["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert served.engine.asked == []


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: List should have at least 1 item"),
        ("hi", "messages: Input should be a valid list"),
        ([{"role": "tool", "content": "x"}], "messages: 0.role: Input should be 'system', 'developer', 'user' or 'assistant'"),
        ([{"role": "user"}], "messages: 0.content: Field required"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "type: Input should be 'text'"),
    ],
)
def test_bad_messages(served, messages, message):
    said = error(served.chat(messages=messages), 400)
    assert message in said["message"]
    assert said["param"] == "messages"


@pytest.mark.parametrize("prompt", [[], ["a", "b"], [[1], [2]], 3, [1.5], [True]])
def test_bad_prompts(served, prompt):
    """The batcher refuses an empty one; all others never get there."""
    response = served.complete(prompt=prompt)
    if prompt == []:
        assert served.engine.asked[0]["prompt"] == []
    else:
        assert error(response, 400)["param"] == "prompt"
        assert served.engine.asked == []


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"{", "application/json", "the body is not JSON: "),
        (b"", "application/json", "the body has to be a JSON object, sent as application/json"),
        (b"[1]", "application/json", "the body has to be a JSON object, sent as application/json"),
        (b'"x"', "application/json", "the body has to be a JSON object, sent as application/json"),
        (b'{"model": "m", "prompt": "hi"}', "text/plain", "the body has to be a JSON object, sent as application/json"),
        (b"\xff\xfe", "application/json", "the body is not JSON: "),
        (b"[" * 4000, "application/json", ""),
        (b'{"model": "m", "prompt": "hi", "temperature": NaN}', "application/json", "temperature: Input should be a finite number"),
        (b'{"model": "m", "prompt": "\\ud800"}', "application/json", "the body holds a lone surrogate (\\ud800 to \\udfff)"),
        (b'{"model": "m", "prompt": "hi", "\\udfff": 1}', "application/json", "the body holds a lone surrogate"),
    ],
)
def test_malformed_bodies(served, content, kind, message):
    said = error(served.call("POST", "/v1/completions", content=content, headers={"Content-Type": kind}), 400)
    assert said["message"].startswith(message)
    assert served.engine.asked == []


def test_unknown_paths_and_methods(served):
    assert "Endpoints: /v1/chat/completions" in error(served.call("GET", "/v2"), 404)["message"]
    response = served.call("GET", "/v1/completions")
    assert error(response, 405)["message"].startswith("Method Not Allowed")
    assert response.headers["allow"] == "POST"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, "n", "logprobs", "tools", "user"})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(st.characters(), max_size=5), JSON, max_size=4), st.booleans())
def test_any_body_is_taken_or_refused_in_words(fields, chat):
    good = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    try:
        taken = (ChatRequest if chat else CompletionRequest).model_validate({"model": "m", **good, **fields})
    except ValidationError as err:
        said = refusal([{**found, "loc": ("body", *found["loc"])} for found in err.errors()])  # as FastAPI hands them on
        assert said.status == 400
        assert said.param is None or said.param in {*fields, *FIELDS}
        assert said.message.isprintable() or said.param in fields
        json.dumps(said.to_json(), ensure_ascii=False, allow_nan=False).encode()
    else:
        options = taken.options()
        assert options["seed"] is None or 0 <= options["seed"] <= 2**32 - 2
        assert all(options["stop"])


def test_a_prompt_that_does_not_fit(served):
    for stream in (False, True):
        said = error(served.complete(prompt="x" * 101, stream=stream), 400)
        assert said["code"] == "context_length_exceeded"
        assert "does not fit the context of 100 tokens" in said["message"]


def test_what_the_runtime_cannot_do_is_the_request_s_fault(served):
    def submit(prompt, **options):
        raise UnsupportedError("this runtime has no grammars")

    served.engine.submit = submit
    assert error(served.complete(grammar="root ::= x"), 400)["message"] == "this runtime has no grammars"


def test_a_schema_nested_too_deeply_is_the_request_s_fault(served):
    def submit(prompt, **options):
        raise RecursionError

    served.engine.submit = submit
    assert error(served.complete(), 400)["message"] == "the request is nested too deeply"


@pytest.mark.parametrize("broken", [RuntimeFailure("/home/me/model.gguf: decode failed"), ValueError("secret")])
def test_a_failure_inside_is_a_500_that_tells_nothing(served, broken, caplog):
    served.engine.make = lambda: FakeJob([], broken=broken)
    for stream in (False, True):
        said = error(served.chat(stream=stream), 500)
        assert said == {
            "message": "the server failed to answer; its log says why",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
    assert str(broken) in caplog.text
    assert not served.generations.busy


def test_a_failure_while_building_the_prompt(served, caplog):
    def render(conversation):
        raise ZeroDivisionError("oops")

    served.generations.render = render
    assert error(served.chat(), 500)["code"] == "internal_error"
    assert "oops" in caplog.text


def test_a_failure_in_mid_stream_is_its_last_event(served):
    served.engine.make = lambda: FakeJob(["He"], broken=RuntimeFailure("died"))
    chunks, done = events_of(served.chat(stream=True).text)
    assert not done
    assert chunks[1]["choices"][0]["delta"] == {"content": "He"}
    assert chunks[-1]["error"]["type"] == "server_error"


def test_keys():
    served = Served(api_key=KEY)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}):
        response = served.call("GET", "/v1/models", headers=headers)
        said = error(response, 401)
        assert (said["type"], said["code"]) == ("authentication_error", "invalid_api_key")
        assert said["message"] == "this server wants its API key, as `Authorization: Bearer KEY`"
        assert response.headers["www-authenticate"] == "Bearer"
    assert served.call("GET", "/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    assert served.call("GET", "/health").status_code == 200
    assert served.call("GET", "/metrics").status_code == 401


def test_bodies_that_are_too_large(served):
    said = error(served.complete(prompt="x" * 5000), 413)
    assert said["message"] == "the body is larger than the 4096 bytes that this server takes"
    assert said["code"] == "request_too_large"
    # Without an announced length, as it arrives.
    part = {"type": "http.request", "body": b"x" * 1500, "more_body": True}
    status, body = served.converse([part, part, part, {**part, "more_body": False}])
    assert status == 413
    assert json.loads(body)["error"]["code"] == "request_too_large"


def test_a_body_that_does_not_arrive():
    served = Served(arrival_s=0.05)
    status, body = served.converse([{"type": "http.request", "body": b"{", "more_body": True}])
    assert status == 408
    assert json.loads(body)["error"]["message"] == "the body did not arrive within 0.05 s"


def test_a_full_queue(served):
    served.engine.make = lambda: None
    response = served.chat()
    said = error(response, 429)
    assert (said["code"], said["type"]) == ("queue_full", "rate_limit_error")
    assert said["message"] == "every slot is taken and the queue is full. Try again in 1 s."
    assert response.headers["retry-after"] == "1"


def test_more_requests_than_may_wait_are_refused_before_their_bodies_are_read(served):
    served.engine.make = lambda: FakeJob(["x"], hold=0)
    body = {"model": "m", "prompt": "hi"}

    async def work(client):
        waiting = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(4)]
        while len(served.engine.jobs) < 4:
            await asyncio.sleep(0.005)
        refused = await client.post("/v1/completions", json=body)
        health = await client.get("/health")
        for job in served.engine.jobs:
            job.go.set()
        return refused, health, [await task for task in waiting]

    refused, health, answers = served.run(work)
    assert error(refused, 429)["code"] == "queue_full"
    assert health.status_code == 200
    assert [answer.status_code for answer in answers] == [200] * 4
    assert not served.generations.busy


def test_a_request_that_takes_too_long():
    served = Served(timeout_s=0.1)
    served.engine.make = lambda: FakeJob(["a", "b"], hold=0)
    for stream in (False, True):
        said = error(served.chat(stream=stream), 504)
        assert said["type"] == "timeout_error"
        assert said["message"].startswith("no whole answer within 0.1 s, waiting included.")
    assert all(job.cancelled.is_set() for job in served.engine.jobs)
    served.engine.make = lambda: FakeJob(["a", "b"], hold=1)  # the first text is on its way already
    chunks, done = events_of(served.chat(stream=True).text)
    assert not done
    assert chunks[-1]["error"]["code"] == "timeout"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold", [0, 1])
def test_a_client_that_leaves_frees_its_slot(served, stream, hold):
    served.engine.make = lambda: FakeJob(["a", "b"], hold=hold)
    body = json.dumps({"model": "m", "prompt": "hi", "stream": stream}).encode()

    async def leave():
        while not served.engine.jobs:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)  # so that a stream has begun
        return {"type": "http.disconnect"}

    status, _ = served.converse([{"type": "http.request", "body": body}, leave], path="/v1/completions")
    assert status == (200 if stream and hold else 499)
    [job] = served.engine.jobs
    assert job.cancelled.is_set()
    assert job.left.wait(2)
    assert not served.generations.busy


def test_a_client_that_leaves_while_its_prompt_is_read(served):
    submit, begun = served.engine.submit, threading.Event()

    def slow(prompt, **options):
        begun.set()
        time.sleep(0.1)
        return submit(prompt, **options)

    served.engine.submit = slow
    served.engine.make = lambda: FakeJob(["a"], hold=0)

    async def leave():
        while not begun.is_set():
            await asyncio.sleep(0.005)
        return {"type": "http.disconnect"}

    async def until_submitted():
        while not served.engine.jobs:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.02)

    body = json.dumps({"model": "m", "prompt": "hi"}).encode()
    served.converse([{"type": "http.request", "body": body}, leave], path="/v1/completions", after=until_submitted)
    assert served.engine.jobs[0].cancelled.is_set()
    assert not served.generations.busy


def test_while_shutting_down(served):
    served.generations.drain()
    response = served.chat()
    assert error(response, 503)["message"] == "the server is shutting down"
    assert response.headers["retry-after"] == "5"
    health = served.call("GET", "/health")
    assert (health.status_code, health.json()) == (503, {"status": "draining"})
    assert served.call("GET", "/v1/models").status_code == 200


def test_what_runs_at_the_end_gets_an_error(served):
    served.engine.make = lambda: FakeJob(["a"], hold=0)

    async def work(client):
        waiting = asyncio.create_task(client.post("/v1/completions", json={"model": "m", "prompt": "hi"}))
        while not served.generations.running:
            await asyncio.sleep(0.005)
        served.generations.abort()
        return await waiting

    assert error(served.run(work), 503)["code"] == "shutting_down"


SAMPLE = re.compile(r'[a-z_]+(\{[a-z]+="(\\.|[^"\\\n])*"(,[a-z]+="(\\.|[^"\\\n])*")*\})? (\d+(\.\d+)?(e-?\d+)?)')


def test_metrics(served):
    served.chat()
    served.chat(model="m:sql")
    served.chat(model="nobody")
    served.call("GET", "/somewhere/else")
    served.call("GET", "/v1/models/m")
    response = served.call("GET", "/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = response.text.splitlines()
    typed = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    for line in lines:
        if not line.startswith("#"):
            assert SAMPLE.fullmatch(line), line
            assert re.split(r"[ {]", line)[0].removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") in typed, line
    for line in (
        'edgeq_http_requests_total{path="/v1/chat/completions",status="200"} 2',
        'edgeq_http_requests_total{path="/v1/chat/completions",status="404"} 1',
        'edgeq_http_requests_total{path="other",status="404"} 1',
        'edgeq_http_requests_total{path="/v1/models",status="200"} 1',
        'edgeq_generations_total{end="stop",model="m:sql"} 1',
        'edgeq_tokens_total{kind="prompt",model="m"} 7',
        'edgeq_tokens_total{kind="completion",model="m"} 2',
        "edgeq_generations_active 2",
        "edgeq_generations_queued 3",
        "edgeq_generation_seconds_count 2",
        'edgeq_first_text_seconds_bucket{le="+Inf"} 2',
    ):
        assert line in lines


def test_a_histogram_counts_into_the_bucket_that_holds_the_value():
    histogram = Histogram("h", "help", (0.5, 1.0))
    assert histogram.mean is None
    for seconds in (0.5, 0.6, 7.0):
        histogram.observe(seconds)
    assert histogram.lines() == [
        "# HELP h help",
        "# TYPE h histogram",
        'h_bucket{le="0.5"} 1',
        'h_bucket{le="1"} 2',
        'h_bucket{le="+Inf"} 3',
        "h_sum 8.1",
        "h_count 3",
    ]


def test_labels_are_escaped():
    counter = Counter("c", "help")
    counter.add(model='a"b\\c\nd')
    assert counter.lines()[-1] == 'c{model="a\\"b\\\\c\\nd"} 1'


def test_the_wait_that_a_429_advises_grows_with_the_queue(served):
    assert served.generations.retry_after_s() == 1
    served.generations.seconds.observe(10.0)
    served.generations.running = set(range(4))
    assert served.generations.retry_after_s() == 10
    served.generations.seconds.observe(1000.0)
    assert served.generations.retry_after_s() == 60


def test_closing_closes_the_batcher(served):
    served.generations.close()
    assert served.engine.closed


@contextlib.contextmanager
def listening(served, *, grace_s):
    """The application behind a real socket, in a thread: (server, address). Signals are calls of server.handle_exit."""
    ready = threading.Event()
    config = uvicorn.Config(served.app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1)
    server = EndingServer(config, served.generations, grace_s=grace_s, on_ready=ready.set)
    with listen("127.0.0.1", 0) as door:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]})
        thread.start()
        assert ready.wait(10)
        try:
            yield server, url_of(door).removesuffix("/v1"), thread
        finally:
            for job in served.engine.jobs:
                job.go.set()
            server.should_exit = server.force_exit = True
            thread.join(10)
            assert not thread.is_alive()


def running_request(served, url, pool):
    """A completion that holds its slot until it is let go."""
    answer = pool.submit(httpx2.post, f"{url}/v1/completions", json={"model": "m", "prompt": "hi"}, timeout=20)
    while not served.generations.running:
        time.sleep(0.005)
    return answer


def test_told_to_end_it_finishes_what_runs_and_refuses_the_rest(served):
    served.engine.make = lambda: FakeJob(["a"], hold=0)
    with listening(served, grace_s=60) as (server, url, thread), ThreadPoolExecutor(1) as pool:
        running = running_request(served, url, pool)
        server.handle_exit(signal.SIGTERM, None)
        refused = httpx2.post(f"{url}/v1/completions", json={"model": "m", "prompt": "hi"})
        assert error(refused, 503)["code"] == "shutting_down"
        assert httpx2.get(f"{url}/health").status_code == 503
        served.engine.jobs[0].go.set()
        assert running.result().json()["choices"][0]["text"] == "a"
        thread.join(10)
        assert not thread.is_alive()


def test_what_does_not_end_in_time_is_ended(served):
    served.engine.make = lambda: FakeJob(["a"], hold=0)
    with listening(served, grace_s=0.2) as (server, url, thread), ThreadPoolExecutor(1) as pool:
        running = running_request(served, url, pool)
        server.handle_exit(signal.SIGTERM, None)
        assert error(running.result(), 503)["message"] == "the server is shutting down"
        thread.join(10)
        assert not thread.is_alive()
    assert served.engine.jobs[0].cancelled.is_set()


def test_a_second_signal_ends_it_at_once(served):
    served.engine.make = lambda: FakeJob(["a"], hold=0)
    with listening(served, grace_s=1000) as (server, url, thread), ThreadPoolExecutor(1) as pool:
        running = running_request(served, url, pool)
        server.handle_exit(signal.SIGINT, None)
        server.handle_exit(signal.SIGINT, None)
        thread.join(10)
        assert not thread.is_alive()
        with pytest.raises(httpx2.HTTPError):
            running.result().raise_for_status()
    assert served.engine.jobs[0].cancelled.is_set()
