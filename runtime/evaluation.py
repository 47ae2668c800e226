"""Quality of several artifacts on several tasks, as rows: one per artifact, cut, adapter and metric.

task        metrics, and the units of their standard errors (`edgeq.runtime.estimates`)
text        perplexity, nll_mean: windows; over the scored tokens, as `edgeq.runtime.quality` defines them
reference   kl_mean, kl_p99 (no error), top1_agreement: windows of the same text, against the reference (`edgeq.runtime.compare`)
choices     acc, acc_norm: items (`edgeq.runtime.choices`)
exact       exact_match: items (`edgeq.runtime.exact_match`)

Where a reference is given it is measured on every task as well, as it is, without cuts or adapters, and rows of the others say by how much
they differ from it, with a standard error of the difference over the same units. A reference in Hugging Face layout, which no runtime
here can run, answers for the text alone. QUALITY_VERSION changes with any definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeq.adapter_records import find_adapter
from edgeq.errors import RuntimeFailure
from edgeq.progress import Progress, silent
from edgeq.runtime.choices import ChoiceItem, score_choices
from edgeq.runtime.compare import check_same_tokens, compare_windows
from edgeq.runtime.elastic_package import open_elastic
from edgeq.runtime.engine import artifact_sha256, open_artifact, runtime_of
from edgeq.runtime.estimates import Estimate, exp_of, mean_of
from edgeq.runtime.exact_match import ExactItem, match_exactly
from edgeq.runtime.likelihood import Floats
from edgeq.runtime.prompts import PromptWriter
from edgeq.runtime.quality import text_windows, window_nll
from edgeq.runtime.worker import ScoringWorker

QUALITY_VERSION = 1
LOWER_IS_BETTER = frozenset({"perplexity", "nll_mean", "kl_mean", "kl_p99"})

Measured = Mapping[tuple[str, str], Estimate]  # by task and metric
FloatReference = Callable[[Sequence[Sequence[int]]], Callable[[int], Floats]]  # windows to logits of window i


@dataclass(frozen=True, kw_only=True)
class TaskFile:
    """What a task was read from: bare file name and hash."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """What to measure. text, choices, exact: what the files hold, by task name in `files`; empty for a task that is not wanted.

    ctx: tokens of a window and of the context. chunks: windows of the text at most, None for all. chat: prompts through the chat template.
    """

    files: Mapping[str, TaskFile]
    text: str | None = None
    choices: Sequence[ChoiceItem] = ()
    exact: Sequence[ExactItem] = ()
    ctx: int = 1024
    chunks: int | None = None
    chat: bool = False


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An artifact to measure, or a cut of one. artifact: as named. adapter: name and file, cut alike."""

    artifact: str
    name: str
    path: Path
    rate: float | None
    quant: str | None
    sha256: str
    adapter: tuple[str, Path] | None


@dataclass(frozen=True, kw_only=True)
class QualityRow:
    """One figure. rate, quant: None for a file that does not say. data: what the task was read from. n: items, or tokens, behind it.

    reference: name of what it was compared with, None without. difference: value less the reference's, None for the reference itself.
    """

    artifact: str
    name: str
    artifact_sha256: str
    runtime: str
    quant: str | None
    rate: float | None
    adapter: str | None
    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    reference: str | None
    difference: float | None
    difference_stderr: float | None
    data: TaskFile
    settings: Mapping[str, Any]
    library: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def opened(artifact: Path | str, rate: float | None, adapter: str | None) -> Iterator[Subject]:
    """An artifact as it is, or cut in memory for as long as the block lasts. Raises as `edgeq.api.evaluate`."""
    path, package = open_artifact(Path(artifact))
    beside = None if adapter is None else find_adapter(package, adapter)
    stated = {} if package is None else package.manifest["export"]
    name, quant = Path(artifact).resolve().name, None if package is None else package.manifest.get("plan", {}).get("quant")
    with ExitStack() as cuts:
        if rate is not None and (rate or stated.get("elastic")):
            elastic = open_elastic(Path(artifact))
            size = elastic.at_rate(rate)
            if not size.n_steps:
                rate = stated.get("rate")
            else:
                path = cuts.enter_context(elastic.cut_to_memory(size)).path
                if beside is not None:
                    beside = beside[0], cuts.enter_context(elastic.cut_adapter_to_memory(beside[1], size)).path
        else:
            rate = stated.get("rate")
        yield Subject(artifact=str(artifact), name=name, path=path, rate=rate, quant=quant, sha256=artifact_sha256(path), adapter=beside)


