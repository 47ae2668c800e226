"""What of a model can be cut later, in a stock GGUF file, and why the rest cannot: one sentence per port.

The limits are those of llama.cpp's loaders and graphs (src/models/*.cpp): an architecture has sizes of each layer or one for all, one size
of heads for keys and values, and one set of rotary frequencies, which few let a file choose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgeq.converters.gguf.architectures import Arch, arch_for
from edgeq.families import Family, family
from edgeq.spec import ModelSpec

Freedom = Literal["per layer", "all layers alike", "no"]

# Head sizes from 64 up, keys as long as values, for which llama.cpp has flash attention kernels on CUDA, Metal and Vulkan alike
# (ggml-cuda/fattn.cu, ggml-metal/ggml-metal-device.m, ggml-vulkan.cpp). Other sizes run, slowly or without flash attention.
HEAD_SIZES = (256, 128, 112, 96, 80, 64)


@dataclass(frozen=True)
class Cuttable:
    """How freely a port can be cut; reason: why not more freely, empty for "per layer"."""

    freedom: Freedom
    reason: str = ""


def cuttable(spec: ModelSpec) -> dict[str, Cuttable]:
    """By port (ffn, kv_group, head, layer, and what a head consists of, vo and qk), for the architecture of an elastic export.

    Raises PlanError and UnsupportedError as `arch_for`, when the model cannot be a GGUF file at all.
    """
    arch, row = arch_for(spec, elastic=True), family(spec.family)
    ports = _heads(spec, arch, row)
    if arch.rules.layered:
        return {"ffn": Cuttable("per layer"), "kv_group": _groups(spec, "per layer", ""), "layer": Cuttable("per layer"), **ports}
    alike = f"{arch.title} has one {{}} for all layers."
    if arch.rules.no_rope_period is not None:
        layer = f"{arch.title} does not rotate every {arch.rules.no_rope_period}th layer: without one, those behind it change roles."
    else:
        layer = f"{arch.title} has no layers without attention or MLP, and a cut keeps the numbers of layers."
    return {
        "ffn": Cuttable("all layers alike", alike.format("width of MLPs")),
        "kv_group": _groups(spec, "all layers alike", alike.format("number of heads")),
        "layer": Cuttable("no", layer),
        **ports,
    }


def head_sizes(spec: ModelSpec, grid_block: int) -> tuple[int, ...]:
    """Smaller head sizes that an elastic export offers, largest first: those with kernels everywhere, in whole blocks of wo's grid.

    grid_block: values per block of that grid. Empty where heads cannot be cut. Raises as `cuttable`.
    """
    head_dim = spec.attention[0].head_dim
    if head_dim % grid_block or cuttable(spec)["head"].freedom == "no":
        return ()
    return tuple(size for size in HEAD_SIZES if size < head_dim and size % grid_block == 0)


def _heads(spec: ModelSpec, arch: Arch, row: Family) -> dict[str, Cuttable]:
    head_dim = spec.attention[0].head_dim
    one_size = f"{arch.title} has one size of heads, the same for keys and values, for all layers"
    if row.qk_norm:
        normed = f"{arch.title} normalises queries and keys over the whole head: without some dimensions all others change"
        return {
            "head": Cuttable("no", f"{normed}."),
            "vo": Cuttable("no", f"{one_size}, and those of keys cannot change."),
            "qk": Cuttable("no", f"{normed}."),
        }
    if not arch.scales_rope:
        fixed = f"{arch.title} reads no rotary divisors, without which the RoPE pairs that stay would turn at other speeds"
        return {
            "head": Cuttable("no", f"{fixed}."),
            "vo": Cuttable("no", f"{one_size}, and those of keys cannot change."),
            "qk": Cuttable("no", f"{fixed}."),
        }
    if not any(size < head_dim for size in HEAD_SIZES):
        small = f"heads have {head_dim} dimensions, and flash attention kernels exist for no smaller size on all devices."
        return dict.fromkeys(("head", "vo", "qk"), Cuttable("no", small))
    together = "{} are cut together with {}, as port head: " + one_size + "."
    return {
        "head": Cuttable("all layers alike", f"{one_size}, and one set of rotary frequencies."),
        "vo": Cuttable("all layers alike", together.format("value dimensions", "RoPE pairs")),
        "qk": Cuttable("all layers alike", together.format("RoPE pairs", "value dimensions")),
    }


def _groups(spec: ModelSpec, freedom: Freedom, reason: str) -> Cuttable:
    if all(b.n_kv_heads == 1 for b in spec.attention) and freedom != "per layer":
        return Cuttable("no", "there is one kv head, which every query head reads.")
    return Cuttable(freedom, reason)
