"""What of a model can be cut later, in a stock GGUF file, and why the rest cannot: one sentence per port.

The limits are those of llama.cpp's loaders and graphs (src/models/*.cpp): an architecture has sizes of each layer or one for all, one size
of heads, and one set of rotary frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgeq.converters.gguf.architectures import arch_for
from edgeq.families import family
from edgeq.spec import ModelSpec

Freedom = Literal["per layer", "all layers alike", "no"]


@dataclass(frozen=True)
class Cuttable:
    """How freely a port can be cut; reason: why not more freely, empty for "per layer"."""

    freedom: Freedom
    reason: str = ""


def cuttable(spec: ModelSpec) -> dict[str, Cuttable]:
    """By port (ffn, kv_group, layer, vo, qk), for the architecture that an elastic export of this model has.

    Raises PlanError and UnsupportedError as `arch_for`, when the model cannot be a GGUF file at all.
    """
    arch, row = arch_for(spec, elastic=True), family(spec.family)
    whole_heads = Cuttable(
        "no",
        f"{arch.title} has one head size for keys and values of all layers, and flash attention kernels exist for few sizes; whole heads "
        "are cut instead (kv_group).",
    )
    normed = Cuttable("no", f"{arch.title} normalises queries and keys over the whole head: without some dimensions all others change.")
    ports = {"vo": whole_heads, "qk": normed if row.qk_norm else whole_heads}
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


def _groups(spec: ModelSpec, freedom: Freedom, reason: str) -> Cuttable:
    if all(b.n_kv_heads == 1 for b in spec.attention) and freedom != "per layer":
        return Cuttable("no", "there is one kv head, which every query head reads.")
    return Cuttable(freedom, reason)
