"""A graph without its places for adapters: what a run without adapters computes, in fewer nodes.

Beside a matrix stands y = x W + (x A) B, where A and B are inputs of rank 0 unless a run gives them values. They add nothing and cost
little each, but there are two products and a sum for every matrix: a graph of SmolLM2-135M with places at all seven of each layer takes a
sixth longer for a token. ONNX Runtime may not leave them out, as somebody could give values; the session, which knows, can.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

_PRODUCTS = frozenset({"Cast", "Gather", "MatMul", "Mul"})  # what an adapter's matrices go through before they are added


def without_places(proto: Any, inputs: Collection[str]) -> Any | None:
    """A copy of a ModelProto in which nothing reads `inputs`, the matrices of adapters.

    None when there are none, or when they do more than to add nothing: a rank that is not 0, or another operator.
    """
    if not inputs or not _add_nothing(proto.graph, inputs):
        return None
    left = type(proto)()
    left.CopyFrom(proto)
    graph, nothing, nodes = left.graph, set(inputs), []
    renamed: dict[str, str] = {}
    for node in graph.node:
        of_nothing = [name in nothing for name in node.input if name]
        if not any(of_nothing):
            node.input[:] = [renamed.get(name, name) for name in node.input]
            nodes.append(node)
        elif node.op_type == "Add" and not all(of_nothing):
            (other,) = (name for name in node.input if name not in nothing)
            renamed[node.output[0]] = renamed.get(other, other)
        elif node.op_type in _PRODUCTS or (all(of_nothing) and node.op_type in ("Add", "Concat")):
            nothing.update(node.output)
        else:
            return None
    _keep_names(graph, nodes, renamed)
    _replace(graph.node, nodes)
    _replace(graph.input, [value for value in graph.input if value.name not in nothing])
    _replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name not in nothing])
    _replace(graph.value_info, [value for value in graph.value_info if value.name not in nothing and value.name not in renamed])
    return left


def _add_nothing(graph: Any, inputs: Collection[str]) -> bool:
    """Whether all of them are empty by default."""
    defaults = {tensor.name: tensor.dims for tensor in graph.initializer if tensor.name in inputs}
    return len(defaults) == len(inputs) and all(0 in dims for dims in defaults.values())


def _keep_names(graph: Any, nodes: list[Any], renamed: dict[str, str]) -> None:
    """Give what is left of an output of the graph its name."""
    names = {renamed[value.name]: value.name for value in graph.output if value.name in renamed}
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def _replace(field: Any, values: list[Any]) -> None:
    copies = [type(value).FromString(value.SerializeToString()) for value in values]
    del field[:]
    field.extend(copies)
