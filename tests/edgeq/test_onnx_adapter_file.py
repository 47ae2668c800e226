"""`.onnx_adapter` files: as onnxruntime reads and writes them, and bad ones."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest

from edgeq.errors import AdapterError
from edgeq.onnx_adapter_file import (
    check_content,
    content_version,
    cut_plan,
    plan_version,
    predicted_bytes,
    read_onnx_adapter,
    write_onnx_adapter,
)
from edgeq.runtime.onnx_adapters import read_onnx_file

Array = npt.NDArray[Any]
Q = "model.layers.0.self_attn.q_proj"


def parameters(
    dtype: Any = np.float32, *, rank: int = 3, modules: tuple[str, ...] = (Q, "model.layers.11.mlp.down_proj")
) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    found: dict[str, Array] = {}
    for i, module in enumerate(modules):
        found[f"{module}.lora_A.weight"] = rng.standard_normal((7 + i, rank + i)).astype(dtype)
        found[f"{module}.lora_B.weight"] = rng.standard_normal((rank + i, 5)).astype(dtype)
    return found


def same(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name], equal_nan=True) for name in one
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_onnxruntime_reads_what_is_written(dtype: Any, tmp_path: Path) -> None:
    path, values = tmp_path / "a.onnx_adapter", parameters(dtype)
    written = write_onnx_adapter(path, values, plan="plan")
    assert written.nbytes == path.stat().st_size == predicted_bytes({name: (v.shape, v.dtype) for name, v in values.items()})
    theirs = ort.AdapterFormat.read_adapter(str(path))
    assert (theirs.get_adapter_version(), theirs.get_model_version()) == (content_version(values), plan_version("plan"))
    found = {name: value.numpy() for name, value in theirs.get_parameters().items()}
    assert same({name: found[name] for name in values}, values)
    ours = read_onnx_adapter(path)
    assert same(ours.parameters, values)
    check_content(ours)


def test_what_onnxruntime_writes_is_read(tmp_path: Path) -> None:
    path, values = tmp_path / "a.onnx_adapter", parameters()
    theirs = ort.AdapterFormat()
    theirs.set_adapter_version(3)
    theirs.set_model_version(4)
    theirs.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()})
    theirs.export_adapter(str(path))
    ours = read_onnx_adapter(path)
    assert (ours.adapter_version, ours.model_version) == (3, 4)
    assert same({name: ours.parameters[name] for name in values}, values)
    assert read_onnx_file(path).ranks == {Q: 3, "model.layers.11.mlp.down_proj": 4}


def test_every_cut_has_a_plan_of_its_own() -> None:
    plans = {"p", cut_plan("p", (3, 4), (1, 1)), cut_plan("p", (3, 3), (1, 1)), cut_plan("q", (3, 4), (1, 1))}
    assert len({plan_version(plan) for plan in plans}) == 4


def test_every_cut_off_or_changed_file_is_an_error(tmp_path: Path) -> None:
    """No byte is read outside of the file; a change that leaves it readable changes its content, or is in what pads it."""
    path, values = tmp_path / "a.onnx_adapter", parameters(modules=(Q,))
    write_onnx_adapter(path, values, plan="plan")
    content = path.read_bytes()
    bad = tmp_path / "bad.onnx_adapter"
    for size in range(0, len(content) - 4, 7):
        bad.write_bytes(content[:size])
        with pytest.raises(AdapterError, match="bad"):
            read_onnx_file(bad)
    rng = np.random.default_rng(1)
    found = 0
    for at in rng.integers(0, len(content), 400):
        changed = bytearray(content)
        changed[at] ^= 1 << int(rng.integers(8))
        bad.write_bytes(changed)
        try:
            file = read_onnx_file(bad)
        except AdapterError:
            found += 1
        else:
            stored = read_onnx_adapter(bad)
            assert same(stored.parameters, values) or file.ranks == {Q: 3}
            assert stored.model_version != plan_version("plan") or same(stored.parameters, values)
    assert found > 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop(f"{Q}.lora_B.weight"), r"q_proj\.lora_B\.weight is missing"),
        (lambda p: p.pop(f"{Q}.lora_A.weight"), r"q_proj\.lora_A\.weight is missing"),
        (lambda p: p.update({f"{Q}.lora_B.weight": np.zeros((4, 5), np.float32)}), "of rank 3 and 4"),
        (lambda p: p.update({f"{Q}.lora_A.weight": np.full((7, 3), np.nan, np.float32)}), "not finite"),
        (lambda p: p.update({f"{Q}.lora_A.weight": np.zeros(7, np.float32)}), "expected a matrix"),
        (lambda p: p.update({f"{Q}.weight": np.zeros((7, 3), np.float32)}), "is neither lora_A nor lora_B"),
        (lambda p: p.update({f"{Q}.lora_A.weight": np.zeros((7, 3), np.float16)}), "mixes numbers of"),
        (lambda p: p.clear(), "the adapter has no matrices"),
    ],
)
def test_what_makes_no_adapter_is_named(change: Any, message: str, tmp_path: Path) -> None:
    values = parameters(modules=(Q,))
    change(values)
    write_onnx_adapter(tmp_path / "a.onnx_adapter", values, plan="plan")
    with pytest.raises(AdapterError, match=message):
        read_onnx_file(tmp_path / "a.onnx_adapter")


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx_adapter"
    path.write_bytes(struct.pack("<I4s", 8, b"GGUF") + bytes(64))
    with pytest.raises(AdapterError, match=r"is no \.onnx_adapter file"):
        read_onnx_adapter(path)
    with pytest.raises(AdapterError, match="cannot be read"):
        read_onnx_adapter(tmp_path / "nothing.onnx_adapter")
