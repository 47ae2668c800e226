"""Calibration: which tokens to run, and how strongly each input of every linear is used (the importance matrix).

Importance is what llama.cpp's llama-imatrix measures and its quantizers take: for column j of a weight, the sum of x_j^2 over all
tokens divided by their number (tools/imatrix/imatrix.cpp). Two choices differ from that tool: the head is measured too (there
it is an option), and windows are run as they are, without a BOS token in place of their first one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from edgeq.errors import SourceError, UsageError
from edgeq.progress import Progress, silent
from edgeq.reference import Point, Reference

# Mean squared input per column, float32 (n_in,), by linear: "layers.3.wq", "head". A tied head goes by "head" as well.
Importance = Mapping[str, npt.NDArray[np.float32]]

# Windows for sorting. More and shorter ones generalise better at the same cost.
SORTING_LENGTH = 256
SORTING_WINDOWS = 24
SORTING_HELD_BACK = 4
SORTING_TOKENS = SORTING_LENGTH * (SORTING_WINDOWS + SORTING_HELD_BACK)
SORTING_LEAST = 4
SORTING_SHORTEST = 32

_BROKEN = "Check the checkpoint, or download it again"

_LINEARS: Mapping[Point, tuple[str, ...]] = {
    "attn_in": ("wq", "wk", "wv"),
    "attn_out": ("wo",),
    "mlp_in": ("gate", "up"),
    "mlp_hidden": ("down",),
    "head_in": ("head",),
}


class InputSquares:
    """Running sums of the squared inputs of every linear, in float64. `add` is an observer of a reference (`edgeq.reference`)."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int | None, Point], tuple[torch.Tensor, int]] = {}

    def add(self, layer: int | None, point: Point, x: torch.Tensor) -> None:
        if point not in _LINEARS:
            return
        rows = x.flatten(0, -2)
        squares, n_tokens = rows.square().sum(0, dtype=torch.float64), len(rows)
        if (layer, point) in self._sums:
            known, n_known = self._sums[layer, point]
            squares, n_tokens = known + squares, n_known + n_tokens
        self._sums[layer, point] = squares, n_tokens

    def importance(self) -> Importance:
        """Their means. Raises SourceError naming the first linear whose input was NaN or infinite."""
        means: dict[str, npt.NDArray[np.float32]] = {}
        for (layer, point), (total, n_tokens) in self._sums.items():
            names = [role if layer is None else f"layers.{layer}.{role}" for role in _LINEARS[point]]
            mean = (total / n_tokens).to(torch.float32).cpu().numpy()
            if not np.isfinite(mean).all():
                raise SourceError(f"{names[0]}: its input is NaN or infinite in calibration, so a weight before it is broken. {_BROKEN}")
            means |= dict.fromkeys(names, mean)
        return means


def importance(reference: Reference, windows: Sequence[Sequence[int]], *, progress: Progress = silent) -> Importance:
    """Run the windows and average the squared inputs of every linear, summed in float64.

    Linears that share an input (wq, wk, wv; gate, up) share its array. Raises UsageError without windows, and SourceError naming
    the first linear whose input is NaN or infinite.
    """
    if not windows:
        raise UsageError("no calibration windows: give a text of at least one window")
    squares = InputSquares()
    reference.hidden(windows, observe=squares.add, step="calibrate", progress=progress)
    return squares.importance()


Ranges = Mapping[str, tuple[float, float]]  # least and greatest input, by linear


def input_ranges(reference: Reference, windows: Sequence[Sequence[int]], *, progress: Progress = silent) -> Ranges:
    """Run the windows and find the least and the greatest input of every linear. Raises as `importance`."""
    if not windows:
        raise UsageError("no calibration windows: give a text of at least one window")
    found: dict[str, tuple[float, float]] = {}

    def observe(layer: int | None, point: Point, x: torch.Tensor) -> None:
        for role in _LINEARS.get(point, ()):
            name = role if layer is None else f"layers.{layer}.{role}"
            low, high = float(x.min()), float(x.max())
            if not np.isfinite([low, high]).all():
                raise SourceError(f"{name}: its input is NaN or infinite in calibration, so a weight before it is broken. {_BROKEN}")
            least, greatest = found.get(name, (low, high))
            found[name] = min(low, least), max(high, greatest)

    reference.hidden(windows, observe=observe, step="calibrate", progress=progress)
    return found


def windows_of(tokens: Sequence[int], *, length: int, count: int) -> list[list[int]]:
    """`count` windows of `length` tokens, spread evenly from the first token to the last, without overlap; fewer if the text has fewer.

    Raises UsageError when the text is shorter than one window.
    """
    count = min(count, len(tokens) // length)
    if count < 1:
        raise UsageError(f"the text has {len(tokens)} tokens, fewer than one window of {length}: use a longer text or shorter windows")
    spare = len(tokens) - length
    starts = [i * spare // (count - 1) if count > 1 else 0 for i in range(count)]
    return [list(tokens[start : start + length]) for start in starts]


def split(tokens: Sequence[int], *, length: int, count: int, held_back: int) -> tuple[list[list[int]], list[list[int]]]:
    """Windows to calibrate on, and windows kept apart from them to judge the result: the end of the text, in order.

    Both of `length` tokens: at most `count` and `held_back` of them. A short text gives a fifth of its windows to the second
    part, and at least one. Raises UsageError when the text has less than two windows.
    """
    n_windows = len(tokens) // length
    if n_windows < 2:
        raise UsageError(
            f"the text has {len(tokens)} tokens; calibration and its check need two windows of {length}: "
            "use a longer text or shorter windows"
        )
    n_back = min(held_back, max(1, n_windows // 5))
    edge = len(tokens) - n_back * length
    return windows_of(tokens[:edge], length=length, count=count), windows_of(tokens[edge:], length=length, count=n_back)


def sorting_windows(ids: Sequence[int], n_ctx: int) -> tuple[list[list[int]], list[list[int]]]:
    """Windows for `edgeq.sorting.sort`: those to measure on, and those held back to judge compensation, spread over the whole text.

    Of SORTING_LENGTH tokens, or n_ctx if that is less; shorter when the text has less than SORTING_LEAST windows of that. Raises
    UsageError for a text of less than SORTING_LEAST windows of SORTING_SHORTEST tokens.
    """
    length = min(SORTING_LENGTH, n_ctx, max(len(ids) // SORTING_LEAST, SORTING_SHORTEST))
    if len(ids) < SORTING_LEAST * length:
        raise UsageError(
            f"the calibration text has {len(ids)} tokens; sorting needs {SORTING_LEAST * length}, better some ten thousand. "
            "Use a longer text, or --sort none."
        )
    windows = windows_of(ids, length=length, count=SORTING_WINDOWS + SORTING_HELD_BACK)
    every = len(windows) // min(SORTING_HELD_BACK, len(windows) // SORTING_LEAST)
    held_back = windows[every // 2 :: every]
    return [w for i, w in enumerate(windows) if i % every != every // 2], held_back
