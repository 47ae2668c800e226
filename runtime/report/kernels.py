"""Why one variant can be slower than another, by what `edgeq.runtime.bench_kernels` knows of llama.cpp's kernels."""

from __future__ import annotations

from edgeq.grids import Grid
from edgeq.profile_keys import base_grid
from edgeq.runtime.bench_kernels import Phase, kernel_reason
from edgeq.runtime.report.read import Variant


def reason(slow: Variant, fast: Variant, phase: Phase) -> str | None:
    """What is known to make `slow` slower than `fast`, which are run alike; None when nothing is."""
    if slow.setup is None or slow.setup.runtime != "llama.cpp" or slow.setup.device != "cpu":
        return None
    a, b = main_grid(slow.quant), main_grid(fast.quant)
    cpu = slow.environment.get("cpu")
    flags = cpu.get("flags") if isinstance(cpu, dict) else None
    if a is None or b is None or not isinstance(flags, list):
        return None
    why = kernel_reason(a, b, flags=flags, phase=phase)
    return None if why is None else f"{why}."


def main_grid(quant: str | None) -> Grid | None:
    """The grid of most blocks of a mixture: Q4_K of Q4_K_M; None for a name that is not llama.cpp's."""
    try:
        return base_grid((quant or "").upper())
    except KeyError:
        return None
