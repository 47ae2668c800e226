"""Progress of long steps: a callback that the command line turns into a bar and everyone else may ignore."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    def __call__(self, step: str, done: float, total: float) -> None:
        """`step` names the work ("calibrate", "write", ...); done == total ends it."""


def silent(step: str, done: float, total: float) -> None:
    """The default: say nothing."""
