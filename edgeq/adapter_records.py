"""Kept adapters of a package: the list `adapters` of its manifest, and which file a name stands for.

    {"name": "sql", "path": "adapters/sql.gguf", "bytes": 4711, "sha256": "...", "base_sha256": "..." | absent, ...facts for people...}

base_sha256 is the hash of the artifact that the adapter was laid out for. An entry of disposition "merge" tells of an adapter that is part
of the weights: it has no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeq.errors import PackageError, UsageError
from edgeq.package import MANIFEST, FileRecord, Package, check_size


@dataclass(frozen=True, kw_only=True)
class AdapterRecord(FileRecord):
    """An adapter that lies beside the artifact. facts: whatever else the manifest says of it (kind, rank, ...)."""

    name: str
    base_sha256: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        base = {} if self.base_sha256 is None else {"base_sha256": self.base_sha256}
        return {"name": self.name, **super().to_json(), **base, **self.facts}


def package_adapters(package: Package) -> dict[str, AdapterRecord]:
    """Kept adapters by name, in the manifest's order. Raises PackageError for a list that does not hold together."""
    path = package.folder / MANIFEST
    records: dict[str, AdapterRecord] = {}
    for entry in package.manifest.get("adapters", []):
        if isinstance(entry, dict) and entry.get("disposition") == "merge":
            continue
        try:
            known = {key: entry[key] for key in ("name", "path", "bytes", "sha256")}
            facts = {key: value for key, value in entry.items() if key not in known and key != "base_sha256"}
            record = AdapterRecord(**known, base_sha256=entry.get("base_sha256"), facts=facts)
            relative = Path(record.path)
        except (AttributeError, KeyError, TypeError) as err:
            raise PackageError(f"{path}: an adapter's record lacks or misspells {err}. The package is damaged; export it again.") from err
        if relative.is_absolute() or ".." in relative.parts:
            raise PackageError(f"{path}: {record.path!r} points outside the package. Do not use this package.")
        if record.name in records:
            raise PackageError(f"{path}: two adapters are named {record.name!r}. The package is damaged; export it again.")
        if record.base_sha256 not in (None, *(artifact.sha256 for artifact in package.artifacts)):
            raise PackageError(f"{path}: adapter {record.name!r} was made for another artifact than this package's. Export it again.")
        records[record.name] = record
    return records


def find_adapter(package: Package | None, wanted: str) -> tuple[str, Path]:
    """(name, file) of a kept adapter by its name in the package, or of a GGUF file by its path.

    Raises UsageError that lists the package's adapters when there is neither; PackageError when the package's file is not as recorded.
    """
    records = {} if package is None else package_adapters(package)
    if package is not None and wanted in records:
        return wanted, check_size(package, records[wanted])
    path = Path(wanted)
    if path.is_file():
        return path.stem, path
    there = (
        f"{package.folder} has {', '.join(map(repr, records)) or 'no adapters'}" if package is not None else "a GGUF file has no adapters"
    )
    raise UsageError(f"no adapter is named {wanted!r}: {there}. Give one of its names, or the path of a GGUF adapter.")
