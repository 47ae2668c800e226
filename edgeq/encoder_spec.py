"""What an encoder embedding model is, apart from its weights: BERT and its relatives, and what makes one vector of a text's tokens.

A layer is attention of all tokens to all tokens, then an MLP without gate; each adds to what came in, and a LayerNorm follows each (Devlin
et al. 2018, arXiv:1810.04805). Canonical tensors, matrices (n_out, n_in):

    embed.weight (n_vocab, n_embd)   positions.weight (n_positions, n_embd)   types.weight (n_types, n_embd)   embed_norm.{weight,bias}
    layers.I.{wq,wk,wv,wo,up,down}.{weight,bias}   layers.I.{attn_norm,mlp_norm}.{weight,bias}
    relative.weight (n_buckets, n_heads)            MPNet: what attention adds by distance
    dense.{weight,bias}                             what follows pooling in some sentence-transformers models
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgeq.errors import PackageError, ShapeError
from edgeq.tensors import LazyTensor

Activation = Literal["gelu", "gelu_tanh", "relu"]
Pooling = Literal["cls", "max", "mean", "mean_sqrt_len"]
POOLINGS: tuple[Pooling, ...] = ("cls", "max", "mean", "mean_sqrt_len")  # in the order in which sentence-transformers joins them
DenseActivation = Literal["identity", "tanh"]

# Linear layers by what they read; within a group they read the same.
LINEARS = (("wq", "wk", "wv"), ("wo",), ("up",), ("down",))


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Sizes and constants of an encoder.

    family: the row that read it ("bert", "roberta", ...). activation: of the MLP; "gelu" is the exact one. padding_id: the padding token.
    counts_positions: positions number the tokens that are not padding, from padding_id + 1 (RoBERTa); else places, from 0. n_types: kinds
    of segments that tokens may belong to; 0 where the model has none. n_buckets: of distances, for MPNet's relative attention; 0 without.
    """

    family: str
    n_layers: int
    n_embd: int
    n_heads: int
    n_ff: int
    n_vocab: int
    n_positions: int
    n_types: int
    norm_eps: float
    activation: Activation
    padding_id: int
    counts_positions: bool
    n_buckets: int = 0

    def __post_init__(self) -> None:
        if min(self.n_layers, self.n_embd, self.n_heads, self.n_ff, self.n_vocab, self.n_positions) < 1:
            raise ShapeError(f"every size of an encoder must be positive: {asdict(self)}")
        if self.n_embd % self.n_heads:
            raise ShapeError(f"hidden size {self.n_embd} does not divide into {self.n_heads} heads")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_heads

    @property
    def n_ctx(self) -> int:
        """Tokens of the longest text that there are positions for."""
        return self.n_positions - (self.padding_id + 1 if self.counts_positions else 0)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by canonical name, in the order of the network; without `dense`, which is not the encoder's."""
        n, ff = self.n_embd, self.n_ff
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (self.n_vocab, n), "positions.weight": (self.n_positions, n)}
        if self.n_types:
            shapes["types.weight"] = (self.n_types, n)
        shapes |= {"embed_norm.weight": (n,), "embed_norm.bias": (n,)}
        if self.n_buckets:
            shapes["relative.weight"] = (self.n_buckets, self.n_heads)
        linears = {"wq": (n, n), "wk": (n, n), "wv": (n, n), "wo": (n, n), "up": (ff, n), "down": (n, ff)}
        for i in range(self.n_layers):
            for role, shape in linears.items():
                shapes |= {f"layers.{i}.{role}.weight": shape, f"layers.{i}.{role}.bias": shape[:1]}
            for norm in ("attn_norm", "mlp_norm"):
                shapes |= {f"layers.{i}.{norm}.weight": (n,), f"layers.{i}.{norm}.bias": (n,)}
        return shapes


@dataclass(frozen=True, kw_only=True)
class SentenceSpec:
    """How a text becomes one vector, as sentence-transformers defines it.

    pooling: of the tokens' vectors, joined in this order when there are several. dense: activation of the linear layer that follows, None
    without one. normalize: to length 1. max_tokens: texts are cut there, special tokens included. lowercase: before tokenizing. prompts: by
    name, put before texts. assumed: nothing says how to pool, so it is the mean, as sentence-transformers assumes too.
    """

    pooling: tuple[Pooling, ...]
    normalize: bool
    max_tokens: int
    n_out: int
    dense: DenseActivation | None = None
    lowercase: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    assumed: bool = False

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "pooling": list(self.pooling)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> SentenceSpec:
        """Raises PackageError when a field is missing, unknown or of another kind."""
        try:
            spec = cls(**{**document, "pooling": tuple(document["pooling"])})
            wrong: list[str] = [name for name in spec.pooling if name not in POOLINGS]
            wrong += ["max_tokens"] if spec.max_tokens < 1 else []
        except (KeyError, TypeError) as err:
            raise PackageError(
                f"the manifest's sentence section lacks or misspells {err}. The package is damaged; export it again."
            ) from err
        if wrong:
            raise PackageError(f"the manifest's sentence section has a value that is not known: {wrong[0]}. Use the edgeq that wrote it.")
        return spec


@dataclass(frozen=True, kw_only=True)
class EncoderModel:
    """A source, opened. Nothing but headers has been read.

    tensors: under canonical names. files: everything it was read from. beside: small files that a sentence-transformers folder has, by
    their path in it, which an exported folder carries on. graph: the ONNX file it came from, None for a Hugging Face folder.
    """

    name: str
    spec: EncoderSpec
    sentence: SentenceSpec
    tensors: Mapping[str, LazyTensor]
    tokenizer: Path
    files: tuple[Path, ...]
    beside: Mapping[str, Path]
    graph: Path | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def relative_buckets(n_tokens: int, n_buckets: int, *, most: int = 128) -> npt.NDArray[np.int64]:
    """Bucket of every pair of places, int64 (n_tokens, n_tokens): row i, column j is that of the distance j - i.

    Half of the buckets for each direction; of these half count tokens one by one, the rest grows to `most` in equal ratios. Raffel et al.
    2020, arXiv:1910.10683, as MPNet uses it.
    """
    distance = np.arange(n_tokens)[None, :] - np.arange(n_tokens)[:, None]
    half = n_buckets // 2
    exact = half // 2
    far = np.abs(distance).astype(np.float32)
    with np.errstate(divide="ignore"):
        grown = exact + (np.log(far / np.float32(exact)) / np.float32(np.log(most / exact)) * (half - exact)).astype(np.float32)
    bucket = np.where(far < exact, far, np.minimum(np.trunc(np.maximum(grown, 0)), half - 1)).astype(np.int64)
    return bucket + np.where(distance > 0, half, 0)
