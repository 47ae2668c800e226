from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.errors import ShapeError, SourceError
from edgeq.grids import F16, F32, GRIDS, Grid
from edgeq.tensors import (
    LazyTensor,
    as_float32,
    check_finite,
    concat_rows,
    from_file,
    from_values,
    map_values,
    slice_rows,
    take_rows,
)


def stored(grid: Grid, n_rows: int, n_blocks: int = 2, *, seed: int = 0) -> LazyTensor:
    """A matrix of random packed bytes."""
    raw = np.random.default_rng(seed).integers(0, 256, (n_rows, n_blocks * grid.block_bytes), dtype=np.uint8)
    return LazyTensor(shape=(n_rows, n_blocks * grid.block_size), grid=grid, read=lambda lo, hi: raw[lo:hi], origin="test")


def in_chunks(tensor: LazyTensor, step: int) -> np.ndarray:
    return np.concatenate([tensor.packed(lo, min(lo + step, tensor.n_rows)) for lo in range(0, tensor.n_rows, step)])


def test_from_file(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    path = tmp_path / "weights"
    path.write_bytes(b"head!" + values.tobytes() + b"tail")
    tensor = from_file(path, offset=5, shape=(4, 3), grid=F32, origin="w")
    assert (tensor.n_rows, tensor.n_cols, tensor.row_bytes, tensor.nbytes) == (4, 3, 12, 48)
    np.testing.assert_array_equal(tensor.decode(), values)
    np.testing.assert_array_equal(tensor.decode(1, 3), values[1:3])
    assert tensor.decode(2, 2).shape == (0, 3)
    vector = from_file(path, offset=5, shape=(12,), grid=F32, origin="v")
    np.testing.assert_array_equal(vector.decode(), values.ravel())


def test_a_file_that_went_away(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(48))
    tensor = from_file(path, offset=0, shape=(4, 3), grid=F32, origin="blk.0.w")
    path.write_bytes(bytes(47))
    assert tensor.decode(0, 3).shape == (3, 3)
    with pytest.raises(SourceError, match=r"blk\.0\.w: .*weights cannot be read any more: .*Keep the source in place"):
        tensor.decode()
    path.unlink()
    with pytest.raises(SourceError, match=r"cannot be read any more: .*No such file"):
        tensor.decode(0, 1)


@given(st.sampled_from(list(GRIDS.values())), st.permutations(range(7)), st.integers(1, 7))
@settings(deadline=None)
def test_a_permutation_undone_is_the_identity_on_bytes(grid: Grid, order: list[int], step: int) -> None:
    tensor, index = stored(grid, 7), np.array(order)
    permuted = take_rows(tensor, index)
    np.testing.assert_array_equal(in_chunks(permuted, step), tensor.packed()[index])
    np.testing.assert_array_equal(in_chunks(take_rows(permuted, np.argsort(index)), step), tensor.packed())


def test_take_rows_may_repeat_and_leave_out() -> None:
    tensor = stored(GRIDS["Q4_0"], 7)
    picked = take_rows(tensor, np.array([5, 5, 0]))
    assert (picked.shape, picked.grid) == ((3, 64), GRIDS["Q4_0"])
    np.testing.assert_array_equal(picked.packed(), tensor.packed()[[5, 5, 0]])
    assert picked.packed(1, 1).shape == (0, 36)


def test_take_elements_of_a_vector() -> None:
    vector = take_rows(from_values([1, 2, 3, 4], origin="v"), np.array([3, 1]))
    assert vector.shape == (2,)
    np.testing.assert_array_equal(vector.decode(), [4, 2])


@pytest.mark.parametrize("name", ["F16", "Q4_1", "Q6_K"])
def test_slice_rows(name: str) -> None:
    tensor = stored(GRIDS[name], 9)
    part = slice_rows(tensor, 2, 7)
    assert part.n_rows == 5
    np.testing.assert_array_equal(in_chunks(part, 2), tensor.packed()[2:7])
    np.testing.assert_array_equal(slice_rows(from_values([1, 2, 3], origin="v"), 1, 3).decode(), [2, 3])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 5))
@settings(deadline=None)
def test_slices_joined_again_are_the_identity_on_bytes(heights: list[int], step: int) -> None:
    tensor = stored(GRIDS["Q8_0"], sum(heights))
    stops = np.cumsum(heights).tolist()
    parts = [slice_rows(tensor, stop - height, stop) for stop, height in zip(stops, heights, strict=True)]
    joined = concat_rows(parts, origin="joined")
    assert (joined.shape, joined.grid, joined.origin) == (tensor.shape, tensor.grid, "joined")
    np.testing.assert_array_equal(in_chunks(joined, step), tensor.packed())
    assert joined.packed(0, 0).shape == (0, tensor.row_bytes)


def test_joining_unequal_grids_gives_float32() -> None:
    a, b = from_values(np.ones((2, 32)), origin="a"), stored(F16, 3, 32)
    b = map_values(b, lambda values: np.nan_to_num(values))
    half = LazyTensor(shape=(1, 32), grid=F16, read=lambda lo, hi: np.full((1, 32), 0.5, np.float16).view(np.uint8)[lo:hi], origin="c")
    joined = concat_rows([half, a, b], origin="joined")
    assert joined.grid is F32 and joined.shape == (6, 32)
    np.testing.assert_array_equal(joined.decode(), np.concatenate([half.decode(), a.decode(), b.decode()]))


def test_joining_vectors_and_unequal_widths() -> None:
    np.testing.assert_array_equal(
        concat_rows([from_values([1], origin="a"), from_values([2, 3], origin="b")], origin="v").decode(), [1, 2, 3]
    )
    with pytest.raises(ShapeError, match=r"wqkv: cannot join tensors of widths \[32, 64\]"):
        concat_rows([stored(F32, 2, 32), stored(F32, 2, 64)], origin="wqkv")


def test_map_values() -> None:
    tensor = stored(GRIDS["Q8_0"], 3)
    doubled = map_values(tensor, lambda values: np.nan_to_num(values) * 2)
    assert (doubled.grid, doubled.shape) == (F32, tensor.shape)
    np.testing.assert_array_equal(doubled.decode(1, 3), np.nan_to_num(tensor.decode(1, 3)) * 2)
    halves = map_values(from_values(np.ones((2, 4)), origin="m"), lambda values: values[:, :2], shape=(2, 2))
    np.testing.assert_array_equal(halves.decode(), np.ones((2, 2)))


def test_as_float32() -> None:
    plain, packed = from_values([[1.0, 2.0]], origin="m"), stored(GRIDS["Q4_0"], 2)
    assert as_float32(plain) is plain
    assert as_float32(packed).grid is F32
    np.testing.assert_array_equal(as_float32(packed).decode(), packed.decode())


@pytest.mark.parametrize("shape", [(), (2, 3, 4), (0, 3)])
def test_shapes_that_are_neither_vector_nor_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"w: shape .* is not a vector or a matrix"):
        LazyTensor(shape=shape, grid=F32, read=lambda lo, hi: np.empty((0, 0), np.uint8), origin="w")


def test_check_finite() -> None:
    values = np.ones((2, 3), dtype=np.float32)
    check_finite(values, origin="w")
    values[1] = [np.nan, np.inf, -np.inf]
    with pytest.raises(SourceError, match=r"w: 1 values are NaN, 2 infinite\. The model is damaged or its training diverged"):
        check_finite(values, origin="w")
