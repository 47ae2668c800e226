"""The Python API: what the command line calls, under the same names.

The one place besides `cli` where converters and runtime meet. Everything heavy is imported inside the functions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeq.errors import MissingDependency, SourceError, UsageError
from edgeq.output import check_file_target, staged_file
from edgeq.package import ArtifactRecord, Status, check_files, is_package, read_package, resolve_artifact
from edgeq.progress import Progress, silent

FINGERPRINT = "reference.npz"

if TYPE_CHECKING:
    from edgeq.converters.export import Gate, Source
    from edgeq.gate import GateResult
    from edgeq.planning import Plan
    from edgeq.runtime.bench import BenchResult
    from edgeq.runtime.quality import Evaluation
    from edgeq.runtime.session import Session


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What `export` did. package is the folder, None after a dry run; gate is None when it was not run.

    peak_rss_bytes: most memory this process ever had resident; None where the system does not tell.
    """

    plan: Plan
    package: Path | None
    artifacts: tuple[ArtifactRecord, ...]
    gate: GateResult | None
    seconds: float
    peak_rss_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        return {
            "package": None if self.package is None else str(self.package),
            "artifacts": [artifact.to_json() for artifact in self.artifacts],
            "plan": self.plan.to_json(),
            "gate": None if self.gate is None else self.gate.to_json(),
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
        }


