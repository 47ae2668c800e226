"""Merge or keep: what becomes of each adapter of an export, from the profile, the ranks and a measurement on this model.

Both ways are drafted. Of a few adapted matrices, spread over the model, the change is measured and what each way's rounding does to it
(`edgeq.adapter_plan`), weighted by inputs from a short calibration. Keeping costs memory and time: factors are read for every token, and
each pair is four more operations of llama.cpp's graph.

Several adapters are alternatives to each other unless the user merges them, so they are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from edgeq.adapter_plan import AdapterPlan, Disposition, Way, choose
from edgeq.calibration import Importance, importance
from edgeq.converters.adapters.keep import KeptAdapter, kept_factors, lora_factors
from edgeq.converters.adapters.open import adapter_tokenizer
from edgeq.converters.adapters.request import AdapterWish, Mode
from edgeq.converters.draft import Draft
from edgeq.converters.gguf.encode import encode_tensor, usable_importance
from edgeq.deltas.adapter import Adapter
from edgeq.deltas.delta import Factors, f64
from edgeq.deltas.lora import LoRA
from edgeq.deltas.merge import merged
from edgeq.device_memory import TensorPlan
from edgeq.errors import EdgeqError, UsageError
from edgeq.families import FUSED
from edgeq.footprint import MIB
from edgeq.grids import F16, F32, Grid
from edgeq.model import Model, Tokenizer
from edgeq.planning import Plan, check_ram, export_bytes
from edgeq.profiles import DeviceProfile
from edgeq.progress import Progress, silent
from edgeq.reference import Reference
from edgeq.tensors import Floats, LazyTensor, take_rows

MEASURED_TENSORS = 6  # of each adapter
MEASURED_ROWS = 256  # of each tensor, spread over it
MEASURED_TOKENS = 256
# What llama.cpp needs for a matrix product however small, and for the two of a pair with what joins them. SmolLM2-135M in Q4_1 on one core
# of a busy machine takes 17.4 ms for a token, 25.9 with 210 pairs of rank 8 and 28.3 with rank 64: 50 and 63 % longer.
MATRIX_SECONDS = PAIR_SECONDS = 20e-6


class DraftOf(Protocol):
    """A draft of a model. adapted: matrices that adapters beside it change, by canonical name without ".weight"."""

    def __call__(self, model: Model, adapted: Collection[str] = ()) -> Draft: ...


@dataclass(frozen=True, kw_only=True)
class Kept:
    """An adapter that goes beside the weights. factors: makes those of the model before sorting, at its scale. reference: the model that
    both make: with the adapter merged in float, or where factors only come near it, with those.
    """

    plan: AdapterPlan
    adapter: Adapter
    factors: Callable[[], KeptAdapter]
    reference: Model


@dataclass(frozen=True, kw_only=True)
class Decision:
    """model: to export, with what is merged. draft: of it. merged, kept: in the user's order."""

    model: Model
    draft: Draft
    merged: tuple[tuple[AdapterPlan, Adapter], ...] = ()
    kept: tuple[Kept, ...] = ()

    @property
    def plans(self) -> tuple[AdapterPlan, ...]:
        return (*(plan for plan, _ in self.merged), *(kept.plan for kept in self.kept))


def decide(
    model: Model,
    adapters: Sequence[tuple[Adapter, float]],
    wish: AdapterWish,
    device: DeviceProfile,
    draft_of: DraftOf,
    read_ids: Callable[[], Sequence[int]],
    *,
    progress: Progress = silent,
) -> Decision:
    """Choose for every adapter. read_ids: token ids of a text to calibrate on, of which the first MEASURED_TOKENS are used.

    Raises UnsupportedError for an adapter that the wished way cannot ship, naming the tensor and what to do instead; PlanError and others
    as drafting the model does.
    """
    if not adapters:
        return Decision(model=model, draft=draft_of(model))
    used = quick_importance(model, read_ids(), progress=progress)
    changed = {name.removesuffix(".weight") for adapter, _ in adapters for name, delta in adapter.deltas.items() if len(delta.shape) == 2}
    drafts = _Drafts(model, draft_of, wish, used, device, frozenset(changed))
    plans = []
    for adapter, scale in adapters:
        merge, keep = drafts.ways(adapter, scale)
        disposition, reason = _disposition(wish.mode or "auto", merge, keep, alone=len(adapters) == 1)
        about: dict[str, Any] = {"name": adapter.name, "kind": adapter.kind, "scale": scale}
        plans.append(AdapterPlan(**about, disposition=disposition, reason=reason, merge=merge, keep=keep))
    if any(plan.disposition == "merge" for plan in plans):
        whole = merged(model, adapters, tokenizer=_tokenizer(adapters))
        kept: tuple[Kept, ...] = ()
        draft = draft_of(whole)
    else:
        whole, draft = model, drafts.base()
        kept = tuple(drafts.keep(plan, adapter) for plan, (adapter, _) in zip(plans, adapters, strict=True))
    noted = replace(draft, plan=replace(draft.plan, adapters=tuple(plans)).with_notes(*(n for a, _ in adapters for n in a.notes)))
    if kept:
        return Decision(model=whole, draft=noted, kept=kept)
    return Decision(model=whole, draft=noted, merged=tuple((plan, adapter) for plan, (adapter, _) in zip(plans, adapters, strict=True)))


