"""Choices and exact answers against their definitions, computed here from whole sequences by torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_gguf import write_tiny_gguf

from edgeq.errors import SourceError, TokenizerError, UsageError
from edgeq.runtime.choices import ChoiceItem, encode, read_choices, score_choices
from edgeq.runtime.estimates import exp_of, mean_of, without_error
from edgeq.runtime.exact_match import ExactItem, match_exactly, normalised, read_exact
from edgeq.runtime.llama import LlamaModel
from edgeq.runtime.llama_context import LlamaContext
from edgeq.runtime.prompts import PromptWriter
from edgeq.runtime.worker import ScoringWorker

CTX = 256


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tasks") / "tiny.gguf", seed=3)


@pytest.fixture(scope="module")
def worker(artifact):
    with ScoringWorker(artifact, n_ctx=CTX, threads=1) as opened:
        yield opened


def direct_scores(artifact: Path, prompt: str, choices: list[str]) -> list[float]:
    """Sum of log p over what follows the prompt's tokens, each text computed whole and alone."""
    with LlamaModel.load(artifact) as model, LlamaContext(model, n_ctx=CTX, threads=1) as context:
        scores = []
        start = len(model.tokenize(prompt, add_special=True))
        for choice in choices:
            ids = model.tokenize(f"{prompt} {choice}", add_special=True)
            assert ids[:start] == model.tokenize(prompt, add_special=True)
            log_p = torch.log_softmax(torch.from_numpy(context.logits_of(ids)).double(), dim=1)
            scores.append(sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids))))
        return scores


def test_scores_are_the_definition(artifact, worker):
    prompt, choices = "The harbour lights of the island were", ["built", "a rather long story about dogs", "green"]
    item = ChoiceItem(line=1, prompt=prompt, choices=tuple(choices), answer=0)
    context, continuations = encode(PromptWriter(worker), item)
    found = [-nll.sum() for nll in worker.continuation_nll(context, continuations)]
    expected = direct_scores(artifact, prompt, choices)
    assert found == pytest.approx(expected, rel=1e-4)
    by_bytes = [score / len(choice.encode()) for score, choice in zip(expected, choices, strict=True)]
    raw, normalised_ = int(np.argmax(expected)), int(np.argmax(by_bytes))
    assert raw != normalised_  # the long choice loses raw and wins by bytes, so the two accuracies can differ
    items = [ChoiceItem(line=i, prompt=prompt, choices=tuple(choices), answer=i) for i in range(3)]
    scores = score_choices(PromptWriter(worker), items, n_ctx=CTX)
    assert scores.acc.tolist() == [i == raw for i in range(3)]
    assert scores.acc_norm.tolist() == [i == normalised_ for i in range(3)]


def test_white_space_at_the_end_of_the_prompt_is_the_choices(worker):
    def whole(prompt, choice):
        context, (continuation, _) = encode(PromptWriter(worker), ChoiceItem(line=1, prompt=prompt, choices=(choice, "x y"), answer=0))
        return context, continuation

    assert whole("The sky is", "blue") == whole("The sky is ", "blue") == whole("The sky is", " blue")
    assert whole("The sky is", "blue") != whole("The sky is\n", "blue")


def test_a_prompt_whose_last_token_merges_with_a_choice(worker):
    """ "th" and "e" are one token: scoring begins before it, for all choices alike."""
    item = ChoiceItem(line=1, prompt="x", choices=("a", "b"), answer=0)
    writer = PromptWriter(worker)
    texts = ["12 th", "12 the"]
    ids = [writer.ids(text) for text in texts]
    assert ids[1][: len(ids[0])] != ids[0]
    writer.joined = lambda prompt, choices: ("12 th", ["12 the", "12 thx"])
    context, continuations = encode(writer, item)
    assert len(context) < len(ids[0])
    assert context + continuations[0] == ids[1]


def test_continuations_go_back_to_the_end_of_the_text(worker):
    ids = worker.tokenize("The quick brown fox counts dogs", add_special=True)
    parts = [worker.tokenize(text) for text in (" and cats", " 1234", " and more and more and more")]
    together = worker.continuation_nll(ids, parts)
    for part, nll in zip(parts, together, strict=True):
        assert nll == pytest.approx(worker.nll([*ids, *part])[-len(part) :], rel=1e-4, abs=1e-5)
    assert worker.continuation_nll(ids[:1], parts[:1])[0] == pytest.approx(worker.nll([ids[0], *parts[0]]), rel=1e-4)


