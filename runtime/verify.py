"""The parity gate at work: an artifact in its runtime, in a child process, against the model it was made from.

Three questions: are texts turned into the same token ids as by the source's own tokenizer; do conversations render alike; are the
logits as close to the reference's as the artifact's grids allow. A package without torch answers the first and the last from its
fingerprint: `edgeq.runtime.fingerprint`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from edgeq.chat import render
from edgeq.errors import AdapterError, EdgeqError, RuntimeFailure, SourceError, TokenizerError, UnsupportedError, UsageError
from edgeq.gate import Fidelity, GateResult, ReferenceScores, Thresholds
from edgeq.gate_prompts import Conversation, gate_prompts
from edgeq.model import Tokenizer, Vocabulary
from edgeq.progress import Progress, silent
from edgeq.runtime.engine import fitting_n_ctx, runtime_of
from edgeq.runtime.quality import Agreement, Comparison, perplexity_of
from edgeq.runtime.worker import ArtifactFacts, ScoringWorker

STEP = "gate"
_MODES = tuple(product((False, True), repeat=2))  # add_special, parse_special
_SHOWN = 4  # token ids shown on each side of a difference


@dataclass(frozen=True)
class Finding:
    """What one check measured, as fields of GateResult, and what is wrong."""

    values: Mapping[str, Any] = field(default_factory=dict)
    failures: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Tokenization:
    """A text and the ids it becomes. name is for messages."""

    name: str
    text: str
    add_special: bool
    parse_special: bool
    ids: Sequence[int]


def run_gate(
    artifact: Path,
    reference: ReferenceScores,
    *,
    tokenizer: Tokenizer,
    thresholds: Thresholds,
    own: tuple[ReferenceScores, Thresholds] | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> GateResult:
    """Judge an artifact against its source model and tokenizer, on this machine's CPU.

    own: the reference on the artifact's own weights, over the first windows of `reference` or all, and limits for that
    (`edgeq.gate.Fidelity`). It finds what the loss of a coarse grid hides, and is not needed where nothing was rounded.

    An artifact that its runtime refuses, that kills it or that computes NaN has failed: that is a verdict and no exception.
    Raises MissingDependency without the runtime, UsageError when `own` has other windows, and whatever the references raise.
    """
    if own is not None and [*map(list, own[0].windows)] != [*map(list, reference.windows[: len(own[0].windows)])]:
        raise UsageError("the reference on the artifact's own weights has other windows than the first ones of the reference")
    try:
        worker = ScoringWorker(artifact, n_ctx=fitting_n_ctx(artifact, reference.n_ctx), threads=threads)
    except (RuntimeFailure, SourceError, TokenizerError, UnsupportedError) as err:
        return verdict("logits", thresholds, [refused(artifact, err)])
    findings = [Finding({"runtime": f"{worker.facts.library} on CPU"})]
    with worker:
        try:
            findings.append(
                check_tokenizer(worker, text_cases(tokenizer) + conversation_cases(tokenizer), tokenizer.vocabulary.special_ids)
            )
            findings.append(check_chat(worker.facts, tokenizer.vocabulary))
            findings += _check_logits(worker, reference, thresholds, own, progress)
        except RuntimeFailure as err:
            findings.append(Finding(failures=[str(err)]))
    return verdict("logits", thresholds, findings)


def check_kept(
    artifact: Path,
    adapter: Path,
    reference: ReferenceScores,
    *,
    thresholds: Thresholds,
    threads: int | None = None,
    progress: Progress = silent,
) -> Finding:
    """An artifact with an adapter beside it, against the reference that has the adapter in its weights. Raises as `run_gate`.

    `fidelity` of the values is what was measured, if it could be.
    """
    try:
        with ScoringWorker(artifact, adapter=adapter, n_ctx=fitting_n_ctx(artifact, reference.n_ctx), threads=threads) as worker:
            found = _compared(worker, reference, thresholds, progress)
    except (AdapterError, RuntimeFailure, SourceError, UnsupportedError) as err:
        return Finding(failures=[str(err)])
    return _fidelity(found, thresholds)


def _compared(worker: ScoringWorker, reference: ReferenceScores, thresholds: Thresholds, progress: Progress) -> Agreement:
    comparison = Comparison(tie_margin=thresholds.tie_margin)
    total, done = sum(len(window) for window in reference.windows), 0
    for i, ids in enumerate(reference.windows):
        comparison.add(ids, reference.logits(i), worker.logits(ids))
        done += len(ids)
        progress(STEP, done, total)
    return comparison.agreement()


def refused(artifact: Path, error: EdgeqError) -> Finding:
    """An artifact that did not load."""
    return Finding({"runtime": f"{runtime_of(artifact)} on CPU"}, [str(error)])


def verdict(basis: Literal["logits", "fingerprint"], thresholds: Thresholds, findings: Iterable[Finding]) -> GateResult:
    values: dict[str, Any] = {}
    failures: list[str] = []
    for finding in findings:
        values |= finding.values
        failures += finding.failures
    return GateResult(basis=basis, thresholds=thresholds, failures=tuple(failures), **values)


def text_cases(tokenizer: Tokenizer) -> list[Tokenization]:
    """Every text of the gate as the source's own tokenizer reads it, with and without specials."""
    return [
        Tokenization(
            name=f"text {text.name!r}",
            text=text.text,
            add_special=add,
            parse_special=parse,
            ids=tokenizer.encode(text.text, add_special=add, parse_special=parse),
        )
        for text in gate_prompts().texts
        for add, parse in _MODES
    ]