def _disposition(mode: Mode, merge: Way, keep: Way, *, alone: bool) -> tuple[Disposition, str]:
    if mode != "auto":
        return mode, "as asked for"
    if not alone:
        return "keep", "several adapters are alternatives to each other, unless they are merged (--adapters merge)"
    return choose(merge, keep) if merge.possible or keep.possible else ("merge", "")


def quick_importance(model: Model, ids: Sequence[int], *, tokens: int = MEASURED_TOKENS, progress: Progress = silent) -> Importance:
    """Mean squares of the inputs of every linear over the first tokens of a text. Raises PlanError when memory is too small for that."""
    length = min(tokens, model.spec.n_ctx, len(ids))
    check_ram(export_bytes(model.spec, length))
    return importance(Reference(model.spec, model.tensors), [list(ids[:length])], progress=progress)


class _Drafts:
    """What both ways come to, drafted when asked for."""

    def __init__(
        self,
        model: Model,
        draft_of: DraftOf,
        wish: AdapterWish,
        used: Importance,
        device: DeviceProfile,
        adapted: frozenset[str],
    ) -> None:
        self._model, self._draft_of, self._wish, self._used, self._device = model, draft_of, wish, used, device
        self._adapted = adapted
        self._base: Draft | None = None
        self._near: dict[str, KeptAdapter] = {}  # those that took a decomposition

    def base(self) -> Draft:
        """With places for every adapter."""
        if self._base is None:
            self._base = self._draft_of(self._model, self._adapted)
        return self._base

    def ways(self, adapter: Adapter, scale: float) -> tuple[Way, Way]:
        """To merge this adapter alone, and to keep it."""
        try:
            whole = merged(self._model, [(adapter, scale)], tokenizer=_tokenizer([(adapter, scale)]))
            draft = self._draft_of(whole)
            merge = Way(quant=draft.plan.quant, bytes=draft.plan.file_bytes, noise=0.0)
        except EdgeqError as err:
            return Way(reason=str(err)), self._keep(adapter, scale)
        keep = self._keep(adapter, scale)
        sampled = _sampled(adapter, self._model)
        change = sum(_change(name, self._model, whole, self._used) for name in sampled)
        merge = replace(merge, noise=_relative(sum(_noise(name, whole, draft.plan, self._used) for name in sampled), change))
        if keep.possible:
            rounding = _relative(sum(_noise(name, self._model, self.base().plan, self._used) for name in sampled), change)
            keep = replace(keep, noise=rounding + keep.lost_energy)
        return merge, keep

    def factors(self, adapter: Adapter, scale: float) -> KeptAdapter:
        """Raises UnsupportedError and PlanError as `kept_factors`, UsageError for what has nothing to do with factors."""
        if self.base().prune:
            raise UsageError(
                f"adapter {adapter.name!r} cannot be kept beside a pruned package. Merge it (--adapters merge), or export an elastic "
                "package and cut both on the device."
            )
        _check_name(adapter.name)
        if adapter.name in self._near:
            return self._near[adapter.name]
        wish = self._wish
        factors = lora_factors if self.base().tied_apart else kept_factors
        kept = factors(adapter, self._model, rank=wish.approx_rank, energy=wish.approx_energy, moments=self._used)
        if scale != 1.0:
            kept = replace(kept, factors={name: Factors(a=f.a, b=f.b * scale) for name, f in kept.factors.items()})
        if kept.lost:
            self._near[adapter.name] = kept
        return kept

    def _keep(self, adapter: Adapter, scale: float) -> Way:
        try:
            plan, kept = self.base().plan, self.factors(adapter, scale)
        except EdgeqError as err:
            return Way(reason=str(err))
        n_bytes = factor_grid(plan).block_bytes * sum(f.a.size + f.b.size for f in kept.factors.values())
        return Way(
            quant=plan.quant,
            bytes=plan.file_bytes + n_bytes,
            adapter_bytes=n_bytes,
            rank=max(f.rank for f in kept.factors.values()),
            slowdown=slowdown(n_bytes, len(kept.factors), plan, self._device),
            lost_energy=_lost(kept),
            fits=plan.memory.total_bytes + n_bytes <= self._device.memory.budget_mib * MIB,
        )

    def keep(self, plan: AdapterPlan, adapter: Adapter) -> Kept:
        """Raises as `factors`."""
        factors = self.factors(adapter, plan.scale)
        reference = _reference(self._model, adapter, plan.scale, factors)
        return Kept(plan=plan, adapter=adapter, factors=partial(self.factors, adapter, plan.scale), reference=reference)


