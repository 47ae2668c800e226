"""Rounding an encoder's weights to their grids, one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgeq.converters.encoders.formats import EncoderFormat
from edgeq.converters.gguf.encode import encode_rows
from edgeq.converters.onnx.int8 import Int8Grid
from edgeq.encoder_spec import EncoderModel
from edgeq.grids import Grid
from edgeq.tensors import Bytes, Floats, LazyTensor, check_finite, map_values


def folded(model: EncoderModel) -> EncoderModel:
    """The model with a single kind of segment, which every token belongs to, added to its positions."""
    if model.spec.n_types != 1:
        return model
    tensors = dict(model.tensors)
    only = tensors.pop("types.weight").decode()[0]
    tensors["positions.weight"] = map_values(tensors["positions.weight"], lambda rows: rows + only)
    return replace(model, spec=replace(model.spec, n_types=0), tensors=tensors)


def rounded(model: EncoderModel, form: EncoderFormat) -> dict[str, LazyTensor]:
    """Every tensor in its grid of the format, rounded as it is read."""
    return {name: _rounded(tensor, form.grid(name, tensor), form.code_range) for name, tensor in model.tensors.items()}


def _rounded(tensor: LazyTensor, grid: Grid, code_range: int) -> LazyTensor:
    if grid.is_float or grid == tensor.grid:
        return tensor

    def read(start: int, stop: int) -> Bytes:
        if stop <= start:
            return np.empty((0, grid.row_bytes(tensor.n_cols)), dtype=np.uint8)
        values = tensor.decode(start, stop)
        check_finite(values, origin=tensor.origin)
        if isinstance(grid, Int8Grid):
            return encode_channels(values, grid, code_range)
        return encode_rows(values, grid, origin=tensor.origin)

    return LazyTensor(shape=tensor.shape, grid=grid, read=read, origin=tensor.origin)


def encode_channels(values: Floats, grid: Int8Grid, code_range: int) -> Bytes:
    """Rows (n_rows, n_cols) with one scale each, so that the largest magnitude gets code `code_range`."""
    largest = np.abs(values).max(1, keepdims=True)
    scales = np.where(largest > 0, largest / np.float32(code_range), np.float32(1)).astype(np.float32)
    codes = np.rint(values / scales) + 128
    return grid.pack(codes.astype(np.uint8), scales, None)
