"""Which grid every tensor gets: the quantization mixes of llama.cpp.

A quant name is a grid for most weight matrices plus rules that give some tensors more bits. The rules are those of llama-quantize
(`src/llama-quant.cpp` of llama.cpp, version 0.3.36 of llama-cpp-python), so that a file of ours has the size and the speed that people
expect of the name; a test compares every tensor of every quant with `llama_model_quantize`.

What holds for all of them:
- vectors (norms, biases, rope factors) keep the grid they came in, F32 unless the source says otherwise;
- `output.weight`, or `token_embd.weight` when the head is tied to it, gets Q6_K (Q8_0 in Q8_0 and MXFP4); an untied `token_embd.weight`
  gets the base grid;
- rows that do not divide into a grid's blocks fall back to a grid of 32: Q4_K to Q5_0, Q5_K to Q5_1, Q6_K to Q8_0, Q2_K and Q3_K to Q4_0,
  IQ4_XS to IQ4_NL; rows that do not divide into 32 become F16;
- with importance, Q4_0 and Q5_0 give the first eighth of the down projections Q4_1 and Q5_1; without it, IQ4_NL and IQ4_XS give those Q5_K.

Names that are also block types mean llama-quantize's file type of that name, with exceptions. `Q3_K`, `Q4_K` and `Q5_K` are the plain
block type for every block matrix (llama-quantize takes those words as short for the `_M` mixes): `Q3_K` equals `Q3_K_S` and `Q5_K` equals
`Q5_K_S`. `MXFP4` is for dense models here: all block matrices MXFP4, embedding and head Q8_0 (llama-quantize's MXFP4_MOE leaves dense
matrices in Q8_0).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgeq.converters.gguf.lowering import CarrierTensor, Lowered
from edgeq.errors import UnsupportedError
from edgeq.grids import F16, Grid, grid


@dataclass(frozen=True)
class Quant:
    """base: grid of block matrices that no rule names. file_type: `general.file_type`, an LLAMA_FTYPE id of llama.h."""

    name: str
    base: Grid
    file_type: int


QUANTS = {
    name: Quant(name, grid(base), file_type)
    for name, base, file_type in (
        ("F32", "F32", 0),
        ("F16", "F16", 1),
        ("BF16", "BF16", 32),
        ("Q8_0", "Q8_0", 7),
        ("Q6_K", "Q6_K", 18),
        ("Q5_K", "Q5_K", 16),
        ("Q5_K_M", "Q5_K", 17),
        ("Q5_K_S", "Q5_K", 16),
        ("Q5_1", "Q5_1", 9),
        ("Q5_0", "Q5_0", 8),
        ("Q4_K", "Q4_K", 14),
        ("Q4_K_M", "Q4_K", 15),
        ("Q4_K_S", "Q4_K", 14),
        ("Q4_1", "Q4_1", 3),
        ("Q4_0", "Q4_0", 2),
        ("IQ4_NL", "IQ4_NL", 25),
        ("IQ4_XS", "IQ4_XS", 30),
        ("MXFP4", "MXFP4", 38),
        ("Q3_K", "Q3_K", 11),
        ("Q3_K_L", "Q3_K", 13),
        ("Q3_K_M", "Q3_K", 12),
        ("Q3_K_S", "Q3_K", 11),
        ("Q2_K", "Q2_K", 10),
    )
}

_FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
# Roles whose values llama-quantize treats as attention values: a fused projection contains them.
_VALUE_ROLES = ("wv", "wqkv")


def quant(name: str) -> Quant:
    try:
        return QUANTS[name]
    except KeyError:
        raise UnsupportedError(f"unknown quantization {name!r}; known: {', '.join(QUANTS)}") from None


def choose_grids(name: str, lowered: Lowered, *, has_importance: bool) -> dict[str, Grid]:
    """Grid of every tensor by GGUF name, for the quant of that name. has_importance: an importance matrix will be used."""
    wanted = _wanted(quant(name), lowered, has_importance)
    return {t.name: _fitting(wanted[t.name], t.tensor.n_cols) for t in lowered.tensors}


def fallback_notes(name: str, lowered: Lowered, *, has_importance: bool) -> tuple[str, ...]:
    """One sentence per tensor (the first of its role) whose rows do not divide into the blocks of the grid that the quant wants."""
    wanted = _wanted(quant(name), lowered, has_importance)
    notes: dict[tuple[str, Grid], str] = {}
    for t in lowered.tensors:
        want, n_cols = wanted[t.name], t.tensor.n_cols
        if not want.fits(n_cols):
            got = _fitting(want, n_cols)
            notes.setdefault(
                (t.role, want),
                f"{t.name}: rows of {n_cols} values do not divide into {want.name} blocks of {want.block_size}; "
                f"it and others like it are written as {got.name}.",
            )
    return tuple(notes.values())


def file_type(lowered: Lowered, grids: Mapping[str, Grid]) -> int:
    """`general.file_type` for these grids: the quant that gives exactly them, else that of the most common grid among the weights."""
    for name, row in QUANTS.items():
        if any(choose_grids(name, lowered, has_importance=has) == dict(grids) for has in (False, True)):
            return row.file_type
    matrices = [t for t in lowered.tensors if len(t.tensor.shape) == 2]
    sizes: Counter[str] = Counter()
    for t in matrices:
        sizes[grids[t.name].name] += t.tensor.n_rows * t.tensor.n_cols
    common = sizes.most_common(1)[0][0]
    return QUANTS[common].file_type if common in QUANTS else 0


def _wanted(row: Quant, lowered: Lowered, has_importance: bool) -> dict[str, Grid]:
    """Grids before shapes are looked at."""
    matrices = [t for t in lowered.tensors if len(t.tensor.shape) == 2]
    tied = all(t.role != "head" for t in matrices)
    values, downs = (_ranks(t for t in matrices if t.role in roles) for roles in (_VALUE_ROLES, ("down",)))
    attention = lowered.spec.attention[0]
    gqa = attention.n_heads // attention.n_kv_heads
    wanted = {}
    for t in lowered.tensors:
        if len(t.tensor.shape) != 2:
            chosen = t.tensor.grid
        elif row.base.is_float:
            chosen = row.base
        elif t.role == "head" or (tied and t.role == "embed"):
            chosen = _output_grid(row, t.tensor.n_cols)
        elif t.role == "embed":
            chosen = grid("Q8_0") if row.name == "MXFP4" else row.base
        elif t.role in _VALUE_ROLES:
            chosen = _value_grid(row, values[t.name], len(values), gqa, _is_70b(lowered))
        elif t.role == "down":
            # importance is for encoding: what is in the base grid already has nothing to gain from a finer one
            to_encode = has_importance and t.tensor.grid != row.base
            chosen = _down_grid(row, downs[t.name], lowered.spec.n_layers, to_encode)
        elif t.role == "wo":
            chosen = grid({"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(row.name, row.base.name))
        else:
            chosen = row.base
        wanted[t.name] = chosen
    return wanted


def _output_grid(row: Quant, n_cols: int) -> Grid:
    if row.name in ("Q8_0", "MXFP4") or not row.base.fits(n_cols):
        return grid("Q8_0")
    return grid("Q6_K")


def _value_grid(row: Quant, i: int, n: int, gqa: int, is_70b: bool) -> Grid:
    chosen = row.base.name
    if row.name == "Q2_K":
        chosen = "Q4_K" if gqa >= 4 else "Q3_K"
    elif row.name == "Q3_K_M":
        chosen = "Q5_K" if i < 2 else "Q4_K"
    elif row.name == "Q3_K_L" or (row.name in ("IQ4_NL", "IQ4_XS") and gqa >= 4):
        chosen = "Q5_K"
    elif row.name in ("Q4_K_M", "Q5_K_M") and _more_bits(i, n):
        chosen = "Q6_K"
    elif row.name == "Q4_K_S" and i < 4:
        chosen = "Q5_K"
    if is_70b and chosen in ("Q3_K", "Q4_K"):
        chosen = "Q5_K"
    return grid(chosen)


def _down_grid(row: Quant, i: int, n: int, has_importance: bool) -> Grid:
    chosen = row.base.name
    first_eighth = i < n // 8
    if row.name == "Q2_K":
        chosen = "Q3_K"
    elif row.name == "Q3_K_M":
        chosen = "Q5_K" if i < n // 16 else "Q4_K"
    elif row.name == "Q3_K_L" or (row.name == "Q4_K_S" and first_eighth):
        chosen = "Q5_K"
    elif row.name in ("Q4_K_M", "Q5_K_M") and _more_bits(i, n):
        chosen = "Q6_K"
    elif row.name in ("IQ4_NL", "IQ4_XS") and first_eighth and not has_importance:
        chosen = "Q5_K"
    elif row.name in ("Q4_0", "Q5_0") and first_eighth and has_importance:
        chosen = {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[row.name]
    return grid(chosen)


def _more_bits(i: int, n: int) -> bool:
    """The first and last eighth of the layers, and every third between them."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _is_70b(lowered: Lowered) -> bool:
    """What llama.cpp takes for a model of 70B, where eight heads share their values: 80 layers in these architectures."""
    attention = lowered.spec.attention[0]
    grouped = attention.n_heads != attention.n_kv_heads
    return lowered.spec.n_layers == 80 and (lowered.arch in ("qwen2", "deci") or (lowered.arch == "llama" and grouped))


def _ranks(tensors: Iterable[CarrierTensor]) -> dict[str, int]:
    """Position of each tensor among its like, in layer order (llama-quantize counts so)."""
    by_layer: Sequence[CarrierTensor] = sorted(tensors, key=lambda t: -1 if t.layer is None else t.layer)
    return {t.name: i for i, t in enumerate(by_layer)}


def _fitting(want: Grid, n_cols: int) -> Grid:
    if want.fits(n_cols):
        return want
    instead = grid(_FALLBACKS.get(want.name, want.name))
    return instead if instead.fits(n_cols) else F16


def finer_grid(wanted: Grid, n_cols: int) -> Grid | None:
    """The grid of smaller blocks, and no fewer bits, for rows that are to be cut by `n_cols` columns; None if there is none or no need."""
    if wanted.fits(n_cols) or wanted.name not in _FALLBACKS:
        return None
    finer = grid(_FALLBACKS[wanted.name])
    return finer if finer.fits(n_cols) else None
