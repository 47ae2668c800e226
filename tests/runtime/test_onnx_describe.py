"""What inspect tells of ONNX folders: hand-made graphs, and those that an export wrote (tests/test_onnx_export.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx_folders import HEAD_DIM, N_CTX, write_tiny_onnx
from tiny import N_VOCAB

import edgeq
from edgeq.errors import SourceError
from edgeq.runtime.onnx_describe import describe_onnx


def test_a_folder(tmp_path: Path) -> None:
    model = write_tiny_onnx(tmp_path / "m", gain=1.0)
    found = describe_onnx(tmp_path / "m" / "model.onnx")
    assert found["kind"] == "onnx"
    sizes = found["sizes"]
    assert (sizes["n_vocab"], sizes["n_ctx"], sizes["n_layers"]) == (N_VOCAB, model.spec.n_ctx, model.spec.n_layers)
    assert (sizes["head_dim"], sizes["n_kv_heads"]) == (HEAD_DIM, model.spec.attention[0].n_kv_heads)
    assert found["file"]["bytes"] == sum(f.stat().st_size for f in (tmp_path / "m").glob("model.onnx*"))
    assert found["file"]["opsets"]["com.microsoft"] == 1
    assert model.spec.n_ctx >= N_CTX
    matrices = sum(t.n_rows * t.n_cols for t in model.tensors.values() if len(t.shape) == 2)
    floats = next(row for row in found["formats"] if row["format"] == "float32")
    assert (floats["weights"], floats["bytes"]) == (matrices, 4 * matrices)
    assert found["operators"]["com.microsoft GroupQueryAttention"] == model.spec.n_layers


def test_the_command_takes_the_folder_or_the_file(tmp_path: Path, run) -> None:  # type: ignore[no-untyped-def]
    write_tiny_onnx(tmp_path / "m", gain=1.0)
    for path in (tmp_path / "m", tmp_path / "m" / "model.onnx"):
        status, out, err = run("inspect", path)
        assert (status, err) == (0, "")
        assert "GroupQueryAttention" in out
        assert "float32" in out
    assert edgeq.inspect(tmp_path / "m")["kind"] == "onnx"


def test_a_damaged_file_says_so(tmp_path: Path) -> None:
    write_tiny_onnx(tmp_path / "m", gain=1.0)
    (tmp_path / "m" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(SourceError, match="is no ONNX model, or it is cut short"):
        edgeq.inspect(tmp_path / "m")
