"""Models made in memory from a spec, for tests that need shapes and no training framework."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.converters.gguf.lowering import expected_shapes
from edgeq.families import family
from edgeq.grids import F16, F32, Grid
from edgeq.model import Model, Vocabulary
from edgeq.rope import RopeSpec
from edgeq.spec import Attention, Block, Mlp, ModelSpec
from edgeq.tensors import LazyTensor, from_values

N_VOCAB = 272


def made_spec(
    name: str = "llama",
    *,
    n_layers: int = 2,
    n_embd: int = 64,
    n_ff: int = 160,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_dim: int = 24,
    n_vocab: int = N_VOCAB,
    **changes: Any,
) -> ModelSpec:
    """A spec that the family's architecture accepts, unless `changes` say otherwise. gemma3: every third layer looks everywhere."""
    row = family(name)
    blocks: list[Block] = []
    for i in range(n_layers):
        windowed = name == "gemma3" and (i + 1) % 3 != 0
        use = "local" if windowed else "none" if name == "smollm3" and (i + 1) % 4 == 0 else "main"
        blocks.append(
            Attention(
                layer=i,
                n_heads=n_heads,
                n_kv_heads=n_kv_heads,
                head_dim=head_dim,
                rope=use,
                window=8 if windowed else None,  # type: ignore[arg-type]
            )
        )
        blocks.append(Mlp(layer=i, n_ff=n_ff))
    values: dict[str, Any] = {
        "family": name,
        "n_embd": n_embd,
        "n_vocab": n_vocab,
        "n_ctx": 256,
        "blocks": tuple(blocks),
        "rope": RopeSpec(dim=head_dim, base=10000.0),
        "rope_local": RopeSpec(dim=head_dim, base=5000.0) if name == "gemma3" else None,
        "norm_eps": 1e-5,
        "tied": False,
        "attn_scale": 1 / math.sqrt(head_dim),
        "embed_scale": math.sqrt(n_embd) if row.scaled_embedding else 1.0,
        "biases": frozenset({"wq", "wk", "wv"}) if row.qkv_bias == "yes" else frozenset(),
    }
    return ModelSpec(**values | changes)


@dataclass(frozen=True)
class MadeTokenizer:
    vocabulary: Vocabulary
    folder: Path | None = None

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        return [0 for _ in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.vocabulary.tokens[i] for i in ids)


def made_vocabulary(n_tokens: int = N_VOCAB) -> Vocabulary:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *(f"t{i}" for i in range(n_tokens - 259))]
    types = [2, 3, 3] + [6] * 256 + [1] * (n_tokens - 259)
    return Vocabulary(
        kind="spm",
        pre="default",
        tokens=tuple(tokens),
        types=tuple(types),
        scores=tuple(-float(i) for i in range(n_tokens)),
        special_ids={"bos": 1, "eos": 2, "unknown": 0},
    )


def made_model(spec: ModelSpec, *, seed: int | None = 0, name: str = "made", vocabulary: Vocabulary | None = None, **changes: Any) -> Model:
    """Random float32 tensors, or (seed None) zeros in F16 that take no memory."""
    generator = np.random.default_rng(seed)
    tensors = {
        key: _zeros(shape, origin=key)
        if seed is None
        else from_values(generator.standard_normal(shape, dtype=np.float32) / math.sqrt(shape[-1]), origin=f"made: {key}")
        for key, shape in expected_shapes(spec).items()
    }
    tokenizer = MadeTokenizer(vocabulary or made_vocabulary(spec.n_vocab))
    return Model(name=name, spec=spec, tensors=tensors | changes.pop("tensors", {}), tokenizer=tokenizer, files=(), format="hf", **changes)


def _zeros(shape: tuple[int, ...], *, origin: str) -> LazyTensor:
    grid: Grid = F32 if len(shape) == 1 else F16
    row_bytes = grid.row_bytes(shape[-1])
    return LazyTensor(shape=shape, grid=grid, read=lambda a, b: np.zeros((b - a, row_bytes), np.uint8), origin=origin)
