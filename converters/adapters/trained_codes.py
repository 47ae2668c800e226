"""Adapters inside the quantizer (`edgeq.deltas.inside`): a state dict, and edgeq_adapter.json with its kind, bits and alpha.

    <module>.lora_A (r, n_in), <module>.lora_B (n_out, r), <module>.step (n_out,) or (n_out, groups), and

    L4Q           codes -2^(b-1) to 2^(b-1) - 1; <module>.offset, where it was trained, in the shape of step
    EFFICIENTDM   codes 0 to 2^b - 1; <module>.zero_point, whole numbers in the shape of step
    LR-QAT        codes -2^(b-1) to 2^(b-1) - 1; <module>.initial_step in the shape of step: the step that W0 was divided by

No published code has one layout for such checkpoints, so these names are edgeq's; renaming the tensors of one's own is a few lines. Steps
of activations have no place in a model whose runtime rounds activations by its own rule, and are refused like any tensor left over.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeq.converters.adapters.published import factors, state_adapter
from edgeq.converters.adapters.tensors import AdapterTensors
from edgeq.converters.sources.json_file import Section
from edgeq.deltas.adapter import Adapter
from edgeq.deltas.delta import AnyFloats, Delta
from edgeq.deltas.inside import Initial, Inside
from edgeq.deltas.lora import LoRA
from edgeq.errors import ShapeError, SourceError
from edgeq.model import Model

STEP = ".step"
# By kind, what a module has besides, and whether it must.
_PARTS: Mapping[str, tuple[str, bool]] = {"L4Q": ("offset", False), "EFFICIENTDM": ("zero_point", True), "LR-QAT": ("initial_step", True)}
KINDS = tuple(_PARTS)


def read_trained_codes(path: Path, model: Model, options: Section, *, name: str | None = None) -> Adapter:
    """options: of edgeq_adapter.json, of one of KINDS. Raises SourceError and ShapeError naming the key."""
    kind = str(options.get("kind"))
    bits, alpha = options.integer("bits"), options.number("alpha")
    if not 2 <= bits <= 8:
        raise SourceError(f"{options.where('bits')} is {bits}, expected 2 to 8")
    low = 0 if kind == "EFFICIENTDM" else -(1 << bits - 1)
    downcast = (options.get("downcast") or "float32") if kind == "LR-QAT" else "float32"
    file = AdapterTensors(path)
    deltas: dict[str, Delta] = {}
    for stem, site, unit in factors(file, model):
        if f"{stem}{STEP}" not in file:
            raise SourceError(f"{path}: {stem}{STEP} is missing. Without its trained step nobody can say which codes it has.")
        lora = LoRA(a=unit.a, b=unit.b, scale=alpha / unit.rank)
        step = _groups(file, f"{stem}{STEP}")
        part, required = _PARTS[kind]
        key = f"{stem}.{part}"
        if required and key not in file:
            raise SourceError(f"{path}: {key} is missing, without which {kind} weights cannot be computed")
        extra = _groups(file, key) if key in file else None
        try:
            deltas |= site.tensors("weight", _inside(kind, lora, step, extra, low, (1 << bits) - 1, downcast, bits))
        except (ShapeError, SourceError) as err:
            raise type(err)(f"{path}: {site.path}: {err}") from err
    return state_adapter(file, deltas, kind, name)


def _inside(kind: str, lora: LoRA, step: AnyFloats, extra: AnyFloats | None, low: int, span: int, downcast: Any, bits: int) -> Inside:
    initial = Initial(step=extra, downcast=downcast, bits=bits) if kind == "LR-QAT" and extra is not None else None
    return Inside(
        lora=lora,
        step=step,
        low=low,
        high=low + span,
        zero=extra if kind == "EFFICIENTDM" else None,
        offset=extra if kind == "L4Q" else None,
        initial=initial,
    )


def _groups(file: AdapterTensors, key: str) -> AnyFloats:
    """(n_out, groups); one group where the file has (n_out,)."""
    values = file.take(key)
    return values[:, None] if values.ndim == 1 else values
