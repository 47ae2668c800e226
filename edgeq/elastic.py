"""How far an elastic package may be cut, and what a cut keeps: the ladder.

Sorting writes one ordered list of steps. A step takes the least important part that is left of one port:

    ffn       MLP channels: gate and up rows, down columns
    kv_group  key and value rows of one KV head, query rows and output columns of the query heads that read it
    head      dimensions of every head: pairs of rotated query and key rows, and as many value rows and output columns
    layer     all that is left of a layer

of one layer, or of all layers alike, for architectures that state a size once. A cut is a prefix of this list, so every rate and every
byte budget has one answer, a higher rate never keeps more of anything, and a cut of a cut is the cut one would have made at once. Parts
are stored in order of importance: what stays is always channels 0 .. n_ff - 1, groups 0 .. n_kv - 1 and dimensions 0 .. head_dim - 1.

llama.cpp's rules for files with sizes per layer (models/deci.cpp) hold after every step: it reads the head size in layer 0, which keeps
its attention; it picks the outputs in the last layer's MLP, which stays; and it passes by a layer without MLP, which must have no attention
either.

This is what the device runs: the standard library is enough.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from operator import index
from typing import Any, Literal, get_args

from edgeq.errors import PackageError, PlanError

Port = Literal["ffn", "kv_group", "head", "layer"]

VERSION = 1
MAX_RATE = 0.35


@dataclass(frozen=True, kw_only=True)
class Step:
    """Of `layer`, or of all layers alike when it is None, cut `port` from `start` parts down to `stop`.

    removed: parameters that go over all layers, biases and norms included. damage: predicted rise of the loss by this step alone, in nats
    per token. Port "layer" goes from 1 to 0 and takes what the steps before it left of its layer.
    """

    layer: int | None
    port: Port
    start: int
    stop: int
    removed: int
    damage: float


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a cut keeps: by layer, the number of MLP channels and of KV groups (zero: the block is gone); and dimensions of a head.

    head_dim: of all heads, which turn the same RoPE pairs; None means as in the file. head_dims: in its place where heads are cut layer by
    layer, of each layer.
    """

    n_ff: tuple[int, ...]
    n_kv: tuple[int, ...]
    head_dim: int | None = None
    head_dims: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class CutSize:
    """What a rate comes to: bytes of the cut, and the fraction of block parameters that it removes."""

    rate: float
    bytes: int
    removed_fraction: float

    def to_json(self) -> dict[str, float]:
        return {"rate": self.rate, "bytes": self.bytes, "removed_fraction": round(self.removed_fraction, 6)}


