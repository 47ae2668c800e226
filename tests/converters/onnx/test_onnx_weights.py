"""Every format of a weight, run by ONNX Runtime against float64 arithmetic on the values its grid decodes to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgeq import ggml
from edgeq.converters.gguf.encode import RegridError
from edgeq.converters.onnx.builder import Builder
from edgeq.converters.onnx.weights import embedding, head, linear
from edgeq.errors import PlanError, SourceError
from edgeq.grids import BF16, F16, F32, GRIDS, Grid
from edgeq.group_grids import GroupGrid, group_grid
from edgeq.nbits import answer, nbits_grid, stored_bits
from edgeq.tensors import Floats, LazyTensor, from_values

Array = np.ndarray[Any, np.dtype[Any]]
FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
NUMPY = {FLOAT: np.float32, FLOAT16: np.float16}
# ONNX Runtime rounds activations to 8 bits in blocks (accuracy_level 4): 5e-3 of the result was measured, 1e-2 at most in blocks of 128.
# Elsewhere sums of products in the graph's own type: 3e-7 and 5e-4 measured.
ROUNDED = 2e-2
FLOATS = {FLOAT: 2e-6, FLOAT16: 2e-3}


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def matrix(n_out: int, n_in: int, grid: Grid = F32) -> LazyTensor:
    """A random weight in a grid of ggml, or in float32."""
    packed = ggml.encode(normal(n_out, n_in, seed=n_in) * np.float32(0.05), grid)
    return LazyTensor(shape=(n_out, n_in), grid=grid, read=lambda start, stop: packed[start:stop], origin="model.gguf: w")


def grouped(n_out: int, n_in: int, **options: Any) -> LazyTensor:
    """A random weight in groups of a quantized checkpoint."""
    rng = np.random.default_rng(n_in)
    grid = group_grid("G", **options)
    groups = (n_out, n_in // grid.block_size)
    zeros = {"": None, "U8": rng.integers(0, 1 << grid.code_bits, groups), "F16": rng.uniform(4, 9, groups)}[grid.zero]
    codes = rng.integers(0, 1 << grid.code_bits, (n_out, n_in)).astype(np.uint8)
    packed = grid.pack(codes, rng.uniform(0.01, 0.02, groups), zeros)
    return LazyTensor(shape=(n_out, n_in), grid=grid, read=lambda start, stop: packed[start:stop], origin="model.safetensors: w")


def session(g: Builder) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return ort.InferenceSession(ir.serde.serialize_model(g.model()).SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_linear(
    weight: LazyTensor, grid: Grid, dtype: ir.DataType = FLOAT, *, bias: LazyTensor | None = None, **options: Any
) -> tuple[Array, Array, Builder]:
    """Output for a random input, the input, and the graph."""
    g = Builder("test", float_type=dtype)
    x = g.input("x", dtype, ["batch_size", "sequence_length", weight.n_cols])
    y = linear(g, x, weight, bias, path="/model/layers.0/attn/q_proj", name="model.layers.0.attn.q_proj", grid=grid, **options)
    g.output(y, "y", dtype, ["batch_size", "sequence_length", weight.n_rows])
    fed = normal(2, 3, weight.n_cols, seed=7).astype(NUMPY[dtype])
    return session(g).run(None, {"x": fed})[0], fed, g


def off(actual: Array, expected: Array) -> float:
    """Norm of the difference relative to the norm."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def attributes(g: Builder, op: str) -> dict[str, Any]:
    node = next(node for node in g.model().graph if node.op_type == op)
    return {name: attribute.value for name, attribute in node.attributes.items()}


def names(g: Builder) -> list[str]:
    return list(g.model().graph.initializers)


@pytest.mark.parametrize("dtype", [FLOAT, FLOAT16])
@pytest.mark.parametrize("source", [F32, F16, BF16, GRIDS["Q4_K"]])
def test_float_weights_are_transposed_for_matmul(source: Grid, dtype: ir.DataType) -> None:
    weight, bias = matrix(37, 256, source), normal(37)
    y, x, g = run_linear(weight, F16, dtype, bias=from_values(bias, origin="b"))
    assert off(y, x.astype(np.float64) @ weight.decode().astype(np.float64).T + bias) < FLOATS[dtype]
    assert names(g) == ["model.layers.0.attn.q_proj.MatMul.weight", "model.layers.0.attn.q_proj.Add.bias"]
    assert [node.name for node in g.model().graph] == ["/model/layers.0/attn/q_proj/MatMul", "/model/layers.0/attn/q_proj/Add"]


