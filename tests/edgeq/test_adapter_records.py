from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from edgeq.adapter_records import AdapterRecord, find_adapter, package_adapters
from edgeq.errors import PackageError, UsageError
from edgeq.package import Package, read_package, record_files, write_manifest

DAMAGED = "The package is damaged; export it again."


def package(folder: Path, **changes: Any) -> Package:
    """A package of two adapters, the second one's record changed (None leaves a field out)."""
    (folder / "adapters").mkdir(parents=True)
    files = [folder / "model.gguf", folder / "adapters/sql.gguf", folder / "adapters/poems.gguf"]
    for file in files:
        file.write_bytes(file.name.encode())
    model, *adapters = record_files(folder, files)
    entries: list[Any] = [{"name": Path(record.path).stem, **record.to_json(), "kind": "LORA", "rank": 8} for record in adapters]
    entries[1] = {key: value for key, value in {**entries[1], "base_sha256": model.sha256, **changes}.items() if value is not None}
    manifest = {
        "status": "unverified",
        "export": {"profile": "laptop-cpu"},
        "artifacts": [{**model.to_json(), "format": "gguf"}],
        "side_files": [],
        "adapters": entries,
    }
    write_manifest(folder, manifest)
    return read_package(folder)


def test_records_by_name(tmp_path: Path) -> None:
    opened = package(tmp_path)
    records = package_adapters(opened)
    assert list(records) == ["sql", "poems"]
    assert records["sql"].facts == {"kind": "LORA", "rank": 8}
    assert (records["sql"].base_sha256, records["poems"].base_sha256) == (None, opened.artifacts[0].sha256)
    assert [record.to_json() for record in records.values()] == [
        {key: entry[key] for key in record.to_json()} for entry, record in zip(opened.manifest["adapters"], records.values(), strict=True)
    ]
    assert isinstance(records["sql"], AdapterRecord)


def test_a_name_or_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = package(tmp_path / "p")
    assert find_adapter(opened, "sql") == ("sql", tmp_path / "p/adapters/sql.gguf")
    outside = tmp_path / "mine.v2.gguf"
    outside.write_bytes(b"")
    for known in (opened, None):
        assert find_adapter(known, str(outside)) == ("mine.v2", outside)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sql").write_bytes(b"a file of the same name does not matter")
    assert find_adapter(opened, "sql")[1].parent == tmp_path / "p/adapters"
    with pytest.raises(
        UsageError, match=r"no adapter is named 'code': .*p has 'sql', 'poems'. Give one of its names, or the path of a GGUF"
    ):
        find_adapter(opened, "code")
    with pytest.raises(UsageError, match=r"no adapter is named 'code': a GGUF file has no adapters."):
        find_adapter(None, "code")
    bare = Package(folder=opened.folder, manifest={}, artifacts=opened.artifacts, side_files=())
    with pytest.raises(UsageError, match=r"p has no adapters. Give one"):
        find_adapter(bare, "code")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, f"an adapter's record lacks or misspells 'name'. {DAMAGED}"),
        ({"sha256": None}, f"an adapter's record lacks or misspells 'sha256'. {DAMAGED}"),
        ({"path": 3}, "an adapter's record lacks or misspells"),
        ({"path": "../x.gguf"}, "'../x.gguf' points outside the package. Do not use this package."),
        ({"path": "/x.gguf"}, "'/x.gguf' points outside the package. Do not use this package."),
        ({"name": "sql"}, f"two adapters are named 'sql'. {DAMAGED}"),
        ({"base_sha256": "0" * 64}, "adapter 'poems' was made for another artifact than this package's. Export it again."),
    ],
)
def test_bad_records(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PackageError, match=re.escape(f"manifest.json: {message}")):
        package_adapters(package(tmp_path, **changes))


def test_a_file_that_is_not_as_recorded(tmp_path: Path) -> None:
    opened = package(tmp_path)
    (tmp_path / "adapters/sql.gguf").write_bytes(b"longer than before")
    with pytest.raises(PackageError, match=r"sql.gguf has 18 bytes, the manifest says 8. The file is damaged; copy it again."):
        find_adapter(opened, "sql")
    (tmp_path / "adapters/sql.gguf").unlink()
    with pytest.raises(PackageError, match=r"sql.gguf is missing. The package is damaged; copy it again."):
        find_adapter(opened, "sql")
