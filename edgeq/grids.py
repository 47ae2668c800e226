"""Number formats with exact decoding: today the ggml block types, one row each.

A grid packs `block_size` consecutive values of a row into `block_bytes` bytes. Decoding goes through the `gguf` package (ggml's
own Python reference); encoding needs the llama library and lives with the GGUF carrier.
Ids and block layouts: ggml.h / ggml-common.h of llama.cpp; a test compares this table with gguf-py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import ShapeError, UnsupportedError


@dataclass(frozen=True)
class Grid:
    """name and id as in ggml; block_size values per block of block_bytes bytes."""

    name: str
    id: int
    block_size: int
    block_bytes: int

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.block_bytes / self.block_size

    @property
    def is_float(self) -> bool:
        return self.block_size == 1

    def fits(self, n_cols: int) -> bool:
        return n_cols % self.block_size == 0

    def row_bytes(self, n_cols: int) -> int:
        if not self.fits(n_cols):
            raise ShapeError(f"rows of {n_cols} values do not divide into {self.name} blocks of {self.block_size}")
        return n_cols // self.block_size * self.block_bytes

    def decode(self, packed: npt.NDArray[np.uint8], n_cols: int) -> npt.NDArray[np.float32]:
        """Packed rows, uint8 (n_rows, row_bytes(n_cols)), to float32 (n_rows, n_cols). The result never aliases the input.

        Row chunk by row chunk, so that temporaries stay at a few MiB beside the result. Values that are not finite come back as
        they are, without a warning: `edgeq.tensors.check_finite` is there to refuse them.
        """
        n_rows = len(packed)
        if packed.shape != (n_rows, self.row_bytes(n_cols)):
            raise ShapeError(
                f"{n_cols} {self.name} values take {self.row_bytes(n_cols)} bytes a row; got packed rows of shape {list(packed.shape)}"
            )
        values = np.empty((n_rows, n_cols), dtype=np.float32)
        step = max(1, _CHUNK_VALUES // n_cols)
        with np.errstate(all="ignore"):
            for start in range(0, n_rows, step):
                chunk = np.ascontiguousarray(packed[start : start + step])
                values[start : start + step] = self._decode(chunk).reshape(len(chunk), n_cols)
        return values

    def _decode(self, packed: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        if self.name in _FLOATS:
            return packed.view(_FLOATS[self.name])
        if self.name == "BF16":
            return (packed.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        if self.name in _TABLES:
            return _decode_table(packed.reshape(-1, self.block_bytes), _TABLES[self.name])
        from gguf import GGMLQuantizationType, dequantize

        return dequantize(packed, GGMLQuantizationType(self.id))


_CHUNK_VALUES = 1 << 20
_FLOATS = {"F32": np.float32, "F16": np.float16, "F64": np.float64}

# Grids that the gguf package knows by name only: an F16 scale, then codes packed from the low bits up, each an index into these values.
_TABLES = {"Q1_0": np.array([-1, 1], dtype=np.float32), "Q2_0": np.array([-1, 0, 1, 2], dtype=np.float32)}


def _decode_table(blocks: npt.NDArray[np.uint8], table: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(n_blocks, 2 + code bytes) to (n_blocks, block_size)."""
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    bits = len(table).bit_length() - 1
    codes = blocks[:, 2:, None] >> np.arange(0, 8, bits, dtype=np.uint8) & np.uint8(len(table) - 1)
    return table[codes.reshape(len(blocks), -1)] * scale


_ROWS = (
    ("F32", 0, 1, 4),
    ("F16", 1, 1, 2),
    ("Q4_0", 2, 32, 18),
    ("Q4_1", 3, 32, 20),
    ("Q5_0", 6, 32, 22),
    ("Q5_1", 7, 32, 24),
    ("Q8_0", 8, 32, 34),
    ("Q2_K", 10, 256, 84),
    ("Q3_K", 11, 256, 110),
    ("Q4_K", 12, 256, 144),
    ("Q5_K", 13, 256, 176),
    ("Q6_K", 14, 256, 210),
    ("IQ2_XXS", 16, 256, 66),
    ("IQ2_XS", 17, 256, 74),
    ("IQ3_XXS", 18, 256, 98),
    ("IQ1_S", 19, 256, 50),
    ("IQ4_NL", 20, 32, 18),
    ("IQ3_S", 21, 256, 110),
    ("IQ2_S", 22, 256, 82),
    ("IQ4_XS", 23, 256, 136),
    ("F64", 28, 1, 8),
    ("IQ1_M", 29, 256, 56),
    ("BF16", 30, 1, 2),
    ("TQ1_0", 34, 256, 54),
    ("TQ2_0", 35, 256, 66),
    ("MXFP4", 39, 32, 17),
    ("NVFP4", 40, 64, 36),
    ("Q1_0", 41, 128, 18),
    ("Q2_0", 42, 64, 18),
)
# Other ids of ggml.h: they are no formats for weights, or no longer are.
_NOT_WEIGHTS = {
    9: "Q8_1, which llama.cpp uses for activations only",
    15: "Q8_K, which llama.cpp uses for activations only",
    24: "I8, whole numbers",
    25: "I16, whole numbers",
    26: "I32, whole numbers",
    27: "I64, whole numbers",
    4: "Q4_2, removed from llama.cpp",
    5: "Q4_3, removed from llama.cpp",
    31: "Q4_0_4_4, removed from llama.cpp; use the Q4_0 file of this model",
    32: "Q4_0_4_8, removed from llama.cpp; use the Q4_0 file of this model",
    33: "Q4_0_8_8, removed from llama.cpp; use the Q4_0 file of this model",
    36: "IQ4_NL_4_4, removed from llama.cpp; use the IQ4_NL file of this model",
    37: "IQ4_NL_4_8, removed from llama.cpp; use the IQ4_NL file of this model",
    38: "IQ4_NL_8_8, removed from llama.cpp; use the IQ4_NL file of this model",
}
GRIDS = {row[0]: Grid(*row) for row in _ROWS}
_BY_ID = {grid.id: grid for grid in GRIDS.values()}
F32, F16, BF16 = GRIDS["F32"], GRIDS["F16"], GRIDS["BF16"]


def grid(name: str) -> Grid:
    try:
        return GRIDS[name]
    except KeyError:
        raise UnsupportedError(f"unknown grid {name!r}; known: {', '.join(GRIDS)}") from None


def grid_by_id(ggml_id: int) -> Grid:
    """The grid with ggml's type id. Raises UnsupportedError that says what the id stands for, if it stands for anything."""
    if ggml_id in _BY_ID:
        return _BY_ID[ggml_id]
    if ggml_id in _NOT_WEIGHTS:
        raise UnsupportedError(f"ggml type {ggml_id} is {_NOT_WEIGHTS[ggml_id]}")
    raise UnsupportedError(f"unknown ggml type id {ggml_id}")
