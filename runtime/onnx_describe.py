"""What `edgeq inspect` tells of an ONNX decoder folder: sizes, operators, and in which form its weights lie. Reads no weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from edgeq.runtime.onnx_facts import OnnxFacts, facts_of
from edgeq.runtime.onnx_file import OnnxFile, read_onnx, tensor_bytes

_FLOATS = {1: "float32", 10: "float16", 16: "bfloat16"}  # TensorProto.DataType
_SUPPLIES = {"Reshape": 0, "Transpose": 0, "DequantizeLinear": 0}  # operators that hand a weight on


def describe_onnx(path: Path) -> dict[str, Any]:
    """path: of model.onnx. Raises as `read_onnx` and `facts_of`."""
    file = read_onnx(path)
    facts, proto = facts_of(file), file.proto
    heads = [(key.n_kv_heads, key.length, value.length) for key, value in zip(facts.caches[::2], facts.caches[1::2], strict=True)]
    operators = Counter((node.domain or "ai.onnx", node.op_type) for node in proto.graph.node)
    return {
        "kind": "onnx",
        "file": {
            "path": str(path),
            "bytes": sum(f.stat().st_size for f in file.files),
            "ir_version": proto.ir_version,
            "opsets": {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import},
            "producer": proto.producer_name,
        },
        "metadata": {entry.key: entry.value for entry in proto.metadata_props},
        "sizes": {
            "type": facts.arch,
            "n_layers": facts.n_layers,
            "n_ctx": facts.n_ctx_train,
            "n_vocab": facts.n_vocab,
            "n_kv_heads": _same([n for n, _, _ in heads]),
            "head_dim": _same([length if length == other else (length, other) for _, length, other in heads]),
            "kv_bytes_per_token": facts.kv_bytes(1),
            "computes_in": facts.float_type,
        },
        "operators": {f"{domain} {op}": count for (domain, op), count in operators.most_common()},
        "formats": _formats(file, facts),
    }


@dataclass(frozen=True)
class _Weight:
    """A matrix as an operator reads it, or what is left over. names: of its initializers."""

    form: str
    n_weights: int
    names: tuple[str, ...]


def _formats(file: OnnxFile, facts: OnnxFacts) -> list[dict[str, Any]]:
    graph = file.proto.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    found: dict[str, _Weight] = {}  # by the initializer that holds the codes: shared ones count once
    for weight in _weights(graph, tensors):
        found.setdefault(weight.names[0], weight)
    used = {name for weight in found.values() for name in weight.names}
    rest = [_Weight("vectors and tables", prod(tensor.dims), (name,)) for name, tensor in tensors.items() if name not in used]
    rows: dict[str, list[_Weight]] = {}
    for weight in [*found.values(), *rest]:
        rows.setdefault(weight.form, []).append(weight)
    described = []
    for form, weights in rows.items():
        n_weights, n_bytes = sum(w.n_weights for w in weights), sum(tensor_bytes(tensors[name]) for w in weights for name in w.names)
        described.append(
            {
                "format": form,
                "tensors": len(weights),
                "weights": n_weights,
                "bytes": n_bytes,
                "bits_per_weight": round(8 * n_bytes / n_weights, 4),
            }
        )
    return sorted(described, key=lambda row: -row["bytes"])


def _weights(graph: Any, tensors: Mapping[str, Any]) -> Iterator[_Weight]:
    """Matrices by the operators that multiply with them or look rows up in them."""
    supplied = {node.output[0]: node for node in graph.node if node.op_type in _SUPPLIES and node.output}

    def origin(name: str) -> str:
        while name not in tensors and name in supplied:
            name = supplied[name].input[_SUPPLIES[supplied[name].op_type]]
        return name

    for node in graph.node:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        inputs = [origin(name) for name in node.input]
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            codes, rest = (inputs[1], inputs[2:4]) if node.op_type == "MatMulNBits" else (inputs[0], inputs[2:4])
            bits, block = attributes["bits"], attributes["block_size"]
            zeros = " with zero points" if len(rest) > 1 and rest[1] else ""
            names = tuple(name for name in (codes, *rest) if name in tensors)
            n_weights = attributes["N"] * attributes["K"] if "N" in attributes else prod(tensors[codes].dims) * 8 // bits
            yield _Weight(f"{bits} bits in blocks of {block}{zeros}", n_weights, names)
        elif node.op_type == "MatMulBnb4":
            kind = "nf4" if attributes["quant_type"] else "fp4"
            yield _Weight(f"{kind} in blocks of {attributes['block_size']}", attributes["N"] * attributes["K"], (inputs[1], inputs[2]))
        elif node.op_type in ("MatMul", "Gather", "MatMulInteger", "Gemm"):
            name = inputs[0] if node.op_type == "Gather" else inputs[1]
            tensor = tensors.get(name)
            if tensor is not None and len(tensor.dims) == 2:
                yield _Weight(_FLOATS.get(tensor.data_type, "8 bits in rows"), prod(tensor.dims), (name,))


def _same(values: list[Any]) -> Any:
    """The one value that all layers share, else the list."""
    return values[0] if len(set(values)) == 1 else values
