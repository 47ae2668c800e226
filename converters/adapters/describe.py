"""What an adapter is, and what each way of shipping it would do with every tensor it changes: data for `edgeq adapters inspect`.

    merge     into the weights, before they are quantized
    keep      beside them, as a GGUF LoRA file
    squeeze   to a lower rank or fewer bits, as a smaller LoRA

Nothing is written or refused here: the reasons are those that doing it would raise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edgeq.converters.adapters.keep import exact_factors, is_full_rank_kind, obstacle
from edgeq.deltas.adapter import Adapter
from edgeq.deltas.delta import Delta
from edgeq.deltas.merge import EMBED, HEAD, check_fits
from edgeq.errors import SourceError
from edgeq.model import Model
from edgeq.tensors import LazyTensor

How = Literal["exact", "approximate", "refused"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """how: "approximate" means in the nearest low rank, when that is asked for. reason: why not exact; empty when it is."""

    how: How
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One tensor that an adapter changes. rank: of the exact factors; None where there are none."""

    name: str
    shape: tuple[int, ...]
    rank: int | None
    merge: Verdict
    keep: Verdict
    squeeze: Verdict

    def to_json(self) -> dict[str, Any]:
        ways = {"merge": self.merge, "keep": self.keep, "squeeze": self.squeeze}
        verdicts = {way: {"how": verdict.how, "reason": verdict.reason or None} for way, verdict in ways.items()}
        return {"name": self.name, "shape": list(self.shape), "rank": self.rank, **verdicts}


@dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """mismatch: the first thing that does not fit the model it was described for; None when all fits."""

    name: str
    kind: str
    base_name: str | None
    files: tuple[str, ...]
    notes: tuple[str, ...]
    mismatch: str | None
    targets: tuple[Target, ...]

    @property
    def ranks(self) -> Mapping[int, int]:
        """How many tensors have which rank."""
        found = sorted(t.rank for t in self.targets if t.rank is not None)
        return {rank: found.count(rank) for rank in found}

    @property
    def roles(self) -> Mapping[str, tuple[Target, ...]]:
        """Targets by what they are in a layer ("wq.weight"), in the model's order."""
        found: dict[str, list[Target]] = {}
        for target in self.targets:
            parts = target.name.split(".")
            found.setdefault(".".join(parts[2:]) if parts[0] == "layers" else target.name, []).append(target)
        return {role: tuple(targets) for role, targets in found.items()}

    def verdict(self, way: Literal["merge", "keep", "squeeze"]) -> Verdict:
        """Of the adapter as a whole: the first tensor that it cannot be done to decides, named in the reason."""
        order: tuple[How, ...] = ("refused", "approximate")
        for how in order:
            for target in self.targets:
                verdict: Verdict = getattr(target, way)
                if verdict.how == how:
                    return Verdict(how=how, reason=f"{target.name}: {verdict.reason}")
        return Verdict(how="exact")

    def to_json(self) -> dict[str, Any]:
        whole = {way: self.verdict(way) for way in ("merge", "keep", "squeeze")}
        return {
            "name": self.name,
            "kind": self.kind,
            "base": self.base_name,
            "files": list(self.files),
            "notes": list(self.notes),
            "mismatch": self.mismatch,
            "ranks": {str(rank): count for rank, count in self.ranks.items()},
            **{way: {"how": verdict.how, "reason": verdict.reason or None} for way, verdict in whole.items()},
            "targets": [target.to_json() for target in self.targets],
        }


def describe(adapter: Adapter, model: Model) -> AdapterReport:
    """Look at an adapter beside its model. Decodes base tensors for kinds whose factors follow from them, and no others."""
    mismatch = None
    try:
        check_fits(adapter, model)
    except SourceError as err:
        mismatch = str(err)
    return AdapterReport(
        name=adapter.name,
        kind=adapter.kind,
        base_name=adapter.base_name,
        files=tuple(file.name for file in adapter.files),
        notes=adapter.notes,
        mismatch=mismatch,
        targets=tuple(_target(name, delta, adapter, model) for name, delta in adapter.deltas.items()),
    )


def _target(name: str, delta: Delta, adapter: Adapter, model: Model) -> Target:
    base = model.tensors.get(EMBED if name == HEAD and model.spec.tied else name)
    fits = base is not None and base.shape == delta.shape
    merge = Verdict(how="exact") if fits else Verdict(how="refused", reason=_misfit(base, delta, model))
    why = obstacle(name, delta, tied=model.spec.tied)
    factors = exact_factors(delta, base if fits else None)
    if not fits:
        keep = merge
    elif why is not None:
        keep = Verdict(how="refused", reason=why)
    elif factors is None or is_full_rank_kind(adapter.kind):
        keep = Verdict(how="approximate", reason=f"{adapter.kind} changes it in full rank")
    else:
        keep = Verdict(how="exact")
    # a head or embedding that llama.cpp cannot keep is still a LoRA that can be made smaller
    squeeze = keep if factors is None else Verdict(how="exact")
    return Target(name=name, shape=delta.shape, rank=None if factors is None else factors.rank, merge=merge, keep=keep, squeeze=squeeze)


def _misfit(base: LazyTensor | None, delta: Delta, model: Model) -> str:
    if base is None:
        return f"{model.name} has no such tensor"
    return f"{model.name} has it as {list(base.shape)}, the adapter was made for {list(delta.shape)}"