def conversation_cases(tokenizer: Tokenizer) -> list[Tokenization]:
    """Every conversation that the source's template accepts, rendered, as the source's own tokenizer reads it."""
    vocabulary, cases = tokenizer.vocabulary, []
    if vocabulary.chat_template is None:
        return []
    for conversation in gate_prompts().conversations:
        text = _rendered(vocabulary.chat_template, conversation, bos=_spelling(vocabulary, "bos"), eos=_spelling(vocabulary, "eos")).text
        if text is not None:
            ids = tokenizer.encode(text, parse_special=True)
            name = f"conversation {conversation.name!r}"
            cases.append(Tokenization(name=name, text=text, add_special=False, parse_special=True, ids=ids))
    return cases


def check_tokenizer(worker: ScoringWorker, expected: Sequence[Tokenization], special_ids: Mapping[str, int]) -> Finding:
    """Whether the artifact turns each text into the ids expected, and has the special tokens that `special_ids` names (bos, eos)."""
    failures = []
    for role, has in (("bos", worker.facts.bos), ("eos", worker.facts.eos)):
        if role in special_ids and special_ids[role] != has:
            failures.append(f"the tokenizers differ: {role.upper()} is {has} in the artifact, {special_ids[role]} in the source")
    different = []
    for case in expected:
        ids = worker.tokenize(case.text, add_special=case.add_special, parse_special=case.parse_special)
        if list(case.ids) != ids:
            different.append((case, ids))
    if different:
        case, ids = different[0]
        failures.append(f"the tokenizers differ for {len(different)} of {len(expected)} texts, first for {_difference(case, ids)}")
    return Finding({"tokenizer_equal": not failures}, failures)


def _difference(case: Tokenization, ids: Sequence[int]) -> str:
    at = _first_difference(case.ids, ids)
    modes = [name for name, on in (("with added specials", case.add_special), ("special tokens parsed", case.parse_special)) if on]
    shown = slice(max(0, at - _SHOWN), at + _SHOWN)
    how = f" ({', '.join(modes)})" if modes else ""
    return f"{case.name}{how} at position {at}: artifact {_excerpt(ids, shown)}, source {_excerpt(case.ids, shown)}"


