"""An adapter as its reader leaves it: deltas by canonical tensor name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeq.deltas.delta import Delta


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """name: what to call it. kind: the algebra, in its own spelling ("LORA", "OFT", ...; "DORA" for LoRA with magnitudes).

    deltas: by canonical tensor name ("layers.0.wq.weight"). On a model whose head shares the embedding, "head.weight" may appear
    beside or without "embed.weight": the same object under both names changes both alike, anything else separates them.
    files: what it was read from. base_name: the model it says it was trained on. base_fingerprint: of
    its weights, where known (`edgeq.base_fingerprint`). notes: what a user should know, in sentences.
    """

    name: str
    kind: str
    deltas: Mapping[str, Delta]
    files: tuple[Path, ...] = ()
    base_name: str | None = None
    base_fingerprint: str | None = None
    notes: tuple[str, ...] = ()
