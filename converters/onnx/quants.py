"""Which grid every matrix of an ONNX package gets: the names that `--quant` takes with `--format onnx`.

    fp32, fp16          floats, and the graph computes in them
    int8, int4          symmetric blocks of 32: the same integers as Q8_0 and Q4_0 of GGUF
    ..-asym             a zero point for each block
    ..-b64, ..-b128     larger blocks: fewer scales, coarser
    int4..-full         embedding and head in 4 bits as well; else they have 8
    w8, w8a8-dynamic, w8a8-static
                        one scale for each output; activations in floats, measured on the run, or calibrated
    source              quantized matrices in the grid they came in; the others in 8 bits

A matrix that comes quantized keeps its codes wherever a kernel takes them and another grid would not make it smaller by more than a quarter
of a bit: rounding it once more could only lose. Grids that no kernel takes become 8 bits under `source`, and what the name says under the
others. Vectors are floats of the graph's type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edgeq.calibration import Ranges
from edgeq.converters.onnx.int8 import int8_grid
from edgeq.errors import UnsupportedError
from edgeq.grids import F16, F32, Grid
from edgeq.model import Model
from edgeq.nbits import Bnb4, answer_for, nbits_grid, stored_bits
from edgeq.planning import MARGIN_BITS
from edgeq.tensors import LazyTensor

Kind = Literal["float", "blocks", "rows", "source"]
EMBED, HEAD = "embed.weight", "head.weight"

# Names of GGUF that mean the same here.
_SAME = {"f32": "fp32", "f16": "fp16", "q8_0": "int8", "q4_0": "int4"}
_BLOCKS = re.compile(r"int(?P<bits>[48])(?P<asym>-asym)?(-b(?P<block>32|64|128))?(?P<full>-full)?")
_KEPT_BLOCK = 32  # of 8-bit embeddings and heads, and of what no kernel takes


@dataclass(frozen=True)
class OnnxQuant:
    """bits, block_size, symmetric: of block matrices, where kind is "blocks". full: embedding and head have them too."""

    name: str
    kind: Kind
    bits: int = 8
    block_size: int = 32
    symmetric: bool = True
    full: bool = True

    @property
    def half(self) -> bool:
        """Whether it wants a float16 graph on every device."""
        return self.name == "fp16"

    def grid(self, n_cols: int) -> Grid:
        """Of block matrices with rows of `n_cols` values, for kind "blocks"."""
        return nbits_grid(self.bits, self.block_size, symmetric=self.symmetric, n_cols=n_cols)


QUANT_NAMES = (
    *("fp32", "fp16", "int8", "int8-asym", "int8-b64", "int8-b128", "int8-asym-b64", "int8-asym-b128"),
    *(f"int4{asym}{block}{full}" for asym in ("", "-asym") for block in ("", "-b64", "-b128") for full in ("", "-full")),
    *("w8", "w8a8-dynamic", "w8a8-static", "source"),
)


def onnx_quant(name: str) -> OnnxQuant:
    """The quant of a name, in any case. Raises UnsupportedError with all names."""
    word = _SAME.get(name.lower(), name.lower())
    if match := _BLOCKS.fullmatch(word):
        bits = int(match["bits"])
        word = word.replace("-b32", "")
        if word in QUANT_NAMES:
            full = bits == 8 or match["full"] is not None
            return OnnxQuant(word, "blocks", bits, int(match["block"] or 32), match["asym"] is None, full)
    elif word in ("fp32", "fp16"):
        return OnnxQuant(word, "float")
    elif word in QUANT_NAMES:
        return OnnxQuant(word, "source" if word == "source" else "rows")
    raise UnsupportedError(f"unknown quantization {name!r} for ONNX; known: {', '.join(QUANT_NAMES)}")


def auto_names(listed: tuple[str, ...], *, quantized: bool) -> tuple[str, ...]:
    """What auto tries, best first: the grids that a quantized model came in, then what is nearest to a profile's GGUF quants by their bits.

    >>> auto_names(("Q8_0", "Q4_K_M", "Q2_K"), quantized=False)
    ('int8', 'int4')
    """
    near = {"F32": "fp32", "F16": "fp16", "BF16": "fp16", "Q8_0": "int8", "Q6_K": "int8"}
    return (*(("source",) if quantized else ()), *dict.fromkeys(near.get(name, "int4") for name in listed))


def is_quantized(model: Model) -> bool:
    """Whether most weights of the blocks came in quantized grids."""
    sizes = {True: 0, False: 0}
    for name, tensor in model.tensors.items():
        if name.startswith("layers.") and len(tensor.shape) == 2:
            sizes[tensor.grid.is_float] += tensor.n_rows * tensor.n_cols
    return sizes[False] > sizes[True]


def choose_grids(quant: OnnxQuant, model: Model, *, half: bool, ranges: Ranges | None = None) -> dict[str, Grid]:
    """Grid of every tensor by canonical name. half: in a float16 graph. ranges: of the inputs of linears, for w8a8-static; any will do
    for a plan. Raises UnsupportedError for "source" of a float model.
    """
    if quant.kind == "source" and not is_quantized(model):
        raise UnsupportedError(f"{model.name} is not quantized, so there are no codes to keep. Choose fp16, int8 or int4.")
    if quant.kind == "rows":
        return {name: _row_grid(quant, name, tensor, half, ranges or {}) for name, tensor in model.tensors.items()}
    return {name: _grid(quant, name, tensor, half) for name, tensor in model.tensors.items()}


def _row_grid(quant: OnnxQuant, name: str, tensor: LazyTensor, half: bool, ranges: Ranges) -> Grid:
    if len(tensor.shape) == 1:
        return F16 if half else F32
    form: Any = quant.name
    if quant.name != "w8a8-static":
        return int8_grid(form, tensor.n_cols)
    linear = "head" if name == EMBED else name.removesuffix(".weight")  # of an embedding only the codes are used, unless it is tied
    return int8_grid(form, tensor.n_cols, ranges.get(linear, (-1.0, 1.0)))


def _grid(quant: OnnxQuant, name: str, tensor: LazyTensor, half: bool) -> Grid:
    if len(tensor.shape) == 1 or quant.kind == "float":
        return F16 if half else F32
    eight = nbits_grid(8, _KEPT_BLOCK, symmetric=True, n_cols=tensor.n_cols)
    if quant.kind == "source":
        return tensor.grid if _takes(tensor, name) else eight
    wanted = eight if name in (EMBED, HEAD) and not quant.full else quant.grid(tensor.n_cols)
    return tensor.grid if _keeps(tensor, name, wanted, half) else wanted


def _takes(tensor: LazyTensor, name: str) -> bool:
    """Whether a kernel takes the codes of a quantized matrix."""
    form = None if tensor.grid.is_float else answer_for(tensor.grid, tensor.n_cols).form
    return form is not None and not (isinstance(form, Bnb4) and name == EMBED)


def _keeps(tensor: LazyTensor, name: str, wanted: Grid, half: bool) -> bool:
    if not _takes(tensor, name):
        return False
    form, other = (answer_for(grid, tensor.n_cols).form for grid in (tensor.grid, wanted))
    assert form is not None and other is not None
    return stored_bits(tensor.grid, form, half=half) <= stored_bits(wanted, other, half=half) + MARGIN_BITS


def fallback_notes(quant: OnnxQuant, model: Model, grids: Mapping[str, Grid]) -> tuple[str, ...]:
    """One sentence per grid that a matrix came in and that no kernel takes."""
    notes: dict[Grid, str] = {}
    for name, tensor in model.tensors.items():
        if len(tensor.shape) == 2 and not tensor.grid.is_float and quant.kind in ("blocks", "source") and not _takes(tensor, name):
            reason = answer_for(tensor.grid, tensor.n_cols).reason or f"ONNX Runtime has no embeddings in {tensor.grid.name}"
            notes.setdefault(
                tensor.grid, f"{name}: {reason}; it and others like it are rounded from {tensor.grid.name} to {grids[name].name}."
            )
    return tuple(notes.values())
