"""The export pipeline, read top to bottom: open, plan, check, calibrate, write, prove, sign.

The gate runs the artifact in its real runtime, which converters do not know: it comes in as a callable. Everything is written to a
staging folder that gets its final name only when the manifest stands.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Protocol

from edgeq.calibration import importance, split
from edgeq.converters.gguf.carrier import Written, plan_tensors, write_model
from edgeq.converters.gguf.encode import RegridError
from edgeq.converters.gguf.lowering import Lowered, lower
from edgeq.converters.gguf.mixes import choose_grids, fallback_notes
from edgeq.converters.sources.resolve import open_model
from edgeq.errors import SourceError
from edgeq.gate import GateResult
from edgeq.grids import Grid
from edgeq.model import Model, Vocabulary
from edgeq.output import check_disk, check_target, staged_folder
from edgeq.package import ArtifactRecord, FileRecord, Package, read_package, record_files, sha256, write_manifest
from edgeq.planning import Layout, Plan, check_ram, export_bytes, make_plan
from edgeq.profiles import DeviceProfile, load_profile
from edgeq.progress import Progress, silent
from edgeq.reference import Reference

WINDOW = 512  # tokens per calibration window
MIN_WINDOW = 16  # for texts so short that four windows of 512 do not come out of them
WINDOWS = 16  # windows behind the importance matrix
HELD_BACK = 1  # windows of the calibration text that only the gate sees
MOST_LOST = 0.5  # of a tensor's squared values; Q2_K loses about 0.1 of Gaussian ones
SIDE_BYTES = 2 << 20  # room for manifest and side files in the disk check


class Gate(Protocol):
    """Compares a written artifact with its source. May write side files into the artifact's folder and returns their paths."""

    def __call__(self, artifact: Path, source: Source, progress: Progress) -> tuple[GateResult, Sequence[Path]]: ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the gate compares with. held_back: windows of the calibration text that calibration did not see."""

    model: Model
    plan: Plan
    held_back: Sequence[Sequence[int]]


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


def export_package(
    model_ref: str | Path,
    *,
    output: Path | None,
    profile: str | Path,
    gate: Gate | None,
    quant: str = "auto",
    calibration: Path | None = None,
    n_ctx: int | None = None,
    sort: str = "none",
    elastic: bool = False,
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
    model = open_model(model_ref, progress=progress)
    if output is not None:
        check_target(output, force=force, inputs=model.files)
    lowered = lower(model)
    plan = plan_export(lowered, model, device, quant, n_ctx=n_ctx)
    on_plan(plan)
    if dry_run or output is None:
        return Export(plan=plan)

    check_disk(output, plan.file_bytes + SIDE_BYTES)
    check_ram(export_bytes(model.spec, WINDOW * WINDOWS))
    with staged_folder(output, force=force, inputs=model.files) as stage:
        inputs = hash_inputs(model.files, progress)
        windows, held_back = calibration_windows(model, text)
        used = importance(Reference(model.spec, model.tensors), windows, progress=progress) if plan.needs_importance else None
        artifact = stage / artifact_name(model.name, plan.quant)
        grids = {tensor.name: tensor.grid for tensor in plan.tensors}
        written = write_model(artifact, lowered, grids, used, threads=threads, measure=True, progress=progress)
        verdict: GateResult | None = None
        side_paths: Sequence[Path] = ()
        if gate is not None:
            verdict, side_paths = gate(artifact, Source(model=model, plan=plan, held_back=held_back), progress)
            verdict = replace(verdict, failures=(*verdict.failures, *rounding_faults(written)))
        record = ArtifactRecord(path=artifact.name, format="gguf", bytes=written.nbytes, sha256=written.sha256)
        manifest = {
            "status": "unverified" if verdict is None else "passed" if verdict.passed else "failed",
            "model": {"name": model.name, "family": model.spec.family, "architecture": lowered.arch, "tensors": len(lowered.tensors)},
            "source": {"format": model.format, "files": [file.to_json() for file in inputs]},
            "export": {
                "profile": device.name,
                "quant": plan.quant,
                "n_ctx": plan.memory.n_ctx,
                "kv_type": plan.memory.kv_type,
                "rate": 0.0,
                "elastic": elastic,
                "sort": sort,
                "calibration": None if used is None else {**text.to_json(), "tokens": sum(map(len, windows))},
            },
            "plan": plan.to_json(),
            "artifacts": [record.to_json()],
            "side_files": [file.to_json() for file in record_files(stage, side_paths)],
            "tokenizer": {**fingerprint(model.tokenizer.vocabulary), "differs": list(model.tokenizer.differs)},
            "adapters": [],
            "regrid": regrid_summary(written),
            "gate": None if verdict is None else verdict.to_json(),
            "tools": versions(),
        }
        write_manifest(stage, manifest)
    return Export(plan=plan, package=read_package(output), gate=verdict)


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


def plan_export(lowered: Lowered, model: Model, device: DeviceProfile, quant: str, *, n_ctx: int | None) -> Plan:
    """Choose grids for the device from headers alone. Raises PlanError when nothing fits, UnsupportedError for an unknown quant."""

    def lay_out(name: str) -> Layout:
        grids, _ = settled_grids(name, lowered)
        plan = plan_tensors(lowered, grids)
        return Layout(tensors=plan.tensors, file_bytes=plan.nbytes)

    plan = make_plan(device, quant, lay_out, model.spec, n_ctx=n_ctx)
    _, has_importance = settled_grids(plan.quant, lowered)
    return plan.with_notes(*lowered.notes, *fallback_notes(plan.quant, lowered, has_importance=has_importance))


def settled_grids(quant: str, lowered: Lowered) -> tuple[dict[str, Grid], bool]:
    """Grids of a quant, and whether they are those chosen for encoding with importance.

    Some quants choose otherwise with importance than without. A source that already has the grids of either is not encoded again.
    """
    for has_importance in (False, True):
        grids = choose_grids(quant, lowered, has_importance=has_importance)
        if not any(t.tensor.grid != grids[t.name] and not grids[t.name].is_float for t in lowered.tensors):
            return grids, has_importance
    return grids, True


def calibration_windows(model: Model, text: CalibrationText) -> tuple[list[list[int]], list[list[int]]]:
    """Windows to calibrate on, and those that only the gate sees. Shorter windows when the model's context or the text is short."""
    ids = model.tokenizer.encode(text.text)
    length = min(WINDOW, model.spec.n_ctx, max(len(ids) // 4, MIN_WINDOW))
    return split(ids, length=length, count=WINDOWS, held_back=HELD_BACK)


def hash_inputs(files: Sequence[Path], progress: Progress) -> list[FileRecord]:
    sizes = [file.stat().st_size for file in files]
    done, total = 0, sum(sizes)

    def count(n: int) -> None:
        nonlocal done
        done += n
        progress("hash", done, total)

    return [FileRecord(path=f.name, bytes=size, sha256=sha256(f, on_bytes=count)) for f, size in zip(files, sizes, strict=True)]


def artifact_name(model_name: str, quant: str) -> str:
    """A file name that says what is in it: "smollm2-135m-instruct-Q4_0.gguf"."""
    slug = re.sub(r"[^a-z0-9.]+", "-", model_name.lower()).strip("-.") or "model"
    return f"{slug}-{quant}.gguf"


def fingerprint(vocabulary: Vocabulary) -> dict[str, Any]:
    """What tells two tokenizers apart: hashes of the vocabulary with its merges, and of the chat template."""
    content = json.dumps([vocabulary.kind, vocabulary.pre, vocabulary.tokens, vocabulary.types, vocabulary.merges], ensure_ascii=False)
    template = vocabulary.chat_template
    return {
        "kind": vocabulary.kind,
        "pre": vocabulary.pre,
        "n_tokens": len(vocabulary.tokens),
        "sha256": hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest(),
        "chat_template_sha256": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
    }


def regrid_summary(written: Written) -> dict[str, Any]:
    """What changing grids lost, per kind of tensor: relative squared error, plain and weighted by importance."""
    by_role: dict[str, RegridError] = {}
    for tensor in written.tensors:
        error = written.errors.get(tensor.name)
        if error is not None:
            by_role[tensor.role] = by_role[tensor.role] + error if tensor.role in by_role else error
    return {role: {"relative": e.relative, "weighted_relative": e.weighted_relative} for role, e in by_role.items()}


def rounding_faults(written: Written) -> list[str]:
    """Tensors of which rounding kept next to nothing, as sentences: in a coarse format one lost tensor may hide in the logits."""
    return [
        f"{t.name}: rounding to {t.grid.name} lost {error.relative:.0%} of it (squared error relative to its values)"
        for t in written.tensors
        if (error := written.errors.get(t.name)) is not None and error.relative > MOST_LOST
    ]


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("edgeq", "gguf", "llama-cpp-python", "numpy", "torch")}