def _first_difference(a: Sequence[Any], b: Sequence[Any]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _excerpt(ids: Sequence[int], shown: slice) -> str:
    inner = ", ".join(map(str, ids[shown]))
    return f"[{'..., ' if shown.start else ''}{inner}{', ...' if shown.stop < len(ids) else ''}]"


@dataclass(frozen=True)
class _Rendered:
    """A conversation as text, or the reason why the template refused it."""

    text: str | None
    refusal: str | None


def check_chat(facts: ArtifactFacts, vocabulary: Vocabulary) -> Finding:
    """Whether conversations render to the same text from the artifact's template and special tokens as from the source's."""
    source, artifact = vocabulary.chat_template, facts.chat_template
    if source is None or artifact is None:
        if source is artifact:
            return Finding({"chat_template_equal": None})
        holder, other = ("artifact", "source") if source is None else ("source", "artifact")
        return Finding({"chat_template_equal": False}, [f"the {holder} has a chat template and the {other} has none"])
    if (artifact, facts.bos_text, facts.eos_text) == (source, _spelling(vocabulary, "bos"), _spelling(vocabulary, "eos")):
        return Finding({"chat_template_equal": True})  # also when the template tells the time
    for conversation in gate_prompts().conversations:
        expected = _rendered(source, conversation, bos=_spelling(vocabulary, "bos"), eos=_spelling(vocabulary, "eos"))
        found = _rendered(artifact, conversation, bos=facts.bos_text, eos=facts.eos_text)
        if (expected.text, expected.refusal is None) != (found.text, found.refusal is None):
            difference = f"the chat templates differ for conversation {conversation.name!r}: {_chat_difference(expected, found)}"
            return Finding({"chat_template_equal": False}, [difference])
    return Finding({"chat_template_equal": True})


def _rendered(template: str, conversation: Conversation, *, bos: str | None, eos: str | None) -> _Rendered:
    asks = conversation.add_generation_prompt
    try:
        text = render(template, conversation.messages, bos_token=bos, eos_token=eos, add_generation_prompt=asks)
    except TokenizerError as err:
        return _Rendered(None, str(err))
    return _Rendered(text, None)


def _chat_difference(expected: _Rendered, found: _Rendered) -> str:
    if expected.text is None or found.text is None:
        side, refusal = ("artifact's", found.refusal) if found.text is None else ("source's", expected.refusal)
        return f"only the {side} refuses it ({refusal})"
    at = _first_difference(expected.text, found.text)
    return f"at character {at} the artifact has {found.text[at : at + 20]!r}, the source {expected.text[at : at + 20]!r}"


def _spelling(vocabulary: Vocabulary, role: str) -> str | None:
    token = vocabulary.special_ids.get(role)
    return None if token is None else vocabulary.tokens[token]


def _check_logits(
    worker: ScoringWorker,
    reference: ReferenceScores,
    thresholds: Thresholds,
    own: tuple[ReferenceScores, Thresholds] | None,
    progress: Progress,
) -> list[Finding]:
    """Each window once through the artifact, compared with one reference or both; progress counts tokens."""
    comparison = Comparison(tie_margin=thresholds.tie_margin)
    fidelity = None if own is None else Comparison(tie_margin=own[1].tie_margin)
    total, done = sum(len(window) for window in reference.windows), 0
    for i, ids in enumerate(reference.windows):
        expected = reference.logits(i)
        logits = worker.logits(ids)
        comparison.add(ids, expected, logits)
        if own is not None and fidelity is not None and i < len(own[0].windows):
            fidelity.add(own[0].windows[i], own[0].logits(i), logits)
        done += len(ids)
        progress(STEP, done, total)
    findings = [check_agreement(comparison.agreement(), thresholds)]
    if own is not None and fidelity is not None:
        findings.append(_check_fidelity(fidelity.agreement(), own[1]))
    return findings


def _check_fidelity(found: Agreement, thresholds: Thresholds) -> Finding:
    finding = _fidelity(found, thresholds)
    return Finding(finding.values, [f"with the artifact's own weights: {fault}" for fault in finding.failures])


def _fidelity(found: Agreement, thresholds: Thresholds) -> Finding:
    figures = {"kl_mean": found.kl_mean, "kl_p99": found.kl_p99, "top1_agreement": found.top1_agreement}
    return Finding({"fidelity": Fidelity(thresholds=thresholds, tokens=found.tokens, **figures)}, thresholds.faults(**figures))


def check_agreement(found: Agreement, thresholds: Thresholds) -> Finding:
    values = {
        "tokens": found.tokens,
        "kl_mean": found.kl_mean,
        "kl_p99": found.kl_p99,
        "kl_max": found.kl_max,
        "top1_agreement": found.top1_agreement,
        "perplexity_reference": perplexity_of(found.nll_reference),
        "perplexity_artifact": perplexity_of(found.nll_artifact),
    }
    return Finding(values, thresholds.faults(kl_mean=found.kl_mean, kl_p99=found.kl_p99, top1_agreement=found.top1_agreement))