def measure(
    subject: Subject,
    tasks: Tasks,
    *,
    reference: ScoringWorker | FloatReference | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> tuple[Measured, str]:
    """Every figure of one artifact, and what ran it. reference: what to compare the text's logits with, if anything.

    With the progress steps "eval" for the text, "choices" and "exact".
    """
    adapter = None if subject.adapter is None else subject.adapter[1]
    found: dict[tuple[str, str], Estimate] = {}
    with ScoringWorker(subject.path, adapter=adapter, n_ctx=tasks.ctx, threads=threads) as worker:
        if tasks.text is not None:
            found |= _text(worker, tasks, reference, progress)
        writer = PromptWriter(worker, chat=tasks.chat)
        if tasks.choices:
            total = len(tasks.choices)
            scores = score_choices(writer, tasks.choices, n_ctx=tasks.ctx, on_items=lambda done: progress("choices", done, total))
            found["choices", "acc"], found["choices", "acc_norm"] = mean_of(scores.acc), mean_of(scores.acc_norm)
        if tasks.exact:
            matched = match_exactly(writer, tasks.exact, n_ctx=tasks.ctx, on_items=lambda done: progress("exact", done, len(tasks.exact)))
            found["exact", "exact_match"] = mean_of(matched)
        return found, worker.facts.library


def _text(
    worker: ScoringWorker, tasks: Tasks, reference: ScoringWorker | FloatReference | None, progress: Progress
) -> dict[tuple[str, str], Estimate]:
    assert tasks.text is not None
    windows = text_windows(worker, tasks.text, ctx=tasks.ctx, chunks=tasks.chunks)
    found: dict[tuple[str, str], Estimate] = {}
    if reference is None:
        nll = window_nll(worker, windows, progress=progress)
        mean = mean_of(nll.mean(axis=1), n=nll.size)
    else:
        if isinstance(reference, ScoringWorker):
            check_same_tokens(reference, worker, tasks.text, windows)
            expected: Callable[[int], Floats] = lambda i: reference.logits(windows[i])  # noqa: E731 (one of two ways to the same thing)
        else:
            expected = reference(windows)
        likeness = compare_windows(expected, worker, windows, on_windows=lambda done: progress("eval", done, len(windows)))
        mean = likeness.nll_artifact
        found["reference", "kl_mean"], found["reference", "kl_p99"] = likeness.kl_mean, likeness.kl_p99
        found["reference", "top1_agreement"] = likeness.top1_agreement
    return text_figures(mean, str(worker.artifact)) | found


def text_figures(nll_mean: Estimate, artifact: str) -> dict[tuple[str, str], Estimate]:
    """Perplexity and mean nll. Raises RuntimeFailure for a perplexity beyond all numbers."""
    try:
        return {("text", "perplexity"): exp_of(nll_mean), ("text", "nll_mean"): nll_mean}
    except OverflowError:
        message = (
            f"{artifact}: the mean negative log-likelihood is {nll_mean.value:.4g}, too large for a perplexity. The weights are damaged."
        )
        raise RuntimeFailure(message) from None


def rows_of(
    subject: Subject, tasks: Tasks, found: Measured, library: str, *, reference: str | None = None, expected: Measured | None = None
) -> list[QualityRow]:
    """Rows of one artifact. reference: name of what `expected` was measured on; both None where there is none, or for the reference."""
    rows = []
    for (task, metric), estimate in found.items():
        data = tasks.files["text" if task == "reference" else task]
        base = None if expected is None else expected.get((task, metric))
        difference, error = (None, None) if base is None else estimate.minus(base)
        rows.append(
            QualityRow(
                artifact=subject.artifact,
                name=subject.name,
                artifact_sha256=subject.sha256,
                runtime=runtime_of(subject.path),
                quant=subject.quant,
                rate=subject.rate,
                adapter=None if subject.adapter is None else subject.adapter[0],
                task=task,
                metric=metric,
                value=estimate.value,
                stderr=estimate.stderr,
                n=estimate.n,
                reference=reference,
                difference=difference,
                difference_stderr=error,
                data=data,
                settings={"ctx": tasks.ctx, "chunks": tasks.chunks, "chat": tasks.chat, "quality_version": QUALITY_VERSION},
                library=library,
            )
        )
    return rows