def test_transposing_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(37, 52, BF16)
    monkeypatch.setattr("edgeq.converters.onnx.packed.CHUNK_BYTES", 4 * 100)
    y, x, g = run_linear(weight, F32)
    assert np.array_equal(g.initializer("model.layers.0.attn.q_proj.MatMul.weight").const_value.numpy(), weight.decode().T)
    assert off(y, x @ weight.decode().T) < FLOATS[FLOAT]


@pytest.mark.parametrize("dtype", [FLOAT, FLOAT16])
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("encoded", [False, True])
def test_blocks_of_ggml(name: str, dtype: ir.DataType, encoded: bool) -> None:
    """Kept as they are, and encoded: the integers then are those that ggml's encoder gives to a GGUF file."""
    kept = matrix(37, 256, GRIDS[name])
    bias = normal(37)
    y, x, _ = run_linear(matrix(37, 256) if encoded else kept, GRIDS[name], dtype, bias=from_values(bias, origin="b"))
    expected = x.astype(np.float64) @ kept.decode().astype(np.float64).T + bias
    assert off(y, expected) < ROUNDED


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
def test_encoded_integers_are_those_of_the_gguf_file(name: str) -> None:
    blocks = matrix(7, 96, GRIDS[name]).packed().reshape(7, 3, -1)
    for weight in (matrix(7, 96), matrix(7, 96, GRIDS[name])):
        codes, scales = (v.const_value.numpy() for v in run_linear(weight, GRIDS[name])[2].model().graph.initializers.values())
        assert np.array_equal(scales, blocks[..., :2].copy().view(np.float16)[..., 0])
        if name == "Q8_0":
            assert np.array_equal(codes.astype(int) - 128, blocks[..., 2:].copy().view(np.int8))
        else:
            assert np.array_equal(codes & 15, np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1)[..., ::2])


