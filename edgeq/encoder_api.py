"""Embedding models in the Python API: export, verify, inspect and load, as `edgeq.api` does for models that generate text.

Here converters and runtime meet. Everything heavy is imported inside the functions.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeq.errors import MissingDependency, PackageError, UsageError
from edgeq.package import ArtifactRecord, Package, check_files
from edgeq.progress import Progress, silent

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeq.converters.encoders.export import Gate, Proof
    from edgeq.converters.encoders.plan import EncoderPlan
    from edgeq.encoder_gate import EncoderGate
    from edgeq.runtime.embedder import Embedder

REFERENCE = "reference.npz"


@dataclass(frozen=True, kw_only=True)
class EncoderExportResult:
    """What `export_encoder` did. package is the folder, None after a dry run; gate is None when it was not run.

    peak_rss_bytes: most memory this process ever had resident; None where the system does not tell.
    """

    plan: EncoderPlan
    package: Path | None
    artifacts: tuple[ArtifactRecord, ...]
    bytes: int
    gate: EncoderGate | None
    seconds: float
    peak_rss_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        return {
            "package": None if self.package is None else str(self.package),
            "artifacts": [artifact.to_json() for artifact in self.artifacts],
            "bytes": self.bytes,
            "plan": self.plan.to_json(),
            "regrid": {},
            "gate": None if self.gate is None else self.gate.to_json(),
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "adapters": [],
        }


def is_encoder(model: str | Path) -> bool:
    """Whether a model is one that embeds texts: a folder of an encoder family, or a .onnx file. Reads config.json alone."""
    path = Path(model)
    if not path.is_dir() and path.suffix != ".onnx":
        return False  # a hub id, a .gguf file, demo: told without importing anything
    try:
        from edgeq.converters.encoders.recognise import is_encoder as recognised
    except ModuleNotFoundError as err:
        raise MissingDependency(err.name or "onnx_ir", "export") from err
    return recognised(path)


def export_encoder(
    model: str | Path,
    *,
    profile: str | Path,
    output: str | Path | None = None,
    quant: str = "auto",
    calibration: str | Path | None = None,
    dry_run: bool = False,
    verify: bool = True,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
    on_plan: Callable[[EncoderPlan], None] = lambda plan: None,
) -> EncoderExportResult:
    """Export an encoder, a Hugging Face folder or a .onnx file, to an ONNX package folder for a device. Needs edgeq[export].

    quant: fp32, fp16, Q8_0, int8 or int4; auto chooses by the profile. calibration: text for int4.
    A package that fails its gate is written, marked failed and returned: look at `result.gate.passed`.
    Raises an EdgeqError for anything else that goes wrong; then nothing is left under the output's name.
    """
    try:
        from edgeq.converters.encoders.export import export_encoder_package
    except ModuleNotFoundError as err:
        raise MissingDependency(err.name or "torch", "export") from err
    from edgeq.runtime.memory import peak_rss_bytes

    if output is None and not dry_run:
        raise UsageError("export needs an output folder, unless dry_run is set")
    start = time.monotonic()
    result = export_encoder_package(
        model,
        output=None if output is None else Path(output),
        profile=profile,
        gate=_gate(threads) if verify else None,
        quant=quant,
        calibration=None if calibration is None else Path(calibration),
        dry_run=dry_run,
        force=force,
        progress=progress,
        on_plan=on_plan,
    )
    return EncoderExportResult(
        plan=result.plan,
        package=None if result.package is None else result.package.folder,
        artifacts=() if result.package is None else result.package.artifacts,
        bytes=result.plan.file_bytes,
        gate=result.gate,
        seconds=time.monotonic() - start,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _gate(threads: int | None) -> Gate:
    """The gate as the export calls it: the package in ONNX Runtime against its source in float, and what the source gives kept for devices.

    The source is the ONNX file itself, run by the runtime, where the model came from one; else the reference in torch.
    """
    import numpy as np

    from edgeq.encoder_gate import gate_texts, judge
    from edgeq.encoder_reference import EncoderReference
    from edgeq.runtime.embedder import Embedder

    def prove(proof: Proof, progress: Progress) -> tuple[EncoderGate, Sequence[Path]]:
        model, sentence = proof.model, proof.model.sentence
        with Embedder.load(proof.folder, threads=threads) as embedder:
            ids = embedder.tokenize(gate_texts())
            source = EncoderReference(model.spec, model.tensors)
            if model.graph is None:
                reference = source.embeddings(ids, sentence, progress=progress)
            else:
                reference = _source_embeddings(model.graph, ids, source, sentence, threads=threads)
            own = None
            if proof.rounded is not None:
                own = EncoderReference(model.spec, proof.rounded).embeddings(ids, sentence, progress=progress)
            found = embedder.embed(gate_texts(), progress=progress)
            verdict = judge(found, reference, format=proof.format, runtime=embedder.runtime, own=own)
        kept = proof.folder / REFERENCE
        np.savez(kept, embeddings=reference, texts=np.frombuffer(_texts_digest(), dtype=np.uint8))
        return verdict, [kept]

    return prove


def _source_embeddings(
    graph: Path, ids: Sequence[Sequence[int]], reference: Any, sentence: Any, *, threads: int | None
) -> npt.NDArray[np.float32]:
    """Embeddings by an ONNX file itself: its own sentence_embedding where it has one, else its tokens' vectors, pooled."""
    import numpy as np
    import torch

    from edgeq.runtime.embedder import run_graph

    outputs = run_graph(graph, ids, threads=threads)
    whole = outputs.get("sentence_embedding")
    if whole is not None and whole[0].shape == (sentence.n_out,):
        return np.stack(whole)
    hidden = next((rows for rows in outputs.values() if rows[0].ndim == 2 and rows[0].shape[1] == reference.spec.n_embd), None)
    if hidden is None:
        raise UsageError(
            f"{graph} has no output of {reference.spec.n_embd} numbers per token to compare with. Export its feature extraction."
        )
    return reference.pooled([torch.from_numpy(rows) for rows in hidden], sentence)


