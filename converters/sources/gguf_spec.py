"""GGUF metadata to ModelSpec, with the defaults and the silent rules of llama.cpp's loader.

A GGUF file says less than it means: the loader fills in head sizes and rotary bases, and per architecture it hard-codes which layers
rotate, which look through a window and how attention is scaled. What we read must be what the stock runtime computes, so those
rules stand here as rows. Source: llama-model.cpp (load_hparams), src/models/*.cpp and llama-context.cpp of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from edgeq.errors import ShapeError, SourceError, UnsupportedError
from edgeq.families import Family
from edgeq.gguf_file import Header
from edgeq.rope import RopeSpec
from edgeq.spec import Attention, Block, Mlp, ModelSpec, RopeUse

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS; llama.cpp dies beyond it

# Values of a one-dimensional tensor of n numbers, or None when the file does not have it.
Vector = Callable[[str, int], tuple[float, ...] | None]


@dataclass(frozen=True, kw_only=True)
class LoaderRules:
    """What llama.cpp does with one architecture beyond what `Family` says.

    biases: roles whose bias tensors it loads. partial_rotary: rope.dimension_count may be smaller than the head.
    rope_freqs: reads `rope_freqs.weight`. rope_factors: reads `rope_factors_{long,short}.weight` never, only when the scaling type is
    "longrope", or always. window_period: with a sliding window, all layers but every n-th look through it (unless the file says
    otherwise), with a rotary base of their own; None: attention.sliding_window has no effect. no_rope_period: every n-th layer does
    not rotate. square_scale_at: with this many layers attention is scaled by n_embd / n_heads instead of the head size.
    layered: every layer has its own n_ff, heads and kv heads; no heads means no attention, and no n_ff that the graph passes the layer by.
    """

    biases: tuple[str, ...] = ("wq", "wk", "wv")
    partial_rotary: bool = False
    rope_freqs: bool = False
    rope_factors: Literal["never", "longrope", "always"] = "never"
    window_period: int | None = None
    no_rope_period: int | None = None
    square_scale_at: int | None = None
    layered: bool = False


_LLAMA = LoaderRules(biases=("wq", "wk", "wv", "wo", "gate", "up", "down"), rope_freqs=True, rope_factors="longrope")
# By `general.architecture`. deci is llama with sizes per layer (models/deci.cpp).
RULES: Mapping[str, LoaderRules] = {
    "llama": _LLAMA,
    "deci": replace(_LLAMA, layered=True),
    "qwen2": LoaderRules(),
    "qwen3": LoaderRules(),
    "phi3": LoaderRules(partial_rotary=True, rope_factors="always"),
    "gemma3": LoaderRules(partial_rotary=True, window_period=6, square_scale_at=62),
    "smollm3": LoaderRules(no_rope_period=4),
}

# Keys below `<arch>.` that have no effect in llama.cpp on the architectures above. YaRN's betas and factors are among them: the
# loader reads those keys for other architectures only, and computes with its defaults here.
_NO_EFFECT = frozenset(
    {
        "attention.sliding_window",
        "expert_used_count",
        "rope.scaling.finetuned",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_log_multiplier",
        "tensor_data_layout",
        "vocab_size",
    }
)

# Keys that must have this value if they are there: anything else is a model we have no code for.
_NEUTRAL: Mapping[str, tuple[Any, str]] = {
    "expert_count": (0, "mixtures of experts"),
    "attention.causal": (True, "models without causal attention"),
    "pooling_type": (0, "embedding and ranking models"),
    "nextn_predict_layers": (0, "layers for multi-token prediction"),
    "attn_logit_softcapping": (0.0, "soft caps on attention scores"),
    "final_logit_softcapping": (0.0, "soft caps on logits"),
}


class Metadata:
    """Typed access to the `<arch>.*` keys of a header. A key that was asked for is understood; `refuse_rest` refuses the others."""

    def __init__(self, header: Header, arch: str) -> None:
        self.header, self.arch, self.prefix = header, arch, f"{arch}."
        self._asked: set[str] = set()

    def raw(self, key: str) -> Any:
        """The value, or None."""
        self._asked.add(key)
        return self.header.value(self.prefix + key)

    def wrong(self, key: str, value: Any, expected: str) -> SourceError:
        shown = f"an array of {len(value)}" if isinstance(value, list) else repr(value)
        return SourceError(f"{self.header.path}: {self.prefix}{key} is {shown}, expected {expected}. Convert the model again.")

    def missing(self, key: str) -> SourceError:
        return SourceError(
            f"{self.header.path}: metadata key {self.prefix}{key} is missing. The file is incomplete; convert the model again."
        )

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number; required when there is no default."""
        value = self.raw(key)
        if value is None:
            if default is None:
                raise self.missing(key)
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise self.wrong(key, value, "a positive whole number")
        return value

    def sizes(self, key: str, n_layers: int, default: tuple[int, ...] | None = None, *, least: int = 1) -> tuple[int, ...]:
        """One whole number of at least `least` per layer, from an array or from one positive number for all."""
        value = self.raw(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, list):
            return (self.size(key),) * n_layers
        if len(value) != n_layers or not all(isinstance(v, int) and not isinstance(v, bool) and least <= v < 2**31 for v in value):
            what = "positive whole numbers" if least else "whole numbers of at least 0"
            raise self.wrong(key, value, f"{n_layers} {what}, one per layer")
        return tuple(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; required when there is no default."""
        value = self.raw(key)
        if value is None:
            if default is None:
                raise self.missing(key)
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(key, value, "a finite number")
        return float(value)

    def refuse_rest(self) -> None:
        """Raise UnsupportedError for keys with a meaning we do not have, and for keys nobody asked for."""
        for key, (neutral, what) in _NEUTRAL.items():
            value = self.raw(key)
            if value is not None and value != neutral:
                raise UnsupportedError(f"{self.prefix}{key} is {value!r}; {what} are not supported")
        rest = [k for k in self.header.fields if k.startswith(self.prefix) and k.removeprefix(self.prefix) not in self._asked | _NO_EFFECT]
        if rest:
            raise UnsupportedError(f"unknown metadata keys that could change the model: {', '.join(rest)}")


def read_spec(metadata: Metadata, family: Family, *, n_vocab: int, tied: bool, biases: frozenset[str], vector: Vector) -> ModelSpec:
    """The ModelSpec that llama.cpp would compute with. Raises SourceError or UnsupportedError that names the file and the key."""
    path = metadata.header.path
    try:
        spec = _spec(metadata, family, RULES[metadata.arch], n_vocab=n_vocab, tied=tied, biases=biases, vector=vector)
        metadata.refuse_rest()
    except UnsupportedError as err:
        raise UnsupportedError(f"{path}: {err}") from err
    except ShapeError as err:
        raise SourceError(f"{path}: {err}. The metadata contradicts itself; convert the model again.") from err
    return spec


def _spec(
    metadata: Metadata, family: Family, rules: LoaderRules, *, n_vocab: int, tied: bool, biases: frozenset[str], vector: Vector
) -> ModelSpec:
    n_layers = metadata.size("block_count")
    if n_layers > MAX_LAYERS:
        raise metadata.wrong("block_count", n_layers, f"at most {MAX_LAYERS}")
    n_ctx, n_embd = metadata.size("context_length"), metadata.size("embedding_length")
    least = 0 if rules.layered else 1
    n_heads = metadata.sizes("attention.head_count", n_layers, least=least)
    n_kv_heads = metadata.sizes("attention.head_count_kv", n_layers, n_heads, least=least)
    n_ff = metadata.sizes("feed_forward_length", n_layers, least=least)
    if rules.layered:
        _check_layered(metadata, n_heads, n_kv_heads, n_ff)
    square_dim = max(1, n_embd // n_heads[0])
    head_dim = metadata.size("attention.key_length", square_dim)
    value_dim = metadata.size("attention.value_length", square_dim)
    if value_dim != head_dim:
        raise UnsupportedError(f"attention.key_length {head_dim} and attention.value_length {value_dim} differ, which is not supported")
    windows = _windows(metadata, rules, n_layers)
    rope = _rope(metadata, rules, head_dim=head_dim, n_ctx=n_ctx, vector=vector)
    blocks: list[Block] = []
    for i in range(n_layers):
        rotates = rules.no_rope_period is None or (i + 1) % rules.no_rope_period
        use: RopeUse = "none" if not rotates else "local" if windows[i] else "main"
        if n_heads[i]:
            blocks.append(Attention(layer=i, n_heads=n_heads[i], n_kv_heads=n_kv_heads[i], head_dim=head_dim, rope=use, window=windows[i]))
        if n_ff[i]:
            blocks.append(Mlp(layer=i, n_ff=n_ff[i]))
    return ModelSpec(
        family=family.name,
        n_embd=n_embd,
        n_vocab=n_vocab,
        n_ctx=n_ctx,
        blocks=tuple(blocks),
        rope=rope,
        rope_local=_local_rope(metadata, rope) if any(windows) else None,
        norm_eps=metadata.number("attention.layer_norm_rms_epsilon"),
        tied=tied,
        attn_scale=1 / math.sqrt(square_dim if n_layers == rules.square_scale_at else head_dim),
        embed_scale=math.sqrt(n_embd) if family.scaled_embedding else 1.0,
        biases=biases,
    )


def _check_layered(metadata: Metadata, n_heads: tuple[int, ...], n_kv_heads: tuple[int, ...], n_ff: tuple[int, ...]) -> None:
    """Refuse what the graph of a layered architecture computes otherwise than a sequence of attentions and MLPs."""
    if not n_heads[0]:
        raise metadata.wrong("attention.head_count", n_heads[0], "heads in the first layer, from which the head size is read")
    if not n_ff[-1]:
        raise metadata.wrong("feed_forward_length", n_ff[-1], "neurons in the last layer, without which llama.cpp returns wrong logits")
    for layer, (heads, kv_heads, neurons) in enumerate(zip(n_heads, n_kv_heads, n_ff, strict=True)):
        if heads and not kv_heads:
            raise UnsupportedError(
                f"layer {layer} has {heads} heads and no kv heads: one linear map in place of attention is not supported"
            )
        if kv_heads and not heads:
            raise UnsupportedError(f"layer {layer} has {kv_heads} kv heads and no heads. The metadata contradicts itself")
        if heads and not neurons:
            raise UnsupportedError(f"layer {layer} has attention and no feed-forward: llama.cpp drops such an attention's result")


def _windows(metadata: Metadata, rules: LoaderRules, n_layers: int) -> tuple[int | None, ...]:
    """Window of each layer, None for a full view."""
    full = (None,) * n_layers
    if rules.window_period is None:
        return full
    pattern = metadata.raw("attention.sliding_window_pattern")
    if metadata.raw("attention.sliding_window") in (None, 0):
        return full
    window = metadata.size("attention.sliding_window")
    if isinstance(pattern, list):
        if len(pattern) != n_layers:
            raise metadata.wrong("attention.sliding_window_pattern", pattern, f"{n_layers} values, one per layer")
        local = [bool(p) for p in pattern]
    else:
        period = rules.window_period if pattern is None else pattern
        if isinstance(period, bool) or not isinstance(period, int) or period < 0:
            raise metadata.wrong("attention.sliding_window_pattern", pattern, "a whole number, or one value per layer")
        local = [period == 0 or i % period < period - 1 for i in range(n_layers)]
    return tuple(window if is_local else None for is_local in local)


def _local_rope(metadata: Metadata, main: RopeSpec) -> RopeSpec:
    """Rotary embedding of the layers with a window: a base of their own, never scaled."""
    return RopeSpec(dim=main.dim, base=metadata.number("rope.freq_base_swa", 10000.0), attn_factor=_attn_factor(metadata))


def _attn_factor(metadata: Metadata) -> float:
    return metadata.number("rope.scaling.attn_factor", 1.0)


def _rope(metadata: Metadata, rules: LoaderRules, *, head_dim: int, n_ctx: int, vector: Vector) -> RopeSpec:
    """Rotary embedding of the full-view layers. Factors from tensors and a linear factor apply together, as in ggml's rope."""
    dim = metadata.size("rope.dimension_count", head_dim)
    if dim != head_dim and not rules.partial_rotary:
        raise UnsupportedError(
            f"rope.dimension_count {dim} differs from the head size {head_dim}, which llama.cpp does not load for this family"
        )
    base = metadata.number("rope.freq_base", 10000.0)
    kind = metadata.raw("rope.scaling.type") or "linear"
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedError(f"rope.scaling.type {kind!r} is unknown; known: none, linear, yarn, longrope")
    factor = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 0.0)) or 1.0
    if kind == "none":
        factor = 1.0
    if factor <= 0:
        raise metadata.wrong("rope.scaling.factor", factor, "a positive number")
    attn_factor = _attn_factor(metadata)
    original_n_ctx = metadata.size("rope.scaling.original_context_length", n_ctx)

    factors = short = long = None
    if rules.rope_factors == "always" or (rules.rope_factors == "longrope" and kind == "longrope"):
        short, long = (vector(f"rope_factors_{name}.weight", dim // 2) for name in ("short", "long"))
        if (short is None) != (long is None):
            raise UnsupportedError("of rope_factors_short.weight and rope_factors_long.weight only one is there")
    elif rules.rope_freqs:
        factors = vector("rope_freqs.weight", dim // 2)
    if kind == "yarn" and (short or factors):
        raise UnsupportedError("rope.scaling.type yarn together with rope factor tensors is not supported")

    if short and long:
        return RopeSpec(
            dim=dim,
            base=base,
            kind="longrope",
            short_factors=tuple(f * factor for f in short),
            long_factors=tuple(f * factor for f in long),
            original_n_ctx=original_n_ctx,
            attn_factor=attn_factor,
        )
    if factors:
        return RopeSpec(dim=dim, base=base, kind="factors", factors=tuple(f * factor for f in factors), attn_factor=attn_factor)
    if kind == "yarn":
        magnitude = 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
        return RopeSpec(dim=dim, base=base, kind="yarn", factor=factor, original_n_ctx=original_n_ctx, attn_factor=attn_factor * magnitude)
    return RopeSpec(dim=dim, base=base, kind="plain" if factor == 1 else "linear", factor=factor, attn_factor=attn_factor)
