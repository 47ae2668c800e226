"""Which llama.cpp architecture a model is lowered to, and the check that it fits what the loader and the graph accept.

A model that breaks one of these rules does not load, kills the process with an assertion, or, worst, runs and computes something else.
So it is refused here, before anything is written, with the value and the remedy. The rules themselves stand as rows beside the GGUF
reader (`sources.gguf_spec`), because what we write must be what the stock runtime computes just as what we read.

Most architectures have one size for all layers. A model whose layers differ, or that is to be cut later, goes to its family's layered
architecture (`Family.gguf_layered`), where there is one: llama.cpp's deci computes what llama does, with n_ff, heads and kv heads of each
layer. It has the llama row's tensors and row order, whichever family is lowered to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgeq.converters.sources.gguf_spec import MAX_LAYERS, RULES, LoaderRules
from edgeq.errors import PlanError, UnsupportedError
from edgeq.families import Family, family, family_of_gguf
from edgeq.rope import RopeKind
from edgeq.spec import Attention, Mlp, ModelSpec


@dataclass(frozen=True)
class Arch:
    """One value of `general.architecture` and what the loader does with it. layout: the family whose tensors and row order it has."""

    name: str
    rules: LoaderRules
    layout: Family

    @property
    def title(self) -> str:
        return f"llama.cpp's {self.name} architecture"

    @property
    def rope_kinds(self) -> tuple[RopeKind, ...]:
        """Kinds of rotary scaling that the graph applies."""
        kinds: list[RopeKind] = ["plain", "linear", "yarn"]
        if self.rules.rope_freqs:
            kinds.append("factors")
        if self.rules.rope_factors != "never":
            kinds.append("longrope")
        return tuple(kinds)

    @property
    def scales_rope(self) -> bool:
        """Whether all of every query and key meets a cosine, so that the magnitude of those can make up for another attention scale."""
        return self.rules.rope_freqs and not self.rules.partial_rotary and self.rules.no_rope_period is None

    def attention_scale(self, spec: ModelSpec) -> float:
        """What the graph multiplies q.k with."""
        attention = spec.attention[0]
        if spec.n_layers == self.rules.square_scale_at:
            return 1 / math.sqrt(spec.n_embd // attention.n_heads)
        return 1 / math.sqrt(attention.head_dim)


def arch_for(spec: ModelSpec, *, elastic: bool = False) -> Arch:
    """The architecture that a model is lowered to: that of its family, once the model is known to fit.

    elastic: the file will be cut later, so layers must be free to differ where the family has an architecture for that.
    Raises PlanError or UnsupportedError naming the value that does not fit.
    """
    row = family(spec.family)
    layered = row.gguf_layered is not None and (elastic or not is_uniform(spec))
    name = row.gguf_layered if layered and row.gguf_layered else row.gguf_arch
    arch = Arch(name, RULES[name], family_of_gguf(name) if layered else row)
    for check in _CHECKS:
        check(spec, row, arch)
    return arch


def is_uniform(spec: ModelSpec) -> bool:
    """Whether every layer has an attention and an MLP, in this order, of the same sizes."""
    kinds = {tuple(type(b) for b in blocks) for _, blocks in spec.layers()}
    sizes = {(b.n_heads, b.n_kv_heads, b.head_dim) for b in spec.attention}
    return kinds == {(Attention, Mlp)} and len(sizes) == 1 and len({b.n_ff for b in spec.mlps}) == 1


def _check_layers(spec: ModelSpec, row: Family, arch: Arch) -> None:
    if spec.n_layers > MAX_LAYERS:
        raise PlanError(f"{spec.n_layers} layers: llama.cpp stops at {MAX_LAYERS}. Drop layers.")
    for layer, blocks in spec.layers():
        found = [type(b) for b in blocks]
        if found == [Attention, Mlp] or (arch.rules.layered and layer > 0 and found in ([Mlp], [])):
            continue
        kinds = " and ".join(kind.__name__ for kind in found) or "nothing"
        if arch.rules.layered and found == [Attention]:
            raise PlanError(
                f"layer {layer} has an Attention alone, whose result {arch.title} drops. Keep a block of the layer's neurons, or remove "
                "the whole layer."
            )
        if arch.rules.layered and found in ([Mlp], []):
            raise PlanError(f"layer 0 has {kinds}: {arch.title} reads the head size there. Keep at least one kv head of layer 0.")
        raise PlanError(f"layer {layer} has {kinds}: {arch.title} wants one Attention and one Mlp, in this order.")


def _check_uniform(spec: ModelSpec, row: Family, arch: Arch) -> None:
    """Layer 0 has both blocks by now."""
    names = ("head_dim",) if arch.rules.layered else ("n_heads", "n_kv_heads", "head_dim")
    sizes = {name: [(b.layer, getattr(b, name)) for b in spec.attention] for name in names}
    if not arch.rules.layered:
        sizes["n_ff"] = [(b.layer, b.n_ff) for b in spec.mlps]
    for name, by_layer in sizes.items():
        first = by_layer[0][1]
        for layer, size in by_layer:
            if size != first:
                raise PlanError(
                    f"layer {layer} has {name} {size}, layer 0 has {first}: {arch.title} has one {name} for "
                    "all layers. Cut every layer to the same size."
                )


def _check_attention(spec: ModelSpec, row: Family, arch: Arch) -> None:
    a = spec.attention[0]
    if arch.layout.square_attention and a.n_heads * a.head_dim != spec.n_embd:
        raise PlanError(
            f"{a.n_heads} heads of {a.head_dim} make {a.n_heads * a.head_dim}, the model is {spec.n_embd} wide: "
            f"{arch.title} wants both equal. Keep every head whole."
        )
    takes_scale = row.qk_norm or arch.scales_rope
    if not takes_scale and not math.isclose(spec.attn_scale, arch.attention_scale(spec), rel_tol=1e-6):
        raise UnsupportedError(
            f"attention scale {spec.attn_scale:.6g}: {arch.title} uses {arch.attention_scale(spec):.6g} and has no key "
            "for another. It cannot be exported as GGUF."
        )
    embed_scale = math.sqrt(spec.n_embd) if row.scaled_embedding else 1.0
    # 1 %: checkpoints in bfloat16 round sqrt(n_embd) to 8 bits.
    if not math.isclose(spec.embed_scale, embed_scale, rel_tol=0.01):
        raise UnsupportedError(
            f"embedding scale {spec.embed_scale:.6g}: {arch.title} uses {embed_scale:.6g} and has no key for another. "
            "It cannot be exported as GGUF."
        )


def _check_rope(spec: ModelSpec, row: Family, arch: Arch) -> None:
    rope, head_dim = spec.rope, spec.attention[0].head_dim
    if rope.dim != head_dim and not (arch.rules.partial_rotary or arch.rules.rope_freqs):
        raise PlanError(
            f"{rope.dim} of {head_dim} dimensions of a head rotate: {arch.title} rotates all of them. It cannot be exported as GGUF."
        )
    plain_betas = (rope.beta_fast, rope.beta_slow) == (32, 1)
    if rope.kind not in arch.rope_kinds or (rope.kind == "yarn" and not plain_betas and "factors" not in arch.rope_kinds):
        what = f"yarn with beta_fast {rope.beta_fast:g} and beta_slow {rope.beta_slow:g}" if rope.kind == "yarn" else repr(rope.kind)
        raise UnsupportedError(
            f"rope scaling {what} is ignored by {arch.title}, which knows {', '.join(arch.rope_kinds)}. "
            "Remove the scaling from the config to use the model up to its original context."
        )
    local = spec.rope_local
    if local is not None and (local.kind != "plain" or local.attn_factor != rope.attn_factor or local.dim != rope.dim):
        raise UnsupportedError(
            f"rope of sliding-window layers ({local.kind}, {local.dim} dimensions): llama.cpp gives them only a base of their own. "
            "It cannot be exported as GGUF."
        )
    for block in spec.attention:
        period = arch.rules.no_rope_period
        rotates = period is None or (block.layer + 1) % period != 0
        if (block.rope != "none") != rotates:
            rule = "rotates in every layer" if period is None else f"rotates except in every {period}th layer"
            raise UnsupportedError(
                f"layer {block.layer} {'rotates' if block.rope != 'none' else 'does not rotate'}: {arch.title} {rule}. "
                "It cannot be exported as GGUF."
            )


def _check_windows(spec: ModelSpec, row: Family, arch: Arch) -> None:
    windows = {b.window for b in spec.attention if b.window is not None}
    if arch.rules.window_period is not None and len(windows) > 1:
        raise UnsupportedError(f"sliding windows of {sorted(windows)} tokens: llama.cpp has one length for all layers.")
    for block in spec.attention:
        local = arch.rules.window_period is not None and block.window is not None
        if block.rope != "none" and (block.rope == "local") != local:
            raise UnsupportedError(
                f"layer {block.layer} has window {block.window} and {block.rope} rope: {arch.title} uses the local rope "
                "exactly where there is a window."
            )


def _check_biases(spec: ModelSpec, row: Family, arch: Arch) -> None:
    unread = sorted(spec.biases - set(arch.rules.biases))
    if unread:
        raise UnsupportedError(
            f"biases of {', '.join(unread)}: {arch.title} reads those of {', '.join(arch.rules.biases)} only. "
            "It cannot be exported as GGUF."
        )


_CHECKS = (_check_layers, _check_uniform, _check_attention, _check_rope, _check_windows, _check_biases)
