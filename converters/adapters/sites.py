"""The modules of a model as transformers names them, and which canonical tensors each stands for.

Adapter files speak of modules ("model.layers.3.self_attn.q_proj"), edgeq of tensors ("layers.3.wq.weight"). A fused projection is one
module and several tensors. Order is that of `named_modules()`, which some kinds number their modules by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from edgeq.converters.sources.hf_tensors import role_shapes
from edgeq.deltas.delta import Delta, split_rows
from edgeq.families import Family, family
from edgeq.spec import Attention, Block, ModelSpec

ModuleKind = Literal["linear", "embedding", "norm"]
# Where the body of a model lies: alone, and inside the wrappers that transformers puts around text models with other senses.
BODIES = ("model.", "model.language_model.", "language_model.model.")
_HEADS = {"model.": "lm_head", "model.language_model.": "lm_head", "language_model.model.": "language_model.lm_head"}


@dataclass(frozen=True, kw_only=True)
class Site:
    """One module. pieces: canonical stems with their rows, in order. n_in: columns, None for norms. offset: see `Family.norm_offset`."""

    path: str
    kind: ModuleKind
    pieces: tuple[tuple[str, int], ...]
    n_in: int | None = None
    has_bias: bool = False
    offset: float = 0.0

    @property
    def n_out(self) -> int:
        return sum(rows for _, rows in self.pieces)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the module's weight, in canonical layout; an embedding is (n_vocab, n_embd)."""
        return (self.n_out,) if self.n_in is None else (self.n_out, self.n_in)

    @property
    def matrix(self) -> tuple[int, int]:
        assert self.n_in is not None, f"{self.path} has no matrix"
        return (self.n_out, self.n_in)

    def tensors(self, suffix: str, delta: Delta) -> dict[str, Delta]:
        """The delta on this module's weight or bias, by canonical tensor name."""
        return split_rows(delta, tuple((f"{stem}.{suffix}", rows) for stem, rows in self.pieces))


def model_sites(spec: ModelSpec, body: str = "model.") -> dict[str, Site]:
    """Every module with weights, by path. body: one of BODIES."""
    row = family(spec.family)
    found = [Site(path=f"{body}embed_tokens", kind="embedding", pieces=(("embed", spec.n_vocab),), n_in=spec.n_embd)]
    for _, blocks in spec.layers():
        found += [site for block in blocks for site in _linears(spec, row, block, body)]
        found += [site for block in blocks for site in _norms(spec, row, block, body)]
    found.append(_norm(row, "final_norm", "final_norm", spec.n_embd, f"{body}{row.hf_name('final_norm')}"))
    found.append(Site(path=_HEADS[body], kind="linear", pieces=(("head", spec.n_vocab),), n_in=spec.n_embd))
    return {site.path: site for site in found}


def _linears(spec: ModelSpec, row: Family, block: Block, body: str) -> Iterator[Site]:
    groups: Mapping[str, tuple[str, ...]]
    if isinstance(block, Attention):
        # Phi-3 registers the output projection first
        groups = {"wo": ("wo",), "wqkv": ("wq", "wk", "wv")} if row.fused_qkv else {r: (r,) for r in ("wq", "wk", "wv", "wo")}
    else:
        groups = {"gate_up": ("gate", "up"), "down": ("down",)} if row.fused_gate_up else {r: (r,) for r in ("gate", "up", "down")}
    shapes = role_shapes(spec, block)
    for name, roles in groups.items():
        yield Site(
            path=body + row.hf_name(name).format(i=block.layer),
            kind="linear",
            pieces=tuple((f"layers.{block.layer}.{role}", shapes[role][0]) for role in roles),
            n_in=shapes[roles[0]][1],
            has_bias=roles[0] in spec.biases,
        )


def _norms(spec: ModelSpec, row: Family, block: Block, body: str) -> Iterator[Site]:
    for role, shape in role_shapes(spec, block).items():
        if role.endswith("norm") and role in row.roles:
            yield _norm(row, role, f"layers.{block.layer}.{role}", shape[0], body + row.hf_name(role).format(i=block.layer))


def _norm(row: Family, role: str, stem: str, n: int, path: str) -> Site:
    return Site(path=path, kind="norm", pieces=((stem, n),), offset=row.norm_offset if role.endswith("norm") else 0.0)
