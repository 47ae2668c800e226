"""LoRA adapters in GGUF, as llama.cpp loads them (`llama_adapter_lora` in llama-adapter.cpp).

    general.type "adapter", general.architecture the model's, adapter.type "lora", adapter.lora.alpha (float, 0 or absent: no scaling)
    <tensor>.lora_a (rank, n_in), <tensor>.lora_b (n_out, rank); of token_embd.weight a is (n_vocab, rank) and b (n_embd, rank)

The strength is alpha / rank, with every pair's own rank, or 1 when alpha is 0. Rows of q and k come in the order of the model's
GGUF file and are put back into rotate-half order; pairs of fused tensors are cut by rows.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeq.base_fingerprint import GGUF_FIELD
from edgeq.converters.sources.gguf import rotate_half_rows
from edgeq.deltas.adapter import Adapter
from edgeq.deltas.delta import Delta, split_rows
from edgeq.deltas.lora import LoRA
from edgeq.errors import ShapeError, SourceError, UnsupportedError
from edgeq.families import GGUF_NAMES, Family, family
from edgeq.gguf_file import Header, read_header
from edgeq.model import Model
from edgeq.spec import Attention
from edgeq.tensors import check_finite, from_file

_PAIR = re.compile(r"(?P<name>.+)\.lora_(?P<half>[ab])")
_LAYER = re.compile(r"blk\.(?P<i>\d+)\.(?P<rest>.+)")


def read_gguf_lora(path: Path, model: Model, *, name: str | None = None) -> Adapter:
    """Read a GGUF adapter for this model. Raises SourceError, ShapeError or UnsupportedError naming file and tensor."""
    header = read_header(path)
    row = family(model.spec.family)
    alpha = _check_fields(header, row, model)
    halves: dict[str, dict[str, str]] = {}
    for tensor in header.tensors:
        match = _PAIR.fullmatch(tensor)
        if match is None:
            raise UnsupportedError(
                f"{path}: tensor {tensor} is neither lora_a nor lora_b. llama.cpp passes over such tensors or refuses them; edgeq does not "
                "know what it should change."
            )
        halves.setdefault(match["name"], {})[match["half"]] = tensor
    deltas: dict[str, Delta] = {}
    for target, pair in halves.items():
        if len(pair) < 2:
            missing = "lora_b" if "a" in pair else "lora_a"
            raise SourceError(f"{path}: {target}.{missing} is missing. The adapter is not complete: convert or download it again.")
        pieces, order = _target(target, model, row, path)
        for canonical, delta in split_rows(_lora(header, target, pair, alpha, pieces, order, model), pieces).items():
            deltas[canonical] = delta
    if not deltas:
        raise SourceError(f"{path}: the adapter has no tensors")
    base, fingerprint = (header.value(key) for key in ("general.base_model.0.name", GGUF_FIELD))
    return Adapter(
        name=name or path.stem,
        kind="LORA",
        deltas=deltas,
        files=(path,),
        base_name=base if isinstance(base, str) else None,
        base_fingerprint=fingerprint if isinstance(fingerprint, str) else None,
    )


def _check_fields(header: Header, row: Family, model: Model) -> float:
    """Everything the metadata may forbid; returns alpha, 0 where strength is 1."""
    path, kind, form = header.path, header.value("general.type"), header.value("adapter.type")
    if kind != "adapter":
        raise SourceError(f"{path}: general.type is {kind!r}, expected 'adapter'. This GGUF file is no adapter.")
    if form != "lora":
        raise UnsupportedError(f"{path}: adapter.type is {form!r}; supported: lora")
    arch = header.value("general.architecture")
    if arch not in (row.gguf_arch, row.gguf_layered):
        raise SourceError(
            f"{path}: the adapter is for architecture {arch!r}, {model.name} is {row.gguf_arch!r}. Use the adapter's own base model."
        )
    if header.value("adapter.alora.invocation_tokens"):
        raise UnsupportedError(f"{path}: the adapter acts from its invocation tokens on only (aLoRA), which no merged weight can")
    alpha = header.value("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float | int) or not np.isfinite(alpha):
        raise SourceError(f"{path}: adapter.lora.alpha is {alpha!r}, expected a number")
    return float(alpha)


def _target(target: str, model: Model, row: Family, path: Path) -> tuple[tuple[tuple[str, int], ...], npt.NDArray[np.intp] | None]:
    """Canonical tensors with their rows that a GGUF tensor stands for, and the order that brings its rows to ours (None: as they are)."""
    layer = _LAYER.fullmatch(target)
    stem = target.removesuffix(".weight")
    if layer is None:
        found = next((role for role in ("embed", "head") if GGUF_NAMES[role] == stem), None)
        if found and target.endswith(".weight"):
            return ((f"{found}.weight", model.spec.n_vocab),), None
    else:
        i = int(layer["i"])
        blocks = {type(b): b for b in model.spec.blocks if b.layer == i}
        role = next((r for r in ("wq", "wk", "wv", "wqkv", "wo", "gate", "up", "down") if GGUF_NAMES[r].format(i=i) == stem), None)
        if role and blocks and target.endswith(".weight"):
            roles = {"wqkv": ("wq", "wk", "wv"), "up": ("gate", "up") if row.fused_gate_up else ("up",)}.get(role, (role,))
            names = [f"layers.{i}.{r}.weight" for r in roles]
            if all(name in model.tensors for name in names):
                attention = blocks.get(Attention)
                order = None
                if row.gguf_rope == "norm" and role in ("wq", "wk") and isinstance(attention, Attention):
                    order = rotate_half_rows(attention.n_heads if role == "wq" else attention.n_kv_heads, attention.head_dim)
                return tuple((name, model.tensors[name].shape[0]) for name in names), order
    raise SourceError(f"{path}: the adapter changes {target}, which {model.name} does not have. Use the adapter's own base model.")


def _lora(
    header: Header,
    target: str,
    pair: dict[str, str],
    alpha: float,
    pieces: tuple[tuple[str, int], ...],
    order: npt.NDArray[np.intp] | None,
    model: Model,
) -> LoRA:
    a, b = (_values(header, pair[half]) for half in ("a", "b"))
    if target == f"{GGUF_NAMES['embed']}.weight":
        a, b = b.T, a
    first = model.tensors["embed.weight" if pieces[0][0] == "head.weight" and model.spec.tied else pieces[0][0]]
    shape = (sum(rows for _, rows in pieces), first.n_cols)
    if a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != shape:
        raise ShapeError(
            f"{header.path}: lora_a and lora_b of {target} are {list(header.tensors[pair['a']].shape)} and "
            f"{list(header.tensors[pair['b']].shape)}, which do not fit {model.name}, where it is {list(shape)}"
        )
    if order is not None:
        b = b[order]
    return LoRA(a=a, b=b, scale=alpha / len(a) if alpha else 1.0)


def _values(header: Header, name: str) -> npt.NDArray[np.float32]:
    info = header.tensors[name]
    if len(info.shape) != 2:
        raise ShapeError(f"{header.path}: {name} has shape {list(info.shape)}, expected a matrix")
    tensor = from_file(header.path, offset=info.offset, shape=info.shape, grid=info.grid, origin=f"{header.path}: {name}")
    values = tensor.decode()
    check_finite(values, origin=tensor.origin)
    return values
