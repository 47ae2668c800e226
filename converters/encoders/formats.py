"""The formats an encoder is written in.

    format   linear layers                                   embeddings          runs on
    fp32     float32                                         float32             anything
    fp16     float16, activations too                        float16             GPUs; CPUs convert to float32 and back
    Q8_0     8 bits, blocks of 32 inputs                     8 bits, blocks      CPUs; next to no loss
    int8     8 bits, one scale per output (`int8_rows`)      8 bits, blocks      CPUs; the fastest
    int4     4 bits with zero points, blocks of 32 inputs    4 bits              CPUs; the smallest; loses the least of its format by
                                                                                 compensation on a calibration text (`compensated`)

Norms, biases and (float formats apart) the tables of positions and segments, in 8 bits, are small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from edgeq.converters.onnx.int8 import int8_grid
from edgeq.encoder_spec import LINEARS
from edgeq.errors import UsageError
from edgeq.grids import F16, F32, Grid
from edgeq.nbits import nbits_grid
from edgeq.tensors import LazyTensor

FormatName = Literal["fp32", "fp16", "Q8_0", "int8", "int4"]
FORMATS: tuple[FormatName, ...] = ("fp32", "fp16", "Q8_0", "int8", "int4")
ALIASES: Mapping[str, FormatName] = {"F32": "fp32", "F16": "fp16", "Q4_0": "int4"}
BLOCK = 32
FULL_RANGE, NARROW_RANGE = 127, 63

_ROLES = tuple(role for group in LINEARS for role in group)


@dataclass(frozen=True)
class EncoderFormat:
    """code_range: largest code of int8 weights, either way."""

    name: FormatName
    code_range: int = FULL_RANGE

    @property
    def float_type(self) -> ir.DataType:
        return ir.DataType.FLOAT16 if self.name == "fp16" else ir.DataType.FLOAT

    def grid(self, name: str, tensor: LazyTensor) -> Grid:
        """What a tensor is stored in, by its canonical name."""
        module, _, part = name.rpartition(".")
        role = module.rsplit(".", 1)[-1]
        matrix = part == "weight" and (role in _ROLES or role in ("embed", "positions", "types"))
        if self.name == "fp16" and matrix:
            return F16
        if self.name in ("fp32", "fp16") or not matrix:
            return F32
        n_cols = tensor.n_cols
        if role in ("positions", "types") or self.name == "Q8_0" or (self.name == "int8" and role == "embed"):
            return nbits_grid(8, BLOCK, symmetric=True, n_cols=n_cols)
        return int8_grid("w8a8-dynamic", n_cols) if self.name == "int8" else nbits_grid(4, BLOCK, symmetric=False, n_cols=n_cols)


def parse_format(name: str) -> FormatName:
    """Raises UsageError with the choices."""
    for known in FORMATS:
        if name.lower() == known.lower():
            return known
    found = ALIASES.get(name.upper())
    if found is None:
        raise UsageError(f"--quant {name} is not a format for encoders; choose one of {', '.join(FORMATS)}, or auto.")
    return found
