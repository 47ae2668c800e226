"""From a model in canonical form to the tensors and metadata of a GGUF file.

Lowering changes layout only, never a value, with two exceptions named below: names, row order of q and k (`Family.gguf_rope`), joined
projections, float32 vectors, and rotary factors as tensors. Rows of every grid are packed on their own, so all of it is a byte shuffle
and a quantized source keeps its codes. The exceptions, both exact to rounding: where the graph's attention scale differs from the
model's, the ratio goes into q_norm (gemma3 with 62 layers) or, without one, into the rotary magnitude (`graph_rope`); where the graph
rotates a whole head and the model a part of it with a magnitude other than 1, the rows of q that stay put are divided by what the graph
multiplies them with (Phi-4-mini as deci).

A GGUF source keeps its metadata bytes, and its tensors their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from edgeq.converters.gguf.architectures import Arch, arch_for
from edgeq.converters.gguf.graph_rope import graph_rope
from edgeq.converters.gguf.metadata import (
    architecture_fields,
    carried_fields,
    context_notes,
    fitted_vocabulary,
    general_fields,
    is_baked,
    quantization_fields,
)
from edgeq.converters.tokenizers.gguf import tokenizer_fields
from edgeq.converters.tokenizers.llamacpp import general_name
from edgeq.errors import ShapeError, SourceError, UnsupportedError
from edgeq.families import FUSED, GGUF_NAMES, LINEAR_ROLES, Family, family
from edgeq.gguf_fields import Field
from edgeq.grids import F32
from edgeq.model import Model
from edgeq.spec import Attention, ModelSpec
from edgeq.tensors import Bytes, LazyTensor, as_float32, concat_rows, from_values, map_values, take_rows

# GGUF names of joined projections; it has none of its own for gate_up.
_FUSED_NAMES = {"wqkv": GGUF_NAMES["wqkv"], "gate_up": GGUF_NAMES["up"]}


@dataclass(frozen=True, kw_only=True)
class CarrierTensor:
    """A tensor as it will stand in the file, in its source's grid.

    role: canonical role, "wqkv" or "gate_up" when joined, "rope_factors"; biases end in ".bias". importance_key: canonical linear
    whose inputs its columns meet; None where calibration measures nothing.
    """

    name: str
    tensor: LazyTensor
    role: str
    layer: int | None
    importance_key: str | None


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """arch: `general.architecture`. fields: all metadata in order. notes: sentences about what the runtime will do differently.

    alignment: of the data, in bytes. carried: the fields are those of a GGUF source.
    """

    arch: str
    spec: ModelSpec
    fields: tuple[Field, ...]
    tensors: tuple[CarrierTensor, ...]
    notes: tuple[str, ...] = ()
    alignment: int = 32
    carried: bool = False


def lower(model: Model, *, elastic: bool = False) -> Lowered:
    """Lower a model. Nothing is read yet but headers.

    elastic: for a file that will be cut, with sizes per layer where llama.cpp has them. A source that is such a file stays one.
    Raises PlanError or UnsupportedError when llama.cpp cannot run it (see `architectures`), ShapeError when a tensor contradicts the
    spec, SourceError when one is missing, TokenizerError when the vocabulary is not usable.
    """
    spec = model.spec
    arch = arch_for(spec, elastic=elastic or _source_arch(model) == family(spec.family).gguf_layered)
    _check_tensors(model)
    tensors = list(_tensors(model, arch))
    vocabulary = model.tokenizer.vocabulary
    name = general_name(vocabulary, model.name)
    fields = [
        *general_fields(arch.name, name, _with_size_label(model, tensors)),
        *architecture_fields(replace(spec, rope=graph_rope(spec, arch)), arch),
        *quantization_fields(0),
    ]
    if model.gguf_fields is None:
        fields += tokenizer_fields(fitted_vocabulary(vocabulary, spec.n_vocab))
        alignment = 32
    else:
        fields = carried_fields(model.gguf_fields, fields, arch.name)
        alignment = next((f.value for f in fields if f.key == "general.alignment"), 32)
    return Lowered(
        arch=arch.name,
        spec=spec,
        fields=tuple(fields),
        tensors=tuple(tensors),
        notes=context_notes(spec, arch),
        alignment=alignment,
        carried=model.gguf_fields is not None,
    )


def _source_arch(model: Model) -> object:
    field = (model.gguf_fields or {}).get("general.architecture")
    return "" if field is None else field.value


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a model of this spec has, by canonical name."""
    row = family(spec.family)
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (spec.n_vocab, spec.n_embd), "final_norm.weight": (spec.n_embd,)}
    if not spec.tied:
        shapes["head.weight"] = (spec.n_vocab, spec.n_embd)
    for layer, blocks in spec.layers():
        sizes: dict[str, tuple[int, ...]] = {}
        for block in blocks:
            if isinstance(block, Attention):
                q, kv = block.n_heads * block.head_dim, block.n_kv_heads * block.head_dim
                sizes |= {"attn_norm": (spec.n_embd,), "post_attn_norm": (spec.n_embd,), "wo": (spec.n_embd, q), "wq": (q, spec.n_embd)}
                sizes |= {"wk": (kv, spec.n_embd), "wv": (kv, spec.n_embd), "q_norm": (block.head_dim,), "k_norm": (block.head_dim,)}
            else:
                sizes |= {"mlp_norm": (spec.n_embd,), "post_mlp_norm": (spec.n_embd,), "down": (spec.n_embd, block.n_ff)}
                sizes |= {"gate": (block.n_ff, spec.n_embd), "up": (block.n_ff, spec.n_embd)}
        for role in row.roles:
            if role in sizes:
                shapes[f"layers.{layer}.{role}.weight"] = sizes[role]
                if role in spec.biases:
                    shapes[f"layers.{layer}.{role}.bias"] = sizes[role][:1]
    return shapes