@dataclass(frozen=True, kw_only=True)
class Point:
    """Of one port of one layer: parts kept, and by then, steps of this port alone: parameters gone and damage in nats per token."""

    kept: int
    removed: int
    damage: float


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """All cuts of one package. n_ff, n_kv, head_dim: sizes before any cut; block_params: parameters of all blocks then.

    head_dim is needed by steps of port "head" only, which are of all layers or each of one. Embeddings, final norm and head do not count.
    Raises PackageError when steps do not follow from one another, or lead to what llama.cpp cannot run.
    """

    n_ff: tuple[int, ...]
    n_kv: tuple[int, ...]
    block_params: int
    steps: tuple[Step, ...]
    head_dim: int | None = None

    def __post_init__(self) -> None:
        if len(self.n_ff) != len(self.n_kv):
            raise PackageError(f"ladder: {len(self.n_ff)} MLP widths but {len(self.n_kv)} KV group counts. Export the package again.")
        if min(self.n_ff + self.n_kv, default=-1) < 0 or self.block_params < 1 or (self.head_dim is not None and self.head_dim < 1):
            raise PackageError(
                f"ladder: MLP widths {list(self.n_ff)}, KV groups {list(self.n_kv)}, head size {self.head_dim} and {self.block_params} "
                "parameters cannot be those of a model. Export the package again."
            )
        left = _Left(list(self.n_ff), list(self.n_kv), self.head_dim)
        for i, step in enumerate(self.steps):
            if fault := left.fault(step):
                raise PackageError(f"ladder step {i}: {fault}. Export the package again.")
            left.take(step)
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

    def damage(self, n_steps: int) -> float:
        """Predicted rise of the loss by the first n_steps steps, in nats per token, if what each one loses just adds up."""
        return math.fsum(step.damage for step in self.steps[:n_steps])

    def kept(self, n_steps: int) -> Kept:
        """What the first n_steps steps leave."""
        left = _Left(list(self.n_ff), list(self.n_kv), self.head_dim)
        for step in self.steps[:n_steps]:
            left.take(step)
        return Kept(
            n_ff=tuple(left.n_ff),
            n_kv=tuple(left.n_kv),
            head_dim=None if left.head_dim == self.head_dim else left.head_dim,
            head_dims=tuple(left.of_head(layer) for layer in range(len(self.n_ff))) if left.head_dims else None,
        )

    @property
    def smallest(self) -> Kept:
        return self.kept(len(self.steps))

    def curve(self) -> dict[tuple[Port, int | None], tuple[Point, ...]]:
        """Damage against kept size, by port and layer (None: all layers alike), from the full size down to the smallest cut."""
        points: dict[tuple[Port, int | None], list[Point]] = {}
        for step in self.steps:
            line = points.setdefault((step.port, step.layer), [Point(kept=step.start, removed=0, damage=0.0)])
            line.append(Point(kept=step.stop, removed=line[-1].removed + step.removed, damage=line[-1].damage + step.damage))
        return {key: tuple(line) for key, line in points.items()}

    def sizes(self, bytes_of: Callable[[Kept], int], rates: Iterable[float]) -> tuple[CutSize, ...]:
        """What each rate comes to. Raises as `steps_for_rate`."""
        found = [(rate, steps_for_rate(self, rate)) for rate in rates]
        return tuple(CutSize(rate=r, bytes=bytes_of(self.kept(n)), removed_fraction=self.removed_fraction(n)) for r, n in found)

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "n_ff": list(self.n_ff),
            "n_kv": list(self.n_kv),
            "head_dim": self.head_dim,
            "block_params": self.block_params,
            "steps": [[s.layer, s.port, s.start, s.stop, s.removed, float(f"{s.damage:.6g}")] for s in self.steps],
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Ladder:
        """Raises PackageError for another version, a missing key, or a value that is not what `to_json` writes."""
        if not isinstance(value, Mapping):
            raise PackageError(f"the ladder is {value!r}, expected an object. The package is damaged; export it again.")
        if value.get("version") != VERSION:
            raise PackageError(f"ladder version {value.get('version')!r}, expected {VERSION}. Use the edgeq that wrote the package.")
        try:
            steps = [
                Step(
                    layer=None if layer is None else index(layer),
                    port=port,
                    start=index(start),
                    stop=index(stop),
                    removed=index(removed),
                    damage=float(damage),
                )
                for layer, port, start, stop, removed, damage in value["steps"]
            ]
            sizes = {key: tuple(index(n) for n in value[key]) for key in ("n_ff", "n_kv")}
            head_dim = None if value["head_dim"] is None else index(value["head_dim"])
            return Ladder(**sizes, head_dim=head_dim, block_params=index(value["block_params"]), steps=tuple(steps))
        except (KeyError, TypeError, ValueError) as err:
            raise PackageError(f"the ladder lacks or misspells {err}. The package is damaged; export it again.") from err


