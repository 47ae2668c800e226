"""Writing an adapter as the GGUF LoRA file that stock llama.cpp loads beside the model (`llama_adapter_lora` in llama-adapter.cpp).

    general.type "adapter", general.architecture the base file's, adapter.type "lora", adapter.lora.alpha
    <tensor>.lora_a (rank, n_in), <tensor>.lora_b (n_out, rank); of token_embd.weight a is (n_vocab, rank) and b (n_embd, rank)

llama.cpp multiplies b @ a by alpha over the pair's own rank, or by 1 when alpha is 0. All strength is in b here, so alpha is 0 where ranks
differ, and where they do not it is the rank, which comes to 1 for every reader. Rows of b follow the base file: those of q and k by pairs,
those of a fused tensor below each other (`edgeq.low_rank.stacked`), all of them divided or moved as the base's own rows were.

F16 and Q8_0 lose little when numbers are of one size: a direction may be made stronger in a and weaker in b by any factor, and a power of
two changes nothing else. So every column of b is brought to the same order, that of the strongest change's square root.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from edgeq.base_fingerprint import GGUF_FIELD
from edgeq.converters.adapters.keep import KeptAdapter
from edgeq.converters.gguf.architectures import Arch, arch_for
from edgeq.converters.gguf.encode import encode_rows
from edgeq.converters.gguf.lowering import Lowered, laid_out
from edgeq.deltas.delta import Array, Factors, f64
from edgeq.errors import PlanError, UnsupportedError
from edgeq.families import FUSED, family
from edgeq.gguf_fields import Field
from edgeq.gguf_write import TensorData, Written, predicted_bytes, write_gguf
from edgeq.grids import F16, F32, Grid
from edgeq.low_rank import stacked
from edgeq.output import check_disk, staged_file
from edgeq.progress import Progress, silent
from edgeq.spec import Attention
from edgeq.tensors import Bytes, from_values

GRIDS_OF_FACTORS = ("F32", "F16", "Q8_0")


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraPair:
    """Factors as they will stand in the file. name: of the base file's tensor. flipped: directions are the columns of a (embedding)."""

    name: str
    a: Array
    b: Array
    flipped: bool = False

    @property
    def rank(self) -> int:
        return self.b.shape[1]


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """What `write_lora` will write. nbytes: exact size."""

    fields: tuple[Field, ...]
    tensors: tuple[TensorData, ...]

    @property
    def nbytes(self) -> int:
        return predicted_bytes(self.fields, self.tensors)


def lowered_pairs(factors: Mapping[str, Factors], lowered: Lowered) -> tuple[LoraPair, ...]:
    """Factors by canonical name, of the model that was lowered (sorted, if that was), as pairs for its file, in the file's order.

    Raises UnsupportedError for a tensor that the file does not have.
    """
    spec = lowered.spec
    arch = arch_for(spec, elastic=lowered.arch == family(spec.family).gguf_layered)
    left = dict(factors)
    pairs = []
    for tensor in lowered.tensors:
        stem = "" if tensor.layer is None else f"layers.{tensor.layer}."
        names = [f"{stem}{role}.weight" for role in FUSED.get(tensor.role, (tensor.role,))]
        if not any(name in left for name in names):
            continue
        found = [left.pop(name, None) for name in names]
        attention = next((b for b in spec.attention if b.layer == tensor.layer), None)
        moved = [_laid_out(part, name, attention, lowered, arch) for part, name in zip(found, names, strict=True)]
        whole = moved[0] if len(moved) == 1 and moved[0] is not None else stacked(list(zip(_rows(lowered, names), moved, strict=True)))
        if tensor.role == "embed":
            pairs.append(LoraPair(name=tensor.name, a=whole.b, b=whole.a.T, flipped=True))
        else:
            pairs.append(LoraPair(name=tensor.name, a=whole.a, b=whole.b))
    if left:
        raise UnsupportedError(f"the adapter changes {min(left)}, for which the base file has no tensor. Export adapter and base together.")
    return tuple(pairs)


def _laid_out(factors: Factors | None, name: str, attention: Attention | None, lowered: Lowered, arch: Arch) -> Factors | None:
    """b with its rows as the base file has those of the weight."""
    role = name.split(".")[-2]
    if factors is None or role not in ("wq", "wk"):
        return factors
    b = laid_out(from_values(factors.b, origin=name), role, attention, lowered.spec, arch)
    return Factors(a=factors.a, b=f64(b.decode()))


