"""Layouts of ONNX Runtime's quantized kernels: codes keep their values, and own encoding loses no more than ONNX Runtime's."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq import ggml, nbits
from edgeq.errors import PlanError
from edgeq.grids import GRIDS, Grid
from edgeq.group_grids import TABLES, GroupGrid, group_grid
from edgeq.nbits import BLOCK_SIZES, Bnb4, NBits, answer, answer_for, decode, decode_bnb4, nbits_grid, pack, split, split_bnb4, unpack
from edgeq.nbits_encode import encode
from edgeq.tensors import Bytes, Floats, LazyTensor

Array = np.ndarray[Any, np.dtype[Any]]


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def stored(packed: Bytes, grid: Grid, n_cols: int) -> LazyTensor:
    return LazyTensor(shape=(len(packed), n_cols), grid=grid, read=lambda start, stop: packed[start:stop], origin="model.gguf: w")


def grouped(grid: GroupGrid, n_cols: int, *, zeros: Array | None = None, scales: Array | None = None, n_rows: int = 7) -> LazyTensor:
    """A matrix of random codes in that grid."""
    rng = np.random.default_rng(n_cols)
    n_groups = 1 + int(np.frombuffer(grid.order, "<i4").max()) if grid.order else n_cols // grid.block_size
    codes = rng.integers(0, 1 << grid.code_bits, (n_rows, n_cols)).astype(np.uint8)
    if scales is None:
        scales = rng.uniform(0.01, 0.02, (n_rows, n_groups)).astype(np.float16)
    if zeros is None and grid.zero:
        zeros = rng.integers(0, 1 << grid.code_bits, (n_rows, n_groups))
    return stored(grid.pack(codes, scales, zeros), grid, n_cols)


def read_back(tensor: LazyTensor, form: NBits) -> Floats:
    return decode(split(tensor.packed(), tensor.grid, form), form, tensor.n_cols)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_blocks_of_ggml_keep_their_values(name: str) -> None:
    tensor = stored(ggml.encode(normal(5, 512), GRIDS[name]), GRIDS[name], 512)
    found = answer(tensor)
    assert found.kind == "exact" and isinstance(found.form, NBits)
    theirs = gguf.quants.dequantize(tensor.packed(), gguf.GGMLQuantizationType[name])
    # one rounding to float32 more than ggml has, where scales or minima are products
    np.testing.assert_allclose(read_back(tensor, found.form), theirs, rtol=0, atol=4e-7 * np.abs(theirs).max())


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
def test_q4_0_and_q8_0_are_the_same_integers_and_scales(name: str) -> None:
    tensor = stored(ggml.encode(normal(5, 96), GRIDS[name]), GRIDS[name], 96)
    form = NBits(int(name[1]), 32)
    parts = split(tensor.packed(), tensor.grid, form)
    blocks = tensor.packed().reshape(5, 3, -1)
    assert np.array_equal(parts.scales, blocks[..., :2].copy().view(np.float16)[..., 0].astype(np.float32))
    if name == "Q8_0":
        assert np.array_equal(parts.codes.astype(int) - 128, blocks[..., 2:].copy().view(np.int8))
    else:
        in_order = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1)
        assert np.array_equal(unpack(parts.codes.reshape(5, -1), 4, 96), in_order.reshape(5, 96))
    assert answer(tensor).form == form and np.array_equal(read_back(tensor, form), tensor.decode())


def test_q4_1_has_zero_points_where_its_minima_are_whole_steps_and_minima_elsewhere() -> None:
    rng = np.random.default_rng(1)
    blocks = np.zeros((3 * 4, 20), dtype=np.uint8)
    scales = rng.uniform(0.01, 0.02, (12, 1)).astype(np.float16)
    scales = (scales.view(np.uint16) & 0xFF80).view(np.float16)  # few bits: 15 times the scale is an F16 too
    blocks[:, :2] = scales.view(np.uint8)
    blocks[:, 2:4] = (-scales * rng.integers(0, 16, (12, 1)).astype(np.float16)).view(np.uint8)
    blocks[:, 4:] = rng.integers(0, 256, (12, 16))
    tensor = stored(blocks.reshape(3, 80), GRIDS["Q4_1"], 128)
    assert answer(tensor).form == NBits(4, 32, zeros=True)
    assert np.array_equal(read_back(tensor, NBits(4, 32, zeros=True)), tensor.decode())
    blocks[7, 2:4] = (-scales[7] * np.float16(2.5)).view(np.uint8)
    assert answer(tensor).form == NBits(4, 32, minima=True)
    np.testing.assert_allclose(read_back(tensor, NBits(4, 32, minima=True)), tensor.decode(), rtol=0, atol=1e-7)
    blocks[7, 2:4] = (-scales[7] * np.float16(16)).view(np.uint8)
    assert answer(tensor).form == NBits(4, 32, minima=True)


CASES = [
    ("gptq", {"code_bits": 4, "block_size": 64, "scale": "F16", "center": 8}, 192, NBits(4, 64)),
    ("gptq-3-bit", {"code_bits": 3, "block_size": 32, "scale": "F16", "center": 4}, 96, NBits(4, 32)),
    ("gptq-asymmetric", {"code_bits": 4, "block_size": 64, "scale": "F16", "zero": "U8"}, 192, NBits(4, 64, zeros=True)),
    ("odd-groups", {"code_bits": 4, "block_size": 48, "scale": "F32", "zero": "U8"}, 144, NBits(4, 16, zeros=True)),
    ("awq-per-row", {"code_bits": 4, "block_size": 200, "scale": "F16", "zero": "U8"}, 200, NBits(4, 128, zeros=True)),
    ("tiny-row", {"code_bits": 8, "block_size": 24, "scale": "F32", "center": 128}, 24, NBits(8, 32)),
    ("hqq", {"code_bits": 4, "block_size": 64, "scale": "F16", "zero": "F16"}, 192, NBits(4, 64, minima=True)),
    ("hqq-1-bit", {"code_bits": 1, "block_size": 32, "scale": "BF16", "zero": "BF16"}, 96, NBits(2, 32, minima=True)),
    ("llm-int8", {"code_bits": 8, "block_size": 72, "scale": "F64", "center": 128}, 72, NBits(8, 128)),
    ("far-center", {"code_bits": 4, "block_size": 32, "scale": "F16", "center": 3}, 64, NBits(4, 32, zeros=True)),
    ("center-16", {"code_bits": 4, "block_size": 32, "scale": "F16", "center": 16}, 64, NBits(8, 32)),
    ("center-256", {"code_bits": 8, "block_size": 32, "scale": "F16", "center": 256}, 64, NBits(8, 32, minima=True)),
    ("2-bit", {"code_bits": 2, "block_size": 64, "scale": "F16", "zero": "U8"}, 128, NBits(2, 64, zeros=True)),
]


@pytest.mark.parametrize(("options", "n_cols", "form"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_groups_of_checkpoints_keep_their_values(options: dict[str, Any], n_cols: int, form: NBits) -> None:
    grid = group_grid("G", **options)
    n_groups = n_cols // grid.block_size
    rng = np.random.default_rng(3)
    zeros = rng.uniform(3, 9, (7, n_groups)).astype(np.float16) if grid.zero in ("F16", "BF16") else None
    scales = rng.uniform(0.01, 0.02, (7, n_groups))
    if grid.scale == "BF16":
        assert zeros is not None
        scales, zeros = (x.astype(np.float32).view(np.uint32) >> 16 for x in (scales, zeros.astype(np.float32)))
    tensor = grouped(grid, n_cols, zeros=zeros, scales=scales)
    assert answer(tensor) == nbits.Answer(form)
    values = tensor.decode()
    # scales of other types and minima are rounded to float32
    rounding = 0 if grid.scale == "F16" and not form.minima else 2e-7
    np.testing.assert_allclose(read_back(tensor, form), values, rtol=rounding, atol=rounding)


def test_zero_points_of_gptq_that_do_not_fit_take_twice_the_bits() -> None:
    grid = group_grid("GPTQ 4-bit", code_bits=4, block_size=32, scale="F16", zero="U8")
    zeros = np.array([[3, 16]] * 7)
    tensor = grouped(grid, 64, zeros=zeros)
    assert answer(tensor).form == NBits(8, 32, zeros=True) and answer_for(grid, 64).form == NBits(4, 32, zeros=True)
    assert np.array_equal(read_back(tensor, NBits(8, 32, zeros=True)), tensor.decode())
    eight = group_grid("GPTQ 8-bit", code_bits=8, block_size=32, scale="F16", zero="U8")
    # as stored: a byte holds 255 at most, so nothing grows
    assert answer(grouped(eight, 64, zeros=np.array([[3, 255]] * 7))).form == NBits(8, 32, zeros=True)


def test_a_short_last_group_ends_within_a_block() -> None:
    order = np.arange(200, dtype=np.int32) // 64
    grid = group_grid("GPTQ 4-bit", code_bits=4, block_size=200, scale="F16", zero="U8", order=order)
    tensor = grouped(grid, 200)
    assert answer(tensor).form == NBits(4, 64, zeros=True)
    assert np.array_equal(read_back(tensor, NBits(4, 64, zeros=True)), tensor.decode())


def test_blocks_with_one_scale_become_larger_blocks() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (6, 256 // 32, 18)).astype(np.uint8)
    scales = rng.uniform(0.01, 0.02, (6, 2)).astype(np.float16)
    rows[..., :2] = np.repeat(scales, 4, axis=1)[..., None].view(np.uint8)
    tensor = stored(rows.reshape(6, -1), GRIDS["Q4_0"], 256)
    assert answer(tensor).form == NBits(4, 128)
    assert np.array_equal(read_back(tensor, NBits(4, 128)), tensor.decode())
    rows[5, 7, 0] ^= 1
    assert answer(tensor).form == NBits(4, 32)


@pytest.mark.parametrize(
    ("grid", "n_cols", "reason"),
    [
        (GRIDS["IQ4_XS"], 256, "ONNX Runtime has no kernel for codes of IQ4_XS"),
        (group_grid("FP8", code_bits=8, block_size=32, scale="F32", table="e4m3"), 64, "ONNX Runtime has no kernel for codes of FP8"),
        (group_grid("GPTQ", code_bits=4, block_size=24, scale="F16", center=8), 48, "groups of 24 columns do not divide into blocks of 16"),
        (group_grid("NF4", code_bits=4, block_size=8, scale="F32", table="nf4"), 24, "groups of 8 columns do not divide into blocks of 16"),
        (
            group_grid("GPTQ", code_bits=4, block_size=4, scale="F16", center=8, order=np.array([0, 1, 0, 1], dtype=np.int32)),
            4,
            "its groups are not runs of columns (act-order)",
        ),
    ],
)
def test_what_no_kernel_takes_says_why(grid: Grid, n_cols: int, reason: str) -> None:
    found = answer_for(grid, n_cols)
    assert found.kind == "regrid" and found.form is None and reason in found.reason


def test_scales_that_are_no_float16_numbers_are_rounded_in_a_float16_graph() -> None:
    for grid, exact in ((group_grid("G", code_bits=4, block_size=32, scale=scale, center=8), scale == "F16") for scale in ("F16", "F32")):
        tensor = grouped(grid, 64)
        found = answer(tensor, half=True)
        assert (found.kind == "exact") == exact and found.form == NBits(4, 32)
        assert exact or found.reason == "its scales are not all float16 numbers and are rounded to them"
    q4_k = stored(ggml.encode(normal(2, 256), GRIDS["Q4_K"]), GRIDS["Q4_K"], 256)
    assert answer(q4_k).kind == "exact" and answer(q4_k, half=True).kind == "regrid"


@pytest.mark.parametrize("table", ["nf4", "fp4"])
@pytest.mark.parametrize(("n_rows", "n_cols", "size"), [(5, 128, 64), (3, 48, 16), (3, 96, 32)])
def test_codes_of_bitsandbytes_are_those_of_onnx_runtime(table: str, n_rows: int, n_cols: int, size: int) -> None:
    from onnxruntime.capi._pybind_state import quantize_matmul_bnb4

    values = normal(n_rows, n_cols)
    kind = 1 if table == "nf4" else 0
    theirs, absmax = np.zeros(-(-values.size // 2), dtype=np.uint8), np.zeros(-(-values.size // size), dtype=np.float32)
    quantize_matmul_bnb4(theirs, np.ascontiguousarray(values.T), absmax, size, kind, n_rows, n_cols)
    codes = np.stack([theirs >> 4, theirs & 15], axis=-1).reshape(-1)[: values.size].reshape(values.shape)
    grid = group_grid(table.upper(), code_bits=4, block_size=size, scale="F32", table=table)
    tensor = stored(grid.pack(codes, absmax.reshape(n_rows, -1), None), grid, n_cols)
    form = answer(tensor).form
    assert form == Bnb4(table, size)
    mine, scales = split_bnb4(tensor.packed(), grid, form)
    assert np.array_equal(mine, theirs) and np.array_equal(scales, absmax)
    assert np.array_equal(decode_bnb4(mine, scales, form, values.shape), tensor.decode())
    assert np.array_equal(TABLES[table][codes] * np.repeat(absmax, size).reshape(values.shape), tensor.decode())


def onnx_runtimes_own(values: Floats, bits: int, size: int, symmetric: bool) -> Floats:
    """What its default quantizer makes of a matrix, decoded."""
    from onnxruntime.capi import _pybind_state as c

    n_rows, n_cols = values.shape
    form = NBits(bits, size, zeros=not symmetric)
    codes = np.zeros((n_rows, form.n_blocks(n_cols), form.block_bytes), dtype=np.uint8)
    scales, zeros = np.zeros(codes.shape[0] * codes.shape[1], dtype=np.float32), np.zeros(n_rows * form.zero_bytes(n_cols), dtype=np.uint8)
    quantize = {2: c.quantize_matmul_2bits, 4: c.quantize_matmul_4bits, 8: c.quantize_matmul_8bits}[bits]
    quantize(codes, np.ascontiguousarray(values.T), scales, zeros, size, n_rows, n_cols, symmetric)
    parts = nbits.Parts(codes, scales.reshape(codes.shape[:2]), None if symmetric else zeros.reshape(n_rows, -1))
    return decode(parts, form, n_cols)


def made(kind: str, shape: tuple[int, int]) -> Floats:
    rng = np.random.default_rng(5)
    drawn = {"normal": rng.standard_normal(shape), "heavy": rng.standard_t(5, shape), "uniform": rng.uniform(-1, 1, shape)}
    return (0.03 * (drawn | {"positive": rng.uniform(0.2, 1, shape)})[kind]).astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "heavy", "uniform", "positive"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_encoding_loses_less_than_onnx_runtimes_default(kind: str, bits: int, symmetric: bool) -> None:
    values = made(kind, (24, 512))
    for size in (32, 64, 128):
        grid = nbits_grid(bits, size, symmetric=symmetric, n_cols=512)
        if not isinstance(grid, GroupGrid):
            grid = group_grid("INT", code_bits=bits, block_size=size, scale="F16", center=1 << (bits - 1))
        lost = ((grid.decode(encode(values, grid), 512) - values) ** 2).sum()
        # measured: 0.5 to 0.96 of theirs
        assert lost < 0.97 * ((onnx_runtimes_own(values, bits, size, symmetric) - values) ** 2).sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_columns_that_matter_are_met_better(symmetric: bool) -> None:
    values = made("heavy", (24, 256))
    importance = np.where(np.arange(256) % 8 == 0, 50, 1).astype(np.float32)
    grid = nbits_grid(4, 64, symmetric=symmetric, n_cols=256)
    assert isinstance(grid, GroupGrid)
    plain, weighted = (((grid.decode(encode(values, grid, w), 256) - values) ** 2) @ importance for w in (None, importance))
    assert weighted.sum() < 0.9 * plain.sum()


@settings(max_examples=60, deadline=None)
@given(
    n_cols=st.integers(1, 150), size=st.sampled_from(BLOCK_SIZES), bits=st.sampled_from([2, 4, 8]), symmetric=st.booleans(),
    exponent=st.integers(-3, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_width_is_encoded_within_a_step_and_read_back(
    n_cols: int, size: int, bits: int, symmetric: bool, exponent: int, seed: int
) -> None:
    values = normal(3, n_cols, seed=seed) * np.float32(10.0**exponent)
    grid = nbits_grid(bits, size, symmetric=symmetric, n_cols=n_cols)
    packed = encode(values, grid) if isinstance(grid, GroupGrid) else ggml.encode(values, grid)
    decoded = grid.decode(packed, n_cols)
    form = answer_for(grid, n_cols).form
    assert isinstance(form, NBits) and form.zeros != symmetric and not form.minima
    assert np.array_equal(decode(split(packed, grid, form), form, n_cols), decoded)
    assert np.abs(decoded - values).max() <= np.abs(values).max() * (1.01 if bits == 2 else 0.5 if bits == 4 else 0.02)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_on_a_grid_stay_there(bits: int, symmetric: bool) -> None:
    grid = nbits_grid(bits, 64, symmetric=symmetric, n_cols=256)
    assert isinstance(grid, GroupGrid)
    once = encode(made("normal", (16, 256)), grid)
    twice = encode(grid.decode(once, 256), grid)
    lost = grid.decode(twice, 256) - grid.decode(once, 256)
    assert (lost**2).sum() < 1e-7 * (grid.decode(once, 256) ** 2).sum()


def test_constant_and_empty_blocks_are_exact() -> None:
    for symmetric in (True, False):
        values = np.zeros((2, 128), dtype=np.float32)
        values[1, 64:] = -0.25
        grid = nbits_grid(4, 64, symmetric=symmetric, n_cols=128)
        assert isinstance(grid, GroupGrid)
        np.testing.assert_allclose(grid.decode(encode(values, grid), 128), values, rtol=1e-3)


def test_q4_0_and_q8_0_are_what_is_meant_by_symmetric_blocks_of_32() -> None:
    assert nbits_grid(4, 32, symmetric=True, n_cols=64) is GRIDS["Q4_0"] and nbits_grid(8, 32, symmetric=True, n_cols=64) is GRIDS["Q8_0"]
    assert nbits_grid(4, 32, symmetric=False, n_cols=64).name == "INT4_B32_ASYM"
    assert nbits_grid(4, 32, symmetric=True, n_cols=72).name == "INT4_B32"
    assert nbits_grid(4, 128, symmetric=True, n_cols=256).bits == 4.125


@pytest.mark.parametrize(("bits", "size"), [(3, 32), (4, 48), (4, 8), (5, 64)])
def test_sizes_without_kernels_are_refused(bits: int, size: int) -> None:
    with pytest.raises(PlanError, match=f"{bits} bits in blocks of {size}: ONNX Runtime has kernels for 2, 4 and 8 bits in blocks of 16"):
        nbits_grid(bits, size, symmetric=True, n_cols=256)


def test_scales_beyond_float16_are_refused() -> None:
    grid = nbits_grid(4, 64, symmetric=True, n_cols=64)
    assert isinstance(grid, GroupGrid)
    with pytest.raises(PlanError, match=r"blk: values up to 1e\+07 overflow the block scales of INT4_B64\. Use F32 for this tensor\."):
        encode(np.full((1, 64), 1e7, dtype=np.float32), grid, origin="blk")


@given(bits=st.sampled_from([2, 4, 8]), n_cols=st.integers(1, 40), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_unpacking_inverts_packing(bits: int, n_cols: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (3, n_cols)).astype(np.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, -(-n_cols * bits // 8)) and np.array_equal(unpack(packed, bits, n_cols), codes)
