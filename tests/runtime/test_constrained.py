"""Answers that are held to a grammar or a JSON schema, end at tokens, or are cancelled from another thread."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from onnx_folders import write_tiny_onnx
from tiny_gguf import write_tiny_gguf

from edgeq.errors import UsageError
from edgeq.runtime.batcher import Batcher
from edgeq.runtime.session import Session, load

PROMPT = "the quick brown"
DIGITS = 'root ::= [0-9] [0-9] "-" [a-c]+ "."'
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2, 3]}}, "required": ["ok", "n"]}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with load(write_tiny_gguf(tmp_path_factory.mktemp("constrained") / "tiny.gguf"), n_ctx=256, threads=1) as opened:
        yield opened


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "seed": 3}])
def test_a_grammar_is_followed(session: Session, options: dict[str, float]) -> None:
    text = session.generate(PROMPT, grammar=DIGITS, max_tokens=40, **options).text
    assert re.match(r"[0-9]{2}-[a-c]+\.?$", text), text
    assert not re.match(r"[0-9]", session.generate(PROMPT, max_tokens=4).text)


def test_a_json_schema_is_followed(session: Session) -> None:
    found = session.generate(PROMPT, json_schema=SCHEMA, max_tokens=100)
    assert found.finish_reason == "stop"
    value = json.loads(found.text)
    assert isinstance(value["ok"], bool)
    assert value["n"] in (1, 2, 3)
    with Batcher(session, slots=2) as batcher:
        together = [batcher.submit(PROMPT, json_schema=SCHEMA, max_tokens=100) for _ in range(2)]
        assert [job.result(timeout=60).text for job in together] == [found.text] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grammar": 'root ::= "a'}, "line 1 of the grammar"),
        ({"grammar": "root ::= root"}, "can begin with itself"),
        ({"grammar": 'root ::= "a"?*'}, "llama.cpp does not take the grammar. It said: unsupported grammar, left recursion"),
        ({"grammar": "  "}, "the grammar is empty"),
        ({"json_schema": {"type": "gibberish"}}, "cannot be made a grammar"),
        ({"json_schema": {"$ref": "https://example.org/x.json"}}, "cannot be made a grammar"),
        ({"grammar": DIGITS, "json_schema": SCHEMA}, "can follow one of them"),
    ],
)
def test_what_is_no_grammar_is_refused(session: Session, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        session.generate(PROMPT, max_tokens=4, **options)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3, "top_k": 5, "top_p": 0.5, "min_p": 0.1}])
def test_a_grammar_that_allows_no_token_ends_its_answer_alone(session: Session, options: dict[str, float]) -> None:
    dead = 'root ::= "quick" [b-a]'
    stream = session.stream(PROMPT, grammar=dead, max_tokens=20, **options)
    pieces = []
    with pytest.raises(UsageError, match="no token of the vocabulary can go on as the grammar wants"):
        pieces.extend(stream)
    assert "".join(pieces) == "quick"
    alone = session.generate(PROMPT, grammar=DIGITS, max_tokens=20).text
    with Batcher(session, slots=3) as batcher:
        jobs = [batcher.submit(PROMPT, grammar=grammar, max_tokens=20) for grammar in (dead, DIGITS, "root ::= [b-a]")]
        for job in (jobs[0], jobs[2]):
            with pytest.raises(UsageError, match="no token of the vocabulary"):
                job.result(timeout=60)
        assert jobs[1].result(timeout=60).text == alone


def test_an_answer_ends_where_its_grammar_does(session: Session) -> None:
    found = session.generate(PROMPT, grammar='root ::= "the" | "they"', max_tokens=20, temperature=5.0, seed=1)
    assert found.text in ("the", "they")
    assert found.finish_reason == "stop"


@pytest.mark.parametrize("temperature", [1e-38, 1e-30, 1e30])
def test_logits_beyond_float32_leave_the_grammar_in_force(session: Session, temperature: float) -> None:
    """llama.cpp then draws the last token of the vocabulary, or any."""
    text = session.generate(PROMPT, grammar="root ::= [0-9]+", max_tokens=10, temperature=temperature, seed=1).text
    assert re.fullmatch("[0-9]+", text), text


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_k": 12, "top_p": 0.9, "min_p": 0.01, "seed": 0}])
def test_a_grammar_that_allows_all_changes_no_choice(session: Session, options: dict[str, float]) -> None:
    """The oracle is llama.cpp's own sampling."""
    free = session.generate(PROMPT, max_tokens=12, **options)
    assert "\ufffd" not in free.text  # bytes that are no character are not in `.`
    assert session.generate(PROMPT, grammar="root ::= .*", max_tokens=12, **options).tokens == free.tokens


def test_onnx_runtime_has_no_grammars(tmp_path: Path) -> None:
    write_tiny_onnx(tmp_path / "tiny")
    with load(tmp_path / "tiny", n_ctx=64, threads=1) as session, pytest.raises(UsageError, match="cannot hold answers to a grammar"):
        session.generate(PROMPT, grammar=DIGITS)


def test_stop_tokens_end_an_answer(session: Session) -> None:
    whole = session.generate(PROMPT, max_tokens=10).tokens
    found = session.generate(PROMPT, max_tokens=10, stop_tokens=whole[5:6])
    assert found.tokens == whole[: whole.index(whole[5])]
    assert found.finish_reason == "stop"
    with pytest.raises(UsageError, match="vocabulary"):
        session.generate(PROMPT, stop_tokens=[10**6])


def test_a_stream_is_cancelled_from_another_thread(session: Session) -> None:
    stream = session.stream(PROMPT)
    pieces = [next(stream)]
    thread = threading.Thread(target=stream.cancel)
    thread.start()
    thread.join()
    pieces += stream
    assert stream.completion is not None
    assert stream.completion.finish_reason == "cancelled"
    assert stream.completion.text == "".join(pieces)
    assert len(stream.completion.tokens) < 200
    again = session.generate(PROMPT, max_tokens=3)
    assert again.finish_reason == "length"
