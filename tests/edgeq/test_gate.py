"""Thresholds, verdicts and the texts of the gate."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace
from itertools import pairwise

import pytest

from edgeq.errors import PackageError, UsageError
from edgeq.gate import BF16_LIMIT, LIMITS, TIE_MARGIN, UNCHANGED_LIMIT, Fidelity, GateResult, Thresholds, thresholds_for
from edgeq.gate_prompts import PASSAGE_TOKENS, gate_prompts, gate_windows
from edgeq.grids import GRIDS
from edgeq.model import Vocabulary

RESULT = GateResult(
    basis="logits",
    runtime="llama-cpp-python 0.3.36 on CPU",
    thresholds=thresholds_for(["Q4_0"]),
    failures=(),
    tokens=1511,
    kl_mean=0.0059,
    kl_p99=0.039,
    kl_max=0.2,
    top1_agreement=0.959,
    perplexity_reference=20.6,
    perplexity_artifact=20.77,
    fidelity=Fidelity(thresholds=thresholds_for([], copied=["Q4_0"]), tokens=1511, kl_mean=0.0061, kl_p99=0.04, top1_agreement=0.95),
    tokenizer_equal=True,
    chat_template_equal=True,
)


def test_coarser_grids_get_more_room() -> None:
    for finer, coarser in pairwise(LIMITS):
        assert finer.bits > coarser.bits
        assert finer.kl_mean < coarser.kl_mean < coarser.kl_p99
        assert finer.kl_p99 < coarser.kl_p99
        assert finer.top1_agreement > coarser.top1_agreement
    assert LIMITS[0].kl_mean < BF16_LIMIT.kl_mean < LIMITS[1].kl_mean


@pytest.mark.parametrize(
    ("grid", "bits"),
    [
        ("F32", 16),
        ("F16", 16),
        ("Q8_0", 8),
        ("Q6_K", 6.5),
        ("Q5_1", 5.5),
        ("Q5_K", 5.5),
        ("Q4_1", 4),
        ("MXFP4", 4),
        ("Q3_K", 3),
        ("Q2_K", 0),
    ],
)
def test_limit_of_each_class(grid: str, bits: float) -> None:
    limit = next(limit for limit in LIMITS if limit.bits == bits)
    expected = Thresholds(grid=grid, kl_mean=limit.kl_mean, kl_p99=limit.kl_p99, top1_agreement=limit.top1_agreement, tie_margin=TIE_MARGIN)
    assert thresholds_for([grid]) == expected
    assert thresholds_for([GRIDS[grid]]) == expected


def test_every_grid_has_limits() -> None:
    for name in GRIDS:
        assert thresholds_for([name]).grid == name


def test_coarsest_grid_decides() -> None:
    assert thresholds_for(["Q6_K", "Q4_K", "F32", "Q8_0"]).grid == "Q4_K"
    assert thresholds_for(["F16", "BF16"]).kl_mean == BF16_LIMIT.kl_mean


def test_copied_matrices_ask_for_little_room() -> None:
    copied = thresholds_for([], copied=["Q4_1"])
    assert copied.grid == "unchanged Q4_1"
    assert copied.kl_mean == UNCHANGED_LIMIT.kl_mean < thresholds_for(["Q4_1"]).kl_mean
    assert thresholds_for(["Q8_0"], copied=["Q8_0"]).kl_mean == thresholds_for(["Q8_0"]).kl_mean
    assert thresholds_for(["Q4_0"], copied=["Q2_K"]) == thresholds_for(["Q4_0"])
    assert thresholds_for([], copied=["F16"]).kl_mean == thresholds_for(["F16"]).kl_mean


def test_no_grids() -> None:
    with pytest.raises(UsageError, match="no grids: give those of the artifact's matrices"):
        thresholds_for([])


def test_faults_are_sentences() -> None:
    limits = Thresholds(grid="Q8_0", kl_mean=0.03, kl_p99=0.3, top1_agreement=0.88)
    assert limits.faults(kl_mean=0.03, kl_p99=0.3, top1_agreement=0.88) == []
    assert limits.faults(kl_mean=0.0412, kl_p99=0.5, top1_agreement=0.8512) == [
        "mean KL from the reference is 0.0412; at most 0.03 is expected of Q8_0",
        "99th percentile of KL from the reference is 0.5; at most 0.3 is expected of Q8_0",
        "top-1 agreement is 85.12%; at least 88.0% is expected of Q8_0",
    ]


def test_nan_is_a_fault() -> None:
    limits = Thresholds(grid="F16", kl_mean=1, kl_p99=1, top1_agreement=0)
    assert len(limits.faults(kl_mean=float("nan"), kl_p99=float("nan"), top1_agreement=float("nan"))) == 3


def test_result_survives_json() -> None:
    for result in (RESULT, replace(RESULT, failures=("the file is broken",), kl_mean=None, fidelity=None, tokenizer_equal=None)):
        document = json.loads(json.dumps(result.to_json(), allow_nan=False))
        assert document["passed"] is (not result.failures)
        assert GateResult.from_json(document) == result


@pytest.mark.parametrize(
    "change", [{"kl_mean": ...}, {"invented": 1}, {"thresholds": {"grid": "F16"}}, {"thresholds": ...}, {"fidelity": {"kl_mean": 1}}]
)
def test_damaged_result(change: dict[str, object]) -> None:
    document = {name: value for name, value in {**RESULT.to_json(), **change}.items() if value is not ...}
    with pytest.raises(PackageError, match=r"the gate result lacks or misspells .* The package is damaged; export it again"):
        GateResult.from_json(document)


def test_rows_show_what_was_measured() -> None:
    assert RESULT.rows() == [
        ("mean KL (nats)", "0.0059", "at most 1"),
        ("99th percentile of KL", "0.039", "at most 5"),
        ("top-1 agreement", "95.90%", "at least 40.0%"),
        ("perplexity", "20.77", "reference 20.6"),
        ("mean KL, own weights", "0.0061", "at most 0.05"),
        ("token ids", "equal", "equal"),
        ("chat template", "equal", "equal"),
    ]
    refused = GateResult(
        basis="logits", runtime="llama.cpp on CPU", thresholds=RESULT.thresholds, failures=("refused",), tokenizer_equal=False
    )
    assert refused.rows() == [("token ids", "different", "equal")]


def test_prompts_are_whole() -> None:
    prompts = gate_prompts()
    assert len(prompts.passages) >= 16
    assert len(prompts.lines) >= 25
    assert len(prompts.conversations) >= 6
    for group in (prompts.passages, prompts.lines, prompts.conversations):
        assert len({item.name for item in group}) == len(group)


def test_texts_are_composed() -> None:
    """llama.cpp does not compose characters; a decomposed text would fail every tokenizer that does."""
    for text in gate_prompts().texts:
        assert unicodedata.normalize("NFC", text.text) == text.text, text.name


def test_passages_cover_many_scripts() -> None:
    letters = {unicodedata.name(c).split()[0] for passage in gate_prompts().passages for c in passage.text if c.isalpha()}
    assert letters >= {"LATIN", "CYRILLIC", "CJK", "HIRAGANA", "KATAKANA", "HANGUL", "ARABIC", "DEVANAGARI"} - {"KATAKANA"}


def test_conversations_cover_the_forms() -> None:
    conversations = gate_prompts().conversations
    roles = {tuple(message["role"] for message in c.messages) for c in conversations}
    assert {("user",), ("system", "user"), ("user", "assistant", "user"), ("user", "user")} <= roles
    assert {c.add_generation_prompt for c in conversations} == {True, False}


class _Characters:
    """A tokenizer of one id per character, with id 1 in front when specials are added."""

    vocabulary = Vocabulary(kind="bpe", pre="default", tokens=(), types=())

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        return [1] * add_special + [ord(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_windows_are_passages_then_the_rest() -> None:
    windows = gate_windows(_Characters(), [list(range(300)), [5, 6]], n_ctx=256)
    passages = gate_prompts().passages
    assert len(windows) == len(passages) + 2
    assert windows[0] == [1, *map(ord, passages[0].text)][:PASSAGE_TOKENS]
    assert windows[-2:] == [list(range(256)), [5, 6]]
    assert {len(window) for window in gate_windows(_Characters(), [], n_ctx=20)} == {20}
