"""Why a smaller number format can be the slower one in llama.cpp on a CPU: which formats have which kernels.

Read from llama.cpp as in llama-cpp-python 0.3.36 (ggml-cpu/repack.cpp by way of `edgeq.footprint`, llamafile/sgemm.cpp, tiled/tiled.cpp):

rearranged   blocks of several rows interleaved at load, so that one vector instruction serves several rows: fast for one token and many
tiled        products of several tokens at once, in tiles: for prompts (from 2 tokens on; K-quants and most IQ formats from 8 on, x86 only)
neither      every product of a row and a token on its own
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from edgeq.footprint import is_repacked
from edgeq.grids import Grid
from edgeq.profiles import Isa

Phase = Literal["prefill", "decode"]

_ISA: dict[str, Isa] = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "neon": "neon",
    "dotprod": "dotprod",
    "i8mm": "i8mm",
}  # by names of `cpu_flags`
_TILED_X86 = frozenset({"F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0", "IQ4_NL"})
_TILED_X86_K = frozenset(
    {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ3_XXS", "IQ3_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M"}
)
_TILED_ARM = frozenset({"F32", "F16", "Q8_0", "Q4_0"})
_SPLIT_BITS = frozenset({"Q5_0", "Q5_1"})
_ROWS = 8  # rows of a matrix: a multiple of what rearranging takes


def kernel_reason(slow: Grid, fast: Grid, *, flags: Collection[str], phase: Phase) -> str | None:
    """What is known to make the format `slow` slower than the larger `fast` on a CPU with these flags; None when nothing is."""
    isa = [_ISA[flag] for flag in flags if flag in _ISA]
    if is_repacked(fast, _ROWS, isa) and not is_repacked(slow, _ROWS, isa):
        return f"llama.cpp rearranges {fast.name} blocks for this CPU's vector instructions, and {slow.name} blocks it does not"
    if is_repacked(slow, _ROWS, isa):
        return None
    if phase == "prefill" and _is_tiled(fast, isa) and not _is_tiled(slow, isa):
        return f"llama.cpp multiplies {fast.name} with several tokens at once on this CPU, and {slow.name} with one after another"
    if slow.name in _SPLIT_BITS and fast.name not in _SPLIT_BITS:
        return (
            f"{slow.name} keeps the fifth bit of its weights apart from the others, and putting them together takes time at every product"
        )
    return None


def _is_tiled(kind: Grid, isa: Collection[Isa]) -> bool:
    if "avx2" in isa:
        return kind.name in _TILED_X86 | _TILED_X86_K
    return "dotprod" in isa and kind.name in _TILED_ARM
