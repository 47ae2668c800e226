"""Places for adapters in a graph: inputs that are nothing unless a run gives them values.

Beside a linear layer stands y = x W + (x A) B. A (n_in, rank) and B (rank, n_out) are inputs of the graph and initializers as well, of
rank 0, which ONNX Runtime takes as their default and leaves out of the inputs that have to be given. Names are Olive's,
`model.layers.0.self_attn.q_proj.lora_A.weight`, so that `.onnx_adapter` files (`edgeq.onnx_adapter_file`) go by them in onnxruntime and in
onnxruntime-genai. Every pair has a rank of its own: with one name for all, a file that has values for some of them fails.

Joined matrices (`edgeq.families.FUSED`) stay joined: what their parts' adapters add is put side by side.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgeq.converters.onnx.builder import Builder, shape_of
from edgeq.families import FUSED
from edgeq.model import Model


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an adapter can act. name: of the module ("model.layers.0.self_attn.q_proj"). path: of its nodes."""

    name: str
    path: str
    n_out: int


def a_name(module: str) -> str:
    return f"{module}.lora_A.weight"


def b_name(module: str) -> str:
    return f"{module}.lora_B.weight"


def places_for(model: Model, adapted: Collection[str]) -> frozenset[str]:
    """Modules of a graph that get a place, by canonical name, for adapters that change `adapted` ("layers.3.wq", "head").

    The same ones in every layer, so that other adapters of that kind fit as well, and of parts that may be joined all.
    """
    roles = {name.split(".")[2] for name in adapted if name.startswith("layers.")}
    roles |= {part for parts in FUSED.values() if roles & set(parts) for part in parts}
    inner = {f"layers.{layer}.{role}" for layer in range(model.spec.n_layers) for role in roles}
    outer = {name for name in adapted if not name.startswith("layers.")}
    return frozenset(name for name in inner if f"{name}.weight" in model.tensors) | outer


def added(g: Builder, x: ir.Value, y: ir.Value, places: Sequence[Place], *, path: str) -> ir.Value:
    """y (.., n_out) of a linear layer of x, with what adapters add; of a joined one, of its parts in order. path: of the layer."""
    deltas = [_delta(g, x, place, int(shape_of(x)[-1])) for place in places]
    return _sum(g, y, deltas, path)


def added_rows(g: Builder, ids: ir.Value, y: ir.Value, place: Place, n_vocab: int) -> ir.Value:
    """The same of an embedding: y (.., n_embd) of token ids, whose A is a table of `n_vocab` rows."""
    return _sum(g, y, [_delta(g, ids, place, n_vocab)], place.path)


def _delta(g: Builder, x: ir.Value, place: Place, n_in: int) -> ir.Value:
    """x: values, or ids that stand for one row of A each."""
    rank = f"{place.name}.rank"
    a = g.optional(a_name(place.name), g.float_type, [n_in, rank])
    b = g.optional(b_name(place.name), g.float_type, [rank, place.n_out])
    if x.dtype == ir.DataType.INT64:
        low = g.node("Gather", [a, x], path=f"{place.path}/lora_A/Gather", shape=[*shape_of(x), rank], attributes={"axis": 0})
    else:
        low = g.node("MatMul", [x, a], path=f"{place.path}/lora_A/MatMul", shape=[*shape_of(x)[:-1], rank])
    return g.node("MatMul", [low, b], path=f"{place.path}/lora_B/MatMul", shape=[*shape_of(low)[:-1], place.n_out])


def _sum(g: Builder, y: ir.Value, deltas: Sequence[ir.Value], path: str) -> ir.Value:
    delta = deltas[0]
    if len(deltas) > 1:
        delta = g.node("Concat", deltas, path=f"{path}/lora/Concat", shape=shape_of(y), attributes={"axis": -1})
    return g.node("Add", [y, delta], path=f"{path}/lora/Add", shape=shape_of(y))
