"""The Python API: what the command line calls, under the same names.

The one place besides `cli` where converters and runtime meet. Everything heavy is imported inside the functions.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeq import encoder_api
from edgeq.adapter_records import AdapterRecord, find_adapter, package_adapters
from edgeq.errors import EdgeqError, MissingDependency, PlanError, SourceError, UnsupportedError, UsageError
from edgeq.output import check_file_target, check_target
from edgeq.package import MODEL_ONNX, ArtifactRecord, Status, check_files, check_record, is_package, read_package
from edgeq.progress import Progress, silent
from edgeq.sizes import parse_bytes

FINGERPRINT = "reference.npz"

if TYPE_CHECKING:
    from edgeq.converters.adapters.request import Mode
    from edgeq.converters.carriers import FormatWish
    from edgeq.converters.export import Gate, Source
    from edgeq.converters.kept_files import KeptFile
    from edgeq.elastic import CutSize
    from edgeq.encoder_gate import EncoderGate
    from edgeq.gate import GateResult
    from edgeq.planning import Plan
    from edgeq.reference import Reference
    from edgeq.runtime.bench_fields import BenchResult
    from edgeq.runtime.elastic_package import ElasticPackage, Size
    from edgeq.runtime.quality import Evaluation
    from edgeq.runtime.session import Session
    from edgeq.spec import ModelSpec
    from edgeq.tensors import LazyTensor


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What `export` did. package is the folder, None after a dry run; gate is None when it was not run.

    regrid: what rounding lost, by kind of tensor and in `total`: squared error relative to squared values, plain and by importance.
    Empty when everything was copied. peak_rss_bytes: most memory this process ever had resident; None where the system does not tell.
    adapters: files of those that were kept.
    """

    plan: Plan
    package: Path | None
    artifacts: tuple[ArtifactRecord, ...]
    regrid: Mapping[str, Mapping[str, float]]
    gate: GateResult | None
    seconds: float
    peak_rss_bytes: int | None
    adapters: tuple[AdapterRecord, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "package": None if self.package is None else str(self.package),
            "artifacts": [artifact.to_json() for artifact in self.artifacts],
            "plan": self.plan.to_json(),
            "regrid": {kind: dict(lost) for kind, lost in self.regrid.items()},
            "gate": None if self.gate is None else self.gate.to_json(),
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "adapters": [adapter.to_json() for adapter in self.adapters],
        }


