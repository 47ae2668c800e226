"""What a cut of an elastic ONNX folder consists of, worked out from model.onnx alone: every initializer's new shape, and a graph that fits.

An elastic graph stores MLP channels and KV groups of a layer in order of importance, so that what a cut keeps is always a prefix:

    q_proj k_proj v_proj, gate_proj up_proj   the first outputs (and the first values of their biases)
    o_proj, down_proj                         the first inputs, in whole blocks
    norms, biases of o_proj and down_proj     whole

Places for adapters (`edgeq.onnx_adapter_file`) shrink with the matrix that they stand beside, and the graph says which plan its adapters
must have been laid out for then.

Float matrices are stored as (inputs, outputs), blocks of MatMulNBits as (outputs, blocks, bytes): prefixes of rows, and of each row the
first bytes. A KV group is one KV head with the query heads that read it. Every layer has sizes of its own, in any family.

The graph is walked once in its own order. Where an input of a node has become smaller, so does what it computes: its attributes (K and N,
numbers of heads), the shapes that are stated of its outputs, and a shape that a Reshape is given. An operator that is not known here is
refused rather than left as it was. Offsets into the data file follow from shapes, as in the exporter: `edgeq.converters.onnx.carrier`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgeq.elastic import Kept
from edgeq.errors import PlanError, SourceError, UnsupportedError
from edgeq.onnx_adapter_file import PLAN_KEY, cut_plan
from edgeq.runtime.onnx_file import OnnxFile, tensor_bytes

ALIGNMENT = 64  # of weights in the data file
_EXTERNAL, _INT64 = 1, 7  # TensorProto.DataLocation, TensorProto.DataType

Dim = int | str
Shape = tuple[Dim, ...]
Width = Literal["q", "kv", "ff"]  # n_heads * head_dim, n_kv_heads * head_dim, n_ff

# Linear layers of a block: outputs, of several side by side, and inputs, where a cut shortens them.
_PROJECTIONS: Mapping[str, tuple[tuple[Width, ...], Width | None]] = {
    "q_proj": (("q",), None),
    "k_proj": (("kv",), None),
    "v_proj": (("kv",), None),
    "qkv_proj": (("q", "kv", "kv"), None),
    "o_proj": ((), "q"),
    "gate_proj": (("ff",), None),
    "up_proj": (("ff",), None),
    "gate_up_proj": (("ff", "ff"), None),
    "down_proj": ((), "ff"),
}
_NAME = re.compile(r"(model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+_proj))\.(.+)")
_MODULE = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+_proj)")
_LORA = re.compile(r"(.+)\.lora_([AB])\.weight")
_LAYER = re.compile(r"/model/layers\.(\d+)/")
_PAST = re.compile(r"past_key_values\.(\d+)\.(?:key|value)")
_SPLIT = re.compile(r"/model/layers\.(\d+)/(?:attn|mlp)/(\w+_proj)/Split")
_SPLIT_SIZES = "/model/constants/split/"
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
# Operators by what the shapes of their outputs follow from: all inputs, or the first one.
_BROADCAST = ("Add", "Sub", "Mul", "Div", "Cast", "Sigmoid", "FastGelu")
_LIKE_FIRST = ("SimplifiedLayerNormalization", "QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True, kw_only=True)
class OnnxSizes:
    """Sizes by layer that a graph has. gqa: query heads per KV head. whole: what a cut that takes nothing keeps."""

    n_ff: tuple[int, ...]
    n_kv: tuple[int, ...]
    gqa: tuple[int, ...]
    head_dim: tuple[int, ...]

    @property
    def whole(self) -> Kept:
        return Kept(n_ff=self.n_ff, n_kv=self.n_kv)

    def width(self, layer: int, kept: Kept, kind: Width) -> int:
        if kind == "ff":
            return kept.n_ff[layer]
        return kept.n_kv[layer] * self.head_dim[layer] * (self.gqa[layer] if kind == "q" else 1)


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A linear layer of a block. n_out, n_in: its sizes. bits, block_size: of MatMulNBits and MatMulBnb4, else 0."""

    name: str
    layer: int
    kind: str
    n_out: int
    n_in: int
    bits: int = 0
    block_size: int = 0


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


