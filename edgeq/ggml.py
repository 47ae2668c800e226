"""Rows of ggml block types by ggml's own code: packing and unpacking, on as many threads as call.

The library is the one inside the installed llama-cpp-python, called through ctypes, which releases the GIL. Only its base is loaded:
no backend starts, and llama_cpp is not imported. Float grids are rounded to nearest even by numpy and need no library.

Signatures: ggml/include/ggml.h and ggml/src/ggml-quants.h of llama.cpp.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import MissingDependency, PlanError, UnsupportedError
from edgeq.grids import BF16, F16, F32, Grid
from edgeq.tensors import Bytes, Floats

# Grids that ggml encodes without being given an importance matrix.
ENCODABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4")


def encode(values: Floats, grid: Grid, weights: Floats | None = None, *, origin: str = "values") -> Bytes:
    """Finite, contiguous float32 (n_rows, n_cols) to packed rows, uint8 (n_rows, grid.row_bytes(n_cols)).

    weights: importance of the columns, positive float32 (n_cols,), or None. Raises PlanError when a value does not fit the grid,
    UnsupportedError for grids that ggml cannot encode by itself, MissingDependency without the llama library.
    """
    n_rows, n_cols = values.shape
    row_bytes = grid.row_bytes(n_cols)
    if grid.is_float:
        return _encode_float(values, grid, origin)
    if grid.name not in ENCODABLE:
        raise _not_writable(grid, origin)
    packed = np.empty((n_rows, row_bytes), dtype=np.uint8)
    library().ggml_quantize_chunk(grid.id, _pointer(values), _pointer(packed), 0, n_rows, n_cols, _pointer(weights))
    check_blocks(packed, values, grid, origin)
    return packed


def decode(packed: Bytes, grid: Grid, n_cols: int) -> Floats:
    """As Grid.decode, by ggml where it can: several times faster, and on all cores."""
    if grid.is_float:
        return grid.decode(packed, n_cols)
    values = np.empty((len(packed), n_cols), dtype=np.float32)
    dequantize = getattr(library(), "dequantize_row_" + grid.name.lower().replace("_k", "_K"))
    dequantize(_pointer(packed), _pointer(values), ctypes.c_int64(values.size))
    return values


def is_sound(packed: Bytes, grid: Grid) -> bool:
    """Whether all scales of packed rows are finite, as llama.cpp wants them."""
    return bool(library().ggml_validate_row_data(grid.id, _pointer(packed), packed.nbytes))


def check_blocks(packed: Bytes, values: Floats, grid: Grid, origin: str) -> None:
    """Raises PlanError when these values, packed, have scales that are not finite."""
    if not is_sound(packed, grid):
        largest = float(np.abs(values).max())
        raise PlanError(f"{origin}: values up to {largest:.6g} overflow the block scales of {grid.name}. Use BF16 or F32 for this tensor.")


def _encode_float(values: Floats, grid: Grid, origin: str) -> Bytes:
    if grid is F32:
        return values.view(np.uint8)
    if grid is F16:
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        packed, overflow, remedy = halves.view(np.uint8), np.isinf(halves), "Use BF16 for this model."
    elif grid is BF16:
        bits = values.view(np.uint32)
        codes = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        packed, overflow, remedy = codes.view(np.uint8), (codes & 0x7F80) == 0x7F80, "Use F32 for this model."
    else:
        raise _not_writable(grid, origin)
    if overflow.any():
        raise PlanError(f"{origin}: {np.abs(values).max():.6g} is beyond the largest {grid.name} number. {remedy}")
    return packed


def _not_writable(grid: Grid, origin: str) -> UnsupportedError:
    return UnsupportedError(f"{origin}: {grid.name} cannot be written; choose one of F32, F16, BF16, {', '.join(ENCODABLE)}")


def _pointer(array: npt.NDArray[Any] | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """ggml's base library out of the installed llama-cpp-python, without importing that package. Raises MissingDependency."""
    try:
        spec = importlib.util.find_spec("llama_cpp")
    except ValueError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependency("llama_cpp", "llama")
    folder = Path(spec.submodule_search_locations[0]) / "lib"
    names = {"win32": ("ggml-base.dll", "libggml-base.dll"), "darwin": ("libggml-base.dylib", "libggml-base.so")}
    for name in names.get(sys.platform, ("libggml-base.so",)):
        if (folder / name).is_file():
            library = ctypes.CDLL(str(folder / name))
            break
    else:
        raise MissingDependency("llama_cpp", "llama")
    void, i64 = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, void, void, i64, i64, i64, void]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, void, ctypes.c_size_t]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    return library