def _check_tensors(model: Model) -> None:
    expected = expected_shapes(model.spec)
    for name, shape in expected.items():
        tensor = model.tensors.get(name)
        if tensor is None:
            raise SourceError(f"{model.name}: tensor {name} is missing")
        if tensor.shape != shape:
            raise ShapeError(f"{tensor.origin}: shape {list(tensor.shape)}, expected {list(shape)} for {name}")
    unknown = sorted(model.tensors.keys() - expected.keys())
    if unknown:
        raise UnsupportedError(f"{model.name}: tensor {unknown[0]} has no place in a GGUF file of this architecture")


def _tensors(model: Model, arch: Arch) -> Iterator[CarrierTensor]:
    yield from _rope_tensors(replace(model.spec, rope=graph_rope(model.spec, arch)))
    lowered = _model_tensors(model, arch)
    if model.gguf_fields is not None:
        position = {name: i for i, name in enumerate(model.tensors)}
        yield from (t for t, sources in sorted(lowered, key=lambda pair: min(position[s] for s in pair[1])))
    else:
        yield from (t for t, _ in lowered)


def _model_tensors(model: Model, arch: Arch) -> Iterator[tuple[CarrierTensor, tuple[str, ...]]]:
    """Every tensor in canonical order, with the canonical names that it is made of."""
    spec, row = model.spec, arch.layout
    keep = model.gguf_fields is not None

    def whole(role: str, importance_key: str | None = None) -> tuple[CarrierTensor, tuple[str, ...]]:
        source = f"{role}.weight"
        tensor = _vector(model.tensors[source], keep=keep)
        name = f"{GGUF_NAMES[role]}.weight"
        return CarrierTensor(name=name, tensor=tensor, role=role, layer=None, importance_key=importance_key), (source,)

    yield whole("embed", "head" if spec.tied else None)
    for layer, blocks in spec.layers():
        attention = next((b for b in blocks if isinstance(b, Attention)), None)
        for role in _lowered_roles(row):
            parts = FUSED.get(role, (role,))
            for kind in ("weight", "bias"):
                sources = tuple(f"layers.{layer}.{part}.{kind}" for part in parts)
                if sources[0] not in model.tensors:
                    continue
                name = f"{(_FUSED_NAMES.get(role) or GGUF_NAMES[role]).format(i=layer)}.{kind}"
                tensors = [
                    _vector(laid_out(model.tensors[s], part, attention, spec, arch), keep=keep)
                    for s, part in zip(sources, parts, strict=True)
                ]
                is_linear = kind == "weight" and parts[0] in LINEAR_ROLES
                yield (
                    CarrierTensor(
                        name=name,
                        tensor=tensors[0] if len(tensors) == 1 else concat_rows(tensors, origin=tensors[0].origin),
                        role=role if kind == "weight" else f"{role}.bias",
                        layer=layer,
                        importance_key=f"layers.{layer}.{parts[0]}" if is_linear else None,
                    ),
                    sources,
                )
    yield whole("final_norm")
    if not spec.tied:
        yield whole("head", "head")