def greedy(artifact: Path, prompt: str, n_tokens: int) -> list[int]:
    with LlamaModel.load(artifact) as model, LlamaContext(model, n_ctx=CTX, threads=1) as context:
        ids = model.tokenize(prompt, add_special=True)
        start = len(ids)
        while len(ids) < start + n_tokens:
            ids.append(int(context.logits_of(ids)[-1].argmax()))
            if model.is_eog(ids[-1]):
                return ids[start:-1]
        return ids[start:]


def test_generation_is_greedy(artifact, worker):
    tokens = greedy(artifact, "The harbour", 12)
    with LlamaModel.load(artifact, vocab_only=True) as model:
        expected = b"".join(model.token_to_piece(token) for token in tokens).decode("utf-8", "replace")
    ids = worker.tokenize("The harbour", add_special=True)
    assert worker.generate(ids, max_tokens=12) == expected


def test_an_exact_match_is_the_whole_text(worker):
    """The tiny model never stops: what it says is made to end by a line break, and its beginning is no match."""
    writer = PromptWriter(worker)
    said = {"Q1": "New  York\n", "Q2": "New York City", "Q3": "Ｎew York", "Q4": "new york"}
    writer.worker = FakeWorker(said)
    items = [ExactItem(line=i, prompt=prompt, answers=("Boston", "New York")) for i, prompt in enumerate(said, 1)]
    done: list[int] = []
    assert match_exactly(writer, items, n_ctx=CTX, on_items=done.append).tolist() == [True, False, True, False]
    assert done == [1, 2, 3, 4]
    assert writer.worker.asked[0] == (20, True)  # four bytes of "Boston" over "New York": the longest answer and 16 tokens more


