"""`edgeq eval` for several artifacts and tasks, and the results files that it and `edgeq bench` write."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeq.errors import MissingDependency, SourceError, UsageError
from edgeq.output import check_file_target, staged_file
from edgeq.package import MODEL_ONNX, is_package
from edgeq.progress import Progress, silent

if TYPE_CHECKING:
    from edgeq.runtime.evaluation import FloatReference, Measured, QualityRow, Subject, TaskFile, Tasks
    from edgeq.runtime.likelihood import Floats
    from edgeq.runtime.worker import ScoringWorker

RESULTS_VERSION = 2


def evaluate_tasks(
    artifacts: Sequence[str | Path],
    *,
    text: str | Path | None = None,
    choices: str | Path | None = None,
    exact: str | Path | None = None,
    reference: str | Path | None = None,
    ctx: int = 1024,
    chunks: int | None = None,
    rates: Sequence[float] | None = None,
    adapter: str | None = None,
    chat: bool = False,
    threads: int | None = None,
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> list[QualityRow]:
    """Quality of packages, GGUF files and ONNX folders side by side; the tasks are defined in `edgeq.runtime.evaluation`.

    text: UTF-8 file for perplexity. choices, exact: jsonl files. reference: an artifact to compare with, which is measured too and comes
    first, or a model in Hugging Face layout (needs edgeq[export]), whose logits the text is compared with. rates: cuts of elastic
    packages. adapter: by name or path; every artifact is then measured without it and with it. chat: prompts through the chat template.
    output: also write the rows to this JSON file; an existing one is kept unless `force`.
    Raises UsageError for no artifacts or no task, SourceError for a malformed file with its line, and as `edgeq.api.evaluate`.
    """
    from edgeq.runtime.bench import check_rates
    from edgeq.runtime.evaluation import measure, opened, rows_of

    target = None if output is None else Path(output)
    if target is not None:
        check_file_target(target, force=force)
    if not artifacts:
        raise UsageError("nothing to measure; give at least one package or GGUF file")
    if text is None and choices is None and exact is None:
        raise UsageError("nothing to measure by; give a text, choices or exact answers")
    if reference is not None and text is None and _is_float(reference):
        raise UsageError(f"{reference}: a reference in float is compared on a text. Give --text.")
    check_rates(rates)
    tasks = read_tasks(text=text, choices=choices, exact=exact, ctx=ctx, chunks=chunks, chat=chat)
    rows: list[QualityRow] = []
    with _reference(reference, tasks, threads, progress) as (base, expected, scorer):
        name = None
        if base is not None:
            name = base.name
            measured, library = expected
            rows += rows_of(base, tasks, measured, library)
        elif reference is not None:
            name = Path(reference).resolve().name
        for artifact in artifacts:
            for rate in rates if rates is not None else [None]:
                for beside in [None] if adapter is None else [None, adapter]:
                    with opened(artifact, rate, beside) as subject:
                        found, library = measure(subject, tasks, reference=scorer, threads=threads, progress=progress)
                        rows += rows_of(subject, tasks, found, library, reference=name, expected=expected[0] if base else None)
    if target is not None:
        write_results(target, "quality", [row.to_json() for row in rows], force=force)
    return rows


@contextmanager
def _reference(
    reference: str | Path | None, tasks: Tasks, threads: int | None, progress: Progress
) -> Iterator[tuple[Subject | None, tuple[Measured, str], ScoringWorker | FloatReference | None]]:
    """The reference as a subject and what was measured on it, if it runs here; and what answers for its logits on the text."""
    from edgeq.runtime.evaluation import measure, opened
    from edgeq.runtime.worker import ScoringWorker

    if reference is None:
        yield None, ({}, ""), None
    elif _is_float(reference):
        yield None, ({}, ""), _float_reference(reference, progress)
    else:
        with opened(reference, None, None) as subject:
            measured = measure(subject, tasks, threads=threads, progress=progress)
            if tasks.text is None:
                yield subject, measured, None
                return
            with ScoringWorker(subject.path, n_ctx=tasks.ctx, threads=threads) as scorer:
                yield subject, measured, scorer


def _is_float(reference: str | Path) -> bool:
    """Whether it is a model in Hugging Face layout."""
    path = Path(reference)
    return (path / "config.json").is_file() and not is_package(path) and not (path / MODEL_ONNX).is_file()


def _float_reference(reference: str | Path, progress: Progress) -> FloatReference:
    """The model's logits by torch, in float32. Raises as `edgeq.api.inspect` for a model that edgeq does not read."""
    try:
        from edgeq.converters.sources.resolve import open_model
        from edgeq.reference import Reference
        from edgeq.reference_scores import TorchScores
    except ModuleNotFoundError as err:
        raise MissingDependency(err.name or "torch", "export") from err
    model = open_model(reference)
    made: dict[tuple[tuple[int, ...], ...], TorchScores] = {}  # weights are streamed once for all windows, and so once for all artifacts

    def logits(windows: Sequence[Sequence[int]]) -> Callable[[int], Floats]:
        key = tuple(map(tuple, windows))
        if max(map(max, key)) >= model.spec.n_vocab:
            raise UsageError(
                f"{reference} has {model.spec.n_vocab:,} tokens in its vocabulary, and the text's tokens go beyond them. "
                "KL compares models of one tokenizer; leave out --reference."
            )
        if key not in made:
            made[key] = TorchScores(Reference(model.spec, model.tensors), windows, progress=progress)
        return made[key].logits

    return logits


def read_tasks(
    *,
    text: str | Path | None,
    choices: str | Path | None,
    exact: str | Path | None,
    ctx: int = 1024,
    chunks: int | None = None,
    chat: bool = False,
) -> Tasks:
    """Read the files of the tasks. Raises SourceError naming file and line, UsageError for a ctx below 2 or chunks below 1."""
    from edgeq.runtime.choices import read_choices
    from edgeq.runtime.evaluation import TaskFile, Tasks
    from edgeq.runtime.exact_match import read_exact

    if ctx < 2 or (chunks is not None and chunks < 1):
        raise UsageError(f"ctx is {ctx} and chunks is {chunks}; expected at least 2 and 1")
    files: dict[str, TaskFile] = {}
    wanted: dict[str, Any] = {}
    for task, path, read in (("text", text, read_text), ("choices", choices, read_choices), ("exact", exact, read_exact)):
        if path is not None:
            wanted[task], digest = read(Path(path))
            files[task] = TaskFile(name=Path(path).name, sha256=digest)
    return Tasks(files=files, ctx=ctx, chunks=chunks, chat=chat, **wanted)


def read_text(path: Path) -> tuple[str, str]:
    """A UTF-8 text and its SHA-256. Raises SourceError."""
    import hashlib

    try:
        content = path.read_bytes()
        return content.decode("utf-8"), hashlib.sha256(content).hexdigest()
    except UnicodeDecodeError as err:
        raise SourceError(f"{path}: not UTF-8 text (byte {err.start}). Convert it to UTF-8 first.") from err
    except OSError as err:
        raise SourceError(f"{path}: cannot be read ({err.strerror}).") from err


def write_results(target: Path, kind: str, rows: Sequence[dict[str, Any]], *, force: bool = False) -> None:
    """Write rows as a results file that `edgeq report` reads."""
    document = {"edgeq_results": RESULTS_VERSION, "kind": kind, "rows": list(rows)}
    with staged_file(target, force=force) as stage:
        stage.write_text(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
