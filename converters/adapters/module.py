"""One adapted module as a kind's builder sees it: its site, the config, and its tensors by the name behind the module's path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeq.converters.adapters.sites import Site
from edgeq.converters.adapters.targets import pattern_value
from edgeq.converters.adapters.tensors import Tensors
from edgeq.converters.sources.json_file import Section
from edgeq.deltas.delta import AnyFloats, Indices
from edgeq.errors import ShapeError, SourceError


@dataclass(frozen=True, kw_only=True)
class Module:
    """names: file key by what follows the module's path ("lora_A.weight"). index: place among the modules the config selects."""

    site: Site
    config: Section
    names: Mapping[str, str]
    file: Tensors
    shared: Shared
    index: int

    @property
    def where(self) -> str:
        return f"{self.file.path}: {self.site.path}"

    def has(self, *rests: str) -> bool:
        return all(rest in self.names for rest in rests)

    def take(self, *rests: str, shape: tuple[int | None, ...] | None = None) -> AnyFloats:
        """The tensor under the first of these names that is there; None in `shape` is any size from 1.

        Raises SourceError when it is missing, ShapeError when its shape is another.
        """
        rest = next((rest for rest in rests if rest in self.names), None)
        if rest is None:
            have = ", ".join(sorted(self.names)) or "nothing"
            raise SourceError(
                f"{self.where}: {rests[0]} is missing, there is {have}. The adapter is not complete: save or download it again."
            )
        self.check(rest, shape)
        return self.file.take(self.names[rest])

    def take_indices(self, rest: str) -> Indices:
        if rest not in self.names:
            raise SourceError(f"{self.where}: {rest} is missing. The adapter is not complete: save or download it again.")
        return self.file.take_indices(self.names[rest])

    def check(self, rest: str, shape: tuple[int | None, ...] | None) -> None:
        have = self.file.shape(self.names[rest])
        if shape is None:
            return
        if len(have) != len(shape) or any(n != want if want is not None else n < 1 for n, want in zip(have, shape, strict=True)):
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise ShapeError(
                f"{self.where}: {rest} has shape {list(have)}, expected [{wanted}]. "
                "The adapter's config does not describe it, or it was made for another model: "
                f"this one's module is {list(self.site.shape)}."
            )

    def integer(self, key: str, *, pattern: str | None = None) -> int:
        """A positive whole number of the config, for this module where a pattern table names it."""
        default = self.config.integer(key)
        if pattern is None:
            return default
        value = pattern_value(self.config, pattern, self.site.path, default)
        if type(value) is not int or value < 1:
            raise SourceError(f"{self.config.where(pattern)} gives {self.site.path} {value!r}, expected a positive whole number")
        return value

    def number(self, key: str, *, pattern: str | None = None) -> float:
        default = self.config.number(key)
        value = default if pattern is None else pattern_value(self.config, pattern, self.site.path, default)
        if type(value) not in (int, float) or value <= 0:
            raise SourceError(f"{self.config.where(pattern or key)} gives {self.site.path} {value!r}, expected a positive number")
        return float(value)


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What modules have in common. names: file key by its name behind "base_model." ("vera_A"). sites: selected modules, in order."""

    file: Tensors
    names: Mapping[str, str]
    sites: Sequence[Site]
    cache: dict[str, Any]

    def take(self, name: str, shape: tuple[int | None, ...]) -> AnyFloats:
        if name not in self.cache:
            have = self.file.shape(self.names[name])
            if len(have) != len(shape) or any(want is not None and n != want for n, want in zip(have, shape, strict=True)):
                raise ShapeError(f"{self.file.path}: {name} has shape {list(have)}, which does not go with the adapter's config")
            self.cache[name] = self.file.take(self.names[name])
        return self.cache[name]

    def largest(self) -> tuple[int, int]:
        """Most outputs and most inputs of any selected module."""
        return max(site.matrix[0] for site in self.sites), max(site.matrix[1] for site in self.sites)
