"""What of an adapter a LoRA file can carry, and its factors, moved with the base.

A LoRA file adds b @ a beside weight matrices, and nothing else. Changes with exact factors go in as they are (a rank above the matrix's
own is brought down to that, which is exact too); changes of full rank only in the nearest low rank, when that is asked for; biases, norms,
whole modules and new tokens not at all. What cannot go in is refused by name: an adapter that has lost a part is another adapter.

A sorted model has its channels, KV groups and heads in other places. An adapter follows by the same code: of each projection one axis
moves, so one of its factors moves as the weight itself does (rows of b as rows, columns of a as columns), and that factor is handed to
`edgeq.ports.apply` in the weight's place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeq import ports
from edgeq.axes import Index
from edgeq.deltas.adapter import Adapter
from edgeq.deltas.delta import AnyFloats, Array, Delta, Factors, Part, Replace, SetRows, Then, f64
from edgeq.deltas.inside import Inside
from edgeq.deltas.merge import EMBED, HEAD, check_fits
from edgeq.errors import UnsupportedError
from edgeq.low_rank import approximate, check_target, decompose
from edgeq.model import Model
from edgeq.spec import ModelSpec
from edgeq.tensors import LazyTensor, from_values
from edgeq.transforms import PORTS, Numbers

REMEDY = "Merge the adapter instead (--adapters merge)"
# Kinds whose factors are a way of writing down a matrix of full rank: kept, they would take more than a second copy of the weights.
_FULL_RANK = frozenset({"RANDLORA"})
# By role, the factor that stands in for the weight when a model is sorted; the other one meets the residual stream, which stays.
MOVES_A = frozenset(role for port in PORTS.values() for role, member in port.items() if member.axis == "columns")


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptAdapter:
    """Factors by canonical name ("layers.0.wq.weight"), and for those that are approximated the fraction of the energy that is lost.

    base_fingerprint: of the weights that the factors are laid out for, sorted ones if they are sorted (`edgeq.base_fingerprint`).
    """

    name: str
    factors: Mapping[str, Factors]
    lost: Mapping[str, float]
    base_name: str | None = None
    base_fingerprint: str | None = None


def obstacle(name: str, delta: Delta, *, tied: bool) -> str | None:
    """Why a LoRA file has no place for this change of a tensor, whatever its rank; None when it has. tied: head and embedding are one."""
    if name.endswith(".bias"):
        return "a LoRA file has no place for biases"
    if len(delta.shape) != 2:
        return "a LoRA file has no place for norms"
    if delta.out_shape != delta.shape:
        return f"a LoRA file cannot add tokens ({delta.shape[0]} to {delta.out_shape[0]})"
    parts = [delta]
    for part in parts:
        if isinstance(part, Then):
            parts += [part.first, part.second]
        if isinstance(part, Replace):
            return "it is saved whole with the adapter, which is no change of low rank"
        if isinstance(part, Inside):
            return "its codes were trained with it, which a change beside the weights cannot express"
        if isinstance(part, SetRows):
            return "it has trained tokens, whole rows of it"
    if tied and name in (EMBED, HEAD):
        return "embedding and head are one tensor here, and llama.cpp would use one adapter for both, for which it aborts"
    return None


def is_full_rank_kind(kind: str) -> bool:
    return kind in _FULL_RANK


def exact_factors(delta: Delta, base: LazyTensor | None = None) -> Factors | None:
    """Factors that equal the change, of no higher rank than the matrix has; None when there are none. base: for kinds that need it."""
    if len(delta.shape) != 2:
        return None
    factors = delta.factors()
    if factors is None and base is not None:
        factors = delta.factors(f64(base.decode()))
    if factors is None or factors.rank <= min(delta.shape):
        return factors
    return decompose(factors).truncated(min(delta.shape))


def change_of(name: str, delta: Delta, model: Model) -> Array:
    """What the adapter adds to a tensor of the model, spelled out."""
    base = f64(_base(name, model).decode())
    whole = np.concatenate([f64(model.tensors[part].decode()) for part in delta.names]) if isinstance(delta, Part) else base
    return delta.apply(base, whole) - base


def kept_factors(
    adapter: Adapter,
    model: Model,
    *,
    rank: int | None = None,
    energy: float | None = None,
    moments: Mapping[str, AnyFloats] | None = None,
) -> KeptAdapter:
    """The adapter as factors beside this model, as it was before sorting, for a file that llama.cpp loads.

    rank, energy: give changes without exact factors the best ones of this rank, or the fewest that keep this fraction of the energy.
    moments: by canonical linear ("layers.3.wq"), second moments of its inputs, see `edgeq.low_rank.Metric`. Raises UnsupportedError naming
    what a LoRA file cannot carry, why, and what to do; PlanError for a rank or energy that makes no sense; as `check_fits` besides.
    """
    return _as_factors(adapter, model, rank, energy, moments or {}, tied=model.spec.tied)


def lora_factors(
    adapter: Adapter,
    model: Model,
    *,
    rank: int | None = None,
    energy: float | None = None,
    moments: Mapping[str, AnyFloats] | None = None,
) -> KeptAdapter:
    """The adapter as a LoRA for PEFT, which adapts an embedding and the head that shares it apart. Otherwise as `kept_factors`."""
    return _as_factors(adapter, model, rank, energy, moments or {}, tied=False)


def _as_factors(
    adapter: Adapter, model: Model, rank: int | None, energy: float | None, moments: Mapping[str, AnyFloats], *, tied: bool
) -> KeptAdapter:
    if rank is not None or energy is not None:
        check_target(rank, energy)
    check_fits(adapter, model)
    refused = {name: why for name, delta in adapter.deltas.items() if (why := obstacle(name, delta, tied=tied)) is not None}
    if refused:
        first = next(iter(refused))
        more = f", nor {len(refused) - 1} more such tensors" if len(refused) > 1 else ""
        raise UnsupportedError(
            f"adapter {adapter.name!r} cannot be kept: {first} cannot go into a LoRA file{more}: {refused[first]}. {REMEDY}."
        )
    factors: dict[str, Factors] = {}
    lost: dict[str, float] = {}
    for name, delta in adapter.deltas.items():
        found = None if is_full_rank_kind(adapter.kind) else exact_factors(delta, _base(name, model))
        if found is None:
            if rank is None and energy is None:
                raise UnsupportedError(
                    f"adapter {adapter.name!r} cannot be kept as it is: {adapter.kind} changes {name} in full rank. {REMEDY}, or keep the "
                    "nearest change of a lower rank: --approx-rank 32, or --approx-energy 0.95."
                )
            known = moments.get(name.removesuffix(".weight"))
            nearest = approximate(change_of(name, delta, model), rank=rank, energy=energy, moments=known)
            found, lost[name] = nearest.factors, nearest.lost
        factors[name] = found
    return KeptAdapter(name=adapter.name, factors=factors, lost=lost, base_name=adapter.base_name)


def _base(name: str, model: Model) -> LazyTensor:
    return model.tensors[EMBED if name == HEAD and model.spec.tied else name]


def sorted_factors(
    spec: ModelSpec,
    factors: Mapping[str, Factors],
    orders: Sequence[Index],
    *,
    pair_order: Index | None = None,
    rotations: Mapping[int, Numbers] | None = None,
) -> dict[str, Factors]:
    """Factors of an adapter on the sorted model. spec: of the model before sorting; the rest as in `edgeq.ports.apply`, which raises."""
    stand_ins = {name: from_values(_moving(name, part), origin=name) for name, part in factors.items() if name.startswith("layers.")}
    _, moved = ports.apply(spec, stand_ins, orders, pair_order=pair_order, rotations=rotations)
    return {name: _with_moving(name, part, moved[name]) if name in moved else part for name, part in factors.items()}


def _moving(name: str, factors: Factors) -> Array:
    return factors.a if _role(name) in MOVES_A else factors.b


def _with_moving(name: str, factors: Factors, moved: LazyTensor) -> Factors:
    values = f64(moved.decode())
    return Factors(a=values, b=factors.b) if _role(name) in MOVES_A else Factors(a=factors.a, b=values)


def _role(name: str) -> str:
    return name.split(".")[2]
