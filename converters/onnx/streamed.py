"""Weights that are never whole in memory: initializers whose bytes come in pieces, in order, when the file is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]


class Streamed(ir.LazyTensor):
    """A tensor of fixed type and shape. chunks() yields its values in row-major order as arrays of any shape, each time anew.

    `numpy` and `tobytes` join the pieces and are for small tensors and tests; `tofile` holds one piece at a time.
    """

    def __init__(self, name: str, dtype: ir.DataType, shape: Sequence[int], chunks: Callable[[], Iterable[Array]]) -> None:
        def whole() -> ir.TensorProtocol:
            parts = [np.ascontiguousarray(chunk, dtype=dtype.numpy()).reshape(-1) for chunk in chunks()]
            return ir.tensor(np.concatenate(parts).reshape(tuple(shape)), dtype=dtype, name=name)

        super().__init__(whole, dtype=dtype, shape=ir.Shape(shape), name=name, cache=False)
        self.chunks = chunks

    def tofile(self, file: BinaryIO) -> None:
        for chunk in self.chunks():
            file.write(np.ascontiguousarray(chunk).data.cast("B"))
