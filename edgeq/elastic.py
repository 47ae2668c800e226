"""How far an elastic package may be cut, and what a cut keeps: the ladder.

Sorting writes one ordered list of steps. A step takes the least important part that is left of one port of one layer: `ffn`
channels, or whole `kv_group`s (key and value rows of one KV head, query rows and output columns of the query heads that read it).
A cut is a prefix of this list, so every rate and every byte budget has one answer, a higher rate never keeps more of anything,
and a cut of a cut is the cut one would have made at once. Within a layer parts are stored in order of importance: what stays is
always channels 0 .. n_ff - 1 and groups 0 .. n_kv - 1.

This is what the device runs: the standard library is enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

from edgeq.errors import PackageError, PlanError

Port = Literal["ffn", "kv_group"]

VERSION = 1
MAX_RATE = 0.35


@dataclass(frozen=True, kw_only=True)
class Step:
    """Of `layer`, cut `port` from `start` parts down to `stop`. removed: parameters that go, biases and norms included.

    damage: predicted rise of the loss by this step alone, in nats per token.
    """

    layer: int
    port: Port
    start: int
    stop: int
    removed: int
    damage: float


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a cut keeps: by layer, the number of MLP channels and of KV groups. Zero: the block is gone."""

    n_ff: tuple[int, ...]
    n_kv: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """All cuts of one package. n_ff, n_kv: sizes by layer before any cut; block_params: parameters of all blocks then.

    Embeddings, final norm and head do not count. Raises PackageError when steps do not follow from one another.
    """

    n_ff: tuple[int, ...]
    n_kv: tuple[int, ...]
    block_params: int
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        if len(self.n_ff) != len(self.n_kv):
            raise PackageError(f"ladder: {len(self.n_ff)} MLP widths but {len(self.n_kv)} KV group counts. Export the package again.")
        sizes: dict[Port, list[int]] = {"ffn": list(self.n_ff), "kv_group": list(self.n_kv)}
        for i, step in enumerate(self.steps):
            if step.port not in sizes or not 0 <= step.layer < len(self.n_ff):
                raise PackageError(
                    f"ladder step {i}: no port {step.port!r} in layer {step.layer} of {len(self.n_ff)}. Export the package again."
                )
            size = sizes[step.port][step.layer]
            if step.start != size or not 0 <= step.stop < step.start or step.removed < 1 or not math.isfinite(step.damage):
                raise PackageError(
                    f"ladder step {i}: {step.port} of layer {step.layer} goes from {step.start} to {step.stop}, removing "
                    f"{step.removed} parameters at damage {step.damage}, but {size} are left. Export the package again."
                )
            sizes[step.port][step.layer] = step.stop
        if self._removed[-1] > self.block_params:
            raise PackageError(
                f"ladder: the steps remove {self._removed[-1]:,} of {self.block_params:,} parameters. Export the package again."
            )

    @cached_property
    def _removed(self) -> tuple[int, ...]:
        """Parameters gone after 0, 1, ... steps."""
        return tuple(accumulate((step.removed for step in self.steps), initial=0))

    def removed_fraction(self, n_steps: int) -> float:
        return self._removed[n_steps] / self.block_params

    def kept(self, n_steps: int) -> Kept:
        """What the first n_steps steps leave."""
        n_ff, n_kv = list(self.n_ff), list(self.n_kv)
        for step in self.steps[:n_steps]:
            (n_ff if step.port == "ffn" else n_kv)[step.layer] = step.stop
        return Kept(n_ff=tuple(n_ff), n_kv=tuple(n_kv))

    @property
    def smallest(self) -> Kept:
        return self.kept(len(self.steps))

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "n_ff": list(self.n_ff),
            "n_kv": list(self.n_kv),
            "block_params": self.block_params,
            "steps": [[s.layer, s.port, s.start, s.stop, s.removed, float(f"{s.damage:.6g}")] for s in self.steps],
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Ladder:
        """Raises PackageError for another version, a missing key, or a value that is not what `to_json` writes."""
        if value.get("version") != VERSION:
            raise PackageError(f"ladder version {value.get('version')!r}, expected {VERSION}. Use the edgeq that wrote the package.")
        try:
            steps = [
                Step(layer=int(layer), port=port, start=int(start), stop=int(stop), removed=int(removed), damage=float(damage))
                for layer, port, start, stop, removed, damage in value["steps"]
            ]
            sizes = {key: tuple(int(n) for n in value[key]) for key in ("n_ff", "n_kv")}
            return Ladder(**sizes, block_params=int(value["block_params"]), steps=tuple(steps))
        except (KeyError, TypeError, ValueError) as err:
            raise PackageError(f"the ladder lacks or misspells {err}. The package is damaged; export it again.") from err


def steps_for_rate(ladder: Ladder, rate: float) -> int:
    """The fewest steps that remove at least `rate` of the block parameters.

    Raises PlanError for a rate outside [0, MAX_RATE], or one that this ladder does not reach.
    """
    if not 0 <= rate <= MAX_RATE:
        raise PlanError(f"rate {rate:g} is outside 0 to {MAX_RATE}: a rate is the fraction of block parameters to remove.")
    for n_steps in range(len(ladder.steps) + 1):
        if ladder.removed_fraction(n_steps) >= rate:
            return n_steps
    raise PlanError(f"rate {rate:g} is more than this package can be cut: at most {ladder.removed_fraction(-1):.4f}.")


def steps_for_bytes(ladder: Ladder, bytes_of: Callable[[Kept], int], budget: int) -> int:
    """The fewest steps whose result has at most `budget` bytes. bytes_of: size of a cut, assumed to fall with every step.

    Raises PlanError naming the smallest cut when that is above the budget.
    """
    smallest = bytes_of(ladder.smallest)
    if smallest > budget:
        raise PlanError(
            f"a budget of {budget:,} bytes is below the smallest cut of this package: {smallest:,} bytes, "
            f"at rate {ladder.removed_fraction(-1):.2f}. Give at least that, or export with a smaller --quant."
        )
    low, high = 0, len(ladder.steps)  # high fits
    while low < high:
        middle = (low + high) // 2
        if bytes_of(ladder.kept(middle)) <= budget:
            high = middle
        else:
            low = middle + 1
    return high


def kept_for_rate(ladder: Ladder, rate: float) -> Kept:
    """See `steps_for_rate`."""
    return ladder.kept(steps_for_rate(ladder, rate))


def kept_for_bytes(ladder: Ladder, bytes_of: Callable[[Kept], int], budget: int) -> Kept:
    """See `steps_for_bytes`."""
    return ladder.kept(steps_for_bytes(ladder, bytes_of, budget))
