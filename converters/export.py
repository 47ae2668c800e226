"""The export pipeline, read top to bottom: open, decide on adapters, draft, check, sort, calibrate, write, prove, sign.

The gate runs the artifact in its real runtime, which converters do not know: it comes in as a callable, and so does what a cut comes to.
Everything is written to a staging folder that gets its final name only when the manifest stands.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from edgeq.calibration import SORTING_TOKENS, Importance, importance, sorting_windows, split
from edgeq.converters.adapters.request import NO_ADAPTERS, AdapterWish, open_adapters
from edgeq.converters.disposition import decide, factor_grid
from edgeq.converters.draft import AS_ALLOWED, RATES, Draft, Wish, draft_export, plan_export, refitted
from edgeq.converters.gguf.carrier import write_model
from edgeq.converters.gguf.lowering import lower
from edgeq.converters.kept_files import KeptFile, merged_entry, write_kept
from edgeq.converters.records import fingerprint, hash_inputs, regrid_summary, rounding_faults, versions
from edgeq.converters.sorted_model import pruned_model, sort_model, sorted_model
from edgeq.converters.sources.resolve import open_model
from edgeq.elastic import MAX_RATE, CutSize
from edgeq.elastic_files import write_elastic
from edgeq.errors import SourceError
from edgeq.gate import GateResult
from edgeq.model import Model
from edgeq.output import check_disk, check_target, staged_folder
from edgeq.package import ArtifactRecord, Package, read_package, record_files, write_manifest
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
    """Compares a written artifact with its source. May write side files into the artifact's folder and returns their paths."""

    def __call__(self, artifact: Path, source: Source, progress: Progress) -> tuple[GateResult, Sequence[Path]]: ...


class CutSizes(Protocol):
    """What cuts of an elastic package come to, rate by rate."""

    def __call__(self, package: Path, rates: Sequence[float]) -> Sequence[CutSize]: ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the gate compares with: for a pruned package the pruned model in float, else the model as it came.

    stored: spec of the model in the order of the file, which may turn pairs of dimensions in another order than the source does.
    held_back: windows of the calibration text that calibration did not see. elastic: the artifact's folder is a package that can be cut.
    kept: adapters beside the artifact.
    """

    model: Model
    stored: ModelSpec
    plan: Plan
    held_back: Sequence[Sequence[int]]
    elastic: bool = False
    kept: Sequence[KeptFile] = ()


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
        lambda variant: draft_export(variant, device, quant, wish, n_ctx=n_ctx),
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
            windows,
            checked,
            lambda small: plan_export(lower(small, elastic=True), small, device, draft.plan.quant, n_ctx=n_ctx),
            progress=progress,
        )
        plan = made.plan
        used = made.importance if plan.needs_importance else None
        if plan.needs_importance and used is None:
            used = importance(Reference(made.model.spec, made.model.tensors), windows, progress=progress)
        lowered = lower(made.model, elastic=draft.cuts is not None)
        artifact = stage / artifact_name(model.name, plan.quant, draft.prune)
        grids = {tensor.name: tensor.grid for tensor in plan.tensors}
        written = write_model(artifact, lowered, grids, used, threads=threads, measure=True, progress=progress)
        side_paths: list[Path] = []
        if made.elastic is not None:
            found = made.elastic
            side_paths += write_elastic(stage, ladder=found.ladder, hidden=found.hidden, orders=found.orders, sort=draft.sort)
        record = ArtifactRecord(path=artifact.name, format="gguf", bytes=written.nbytes, sha256=written.sha256)
        kept = write_kept(
            stage,
            decided.kept,
            base.spec,
            made.model,
            lowered,
            made.elastic,
            grid=factor_grid(plan),
            base_sha256=record.sha256,
            progress=progress,
        )
        manifest: dict[str, Any] = {
            "status": "unverified",
            "model": {"name": model.name, "family": model.spec.family, "architecture": lowered.arch, "tensors": len(lowered.tensors)},
            "source": {
                "format": model.format,
                "quantization": None if model.quantization is None else dict(model.quantization),
                "files": [file.to_json() for file in inputs],
            },
            "export": {
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
            "artifacts": [record.to_json()],
            "side_files": _records(stage, side_paths),
            "tokenizer": {**fingerprint(model.tokenizer.vocabulary), "differs": list(model.tokenizer.differs)},
            "adapters": [
                *(merged_entry(one, adapter, progress) for one, adapter in decided.merged),
                *(file.record.to_json() for file in kept),
            ],
            "regrid": regrid_summary(written),
            "gate": None,
            "tools": versions(),
        }
        write_manifest(stage, manifest)  # a package from here on, as a device will find it
        if made.elastic is not None and draft.cuts is not None:
            sizes = [size.to_json() for size in cut_sizes(stage, RATES)]
            manifest["elastic"] = {"max_rate": MAX_RATE, "sizes": sizes, "cuttable": draft.cuts.to_json()}
        verdict: GateResult | None = None
        if gate is not None:
            source = Source(model=made.source, stored=made.model.spec, plan=plan, held_back=held_back, elastic=draft.elastic, kept=kept)
            verdict, more_paths = gate(artifact, source, progress)
            verdict = replace(verdict, failures=(*verdict.failures, *rounding_faults(written)))
            manifest["status"] = "passed" if verdict.passed else "failed"
            manifest["side_files"] += _records(stage, more_paths)
            manifest["gate"] = verdict.to_json()
        write_manifest(stage, manifest)
    return Export(plan=plan, package=read_package(output), gate=verdict)


def make(
    model: Model,
    draft: Draft,
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
        return _Made(model=whole, source=model, plan=refitted(draft.plan, lower(whole, elastic=True)), elastic=found, importance=used)
    small, removed = pruned_model(model, found, draft.prune)
    return _Made(model=small, source=small, plan=plan_pruned(small), removed_fraction=removed)


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


def artifact_name(model_name: str, quant: str, rate: float = 0.0) -> str:
    """A file name that says what is in it: "smollm2-135m-instruct-Q4_0.gguf", with "-pruned25" before the end for a rate of 0.25."""
    slug = re.sub(r"[^a-z0-9.]+", "-", model_name.lower()).strip("-.") or "model"
    return f"{slug}-{quant}{f'-pruned{round(100 * rate)}' if rate else ''}.gguf"
