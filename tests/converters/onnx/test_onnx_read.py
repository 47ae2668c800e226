"""Weights read back from a graph: whatever the form, the values that encoding them gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tiny import hf_folder
from tiny_quantized import bnb4, gptq, hqq, quantize

from edgeq.converters.gguf.encode import encode_tensor
from edgeq.converters.onnx.carrier import write_onnx
from edgeq.converters.onnx.decoder import decoder
from edgeq.converters.onnx.quants import choose_grids, onnx_quant
from edgeq.converters.onnx.read import read_weights
from edgeq.converters.sources.resolve import open_model
from edgeq.errors import SourceError
from edgeq.families import family
from edgeq.model import Model
from edgeq.tensors import Floats

KINDS = ("fp32", "fp16", "int8", "int8-asym-b64", "int4", "int4-b128", "int4-full")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_model(hf_folder(tmp_path_factory.mktemp("read") / "m", "qwen2"))  # with biases


def written(model: Model, folder: Path, quant: str, *, join: bool) -> tuple[Path, dict[str, Any]]:
    half = onnx_quant(quant).half
    grids = choose_grids(onnx_quant(quant), model, half=half)
    folder.mkdir(exist_ok=True)
    write_onnx(folder, decoder(model, grids, float_type=ir.DataType.FLOAT16 if half else ir.DataType.FLOAT, join=join))
    return folder / "model.onnx", grids


def rounded(model: Model, name: str, grid: Any) -> Floats:
    tensor = model.tensors[name]
    if grid == tensor.grid or grid.is_float:
        values = tensor.decode()
        return values.astype(np.float16).astype(np.float32) if grid.name == "F16" else values
    packed = np.concatenate([chunk.packed for chunk in encode_tensor(tensor, grid)])
    return grid.decode(packed, tensor.n_cols)


@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("quant", KINDS)
def test_values_come_back(qwen: Model, tmp_path: Path, quant: str, join: bool) -> None:
    path, grids = written(qwen, tmp_path / "o", quant, join=join)
    held = read_weights(path, qwen.spec)
    assert held.keys() == qwen.tensors.keys()
    for name, tensor in held.items():
        expected = rounded(qwen, name, grids[name])
        np.testing.assert_array_equal(tensor.decode(), expected, err_msg=name)
        if len(tensor.shape) == 2:
            np.testing.assert_array_equal(tensor.decode(3, 8), expected[3:8], err_msg=name)


@pytest.mark.parametrize("quant", ["w8", "w8a8-dynamic"])
def test_rows_come_back_within_half_a_step(qwen: Model, tmp_path: Path, quant: str) -> None:
    path, _ = written(qwen, tmp_path / "o", quant, join=True)
    for name, tensor in read_weights(path, qwen.spec).items():
        values = qwen.tensors[name].decode()
        step = np.abs(values).max(-1, keepdims=True) / 127 if values.ndim == 2 else np.zeros(1)
        assert (np.abs(tensor.decode() - values) <= 0.5001 * step).all(), name


@pytest.mark.parametrize("method", [gptq(bits=4), gptq(bits=4, symmetric=False), hqq(4, 32, as_float=True), bnb4("nf4")], ids=range(4))
@pytest.mark.parametrize("join", [False, True])
def test_codes_of_checkpoints_come_back(tmp_path: Path, method: Any, join: bool) -> None:
    folder = hf_folder(tmp_path / "m", "llama")
    quantize(folder, method)
    model = open_model(folder)
    path, _ = written(model, tmp_path / "o", "source", join=join)
    held = read_weights(path, model.spec)
    for layer, _ in model.spec.layers():
        for role in ("wq", "wk", "wv", "wo", "gate", "up", "down"):
            name = f"layers.{layer}.{role}.weight"
            np.testing.assert_allclose(held[name].decode(), model.tensors[name].decode(), rtol=2e-6, atol=1e-8, err_msg=name)
            np.testing.assert_array_equal(held[name].decode(5, 9), held[name].decode()[5:9])


def test_a_graph_of_another_model(qwen: Model, tmp_path: Path) -> None:
    path, _ = written(qwen, tmp_path / "o", "fp32", join=False)
    proto = ir.load(path)
    name = f"{family('qwen2').hf_name('down').format(i=1)}.MatMul.weight"
    proto.graph.initializers[f"model.{name}"].name = "other"
    ir.save(proto, tmp_path / "o" / "other.onnx")
    with pytest.raises(SourceError, match=r"other\.onnx: the graph has no weights of layers\.1\.down\.weight\. Export the model again"):
        read_weights(tmp_path / "o" / "other.onnx", qwen.spec)
