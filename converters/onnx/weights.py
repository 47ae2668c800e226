"""Matrices of a model in a graph: each linear layer, embedding and head is one call that makes its nodes and its initializers.

`grid` says in what a weight is stored: the grid it has, whose codes are then kept, or another, in which it is encoded. Float grids all
become the graph's own float type. Initializers are streamed: nothing is read before the file is written, and then some rows at a time.

    grid                   linear, head                           embedding               initializers
    floats                 MatMul                                 Gather                  weight (n_in, n_out), or as it is for Gather
    blocks (edgeq.nbits)   MatMulNBits                            GatherBlockQuantized    qweight, scales, qzeros
    .. with minima         and MatMul of sums over blocks, Add    and Gather, Add         and minima
    NF4, FP4               MatMulBnb4                             refused                 qweight, absmax
    int8 (int8.py)         MatMul or MatMulInteger                Gather, Mul             weight_quantized, .._scale, .._zero_point

Scales that are float16 numbers are stored as such and cast: ONNX Runtime does so when it loads the graph, and the file is a tenth smaller.
MatMulNBits has accuracy_level 4: activations are rounded to 8 bits in blocks, for which its fast kernels are made.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from edgeq.converters.gguf.encode import RegridError
from edgeq.converters.onnx import int8
from edgeq.converters.onnx.builder import MS, Builder, Dim, shape_of
from edgeq.converters.onnx.int8 import Int8Grid
from edgeq.converters.onnx.packed import Packed, as_float_type, bnb4_pieces, float_columns, float_rows, nbits_pieces
from edgeq.errors import PlanError
from edgeq.grids import Grid
from edgeq.nbits import Bnb4, NBits, half_minima, half_scales
from edgeq.tensors import Floats, LazyTensor

ACCURACY_LEVEL = 4
_BNB4_TYPES = {"fp4": 0, "nf4": 1}
_UINT8, _FLOAT, _HALF = ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.FLOAT16


def linear(
    g: Builder,
    x: ir.Value,
    weight: LazyTensor,
    bias: LazyTensor | None,
    *,
    path: str,
    name: str,
    grid: Grid,
    importance: Floats | None = None,
    errors: MutableMapping[str, RegridError] | None = None,
) -> ir.Value:
    """x (.., n_in) times the transpose of `weight` (n_out, n_in), plus bias (n_out,): (.., n_out) in the graph's float type.

    path: of the nodes ("/model/layers.0/attn/q_proj"). name: of the initializers ("model.layers.0.attn.q_proj"). importance: of the
    columns, (n_in,), for encoding. errors: where what encoding loses is noted when the file is written, under `name`. Raises PlanError with
    the reason when no kernel takes the grid.
    """
    packed = Packed(weight=weight, grid=grid, name=name, importance=importance, errors=errors)
    y = _multiply(g, x, packed, path)
    if bias is None:
        return y
    b = g.stream(f"{name}.Add.bias", g.float_type, bias.shape, lambda: [as_float_type(bias.decode(), g.float_type, bias.origin)])
    return g.node("Add", [y, b], path=f"{path}/Add", shape=shape_of(y))


def embedding(
    g: Builder,
    ids: ir.Value,
    weight: LazyTensor,
    *,
    path: str,
    name: str,
    grid: Grid,
    importance: Floats | None = None,
    errors: MutableMapping[str, RegridError] | None = None,
) -> ir.Value:
    """Rows `ids` (batch_size, sequence_length) of `weight` (n_vocab, n_embd): (batch_size, sequence_length, n_embd). As `linear`."""
    if grid.is_float:
        table = g.stream(f"{name}.weight", g.float_type, weight.shape, partial(float_rows, weight, g.float_type))
        return g.node("Gather", [table, ids], path=f"{path}/Gather", shape=[*shape_of(ids), weight.n_cols], attributes={"axis": 0})
    packed = Packed(weight=weight, grid=grid, name=name, importance=importance, errors=errors)
    if isinstance(grid, Int8Grid):
        return int8.gather(g, ids, packed, path)
    form = packed.form(g.float_type)
    if isinstance(form, Bnb4):
        raise PlanError(f"{name}: ONNX Runtime has no embeddings in {grid.name}. Choose Q8_0, Q4_0 or F16 for this tensor.")
    return _gather_nbits(g, ids, packed, form, path)


def head(
    g: Builder,
    x: ir.Value,
    weight: LazyTensor,
    *,
    path: str,
    name: str,
    grid: Grid,
    tied_to: str | None = None,
    importance: Floats | None = None,
    errors: MutableMapping[str, RegridError] | None = None,
) -> ir.Value:
    """As `linear`, for the output layer. tied_to: `name` of the embedding with the same weight and grid, made before, whose initializers
    are used; None: the head has its own."""
    if tied_to is None:
        return linear(g, x, weight, None, path=path, name=name, grid=grid, importance=importance, errors=errors)
    if grid.is_float:
        w = _transposed(g, g.initializer(f"{tied_to}.weight"), path=f"{path}/Transpose")
        return g.node("MatMul", [x, w], path=f"{path}/MatMul", shape=[*shape_of(x)[:-1], weight.n_rows])
    packed = Packed(weight=weight, grid=grid, name=tied_to, importance=importance, errors=errors)
    if isinstance(grid, Int8Grid):
        codes = int8.table(g, packed)[0]
        return int8.multiply(g, x, packed, path, _transposed(g, codes, path=f"{path}/Transpose"))
    return _multiply(g, x, packed, path)


def _multiply(g: Builder, x: ir.Value, packed: Packed, path: str) -> ir.Value:
    weight, name = packed.weight, packed.name
    shape: list[Dim] = [*shape_of(x)[:-1], weight.n_rows]
    if packed.grid.is_float:
        w = g.stream(f"{name}.MatMul.weight", g.float_type, weight.shape[::-1], partial(float_columns, weight, g.float_type))
        return g.node("MatMul", [x, w], path=f"{path}/MatMul", shape=shape)
    if isinstance(packed.grid, Int8Grid):
        return int8.multiply(g, x, packed, path)
    form = packed.form(g.float_type)
    if isinstance(form, Bnb4):
        return _matmul_bnb4(g, x, packed, form, path, shape)
    parts = _nbits(g, packed, form, path)
    y = g.node(
        "MatMulNBits",
        [x, parts.codes, parts.scales, *([parts.zeros] if parts.zeros else [])],
        path=f"{path}/MatMulNBits",
        shape=shape,
        domain=MS,
        attributes={
            "K": weight.n_cols,
            "N": weight.n_rows,
            "bits": form.bits,
            "block_size": form.block_size,
            "accuracy_level": ACCURACY_LEVEL,
        },
    )
    if parts.offsets is None:
        return y
    offsets = _transposed(g, parts.offsets, path=f"{path}/Offsets/Transpose")
    added = g.node("MatMul", [_block_sums(g, x, form), offsets], path=f"{path}/Offsets/MatMul", shape=shape)
    return g.node("Add", [y, added], path=f"{path}/Offsets/Add", shape=shape)


@dataclass(frozen=True)
class _NBits:
    """What nodes read of a matrix in blocks. offsets: (n_out, n_blocks) to add, for forms with minima (`edgeq.nbits`)."""

    codes: ir.Value
    scales: ir.Value
    zeros: ir.Value | None
    offsets: ir.Value | None


def _nbits(g: Builder, packed: Packed, form: NBits, path: str) -> _NBits:
    """Initializers of a matrix in blocks, and scales and offsets as nodes read them; asked for again by one name, the same ones."""
    name = f"{packed.name}.MatMulNBits"
    n_rows, n_cols = packed.weight.shape
    shape = (n_rows, form.n_blocks(n_cols))
    dtypes = {
        "scales": _HALF if half_scales(packed.grid) else g.float_type,
        "minima": _HALF if half_minima(packed.grid) else _FLOAT,
    }
    pieces = nbits_pieces(packed, form, dtypes)
    codes = g.stream(f"{name}.qweight", _UINT8, (*shape, form.block_bytes), pieces.codes)
    stored = g.stream(f"{name}.scales", dtypes["scales"], shape, partial(pieces.rest, "scales"))
    scales = _cast(g, stored, g.float_type, path=f"{path}/Scales/Cast")
    zeros = offsets = None
    if form.zeros:
        zeros = g.stream(f"{name}.qzeros", _UINT8, (n_rows, form.zero_bytes(n_cols)), partial(pieces.rest, "zeros"))
    if form.minima:
        minima = g.stream(f"{name}.minima", dtypes["minima"], shape, partial(pieces.rest, "minima"))

        def make() -> ir.Value:
            single = [_cast(g, value, _FLOAT, path=f"{path}/Offsets/{key}/Cast") for key, value in (("Minima", minima), ("Scales", stored))]
            center = g.constant(f"/model/constants/center{form.bits}", np.array(form.center, dtype=np.float32))
            up = g.node("Mul", [single[1], center], path=f"{path}/Offsets/Center", dtype=_FLOAT, shape=shape)
            sums = g.node("Add", [single[0], up], path=f"{path}/Offsets", dtype=_FLOAT, shape=shape)
            return _cast(g, sums, g.float_type, path=f"{path}/Offsets/Cast")

        offsets = g.once(("offsets", name), make)
    return _NBits(codes, scales, zeros, offsets)


def _block_sums(g: Builder, x: ir.Value, form: NBits) -> ir.Value:
    """Sums of x (.., n_in) over blocks of columns, (.., n_blocks); made once for all that read this x."""
    *outer, n_cols = shape_of(x)
    size, n_blocks = form.block_size, form.n_blocks(int(n_cols))
    fill = n_blocks * size - int(n_cols)
    path = f"{x.name}/BlockSums{size}"

    def make() -> ir.Value:
        full = x
        if fill:
            pads = np.zeros(2 * len(outer) + 2, dtype=np.int64)
            pads[-1] = fill
            full = g.node("Pad", [x, g.constant(f"{path}/pads", pads)], path=f"{path}/Pad", shape=[*outer, n_blocks * size])
        shape = g.constant(f"{path}/shape", np.array([0] * len(outer) + [n_blocks, size], dtype=np.int64))
        blocks = g.node("Reshape", [full, shape], path=f"{path}/Reshape", shape=[*outer, n_blocks, size])
        axes = g.constant("/model/constants/last_axis", np.array([-1], dtype=np.int64))
        return g.node("ReduceSum", [blocks, axes], path=f"{path}/ReduceSum", shape=[*outer, n_blocks], attributes={"keepdims": 0})

    return g.once(("block sums", x.name, size), make)


def _gather_nbits(g: Builder, ids: ir.Value, packed: Packed, form: NBits, path: str) -> ir.Value:
    parts = _nbits(g, packed, form, path)
    n_rows, n_cols = packed.weight.shape
    n_blocks = form.n_blocks(n_cols)
    outer = shape_of(ids)
    flat = [n_rows, n_blocks * form.block_bytes]
    shape = g.constant(f"{path}/Reshape/shape", np.array(flat, dtype=np.int64))
    table = g.node("Reshape", [parts.codes, shape], path=f"{path}/Reshape", dtype=_UINT8, shape=flat)
    y = g.node(
        "GatherBlockQuantized",
        [table, ids, parts.scales, *([parts.zeros] if parts.zeros else [])],
        path=f"{path}/GatherBlockQuantized",
        shape=[*outer, n_blocks * form.block_size],
        domain=MS,
        attributes={"bits": form.bits, "block_size": form.block_size, "gather_axis": 0, "quantize_axis": 1},
    )
    if parts.offsets is not None:
        y = _add_offsets(g, y, ids, parts.offsets, form, f"{path}/Offsets")
    if n_cols % form.block_size == 0:
        return y
    # the last block is longer than the row
    bounds = [
        g.constant(f"{path}/Slice/{key}", np.array([at], dtype=np.int64)) for key, at in (("start", 0), ("end", n_cols), ("axis", -1))
    ]
    return g.node("Slice", [y, *bounds], path=f"{path}/Slice", shape=[*outer, n_cols])


def _add_offsets(g: Builder, y: ir.Value, ids: ir.Value, offsets: ir.Value, form: NBits, path: str) -> ir.Value:
    """Rows of an embedding (.., n_blocks * block_size) with the offsets of their blocks added."""
    outer, width = shape_of(ids), int(shape_of(y)[-1])
    n_blocks = width // form.block_size
    split = g.constant(f"{path}/blocks", np.array([0] * len(outer) + [n_blocks, form.block_size], dtype=np.int64))
    joined = g.constant(f"{path}/row", np.array([0] * len(outer) + [width], dtype=np.int64))
    single = g.constant(f"{path}/single", np.array([0] * len(outer) + [n_blocks, 1], dtype=np.int64))
    low = g.node("Gather", [offsets, ids], path=f"{path}/Gather", shape=[*outer, n_blocks], attributes={"axis": 0})
    low = g.node("Reshape", [low, single], path=f"{path}/Gather/Reshape", shape=[*outer, n_blocks, 1])
    blocks = g.node("Reshape", [y, split], path=f"{path}/Split", shape=[*outer, n_blocks, form.block_size])
    blocks = g.node("Add", [blocks, low], path=f"{path}/Gather/Add", shape=[*outer, n_blocks, form.block_size])
    return g.node("Reshape", [blocks, joined], path=f"{path}/Join", shape=[*outer, width])


def _matmul_bnb4(g: Builder, x: ir.Value, packed: Packed, form: Bnb4, path: str, shape: list[Dim]) -> ir.Value:
    pieces = bnb4_pieces(packed, form, g.float_type)
    n_out, n_in = packed.weight.shape
    codes = g.stream(f"{packed.name}.MatMulBnb4.qweight", _UINT8, (-(-n_out * n_in // 2),), pieces.codes)
    n_blocks = -(-n_out * n_in // form.block_size)
    absmax = g.stream(f"{packed.name}.MatMulBnb4.absmax", g.float_type, (n_blocks,), partial(pieces.rest, "absmax"))
    return g.node(
        "MatMulBnb4",
        [x, codes, absmax],
        path=f"{path}/MatMulBnb4",
        shape=shape,
        domain=MS,
        attributes={"K": n_in, "N": n_out, "block_size": form.block_size, "quant_type": _BNB4_TYPES[form.table], "training_mode": 0},
    )


def _cast(g: Builder, value: ir.Value, dtype: ir.DataType, *, path: str) -> ir.Value:
    """The value in that type; made once for all that ask."""
    if value.dtype == dtype:
        return value
    return g.once(
        ("cast", value.name, dtype),
        lambda: g.node("Cast", [value], path=path, dtype=dtype, shape=shape_of(value), attributes={"to": dtype}),
    )


def _transposed(g: Builder, weight: ir.Value, *, path: str) -> ir.Value:
    """A matrix for MatMul. ONNX Runtime fuses the two, without a transposed copy, where it computes in float32."""
    return g.node("Transpose", [weight], path=path, dtype=weight.dtype, shape=shape_of(weight)[::-1], attributes={"perm": [1, 0]})
