"""Pickle checkpoints: only what the weights-only loader vouches for."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeq.converters.sources.pickle_file import read_pickle
from edgeq.errors import MissingDependency, SourceError, UnsupportedError


def saved(folder: Path, value: Any, **options: Any) -> Path:
    path = folder / "pytorch_model.bin"
    torch.save(value, path, **options)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_decode_to_their_values(tmp_path: Path, dtype: torch.dtype) -> None:
    matrix, vector = torch.randn(5, 3).to(dtype), torch.randn(7).to(dtype)
    stored = read_pickle(saved(tmp_path, {"m": matrix, "v": vector, "t": matrix.T}))
    for name, tensor in {"m": matrix, "v": vector, "t": matrix.T}.items():
        assert stored[name].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(stored[name].open().decode(), tensor.float().numpy())
    np.testing.assert_array_equal(stored["t"].open().decode(1, 3), matrix.T[1:3].float().numpy())
    assert stored["m"].open().packed(2, 2).shape == (0, stored["m"].open().row_bytes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_other_types_are_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = read_pickle(saved(tmp_path, {"m": torch.ones(2, 2).to(dtype)}))
    with pytest.raises(UnsupportedError, match=r"pytorch_model.bin: m is stored as (F64|I32); supported: F32, F16, BF16"):
        stored["m"].open()


class _Payload:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    path = saved(tmp_path, {"m": _Payload(witness)})
    with pytest.raises(SourceError, match=r"weights-only loader refuses this file \(.*\). Convert the model to safetensors"):
        read_pickle(path)
    assert not witness.exists()
    with path.open("rb"):  # the payload is live: torch's full loader would have run it
        torch.load(path, weights_only=False)
    assert witness.is_dir()


@pytest.mark.parametrize("size", [0, 1, 100, 500])
def test_truncated(tmp_path: Path, size: int) -> None:
    path = saved(tmp_path, {"m": torch.ones(20, 20)})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(SourceError, match=r"pytorch_model.bin: torch's weights-only loader refuses this file"):
        read_pickle(path)


def test_old_container_cannot_be_mapped(tmp_path: Path) -> None:
    path = saved(tmp_path, {"m": torch.ones(2, 2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(SourceError, match=r"Convert the model to safetensors on a machine that trusts it"):
        read_pickle(path)


def test_plain_pickle(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps({"m": [1.0]}))
    with pytest.raises(SourceError, match=r"weights-only loader refuses"):
        read_pickle(path)


@pytest.mark.parametrize("value", [{"model": {"m": torch.ones(2)}}, [torch.ones(2)], {"m": 3}, {"m": torch.eye(3).to_sparse()}])
def test_more_than_tensors_by_name(tmp_path: Path, value: Any) -> None:
    with pytest.raises(SourceError, match=r"pytorch_model.bin: expected tensors by name and nothing else. Convert"):
        read_pickle(saved(tmp_path, value))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"pytorch_model.bin is missing"):
        read_pickle(tmp_path / "pytorch_model.bin")


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, {"m": torch.ones(2)})
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependency, match=r"torch is not installed. Install it with: pip install 'edgeq\[export\]'"):
        read_pickle(path)
