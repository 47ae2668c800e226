"""Random LoRA adapters of models, without PEFT, and their files as llama.cpp runs them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from real_llama import all_logits

from edgeq import ports
from edgeq.converters.adapters.keep import KeptAdapter, sorted_factors
from edgeq.converters.adapters.sites import Site, model_sites
from edgeq.converters.gguf.carrier import write_model
from edgeq.converters.gguf.lowering import Lowered
from edgeq.converters.gguf.mixes import choose_grids
from edgeq.deltas.adapter import Adapter
from edgeq.deltas.delta import Delta
from edgeq.deltas.lora import LoRA
from edgeq.model import Model

IDS = np.random.default_rng(3).integers(3, 260, 60).tolist()
N_CTX = 256
# Kept and merged differ in the order of float32 sums: 5e-6 at most seen of logits of order 1, 2e-5 with rotated values.
# GELU is looked up in a table of F16 values.
TOLERANCE, TOLERANCE_GELU = 3e-5, 4e-3


def lora_deltas(site: Site, rank: int, rng: np.random.Generator, *, gain: float = 0.3) -> dict[str, Delta]:
    """A random LoRA on a module, with a scale that is no power of two."""
    n_out, n_in = site.matrix
    a, b = rng.standard_normal((rank, n_in)) / np.sqrt(n_in), rng.standard_normal((n_out, rank)) * gain / np.sqrt(rank)
    return site.tensors("weight", LoRA(a=a, b=b * 3, scale=1 / 3))


def made_adapter(
    model: Model, ranks: Sequence[int] = (2, 5, 3), *, seed: int = 0, only: Sequence[str] = (), outer: bool = False
) -> Adapter:
    """LoRA on every linear of every layer, of these ranks in turn. only: canonical roles to adapt. outer: on embedding and head too."""
    rng, rank = np.random.default_rng(seed), itertools.cycle(ranks)
    deltas: dict[str, Delta] = {}
    for site in model_sites(model.spec).values():
        stems = [stem for stem, _ in site.pieces]
        in_layer = stems[0].startswith("layers.")
        if site.kind == "norm" or (not in_layer and not outer):
            continue
        if in_layer and only and not any(stem.split(".")[2] in only for stem in stems):
            continue
        deltas |= lora_deltas(site, next(rank), rng)
    if only:
        deltas = {name: delta for name, delta in deltas.items() if not name.startswith("layers.") or name.split(".")[2] in only}
    return Adapter(name="made", kind="LORA", deltas=deltas, base_name="tiny/model")


def moved(model: Model, kept: KeptAdapter, *, seed: int = 4, heads: bool = False) -> tuple[Model, KeptAdapter]:
    """Model and adapter in a random order of channels and groups; with heads also of pairs, and with rotated values."""
    rng = np.random.default_rng(seed)
    spec = model.spec
    orders = [rng.permutation(ports.size(block)) for block in spec.blocks]
    more: dict[str, Any] = {}
    if heads:
        head_dim = spec.attention[0].head_dim
        shape = (spec.attention[0].n_kv_heads, head_dim, head_dim)
        more["pair_order"] = rng.permutation(head_dim // 2)
        more["rotations"] = {b.layer: np.linalg.qr(rng.standard_normal(shape))[0] for b in spec.attention}
    new, tensors = ports.apply(spec, model.tensors, orders, **more)
    factors = sorted_factors(spec, kept.factors, orders, **more)
    return dataclasses.replace(model, spec=new, tensors=tensors), dataclasses.replace(kept, factors=factors)


def write_base(path: Path, low: Lowered, quant: str = "F32") -> Path:
    write_model(path, low, choose_grids(quant, low, has_importance=False))
    return path


def run(files: Mapping[str, tuple[Path, Path | None]]) -> dict[str, npt.NDArray[np.float32]]:
    """Logits of each base, with an adapter beside it or without."""
    found = all_logits([base for base, _ in files.values()], IDS, n_ctx=N_CTX, adapters=[adapter for _, adapter in files.values()])
    return dict(zip(files, found, strict=True))


def difference(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    return float(np.abs(one - other).max())