class FakeWorker:
    """A worker of one token per four characters that says what it is told to."""

    def __init__(self, said):
        self.said, self.asked, self.texts = said, [], {}

    def tokenize(self, text, **_options):
        ids = list(range(len(text) // 2))
        if text in self.said:
            ids = [1000 + list(self.said).index(text)]
        return ids

    def generate(self, ids, *, max_tokens, one_line):
        self.asked.append((max_tokens, one_line))
        return list(self.said.values())[ids[0] - 1000]


def test_real_generation_matches_what_it_says(artifact, worker):
    writer = PromptWriter(worker)
    ids = writer.ids("The harbour")
    text = worker.generate(ids, max_tokens=40, one_line=True)
    item = ExactItem(line=1, prompt="The harbour", answers=(text[: len(text) // 2],))
    assert match_exactly(writer, [item], n_ctx=CTX).tolist() == [False]


def test_normalisation():
    assert normalised(" a\t b\u00a0c\n") == "a b c"
    assert normalised("ﬁ") == "fi"
    assert normalised("A.") != normalised("a")


def test_items_that_do_not_fit(worker):
    long = ChoiceItem(line=7, prompt="dog " * 300, choices=("a", "b"), answer=0)
    with pytest.raises(UsageError, match=r"line 7 of the choices needs [\d,]+ tokens, the context has 256\. Use a larger --ctx"):
        score_choices(PromptWriter(worker), [long], n_ctx=CTX)
    with pytest.raises(UsageError, match=r"line 8 of the exact matches needs [\d,]+ tokens with its answer, the context has 256"):
        match_exactly(PromptWriter(worker), [ExactItem(line=8, prompt="dog " * 300, answers=("a",))], n_ctx=CTX)


def test_an_empty_prompt_needs_bos(tmp_path, worker):
    item = ChoiceItem(line=2, prompt="", choices=("a dog", "the cat"), answer=0)
    context, _ = encode(PromptWriter(worker), item)
    assert context == [worker.facts.bos]
    path = write_tiny_gguf(tmp_path / "no.gguf", fields={"tokenizer.ggml.add_bos_token": False})
    with ScoringWorker(path, n_ctx=CTX, threads=1) as without:
        with pytest.raises(UsageError, match="line 2 of the choices: nothing stands before the choices, and the model has no BOS token"):
            score_choices(PromptWriter(without), [item], n_ctx=CTX)
        with pytest.raises(UsageError, match="line 3 of the exact matches: the prompt is empty and the model has no BOS token"):
            match_exactly(PromptWriter(without), [ExactItem(line=3, prompt="", answers=("a",))], n_ctx=CTX)


def test_chat_prompts_are_rendered_and_have_no_second_bos(worker, tmp_path):
    writer = PromptWriter(worker, chat=True)
    text = writer.text("Hi there")
    assert "Hi there" in text and text != "Hi there"
    _, joined = writer.joined("Hi there", ["yes"])
    assert joined == [text + "yes"]
    assert writer.ids(text).count(worker.facts.bos) == text.count(worker.facts.bos_text)
    path = write_tiny_gguf(tmp_path / "plain.gguf", fields={"tokenizer.chat_template": None})
    with (
        ScoringWorker(path, n_ctx=64, threads=1) as plain,
        pytest.raises(TokenizerError, match=r"the model has no chat template\. Leave out --chat"),
    ):
        PromptWriter(plain, chat=True)


GOOD_CHOICE, GOOD_EXACT = {"prompt": "a", "choices": ["b", "c"], "answer": 1}, {"prompt": "a", "answer": "b"}


def test_files_are_read(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD_CHOICE).encode() + b"\r\n\n" + json.dumps(GOOD_CHOICE | {"answer": "b"}).encode())
    items, digest = read_choices(path)
    assert [(item.line, item.answer) for item in items] == [(1, 1), (3, 0)]
    assert len(digest) == 64
    path.write_text(json.dumps(GOOD_EXACT | {"answer": ["b", "c"]}))
    assert read_exact(path)[0] == (ExactItem(line=1, prompt="a", answers=("b", "c")),)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"{", r"not valid JSON \("),
        (b"\xff", r"not UTF-8 text \(byte 0\)"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "it holds a list"),
        (b"null", "it holds null"),
        (json.dumps(GOOD_CHOICE | {"prompt": 3}), '"prompt" is a number'),
        (json.dumps(GOOD_CHOICE | {"prompt": "\ud800"}), r'"prompt" has half of a character \(a lone surrogate\)'),
        (json.dumps({"choices": ["a", "b"], "answer": 0}), '"prompt" is missing'),
        (json.dumps(GOOD_CHOICE | {"choices": ["a"]}), '"choices" is not a list of at least two texts'),
        (json.dumps(GOOD_CHOICE | {"choices": ["a", None]}), r'"choices\[1\]" is null'),
        (json.dumps(GOOD_CHOICE | {"choices": ["a", " "]}), r'"choices\[1\]" is empty'),
        (json.dumps(GOOD_CHOICE | {"answer": 2}), '"answer" is 2, not an index from 0 to 1'),
        (json.dumps(GOOD_CHOICE | {"answer": True}), '"answer" is True, not an index'),
        (json.dumps(GOOD_CHOICE | {"answer": "d"}), "\"answer\" is 'd', which is none of the choices"),
        (json.dumps(GOOD_CHOICE | {"choices": ["b", "b"], "answer": "b"}), "which is more than one of the choices"),
        (json.dumps(GOOD_CHOICE | {"anwser": 1}), '"anwser" is not a key of this task'),
    ],
)
def test_malformed_choices_name_the_line(tmp_path, line, fault):
    path = tmp_path / "c.jsonl"
    path.write_bytes(json.dumps(GOOD_CHOICE).encode() + b"\n" + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(SourceError, match=rf'c\.jsonl, line 2: .*{fault}.*Expected one JSON object per line: \{{"prompt"'):
        read_choices(path)


@pytest.mark.parametrize(
    ("change", "fault"), [({"answer": []}, "an empty list"), ({"answer": " "}, "is empty"), ({"answer": 3}, '"answer" is a number')]
)
def test_malformed_answers_name_the_line(tmp_path, change, fault):
    path = tmp_path / "e.jsonl"
    path.write_text("\n" + json.dumps(GOOD_EXACT | change))
    with pytest.raises(SourceError, match=rf"e\.jsonl, line 2: .*{fault}"):
        read_exact(path)


def test_files_without_items(tmp_path):
    with pytest.raises(SourceError, match=r"no\.jsonl: cannot be read \(No such file"):
        read_exact(tmp_path / "no.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(SourceError, match=r"empty\.jsonl has no items\. Expected one JSON object per line"):
        read_exact(tmp_path / "empty.jsonl")


def test_standard_errors():
    """Against the textbook's formulas, and the delta method against a simulation."""
    units = np.array([1.0, 0.0, 1.0, 1.0, 0.0])
    estimate = mean_of(units)
    assert estimate.value == 0.6
    assert estimate.stderr == pytest.approx(np.sqrt(0.6 * 0.4 / 4))
    assert mean_of([2.0]).stderr is None
    other = mean_of(1 - units)
    difference, error = estimate.minus(other)
    assert difference == pytest.approx(0.2)
    assert error == pytest.approx(2 * estimate.stderr)  # they move against each other
    assert estimate.minus(mean_of(units))[1] == 0.0
    assert estimate.minus(without_error(0.5, n=5)) == (pytest.approx(0.1), None)

    rng = np.random.default_rng(0)
    draws = rng.normal(2.0, 0.3, (4000, 50))
    found = np.array([exp_of(mean_of(draw)).stderr for draw in draws[:200]])
    assert found.mean() == pytest.approx(np.exp(draws.mean(axis=1)).std(), rel=0.05)