def _rows(lowered: Lowered, names: list[str]) -> list[int]:
    """Rows of the parts of a fused tensor."""
    layer = int(names[0].split(".")[1])
    attention = next((b for b in lowered.spec.attention if b.layer == layer), None)
    mlp = next((b for b in lowered.spec.mlps if b.layer == layer), None)
    rows = {} if mlp is None else {"gate": mlp.n_ff, "up": mlp.n_ff}
    if attention is not None:
        kv = attention.n_kv_heads * attention.head_dim
        rows |= {"wq": attention.n_heads * attention.head_dim, "wk": kv, "wv": kv}
    return [rows[name.split(".")[2]] for name in names]


def plan_lora(adapter: KeptAdapter, lowered: Lowered, grid: Grid = F16) -> LoraFile:
    """What the file will hold. adapter: factors on the lowered model. grid: F32, F16 or Q8_0, where rows that do not divide into its
    blocks, such as those of b at a rank below 32, become F16.

    Raises PlanError for another grid or an adapter without factors, UnsupportedError as `lowered_pairs`.
    """
    if grid.name not in GRIDS_OF_FACTORS:
        raise PlanError(f"adapters cannot be written in {grid.name}; choose one of {', '.join(GRIDS_OF_FACTORS)}")
    pairs = lowered_pairs(adapter.factors, lowered)
    if not pairs:
        raise PlanError(f"adapter {adapter.name!r} changes nothing")
    ranks = {pair.rank for pair in pairs}
    fields = [
        Field.string("general.architecture", lowered.arch),
        Field.string("general.type", "adapter"),
        Field.string("general.name", adapter.name),
        Field.string("adapter.type", "lora"),
        Field.f32("adapter.lora.alpha", float(ranks.pop()) if len(ranks) == 1 else 0.0),
    ]
    if adapter.base_name:
        fields += [Field.u32("general.base_model.count", 1), Field.string("general.base_model.0.name", adapter.base_name)]
    if adapter.base_fingerprint:
        fields.append(Field.string(GGUF_FIELD, adapter.base_fingerprint))
    return LoraFile(fields=tuple(fields), tensors=tuple(tensor for pair in pairs for tensor in _tensors(pair, grid)))


def write_lora(
    path: Path, adapter: KeptAdapter, lowered: Lowered, *, grid: Grid = F16, force: bool = False, progress: Progress = silent
) -> Written:
    """Write the adapter for the file that `lowered` becomes; the file is whole or absent. Raises as `plan_lora`, and OutputError."""
    plan = plan_lora(adapter, lowered, grid)
    with staged_file(path, force=force) as stage:
        check_disk(path, plan.nbytes)
        return write_gguf(stage, plan.fields, plan.tensors, progress=progress)


def _tensors(pair: LoraPair, grid: Grid) -> Iterator[TensorData]:
    even = pair if grid is F32 else balanced(pair)
    for half, values in (("a", even.a), ("b", even.b)):
        own = grid if grid.fits(values.shape[1]) else F16
        name = f"{pair.name}.lora_{half}"
        shape = (values.shape[0], values.shape[1])
        yield TensorData(name, shape, own, partial(_packed, values, own, name))


def _packed(values: Array, grid: Grid, name: str) -> list[Bytes]:
    return [encode_rows(np.ascontiguousarray(values, dtype=np.float32), grid, origin=name)]


def balanced(pair: LoraPair) -> LoraPair:
    """The same product, every direction of b of one order of magnitude."""
    a = pair.a.T if pair.flipped else pair.a
    size_a, size_b = np.abs(a).max(axis=1), np.abs(pair.b).max(axis=0)
    alive = (size_a > 0) & (size_b > 0)
    if not alive.any():
        return pair
    wanted = np.sqrt((size_a * size_b)[alive].max())
    factor = np.ones(pair.rank)
    factor[alive] = np.exp2(np.round(np.log2(wanted / size_b[alive])))
    a = a / factor[:, None]
    return replace(pair, a=a.T if pair.flipped else a, b=pair.b * factor)
