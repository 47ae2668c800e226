"""The package: a folder with `manifest.json` and the artifacts it vouches for.

The manifest records what went in (hashes of every input file), what was decided (spec, plan, calibration), what came out (hash and
size of every artifact and side file) and how the gate judged it. Nothing in it depends on the clock or on absolute paths, so
the same inputs give the same bytes.

    {"format": "edgeq-package", "version": 1, "status": "passed" | "failed" | "unverified",
     "model": {...}, "source": {...}, "export": {...}, "plan": {...}, "artifacts": [...], "side_files": [...],
     "tokenizer": {...}, "adapters": [], "gate": {...} | null, "tools": {...}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgeq.errors import PackageError

MANIFEST = "manifest.json"
MODEL_ONNX = "model.onnx"
FORMAT = "edgeq-package"
VERSION = 1

Status = Literal["passed", "failed", "unverified"]
STATUSES: tuple[Status, ...] = ("passed", "failed", "unverified")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file the manifest vouches for; `path` is relative to the package folder (or, for inputs, the bare file name)."""

    path: str
    bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "bytes": self.bytes, "sha256": self.sha256}


@dataclass(frozen=True, kw_only=True)
class ArtifactRecord(FileRecord):
    """An artifact: a GGUF file, or the model.onnx of a folder whose other files are side files of the package."""

    format: Literal["gguf", "onnx"]

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "format": self.format, "bytes": self.bytes, "sha256": self.sha256}


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package on disk. `manifest` is the parsed document; `artifacts` and `side_files` are read from it."""

    folder: Path
    manifest: Mapping[str, Any]
    artifacts: tuple[ArtifactRecord, ...]
    side_files: tuple[FileRecord, ...]

    @property
    def status(self) -> Status:
        return self.manifest["status"]

    @property
    def profile(self) -> str:
        return self.manifest["export"]["profile"]

    def artifact_path(self) -> Path:
        """The GGUF file or model.onnx of this package."""
        return self.folder / self.artifacts[0].path


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    text = json.dumps({"format": FORMAT, "version": VERSION, **manifest}, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def is_package(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def read_package(folder: Path) -> Package:
    """Open a package without hashing it. Raises PackageError naming the file and the fault."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise PackageError(f"{folder} is not a folder. A package is the folder that `edgeq export` wrote.")
    if not path.is_file():
        raise PackageError(f"{folder} has no {MANIFEST}: it is not an edgeq package. Write one with `edgeq export MODEL -o {folder}`.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as err:
        raise PackageError(f"{path} is not valid JSON ({err}). The package is damaged; export it again.") from err
    try:
        if manifest["format"] != FORMAT:
            raise PackageError(f"{path}: format {manifest['format']!r}, expected {FORMAT!r}.")
        if manifest["version"] != VERSION:
            raise PackageError(
                f"{path}: package version {manifest['version']}, this edgeq reads version {VERSION}. Use the edgeq that wrote it."
            )
        if manifest["status"] not in STATUSES:
            raise PackageError(f"{path}: status {manifest['status']!r}, expected one of {', '.join(STATUSES)}.")
        manifest["export"]["profile"]
        artifacts = tuple(ArtifactRecord(**record) for record in manifest["artifacts"])
        side_files = tuple(FileRecord(**record) for record in manifest["side_files"])
    except (KeyError, TypeError) as err:
        raise PackageError(f"{path}: the manifest lacks or misspells {err}. The package is damaged; export it again.") from err
    if not artifacts:
        raise PackageError(f"{path}: the manifest lists no artifact. The package is damaged; export it again.")
    for record in (*artifacts, *side_files):
        relative = Path(record.path)
        if relative.is_absolute() or ".." in relative.parts:
            raise PackageError(f"{path}: {record.path!r} points outside the package. Do not use this package.")
    return Package(folder=folder, manifest=manifest, artifacts=artifacts, side_files=side_files)


def check_files(package: Package, *, on_bytes: Callable[[int], None] = lambda n: None) -> None:
    """Compare size and SHA-256 of every file with the manifest. Raises PackageError naming the first that differs."""
    for record in (*package.artifacts, *package.side_files):
        check_record(package, record, on_bytes=on_bytes)


def check_record(package: Package, record: FileRecord, *, on_bytes: Callable[[int], None] = lambda n: None) -> None:
    """Compare one file with its record. Raises PackageError."""
    path = check_size(package, record)
    digest = sha256(path, on_bytes=on_bytes)
    if digest != record.sha256:
        raise PackageError(
            f"{path} does not match its hash ({digest[:12]}, the manifest says {record.sha256[:12]}): it is damaged. Copy it again."
        )


def check_size(package: Package, record: FileRecord) -> Path:
    """Where the file of a record is. Raises PackageError when it is missing or has another size."""
    path = package.folder / record.path
    if not path.is_file():
        raise PackageError(f"{path} is missing. The package is damaged; copy it again.")
    size = path.stat().st_size
    if size != record.bytes:
        raise PackageError(f"{path} has {size:,} bytes, the manifest says {record.bytes:,}. The file is damaged; copy it again.")
    return path


def sha256(path: Path, *, on_bytes: Callable[[int], None] = lambda n: None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            on_bytes(len(chunk))
    return digest.hexdigest()


def record_files(folder: Path, paths: Sequence[Path]) -> list[FileRecord]:
    return [FileRecord(path=p.relative_to(folder).as_posix(), bytes=p.stat().st_size, sha256=sha256(p)) for p in paths]


def resolve_artifact(path: Path) -> tuple[Path, Package | None]:
    """The runnable file behind a path: a package's artifact, the model.onnx of a folder, or a file itself. Raises PackageError."""
    if path.is_dir() and not is_package(path) and (path / MODEL_ONNX).is_file():
        return path / MODEL_ONNX, None
    if path.is_dir():
        package = read_package(path)
        if "encoder" in package.manifest:
            raise PackageError(f"{path} is the package of an encoder, which embeds texts. Use `edgeq embed`, or edgeq.load_embedder.")
        artifact = package.artifact_path()
        if not artifact.is_file():
            raise PackageError(f"{artifact} is missing. The package is damaged; copy it again.")
        return artifact, package
    if not path.exists():
        raise PackageError(f"{path} does not exist. Give a package folder or a GGUF file, or an ONNX folder.")
    return path, None
