"""Grids of quantized checkpoints as formats of their own: packing and unpacking, and joining tensors whose groups differ."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeq.errors import ShapeError
from edgeq.grids import F16, grid
from edgeq.group_grids import TABLES, GroupGrid, as_numbers, group_grid, is_exact, recode, recoded, recodes
from edgeq.tensors import LazyTensor, concat_rows, from_values, take_rows

SCALES = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}


def made(kind: GroupGrid, n_rows: int, n_cols: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Random codes, stored scales and zero points."""
    rng = np.random.default_rng(seed)
    n_groups = 1 + np.frombuffer(kind.order, dtype="<i4").max() if kind.order else n_cols // kind.block_size
    codes = rng.integers(0, 1 << kind.code_bits, (n_rows, n_cols)).astype(np.uint8)
    values = rng.uniform(0.5, 2, (n_rows, n_groups)).astype(np.float32)
    scales = values.view(np.uint32) >> 16 if kind.scale == "BF16" else values
    zeros = rng.integers(0, 1 << kind.code_bits, (n_rows, n_groups)) if kind.zero else None
    return codes, scales.astype(SCALES[kind.scale]), zeros


@given(
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    block=st.sampled_from([2, 5, 8, 24, 32, 64]),
    blocks=st.integers(1, 3),
    scale=st.sampled_from(sorted(SCALES)),
    zero=st.sampled_from(["", "U8", "F16", "F32"]),
    by_order=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_is_packed_comes_back(bits: int, block: int, blocks: int, scale: str, zero: str, by_order: bool, seed: int) -> None:
    n_cols = block * blocks
    order = np.random.default_rng(seed).permutation(np.arange(n_cols, dtype=np.int32) // block).astype(np.int32) if by_order else None
    kind = group_grid("g", code_bits=bits, block_size=n_cols if by_order else block, scale=scale, zero=zero, center=3, order=order)
    codes, scales, zeros = made(kind, 4, n_cols, seed)
    packed = kind.pack(codes, scales, zeros)
    assert packed.shape == (4, kind.row_bytes(n_cols))
    found, found_scales, found_zeros = kind.unpack(packed)
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(found_scales, as_numbers(scales, scale))
    np.testing.assert_array_equal(found_zeros, np.full(scales.shape, 3) if zeros is None else zeros)
    group = np.arange(n_cols) // block if order is None else order
    expected = (codes - found_zeros[:, group].astype(np.float64)) * found_scales[:, group].astype(np.float64)
    np.testing.assert_array_equal(kind.decode(packed, n_cols), expected.astype(np.float32))
    assert kind.decode(packed[:0], n_cols).shape == (0, n_cols)


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_eight_bit_floats_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    np.testing.assert_array_equal(TABLES[name], torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy())


def test_exponents_are_those_of_torch() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(as_numbers(every.numpy(), "F8_E8M0"), every.view(torch.float8_e8m0fnu).float().numpy())


def test_which_codes_fit_which_blocks() -> None:
    def fits(target: str, bits: int, zero: str = "", center: int = 0, block: int = 32, table: str = "") -> bool:
        kind = group_grid("g", code_bits=bits, block_size=block, scale="F16", zero=zero, center=center, table=table)
        return recodes(kind, grid(target))

    assert fits("Q4_0", 4, center=8)
    assert not fits("Q4_0", 4, center=7)
    assert fits("Q4_0", 3, zero="U8")
    assert not fits("Q4_0", 4, zero="U8")
    assert fits("Q4_1", 4, zero="F16")
    assert not fits("Q4_1", 8, center=128)
    assert fits("Q8_0", 8, center=128)
    assert not fits("Q8_0", 8, zero="U8")
    assert fits("Q8_0", 4, zero="U8", block=96)
    assert not fits("Q4_0", 4, center=8, block=48)
    assert not fits("Q4_0", 4, center=8, table="nf4")
    assert not fits("Q4_K", 4, center=8)
    assert not recodes(F16, grid("Q4_0"))
    with pytest.raises(ShapeError, match="F16 has no codes to keep"):
        recoded(LazyTensor(shape=(2, 32), grid=F16, read=lambda a, b: np.zeros((b - a, 64), np.uint8), origin="x"), grid("Q4_0"))
    kind = group_grid("g", code_bits=8, block_size=32, scale="F16", center=128)
    assert recode(np.empty((0, kind.row_bytes(64)), np.uint8), kind, grid("Q8_0")).shape == (0, 68)


def test_exactness_is_that_of_f16() -> None:
    third, half = np.array([[1 / 3]]), np.array([[0.5]])
    assert is_exact(half, np.array([[13]]), grid("Q4_1"))
    assert not is_exact(third, np.array([[8]]), grid("Q4_0"))
    odd = np.array([[1 + 2**-10]])  # all 11 bits of F16, so that seven times it has too many
    assert is_exact(odd, np.array([[7]]), grid("Q4_0"))
    assert not is_exact(odd, np.array([[7]]), grid("Q4_1"))
    assert not is_exact(np.array([[1e6]]), np.array([[8]]), grid("Q4_0"))


def test_tensors_of_one_name_and_different_groups_are_joined_by_value() -> None:
    def tensor(center: int) -> LazyTensor:
        kind = group_grid("GPTQ 4-bit", code_bits=4, block_size=32, scale="F16", center=center)
        codes, scales, _ = made(kind, 3, 64, center)
        packed = kind.pack(codes, scales, None)
        return LazyTensor(shape=(3, 64), grid=kind, read=lambda a, b: packed[a:b], origin=f"center {center}")

    one, other = tensor(7), tensor(9)
    joined = concat_rows([one, other], origin="both")
    np.testing.assert_array_equal(joined.decode(), np.concatenate([one.decode(), other.decode()]))
    same = concat_rows([one, take_rows(one, np.array([2, 0]))], origin="same")
    assert same.grid == one.grid
    np.testing.assert_array_equal(same.decode(), one.decode()[[0, 1, 2, 2, 0]])
    assert from_values(one.decode(), origin="v").shape == one.shape