@dataclass
class _Left:
    """What is left while steps are taken. head_dims: of layers whose heads were cut for themselves."""

    n_ff: list[int]
    n_kv: list[int]
    head_dim: int | None
    head_dims: dict[int, int] = field(default_factory=dict)

    def of_head(self, layer: int) -> int:
        assert self.head_dim is not None
        return self.head_dims.get(layer, self.head_dim)

    def take(self, step: Step) -> None:
        """step: one without a fault."""
        layers = range(len(self.n_ff)) if step.layer is None else (step.layer,)
        if step.port == "head" and step.layer is None:
            self.head_dim = step.stop
        elif step.port == "head":
            self.head_dims[layers[0]] = step.stop
        for layer in layers:
            if step.port in ("ffn", "layer"):
                self.n_ff[layer] = step.stop
            if step.port in ("kv_group", "layer"):
                self.n_kv[layer] = step.stop

    def fault(self, step: Step) -> str:
        """Why the step cannot be the next one; empty when it can."""
        n_layers, where = len(self.n_ff), "all layers" if step.layer is None else f"layer {step.layer}"
        if step.port not in get_args(Port) or not (step.layer is None or 0 <= step.layer < n_layers):
            return f"no port {step.port!r} in {where} of {n_layers}"
        if step.port == "layer" and step.layer is None:
            return f"port {step.port!r} cannot be cut in {where}"
        sizes = self._sizes(step)
        if (
            sizes != {step.start}
            or not 0 <= step.stop < step.start
            or step.removed < 1
            or not math.isfinite(step.damage)
            or step.damage < 0
        ):
            return (
                f"{step.port} of {where} goes from {step.start} to {step.stop}, removing {step.removed} parameters at damage "
                f"{step.damage}, but {', '.join(map(str, sorted(sizes))) or 'no dimensions'} are left"
            )
        return self._unrunnable(step, where)

    def _sizes(self, step: Step) -> set[int]:
        """Parts that the port has now, over the layers of the step."""
        if step.port == "head":
            if self.head_dim is None:
                return set()
            return {self.head_dim, *self.head_dims.values()} if step.layer is None else {self.of_head(step.layer)}
        if step.port == "layer":
            assert step.layer is not None
            return {int(self.n_ff[step.layer] + self.n_kv[step.layer] > 0)}
        sizes = self.n_ff if step.port == "ffn" else self.n_kv
        return set(sizes) if step.layer is None else {sizes[step.layer]}

    def _unrunnable(self, step: Step, where: str) -> str:
        if step.port == "head" and (step.stop == 0 or step.stop % 2):
            return f"heads of {step.stop} dimensions do not consist of rotated pairs"
        if step.stop or step.port == "head":
            return ""
        if step.port != "ffn" and step.layer in (0, None):
            return f"{where} would lose the attention, but llama.cpp reads the head size in layer 0"
        if step.port != "kv_group" and step.layer in (len(self.n_ff) - 1, None):
            return f"{where} would lose the MLP, but llama.cpp picks its outputs in that of the last layer"
        if step.port == "ffn" and step.layer is not None and self.n_kv[step.layer]:
            return f"{where} would keep attention without an MLP, but llama.cpp passes by a layer without one"
        return ""


def steps_for_rate(ladder: Ladder, rate: float) -> int:
    """The fewest steps that remove at least `rate` of the block parameters.

    Raises PlanError for a rate outside [0, MAX_RATE], or one that this ladder does not reach.
    """
    if not 0 <= rate <= MAX_RATE:
        raise PlanError(f"rate {rate:g} is outside 0 to {MAX_RATE}: a rate is the fraction of block parameters to remove.")
    n_steps = bisect_left(range(len(ladder.steps) + 1), rate, key=ladder.removed_fraction)
    if n_steps > len(ladder.steps):
        raise PlanError(f"rate {rate:g} is more than this package can be cut: at most {ladder.removed_fraction(-1):.4f}.")
    return n_steps


def steps_for_bytes(ladder: Ladder, bytes_of: Callable[[Kept], int], budget: int) -> int:
    """The fewest steps whose result has at most `budget` bytes. bytes_of: size of a cut, assumed to fall with every step but the first.

    (The first may add more than it takes: compensation.) Raises PlanError naming the smallest cut when that is above the budget.
    """
    if bytes_of(ladder.kept(0)) <= budget:
        return 0
    smallest = bytes_of(ladder.smallest)
    if smallest > budget:
        raise PlanError(
            f"a budget of {budget:,} bytes is below the smallest cut of this package: {smallest:,} bytes, "
            f"at rate {ladder.removed_fraction(-1):.2f}. Give at least that, or export with a smaller --quant."
        )
    low, high = 1, len(ladder.steps)  # high fits
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