def export(
    model: str | Path,
    *,
    profile: str | Path,
    output: str | Path | None = None,
    quant: str = "auto",
    sort: Literal["none"] = "none",
    elastic: bool = False,
    calibration: str | Path | None = None,
    n_ctx: int | None = None,
    dry_run: bool = False,
    verify: bool = True,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
    on_plan: Callable[[Plan], None] = lambda plan: None,
) -> ExportResult:
    """Export a model to a package folder for a device; see `edgeq export --help`. Needs edgeq[export].

    A package that fails its gate is written, marked failed and returned: look at `result.gate.passed`.
    Raises an EdgeqError for anything else that goes wrong; then nothing is left under the output's name.
    """
    try:
        from edgeq.converters.export import export_package
    except ModuleNotFoundError as err:
        raise MissingDependency(err.name or "torch", "export") from err
    from edgeq.runtime.memory import peak_rss_bytes

    if output is None and not dry_run:
        raise UsageError("export needs an output folder, unless dry_run is set")
    start = time.monotonic()
    result = export_package(
        model,
        output=None if output is None else Path(output),
        profile=profile,
        gate=_gate(threads) if verify else None,
        quant=quant,
        sort=sort,
        elastic=elastic,
        calibration=None if calibration is None else Path(calibration),
        n_ctx=n_ctx,
        dry_run=dry_run,
        force=force,
        threads=threads,
        progress=progress,
        on_plan=on_plan,
    )
    return ExportResult(
        plan=result.plan,
        package=None if result.package is None else result.package.folder,
        artifacts=() if result.package is None else result.package.artifacts,
        gate=result.gate,
        seconds=time.monotonic() - start,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _gate(threads: int | None) -> Gate:
    """The gate as the export pipeline calls it: llama.cpp in a child process against the torch reference.

    Where weights were rounded, the artifact is also compared with the reference on its own weights: that finds what the loss of a
    coarse grid would hide. Over the passages only, which saves half of the second pass.
    """
    from edgeq.converters.sources.gguf import read_gguf_model
    from edgeq.gate import thresholds_for
    from edgeq.gate_prompts import gate_windows, passage_windows
    from edgeq.reference import Reference
    from edgeq.reference_scores import TorchScores
    from edgeq.runtime.fingerprint import make_fingerprint
    from edgeq.runtime.verify import run_gate

    def prove(artifact: Path, source: Source, progress: Progress) -> tuple[GateResult, Sequence[Path]]:
        model, n_ctx = source.model, min(source.model.spec.n_ctx, source.plan.memory.n_ctx)
        windows = gate_windows(model.tokenizer, source.held_back, n_ctx=n_ctx)
        scores = TorchScores(Reference(model.spec, model.tensors), windows, progress=progress)
        matrices = [tensor for tensor in source.plan.tensors if len(tensor.shape) == 2]
        encoded = [tensor.grid for tensor in matrices if tensor.action == "encode"]
        thresholds = thresholds_for(encoded, copied=[tensor.grid for tensor in matrices if tensor.action == "copy"])
        own = None
        if any(not grid.is_float for grid in encoded):
            rounded = Reference(model.spec, read_gguf_model(artifact).tensors)  # the source's spec: the file's may be what is wrong
            passages = passage_windows(model.tokenizer, n_ctx=n_ctx)
            own_scores = TorchScores(rounded, passages, n_ctx=scores.n_ctx, progress=progress)
            own = (own_scores, thresholds_for((), copied=[tensor.grid for tensor in matrices]))
        verdict = run_gate(artifact, scores, tokenizer=model.tokenizer, thresholds=thresholds, own=own, threads=threads, progress=progress)
        fingerprint = artifact.parent / FINGERPRINT
        make_fingerprint(scores, tokenizer=model.tokenizer, thresholds=thresholds).save(fingerprint)
        return verdict, [fingerprint]

    return prove


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found. status: the gate's verdict at export; gate: the comparison with the stored fingerprint, if there is one."""

    package: Path
    files: int
    status: Status
    gate: GateResult | None

    @property
    def failures(self) -> tuple[str, ...]:
        exported = ("its gate failed when it was exported",) if self.status == "failed" else ()
        return exported + (() if self.gate is None else self.gate.failures)

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        return {
            "package": str(self.package),
            "passed": self.passed,
            "files": self.files,
            "status": self.status,
            "gate": None if self.gate is None else self.gate.to_json(),
            "failures": list(self.failures),
        }


def verify(package: str | Path, *, threads: int | None = None, progress: Progress = silent) -> Verification:
    """Check a package on this machine: every hash, then outputs and token ids against the stored reference. Needs no torch.

    Raises PackageError when a file is missing or does not match its hash.
    """
    from edgeq.runtime.fingerprint import Fingerprint, check_fingerprint

    opened = read_package(Path(package))
    total = sum(record.bytes for record in (*opened.artifacts, *opened.side_files))
    done = 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        progress("verify", done, total)

    check_files(opened, on_bytes=count)
    gate = None
    if any(record.path == FINGERPRINT for record in opened.side_files):
        stored = Fingerprint.load(opened.folder / FINGERPRINT)
        gate = check_fingerprint(opened.artifact_path(), stored, threads=threads, progress=progress)
    return Verification(package=opened.folder, files=len(opened.artifacts) + len(opened.side_files), status=opened.status, gate=gate)


def evaluate(
    artifact: str | Path,
    text: str | Path,
    *,
    ctx: int = 1024,
    chunks: int | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Perplexity of a package or GGUF file on a UTF-8 text file; the definition is in `edgeq.runtime.quality`."""
    from edgeq.runtime.quality import perplexity

    path = Path(text)
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as err:
        raise SourceError(f"{path}: not UTF-8 text (byte {err.start}). Convert it to UTF-8 first.") from err
    except OSError as err:
        raise SourceError(f"{path}: cannot be read ({err.strerror}).") from err
    file, _ = resolve_artifact(Path(artifact))
    return perplexity(file, content, ctx=ctx, chunks=chunks, threads=threads, progress=progress)


def bench(
    artifacts: Sequence[str | Path],
    *,
    prompt_tokens: int = 512,
    gen_tokens: int = 128,
    repeat: int = 5,
    threads: int | None = None,
    device: str = "cpu",
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> list[BenchResult]:
    """Measure packages or GGUF files in turns; the metrics are defined in `edgeq.runtime.bench`. Needs edgeq[llama].

    output: also write the results to this JSON file; an existing one is kept unless `force`.
    """
    from edgeq.runtime.bench import bench as measure

    target = None if output is None else Path(output)
    if target is not None:
        check_file_target(target, force=force)
    results = measure(
        artifacts, prompt_tokens=prompt_tokens, gen_tokens=gen_tokens, repeat=repeat, threads=threads, device=device, progress=progress
    )
    if target is not None:
        with staged_file(target, force=force) as stage:
            rows = [result.to_json() for result in results]
            stage.write_text(json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return results


def load(
    package: str | Path, *, n_ctx: int | None = None, threads: int | None = None, kv_type: str | None = None, device: str = "cpu"
) -> Session:
    """Load a package or GGUF file for generation; see `edgeq.runtime.session`. Needs edgeq[llama]."""
    from edgeq.runtime.session import load as open_session

    return open_session(package, n_ctx=n_ctx, threads=threads, kv_type=kv_type, device=device)


def inspect(ref: str | Path) -> dict[str, Any]:
    """Describe a package, a GGUF file or a model, reading no weights. Models other than GGUF files need edgeq[export]."""
    from edgeq.inspection import describe_gguf, describe_model, describe_package

    path = Path(ref)
    if is_package(path):
        return describe_package(read_package(path))
    if path.is_file():
        return describe_gguf(path)
    from edgeq.converters.sources.resolve import open_model

    return describe_model(open_model(ref))
