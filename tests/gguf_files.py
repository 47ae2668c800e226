"""GGUF files for tests, written by gguf-py (not by us); the demo model's own file; ggml to compare with."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgeq.converters.sources import demo
from edgeq.errors import EdgeqError

# Every value type and several grids.
V = gguf.GGUFValueType
KEYS = {
    "t.u8": (V.UINT8, 200),
    "t.i8": (V.INT8, -100),
    "t.u16": (V.UINT16, 60000),
    "t.i16": (V.INT16, -30000),
    "t.u32": (V.UINT32, 4_000_000_000),
    "t.i32": (V.INT32, -2_000_000_000),
    "t.f32": (V.FLOAT32, 0.5),
    "t.bool": (V.BOOL, True),
    "t.string": (V.STRING, "größer 你好"),
    "t.u64": (V.UINT64, 2**63 + 1),
    "t.i64": (V.INT64, -(2**62)),
    "t.f64": (V.FLOAT64, 1e300),
    "t.strings": (V.ARRAY, ["a", "", "ĠĊ", "x" * 300]),
    "t.ints": (V.ARRAY, [3, -3, 0]),
    "t.floats": (V.ARRAY, [0.25, -1.5]),
    "t.bools": (V.ARRAY, [True, False, True]),
}
RNG = np.random.default_rng(0)
TENSORS = {
    "matrix.weight": RNG.standard_normal((3, 64)).astype(np.float32),
    "half.weight": RNG.standard_normal((2, 5)).astype(np.float16),
    "norm.weight": RNG.standard_normal(7).astype(np.float32),
    "packed.weight": (RNG.integers(0, 256, (5, 2 * 18), dtype=np.uint8), gguf.GGMLQuantizationType.Q4_0),
    "deep.weight": RNG.standard_normal((1, 4, 3)).astype(np.float32),
}


def demo_file() -> Path:
    """The demo model's GGUF, or skip the test when the package that carries it is not installed."""
    try:
        return demo.demo_file()
    except EdgeqError as err:
        pytest.skip(str(err))


@cache
def ggml_library() -> ctypes.CDLL:
    """ggml itself, the C library that llama-cpp-python carries."""
    spec = find_spec("llama_cpp")
    assert spec is not None and spec.submodule_search_locations
    return ctypes.CDLL(str(min(Path(spec.submodule_search_locations[0], "lib").glob("libggml-base.*"))))


def write_with_gguf_py(
    path: Path,
    arch: str,
    keys: Mapping[str, tuple[gguf.GGUFValueType, Any]],
    tensors: Mapping[str, np.ndarray | tuple[np.ndarray, gguf.GGMLQuantizationType]],
) -> Path:
    """Write `keys` (name -> type and value) and `tensors` (name -> float array, or packed bytes and their type) in order."""
    writer = gguf.GGUFWriter(path, arch)
    for key, (kind, value) in keys.items():
        writer.add_key_value(key, value, kind)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