def _texts_digest() -> bytes:
    from edgeq.encoder_gate import gate_texts

    return hashlib.sha256("\0".join(gate_texts()).encode()).digest()


def verify_encoder(package: Package, *, threads: int | None = None, progress: Progress = silent) -> tuple[int, EncoderGate | None]:
    """Check a package of an encoder: every hash, then its embeddings against the stored reference. Number of files, and what was found.

    None where there is nothing to compare with: exported without a gate, or by an edgeq with other texts. Raises PackageError.
    """
    import numpy as np

    from edgeq.encoder_gate import LIMITS, gate_texts, judge
    from edgeq.runtime.embedder import Embedder

    files = len(package.artifacts) + len(package.side_files)
    kept = package.folder / REFERENCE
    if not any(record.path == REFERENCE for record in package.side_files):
        check_files(package)
        return files, None
    with Embedder.load(package.folder, threads=threads) as embedder:  # checks the files
        try:
            with np.load(kept) as stored:
                reference, digest = stored["embeddings"], stored["texts"].tobytes()
            format = package.manifest["export"]["quant"]
        except (KeyError, OSError, ValueError) as err:
            raise PackageError(f"{kept}: cannot be read ({err}). The package is damaged; export it again.") from err
        if digest != _texts_digest() or format not in LIMITS:
            return files, None
        found = embedder.embed(gate_texts(), progress=progress)
        return files, judge(found, reference, format=format, runtime=embedder.runtime, basis="fingerprint")


def describe_encoder_package(package: Package) -> dict[str, Any]:
    """What `edgeq inspect` tells about a package of an encoder. Reads no weights."""
    manifest = package.manifest
    return {
        "kind": "package",
        "status": package.status,
        "model": dict(manifest["model"]),
        "encoder": dict(manifest["encoder"]["spec"]),
        "sentence": dict(manifest["encoder"]["sentence"]),
        "export": dict(manifest["export"]),
        "artifacts": [record.to_json() for record in package.artifacts],
        "side_files": [record.to_json() for record in package.side_files],
        "tokenizer": dict(manifest["tokenizer"]),
        "plan": {key: value for key, value in manifest["plan"].items() if key != "grids"},
        "gate": manifest["gate"],
        "tools": dict(manifest["tools"]),
    }


def describe_encoder(model: str | Path) -> dict[str, Any]:
    """What `edgeq inspect` tells about an encoder that is not a package."""
    from dataclasses import asdict

    from edgeq.converters.encoders.recognise import open_encoder

    opened = open_encoder(model)
    by_grid: dict[str, list[int]] = {}
    for tensor in opened.tensors.values():
        by_grid.setdefault(tensor.grid.name, []).append(tensor.nbytes)
    return {
        "kind": "encoder",
        "name": opened.name,
        "format": "hf" if opened.graph is None else "onnx",
        "files": [file.name for file in opened.files],
        "encoder": asdict(opened.spec),
        "sentence": opened.sentence.to_json(),
        "formats": [{"format": name, "tensors": len(sizes), "bytes": sum(sizes)} for name, sizes in by_grid.items()],
    }


def load_embedder(package: str | Path, *, threads: int | None = None, device: str = "cpu") -> Embedder:
    """Load a package of an encoder to embed texts; see `edgeq.runtime.embedder`. Needs edgeq[onnx]."""
    from edgeq.runtime.embedder import load_embedder as open_embedder

    return open_embedder(package, threads=threads, device=device)


def is_encoder_package(package: Package) -> bool:
    return "encoder" in package.manifest


def describes_encoder(path: Path) -> bool:
    """Whether a path is a folder of an encoder, or a .onnx file beside or below the config.json of one."""
    folders = [path] if path.is_dir() else [path.parent, path.parent.parent] if path.suffix == ".onnx" else []
    return any(is_encoder(folder) for folder in folders if (folder / "config.json").is_file())
