"""The export pipeline, read top to bottom: open, decide on adapters, draft, check, sort, calibrate, write, prove, sign.

The gate runs the artifact in its real runtime, which converters do not know: it comes in as a callable, and so does what a cut comes to.
Everything is written to a staging folder that gets its final name only when the manifest stands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from edgeq.calibration import SORTING_TOKENS, Importance, importance, input_ranges, sorting_windows, split
from edgeq.converters.adapters.request import NO_ADAPTERS, AdapterWish, open_adapters
from edgeq.converters.carriers import Artifact, Carrier, FormatWish, carrier_for
from edgeq.converters.disposition import decide
from edgeq.converters.draft import AS_ALLOWED, RATES, Draft, Wish
from edgeq.converters.kept_files import KeptFile, merged_entry
from edgeq.converters.records import fingerprint, hash_inputs, regrid_summary, rounding_faults, versions
from edgeq.converters.sorted_model import pruned_model, sort_model, sorted_model
from edgeq.converters.sources.resolve import open_model
from edgeq.elastic import MAX_RATE, CutSize
from edgeq.elastic_files import write_elastic
from edgeq.errors import SourceError
from edgeq.gate import GateResult
from edgeq.model import Model, Tokenizer
from edgeq.output import check_disk, check_target, staged_folder
from edgeq.package import Package, read_package, record_files, write_manifest
from edgeq.planning import Plan, check_ram, export_bytes, side_bytes, sorting_bytes
from edgeq.profiles import load_profile
from edgeq.progress import Progress, silent
from edgeq.reference import Reference
from edgeq.sorting import Sorting
from edgeq.spec import ModelSpec

WINDOW = 512  # tokens per calibration window
MIN_WINDOW = 16  # for texts so short that four windows of 512 do not come out of them
WINDOWS = 16  # windows behind the importance matrix; sorting has its own
HELD_BACK = 1  # windows of the calibration text that only the gate sees


class Gate(Protocol):
    """Compares a written artifact with its source. May write side files into the package's folder and returns their paths."""

    def __call__(self, artifact: Path, source: Source, progress: Progress) -> tuple[GateResult, Sequence[Path]]: ...