@pytest.mark.parametrize(
    ("bits", "size", "symmetric", "n_in"),
    [
        *((4, 32, False, 70), (4, 64, True, 200), (4, 128, False, 256), (4, 16, True, 40), (4, 32, True, 70)),
        *((8, 32, True, 70), (8, 64, False, 200), (8, 128, True, 130), (2, 64, False, 192), (2, 32, True, 64)),
    ],
)
@pytest.mark.parametrize("dtype", [FLOAT, FLOAT16])
def test_own_blocks_of_any_width(bits: int, size: int, symmetric: bool, n_in: int, dtype: ir.DataType) -> None:
    weight, bias, errors = matrix(37, n_in), normal(37), dict[str, RegridError]()
    grid = nbits_grid(bits, size, symmetric=symmetric, n_cols=n_in)
    y, x, g = run_linear(weight, grid, dtype, bias=from_values(bias, origin="b"), errors=errors)
    n_blocks = -(-n_in // size)
    given = attributes(g, "MatMulNBits")
    assert given == {"K": n_in, "N": 37, "bits": bits, "block_size": size, "accuracy_level": 4}
    shapes = [tuple(v.shape.numpy()) for v in g.model().graph.initializers.values()]
    assert shapes == [(37, n_blocks, size * bits // 8), (37, n_blocks), *([] if symmetric else [(37, -(-n_blocks * bits // 8))]), (37,)]
    values = stored_values(g, grid, n_in)
    assert off(y, x.astype(np.float64) @ values.T + bias) < ROUNDED
    lost = errors["model.layers.0.attn.q_proj"]
    # float16 rounds nothing: scales are F16 in either graph
    np.testing.assert_allclose(lost.squared, ((values - weight.decode()) ** 2).sum(), rtol=1e-5)
    assert lost.relative < {2: 0.25, 4: 0.012, 8: 1e-4}[bits]


def stored_values(g: Builder, grid: Grid, n_in: int) -> Array:
    """What the initializers of a MatMulNBits mean, in float64, from the operator's definition."""
    parts = {name.rsplit(".", 1)[1]: v.const_value.numpy() for name, v in g.model().graph.initializers.items()}
    bits, size = (attributes(g, "MatMulNBits")[key] for key in ("bits", "block_size"))

    def codes_of(packed: Array, count: int) -> Array:
        bitwise = np.unpackbits(packed, axis=-1, bitorder="little").reshape(len(packed), -1, bits)
        return (bitwise << np.arange(bits)).sum(-1)[:, :count]

    n_rows, n_blocks = parts["scales"].shape
    codes = codes_of(parts["qweight"].reshape(n_rows, -1), n_blocks * size).reshape(n_rows, n_blocks, size)
    zeros = codes_of(parts["qzeros"], n_blocks)[..., None] if "qzeros" in parts else 1 << (bits - 1)
    return ((codes - zeros) * parts["scales"].astype(np.float64)[..., None]).reshape(n_rows, -1)[:, :n_in]


@pytest.mark.parametrize(
    "options",
    [
        {"code_bits": 4, "block_size": 64, "scale": "F16", "zero": "U8"},
        {"code_bits": 3, "block_size": 32, "scale": "F16", "center": 4},
        {"code_bits": 8, "block_size": 192, "scale": "F32", "center": 128},
        {"code_bits": 4, "block_size": 64, "scale": "F16", "zero": "F16"},
        {"code_bits": 4, "block_size": 48, "scale": "F16", "center": 8},
    ],
    ids=["awq", "3-bit", "per-row", "hqq", "groups-of-48"],
)
def test_codes_of_checkpoints_are_kept(options: dict[str, Any]) -> None:
    weight = grouped(37, 192, **options)
    y, x, _ = run_linear(weight, weight.grid, bias=None)
    assert off(y, x.astype(np.float64) @ weight.decode().astype(np.float64).T) < ROUNDED


def test_sums_over_blocks_are_made_once_for_all_that_read_an_input() -> None:
    g = Builder("test", float_type=FLOAT)
    x = g.input("x", FLOAT, ["batch_size", "sequence_length", 96])
    weights = [matrix(n, 96, GRIDS["Q4_1"]) for n in (5, 7)]
    for i, weight in enumerate(weights):
        y = linear(g, x, weight, None, path=f"/model/layers.{i}/up", name=f"model.layers.{i}.up", grid=weight.grid)
        g.output(y, f"y{i}", FLOAT, ["batch_size", "sequence_length", weight.n_rows])
    assert [node.op_type for node in g.model().graph].count("ReduceSum") == 1
    fed = normal(1, 2, 96)
    for y, weight in zip(session(g).run(None, {"x": fed}), weights, strict=True):
        assert off(y, fed @ weight.decode().T) < ROUNDED


@pytest.mark.parametrize("dtype", [FLOAT, FLOAT16])
@pytest.mark.parametrize(
    "weight",
    [
        *(matrix(16, 256, GRIDS[name]) for name in ("Q4_0", "Q4_1", "Q5_1", "Q6_K", "Q4_K")),
        grouped(16, 256, code_bits=4, block_size=64, scale="F32", zero="U8"),
        grouped(16, 256, code_bits=4, block_size=64, scale="F16", zero="F16"),
        grouped(16, 256, code_bits=4, block_size=64, scale="F32", table="nf4"),
    ],
    ids=lambda weight: weight.grid.name,
)
def test_bits_per_weight_are_those_of_the_file(weight: LazyTensor, dtype: ir.DataType) -> None:
    g = run_linear(weight, weight.grid, dtype)[2]
    nbytes = sum(value.const_value.nbytes for name, value in g.model().graph.initializers.items() if name.startswith("model.layers"))
    form = answer(weight).form
    assert form is not None and 8 * nbytes == stored_bits(weight.grid, form, half=dtype == FLOAT16) * 16 * 256


def test_minima_carry_what_zero_points_cannot() -> None:
    """A weight far from zero: without minima nothing would be left of it."""
    blocks = ggml.encode(np.float32(3) + normal(5, 64) * np.float32(0.01), GRIDS["Q4_1"])
    weight = LazyTensor(shape=(5, 64), grid=GRIDS["Q4_1"], read=lambda start, stop: blocks[start:stop], origin="w")
    y, x, _ = run_linear(weight, weight.grid)
    assert off(y, x.astype(np.float64) @ weight.decode().astype(np.float64).T) < 1e-4


@pytest.mark.parametrize("dtype", [FLOAT, FLOAT16])
@pytest.mark.parametrize("table", ["nf4", "fp4"])
@pytest.mark.parametrize(("n_out", "n_in", "size"), [(37, 128, 64), (5, 48, 16), (33, 96, 32)])
def test_codes_of_bitsandbytes_are_kept(table: str, dtype: ir.DataType, n_out: int, n_in: int, size: int) -> None:
    weight = grouped(n_out, n_in, code_bits=4, block_size=size, scale="F32", table=table)
    y, x, g = run_linear(weight, weight.grid, dtype, bias=from_values(normal(n_out), origin="b"))
    assert off(y, x.astype(np.float64) @ weight.decode().astype(np.float64).T + normal(n_out)) < FLOATS[dtype]
    assert attributes(g, "MatMulBnb4") == {
        "K": n_in,
        "N": n_out,
        "block_size": size,
        "quant_type": int(table == "nf4"),
        "training_mode": 0,
    }


GRIDS_OF_EMBEDDINGS: list[tuple[Grid, int]] = [
    (F32, 70),
    (GRIDS["Q4_0"], 96),
    (GRIDS["Q8_0"], 96),
    (GRIDS["Q4_1"], 96),
    (GRIDS["Q6_K"], 256),
    (nbits_grid(4, 64, symmetric=False, n_cols=70), 70),
    (nbits_grid(8, 32, symmetric=True, n_cols=70), 70),
    (nbits_grid(8, 128, symmetric=False, n_cols=256), 256),
    (nbits_grid(2, 16, symmetric=False, n_cols=40), 40),
]


@pytest.mark.parametrize("dtype", [FLOAT, FLOAT16])
@pytest.mark.parametrize(("grid", "n_embd"), GRIDS_OF_EMBEDDINGS, ids=lambda value: getattr(value, "name", str(value)))
def test_a_tied_embedding_is_stored_once(grid: Grid, n_embd: int, dtype: ir.DataType) -> None:
    weight = matrix(101, n_embd)
    g = Builder("test", float_type=dtype)
    ids = g.input("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
    x = embedding(g, ids, weight, path="/model/embed_tokens", name="model.embed_tokens", grid=grid)
    y = head(g, x, weight, path="/lm_head", name="lm_head", grid=grid, tied_to="model.embed_tokens")
    g.output(x, "x", dtype, ["batch_size", "sequence_length", n_embd])
    g.output(y, "y", dtype, ["batch_size", "sequence_length", 101])
    assert not [name for name in names(g) if name.startswith("lm_head")]
    fed = np.array([[0, 100, 3], [7, 7, 50]])
    if isinstance(grid, GroupGrid):
        from edgeq.nbits_encode import encode

        values = grid.decode(encode(weight.decode(), grid), n_embd)
    else:
        values = grid.decode(ggml.encode(weight.decode(), grid), n_embd)
    rows, logits = session(g).run(None, {"input_ids": fed})
    np.testing.assert_allclose(rows, values[fed], rtol=0, atol=(2e-7 if dtype == FLOAT else 1e-3) * np.abs(values).max())
    assert off(logits, values[fed].astype(np.float64) @ values.T.astype(np.float64)) < (FLOATS[dtype] if grid.is_float else ROUNDED)


def test_an_untied_head_is_a_linear_layer() -> None:
    weight = matrix(37, 64, GRIDS["Q8_0"])
    g = Builder("test", float_type=FLOAT)
    x = g.input("x", FLOAT, ["batch_size", "sequence_length", 64])
    g.output(head(g, x, weight, path="/lm_head", name="lm_head", grid=weight.grid), "y", FLOAT, ["batch_size", "sequence_length", 37])
    fed = normal(1, 4, 64)
    assert off(session(g).run(None, {"x": fed})[0], fed @ weight.decode().T) < ROUNDED
    assert names(g) == ["lm_head.MatMulNBits.qweight", "lm_head.MatMulNBits.scales"]


def test_importance_reaches_the_encoder() -> None:
    weight, importance = matrix(37, 64), np.where(np.arange(64) < 8, 100, 1).astype(np.float32)
    for grid in (GRIDS["Q4_0"], nbits_grid(4, 64, symmetric=False, n_cols=64)):
        errors: dict[str, RegridError] = {}
        lost = []
        for weights in (None, importance):
            g = run_linear(weight, grid, importance=weights, errors=errors)[2]
            lost.append((((stored_values(g, grid, 64) - weight.decode()) ** 2) @ importance).sum())
        assert lost[1] < 0.8 * lost[0]
        scaled = errors["model.layers.0.attn.q_proj"]
        assert scaled.weighted_norm != scaled.norm and scaled.weighted_relative < scaled.relative


def test_pieces_asked_for_out_of_turn_are_the_same() -> None:
    _, _, g = run_linear(matrix(37, 200), nbits_grid(4, 64, symmetric=False, n_cols=200))
    tensors = [v.const_value for v in g.model().graph.initializers.values()]
    in_turn = [t.tobytes() for t in tensors]
    assert [t.tobytes() for t in reversed(tensors)] == in_turn[::-1]


def test_what_no_kernel_takes_is_refused_with_the_reason() -> None:
    order = np.random.default_rng(0).permutation(np.arange(64, dtype=np.int32) // 32)
    act_order = group_grid("GPTQ 4-bit", code_bits=4, block_size=64, scale="F16", center=8, order=order)
    packed = act_order.pack(np.zeros((3, 64), dtype=np.uint8), np.ones((3, 2), dtype=np.float16), None)
    weight = LazyTensor(shape=(3, 64), grid=act_order, read=lambda start, stop: packed[start:stop], origin="w")
    with pytest.raises(PlanError, match=re.escape("GPTQ 4-bit cannot be kept in an ONNX file: its groups are not runs of columns")):
        run_linear(weight, act_order)
    with pytest.raises(PlanError, match=r"q_proj: IQ4_XS cannot be kept in an ONNX file: ONNX Runtime has no kernel"):
        run_linear(matrix(3, 256), GRIDS["IQ4_XS"])
    with pytest.raises(PlanError, match=r"rows of 70 values do not divide into Q4_0 blocks of 32\. Choose a grid of integer blocks"):
        run_linear(matrix(3, 70), GRIDS["Q4_0"])
    nf4 = group_grid("NF4", code_bits=4, block_size=64, scale="F32", table="nf4")
    with pytest.raises(PlanError, match="NF4 is kept where a checkpoint has it, not encoded"):
        run_linear(matrix(3, 64), nf4)
    g = Builder("test", float_type=FLOAT)
    ids = g.input("ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
    with pytest.raises(PlanError, match=r"model.embed_tokens: ONNX Runtime has no embeddings in G\. Choose Q8_0, Q4_0 or F16"):
        table = grouped(9, 64, code_bits=4, block_size=64, scale="F32", table="nf4")
        embedding(g, ids, table, path="/model/embed_tokens", name="model.embed_tokens", grid=table.grid)


def read(weight: LazyTensor, dtype: ir.DataType = FLOAT) -> None:
    """Ask for all initializers of a linear layer."""
    g = Builder("test", float_type=dtype)
    linear(g, g.input("x", dtype, [1, 1, weight.n_cols]), weight, None, path="/p", name="p", grid=weight.grid)
    for name in names(g):
        g.initializer(name).const_value.tobytes()


def test_values_that_a_graph_cannot_hold_are_refused() -> None:
    big = from_values(np.full((2, 32), 1e5), origin="m.safetensors: w")
    with pytest.raises(PlanError, match=r"m.safetensors: w: 100000 is beyond the largest F16 number\. Write this model as a float32"):
        read(big, FLOAT16)
    with pytest.raises(PlanError, match="graphs are written in FLOAT or FLOAT16, not BFLOAT16"):
        Builder("test", float_type=ir.DataType.BFLOAT16)
    with pytest.raises(SourceError, match="w: 64 values are NaN, 0 infinite"):
        read(from_values(np.full((2, 32), np.nan), origin="w"))
    blocks = matrix(2, 32, GRIDS["Q4_0"]).packed().copy()
    blocks[1, :2] = np.array([np.inf], dtype=np.float16).view(np.uint8)
    broken = LazyTensor(shape=(2, 32), grid=GRIDS["Q4_0"], read=lambda start, stop: blocks[start:stop], origin="m.gguf: w")
    with pytest.raises(SourceError, match=r"m.gguf: w: a block scale is NaN or infinite\. Fetch the model again\."):
        read(broken)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1"])
def test_float16_scales_are_cast_when_the_graph_is_loaded(name: str, tmp_path: Path) -> None:
    weight = matrix(37, 256, GRIDS[name])
    g = run_linear(weight, weight.grid)[2]
    weights = [value for key, value in g.model().graph.initializers.items() if key.startswith("model.")]
    assert [value.dtype for value in weights] == [ir.DataType.UINT8, *[FLOAT16] * (2 if name == "Q4_1" else 1)]
    assert sum(value.const_value.nbytes for value in weights) == weight.nbytes  # as many as in the GGUF file
    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "optimized.onnx")
    ort.InferenceSession(ir.serde.serialize_model(g.model()).SerializeToString(), options, providers=["CPUExecutionProvider"])
    left = {node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph}
    assert left == ({"MatMulNBits"} if name == "Q8_0" else {"MatMulNBits", "Reshape", "ReduceSum", "MatMul", "Add"})