def _lowered_roles(row: Family) -> list[str]:
    """Roles of a layer in canonical order, joined ones in place of their parts."""
    fused = [role for role, is_fused in (("wqkv", row.fused_qkv), ("gate_up", row.fused_gate_up)) if is_fused]
    joined = {part: role for role in fused for part in FUSED[role]}
    return list(dict.fromkeys(joined.get(role, role) for role in row.roles))


def laid_out(tensor: LazyTensor, role: str, attention: Attention | None, spec: ModelSpec, arch: Arch) -> LazyTensor:
    """A weight, a bias or the b of an adapter, (n_out, any), as the architecture wants its rows. attention: of its layer, if it has one."""
    if attention is None:
        return tensor
    if role in ("wq", "wk") and arch.layout.gguf_rope == "norm":
        n_heads = attention.n_heads if role == "wq" else attention.n_kv_heads
        if role == "wq" and spec.rope.dim < attention.head_dim and not arch.rules.partial_rotary:
            tensor = _unmagnified(tensor, attention, spec)
        return take_rows(tensor, interleaved(n_heads, attention.head_dim, spec.rope.dim))
    if role == "q_norm" and (ratio := spec.attn_scale / arch.attention_scale(spec)) and abs(ratio - 1) > 1e-6:
        return map_values(tensor, lambda values: values * np.float32(ratio))
    return tensor


def _unmagnified(tensor: LazyTensor, attention: Attention, spec: ModelSpec) -> LazyTensor:
    """q whose dimensions that do not rotate are divided by the square of the magnitude: the graph multiplies them, in q and in k, too."""
    if spec.rope.attn_factor == 1:
        return tensor
    stays = np.arange(attention.head_dim) >= spec.rope.dim
    scale = np.tile(np.where(stays, spec.rope.attn_factor**-2, 1.0).astype(np.float32), attention.n_heads)
    if len(tensor.shape) == 1:
        return map_values(tensor, lambda values: values * scale)

    def read(start: int, stop: int) -> Bytes:
        return np.ascontiguousarray(tensor.decode(start, stop) * scale[start:stop, None]).view(np.uint8)

    return LazyTensor(shape=tensor.shape, grid=F32, read=read, origin=tensor.origin)


def interleaved(n_heads: int, head_dim: int, rope_dim: int) -> np.ndarray:
    """Row order that brings q or k from "rotate half" to pairs side by side: within a head, 0, d/2, 1, d/2 + 1, ...; the rest stays.

    >>> interleaved(1, 6, 4).tolist()
    [0, 2, 1, 3, 4, 5]
    """
    rotated = np.arange(rope_dim).reshape(2, rope_dim // 2).T.ravel()
    head = np.concatenate([rotated, np.arange(rope_dim, head_dim)])
    return (np.arange(n_heads)[:, None] * head_dim + head).ravel()


def _vector(tensor: LazyTensor, *, keep: bool) -> LazyTensor:
    """Vectors become float32, as llama.cpp's operations on them want; a GGUF source's are what its author wrote."""
    return tensor if keep or len(tensor.shape) == 2 else as_float32(tensor)


def _rope_tensors(spec: ModelSpec) -> Iterator[CarrierTensor]:
    rope = spec.rope
    if rope.kind == "longrope":
        values: Mapping[str, object] = {"rope_factors_long": rope.long_factors, "rope_factors_short": rope.short_factors}
    elif rope.kind == "factors":
        values = {"rope_freqs": rope.factors}
    elif is_baked(rope):
        plain = rope.base ** -(np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
        values = {"rope_freqs": plain / rope.frequencies(spec.n_ctx)}
    else:
        return
    for name, factors in values.items():
        tensor = from_values(np.asarray(factors, dtype=np.float32), origin=name)
        yield CarrierTensor(name=f"{name}.weight", tensor=tensor, role="rope_factors", layer=None, importance_key=None)


def _with_size_label(model: Model, tensors: list[CarrierTensor]) -> Mapping[str, object]:
    if "size_label" in model.metadata:
        return model.metadata
    from gguf.utility import size_label

    n_values = sum(t.tensor.n_rows * t.tensor.n_cols for t in tensors)
    return {**model.metadata, "size_label": size_label(n_values, 0, 0, 0)}