def export(
    model: str | Path,
    *,
    profile: str | Path,
    output: str | Path | None = None,
    format: FormatWish = "auto",
    quant: str = "auto",
    sort: Literal["edgeq", "uniql", "none"] | None = None,
    elastic: bool | None = None,
    prune: float = 0.0,
    adapters: Sequence[str | Path] = (),
    adapter_mode: Mode | None = None,
    adapter_rank: int | None = None,
    approx_rank: int | None = None,
    approx_energy: float | None = None,
    other_base: bool = False,
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

    format: "gguf", "onnx", or "auto" for what the profile's runtime reads.
    elastic: None makes the package elastic where the model can be cut; True insists, False makes it of one size. prune: cut that one size
    by this rate. sort: the order in which parts may go, "edgeq" by default where anything is cut.
    adapters: PATH[=NAME][:SCALE] each. adapter_mode: "merge" them into the weights, "keep" them beside these, or "auto", which decides by
    profile and measurement. adapter_rank: directions to take of nested adapters. approx_rank, approx_energy: keep changes of full rank
    as their best low-rank factors. other_base: take adapters that say they were made for other weights.
    A package that fails its gate is written, marked failed and returned: look at `result.gate.passed`.
    Raises an EdgeqError for anything else that goes wrong; then nothing is left under the output's name.
    """
    try:
        from edgeq.converters.adapters.request import AdapterWish, parse_references
        from edgeq.converters.draft import Wish
        from edgeq.converters.export import export_package
    except ModuleNotFoundError as err:
        raise MissingDependency(err.name or "torch", "export") from err
    from edgeq.runtime.memory import peak_rss_bytes

    if output is None and not dry_run:
        raise UsageError("export needs an output folder, unless dry_run is set")
    if encoder_api.is_encoder(model):
        raise UsageError(f"{model} is an encoder, which embeds texts and generates none. Use edgeq.export_encoder.")
    start = time.monotonic()
    result = export_package(
        model,
        output=None if output is None else Path(output),
        profile=profile,
        gate=_gate(threads) if verify else None,
        cut_sizes=_cut_sizes,
        format=format,
        quant=quant,
        wish=Wish(elastic=elastic, sort=sort, prune=prune),
        adapters=AdapterWish(
            requests=parse_references(adapters),
            mode=adapter_mode,
            rank=adapter_rank,
            approx_rank=approx_rank,
            approx_energy=approx_energy,
            other_base=other_base,
        ),
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
        regrid={} if result.package is None else result.package.manifest["regrid"],
        gate=result.gate,
        seconds=time.monotonic() - start,
        peak_rss_bytes=peak_rss_bytes(),
        adapters=() if result.package is None else tuple(package_adapters(result.package).values()),
    )


def _gate(threads: int | None) -> Gate:
    """The gate as the export pipeline calls it: the artifact's runtime in a child process against the torch reference.

    Where weights were rounded, the artifact is also compared with the reference on its own weights: that finds what the loss of a
    coarse grid would hide. Over the passages only, which saves half of the second pass. So is a cut of an elastic artifact.
    """
    from edgeq.gate import thresholds_for
    from edgeq.gate_prompts import gate_windows, passage_windows
    from edgeq.reference import Reference
    from edgeq.reference_scores import TorchScores
    from edgeq.runtime.fingerprint import make_fingerprint
    from edgeq.runtime.verify import run_gate

    def prove(artifact: Path, source: Source, progress: Progress) -> tuple[GateResult, Sequence[Path]]:
        model, n_ctx = source.model, min(source.model.spec.n_ctx, source.plan.memory.n_ctx)
        windows = gate_windows(source.tokenizer, source.held_back, n_ctx=n_ctx)
        scores = TorchScores(Reference(model.spec, model.tensors), windows, n_ctx=source.rope_ctx, progress=progress)
        matrices = [tensor for tensor in source.plan.tensors if len(tensor.shape) == 2]
        encoded = [tensor.grid for tensor in matrices if tensor.action == "encode"]
        thresholds = thresholds_for(encoded, copied=[tensor.grid for tensor in matrices if tensor.action == "copy"])
        own = None
        if any(not grid.is_float for grid in encoded):
            passages = passage_windows(source.tokenizer, n_ctx=n_ctx)
            own_scores = TorchScores(_as_written(artifact, source.stored), passages, n_ctx=scores.n_ctx, progress=progress)
            own = (own_scores, thresholds_for((), copied=[tensor.grid for tensor in matrices]))
        tokenizer = source.tokenizer
        verdict = run_gate(artifact, scores, tokenizer=tokenizer, thresholds=thresholds, own=own, threads=threads, progress=progress)
        passages = passage_windows(tokenizer, n_ctx=n_ctx) if source.kept else []
        for kept in source.kept:
            verdict = _prove_kept(verdict, artifact, kept, passages, rope_ctx=source.rope_ctx, threads=threads, progress=progress)
        if source.elastic and verdict.passed:
            verdict = _prove_cut(verdict, artifact, source, threads=threads, progress=progress)
        fingerprint = source.folder / FINGERPRINT
        make_fingerprint(scores, tokenizer=tokenizer, thresholds=thresholds).save(fingerprint)
        return verdict, [fingerprint]

    return prove


def _as_written(artifact: Path, spec: ModelSpec) -> Reference:
    """The reference on the weights that an artifact holds. spec: of the model in the file's order, and not the file's own, which may be
    what is wrong."""
    from edgeq.ports import widened
    from edgeq.reference import Reference

    if artifact.suffix == ".onnx":
        from edgeq.converters.onnx.read import read_weights

        return Reference(spec, read_weights(artifact, spec))
    from edgeq.converters.sources.gguf import read_gguf_model

    held = read_gguf_model(artifact)
    turns_whole = held.spec.rope.dim == held.spec.attention[0].head_dim
    return Reference(widened(spec, {})[0] if turns_whole else spec, held.tensors)


def _prove_kept(
    verdict: GateResult,
    artifact: Path,
    kept: KeptFile,
    windows: Sequence[Sequence[int]],
    *,
    rope_ctx: int | None,
    threads: int | None,
    progress: Progress,
) -> GateResult:
    """The artifact with an adapter beside it, over the passages, by the artifact's own limits."""
    from edgeq.reference import Reference
    from edgeq.reference_scores import TorchScores
    from edgeq.runtime.verify import check_kept

    scores = TorchScores(Reference(kept.reference.spec, kept.reference.tensors), windows, n_ctx=rope_ctx, progress=progress)
    found = check_kept(artifact, kept.path, scores, thresholds=verdict.thresholds, threads=threads, progress=progress)
    measured = {kept.name: found.values["fidelity"]} if found.values else {}
    failures = [f"with adapter {kept.name!r}: {failure}" for failure in found.failures]
    return replace(verdict, failures=(*verdict.failures, *failures), adapters={**verdict.adapters, **measured})


def _cut_sizes(package: Path, rates: Sequence[float]) -> Sequence[CutSize]:
    from edgeq.runtime.elastic_package import open_elastic

    opened = open_elastic(package)
    return opened.elastic.ladder.sizes(opened.bytes_of, rates)


def _sizes(spec: ModelSpec) -> list[tuple[int, ...]]:
    """What a cut changes of every block."""
    from edgeq.spec import Mlp

    return [(b.layer, b.n_ff) if isinstance(b, Mlp) else (b.layer, b.n_heads, b.n_kv_heads, b.head_dim) for b in spec.blocks]


def _cut_model(cut: Path, spec: ModelSpec) -> tuple[ModelSpec, Mapping[str, LazyTensor]]:
    """What a cut holds. spec: of it, as the ladder has it; a GGUF file says by itself, and is believed."""
    if cut.suffix != ".onnx":
        from edgeq.converters.sources.gguf import read_gguf_model

        left = read_gguf_model(cut)
        return left.spec, left.tensors
    from edgeq.converters.onnx.read import read_weights
    from edgeq.runtime.onnx_file import read_onnx
    from edgeq.runtime.onnx_sizes import projections

    file = read_onnx(cut)
    names = {tensor.name for tensor in file.proto.graph.initializer}
    if any(p.kind == "down_proj" and f"{name}.Add.bias" in names for name, p in projections(file).items()):
        spec = replace(spec, biases=spec.biases | {"down"})
    return spec, read_weights(cut, spec)


PROVEN_RATE = 0.25  # of the cut that the gate tries


def _prove_cut(verdict: GateResult, artifact: Path, source: Source, *, threads: int | None, progress: Progress) -> GateResult:
    """Cut the package as a device will, and compare its runtime's outputs with the reference on what the cut holds."""
    from edgeq.gate import Fidelity, thresholds_for
    from edgeq.gate_prompts import passage_windows
    from edgeq.ports import with_sizes
    from edgeq.reference import Reference
    from edgeq.reference_scores import TorchScores
    from edgeq.runtime.elastic_package import open_elastic
    from edgeq.runtime.verify import run_gate

    model, n_ctx = source.model, min(source.model.spec.n_ctx, source.plan.memory.n_ctx)
    package, target = open_elastic(source.folder), source.folder / ("proof" if artifact.suffix == ".onnx" else "proof.gguf")
    size = package.at_rate(PROVEN_RATE)
    thresholds = thresholds_for((), copied=[tensor.grid for tensor in source.plan.tensors if len(tensor.shape) == 2])
    try:
        package.cut(size, target, threads=threads)
        cut = target / MODEL_ONNX if target.is_dir() else target
        spec, tensors = _cut_model(cut, with_sizes(source.stored, size.kept))
        passages = passage_windows(source.tokenizer, n_ctx=n_ctx)
        scores = TorchScores(Reference(spec, tensors), passages, n_ctx=source.rope_ctx, progress=progress)
        found = run_gate(cut, scores, tokenizer=source.tokenizer, thresholds=thresholds, threads=threads, progress=progress)
    finally:
        if target.is_dir():
            shutil.rmtree(target)
        target.unlink(missing_ok=True)
    failures = list(found.failures)
    if _sizes(spec) != _sizes(with_sizes(model.spec, size.kept)):
        failures.append("it has other sizes than its ladder says")
    fidelity = None
    if found.kl_mean is not None and found.kl_p99 is not None and found.top1_agreement is not None:
        fidelity = Fidelity(
            thresholds=thresholds, tokens=found.tokens, kl_mean=found.kl_mean, kl_p99=found.kl_p99, top1_agreement=found.top1_agreement
        )
    failures = [f"cut by {PROVEN_RATE:.0%}: {failure}" for failure in failures]
    return replace(verdict, failures=(*verdict.failures, *failures), cut=fidelity, cut_rate=PROVEN_RATE)


@dataclass(frozen=True, kw_only=True)
class CutFile:
    """A cut that was written. rate: as asked for; for a budget, as reached. removed_fraction: of the parameters of all blocks.

    adapter_path: the adapter that was cut with it; None without one.
    """

    path: Path
    bytes: int
    rate: float
    removed_fraction: float
    seconds: float
    adapter_path: Path | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "rate": round(self.rate, 6),
            "removed_fraction": round(self.removed_fraction, 6),
            "seconds": round(self.seconds, 3),
            "adapter_path": None if self.adapter_path is None else str(self.adapter_path),
        }


