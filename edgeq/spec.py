"""What a model is, apart from its weights: sizes, blocks in order, rotary embedding, norm and scale constants.

A model is a sequence of residual blocks. Each block belongs to a layer (the number that tensor names carry) and is either an
attention or an MLP; state-space mixers will be a third kind. Sizes live on the blocks because a cut gives every layer its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from edgeq.errors import ShapeError
from edgeq.rope import RopeSpec

RopeUse = Literal["main", "local", "none"]


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query attention. window: tokens a query may look back, itself included; None means all.

    pairs: for each KV head, and the query heads that read it, the numbers of the rope's pairs that it turns, in its own order: pair j of
    the head is dimensions (j, j + n) of its first 2n. None: all pairs of the rope, in the rope's order, in every head.
    """

    layer: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: RopeUse = "main"
    window: int | None = None
    pairs: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if min(self.n_heads, self.n_kv_heads, self.head_dim) < 1:
            raise ShapeError(
                f"layer {self.layer}: heads {self.n_heads}, kv heads {self.n_kv_heads}, head_dim {self.head_dim} must all be positive"
            )
        if self.n_heads % self.n_kv_heads:
            raise ShapeError(f"layer {self.layer}: {self.n_heads} heads do not divide into {self.n_kv_heads} kv heads")
        if self.pairs is not None:
            counts = {len(own) for own in self.pairs}
            if len(self.pairs) != self.n_kv_heads or len(counts) != 1 or not 0 < 2 * max(counts) <= self.head_dim:
                raise ShapeError(
                    f"layer {self.layer}: RoPE pairs {[len(own) for own in self.pairs]} of its KV heads; expected one number of them, "
                    f"from 1 to {self.head_dim // 2}, for each of {self.n_kv_heads}"
                )


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """Gated MLP: down(act(gate x) * up x)."""

    layer: int
    n_ff: int

    def __post_init__(self) -> None:
        if self.n_ff < 1:
            raise ShapeError(f"layer {self.layer}: n_ff {self.n_ff} must be positive")


Block = Attention | Mlp


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Sizes and constants of one model.

    family: name of a row in `edgeq.families`. n_ctx: tokens the model was trained for. attn_scale multiplies q.k and goes by the
    heads that were trained: it stays when a cut makes them smaller. embed_scale multiplies token embeddings. rope_local is used by
    blocks whose `rope` is "local".
    biases: canonical tensor roles that carry a bias ("wq", "wo", "up", ...).
    """

    family: str
    n_embd: int
    n_vocab: int
    n_ctx: int
    blocks: tuple[Block, ...]
    rope: RopeSpec
    norm_eps: float
    tied: bool
    attn_scale: float
    embed_scale: float = 1.0
    rope_local: RopeSpec | None = None
    biases: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ShapeError("the model has no blocks")
        if min(self.n_embd, self.n_vocab, self.n_ctx) < 1:
            raise ShapeError(f"n_embd {self.n_embd}, n_vocab {self.n_vocab} and n_ctx {self.n_ctx} must all be positive")
        for block in self.attention:
            rope = self.rope_of(block)
            if block.rope == "local" and rope is None:
                raise ShapeError(f"layer {block.layer} uses local rope, but the spec has none")
            if rope is None:
                continue
            if block.pairs is None and rope.dim > block.head_dim:
                raise ShapeError(f"layer {block.layer}: rope dimension {rope.dim} exceeds head_dim {block.head_dim}")
            if block.pairs is not None and not all(0 <= pair < rope.dim // 2 for own in block.pairs for pair in own):
                raise ShapeError(f"layer {block.layer}: a RoPE pair is not one of 0 to {rope.dim // 2 - 1}")

    def rope_of(self, block: Attention) -> RopeSpec | None:
        """What a block's heads rotate by, None where they do not."""
        return {"main": self.rope, "local": self.rope_local, "none": None}[block.rope]

    def rope_dim(self, block: Attention) -> int:
        """Dimensions of a block's heads that turn."""
        return (self.rope_of(block) or self.rope).dim if block.pairs is None else 2 * len(block.pairs[0])

    def pairs_of(self, block: Attention) -> tuple[tuple[int, ...], ...]:
        """The rope's pairs that each KV head of a block turns, in its order."""
        return block.pairs or (tuple(range(self.rope_dim(block) // 2)),) * block.n_kv_heads

    @property
    def attention(self) -> tuple[Attention, ...]:
        return tuple(b for b in self.blocks if isinstance(b, Attention))

    @property
    def mlps(self) -> tuple[Mlp, ...]:
        return tuple(b for b in self.blocks if isinstance(b, Mlp))

    @property
    def n_layers(self) -> int:
        return 1 + max(b.layer for b in self.blocks)

    def layers(self) -> Iterator[tuple[int, tuple[Block, ...]]]:
        """(layer number, its blocks in order), in order."""
        for i in range(self.n_layers):
            yield i, tuple(b for b in self.blocks if b.layer == i)
