"""Counts and times of a server in Prometheus' text format, version 0.0.4 (https://prometheus.io/docs/instrumenting/exposition_formats/).

Written on the event loop only, so there are no locks. Labels come from closed sets: an endpoint or model that does not exist counts as
"other", so that nobody outside can make the list of series grow.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

Labels = Mapping[str, str]


class Counter:
    """A number per set of labels that only grows."""

    def __init__(self, name: str, help_text: str) -> None:
        self.name, self.help = name, help_text
        self._values: dict[tuple[tuple[str, str], ...], float] = {}

    def add(self, amount: float = 1, **labels: str) -> None:
        key = tuple(sorted(labels.items()))
        self._values[key] = self._values.get(key, 0) + amount

    def lines(self) -> list[str]:
        samples = [sample(self.name, value, dict(key)) for key, value in sorted(self._values.items())]
        return [*_head(self.name, "counter", self.help), *samples]


class Histogram:
    """Seconds in buckets, with their sum and number."""

    def __init__(self, name: str, help_text: str, bounds: Sequence[float] = SECONDS) -> None:
        self.name, self.help, self.bounds = name, help_text, tuple(bounds)
        self._counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    @property
    def count(self) -> int:
        return sum(self._counts)

    @property
    def mean(self) -> float | None:
        return self.sum / self.count if self.count else None

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds

    def lines(self) -> list[str]:
        out, total = _head(self.name, "histogram", self.help), 0
        for bound, n in zip((*map(_number, self.bounds), "+Inf"), self._counts, strict=True):
            total += n
            out.append(sample(f"{self.name}_bucket", total, {"le": bound}))
        return [*out, sample(f"{self.name}_sum", self.sum), sample(f"{self.name}_count", total)]


def single(name: str, kind: str, help_text: str, value: float, labels: Labels | None = None) -> list[str]:
    """Lines of a metric of one sample, of kind gauge or counter."""
    return [*_head(name, kind, help_text), sample(name, value, labels)]


def sample(name: str, value: float, labels: Labels | None = None) -> str:
    inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in (labels or {}).items())
    return f"{name}{{{inside}}} {_number(value)}" if inside else f"{name} {_number(value)}"


def _head(name: str, kind: str, help_text: str) -> list[str]:
    return [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
