"""What an export is going to be, before any work: in which format, elastic or of one size, in which grids, how large.

Made from headers alone, by the carrier (`edgeq.converters.carriers`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from edgeq.converters.sorted_model import Cuts
from edgeq.elastic import MAX_RATE
from edgeq.elastic_files import SortMode
from edgeq.errors import UnsupportedError, UsageError
from edgeq.model import Model
from edgeq.planning import Plan

RATES = (0.05, 0.15, 0.25, 0.35)  # whose sizes a plan and a manifest state


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How a package is to be cut. elastic: None wants what the model allows. prune: the rate of a package of one size, 0 keeps all."""

    elastic: bool | None = None
    sort: SortMode | None = None
    prune: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.prune <= MAX_RATE:
            raise UsageError(
                f"a rate of {self.prune:g} to prune is outside 0 to {MAX_RATE}: it is the fraction of block parameters to remove"
            )
        if self.prune and self.elastic:
            raise UsageError("an elastic package is cut on the device, a pruned one at export: give --elastic or --prune, not both")
        if self.elastic is False and not self.prune and self.sort not in (None, "none"):
            raise UsageError(f"--sort {self.sort} orders what is cut: leave it out with --fixed, or give a rate with --prune")


AS_ALLOWED = Wish()


@dataclass(frozen=True, kw_only=True)
class Draft:
    """sort: "none" for a package of one size that is not pruned. cuts: what of it can be cut, None when nothing will be.

    down_bias: whether a pruned model's down projections may get a bias. adapted: matrices with a place for adapters, by canonical name, in
    files that have such places; there embedding and head are adapted apart, even where they are one tensor (tied_apart).
    """

    plan: Plan
    elastic: bool
    sort: SortMode
    prune: float
    cuts: Cuts | None
    down_bias: bool = False
    adapted: frozenset[str] = frozenset()
    tied_apart: bool = False


def instead(model: Model, wish: Wish, err: Exception, fixed: Callable[[], Draft]) -> Draft:
    """A package of one size where nobody asked for more; else the reason why not."""
    if wish.elastic or wish.prune or wish.sort is not None:
        raise UnsupportedError(f"{model.name} cannot be cut in this form: {err}") from err
    draft = fixed()
    return replace(draft, plan=draft.plan.with_notes(f"a package of one size, because it cannot be cut: {err}"))


def artifact_name(model_name: str, quant: str, rate: float = 0.0) -> str:
    """A name that says what is in it: "smollm2-135m-instruct-Q4_0", with "-pruned25" behind it for a rate of 0.25."""
    slug = re.sub(r"[^a-z0-9.]+", "-", model_name.lower()).strip("-.") or "model"
    return f"{slug}-{quant}{f'-pruned{round(100 * rate)}' if rate else ''}"
