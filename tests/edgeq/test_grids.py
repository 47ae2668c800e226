"""The grid table and its decoders against gguf-py and against ggml itself (the C library that llama-cpp-python carries)."""

from __future__ import annotations

import ctypes
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf_files import ggml_library

from edgeq.errors import ShapeError, UnsupportedError
from edgeq.grids import BF16, F16, F32, GRIDS, Grid, grid, grid_by_id

INTEGERS = ("I8", "I16", "I32", "I64")
ACTIVATIONS = ("Q8_1", "Q8_K")
GGML_TYPES = 43  # GGML_TYPE_COUNT


class TypeTraits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    ]


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    base = ggml_library()
    base.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
    return base


def packed_rows(row: Grid, *, n_rows: int, n_blocks: int) -> np.ndarray:
    return np.random.default_rng(row.id).integers(0, 256, (n_rows, n_blocks * row.block_bytes), dtype=np.uint8)


def test_table_equals_gguf_py() -> None:
    theirs = {t.name: (t.name, int(t), *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    ours = {row.name: (row.name, row.id, row.block_size, row.block_bytes) for row in GRIDS.values()}
    assert {name: row for name, row in ours.items() if name in theirs} == {
        name: row for name, row in theirs.items() if name not in (*INTEGERS, *ACTIVATIONS)
    }
    assert set(ours) - set(theirs) == {"Q2_0"}


def test_table_equals_ggml(ggml: ctypes.CDLL) -> None:
    for id in range(GGML_TYPES):
        traits = ggml.ggml_get_type_traits(id).contents
        name = traits.type_name.decode().upper()
        if traits.blck_size == 0 or name in (*INTEGERS, *ACTIVATIONS):
            with pytest.raises(UnsupportedError):
                grid_by_id(id)
        else:
            row = grid_by_id(id)
            assert (row.name.upper(), row.id, row.block_size, row.block_bytes) == (name, id, traits.blck_size, traits.type_size)


@pytest.mark.parametrize("name", [t.name for t in gguf.quants._type_traits] + ["F16", "F32"])
def test_decode_equals_gguf_py(name: str) -> None:
    row = grid(name)
    packed = packed_rows(row, n_rows=5, n_blocks=3)
    with np.errstate(all="ignore"):
        theirs = gguf.dequantize(packed, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(row.decode(packed, 3 * row.block_size), theirs)


@pytest.mark.parametrize("name", [name for name in GRIDS if name not in ("F32", "F64")])
def test_decode_equals_ggml(ggml: ctypes.CDLL, name: str) -> None:
    row = GRIDS[name]
    packed = packed_rows(row, n_rows=64, n_blocks=2)
    theirs = np.empty((64, 2 * row.block_size), dtype=np.float32)
    ggml.ggml_get_type_traits(row.id).contents.to_float(packed.ctypes.data, theirs.ctypes.data, theirs.size)
    # The same values up to the order of two multiplications: one rounding of float32.
    np.testing.assert_allclose(row.decode(packed, theirs.shape[1]), theirs, rtol=2**-22, atol=1e-40)


def test_decode_of_plain_floats() -> None:
    values = np.array([[1.5, -0.25, 3e-5], [np.inf, -np.inf, np.nan]], dtype=np.float32)
    np.testing.assert_array_equal(F32.decode(values.view(np.uint8), 3), values)
    np.testing.assert_array_equal(F16.decode(values.astype(np.float16).view(np.uint8), 3), values.astype(np.float16))
    np.testing.assert_array_equal(BF16.decode((values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8), 3)[1], values[1])
    doubles = np.array([[1e300, 0.1, -2.0]])
    np.testing.assert_array_equal(GRIDS["F64"].decode(doubles.view(np.uint8), 3), [[np.inf, np.float32(0.1), -2.0]])


def test_decode_never_aliases_its_input() -> None:
    for row in (F32, F16, GRIDS["Q8_0"]):
        packed = packed_rows(row, n_rows=2, n_blocks=2)
        values = row.decode(packed, 2 * row.block_size)
        before = values.copy()
        packed[:] = 0
        np.testing.assert_array_equal(values, before)


def test_decode_takes_little_memory_beside_its_result() -> None:
    row = GRIDS["Q4_K"]
    packed = packed_rows(row, n_rows=4000, n_blocks=8)  # 33 MB of float32
    row.decode(packed[:1], 2048)  # gguf-py is imported here
    tracemalloc.start()
    values = row.decode(packed, 2048)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert values.nbytes < peak < 1.8 * values.nbytes


def test_sizes() -> None:
    assert GRIDS["Q4_1"].bits == 5 and GRIDS["Q4_K"].bits == 4.5
    assert GRIDS["Q4_K"].row_bytes(512) == 288
    assert F16.is_float and not GRIDS["Q8_0"].is_float
    assert GRIDS["Q4_0"].fits(96) and not GRIDS["Q4_K"].fits(96)
    with pytest.raises(ShapeError, match="rows of 96 values do not divide into Q4_K blocks of 256"):
        GRIDS["Q4_K"].row_bytes(96)


def test_packed_rows_of_another_width() -> None:
    with pytest.raises(ShapeError, match=r"32 Q8_0 values take 34 bytes a row; got packed rows of shape \[2, 33\]"):
        GRIDS["Q8_0"].decode(np.zeros((2, 33), dtype=np.uint8), 32)


@pytest.mark.parametrize(
    ("id", "message"),
    [
        (26, "ggml type 26 is I32, whole numbers"),
        (9, "ggml type 9 is Q8_1, which llama.cpp uses for activations only"),
        (32, "ggml type 32 is Q4_0_4_8, removed from llama.cpp; use the Q4_0 file of this model"),
        (4, "ggml type 4 is Q4_2, removed from llama.cpp"),
        (43, "unknown ggml type id 43"),
    ],
)
def test_ids_without_a_grid(id: int, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        grid_by_id(id)


def test_unknown_names() -> None:
    with pytest.raises(UnsupportedError, match="unknown grid 'Q4_2'; known: F32, F16, Q4_0"):
        grid("Q4_2")
