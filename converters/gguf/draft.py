"""Drafts of GGUF packages: elastic where the model can be cut, unless one size is asked for.

An elastic package is planned in the form that sorting will give it, and the sizes of its cuts are foretold as if all parts of the model
mattered the same.
"""

from __future__ import annotations

from dataclasses import replace

from edgeq import ports
from edgeq.converters.draft import RATES, Draft, Wish, instead
from edgeq.converters.gguf.architectures import arch_for
from edgeq.converters.gguf.carrier import plan_tensors
from edgeq.converters.gguf.lowering import Lowered, lower
from edgeq.converters.gguf.mixes import choose_grids, fallback_notes
from edgeq.converters.sorted_model import cutting_grids, even_ladder, find_cuts, ready_to_sort
from edgeq.elastic import Kept, steps_for_rate
from edgeq.errors import PlanError, UnsupportedError
from edgeq.grids import Grid
from edgeq.group_grids import GroupGrid, recodes
from edgeq.model import Model
from edgeq.planning import Layout, Plan, make_plan
from edgeq.profiles import DeviceProfile
from edgeq.spec import ModelSpec


def draft_export(model: Model, device: DeviceProfile, quant: str, wish: Wish, *, n_ctx: int | None = None) -> Draft:
    """Choose. Raises PlanError when nothing fits the device, UnsupportedError for an unknown quant or for what cannot be cut as wished."""
    if wish.elastic is False and not wish.prune:
        return _fixed(model, device, quant, n_ctx=n_ctx)
    try:
        lowered = lower(ready_to_sort(model), elastic=True)
    except (PlanError, UnsupportedError) as err:
        return instead(model, wish, err, lambda: _fixed(model, device, quant, n_ctx=n_ctx))
    plan = plan_elastic(lowered, model, device, quant, n_ctx=n_ctx)
    grids = {t.name: t.grid for t in plan.tensors}
    cuts, sort = find_cuts(lowered, grids), wish.sort or "edgeq"
    try:
        ladder = even_ladder(model, cuts, sort)
    except UnsupportedError as err:
        return instead(model, wish, err, lambda: _fixed(model, device, quant, n_ctx=n_ctx))
    if wish.prune:
        spec, tensors = ports.cut(model.spec, model.tensors, ladder.kept(steps_for_rate(ladder, wish.prune)))
        small = replace(model, spec=spec, tensors=tensors)
        plan = plan_export(lower(small, elastic=True), small, device, plan.quant, n_ctx=n_ctx)
        note = f"pruned by {wish.prune:g}: sizes are those of a cut that takes the same from all layers; sorting will decide"
        return Draft(
            plan=plan.with_notes(note, *cuts.notes), elastic=False, sort=sort, prune=wish.prune, cuts=cuts, down_bias=_has_down_bias(spec)
        )

    def nbytes(kept: Kept) -> int:
        spec, tensors = ports.cut(model.spec, model.tensors, kept)
        left = lower(replace(model, spec=spec, tensors=tensors), elastic=True)
        return plan_tensors(left, {t.name: grids[t.name] for t in left.tensors}).nbytes

    plan = replace(plan, cut_sizes=ladder.sizes(nbytes, RATES)).with_notes(*cuts.notes)
    return Draft(plan=plan, elastic=True, sort=sort, prune=0.0, cuts=cuts)


def plan_export(lowered: Lowered, model: Model, device: DeviceProfile, quant: str, *, n_ctx: int | None) -> Plan:
    """Choose grids for the device from headers alone. Raises PlanError when nothing fits, UnsupportedError for an unknown quant."""

    def lay_out(name: str) -> Layout:
        grids, _ = settled_grids(name, lowered)
        plan = plan_tensors(lowered, grids)
        return Layout(tensors=plan.tensors, file_bytes=plan.nbytes)

    plan = make_plan(device, quant, lay_out, model.spec, n_ctx=n_ctx)
    _, has_importance = settled_grids(plan.quant, lowered)
    return plan.with_notes(*lowered.notes, *fallback_notes(plan.quant, lowered, has_importance=has_importance))


def plan_elastic(lowered: Lowered, model: Model, device: DeviceProfile, quant: str, *, n_ctx: int | None) -> Plan:
    """The same for a file that will be cut. lowered: of `ready_to_sort`; model: as it came, for the grids that it came in."""
    came_in = {t.name: t.tensor.grid for t in lower(model, elastic=True).tensors}

    def lay_out(name: str) -> Layout:
        plan = plan_tensors(lowered, cutting_grids(lowered, settled_grids(name, lowered)[0]))
        return Layout(tensors=tuple(replace(t, source_grid=came_in[t.name]) for t in plan.tensors), file_bytes=plan.nbytes)

    plan = make_plan(device, quant, lay_out, model.spec, n_ctx=n_ctx)
    usual, has_importance = settled_grids(plan.quant, lowered)
    notes = [*lowered.notes, *fallback_notes(plan.quant, lowered, has_importance=has_importance)]
    finer = next((t for t in plan.tensors if t.grid != usual[t.name]), None)
    if finer is not None:
        wanted = usual[finer.name]
        notes.append(
            f"{finer.name}: {finer.grid.name} in place of {wanted.name}, because what one kv head takes with it does not divide into "
            f"blocks of {wanted.block_size}; so for others like it."
        )
    return plan.with_notes(*notes, *_moved_codes(plan))


def _moved_codes(plan: Plan) -> list[str]:
    """A note on codes that a package of one size would keep."""
    lost = [t for t in plan.tensors if t.action == "encode" and (t.source_grid == t.grid or _keeps_codes(t.source_grid, t.grid))]
    if not lost:
        return []
    return [
        f"{lost[0].name}: its {lost[0].source_grid.name} codes are rounded once more, because sorting moves its columns; so for "
        f"{len(lost)} tensors in all. --fixed copies them."
    ]


def _keeps_codes(source: Grid, target: Grid) -> bool:
    return isinstance(source, GroupGrid) and recodes(source, target)


def refitted(plan: Plan, lowered: Lowered) -> Plan:
    """The plan for a model that sorting has given other tensors without blocks: the rotary divisors of reordered pairs."""
    grids = {t.name: t.tensor.grid for t in lowered.tensors} | {t.name: t.grid for t in plan.tensors}
    sources = {t.name: t.source_grid for t in plan.tensors}
    file = plan_tensors(lowered, grids)
    tensors = tuple(replace(t, source_grid=sources.get(t.name, t.source_grid)) for t in file.tensors)
    return replace(plan, tensors=tensors, file_bytes=file.nbytes)


def settled_grids(quant: str, lowered: Lowered) -> tuple[dict[str, Grid], bool]:
    """Grids of a quant, and whether they are those chosen for encoding with importance.

    Some quants choose otherwise with importance than without. A source that already has the grids of either is not encoded again.
    """
    for has_importance in (False, True):
        grids = choose_grids(quant, lowered, has_importance=has_importance)
        if not any(t.tensor.grid != grids[t.name] and not grids[t.name].is_float for t in lowered.tensors):
            return grids, has_importance
    return grids, True


def _has_down_bias(spec: ModelSpec) -> bool:
    """Whether files with sizes per layer have a place for what lost channels do on average."""
    return "down" in arch_for(spec, elastic=True).rules.biases


def _fixed(model: Model, device: DeviceProfile, quant: str, *, n_ctx: int | None) -> Draft:
    plan = plan_export(lower(model), model, device, quant, n_ctx=n_ctx)
    return Draft(plan=plan, elastic=False, sort="none", prune=0.0, cuts=None)
