"""A decoder graph that computes logits only where they are wanted.

A graph as onnxruntime-genai's builder writes it gives logits of every token, but a prompt needs those of its last one: the head of a
135M model with 49,152 tokens is a fifth of its multiplications, and 512 rows of its logits take 96 MiB. So the graph is changed in memory:
the states that go into the head are gathered first, at rows that a new input names. The file stays as it is.

The head is what stands between the last value that all ways to the logits begin with and the logits: products with fixed matrices, and
whatever works on each token by itself around them (biases, scales, caps, number formats, sums over blocks of columns).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROWS = "edgeq.rows"
_INT64, _EXTERNAL = 7, 1  # TensorProto.DataType, DataLocation
_PRODUCTS = frozenset({"MatMul", "MatMulNBits", "MatMulBnb4"})  # of their first input with others that are fixed
_BY_VALUE = frozenset({"Add", "Cast", "Div", "Mul", "Sub", "Tanh"})


def choose_rows(graph: Any, logits: str) -> bool:
    """Change a GraphProto so that `logits` are (batch_size, n_rows, n_vocab), of the tokens at ROWS, int64 (n_rows,).

    False, and no change, for a graph where nothing of that kind is found.
    """
    from onnx import helper

    head = _Head(graph, logits)
    if not head.has_product or len(head.entries) != 1:
        return False
    (entry,) = head.entries
    chosen = f"{entry}/rows"
    for i in head.nodes:
        node = graph.node[i]
        node.input[:] = [chosen if name == entry else name for name in node.input]
    gather = helper.make_node("Gather", [entry, ROWS], [chosen], name=f"{chosen}/Gather", axis=1)
    graph.node.insert(min(head.nodes), gather)
    graph.input.append(helper.make_tensor_value_info(ROWS, _INT64, ["n_rows"]))
    kept = [value for value in graph.value_info if value.name not in head.values]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    for output in graph.output:
        if output.name == logits and len(output.type.tensor_type.shape.dim) == 3:
            output.type.tensor_type.shape.dim[1].dim_param = "n_rows"
    return True


class _Head:
    """The way from the logits back to where it begins. nodes: by place in the graph. values: between. entries: where it begins."""

    def __init__(self, graph: Any, logits: str) -> None:
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._fixed = set(self._constants) - {value.name for value in graph.input}
        for node in graph.node:
            if all(not name or name in self._fixed for name in node.input):
                self._fixed.update(node.output)
        made = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
        self.nodes: set[int] = set()
        self.values: set[str] = set()
        self.entries: set[str] = set()
        self.has_product = False
        left = [logits]
        while left:
            value = left.pop()
            if value in self.values:
                continue
            if value not in made or not self._is_by_token(graph.node[made[value]]):
                self.entries.add(value)
                continue
            node = graph.node[made[value]]
            self.nodes.add(made[value])
            self.values.add(value)
            self.has_product |= node.op_type in _PRODUCTS
            left += [name for name in node.input if name and name not in self._fixed]

    def _is_by_token(self, node: Any) -> bool:
        """Whether an operator on (batch_size, tokens, ..) treats every token alike and alone."""
        others_fixed = all(not name or name in self._fixed for name in node.input[1:])
        match node.op_type:
            case op if op in _PRODUCTS:
                return others_fixed and node.input[0] not in self._fixed
            case op if op in _BY_VALUE:
                return True
            case "Reshape":
                return others_fixed and self._numbers(node.input[1])[:2] == [0, 0]  # 0 keeps a dimension
            case "ReduceSum":
                return others_fixed and len(node.input) > 1 and self._numbers(node.input[1]) == [-1] and _keeps_no_dims(node)
        return False

    def _numbers(self, name: str) -> list[int]:
        """Values of a small constant; empty for one that is not at hand."""
        from onnx import numpy_helper

        tensor = self._constants.get(name)
        if tensor is None or tensor.data_location == _EXTERNAL:
            return []
        return numpy_helper.to_array(tensor).reshape(-1).tolist()


def _keeps_no_dims(node: Any) -> bool:
    attributes: Mapping[str, int] = {attribute.name: attribute.i for attribute in node.attribute}
    return attributes.get("keepdims", 1) == 0
