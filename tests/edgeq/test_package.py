import json

import pytest

from edgeq.errors import PackageError
from edgeq.package import FileRecord, check_files, is_package, read_package, record_files, resolve_artifact, sha256, write_manifest


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    (folder / "reference.npz").write_bytes(b"PK")
    files = record_files(folder, [folder / "m.gguf", folder / "reference.npz"])
    manifest = {
        "status": "passed",
        "export": {"profile": "laptop-cpu"},
        "artifacts": [{**files[0].to_json(), "format": "gguf"}],
        "side_files": [files[1].to_json()],
    }
    write_manifest(folder, manifest)
    return folder


def edit(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_what_is_written_is_read(folder):
    package = read_package(folder)
    assert is_package(folder)
    assert package.status == "passed"
    assert package.profile == "laptop-cpu"
    assert package.artifact_path() == folder / "m.gguf"
    assert package.side_files == (FileRecord(path="reference.npz", bytes=2, sha256=sha256(folder / "reference.npz")),)
    seen = []
    check_files(package, on_bytes=seen.append)
    assert sum(seen) == 106
    assert resolve_artifact(folder) == (folder / "m.gguf", package)
    assert resolve_artifact(folder / "m.gguf") == (folder / "m.gguf", None)


def test_a_changed_byte_a_lost_byte_and_a_lost_file_are_named(folder):
    package = read_package(folder)
    data = (folder / "m.gguf").read_bytes()
    (folder / "m.gguf").write_bytes(data[:-1] + b"x")
    with pytest.raises(PackageError, match=r"m\.gguf does not match its hash"):
        check_files(package)
    (folder / "m.gguf").write_bytes(data[:-1])
    with pytest.raises(PackageError, match=r"m\.gguf has 103 bytes, the manifest says 104"):
        check_files(package)
    (folder / "m.gguf").unlink()
    with pytest.raises(PackageError, match=r"m\.gguf is missing"):
        check_files(package)
    with pytest.raises(PackageError, match=r"m\.gguf is missing"):
        resolve_artifact(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=99), "package version 99, this edgeq reads version 1"),
        (lambda m: m.update(format="other"), "format 'other', expected 'edgeq-package'"),
        (lambda m: m.update(status="great"), "status 'great', expected one of passed, failed, unverified"),
        (lambda m: m.pop("artifacts"), "lacks or misspells 'artifacts'"),
        (lambda m: m.update(artifacts=[]), "lists no artifact"),
        (lambda m: m["artifacts"][0].update(surprise=1), "lacks or misspells"),
        (lambda m: m["artifacts"][0].update(path="../../etc/passwd"), "points outside the package"),
        (lambda m: m["side_files"][0].update(path="/etc/passwd"), "points outside the package"),
    ],
)
def test_a_bad_manifest_is_refused(folder, change, message):
    edit(folder, change)
    with pytest.raises(PackageError, match=message):
        read_package(folder)


def test_what_is_no_package_is_refused(folder, tmp_path):
    (folder / "manifest.json").write_text("{")
    with pytest.raises(PackageError, match=r"not valid JSON"):
        read_package(folder)
    with pytest.raises(PackageError, match=r"is not an edgeq package"):
        read_package(tmp_path)
    with pytest.raises(PackageError, match=r"is not a folder"):
        read_package(tmp_path / "nothing")
    with pytest.raises(PackageError, match=r"does not exist. Give a package folder or a GGUF file"):
        resolve_artifact(tmp_path / "nothing")
