"""The graph of a cut: shapes and attributes that fit weights which have become smaller.

The graph is walked once in its own order. Where an input of a node has become smaller, so does what it computes: its attributes (K and N,
numbers of heads), the shapes that are stated of its outputs, and a shape that a Reshape is given. An operator that is not known here is
refused rather than left as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.elastic import Kept
from edgeq.errors import UnsupportedError
from edgeq.runtime.onnx_sizes import MODULE_PART, PROJECTIONS, Dim, OnnxSizes, Projection, Shape, shape_of, sizes_after

_INT64 = 7  # TensorProto.DataType
LORA = re.compile(r"(.+)\.lora_([AB])\.weight")
_LAYER = re.compile(r"/model/layers\.(\d+)/")
_PAST = re.compile(r"past_key_values\.(\d+)\.(?:key|value)")
_SPLIT = re.compile(r"/model/layers\.(\d+)/(?:attn|mlp)/(\w+_proj)/Split")
_SPLIT_SIZES = "/model/constants/split/"
# Operators by what the shapes of their outputs follow from: all inputs, or the first one.
_BROADCAST = ("Add", "Sub", "Mul", "Div", "Cast", "Sigmoid", "FastGelu")
_LIKE_FIRST = ("SimplifiedLayerNormalization", "QuantizeLinear", "DequantizeLinear")


def lora_dims(match: re.Match[str], dims: Sequence[Any], sizes: OnnxSizes, kept: Kept) -> tuple[Any, Any]:
    """What is left of the dimensions of an adapter's place: (n_in, rank) of A, (rank, n_out) of B."""
    if match[2] == "A":
        return sizes_after(match[1], (0, dims[0]), sizes, kept)[1], dims[1]
    return dims[0], sizes_after(match[1], (dims[1], 0), sizes, kept)[0]


class GraphCut:
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
        self.old: dict[str, Shape] = {**before, **{name: shape_of(value) for name, value in self.stated.items()}}
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
            if (match := LORA.fullmatch(value.name)) is not None:
                place = lora_dims(match, self.old[value.name], self.sizes, self.kept)
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
        match = MODULE_PART.fullmatch(node.input[1])
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
        if match is None or match[2] not in PROJECTIONS or len(node.output) != len(PROJECTIONS[match[2]][0]):
            raise UnsupportedError(f"{self.path}: {node.name} is no split that edgeq cuts. Export the model again.")
        widths = [self.sizes.width(int(match[1]), self.kept, width) for width in PROJECTIONS[match[2]][0]]
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
            if (found := MODULE_PART.fullmatch(tensor.name)) is not None:
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
