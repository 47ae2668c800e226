"""Which grammars llama.cpp may see: every dangerous kind is refused with its place, every sound one is taken and does no harm there."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import SPECIAL_TOKENS, tiny_tokenizer
from tiny_gguf import write_tiny_gguf

from edgeq.errors import UsageError
from edgeq.runtime.grammar import check_grammar, gbnf
from edgeq.runtime.grammar_text import check_text
from edgeq.runtime.session import Session, load


def chain(n: int, link: str, last: str = '"x"') -> str:
    return "\n".join(["root ::= a0", *(f"a{i} ::= " + link.format(f"a{i + 1}") for i in range(n)), f"a{n} ::= {last}"])


DEADLY = {
    "groups in groups": ("root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000, "line 1 of the grammar: groups are nested more than 2500"),
    "a chain": (chain(100_000, "{}"), "at most 1,048,576 are read"),
    "a shorter chain": (chain(3000, "{}"), "'a500' of the grammar begins with a chain of more than 2,500 rules"),
    "paths": (chain(30, "{0} | {0}"), "can begin in more than 10,000 ways"),
    "hidden left recursion": ('root ::= a root "x" | "y"\na ::= e\ne ::= ""', "'root' of the grammar can begin with itself"),
    "a hidden loop": ('root ::= "t" b\nb ::= e b\ne ::= f\nf ::= ""', "'b' of the grammar can begin with itself"),
    "counts the wrong way": ('root ::= "b" |\n "a"{5,2}', "line 2 of the grammar: {5,2} is no count to repeat by"),
    "long literals": ('root ::= "' + "x" * 1000 + '"{2000}', "line 1 of the grammar: more than 200,000 elements"),
    "tokens after characters": ('root ::= "t" !<[5]> "x"', "line 1 of the grammar: tokens (<...>) are not taken"),
    "stacks that double": ('root ::= "(" root ")" | "(" root "]"', "'root' of the grammar can read the same text in too many ways"),
    "slowly, and behind a rule": ('root ::= "1" a\na ::= "abcdefgh" a ")" | "abcdefgh" a "]"', "'a' of the grammar can read the same"),
    "readings of a long token": ('root ::= "x" ("#" | "#"){40} "x"', "'root' of the grammar can read the same text in too many ways"),
}
FAULTY = [
    ("  \n", "the grammar is empty"),
    ('root ::= "\0"', "has a zero byte"),
    ('root ::= "\ud800"', "half a surrogate pair"),
    ('start ::= "a"', "no rule named root"),
    ('root ::= "a" b', "uses the rule 'b' and does not define it"),
    ('root ::= "b"\nroot\n::= "a"', "line 2 of the grammar: '\\n' stands where ::= after the name 'root' is expected"),
    ("root", "line 1 of the grammar: ::= is missing after the name 'root'"),
    ('= "a"', "line 1 of the grammar: '= \"a\"' is not understood"),
    ('"a"', "line 1 of the grammar: '\"a\"' stands where the name of a rule is expected"),
    ('root ::= "a', "line 1 of the grammar: '\"a' is not understood"),
    ('root ::= "a" a ::= "b"', "line 1 of the grammar: '::=' stands where a new line"),
    ('root ::= ("a"\n"b"', "line 2 of the grammar: the group that begins in line 1 is not closed"),
    ('root ::= "a" )', "')' stands where a group that it closes"),
    ('root ::= "a" | *', "'*' stands where something before it to repeat"),
    ('root ::= ""+', "'+' stands where something before it to repeat"),
    ('root ::= "\\q"', "has an escape that GBNF has not"),
    ('root ::= "\\U00110000"', "U00110000 is no character"),
    ('root ::= "a"{2001}', "{2001} repeats too often: more than 2000"),
    ('root ::= "a"{' + "9" * 9999 + "}", "repeats too often"),
    ('root ::= (("a" "b"){1,50} "c"){1,50}', "repeats too often: more than 2000 times the groups in it"),
    ("root ::= root", "'root' of the grammar can begin with itself"),
    ('root ::= a "x"\na ::= root | "b"', "can begin with itself"),
]
SOUND = {
    "arithmetic": 'root ::= (expr "=" ws term "\\n")+\nexpr ::= term ([-+*/] term)*\nterm ::= ident | num | "(" ws expr ")" ws\n'
    "ident ::= [a-z] [a-z0-9_]* ws\nnum ::= [0-9]+ ws\nws ::= [ \\t\\n]*",
    "chess": 'root ::= "1. " move " " move "\\n" ([1-9] [0-9]? ". " move " " move "\\n")+\n'
    'move ::= (pawn | piece | castle) [+#]?\npiece ::= [NBKQR] [a-h]? [1-8]? "x"? [a-h] [1-8]\n'
    'pawn ::= ([a-h] "x")? [a-h] [1-8] ("=" [NBKQR])?\ncastle ::= "O-O" "-O"?',
    "japanese": "root ::= [ぁ-ゟ]+ ([、。] [ァ-ヿ]+)* # kana\n",
    "a list": 'root ::= item+\nitem ::= "- " [^\\r\\n\\x0b\\u2028]+ "\\n"',
    "line ends": 'root ::=\r\n  "a" |\r\n\r\n # what\r\n  ("b"\n|"c"\n) .\r\n\r\nx ::= [^\\]-] [] ""',
    "counts": "root ::= [a-f]{2} [0-9]{0,} [a-]{0,3000} [--/]{1,3}? [x]{0}",
    "repeated spaces": 'root ::= (ws)* "x"\nws ::= " "*',
    "a repeated word": 'root ::= ([a-z]+ " "?)+ "."',
    "two ways": "root ::= ([a-z] | [a-z])*",
    "twice defined": 'root ::= "a"\nroot ::= "b"',
}
SCHEMAS: list[dict[str, Any]] = [
    {},
    {"enum": ["red", "rose", "rouge", 1, None, True]},
    {"enum": [f"value {i}" for i in range(1000)]},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 2, "maxLength": 900},
            "at": {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": ["number", "null"]}}, "required": ["x"]},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 9}, "minItems": 1, "maxItems": 30},
        },
        "required": ["name"],
    },
    {"type": "object", "properties": {f"p{i}": {"type": ["string", "null"]} for i in range(12)}},
    {"type": "object", "properties": {"x": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}},
    {"type": "string", "pattern": "^[a-z]{2,5}-(ab|ac)*[0-9]+$"},
    {"type": "array", "items": {"type": "string", "format": "date-time"}},
    {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}]},
    {"type": "array", "items": {"oneOf": [{"type": "object", "properties": {"k": {"const": i}}, "required": ["k"]} for i in range(9)]}},
    {"$defs": {"size": {"type": "integer"}}, "type": "object", "properties": {"a": {"$ref": "#/$defs/size"}}, "required": ["a"]},
]


def _tokens() -> list[str]:
    vocabulary: dict[str, int] = json.loads(tiny_tokenizer().to_str())["model"]["vocab"]
    return sorted(vocabulary, key=vocabulary.__getitem__)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens = [*_tokens()[:-1], "#" * 40 + "!"]
    return write_tiny_gguf(tmp_path_factory.mktemp("grammar") / "tiny.gguf", fields={"tokenizer.ggml.tokens": tokens})


@pytest.fixture(scope="module")
def session(tiny: Path) -> Iterator[Session]:
    with load(tiny, n_ctx=64, threads=1) as opened:
        yield opened


@pytest.mark.parametrize(("grammar", "message"), [*DEADLY.values(), *FAULTY], ids=[*DEADLY, *(message[-30:] for _, message in FAULTY)])
def test_what_llama_cpp_must_not_see_is_refused(grammar: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_text(grammar)
    assert message in str(caught.value)


def test_a_rule_that_holds_too_much_to_tell_is_refused() -> None:
    with pytest.raises(UsageError, match="or is too large to tell"):
        check_text(chain(2400, "{}"))


@pytest.mark.parametrize("grammar", SOUND.values(), ids=SOUND)
def test_sound_grammars_are_taken(session: Session, grammar: str) -> None:
    check_grammar(session.model, grammar)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:30])
def test_json_schemas_make_sound_grammars(session: Session, schema: dict[str, Any]) -> None:
    check_grammar(session.model, gbnf(schema))


@pytest.mark.parametrize(
    "schema", [{"type": "string", "minLength": 10**9}, {"items": [{"type": "string", "pattern": "^[ab]{3,999999999}$"}]}]
)
def test_json_schemas_that_repeat_without_measure_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="the JSON schema repeats too often to be made a grammar"):
        gbnf(schema)


_chars = st.sampled_from(
    ['"a"', '"the"', '""', "[a-c]", "[^a]", "[é-ü]", "[b-a]", ".", "[^\\x00-\\U0010FFFF]", '"\\u4e2d"', "[]", "b", "c"]
)
_items = st.recursive(
    _chars,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{0}", "{2,}", "{0,9}"])).map("".join),
        st.lists(st.lists(inner, max_size=3).map(" ".join), min_size=1, max_size=3).map(lambda found: f"({' | '.join(found)})"),
    ),
    max_leaves=6,
)
_rules = st.lists(st.lists(_items, max_size=4).map(" ".join), min_size=1, max_size=3).map(" | ".join)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(root=_rules, b=_rules, c=_rules, seed=st.integers(0, 9), temperature=st.sampled_from([0.0, 3.0, 1e-38]))
def test_what_is_taken_does_no_harm(session: Session, root: str, b: str, c: str, seed: int, temperature: float) -> None:
    """In this process: a death would be seen."""
    grammar = f"root ::= {root}\nb ::= {b}\nc ::= {c}"
    try:
        session.generate("the", grammar=grammar, max_tokens=8, temperature=temperature, seed=seed)
    except UsageError as err:
        assert "of the grammar" in str(err) or "no token of the vocabulary" in str(err) or "left recursion" in str(err), err


_pieces = st.sampled_from(
    [*("root", "b", "::=", '"a"', '"', "[a-", "b]", "[^]", "]", "(", ")", "|", "*", "?", "{2", "}", "{1,2}", "{,2}", "{1 , }", ","),
     *("\n", "\r\n", "\r", "\t", " ", " ", "# b\n", "\\", "\\n", "\\x41", "\\u12", "^", "-", "_", "é", ".", "٣", "root ::= ", "\nb ::= ")]
)  # fmt: skip
SYNTAX = ("is not understood", "stands where", "is missing", "is not closed", "has an escape")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(_pieces, min_size=1, max_size=12))
def test_what_is_a_grammar_is_so_to_llama_cpp_too(session: Session, pieces: list[str]) -> None:
    text = "root ::= " + "".join(pieces)
    try:
        check_text(text)
    except UsageError as ours:
        if not any(part in str(ours) for part in SYNTAX):
            return
        with pytest.raises(UsageError, match="failed to parse grammar"):
            session.model.grammar_sampler(text)
    else:
        try:
            check_grammar(session.model, text)
        except UsageError as theirs:
            assert "left recursion" in str(theirs), theirs


def test_a_model_that_cannot_end_is_refused(tmp_path: Path) -> None:
    tokens = [f"({token})" if token in SPECIAL_TOKENS else token for token in _tokens()]
    without: dict[str, Any] = {
        f"tokenizer.ggml.{name}": None for name in ("eos_token_id", "bos_token_id", "add_bos_token", "merges", "pre")
    }
    path = write_tiny_gguf(
        tmp_path / "endless.gguf",
        fields={**without, "tokenizer.ggml.model": "rwkv", "tokenizer.ggml.tokens": tokens, "tokenizer.chat_template": None},
    )
    with load(path, n_ctx=64, threads=1) as session, pytest.raises(UsageError, match="has no token that ends an answer"):
        session.generate([5, 6], grammar='root ::= "a"', max_tokens=3)


ALONE = """
import ctypes, sys, llama_cpp as c
params = c.llama_model_default_params()
params.vocab_only = True
vocabulary = c.llama_model_get_vocab(c.llama_model_load_from_file(sys.argv[1].encode(), params))
sampler = c.llama_sampler_init_grammar(vocabulary, open(sys.argv[2], "rb").read(), b"root")
n = c.llama_vocab_n_tokens(vocabulary)
for _ in range(200 if sampler else 0):
    candidates = (c.llama_token_data * n)(*(c.llama_token_data(i, 0.0, 0.0) for i in range(n)))
    c.llama_sampler_apply(sampler, ctypes.byref(c.llama_token_data_array(candidates, n, -1, False)))
    allowed = [one.id for one in candidates if one.logit == 0.0]
    c.llama_sampler_accept(sampler, max(allowed, key=lambda i: len(c.llama_vocab_get_text(vocabulary, i)), default=0))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({*DEADLY, "nothing to go on with"} - {"a shorter chain", "long literals"}))
def test_llama_cpp_alone_dies_or_hangs(tmp_path: Path, tiny: Path, kind: str) -> None:
    """What is kept from it is deadly: it ends by a signal, or not within seconds and 3 GiB. A sound grammar ends well."""
    assert _alone(tmp_path, tiny, 'root ::= "the" | "a"{60}', timeout_s=60) == 0
    status = _alone(tmp_path, tiny, DEADLY[kind][0] if kind in DEADLY else 'root ::= "a" [b-a]', timeout_s=3)
    assert status is None or status < 0


def _alone(folder: Path, model: Path, grammar: str, *, timeout_s: float) -> int | None:
    (folder / "alone.gbnf").write_text(grammar, encoding="utf-8")
    try:
        return subprocess.run(
            [sys.executable, "-c", ALONE, model, folder / "alone.gbnf"],
            timeout=timeout_s,
            capture_output=True,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30)),
        ).returncode
    except subprocess.TimeoutExpired:
        return None
