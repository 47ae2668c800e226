"""What a cut of an elastic ONNX folder consists of, worked out from model.onnx alone: every initializer's new shape, and a graph that fits.

An elastic graph stores MLP channels and KV groups of a layer in order of importance, so that what a cut keeps is always a prefix:

    q_proj k_proj v_proj, gate_proj up_proj   the first outputs (and the first values of their biases)
    o_proj, down_proj                         the first inputs, in whole blocks
    norms, biases of o_proj and down_proj     whole

Places for adapters (`edgeq.onnx_adapter_file`) shrink with the matrix that they stand beside, and the graph says which plan its adapters
must have been laid out for then.

Float matrices are stored as (inputs, outputs), blocks of MatMulNBits as (outputs, blocks, bytes): prefixes of rows, and of each row the
first bytes. A KV group is one KV head with the query heads that read it. Every layer has sizes of its own, in any family.

Sizes are read by `edgeq.runtime.onnx_sizes`, and the graph follows in `edgeq.runtime.onnx_cut_graph`. Offsets into the data file follow
from shapes, as in the exporter: `edgeq.converters.onnx.carrier`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.elastic import Kept
from edgeq.errors import PlanError, UnsupportedError
from edgeq.onnx_adapter_file import PLAN_KEY, cut_plan
from edgeq.runtime.onnx_cut_graph import LORA, GraphCut, lora_dims
from edgeq.runtime.onnx_file import OnnxFile, tensor_bytes
from edgeq.runtime.onnx_sizes import (
    MODULE_PART,
    PROJECTIONS,
    OnnxSizes,
    Projection,
    check_kept,
    projections,
    read_sizes,
    resized_projection,
)

ALIGNMENT = 64  # of weights in the data file
_EXTERNAL = 1  # TensorProto.DataLocation
_PAIRS = re.compile(r"/model/layers\.(\d+)/attn/[qk]_rotary/pairs")  # pairs of every head, heads one after another

# Which axis is outputs and which is inputs, by what follows the module in an initializer's name. Inputs are counted in blocks, or for zero
# points in bytes, where codes lie in blocks: see `_rows`.
_AXES: Mapping[str, tuple[int | None, int | None]] = {
    "MatMul.weight": (1, 0),
    "MatMul.weight_quantized": (1, 0),
    "MatMul.weight_scale": (0, None),
    "MatMul.weight_zero_point": (0, None),
    "Add.bias": (0, None),
    "MatMulNBits.qweight": (0, 1),
    "MatMulNBits.scales": (0, 1),
    "MatMulNBits.minima": (0, 1),
    "MatMulNBits.qzeros": (0, 1),
    "MatMulBnb4.qweight": (0, 0),
    "MatMulBnb4.absmax": (0, 0),
}


Span = tuple[int, int]  # from, and up to


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """What stays of an initializer: some of its rows, in order, and of each row some bytes.

    dims: in the result. row_bytes: in the source. last_mask: what stays of a row's last byte, where that is codes of several blocks.
    """

    dims: tuple[int, ...]
    row_bytes: int
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    last_mask: int = 0xFF

    @property
    def kept_bytes(self) -> int:
        return sum(stop - start for start, stop in self.columns)

    @property
    def nbytes(self) -> int:
        return sum(stop - start for start, stop in self.rows) * self.kept_bytes


@dataclass(frozen=True, kw_only=True)
class CutTensor:
    """An external initializer of the result. offset: in the source's data file. start: in the result's."""

    name: str
    offset: int
    start: int
    left: Prefix

    @property
    def nbytes(self) -> int:
        return self.left.nbytes


@dataclass(frozen=True, kw_only=True)
class OnnxCutPlan:
    """graph: the new model.onnx. data: the file that weights are copied from, None where all are inline; location: its name.

    removed_fraction: of the weights of linear layers in blocks.
    """

    source: OnnxFile
    graph: bytes
    data: Path | None
    location: str
    tensors: tuple[CutTensor, ...]
    kept: Kept
    sizes: OnnxSizes
    removed_fraction: float

    @property
    def data_bytes(self) -> int:
        return self.tensors[-1].start + self.tensors[-1].nbytes if self.tensors else 0

    @property
    def nbytes(self) -> int:
        """Exact size of graph and weights of the result."""
        return len(self.graph) + self.data_bytes


def plan_onnx_cut(file: OnnxFile, kept: Kept) -> OnnxCutPlan:
    """Work out the cut; no weight is read.

    Raises PlanError when what is to be kept does not fit the graph or its blocks; UnsupportedError and SourceError as `read_sizes`, and
    UnsupportedError for an operator that cannot be cut.
    """
    sizes = read_sizes(file)
    check_kept(file.path, sizes, kept)
    if len(file.data) > 1:
        raise UnsupportedError(f"{file.path}: its weights lie in {len(file.data)} files; one is cut. Export the model again.")
    proto = type(file.proto)()
    proto.CopyFrom(file.proto)
    found = projections(file)
    resized = {p.name: resized_projection(p, sizes, kept) for p in found.values()}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    for entry in proto.metadata_props:
        if entry.key == PLAN_KEY:
            entry.value = plan_after(entry.value, sizes, kept)
    tensors = tuple(_initializers(proto, found, resized, sizes, kept))
    GraphCut(file.path, proto.graph, shapes, resized, sizes, kept).run()
    location, data = next(iter(file.data.items()), ("", None))
    graph = bytes(proto.SerializeToString(deterministic=True))
    before_cut, left = (sum(p.n_out * p.n_in for p in some.values()) for some in (found, resized))
    return OnnxCutPlan(
        source=file,
        graph=graph,
        data=data,
        location=location,
        tensors=tensors,
        kept=kept,
        sizes=sizes,
        removed_fraction=1 - left / before_cut,
    )


def plan_after(plan: str, sizes: OnnxSizes, kept: Kept) -> str:
    """The plan of adapters of a cut, by that of the whole graph."""
    return plan if (kept.n_ff, kept.n_kv) == (sizes.n_ff, sizes.n_kv) else cut_plan(plan, kept.n_ff, kept.n_kv)


def _initializers(
    proto: Any, found: Mapping[str, Projection], resized: Mapping[str, Projection], sizes: OnnxSizes, kept: Kept
) -> Iterator[CutTensor]:
    """Give every initializer its new shape and place; yields the external ones, in order of the source's data."""
    external = []
    for tensor in proto.graph.initializer:
        left = _left(tensor, found, resized, sizes, kept)
        if tensor.data_location == _EXTERNAL:
            external.append((int(_entries(tensor).get("offset", 0)), tensor, left or _all_of(tensor)))
        elif left is not None:
            data = np.frombuffer(tensor.raw_data, dtype=np.uint8).reshape(-1, left.row_bytes)
            tensor.raw_data = b"".join(data[slice(*rows), slice(*columns)].tobytes() for rows in left.rows for columns in left.columns)
        if left is not None:
            tensor.dims[:] = left.dims
    end = 0
    for offset, tensor, left in sorted(external, key=lambda entry: entry[0]):
        cut = CutTensor(name=tensor.name, offset=offset, start=-(-end // ALIGNMENT) * ALIGNMENT, left=left)
        end = cut.start + cut.nbytes
        for entry in tensor.external_data:
            if entry.key in ("offset", "length"):
                entry.value = str(cut.start if entry.key == "offset" else cut.nbytes)
        yield cut


def _all_of(tensor: Any) -> Prefix:
    nbytes = tensor_bytes(tensor)
    return Prefix(dims=tuple(tensor.dims), row_bytes=nbytes, rows=((0, 1),), columns=((0, nbytes),))


def _left(tensor: Any, found: Mapping[str, Projection], resized: Mapping[str, Projection], sizes: OnnxSizes, kept: Kept) -> Prefix | None:
    """None for an initializer that stays as it is."""
    dims = tuple(tensor.dims)
    if (pairs := _PAIRS.fullmatch(tensor.name)) is not None:
        layer = int(pairs[1])
        n_kept = dims[0] // sizes.n_kv[layer] * kept.n_kv[layer]
        return _prefix(tensor, (n_kept,), ((0, 1),), ((0, n_kept),))
    if (lora := LORA.fullmatch(tensor.name)) is not None:
        place = lora_dims(lora, dims, sizes, kept)
        return None if place == dims else Prefix(dims=place, row_bytes=1, rows=(), columns=())
    match = MODULE_PART.fullmatch(tensor.name)
    if match is None or match[1] not in found or found[match[1]] == resized[match[1]]:
        return None
    if match[4] not in _AXES:
        raise UnsupportedError(f"{tensor.name}: edgeq does not know how to cut it. Export the model again with the edgeq that cuts it.")
    before, after = found[match[1]], resized[match[1]]
    outs = tuple(_outputs(before, sizes, kept)) if before.n_out != after.n_out else ((0, before.n_out),)
    n_in = _count(match[4], after)
    if _AXES[match[4]] == (1, 0):
        return _prefix(tensor, (after.n_in, after.n_out), ((0, after.n_in),), outs)
    if _AXES[match[4]] == (0, None):
        return _prefix(tensor, (after.n_out,), ((0, 1),), outs)
    if match[4].startswith("MatMulBnb4."):
        if before.n_in % before.block_size:
            raise PlanError(
                f"{before.name}: rows of {before.n_in} columns are no whole blocks of {before.block_size}, so it cannot be cut. "
                "Export this model in other blocks."
            )
        return _prefix(tensor, (after.n_out * n_in,), outs, ((0, n_in),), n_rows=before.n_out)
    left = _prefix(tensor, (after.n_out, n_in, *dims[2:]), outs, ((0, n_in),))
    used = after.bits * -(-after.n_in // after.block_size) % 8
    if match[4] == "MatMulNBits.qzeros" and used and before.n_in != after.n_in:
        return replace(left, last_mask=(1 << used) - 1)
    return left


def _count(part: str, p: Projection) -> int:
    """How many entries of an initializer go with the inputs of one output."""
    n_blocks = -(-p.n_in // (p.block_size or 1))
    if part == "MatMulNBits.qzeros":
        return -(-n_blocks * p.bits // 8)
    return p.n_in // 2 if part == "MatMulBnb4.qweight" else n_blocks


def _outputs(p: Projection, sizes: OnnxSizes, kept: Kept) -> Iterator[Span]:
    """Outputs that stay: of each part of a linear layer the first ones."""
    at = 0
    for width in PROJECTIONS[p.kind][0]:
        yield at, at + sizes.width(p.layer, kept, width)
        at += sizes.width(p.layer, sizes.whole, width)


def _prefix(tensor: Any, dims: tuple[int, ...], rows: tuple[Span, ...], columns: tuple[Span, ...], *, n_rows: int | None = None) -> Prefix:
    """columns: counted in entries of a row, whose number goes up evenly with its bytes. n_rows: in the source."""
    nbytes, shape = tensor_bytes(tensor), tuple(tensor.dims)
    if n_rows is None:
        n_rows = shape[0] if len(shape) > 1 else 1
    row_bytes = nbytes // n_rows
    entry = row_bytes // (prod(shape) // n_rows if len(shape) < 3 else shape[1])
    return Prefix(dims=dims, row_bytes=row_bytes, rows=rows, columns=tuple((entry * start, entry * stop) for start, stop in columns))


def _entries(tensor: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}