class CutSizes(Protocol):
    """What cuts of an elastic package come to, rate by rate."""

    def __call__(self, package: Path, rates: Sequence[float]) -> Sequence[CutSize]: ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the gate compares with: for a pruned package the pruned model in float, else the model as it came.

    folder: of the package so far. tokenizer: the model's, as the artifact's runtime has it. stored: spec of the model in the order of the
    file, which may turn pairs of dimensions in another order than the source does. held_back: windows of the calibration text that
    calibration did not see. elastic: the folder is a package that can be cut. kept: adapters beside the artifact. rope_ctx: the context by
    which LongRoPE chose its factors, where the file has them.
    """

    model: Model
    folder: Path
    tokenizer: Tokenizer
    stored: ModelSpec
    plan: Plan
    held_back: Sequence[Sequence[int]]
    elastic: bool = False
    kept: Sequence[KeptFile] = ()
    rope_ctx: int | None = None


@dataclass(frozen=True, kw_only=True)
class Export:
    """What an export came to. package is None after a dry run, gate when it was not run."""

    plan: Plan
    package: Package | None = None
    gate: GateResult | None = None


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    name: str
    text: str

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": hashlib.sha256(self.text.encode()).hexdigest()}


@dataclass(frozen=True, kw_only=True)
class _Made:
    """What is to be written. model: in the order of the file. source: the same function in float. importance: if it is
    known already. removed_fraction: what was pruned.
    """

    model: Model
    source: Model
    plan: Plan
    elastic: Sorting | None = None
    importance: Importance | None = None
    removed_fraction: float = 0.0


def export_package(
    model_ref: str | Path,
    *,
    output: Path | None,
    profile: str | Path,
    gate: Gate | None,
    cut_sizes: CutSizes,
    format: FormatWish = "auto",
    quant: str = "auto",
    wish: Wish = AS_ALLOWED,
    adapters: AdapterWish = NO_ADAPTERS,
    calibration: Path | None = None,
    n_ctx: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
    on_plan: Callable[[Plan], None] = lambda plan: None,
) -> Export:
    """Export a model to a package folder; see the module docstring for the steps.

    output may be None for a dry run. gate None leaves the package unverified. on_plan sees the plan before the work begins.
    Raises any EdgeqError; nothing is left under the final name unless the package is whole. A package that fails its gate is
    written and marked failed.
    """
    device = load_profile(profile)
    carrier = carrier_for(format, device)
    text = read_calibration(calibration)
    base = open_model(model_ref, progress=progress)
    opened = open_adapters(adapters, base)
    files = (*base.files, *(file for adapter, _ in opened for file in adapter.files))
    if output is not None:
        check_target(output, force=force, inputs=files)
    decided = decide(
        base,
        opened,
        adapters,
        device,
        lambda variant, adapted=(): carrier.draft(variant, device, quant, wish, n_ctx=n_ctx, adapted=adapted),
        lambda: base.tokenizer.encode(text.text),
        progress=progress,
    )
    model, draft = decided.model, decided.draft
    on_plan(draft.plan)
    if dry_run or output is None:
        return Export(plan=draft.plan)

    beside = sum(kept.plan.keep.adapter_bytes for kept in decided.kept)
    check_disk(output, draft.plan.file_bytes + beside + side_bytes(model.spec, elastic=draft.elastic) + _proof_bytes(draft))
    check_ram(max(export_bytes(model.spec, WINDOW * WINDOWS), sorting_bytes(model.spec, SORTING_TOKENS) if _sorts(draft) else 0))
    with staged_folder(output, force=force, inputs=files) as stage:
        inputs = hash_inputs(base.files, progress)
        ids = model.tokenizer.encode(text.text)
        windows, held_back = calibration_windows(ids, model.spec.n_ctx)
        checked: list[list[int]] = []
        if _sorts(draft):
            unseen = sum(map(len, held_back))
            windows, checked = sorting_windows(ids[: len(ids) - unseen], model.spec.n_ctx)
        made = make(
            model,
            draft,
            carrier,
            windows,
            checked,
            lambda small: carrier.plan(small, device, draft.plan.quant, n_ctx=n_ctx),
            progress=progress,
        )
        plan = made.plan
        used = made.importance if plan.needs_importance else None
        if plan.needs_importance and used is None:
            used = importance(Reference(made.model.spec, made.model.tensors), windows, progress=progress)
        ranges = input_ranges(Reference(made.model.spec, made.model.tensors), windows, progress=progress) if plan.needs_ranges else None
        artifact = carrier.write(stage, made.model, device, draft, plan, used, ranges=ranges, threads=threads, progress=progress)
        side_paths = list(artifact.side)
        if made.elastic is not None:
            found = made.elastic
            side_paths += write_elastic(stage, ladder=found.ladder, hidden=found.hidden, orders=found.orders, sort=draft.sort)
        kept = carrier.write_kept(stage, decided.kept, base.spec, made.model, draft, made.elastic, artifact, progress=progress)
        manifest: dict[str, Any] = {
            "status": "unverified",
            "model": {
                "name": model.name,
                "family": model.spec.family,
                "architecture": artifact.architecture,
                "tensors": len(artifact.tensors),
            },
            "source": {
                "format": model.format,
                "quantization": None if model.quantization is None else dict(model.quantization),
                "files": [file.to_json() for file in inputs],
            },
            "export": {
                "format": carrier.format,
                "profile": device.name,
                "quant": plan.quant,
                "n_ctx": plan.memory.n_ctx,
                "kv_type": plan.memory.kv_type,
                "rate": draft.prune,
                "removed_fraction": made.removed_fraction,
                "elastic": draft.elastic,
                "sort": draft.sort,
                "calibration": {**text.to_json(), "tokens": sum(map(len, (*windows, *checked)))} if used or draft.sort != "none" else None,
            },
            "plan": plan.to_json(),
            "artifacts": [record.to_json() for record in artifact.records],
            "side_files": _records(stage, side_paths),
            "tokenizer": {**fingerprint(model.tokenizer.vocabulary), "differs": list(artifact.differs)},
            "adapters": [
                *(merged_entry(one, adapter, progress) for one, adapter in decided.merged),
                *(file.record.to_json() for file in kept),
            ],
            "regrid": regrid_summary(artifact.tensors, artifact.errors),
            "gate": None,
            "tools": versions(artifact.tools),
        }
        write_manifest(stage, manifest)  # a package from here on, as a device will find it
        if made.elastic is not None and draft.cuts is not None:
            sizes = [size.to_json() for size in cut_sizes(stage, RATES)]
            manifest["elastic"] = {"max_rate": MAX_RATE, "sizes": sizes, "cuttable": draft.cuts.to_json()}
        verdict: GateResult | None = None
        if gate is not None:
            source = _source(made, stage, artifact, draft, held_back, kept)
            verdict, more_paths = gate(artifact.path, source, progress)
            verdict = replace(verdict, failures=(*verdict.failures, *rounding_faults(artifact.tensors, artifact.errors)))
            manifest["status"] = "passed" if verdict.passed else "failed"
            manifest["side_files"] += _records(stage, more_paths)
            manifest["gate"] = verdict.to_json()
        write_manifest(stage, manifest)
    return Export(plan=plan, package=read_package(output), gate=verdict)


def make(
    model: Model,
    draft: Draft,
    carrier: Carrier,
    windows: Sequence[Sequence[int]],
    checked: Sequence[Sequence[int]],
    plan_pruned: Callable[[Model], Plan],
    *,
    progress: Progress = silent,
) -> _Made:
    """Sort the model, and prune it, as the draft has it. checked: windows that show how far compensation can be trusted."""
    if draft.cuts is None:
        return _Made(model=model, source=model, plan=draft.plan)
    found, used = sort_model(model, draft.cuts, draft.sort, windows, checked, progress=progress)
    if draft.elastic:
        whole = sorted_model(model, found)
        return _Made(model=whole, source=model, plan=carrier.refit(draft.plan, whole), elastic=found, importance=used)
    small, removed = pruned_model(model, found, draft.prune, down_bias=draft.down_bias)
    return _Made(model=small, source=small, plan=plan_pruned(small), removed_fraction=removed)


def _source(
    made: _Made, stage: Path, artifact: Artifact, draft: Draft, held_back: Sequence[Sequence[int]], kept: Sequence[KeptFile]
) -> Source:
    return Source(
        model=made.source,
        folder=stage,
        tokenizer=artifact.tokenizer,
        stored=made.model.spec,
        plan=made.plan,
        held_back=held_back,
        elastic=draft.elastic,
        kept=kept,
        rope_ctx=artifact.rope_ctx,
    )


def _records(stage: Path, paths: Sequence[Path]) -> list[dict[str, Any]]:
    return [file.to_json() for file in record_files(stage, paths)]


def _sorts(draft: Draft) -> bool:
    return draft.sort != "none"


def _proof_bytes(draft: Draft) -> int:
    """Room for the cut that the gate tries."""
    return draft.plan.cut_sizes[0].bytes if draft.elastic else 0


def read_calibration(path: Path | None) -> CalibrationText:
    """The user's text, or the one that comes with edgeq. Raises SourceError when it is not UTF-8 text."""
    if path is None:
        text = resources.files("edgeq").joinpath("data/calibration.txt").read_text(encoding="utf-8")
        return CalibrationText(name="edgeq default", text=text)
    try:
        return CalibrationText(name=path.name, text=path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as err:
        raise SourceError(f"{path}: not UTF-8 text (byte {err.start}). Convert it to UTF-8 first.") from err
    except OSError as err:
        raise SourceError(f"{path}: cannot be read ({err.strerror}).") from err


def calibration_windows(ids: Sequence[int], n_ctx: int) -> tuple[list[list[int]], list[list[int]]]:
    """Windows for the importance matrix, and those that only the gate sees. Shorter when the model's context or the text is short."""
    length = min(WINDOW, n_ctx, max(len(ids) // 4, MIN_WINDOW))
    return split(ids, length=length, count=WINDOWS, held_back=HELD_BACK)
