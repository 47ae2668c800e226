"""A tensor as a checkpoint file lists it, before anyone decides what it is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import UnsupportedError
from edgeq.grids import BF16, F16, F32, Grid
from edgeq.tensors import Bytes, LazyTensor

# safetensors' names of the types that hold weights. Others are read only as parts of quantized weights.
FLOATS = {"F32": F32, "F16": F16, "BF16": BF16}
# Types as numpy reads them. BF16 and the 8-bit floats come as their bits.
_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8", "U8": "u1", "I8": "i1", "BOOL": "u1", "I16": "<i2", "I32": "<i4"}
_NUMPY |= {"I64": "<i8", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1"}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """name, dtype and shape as the file states them.

    load(grid) makes the lazy tensor once dtype and shape are known to be usable; data() maps all of its bytes. decoded: set for a weight
    that the file stores in parts, once they have been put together.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[Grid], LazyTensor]
    data: Callable[[], Bytes]
    decoded: LazyTensor | None = None

    @property
    def origin(self) -> str:
        return f"{self.file}: {self.name}"

    def open(self) -> LazyTensor:
        """Raises UnsupportedError when the tensor is not stored in 16- or 32-bit floats."""
        if self.decoded is not None:
            return self.decoded
        grid = FLOATS.get(self.dtype)
        if grid is None:
            raise UnsupportedError(
                f"{self.origin} is stored as {self.dtype}; supported: {', '.join(FLOATS)}. Save the model in bfloat16 first."
            )
        return self.load(grid)

    def array(self) -> npt.NDArray[Any]:
        """The tensor as numpy, mapped from the file. Only what is then looked at is read."""
        if self.dtype not in _NUMPY:
            raise UnsupportedError(f"{self.origin} is stored as {self.dtype}, which is not read")
        raw = self.data() if 0 not in self.shape else np.empty(0, dtype=np.uint8)
        return raw.view(_NUMPY[self.dtype]).reshape(self.shape)
