"""Memory: what a process holds, and what a model's keys and values will take.

Process figures are for this process alone. On Linux they come from /proc/self/status: `rss_anon` is memory of its own (KV cache,
buffers, repacked weights), `rss_file` are pages of mapped files, mostly weights, which other processes share and the system may drop,
`rss_shmem` pages of files in memory: weights of a model that was cut there.
Elsewhere psutil gives the total only and the parts are None.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeq.grids import grid
from edgeq.runtime.gguf_facts import GgufFacts

CELL_STEP = 256  # llama.cpp rounds the cells of a cache up to this
_STATUS = Path("/proc/self/status")
_SMAPS = Path("/proc/self/smaps_rollup")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes. None is unknown.

    model_bytes: tensors of the model. kv_bytes: its KV cache. cuts_bytes: cuts of elastic packages that this process keeps in memory,
    the one its model is mapped from among them. rss: resident now; rss_anon, rss_file, rss_shmem: its parts, of which the last holds what
    is mapped of cuts. pss: resident with shared pages divided among those who share them. peak_rss: the most that was ever resident
    (VmHWM).
    """

    model_bytes: int
    kv_bytes: int
    cuts_bytes: int
    rss: int
    rss_anon: int | None
    rss_file: int | None
    rss_shmem: int | None
    pss: int | None
    peak_rss: int | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def process_memory(*, model_bytes: int, kv_bytes: int, cuts_bytes: int = 0) -> Memory:
    """This process now, beside what is known of its model."""
    status = _fields(_STATUS)
    rss = status.get("VmRSS")
    return Memory(
        model_bytes=model_bytes,
        kv_bytes=kv_bytes,
        cuts_bytes=cuts_bytes,
        rss=_psutil_rss() if rss is None else rss,
        rss_anon=status.get("RssAnon"),
        rss_file=status.get("RssFile"),
        rss_shmem=status.get("RssShmem"),
        pss=_fields(_SMAPS).get("Pss"),
        peak_rss=peak_rss_bytes(),
    )


def peak_rss_bytes() -> int | None:
    """The most memory that this process ever had resident; None where the system does not say."""
    peak = _fields(_STATUS).get("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _psutil_rss() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def _fields(path: Path) -> Mapping[str, int]:
    """Lines "Name:  123 kB" of a /proc file as bytes; empty where there is no such file."""
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    rows = (line.split() for line in text.splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3 and row[2] == "kB"}


def kv_bytes(facts: GgufFacts, n_ctx: int, kv_type: str = "f16", *, n_ubatch: int = 512) -> int:
    """Bytes of keys and values that llama.cpp allocates for one sequence of n_ctx tokens with flash attention.

    Per layer: cells x (key + value row of all KV heads). Cells are n_ctx rounded up to 256; a layer with a sliding window has cells
    for the window and one ubatch instead, when that is less (llama-kv-cache-iswa.cpp; without its full-size option).
    """
    row = grid(kv_type.upper())
    cells = _padded(n_ctx)
    window_cells = min(cells, _padded(facts.window + min(n_ubatch, n_ctx)))
    total = 0
    for n_kv_heads, windowed in zip(facts.n_kv_heads, facts.windowed, strict=True):
        key, value = (row.row_bytes(n_kv_heads * length) for length in (facts.key_length, facts.value_length))
        total += (window_cells if windowed else cells) * (key + value)
    return total


def _padded(n: int) -> int:
    return n + -n % CELL_STEP
