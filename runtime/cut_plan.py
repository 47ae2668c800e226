"""What a cut of an elastic GGUF file consists of, worked out from its header alone: every tensor's new shape, and the fields that change.

An elastic file stores MLP channels and KV groups of a layer, and dimensions of heads, in order of importance, so that what a cut keeps
is always a prefix:

    attn_q attn_k attn_v, ffn_gate ffn_up    the first rows (and the first values of their biases)
    attn_output, ffn_down                    the first columns of every row, in whole blocks
    norms, biases of attn_output, ffn_down   whole, as long as their attention or MLP has anything left

A KV group is one KV head with the query heads that read it; GGUF keeps those next to each other. With smaller heads, of each head that
stays it is the first rows of q, k and v and the first columns of the output: RoPE pairs lie side by side in q and k. What that changes
about rotation is in `edgeq.runtime.cut_rope`. Layers keep their numbers: the layered architecture, deci, takes 0 heads and 0 neurons.
Other architectures have one size for all layers, and no layer without either.
What llama.cpp would refuse, abort on or compute wrongly is refused here: its rules are in models/deci.cpp and llama-model.cpp.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np

from edgeq.elastic import Kept
from edgeq.errors import PlanError, SourceError, UnsupportedError
from edgeq.gguf_fields import Field, ValueType
from edgeq.gguf_file import Header, TensorInfo, TensorLayout
from edgeq.gguf_write import predicted_bytes
from edgeq.grids import F32, Grid
from edgeq.runtime.cut_rope import check_head_cut, head_factors, head_fields
from edgeq.tensors import Bytes, Floats

Dim = Literal["q", "kv", "ff"]  # n_heads * head_dim, n_kv_heads * head_dim, n_ff

LAYERED = frozenset({"deci"})  # architectures with sizes per layer
# Biases that the loader reads; any other tensor in a file is one too many for it.
BIASES: Mapping[str, tuple[str, ...]] = {
    "deci": ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    "qwen3": ("attn_q", "attn_k", "attn_v"),
    "gemma3": ("attn_q", "attn_k", "attn_v"),
    "smollm3": ("attn_q", "attn_k", "attn_v"),
}


@dataclass(frozen=True)
class _Part:
    """A tensor of a layer: which block it belongs to, and the dimensions along its rows and columns that a cut shortens."""

    block: Literal["attention", "mlp"]
    rows: Dim | None = None
    cols: Dim | None = None


_PARTS = {
    "attn_norm": _Part("attention"),
    "attn_q": _Part("attention", rows="q"),
    "attn_k": _Part("attention", rows="kv"),
    "attn_v": _Part("attention", rows="kv"),
    "attn_output": _Part("attention", cols="q"),
    "attn_q_norm": _Part("attention"),
    "attn_k_norm": _Part("attention"),
    "post_attention_norm": _Part("attention"),
    "ffn_norm": _Part("mlp"),
    "ffn_gate": _Part("mlp", rows="ff"),
    "ffn_up": _Part("mlp", rows="ff"),
    "ffn_down": _Part("mlp", cols="ff"),
    "post_ffw_norm": _Part("mlp"),
}
_NAME = re.compile(r"blk\.(\d+)\.([a-z0-9_]+)\.(weight|bias)")


@dataclass(frozen=True)
class Replacement:
    """Other bytes for a tensor, of the shape that the cut gives it. chunks: as in `edgeq.gguf_write.TensorData`."""

    grid: Grid
    chunks: Callable[[], Iterable[Bytes]]


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What a cut has besides a prefix of every tensor.

    add: float32 biases by full name ("blk.3.ffn_down.bias"), in place of one that is there or as new ones; a callable gives them when
    their turn comes. replace: tensors whose bytes come from elsewhere, by name. fields: metadata to set, by key, after those of the source
    unless they are among them; None drops one.
    """

    add: Mapping[str, Floats | Callable[[], Floats]] = field(default_factory=dict)
    replace: Mapping[str, Replacement] = field(default_factory=dict)
    fields: Mapping[str, Field | None] = field(default_factory=dict)


