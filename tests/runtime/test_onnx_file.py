"""model.onnx and its data: whatever is wrong with the files is said before ONNX Runtime sees them, and what is fine loads."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_folders import copy_of, edit_graph, write_tiny_onnx

from edgeq.errors import EdgeqError, MissingDependency, SourceError, UnsupportedError
from edgeq.runtime.onnx_context import OnnxContext
from edgeq.runtime.onnx_file import read_onnx
from edgeq.runtime.onnx_model import OnnxModel

IDS = [1, *range(60, 80)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx-file") / "tiny"
    write_tiny_onnx(folder)
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return copy_of(source, tmp_path / "model")


def logits(path: Path) -> np.ndarray:
    with OnnxModel.load(path, threads=1) as model, OnnxContext(model, n_ctx=32) as context:
        return context.logits_of(IDS)


def external(key: str, value: str | None) -> Callable[[Any], None]:
    """Change one entry of the first tensor that lies in the data file; None takes it out."""

    def change(proto: Any) -> None:
        tensor = next(tensor for tensor in proto.graph.initializer if tensor.external_data)
        entries = {entry.key: entry.value for entry in tensor.external_data} | ({} if value is None else {key: value})
        if value is None:
            entries.pop(key)
        del tensor.external_data[:]
        for name, text in entries.items():
            entry = tensor.external_data.add()
            entry.key, entry.value = name, text

    return change


def test_sizes_and_files(folder: Path) -> None:
    import onnx

    file = read_onnx(folder / "model.onnx")
    assert file.files == (folder / "model.onnx", folder / "model.onnx.data")
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(folder / "model.onnx").graph.initializer]
    assert file.tensor_bytes == sum(weight.nbytes for weight in weights) > 100_000


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"model\.onnx does not exist\. Give an ONNX folder, its model\.onnx or a package folder"):
        read_onnx(tmp_path / "model.onnx")


@pytest.mark.parametrize("kept", [0, 1, 50, 1000, -1])
def test_a_graph_cut_short(folder: Path, kept: int) -> None:
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(SourceError, match=r"model\.onnx: .* it is cut short"):
        read_onnx(path)


def test_a_file_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(SourceError, match=r"model\.onnx: cannot be read \(Permission denied\)"):
        read_onnx(folder / "model.onnx")


def test_something_else_by_that_name(folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(b"GGUF" + bytes(500))
    with pytest.raises(SourceError, match=r"It is no ONNX model|is no ONNX model, or it is cut short"):
        read_onnx(path)


def test_missing_data(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    with pytest.raises(SourceError, match=r"model\.onnx\.data is missing: it holds weights of model\.onnx\. Copy both files together"):
        OnnxModel.load(folder / "model.onnx")


@pytest.mark.parametrize("missing", [1, 1000, 100_000])
def test_data_cut_short(folder: Path, missing: int) -> None:
    data = folder / "model.onnx.data"
    os.truncate(data, data.stat().st_size - missing)
    with pytest.raises(SourceError, match=r"model\.onnx\.data: has [\d,]+ bytes, but .* lies at [\d,]+ to [\d,]+\. The file is cut short"):
        OnnxModel.load(folder / "model.onnx")


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("offset", "99999999", SourceError, "lies at 99,999,999 to"),
        ("offset", "-64", SourceError, "at -64. The file is damaged"),
        ("offset", "many", SourceError, "does not say where it lies"),
        ("length", "12", SourceError, r"takes [\d,]+ bytes, but its data is said to be 12"),
        ("location", "/etc/passwd", SourceError, "lies in '/etc/passwd', outside the model's folder. Do not use this model"),
        ("location", "../model.onnx.data", SourceError, "outside the model's folder"),
        ("location", None, SourceError, "lies in '', outside the model's folder"),
        ("location", "other.data", SourceError, r"other\.data is missing"),
    ],
)
def test_data_that_is_said_to_lie_elsewhere(folder: Path, key: str, value: str | None, error: type[EdgeqError], message: str) -> None:
    path = edit_graph(folder, external(key, value))
    with pytest.raises(error, match=message):
        OnnxModel.load(path)


def test_unknown_number_formats(folder: Path) -> None:
    def change(proto: Any) -> None:
        next(tensor for tensor in proto.graph.initializer if tensor.external_data).data_type = 99

    with pytest.raises(UnsupportedError, match="has values of type 99, which edgeq does not know"):
        read_onnx(edit_graph(folder, change))


def test_a_link_out_of_the_folder(folder: Path, source: Path) -> None:
    data = folder / "model.onnx.data"
    data.unlink()
    data.symlink_to(source / "model.onnx.data")
    with pytest.raises(
        SourceError,
        match=r"model\.onnx\.data is a link out of the model's folder, which ONNX Runtime does not follow\. Put a copy or",
    ):
        OnnxModel.load(folder / "model.onnx")
    data.unlink()
    data.hardlink_to(source / "model.onnx.data")
    assert np.array_equal(logits(folder / "model.onnx"), logits(source / "model.onnx"))


def test_links_as_in_the_cache_of_the_hub(folder: Path, source: Path) -> None:
    """Every file of a snapshot is a link to a blob that is named by its hash."""
    blobs, snapshot = folder.parent / "blobs", folder.parent / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"{i:040x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{i:040x}")
    assert np.array_equal(logits(snapshot / "model.onnx"), logits(source / "model.onnx"))


def test_a_folder_that_is_a_link(folder: Path, source: Path) -> None:
    (folder.parent / "link").symlink_to(folder)
    assert np.array_equal(logits(folder.parent / "link" / "model.onnx"), logits(source / "model.onnx"))


def test_a_graph_that_is_a_link_beside_its_data(folder: Path, source: Path) -> None:
    graph = folder / "model.onnx"
    graph.unlink()
    graph.symlink_to(source / "model.onnx")
    assert np.array_equal(logits(graph), logits(source / "model.onnx"))


def test_without_onnx(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependency, match=r"onnx is not installed. Install it with: pip install 'edgeq\[onnx\]'"):
        read_onnx(folder / "model.onnx")
