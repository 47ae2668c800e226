"""Linear layers with one scale per token, against numpy."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from edgeq.converters.encoders.int8_rows import linear_rows
from edgeq.converters.encoders.rounding import encode_channels
from edgeq.converters.onnx.builder import Builder
from edgeq.converters.onnx.carrier import write_onnx
from edgeq.converters.onnx.int8 import int8_grid
from edgeq.tensors import LazyTensor

FLOAT = ir.DataType.FLOAT


def layer(folder, weight, code_range=127):
    """y = x W^T, twice from the same x, in ONNX Runtime."""
    grid = int8_grid("w8a8-dynamic", weight.shape[1])
    packed = encode_channels(weight, grid, code_range)
    lazy = LazyTensor(shape=weight.shape, grid=grid, read=lambda start, stop: packed[start:stop], origin="w")
    g = Builder("rows", float_type=FLOAT)
    x = g.input("x", FLOAT, ["batch_size", "sequence_length", weight.shape[1]])
    for i in range(2):
        y = linear_rows(g, x, lazy, path=f"/l{i}", name=f"l{i}")
        g.output(y, f"y{i}", FLOAT, ["batch_size", "sequence_length", weight.shape[0]])
    write_onnx(folder, g)
    ops = [node.op_type for node in g.model().graph]
    assert (ops.count("QuantizeLinear"), ops.count("MatMulIntegerToFloat")) == (1, 2)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    return lambda values: session.run(None, {"x": values}), lazy.decode()


@pytest.mark.parametrize("code_range", [127, 63])
def test_it_is_what_numpy_computes(code_range, tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((21, 37)).astype(np.float32)
    run, held = layer(tmp_path, weight, code_range)
    np.testing.assert_allclose(held, weight, atol=np.abs(weight).max() / code_range / 2 * 1.001)
    x = rng.standard_normal((2, 5, 37)).astype(np.float32) * rng.uniform(0.01, 100, (2, 5, 1)).astype(np.float32)
    scale = np.abs(x).max(-1, keepdims=True) / 127
    expected = (np.rint(x / scale) * scale) @ held.T
    for y in run(x):
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * float(np.abs(expected).max()))


def test_tokens_do_not_know_each_other(tmp_path):
    rng = np.random.default_rng(1)
    run, _ = layer(tmp_path, rng.standard_normal((8, 16)).astype(np.float32))
    x = rng.standard_normal((1, 3, 16)).astype(np.float32)
    loud = np.concatenate([x, np.full((1, 1, 16), 1e4, np.float32)], axis=1)
    np.testing.assert_array_equal(run(loud)[0][:, :3], run(x)[0])


def test_zeros_stay_zeros(tmp_path):
    weight = np.ones((4, 16), dtype=np.float32)
    weight[2] = 0
    run, held = layer(tmp_path, weight)
    np.testing.assert_array_equal(held, weight)
    y = run(np.zeros((1, 2, 16), dtype=np.float32))[0]
    np.testing.assert_array_equal(y, 0)
