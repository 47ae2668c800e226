"""What an export is going to do with an adapter, and what the other way would have come to.

    merge   into the weights, before they are quantized: the file is as fast as without, but its numbers are rounded again
    keep    beside the weights, as a GGUF LoRA file: weights stay as they are, but every token costs the factors' share

Noise is what both ways are compared by: the squared rounding error of adapted matrices, relative to the squared change that the adapter
makes to them, both weighted by the mean squares of what each column reads. 1 means that rounding moves outputs as far as the adapter does.

A fraction of the change that drowns in noise weighs as much as the same fraction of the speed: an adapter is kept when the noise that a
merge would add is larger than what keeping adds to the time per token, and large enough to matter at all.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from edgeq.sizes import size

Disposition = Literal["merge", "keep"]

TOLERATED_NOISE = 0.05  # that a merge may add without a second thought


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way, as predicted. reason: why it is not possible; None when it is, and only then are the other fields known.

    quant: number format of the weights. noise: see the module. bytes: of the package's model and this adapter. adapter_bytes: beside the
    weights, 0 when merged. rank: the largest of its factors. slowdown: time per token that it adds, as a fraction of the base's.
    lost_energy: fraction of the change's energy that low-rank factors leave out.
    """

    reason: str | None = None
    quant: str | None = None
    noise: float | None = None
    bytes: int | None = None
    adapter_bytes: int = 0
    rank: int | None = None
    slowdown: float = 0.0
    lost_energy: float = 0.0
    fits: bool = True

    @property
    def possible(self) -> bool:
        return self.reason is None

    def to_json(self) -> dict[str, Any]:
        return {"possible": self.possible, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class AdapterPlan:
    """reason: of the disposition, as a sentence. lost_energy and the like: in the two ways."""

    name: str
    kind: str
    scale: float
    disposition: Disposition
    reason: str
    merge: Way
    keep: Way

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "scale": self.scale,
            "disposition": self.disposition,
            "reason": self.reason,
            "merge": self.merge.to_json(),
            "keep": self.keep.to_json(),
        }


def choose(merge: Way, keep: Way) -> tuple[Disposition, str]:
    """What suits one adapter better, and why. At least one of the ways is possible.

    See the module for the rule; what does not fit the device's memory is not kept.
    """
    assert merge.possible or keep.possible
    if not keep.possible:
        return "merge", f"it cannot be kept ({keep.reason})"
    if not merge.possible:
        return "keep", f"it cannot be merged ({merge.reason})"
    assert merge.noise is not None and keep.noise is not None
    more = merge.noise - keep.noise
    lost = f"a merge would add rounding noise of {more:.2g} times the change"
    if more <= TOLERATED_NOISE:
        return "merge", f"{lost if more > 0 else 'a merge rounds no worse than the base is rounded anyway'}, keeping {_costs(keep)}"
    if not keep.fits:
        return "merge", f"{lost}, but with the adapter beside it the model does not fit the device's memory"
    if more <= keep.slowdown:
        return "merge", f"{lost}, but keeping {_costs(keep)}"
    return "keep", f"{lost}; keeping {_costs(keep)}"


def _costs(keep: Way) -> str:
    return f"makes tokens {keep.slowdown:.0%} slower and takes {size(keep.adapter_bytes)}"