def cut(
    package: str | Path,
    *,
    output: str | Path,
    rate: float | None = None,
    budget: int | str | None = None,
    adapter: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> CutFile:
    """Cut an elastic package to a stock GGUF file, by a rate or to a budget of bytes (a number, or text like "70MB"). Needs no torch.

    A package in ONNX is cut to a folder; the budget is for its graph and weights.
    adapter: also cut this adapter of the package, by name, or another adapter of its artifact, by path; "small.gguf" gets
    "small-NAME.lora.gguf" beside it, and the folder "small" gets "small-NAME.onnx_adapter", on which the budget does not count.
    Raises UsageError unless exactly one of rate and budget is given, and for an output whose name is not that of a .gguf file or a folder
    as the package has it; PlanError for a rate
    outside 0 to 0.35, a budget below the smallest cut, or a cut that leaves nothing of the adapter; AdapterError for one that is not the
    package's; PackageError for what is no elastic package, or a damaged one; OutputError
    when the output exists, is an input, or cannot be written. Then nothing is left under the output's name.
    """
    from edgeq.runtime.elastic_package import opened_to_cut

    start = time.monotonic()
    if (rate is None) == (budget is None):
        raise UsageError("a cut needs either a rate or a budget: give one of --rate and --budget.")
    target = Path(output)
    with opened_to_cut(Path(package)) as elastic:
        if elastic.path.suffix == ".onnx":
            if target.suffix in (".gguf", ".onnx"):
                raise UsageError(f"{target}: a cut of an ONNX package is a folder; give a name without {target.suffix}.")
            check_target(target, force=force, inputs=elastic.files)
        elif target.suffix != ".gguf":
            raise UsageError(f"{target}: a cut is a GGUF file; give a name that ends in .gguf.")
        else:
            check_file_target(target, force=force, inputs=elastic.files)
        if rate is not None:
            size = elastic.at_rate(rate)
        else:
            assert budget is not None
            size = elastic.at_budget(parse_bytes(budget) if isinstance(budget, str) else budget)
        beside = None if adapter is None else _cut_adapter(elastic, adapter, size, target, force=force)
        try:
            written = elastic.cut(size, target, force=force, progress=progress)
        except BaseException:
            if beside is not None:
                beside.unlink(missing_ok=True)
            raise
    return CutFile(
        path=target,
        bytes=written.bytes,
        rate=size.rate,
        removed_fraction=size.removed_fraction,
        seconds=time.monotonic() - start,
        adapter_path=beside,
    )


def _cut_adapter(elastic: ElasticPackage, adapter: str, size: Size, target: Path, *, force: bool) -> Path:
    """Cut an adapter as its base will be, and return where it is."""
    name, source = find_adapter(elastic.package, adapter)
    beside = target.with_name(f"{target.name.removesuffix(elastic.path.suffix)}-{name}{elastic.adapter_suffix}")
    elastic.cut_adapter(source, beside, size, force=force)
    return beside


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found. status: the gate's verdict at export; gate: the comparison with the stored fingerprint, if there is one."""

    package: Path
    files: int
    status: Status
    gate: GateResult | EncoderGate | None

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

    Raises PackageError when a file is missing or does not match its hash, or when an elastic package's files do not fit each other;
    AdapterError for an adapter of the package that is broken or does not fit its artifact.
    """
    from edgeq.runtime.adapter_formats import check_base, read_adapter
    from edgeq.runtime.elastic_package import check_elastic
    from edgeq.runtime.engine import read_facts
    from edgeq.runtime.fingerprint import Fingerprint, check_fingerprint

    opened = read_package(Path(package))
    if encoder_api.is_encoder_package(opened):
        files, found = encoder_api.verify_encoder(opened, threads=threads, progress=progress)
        return Verification(package=opened.folder, files=files, status=opened.status, gate=found)
    adapters = package_adapters(opened).values()
    total = sum(record.bytes for record in (*opened.artifacts, *opened.side_files, *adapters))
    done = 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        progress("verify", done, total)

    check_files(opened, on_bytes=count)
    if opened.manifest["export"].get("elastic"):
        check_elastic(opened)
    for adapter in adapters:
        check_record(opened, adapter, on_bytes=count)
        facts = read_facts(opened.artifact_path())
        check_base(read_adapter(opened.folder / adapter.path, facts), facts)
    gate = None
    if any(record.path == FINGERPRINT for record in opened.side_files):
        stored = Fingerprint.load(opened.folder / FINGERPRINT)
        gate = check_fingerprint(opened.artifact_path(), stored, threads=threads, progress=progress)
    return Verification(
        package=opened.folder, files=len(opened.artifacts) + len(opened.side_files) + len(adapters), status=opened.status, gate=gate
    )


def evaluate(
    artifact: str | Path,
    text: str | Path,
    *,
    ctx: int = 1024,
    chunks: int | None = None,
    rate: float | None = None,
    adapter: str | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Perplexity of a package, GGUF file or ONNX folder on a UTF-8 text file; the definition is in `edgeq.runtime.quality`.

    rate: score a cut of an elastic package, made in memory. adapter: with this adapter of the package, by name, or a GGUF adapter by path;
    it is cut alike.
    """
    from edgeq.runtime.engine import open_artifact
    from edgeq.runtime.quality import perplexity

    path = Path(text)
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as err:
        raise SourceError(f"{path}: not UTF-8 text (byte {err.start}). Convert it to UTF-8 first.") from err
    except OSError as err:
        raise SourceError(f"{path}: cannot be read ({err.strerror}).") from err
    settings: dict[str, Any] = {"ctx": ctx, "chunks": chunks, "threads": threads, "progress": progress}
    whole, package = open_artifact(Path(artifact))
    beside = None if adapter is None else find_adapter(package, adapter)[1]
    if rate is None:
        return perplexity(whole, content, adapter=beside, **settings)
    from edgeq.runtime.elastic_package import open_elastic

    elastic = open_elastic(Path(artifact))
    size = elastic.at_rate(rate)
    with ExitStack() as cuts:
        small = cuts.enter_context(elastic.cut_to_memory(size))
        if beside is not None:
            beside = cuts.enter_context(elastic.cut_adapter_to_memory(beside, size)).path
        return perplexity(small.path, content, adapter=beside, **settings)


def bench(
    artifacts: Sequence[str | Path],
    *,
    prompt_tokens: int | Sequence[int] = 512,
    gen_tokens: int = 128,
    repeat: int = 5,
    batch: int | Sequence[int] = 1,
    threads: int | Sequence[int] | None = None,
    device: str = "cpu",
    kv_type: str | None = None,
    rates: Sequence[float] | None = None,
    adapter: str | None = None,
    against: str | Path | None = None,
    cold: bool = True,
    retakes: int = 2,
    wait_s: float = 0.0,
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> list[BenchResult]:
    """Measure packages, GGUF files and ONNX folders in turns; arguments and errors as in `edgeq.runtime.bench.bench`.

    output: also write the results to this JSON file, for `edgeq.report`; an existing one is kept unless `force`.
    Needs edgeq[llama] or edgeq[onnx].
    """
    from edgeq.quality_api import write_results
    from edgeq.runtime.bench import bench as measure

    target = None if output is None else Path(output)
    if target is not None:
        check_file_target(target, force=force)
    results = measure(
        artifacts,
        prompt_tokens=prompt_tokens,
        gen_tokens=gen_tokens,
        repeat=repeat,
        batch=batch,
        threads=threads,
        device=device,
        kv_type=kv_type,
        rates=rates,
        adapter=adapter,
        against=against,
        cold=cold,
        retakes=retakes,
        wait_s=wait_s,
        progress=progress,
    )
    if target is not None:
        write_results(target, "bench", [result.to_json() for result in results], force=force)
    return results


def load(
    package: str | Path,
    *,
    rate: float | Literal["auto"] | None = None,
    adapter: str | Mapping[str, float] | None = None,
    adapter_budget: int | None = None,
    patchable: bool = False,
    n_ctx: int | None = None,
    threads: int | None = None,
    kv_type: str | None = None,
    device: str = "cpu",
) -> Session:
    """Load a package, GGUF file or ONNX folder for generation; see `edgeq.runtime.session`. Needs edgeq[llama] or edgeq[onnx].

    rate: cut an elastic package in memory; "auto" takes the smallest rate that fits the memory free now. adapter: an adapter of the package
    by name, or a GGUF adapter by path, or several with their scales. adapter_budget: bytes that adapters may take in memory, 256 MiB by
    default. patchable: read the weights into memory, so that `session.apply_patch` can change them.
    """
    from edgeq.runtime.adapter_pool import DEFAULT_BUDGET
    from edgeq.runtime.session import load as open_session

    budget = DEFAULT_BUDGET if adapter_budget is None else adapter_budget
    return open_session(
        package,
        rate=rate,
        adapter=adapter,
        adapter_budget=budget,
        patchable=patchable,
        n_ctx=n_ctx,
        threads=threads,
        kv_type=kv_type,
        device=device,
    )


def inspect(ref: str | Path) -> dict[str, Any]:
    """Describe a package, a GGUF file, an ONNX folder or a model, reading no weights.

    Models in Hugging Face layout need edgeq[export], ONNX folders edgeq[onnx].
    """
    from edgeq.inspection import describe_gguf, describe_model, describe_package

    path = Path(ref)
    if is_package(path):
        package = read_package(path)
        return encoder_api.describe_encoder_package(package) if encoder_api.is_encoder_package(package) else describe_package(package)
    if encoder_api.describes_encoder(path):
        return encoder_api.describe_encoder(path)
    if path.suffix == ".onnx" or (path / MODEL_ONNX).is_file():
        from edgeq.runtime.onnx_describe import describe_onnx

        return describe_onnx(path / MODEL_ONNX if path.is_dir() else path)
    if path.is_file():
        return describe_gguf(path, _cuttable_gguf(path))
    from edgeq.converters.sources.resolve import open_model

    model = open_model(ref)
    return describe_model(model, _cuttable(model.spec))


def _cuttable_gguf(path: Path) -> Mapping[str, Mapping[str, str]]:
    """The same for a GGUF file. Reading its header as a model may fail where llama.cpp would not: then nothing is known."""
    from edgeq.converters.sources.gguf import read_gguf_model

    try:
        return _cuttable(read_gguf_model(path).spec)
    except EdgeqError as err:
        logging.getLogger(__name__).debug("%s: %s", path, err)
        return {}


def _cuttable(spec: ModelSpec) -> Mapping[str, Mapping[str, str]]:
    """What an elastic export of a model could be cut by; nothing for a model that cannot be exported."""
    from edgeq.converters.gguf.cuttable import cuttable

    try:
        return {port: {"freedom": cut.freedom, "reason": cut.reason} for port, cut in cuttable(spec).items()}
    except (PlanError, UnsupportedError):
        return {}