def read_sizes(file: OnnxFile) -> OnnxSizes:
    """Raises UnsupportedError for a graph that is not one of edgeq's elastic ones, SourceError for sizes that contradict each other."""
    found = {(p.layer, p.kind): p for p in projections(file).values()}
    n_layers = 1 + max((layer for layer, _ in found), default=-1)
    shapes = {value.name: _shape_of(value) for value in file.proto.graph.input}
    n_ff, n_kv, gqa, head_dim = [], [], [], []
    for layer in range(n_layers):
        missing = [kind for kind in ("o_proj", "down_proj") if (layer, kind) not in found]
        caches = [shapes.get(f"past_key_values.{layer}.{kind}", ()) for kind in ("key", "value")]
        if missing or any(len(cache) != 4 for cache in caches):
            raise _foreign(file.path, f"layer {layer} has no {missing[0] if missing else 'past keys and values'}")
        (groups, dim), (other, value_dim) = ((cache[1], cache[3]) for cache in caches)
        if not isinstance(groups, int) or not isinstance(dim, int) or (other, value_dim) != (groups, dim):
            raise UnsupportedError(
                f"{file.path}: layer {layer} has keys of {caches[0]} and values of {caches[1]}, which edgeq does not cut."
            )
        n_ff.append(found[layer, "down_proj"].n_in)
        n_kv.append(groups)
        gqa.append(found[layer, "o_proj"].n_in // (groups * dim))
        head_dim.append(dim)
    if not n_layers:
        raise _foreign(file.path, "it has no layers")
    sizes = OnnxSizes(n_ff=tuple(n_ff), n_kv=tuple(n_kv), gqa=tuple(gqa), head_dim=tuple(head_dim))
    for p in found.values():
        outs, ins = _PROJECTIONS[p.kind]
        expected = (
            sum(sizes.width(p.layer, sizes.whole, w) for w in outs) or p.n_out,
            p.n_in if ins is None else sizes.width(p.layer, sizes.whole, ins),
        )
        if (p.n_out, p.n_in) != expected:
            raise SourceError(
                f"{file.path}: {p.name} has {p.n_out} outputs and {p.n_in} inputs, where {expected[0]} and {expected[1]} go with the rest "
                "of its layer. The file contradicts itself; export the model again."
            )
    return sizes


def projections(file: OnnxFile) -> dict[str, Projection]:
    """Linear layers of all blocks by name ("model.layers.3.mlp.down_proj")."""
    held = {tensor.name: tuple(tensor.dims) for tensor in file.proto.graph.initializer}
    found: dict[str, Projection] = {}
    for node in file.proto.graph.node:
        for name in node.input:
            match = _NAME.fullmatch(name)
            if match is None or match[1] in found or name not in held or match[3] not in _PROJECTIONS:
                continue
            given: dict[str, Any] = {"name": match[1], "layer": int(match[2]), "kind": match[3]}
            if match[4] in ("MatMul.weight", "MatMul.weight_quantized"):
                n_in, n_out = held[name]
                found[match[1]] = Projection(**given, n_out=n_out, n_in=n_in)
            elif match[4] in ("MatMulNBits.qweight", "MatMulBnb4.qweight"):
                says = {a.name: a.i for a in node.attribute}
                blocks: dict[str, Any] = {"bits": says.get("bits", 4), "block_size": says["block_size"]}
                found[match[1]] = Projection(**given, n_out=says["N"], n_in=says["K"], **blocks)
    return found


def plan_onnx_cut(file: OnnxFile, kept: Kept) -> OnnxCutPlan:
    """Work out the cut; no weight is read.

    Raises PlanError when what is to be kept does not fit the graph or its blocks; UnsupportedError and SourceError as `read_sizes`, and
    UnsupportedError for an operator that cannot be cut.
    """
    sizes = read_sizes(file)
    _check_kept(file.path, sizes, kept)
    if len(file.data) > 1:
        raise UnsupportedError(f"{file.path}: its weights lie in {len(file.data)} files; one is cut. Export the model again.")
    proto = type(file.proto)()
    proto.CopyFrom(file.proto)
    found = projections(file)
    resized = {p.name: _resized(p, sizes, kept) for p in found.values()}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    for entry in proto.metadata_props:
        if entry.key == PLAN_KEY:
            entry.value = plan_after(entry.value, sizes, kept)
    tensors = tuple(_initializers(proto, found, resized, sizes, kept))
    _Walk(file.path, proto.graph, shapes, resized, sizes, kept).run()
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


def sizes_after(module: str, full: tuple[int, int], sizes: OnnxSizes, kept: Kept) -> tuple[int, int]:
    """(n_out, n_in) that a cut leaves of a module, which may be a part of a joined one, or outside of the blocks."""
    match = _MODULE.fullmatch(module)
    if match is None or match[2] not in _PROJECTIONS:
        return full
    outs, ins = _PROJECTIONS[match[2]]
    layer = int(match[1])
    n_out = sum(sizes.width(layer, kept, width) for width in outs) or full[0]
    return n_out, full[1] if ins is None else sizes.width(layer, kept, ins)


def _foreign(path: Path, why: str) -> UnsupportedError:
    return UnsupportedError(f"{path}: cannot be cut, because {why}. Export the model with --elastic and cut that.")


def _check_kept(path: Path, sizes: OnnxSizes, kept: Kept) -> None:
    n_layers = len(sizes.n_ff)
    for what, keep, full in (("neurons", kept.n_ff, sizes.n_ff), ("kv heads", kept.n_kv, sizes.n_kv)):
        if len(keep) != n_layers:
            raise PlanError(f"{what} to keep are given for {len(keep)} layers, but {path.name} has {n_layers}. Give one number per layer.")
        for layer, (n, has) in enumerate(zip(keep, full, strict=True)):
            if not 1 <= n <= has:
                raise PlanError(f"layer {layer}: {n} {what} cannot be kept of {has}. Keep 1 to {has}: a graph keeps every layer.")
    heads = kept.head_dims or (kept.head_dim or sizes.head_dim[0],) * n_layers
    if (kept.head_dim or kept.head_dims) and heads != sizes.head_dim:
        raise PlanError(f"heads cannot be cut to {min(heads)} dimensions in {path.name}. Keep all {max(sizes.head_dim)}.")


def _resized(p: Projection, sizes: OnnxSizes, kept: Kept) -> Projection:
    """What stays of a linear layer. Raises PlanError when inputs do not divide into blocks."""
    outs, ins = _PROJECTIONS[p.kind]
    n_out = sum(sizes.width(p.layer, kept, width) for width in outs) or p.n_out
    n_in = p.n_in if ins is None else sizes.width(p.layer, kept, ins)
    if p.block_size and n_in not in (p.n_in, n_in - n_in % p.block_size):
        below, above = n_in - n_in % p.block_size, n_in + -n_in % p.block_size
        near = " or ".join(str(m) for m in (below, above) if 0 < m <= p.n_in)
        group = sizes.gqa[p.layer] * sizes.head_dim[p.layer]
        hint = f"Keep {near}." if ins == "ff" else f"A kv head has {group} columns: keep another number of kv heads."
        raise PlanError(f"{p.name}: {n_in} of {p.n_in} columns do not divide into blocks of {p.block_size}. {hint}")
    return replace(p, n_out=n_out, n_in=n_in)


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
    if (lora := _LORA.fullmatch(tensor.name)) is not None:
        lora_dims = _lora_dims(lora, dims, sizes, kept)
        return None if lora_dims == dims else Prefix(dims=lora_dims, row_bytes=1, rows=(), columns=())
    match = _NAME.fullmatch(tensor.name)
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


def _lora_dims(match: re.Match[str], dims: Sequence[Any], sizes: OnnxSizes, kept: Kept) -> tuple[Any, Any]:
    """What is left of the dimensions of an adapter's place: (n_in, rank) of A, (rank, n_out) of B."""
    if match[2] == "A":
        return sizes_after(match[1], (0, dims[0]), sizes, kept)[1], dims[1]
    return dims[0], sizes_after(match[1], (dims[1], 0), sizes, kept)[0]


def _count(part: str, p: Projection) -> int:
    """How many entries of an initializer go with the inputs of one output."""
    n_blocks = -(-p.n_in // (p.block_size or 1))
    if part == "MatMulNBits.qzeros":
        return -(-n_blocks * p.bits // 8)
    return p.n_in // 2 if part == "MatMulBnb4.qweight" else n_blocks


def _outputs(p: Projection, sizes: OnnxSizes, kept: Kept) -> Iterator[Span]:
    """Outputs that stay: of each part of a linear layer the first ones."""
    at = 0
    for width in _PROJECTIONS[p.kind][0]:
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


class _Walk:
    """Shapes and attributes of a graph whose weights have become smaller."""

    def __init__(
        self,
        path: Path,
        graph: Any,
        before: Mapping[str, Shape],
        resized: Mapping[str, Projection],
        sizes: OnnxSizes,
        kept: Kept,
    ) -> None:
        self.path, self.graph, self.resized, self.sizes, self.kept = path, graph, resized, sizes, kept
        self.stated = {value.name: value for value in (*graph.input, *graph.output, *graph.value_info)}
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.old: dict[str, Shape] = {**before, **{name: _shape_of(value) for name, value in self.stated.items()}}
        self.new: dict[str, Shape] = {
            name: tuple(tensor.dims) for name, tensor in self.initializers.items() if tuple(tensor.dims) != before[name]
        }
        self.uses: dict[str, int] = {}
        for node in graph.node:
            for name in node.input:
                self.uses[name] = self.uses.get(name, 0) + 1
        self.rules: Mapping[str, Callable[[Any], list[Shape]]] = {
            **dict.fromkeys(_BROADCAST, self._broadcast),
            **dict.fromkeys(_LIKE_FIRST, self._like_first),
            "MatMul": self._matmul,
            "MatMulInteger": self._matmul,
            "MatMulNBits": self._packed_matmul,
            "MatMulBnb4": self._packed_matmul,
            "DynamicQuantizeLinear": lambda node: [self.shape(node.input[0]), (), ()],
            "Gather": self._gather,
            "Transpose": self._transpose,
            "Reshape": self._reshape,
            "Split": self._split,
            "Concat": self._concat,
            "ReduceSum": lambda node: [self.shape(node.input[0])[:-1]],
            "RotaryEmbedding": self._rotary,
            "GroupQueryAttention": self._attention,
            "Attention": self._attention,
        }

    def run(self) -> None:
        for value in self.graph.input:
            self._cut_cache(value)
            if (match := _LORA.fullmatch(value.name)) is not None:
                place = _lora_dims(match, self.old[value.name], self.sizes, self.kept)
                self.new.pop(value.name, None)
                if place != self.old[value.name]:
                    self.new[value.name] = place
        for node in self.graph.node:
            if not any(name in self.new for name in node.input):
                continue
            rule = self.rules.get(node.op_type)
            if rule is None:
                raise UnsupportedError(
                    f"{self.path}: edgeq does not know how to cut operator {node.op_type} ({node.name}). "
                    "Export the model again with the edgeq that cuts it."
                )
            for name, shape in zip(node.output, rule(node), strict=False):
                if name and self.old.get(name) != shape:
                    self.new[name] = shape
        for name, shape in self.new.items():
            if name in self.stated:
                _state(self.stated[name], shape)
        self._place_splits()

    def shape(self, name: str) -> Shape:
        found = self.new.get(name, self.old.get(name))
        if found is None:
            raise UnsupportedError(f"{self.path}: the graph does not state the shape of {name}. Export the model again.")
        return found

    def _cut_cache(self, value: Any) -> None:
        if (match := _PAST.fullmatch(value.name)) is not None:
            batch, _, tokens, dim = self.old[value.name]
            shape = (batch, self.kept.n_kv[int(match[1])], tokens, dim)
            if shape != self.old[value.name]:
                self.new[value.name] = shape

    def _broadcast(self, node: Any) -> list[Shape]:
        shapes = [self.shape(name) for name in node.input if name]
        rank = max(map(len, shapes))
        padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
        return [tuple(next((dim for dim in dims if dim != 1), 1) for dims in zip(*padded, strict=True))]

    def _like_first(self, node: Any) -> list[Shape]:
        return [self.shape(node.input[0])]

    def _matmul(self, node: Any) -> list[Shape]:
        x, w = (self.shape(name) for name in node.input[:2])
        return [(*x[:-1], w[-1])]

    def _packed_matmul(self, node: Any) -> list[Shape]:
        match = _NAME.fullmatch(node.input[1])
        if match is None or match[1] not in self.resized:
            raise UnsupportedError(f"{self.path}: {node.name} is no linear layer that edgeq cuts. Export the model again.")
        p = self.resized[match[1]]
        self._set(node, {"K": p.n_in, "N": p.n_out})
        return [(*self.shape(node.input[0])[:-1], p.n_out)]

    def _gather(self, node: Any) -> list[Shape]:
        data, index = (self.shape(name) for name in node.input[:2])
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0) % len(data)
        return [(*data[:axis], *index, *data[axis + 1 :])]

    def _transpose(self, node: Any) -> list[Shape]:
        shape = self.shape(node.input[0])
        order = next((a.ints for a in node.attribute if a.name == "perm"), range(len(shape) - 1, -1, -1))
        return [tuple(shape[i] for i in order)]

    def _rotary(self, node: Any) -> list[Shape]:
        """num_heads: 0 or 1 where the last axis is one head."""
        (name, *_), shape = node.input, self.shape(node.input[0])
        heads = next((a.i for a in node.attribute if a.name == "num_heads"), 0)
        if heads and len(shape) == 3 and shape[-1] != self.old[name][-1]:
            self._set(node, {"num_heads": heads * int(shape[-1]) // int(self.old[name][-1])})
        return [shape]

    def _attention(self, node: Any) -> list[Shape]:
        layer = self._layer_of(node)
        n_kv, gqa = self.kept.n_kv[layer], self.sizes.gqa[layer]
        query = "num_heads" if node.op_type == "GroupQueryAttention" else "q_num_heads"
        self._set(node, {query: n_kv * gqa, "kv_num_heads": n_kv})
        caches = [(*self.old[name][:1], n_kv, *self.old[name][2:]) for name in node.output[1:3]]
        return [(*self.shape(node.input[0])[:-1], n_kv * gqa * int(caches[1][3])), *caches]

    def _layer_of(self, node: Any) -> int:
        match = _LAYER.match(node.name)
        if match is None or int(match[1]) >= len(self.kept.n_kv):
            raise UnsupportedError(f"{self.path}: {node.name} is not named after a layer. Export the model again.")
        return int(match[1])

    def _reshape(self, node: Any) -> list[Shape]:
        """Dimensions that a Reshape copies or works out follow by themselves; where it names all, the first that can takes the change."""
        given, before = self.shape(node.input[0]), self.old[node.output[0]]
        wanted = self._ints(node.input[1])
        shape: list[Dim] = [given[i] if n == 0 else n for i, n in enumerate(wanted)]
        left = _Product.of(given)
        if -1 in wanted:
            at = wanted.index(-1)
            if not isinstance(before[at], str) or "*" in str(before[at]):
                shape[at] = (left / _Product.of([*shape[:at], *shape[at + 1 :]])).dim()
                return [tuple(shape)]
            shape[at] = before[at]  # a number of tokens, which no cut changes
        fits = _Product.of(shape)
        if fits == left:
            return [tuple(shape)]
        for at, (n, was) in enumerate(zip(wanted, before, strict=True)):
            changed = left.number * n
            if n > 0 and n == was and changed % fits.number == 0:
                shape[at] = changed // fits.number
                self._reshape_to(node, [n if i != at else int(shape[at]) for i, n in enumerate(wanted)])
                return [tuple(shape)]
        raise UnsupportedError(f"{self.path}: {node.name} cannot take what a cut leaves of {node.input[0]}. Export the model again.")

    def _split(self, node: Any) -> list[Shape]:
        match = _SPLIT.fullmatch(node.name)
        if match is None or match[2] not in _PROJECTIONS or len(node.output) != len(_PROJECTIONS[match[2]][0]):
            raise UnsupportedError(f"{self.path}: {node.name} is no split that edgeq cuts. Export the model again.")
        widths = [self.sizes.width(int(match[1]), self.kept, width) for width in _PROJECTIONS[match[2]][0]]
        node.input[1] = f"{_SPLIT_SIZES}{'_'.join(map(str, widths))}"
        return [(*self.shape(node.input[0])[:-1], width) for width in widths]

    def _place_splits(self) -> None:
        """The sizes that splits read, each behind the matrix before its first reader, as the exporter has them."""
        readers: dict[str, list[str]] = {}
        seen: set[str] = set()
        for node in self.graph.node:
            if (match := _SPLIT.fullmatch(node.name)) is not None and node.input[1] not in seen:
                seen.add(node.input[1])
                block = "self_attn" if match[2] == "qkv_proj" else "mlp"
                readers.setdefault(f"model.layers.{match[1]}.{block}.{match[2]}", []).append(node.input[1])
        if not readers:
            return
        last: dict[str, str] = {}  # initializer of a matrix
        for tensor in self.graph.initializer:
            if (found := _NAME.fullmatch(tensor.name)) is not None:
                last[found[1]] = tensor.name
        behind = {last[module]: names for module, names in readers.items()}
        _rebuilt(self.graph.initializer, behind, _sizes_tensor)
        _rebuilt(self.graph.value_info, behind, _sizes_info)

    def _concat(self, node: Any) -> list[Shape]:
        shapes = [self.shape(name) for name in node.input]
        axis = next(a.i for a in node.attribute if a.name == "axis") % len(shapes[0])
        if not all(isinstance(shape[axis], int) for shape in shapes):
            raise UnsupportedError(f"{self.path}: {node.name} joins what has no fixed size, which no cut changes. Export the model again.")
        joined = sum(int(shape[axis]) for shape in shapes)
        return [(*shapes[0][:axis], joined, *shapes[0][axis + 1 :])]

    def _ints(self, name: str) -> list[int]:
        tensor = self.initializers.get(name)
        if tensor is None or tensor.data_type != _INT64 or not tensor.raw_data:
            raise UnsupportedError(f"{self.path}: the shape {name} is no constant. Export the model again.")
        return [int(n) for n in np.frombuffer(tensor.raw_data, dtype="<i8")]

    def _reshape_to(self, node: Any, wanted: list[int]) -> None:
        """A constant that others read as well is left to them."""
        tensor = self.initializers[node.input[1]]
        if self.uses[tensor.name] > 1:
            copy = self.graph.initializer.add()
            copy.CopyFrom(tensor)
            copy.name = node.input[1] = f"{node.name}/shape"
            tensor = copy
        tensor.raw_data = np.array(wanted, dtype="<i8").tobytes()

    def _set(self, node: Any, values: Mapping[str, int]) -> None:
        for attribute in node.attribute:
            if attribute.name in values:
                attribute.i = values[attribute.name]


@dataclass(frozen=True)
class _Product:
    """Dimensions multiplied: a number, and names ("sequence_length", also within "sequence_length*4")."""

    number: int
    names: tuple[str, ...]

    @staticmethod
    def of(shape: Sequence[Dim]) -> _Product:
        factors = [part for dim in shape for part in str(dim).split("*")]
        names = sorted(part for part in factors if not part.isdigit())
        return _Product(prod(int(part) for part in factors if part.isdigit()), tuple(names))

    def __truediv__(self, other: _Product) -> _Product:
        names = list(self.names)
        for name in other.names:
            names.remove(name)
        return _Product(self.number // other.number, tuple(names))

    def dim(self) -> Dim:
        if not self.names:
            return self.number
        return "*".join([*self.names, *([str(self.number)] if self.number != 1 else [])])


def _shape_of(value: Any) -> Shape:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims)


def _state(value: Any, shape: Shape) -> None:
    for dim, n in zip(value.type.tensor_type.shape.dim, shape, strict=True):
        if isinstance(n, int):
            dim.dim_value = n
        else:
            dim.dim_param = n


def _rebuilt(entries: Any, behind: Mapping[str, Sequence[str]], make: Callable[[str], Any]) -> None:
    """Replace the sizes of splits in a list of a graph: those given by name, each behind the entry that it is given for."""
    kept = []
    for entry in entries:
        if not entry.name.startswith(_SPLIT_SIZES):
            kept += [type(entry).FromString(entry.SerializeToString()), *(make(name) for name in behind.get(entry.name, ()))]
    del entries[:]
    entries.extend(kept)


def _sizes_tensor(name: str) -> Any:
    """A constant of the numbers that its name ends in."""
    from onnx import TensorProto

    numbers = [int(part) for part in name.removeprefix(_SPLIT_SIZES).split("_")]
    return TensorProto(name=name, data_type=_INT64, dims=[len(numbers)], raw_data=np.array(numbers, dtype="<i8").tobytes())


def _sizes_info(name: str) -> Any:
    from onnx import ValueInfoProto

    info = ValueInfoProto(name=name)
    info.type.tensor_type.elem_type = _INT64
    info.type.tensor_type.shape.dim.add().dim_value = 1 + name.removeprefix(_SPLIT_SIZES).count("_")
    return info
