"""A tensor as a checkpoint file lists it, before anyone decides what it is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgeq.errors import UnsupportedError
from edgeq.grids import BF16, F16, F32, Grid
from edgeq.tensors import LazyTensor

# safetensors' names of the types that hold weights. Others appear in checkpoints (F64, I64, F8_E4M3, ...) but are not read.
FLOATS = {"F32": F32, "F16": F16, "BF16": BF16}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """name, dtype and shape as the file states them; `load(grid)` makes the lazy tensor once dtype and shape are known to be usable."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[Grid], LazyTensor]

    @property
    def origin(self) -> str:
        return f"{self.file}: {self.name}"

    def open(self) -> LazyTensor:
        """Raises UnsupportedError when the tensor is not stored in 16- or 32-bit floats."""
        grid = FLOATS.get(self.dtype)
        if grid is None:
            raise UnsupportedError(
                f"{self.origin} is stored as {self.dtype}; supported: {', '.join(FLOATS)}. Save the model in bfloat16 first."
            )
        return self.load(grid)
