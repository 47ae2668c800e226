"""Sizes of the layers of an elastic ONNX graph, and what a cut makes of them: every linear layer's outputs and inputs.

Names are those of the exporter: `edgeq.converters.onnx.names`. Every layer has sizes of its own, in any family.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from edgeq.elastic import Kept
from edgeq.errors import PlanError, SourceError, UnsupportedError
from edgeq.runtime.onnx_file import OnnxFile

Dim = int | str
Shape = tuple[Dim, ...]
Width = Literal["q", "kv", "ff"]  # n_heads * head_dim, n_kv_heads * head_dim, n_ff

# Linear layers of a block: outputs, of several side by side, and inputs, where a cut shortens them.
PROJECTIONS: Mapping[str, tuple[tuple[Width, ...], Width | None]] = {
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
MODULE_PART = re.compile(r"(model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+_proj))\.(.+)")
_MODULE = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+_proj)")


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


def read_sizes(file: OnnxFile) -> OnnxSizes:
    """Raises UnsupportedError for a graph that is not one of edgeq's elastic ones, SourceError for sizes that contradict each other."""
    found = {(p.layer, p.kind): p for p in projections(file).values()}
    n_layers = 1 + max((layer for layer, _ in found), default=-1)
    shapes = {value.name: shape_of(value) for value in file.proto.graph.input}
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
        outs, ins = PROJECTIONS[p.kind]
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
            match = MODULE_PART.fullmatch(name)
            if match is None or match[1] in found or name not in held or match[3] not in PROJECTIONS:
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


def sizes_after(module: str, full: tuple[int, int], sizes: OnnxSizes, kept: Kept) -> tuple[int, int]:
    """(n_out, n_in) that a cut leaves of a module, which may be a part of a joined one, or outside of the blocks."""
    match = _MODULE.fullmatch(module)
    if match is None or match[2] not in PROJECTIONS:
        return full
    outs, ins = PROJECTIONS[match[2]]
    layer = int(match[1])
    n_out = sum(sizes.width(layer, kept, width) for width in outs) or full[0]
    return n_out, full[1] if ins is None else sizes.width(layer, kept, ins)


def _foreign(path: Path, why: str) -> UnsupportedError:
    return UnsupportedError(f"{path}: cannot be cut, because {why}. Export the model with --elastic and cut that.")


def check_kept(path: Path, sizes: OnnxSizes, kept: Kept) -> None:
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


def resized_projection(p: Projection, sizes: OnnxSizes, kept: Kept) -> Projection:
    """What stays of a linear layer. Raises PlanError when inputs do not divide into blocks."""
    outs, ins = PROJECTIONS[p.kind]
    n_out = sum(sizes.width(p.layer, kept, width) for width in outs) or p.n_out
    n_in = p.n_in if ins is None else sizes.width(p.layer, kept, ins)
    if p.block_size and n_in not in (p.n_in, n_in - n_in % p.block_size):
        below, above = n_in - n_in % p.block_size, n_in + -n_in % p.block_size
        near = " or ".join(str(m) for m in (below, above) if 0 < m <= p.n_in)
        group = sizes.gqa[p.layer] * sizes.head_dim[p.layer]
        hint = f"Keep {near}." if ins == "ff" else f"A kv head has {group} columns: keep another number of kv heads."
        raise PlanError(f"{p.name}: {n_in} of {p.n_in} columns do not divide into blocks of {p.block_size}. {hint}")
    return replace(p, n_out=n_out, n_in=n_in)


def shape_of(value: Any) -> Shape:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims)
