"""What a user asks for: which adapters, under which names, at which strength, and how they are to be shipped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgeq.converters.adapters.open import open_adapter, split_reference
from edgeq.deltas.adapter import Adapter
from edgeq.errors import SourceError, UsageError
from edgeq.model import Model

Mode = Literal["merge", "keep", "auto"]


@dataclass(frozen=True, kw_only=True)
class AdapterRequest:
    """name: None takes the adapter's own. scale: 1 is the strength it was trained with."""

    path: Path
    name: str | None = None
    scale: float = 1.0

    @staticmethod
    def parse(reference: str | Path) -> AdapterRequest:
        """PATH[=NAME][:SCALE]. A path that exists as it stands is not split. Raises UsageError for an unfit name or scale."""
        if isinstance(reference, Path) or Path(reference).exists():
            return AdapterRequest(path=Path(reference))
        rest, sign, number = reference.rpartition(":")
        try:
            scale = float(number) if sign else 1.0
        except ValueError:
            rest, scale = reference, 1.0
        if not math.isfinite(scale):
            raise UsageError(f"--adapter {reference}: the scale {number} is no strength. Give a finite number, such as 0.5.")
        path, name = split_reference(rest if sign and rest else reference)
        return AdapterRequest(path=path, name=name, scale=scale)


@dataclass(frozen=True, kw_only=True)
class AdapterWish:
    """mode: None is auto. rank: of nested adapters, how many directions to take. approx_rank, approx_energy: keep changes of full rank as
    their best low-rank factors. other_base: take adapters that say they were made for other weights. Raises UsageError for what
    contradicts itself.
    """

    requests: tuple[AdapterRequest, ...] = ()
    mode: Mode | None = None
    rank: int | None = None
    approx_rank: int | None = None
    approx_energy: float | None = None
    other_base: bool = False

    def __post_init__(self) -> None:
        given = {
            "--adapters": self.mode,
            "--adapter-rank": self.rank,
            "--approx-rank": self.approx_rank,
            "--approx-energy": self.approx_energy,
            "--other-base": self.other_base or None,
        }
        useless = [option for option, value in given.items() if value is not None]
        if useless and not self.requests:
            raise UsageError(f"{useless[0]} says what to do with adapters: give at least one with --adapter PATH[=NAME]")
        if self.approx_rank is not None and self.approx_energy is not None:
            raise UsageError("--approx-rank and --approx-energy are two ways to say the same: give one of them")
        approximates = self.approx_rank is not None or self.approx_energy is not None
        if approximates and self.mode == "merge":
            raise UsageError("a merge is exact: --approx-rank and --approx-energy are for adapters that are kept")


NO_ADAPTERS = AdapterWish()


def open_adapters(wish: AdapterWish, model: Model) -> list[tuple[Adapter, float]]:
    """Adapters and their scales. Raises SourceError for two of one name, and as `open_adapter`."""
    found: list[tuple[Adapter, float]] = []
    for request in wish.requests:
        adapter = open_adapter(request.path, model, name=request.name, rank=wish.rank, force=wish.other_base)
        if any(adapter.name == other.name for other, _ in found):
            raise SourceError(f"two adapters are named {adapter.name!r}. Give one of them another name: --adapter {request.path}=NAME")
        found.append((adapter, request.scale))
    return found


def parse_references(references: Sequence[str | Path]) -> tuple[AdapterRequest, ...]:
    return tuple(AdapterRequest.parse(reference) for reference in references)
