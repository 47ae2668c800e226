"""Quantized checkpoints, from their files to ONNX Runtime: which keep their codes, and that those compute what the method says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from tiny import hf_folder
from tiny_quantized import Method, awq, bnb4, compressed, gptq, hqq, methods, quantize

from edgeq.converters.onnx.builder import Builder
from edgeq.converters.onnx.weights import linear
from edgeq.converters.sources.hf_weights import read_hf_weights
from edgeq.nbits import Bnb4, NBits, answer
from edgeq.tensors import LazyTensor

GATE = "model.layers.0.mlp.gate_proj.weight"
METHODS = dict(methods())
# Methods without a form, and why.
REGRIDDED = {
    "act-order": "its groups are not runs of columns (act-order), and ONNX Runtime's blocks are",
    "fp8": "ONNX Runtime has no kernel for codes of FP8",
    "float8": "ONNX Runtime has no kernel for codes of FP8",
    "axis-0": "F32 has no codes to keep",
}


def opened(folder: Path, method: Method, **sizes: Any) -> tuple[LazyTensor, np.ndarray[Any, np.dtype[Any]]]:
    """The gate projection as it opens, and its values."""
    expected = quantize(hf_folder(folder, "llama", num_hidden_layers=1, **sizes), method)
    return read_hf_weights(folder).tensors["layers.0.gate.weight"], expected[GATE]


def result_error(weight: LazyTensor, values: np.ndarray[Any, np.dtype[Any]]) -> float:
    """Of a layer with this weight, relative to the result in float64."""
    g = Builder("test", float_type=ir.DataType.FLOAT)
    x = g.input("x", ir.DataType.FLOAT, ["batch_size", "sequence_length", weight.n_cols])
    y = linear(g, x, weight, None, path="/q", name="q", grid=weight.grid)
    g.output(y, "y", ir.DataType.FLOAT, ["batch_size", "sequence_length", weight.n_rows])
    session = ort.InferenceSession(ir.serde.serialize_model(g.model()).SerializeToString(), providers=["CPUExecutionProvider"])
    fed = np.random.default_rng(0).standard_normal((1, 5, weight.n_cols), dtype=np.float32)
    expected = fed.astype(np.float64) @ values.T
    return float(np.linalg.norm(session.run(None, {"x": fed})[0] - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", METHODS)
def test_codes_of_every_method_are_kept_or_it_is_said_why_not(name: str, tmp_path: Path) -> None:
    weight, values = opened(tmp_path / "m", METHODS[name])
    found = answer(weight)
    reason = next((why for kind, why in REGRIDDED.items() if kind in name), None)
    if reason is not None:
        assert found.kind == "regrid" and found.form is None and reason in found.reason
        return
    assert found.kind == "exact"
    # activations are rounded to 8 bits, but for MatMulBnb4
    assert result_error(weight, values) < (1e-5 if isinstance(found.form, Bnb4) else 2e-2)


@pytest.mark.parametrize(
    ("method", "form"),
    [
        (gptq(4, 32), NBits(4, 32)),
        (gptq(4, 64), NBits(4, 64)),
        (gptq(4, 128), NBits(4, 128)),
        (gptq(8, -1), NBits(8, 128)),
        (gptq(2, 64, symmetric=False), NBits(4, 64)),
        (awq(64), NBits(4, 64, zeros=True)),
        (awq(64, round_zeros=True), NBits(4, 64, zeros=True)),
        (compressed(bits=8, strategy="channel"), NBits(8, 128)),
        (compressed(group_size=128), NBits(4, 128)),
        (hqq(4, 64), NBits(4, 64, minima=True)),
        (hqq(3, 64), NBits(4, 64, minima=True)),
        (bnb4("nf4", 64), Bnb4("nf4", 64)),
    ],
    ids=lambda value: None if isinstance(value, Method) else str(value),
)
def test_blocks_are_as_large_as_the_methods_groups(method: Method, form: NBits | Bnb4, tmp_path: Path) -> None:
    weight, values = opened(tmp_path / "m", method, hidden_size=256, intermediate_size=192, head_dim=32)
    assert answer(weight).form == form
    assert result_error(weight, values) < 2e-2