NO_EXTRAS = Extras()


@dataclass(frozen=True)
class HeadPrefix:
    """Of the rows or columns of a tensor, each head has `full`, of which the first `kept` stay."""

    axis: Literal["rows", "columns"]
    full: int
    kept: int


@dataclass(frozen=True, kw_only=True)
class CutTensor:
    """A tensor of the result. source: where its prefix is copied from; chunks: where its bytes come from otherwise.

    heads: how the prefix is made where heads have become smaller; a bias is one row.
    """

    layout: TensorLayout
    source: TensorInfo | None = None
    chunks: Callable[[], Iterable[Bytes]] | None = None
    heads: HeadPrefix | None = None

    def runs(self) -> tuple[int, tuple[int, int], tuple[int, int]]:
        """Of a tensor with a source: how many units to copy, and (runs in a unit, bytes in a run) of the source and of the result.

        Of each unit the first runs stay, and of each run the first bytes.
        """
        assert self.source is not None
        wanted, row_bytes = self.layout.shape, self.layout.grid.row_bytes
        n_rows, row, kept_row = prod(wanted[:-1]), row_bytes(self.source.shape[-1]), row_bytes(wanted[-1])
        if self.heads is None:
            return n_rows, (1, row), (1, kept_row)
        full, kept = self.heads.full, self.heads.kept
        if self.heads.axis == "rows":
            return n_rows // kept, (1, full * row), (1, kept * row)
        return n_rows, (self.source.shape[-1] // full, row_bytes(full)), (wanted[-1] // kept, row_bytes(kept))


@dataclass(frozen=True, kw_only=True)
class CutPlan:
    """nbytes: exact size of the result. removed_fraction: of the parameters of all blocks (`blk.*`); what is added does not count."""

    source: Path
    fields: tuple[Field, ...]
    tensors: tuple[CutTensor, ...]
    alignment: int
    removed_fraction: float

    @property
    def nbytes(self) -> int:
        return predicted_bytes(self.fields, [t.layout for t in self.tensors], self.alignment)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes by layer that a header states. gqa: query heads per KV head, by layer (0 where there is no attention)."""

    arch: str
    head_dim: int
    n_ff: tuple[int, ...]
    n_kv: tuple[int, ...]
    gqa: tuple[int, ...]

    @property
    def layered(self) -> bool:
        return self.arch in LAYERED

    def dims(self, layer: int, *, n_ff: int, n_kv: int, head_dim: int) -> Mapping[Dim, int]:
        return {"q": n_kv * self.gqa[layer] * head_dim, "kv": n_kv * head_dim, "ff": n_ff}


def read_sizes(header: Header) -> Sizes:
    """Raises UnsupportedError for an architecture or file that is not cut, SourceError for sizes that contradict each other."""
    arch = header.value("general.architecture")
    if arch not in BIASES:
        raise UnsupportedError(
            f"{header.path}: architecture {arch!r} cannot be cut; {', '.join(BIASES)} can. Export the model with --elastic and cut that."
        )
    if header.value("split.count", 0):
        raise UnsupportedError(f"{header.path}: is one part of a split model. Join the parts with llama-gguf-split --merge first.")
    n_layers, head_dim = (_size(header, f"{arch}.{key}") for key in ("block_count", "attention.key_length"))
    n_ff, n_heads, n_kv = (_per_layer(header, f"{arch}.{key}", n_layers) for key in _SIZE_KEYS)
    for layer, (heads, groups) in enumerate(zip(n_heads, n_kv, strict=True)):
        if heads % groups if groups else heads:
            raise SourceError(
                f"{header.path}: layer {layer} has {heads} heads and {groups} kv heads, which do not go together. Export it again."
            )
    gqa = tuple(heads // groups if groups else 0 for heads, groups in zip(n_heads, n_kv, strict=True))
    return Sizes(arch=arch, head_dim=head_dim, n_ff=n_ff, n_kv=n_kv, gqa=gqa)


_SIZE_KEYS = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")


def plan_cut(header: Header, kept: Kept, extras: Extras = NO_EXTRAS) -> CutPlan:
    """Work out the cut; nothing but the header is read.

    Raises PlanError when what is to be kept (or added) does not fit the file, its blocks or llama.cpp; UnsupportedError and SourceError
    as `read_sizes`, and SourceError for tensors that contradict the sizes.
    """
    sizes = read_sizes(header)
    _check_kept(header.path, sizes, kept)
    if kept.head_dim is not None and kept.head_dim != sizes.head_dim:
        check_head_cut(header, sizes.arch, sizes.head_dim, kept.head_dim)
    tensors = tuple(_with_biases(header, sizes, _tensors(header, sizes, kept, extras.replace), extras.add))
    unused = sorted(extras.replace.keys() - {t.layout.name for t in tensors})
    if unused:
        raise PlanError(f"{unused[0]}: there is no such tensor in this cut of {header.path.name} to replace.")
    full = sum(prod(t.shape) for t in header.tensors.values() if t.name.startswith("blk."))
    left = sum(prod(t.layout.shape) for t in tensors if t.layout.name.startswith("blk.") and t.layout.name in header.tensors)
    return CutPlan(
        source=header.path,
        fields=tuple(_fields(header, sizes, kept, tensors, extras.fields)),
        tensors=tensors,
        alignment=header.alignment,
        removed_fraction=1 - left / full,
    )


def cut_bytes(header: Header, kept: Kept, extras: Extras = NO_EXTRAS) -> int:
    """Exact size of the file that a cut writes. Raises as `plan_cut`."""
    return plan_cut(header, kept, extras).nbytes


def _size(header: Header, key: str) -> int:
    value = header.value(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SourceError(f"{header.path}: {key} is {value!r}, expected a positive number. Export the model again.")
    return value


def _per_layer(header: Header, key: str, n_layers: int) -> tuple[int, ...]:
    value = header.value(key)
    if not isinstance(value, list):
        return (_size(header, key),) * n_layers
    if len(value) != n_layers or not all(isinstance(v, int) and v >= 0 for v in value):
        raise SourceError(f"{header.path}: {key} is {value!r}, expected {n_layers} numbers of at least 0. Export the model again.")
    return tuple(int(v) for v in value)


def _check_kept(path: Path, sizes: Sizes, kept: Kept) -> None:
    n_layers = len(sizes.n_ff)
    for what, keep, full in (("neurons", kept.n_ff, sizes.n_ff), ("kv heads", kept.n_kv, sizes.n_kv)):
        if len(keep) != n_layers:
            raise PlanError(f"{what} to keep are given for {len(keep)} layers, but {path.name} has {n_layers}. Give one number per layer.")
        for layer, (n, has) in enumerate(zip(keep, full, strict=True)):
            if not 0 <= n <= has:
                raise PlanError(f"layer {layer}: {n} {what} cannot be kept of {has}. Keep 0 to {has}.")
        if not sizes.layered and (min(keep) == 0 or len(set(keep)) > 1):
            raise PlanError(
                f"{what} to keep are {sorted(set(keep))}: llama.cpp's {sizes.arch} architecture has one number of {what} for all layers. "
                "Keep the same, and at least one, in every layer."
            )
    if kept.head_dims is not None:
        raise PlanError(
            f"head sizes {sorted(set(kept.head_dims))} by layer: llama.cpp has one for all layers. Keep the same in every layer."
        )
    if kept.n_kv[0] == 0:
        raise PlanError("layer 0: no kv heads are kept, but llama.cpp reads the head size there. Keep at least one.")
    if kept.n_ff[-1] == 0:
        raise PlanError(f"layer {n_layers - 1}: no neurons are kept in the last layer, where llama.cpp picks its outputs. Keep a block.")
    for layer, (n_ff, n_kv) in enumerate(zip(kept.n_ff, kept.n_kv, strict=True)):
        if n_kv and not n_ff:
            raise PlanError(
                f"layer {layer}: {n_kv} kv heads are kept and no neurons, but llama.cpp passes by a layer without neurons. Keep a block "
                "of neurons, or no kv heads either."
            )


def _tensors(header: Header, sizes: Sizes, kept: Kept, replace: Mapping[str, Replacement]) -> Iterator[CutTensor]:
    """What is left of every tensor of the source, in its order; rotary divisors that it did without come first."""
    head_dim = kept.head_dim or sizes.head_dim
    factors = head_factors(header, sizes.arch, sizes.head_dim, head_dim) if head_dim != sizes.head_dim else {}
    for name, (layout, chunks) in factors.items():
        if name not in header.tensors:
            yield CutTensor(layout=layout, chunks=chunks)
    for info in header.tensors.values():
        if info.name in factors:
            layout, chunks = factors[info.name]
            yield CutTensor(layout=layout, chunks=chunks)
            continue
        whole = CutTensor(layout=TensorLayout(info.name, info.shape, info.grid), source=info)
        if info.name in replace:
            whole = CutTensor(layout=TensorLayout(info.name, info.shape, replace[info.name].grid), chunks=replace[info.name].chunks)
        tensor = _cut_tensor(header, whole, sizes, kept) if info.name.startswith("blk.") else whole
        if tensor is not None:
            yield tensor


def _cut_tensor(header: Header, whole: CutTensor, sizes: Sizes, kept: Kept) -> CutTensor | None:
    """What is left of a tensor of a layer, given whole; None when its block goes."""
    name, full_shape, grid = whole.layout.name, whole.layout.shape, whole.layout.grid
    match = _NAME.fullmatch(name)
    layer = int(match[1]) if match else -1
    if match is None or match[2] not in _PARTS or layer >= len(sizes.n_ff):
        raise SourceError(f"{header.path}: tensor {name} is not one that an elastic export writes. Export the model again.")
    part, is_bias, head_dim = _PARTS[match[2]], match[3] == "bias", kept.head_dim or sizes.head_dim
    full = sizes.dims(layer, n_ff=sizes.n_ff[layer], n_kv=sizes.n_kv[layer], head_dim=sizes.head_dim)
    left = sizes.dims(layer, n_ff=kept.n_ff[layer], n_kv=kept.n_kv[layer], head_dim=head_dim)
    if (kept.n_kv if part.block == "attention" else kept.n_ff)[layer] == 0:
        return None
    shape, heads = list(full_shape), None
    for axis, dim in ((0, part.rows), (1, None if is_bias else part.cols)):
        if dim is None:
            continue
        if axis >= len(shape) or shape[axis] != full[dim] or len(shape) != 2 - is_bias:
            raise SourceError(
                f"{header.path}: tensor {name} has shape {list(full_shape)}, but the metadata says {full[dim]} "
                f"{'rows' if axis == 0 else 'columns'}. The file contradicts itself; export the model again."
            )
        shape[axis] = left[dim]
        if dim != "ff" and head_dim != sizes.head_dim:
            heads = HeadPrefix("columns" if axis or is_bias else "rows", sizes.head_dim, head_dim)
    if not grid.fits(shape[-1]):
        raise PlanError(_unfit(name, shape[-1], full_shape[-1], grid, part, group=sizes.gqa[layer] * head_dim))
    if whole.source is not None and heads is not None and heads.axis == "columns" and not (grid.fits(heads.full) and grid.fits(heads.kept)):
        raise PlanError(
            f"{name}: heads cut from {heads.full} to {heads.kept} columns do not divide into {grid.name} blocks of {grid.block_size}. "
            "Keep another head size, or export this tensor with smaller blocks."
        )
    return dataclasses.replace(whole, layout=TensorLayout(name, tuple(shape), grid), heads=heads)


def _unfit(name: str, n: int, full: int, grid: Grid, part: _Part, *, group: int) -> str:
    below, above = n - n % grid.block_size, n + -n % grid.block_size
    message = f"{name}: {n} of {full} columns do not divide into {grid.name} blocks of {grid.block_size}. "
    if part.cols == "q":
        return message + f"A kv head has {group} columns: keep another number of kv heads, or export this tensor with smaller blocks."
    return message + f"Keep {' or '.join(str(m) for m in (below, above) if 0 < m <= full)}."


def _with_biases(
    header: Header, sizes: Sizes, tensors: Iterable[CutTensor], add: Mapping[str, Floats | Callable[[], Floats]]
) -> Iterator[CutTensor]:
    """The same tensors with the biases of `add`: each in the place of its older self, else right after its weight."""
    left = dict(add)
    for tensor in tensors:
        if tensor.layout.name.endswith(".bias") and tensor.layout.name in left:
            values = left.pop(tensor.layout.name)
            yield _bias(tensor.layout.name, values, tensor.layout.shape[0])
            continue
        yield tensor
        stem, _, kind = tensor.layout.name.rpartition(".")
        bias = f"{stem}.bias"
        if kind == "weight" and bias in left and bias not in header.tensors:
            match = _NAME.fullmatch(bias)
            if match is None or match[2] not in BIASES[sizes.arch]:
                raise PlanError(f"{bias}: llama.cpp's {sizes.arch} architecture reads biases of {', '.join(BIASES[sizes.arch])} only.")
            yield _bias(bias, left.pop(bias), tensor.layout.shape[0])
    if left:
        raise PlanError(f"{min(left)}: this cut of {header.path.name} has no tensor that such a bias belongs to.")


def _bias(name: str, values: Floats | Callable[[], Floats], n: int) -> CutTensor:
    layout = TensorLayout(name, (n,), F32)
    if callable(values):
        later = values
        return CutTensor(layout=layout, chunks=lambda: [_packed_bias(name, later(), n)])
    packed = _packed_bias(name, values, n)
    return CutTensor(layout=layout, chunks=lambda: [packed])


def _packed_bias(name: str, values: Floats, n: int) -> Bytes:
    if values.shape != (n,):
        raise PlanError(f"{name}: {list(values.shape)} values are given, expected [{n}].")
    if not np.isfinite(values).all():
        raise PlanError(f"{name}: some values are not finite.")
    packed: Bytes = np.ascontiguousarray(values, dtype=np.float32).view(np.uint8)
    return packed


def _fields(header: Header, sizes: Sizes, kept: Kept, tensors: tuple[CutTensor, ...], given: Mapping[str, Field | None]) -> Iterator[Field]:
    """Metadata of the result: the source's bytes but for sizes, the size label if it was the source's size, and what is given."""
    n_heads = tuple(n * gqa for n, gqa in zip(kept.n_kv, sizes.gqa, strict=True))
    new: dict[str, Field | None] = {}
    for key, values in zip(_SIZE_KEYS, (kept.n_ff, n_heads, kept.n_kv), strict=True):
        name = f"{sizes.arch}.{key}"
        is_array = header.fields[name].type is ValueType.ARRAY
        new[name] = Field.i32s(name, values) if is_array else Field.u32(name, values[0])
    if kept.head_dim is not None and kept.head_dim != sizes.head_dim:
        new.update(head_fields(header, sizes.arch, sizes.head_dim, kept.head_dim))
    label = header.value("general.size_label")
    if label == size_label(sum(prod(t.shape) for t in header.tensors.values())):
        new["general.size_label"] = Field.string("general.size_label", size_label(sum(prod(t.layout.shape) for t in tensors)))
    new.update(given)
    for key, stated in header.fields.items():
        chosen = new.pop(key, stated)
        if chosen is not None:
            yield chosen
    yield from (f for f in new.values() if f is not None)


def size_label(n_values: int) -> str:
    """Number of values as model names have it, with two digits at least, as llama.cpp's converter writes it.

    >>> size_label(134_515_008), size_label(1_543_714_304), size_label(47_000)
    ('135M', '1.5B', '47K')
    """
    suffix, unit = next(((s, u) for s, u in (("T", 1e-12), ("B", 1e-9), ("M", 1e-6)) if n_values * u > 1), ("K", 1e-3))
    scaled = n_values * unit
    digits = len(str(round(scaled)).lstrip("0"))
    return f"{scaled:.{max(2 - digits, 0)}f}{suffix}"