def factor_grid(plan: Plan) -> Grid:
    """Of the numbers in an adapter's file: as fine as those of the weights, but no finer than F16 unless these, or the cache, are F32."""
    return F32 if F32.name in (plan.quant, plan.memory.kv_type.upper()) else F16


def slowdown(n_bytes: int, n_pairs: int, plan: Plan, device: DeviceProfile) -> float:
    """Time per token that factors add, relative to the base's: memory bandwidth and the number of products bound both."""
    memory = device.accelerator.mem_bandwidth_gb_s if device.accelerator is not None else device.cpu.mem_bandwidth_gb_s
    n_matrices = sum(len(t.shape) == 2 for t in plan.tensors)
    base = 1 / plan.decode_bound_tok_s + n_matrices * MATRIX_SECONDS
    return (n_bytes / (memory * 1e9) + n_pairs * PAIR_SECONDS) / base


def _reference(model: Model, adapter: Adapter, scale: float, factors: KeptAdapter) -> Model:
    if not factors.lost:
        return merged(model, [(adapter, scale)])
    near = {name: LoRA(a=part.a, b=part.b) for name, part in factors.factors.items()}
    return merged(model, [(replace(adapter, deltas=near), 1.0)])


def _check_name(name: str) -> None:
    if not name or name.startswith(".") or not all(c.isalnum() or c in "._-" for c in name):
        raise UsageError(
            f"adapter {name!r} cannot be kept under that name, which would be a file's. Name it in letters, digits, '.', '_' and '-': "
            "--adapter PATH=NAME"
        )


def _tokenizer(adapters: Sequence[tuple[Adapter, float]]) -> Tokenizer | None:
    """Of the first adapter that adds tokens."""
    return next((found for adapter, _ in adapters if (found := adapter_tokenizer(adapter)) is not None), None)


def _lost(kept: KeptAdapter) -> float:
    """The largest share of a tensor's change that its factors leave out."""
    return max(kept.lost.values(), default=0.0)


def _sampled(adapter: Adapter, model: Model) -> list[str]:
    """Adapted matrices to measure, spread evenly over the layers; of an adapter on none of them, whatever it changes in place."""
    matrices = [name for name, delta in adapter.deltas.items() if len(delta.shape) == 2 and delta.out_shape == delta.shape]
    inner = [name for name in matrices if name.startswith("layers.")] or [name for name in matrices if name in model.tensors]
    if len(inner) <= MEASURED_TENSORS:
        return inner
    return [inner[i * (len(inner) - 1) // (MEASURED_TENSORS - 1)] for i in range(MEASURED_TENSORS)]


def _rows(name: str, model: Model) -> LazyTensor:
    tensor = model.tensors[name]
    n = min(MEASURED_ROWS, tensor.n_rows)
    return take_rows(tensor, np.arange(n) * tensor.n_rows // n)


def _weights(name: str, model: Model, used: Importance) -> Floats | None:
    tensor, known = model.tensors[name], used.get(name.removesuffix(".weight"))
    return None if known is None else usable_importance(known, tensor.n_cols, origin=name)


def _change(name: str, base: Model, adapted: Model, used: Importance) -> float:
    """Weighted energy of what an adapter does to the measured rows."""
    change = f64(_rows(name, adapted).decode()) - f64(_rows(name, base).decode())
    weights = _weights(name, base, used)
    return float((change**2).sum() if weights is None else (change**2 @ f64(weights)).sum())


def _noise(name: str, model: Model, plan: Plan, used: Importance) -> float:
    """The same of what rounding does to them."""
    planned, rows = _planned(name, plan), _rows(name, model)
    if planned.action == "copy" or planned.grid == rows.grid:
        return 0.0
    weights = _weights(name, model, used)
    return sum(chunk.error.weighted_squared for chunk in encode_tensor(rows, planned.grid, weights, measure=True) if chunk.error)


def _planned(name: str, plan: Plan) -> TensorPlan:
    """The file's tensor that a canonical one becomes, or becomes a part of."""
    stem = name.removesuffix(".weight").split(".")
    layer, role = (int(stem[1]), stem[2]) if stem[0] == "layers" else (None, stem[0])
    roles = {role, *(fused for fused, parts in FUSED.items() if role in parts)}
    if role == "head" and not any(t.role == "head" for t in plan.tensors):
        roles = {"embed"}
    return next(t for t in plan.tensors if t.layer == layer and t.role in roles)


def _relative(noise: float, change: float) -> float:
    return noise / change if change else 0.0
