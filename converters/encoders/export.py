"""The export of an encoder, read top to bottom: open, plan, check, round, write, prove, sign.

As `edgeq.converters.export` for models that generate text: the gate comes in as a callable, and everything is written to a staging folder
that gets its final name only when the manifest stands.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from edgeq.converters.encoders.compensated import compensated
from edgeq.converters.encoders.graph import encoder
from edgeq.converters.encoders.plan import EncoderPlan, plan_encoder
from edgeq.converters.encoders.recognise import open_encoder
from edgeq.converters.encoders.rounding import folded, rounded
from edgeq.converters.export import read_calibration
from edgeq.converters.onnx.carrier import MODEL_FILE, write_onnx
from edgeq.converters.records import hash_inputs, versions
from edgeq.encoder_gate import EncoderGate
from edgeq.encoder_spec import EncoderModel
from edgeq.errors import MissingDependency, TokenizerError
from edgeq.output import check_disk, check_target, staged_folder
from edgeq.package import ArtifactRecord, Package, read_package, record_files, sha256, write_manifest
from edgeq.profiles import load_profile
from edgeq.progress import Progress, silent
from edgeq.tensors import LazyTensor

CALIBRATION_TOKENS = 16384
CALIBRATION_LENGTH = 128  # of one text
_SIDE_BYTES = 4 << 20  # manifest and reference; tokenizer files come on top
_TOOLS = ("edgeq", "numpy", "onnx-ir", "onnxruntime", "tokenizers", "torch")


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the gate compares: a package in its staging folder with the model it was made from. rounded: the weights it holds; None where
    nothing was rounded to integers."""

    folder: Path
    model: EncoderModel
    format: str
    rounded: Mapping[str, LazyTensor] | None


class Gate(Protocol):
    """May write side files into the folder and returns their paths."""

    def __call__(self, proof: Proof, progress: Progress) -> tuple[EncoderGate, Sequence[Path]]: ...


@dataclass(frozen=True, kw_only=True)
class EncoderExport:
    """What an export came to. package is None after a dry run, gate when it was not run."""

    plan: EncoderPlan
    package: Package | None = None
    gate: EncoderGate | None = None


def export_encoder_package(
    ref: str | Path,
    *,
    output: Path | None,
    profile: str | Path,
    gate: Gate | None,
    quant: str = "auto",
    calibration: Path | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress = silent,
    on_plan: Callable[[EncoderPlan], None] = lambda plan: None,
) -> EncoderExport:
    """Export an encoder to a package folder. calibration: text for int4; by default the one that comes with edgeq.

    output may be None for a dry run. Raises any EdgeqError; nothing is left under the final name unless the package is whole. A package
    that fails its gate is written and marked failed.
    """
    device = load_profile(profile)
    text = read_calibration(calibration)
    opened = open_encoder(ref)
    model = folded(opened)
    if output is not None:
        check_target(output, force=force, inputs=opened.files)
    plan = plan_encoder(model, device, quant)
    on_plan(plan)
    if dry_run or output is None:
        return EncoderExport(plan=plan)
    check_disk(output, plan.file_bytes + sum(path.stat().st_size for path in model.beside.values()) + _SIDE_BYTES)
    with staged_folder(output, force=force, inputs=opened.files) as stage:
        inputs = hash_inputs(opened.files, progress)
        tensors = rounded(model, plan.format)
        calibrated = None
        if plan.quant == "int4":
            texts = calibration_texts(model, text.text)
            tensors = compensated(model, plan.format, tensors, texts, progress=progress)
            calibrated = {**text.to_json(), "tokens": sum(map(len, texts))}
        graph = encoder(model.spec, model.sentence, tensors, float_type=plan.format.float_type)
        written = {file.name: file for file in write_onnx(stage, graph, progress=progress)}
        artifact = written.pop(MODEL_FILE)
        side = [stage / name for name in written] + _copied(stage, model.beside)
        record = ArtifactRecord(path=artifact.name, format="onnx", bytes=artifact.nbytes, sha256=artifact.sha256)
        manifest: dict[str, Any] = {
            "status": "unverified",
            "model": {"name": model.name, "family": model.spec.family, "kind": "encoder", "tensors": len(model.tensors), **model.metadata},
            "source": {"format": "hf" if model.graph is None else "onnx", "files": [file.to_json() for file in inputs]},
            "export": {"profile": device.name, "quant": plan.quant, "format": "onnx", "calibration": calibrated},
            "plan": plan.to_json(),
            "encoder": {"spec": asdict(opened.spec), "sentence": model.sentence.to_json()},
            "artifacts": [record.to_json()],
            "side_files": [file.to_json() for file in record_files(stage, side)],
            "tokenizer": {"kind": "tokenizers", "n_tokens": model.spec.n_vocab, "sha256": sha256(model.tokenizer)},
            "adapters": [],
            "regrid": {},
            "gate": None,
            "tools": versions(_TOOLS),
        }
        write_manifest(stage, manifest)  # a package from here on, as a device will find it
        verdict: EncoderGate | None = None
        if gate is not None:
            held = None if plan.quant in ("fp32", "fp16") else tensors
            verdict, more = gate(Proof(folder=stage, model=model, format=plan.quant, rounded=held), progress)
            manifest["status"] = "passed" if verdict.passed else "failed"
            manifest["side_files"] += [file.to_json() for file in record_files(stage, more)]
            manifest["gate"] = verdict.to_json()
        write_manifest(stage, manifest)
    return EncoderExport(plan=plan, package=read_package(output), gate=verdict)


def calibration_texts(model: EncoderModel, text: str) -> list[list[int]]:
    """Paragraphs of a text as the model reads them, up to CALIBRATION_TOKENS, evenly from all over it."""
    try:
        import tokenizers
    except ImportError as err:
        raise MissingDependency("tokenizers", "export") from err
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(model.tokenizer))
    except Exception as err:  # the library raises nothing narrower
        raise TokenizerError(f"{model.tokenizer}: the tokenizers library cannot load it: {err}. Download it again.") from err
    tokenizer.no_padding()
    tokenizer.enable_truncation(min(CALIBRATION_LENGTH, model.sentence.max_tokens))
    paragraphs = [line for line in text.splitlines() if line.strip()]
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(paragraphs)]
    step = max(1, round(sum(map(len, encoded)) / CALIBRATION_TOKENS))
    return [ids for ids in encoded[::step] if ids] or [tokenizer.encode(text).ids]


def _copied(stage: Path, files: Mapping[str, Path]) -> list[Path]:
    """Copies of small files under their paths in a folder."""
    made = []
    for name, source in files.items():
        target = stage / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        made.append(target)
    return made
