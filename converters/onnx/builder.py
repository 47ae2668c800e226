"""An ONNX graph in the making: nodes in order of computation, each named by where it stands in the model, and what they read.

Names are paths ("/model/layers.3/attn/q_proj/MatMul"): the part before the last slash says where, the last part which op. Values that a
node makes are called `<path>/output_0` and so on. Weights are lazy: `ir.LazyTensor`s that are asked for when the file is written.

    graph = Builder("decoder", float_type=ir.DataType.FLOAT)
    shape = ["batch_size", "sequence_length", 1536]
    x = graph.node("MatMul", [x, w], path="/model/layers.0/mlp/up_proj/MatMul", shape=shape)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgeq.converters.onnx.streamed import Streamed
from edgeq.errors import PlanError

MS = "com.microsoft"
OPSETS = {"": 23, MS: 1}
IR_VERSION = 10

Dim = int | str
Array = npt.NDArray[Any]


class Builder:
    """float_type: of activations and of whatever is not said otherwise, FLOAT or FLOAT16. Raises PlanError for others."""

    def __init__(self, name: str, *, float_type: ir.DataType) -> None:
        if float_type not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            raise PlanError(f"graphs are written in FLOAT or FLOAT16, not {float_type.name}")
        self.float_type = float_type
        self._name = name
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}
        self._shared: dict[Hashable, tuple[ir.Value, ...]] = {}
        self._graph: ir.Graph | None = None

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[Dim]) -> ir.Value:
        value = _value(name, dtype, shape)
        self._inputs.append(value)
        return value

    def optional(self, name: str, dtype: ir.DataType, shape: Sequence[Dim]) -> ir.Value:
        """An input that need not be given. Its dimensions that have names are 0 then."""
        value = self.input(name, dtype, shape)
        empty = np.empty([dim if isinstance(dim, int) else 0 for dim in shape], dtype=dtype.numpy())
        value.const_value = ir.tensor(empty, name=name)
        self._initializers[name] = value
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[Dim]) -> None:
        """Make a node's output an output of the graph, under another name."""
        value.name, value.dtype, value.shape = name, dtype, ir.Shape(shape)
        self._outputs.append(value)

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        *,
        path: str,
        dtype: ir.DataType | None = None,
        shape: Sequence[Dim] | None = None,
        domain: str = "",
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:
        """A node with one output; None stands for an optional input that is left out."""
        return self.nodes(op, inputs, path=path, outputs=[(dtype or self.float_type, shape)], domain=domain, attributes=attributes)[0]

    def nodes(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        *,
        path: str,
        outputs: Sequence[tuple[ir.DataType, Sequence[Dim] | None] | None],
        domain: str = "",
        attributes: Mapping[str, Any] | None = None,
    ) -> tuple[ir.Value, ...]:
        """A node with several outputs, of type and shape; None stands for one that is left out, and gives a value without a name."""
        made = [ir.Value(name="") if out is None else _value(f"{path}/output_{i}", out[0], out[1]) for i, out in enumerate(outputs)]
        given = dict(attributes or {})
        self._nodes.append(ir.node(op, inputs, attributes=given, domain=domain, outputs=made, name=path))
        return tuple(made)

    def constant(self, name: str, array: Array) -> ir.Value:
        """A small initializer; asked for twice by one name, it is made once."""
        if name not in self._initializers:
            self._add(name, ir.tensor(np.asarray(array, order="C"), name=name))
        return self._initializers[name]

    def weight(self, name: str, dtype: ir.DataType, shape: Sequence[int], read: Callable[[], Array]) -> ir.Value:
        """An initializer whose values are read when the file is written; asked for twice by one name, it is made once."""
        if name not in self._initializers:

            def evaluate() -> ir.TensorProtocol:
                return ir.tensor(np.ascontiguousarray(read()), dtype=dtype, name=name)

            self._add(name, ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name, cache=False))
        return self._initializers[name]

    def stream(self, name: str, dtype: ir.DataType, shape: Sequence[int], chunks: Callable[[], Iterable[Array]]) -> ir.Value:
        """As `weight`, for values that come in pieces in row-major order, so that the whole is never in memory."""
        if name not in self._initializers:
            self._add(name, Streamed(name, dtype, shape, chunks))
        return self._initializers[name]

    def initializer(self, name: str) -> ir.Value:
        """A weight or constant made before."""
        return self._initializers[name]

    def once(self, key: Hashable, make: Callable[[], ir.Value]) -> ir.Value:
        """What `make` gave for this key the first time: for nodes that several others read."""
        return self.once_all(key, lambda: (make(),))[0]

    def once_all(self, key: Hashable, make: Callable[[], tuple[ir.Value, ...]]) -> tuple[ir.Value, ...]:
        """As `once`, for several values."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def model(self, *, metadata: Mapping[str, str] | None = None) -> ir.Model:
        """What was built, and no more can be added. Asked again, the same graph with other metadata."""
        if self._graph is None:
            self._graph = ir.Graph(
                self._inputs,
                self._outputs,
                nodes=self._nodes,
                initializers=list(self._initializers.values()),
                opset_imports=dict(OPSETS),
                name=self._name,
            )
        model = ir.Model(self._graph, ir_version=IR_VERSION, producer_name="edgeq")
        model.metadata_props.update(metadata or {})
        return model

    def _add(self, name: str, tensor: ir.TensorProtocol) -> None:
        value = _value(name, tensor.dtype, tensor.shape.numpy())
        value.const_value = tensor
        self._initializers[name] = value


def shape_of(value: ir.Value) -> list[Dim]:
    """Dimensions of a value whose shape was given, as numbers and names."""
    assert value.shape is not None, f"{value.name}: its shape was not given"
    return [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]


def _value(name: str, dtype: ir.DataType, shape: Sequence[Dim] | None) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=None if shape is None else ir.Shape(shape))
