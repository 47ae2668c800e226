"""Results files made by hand: bench and quality rows of a few variants whose figures are known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

CPU = {"name": "A CPU", "flags": ["avx2", "fma"], "physical_cores": 2, "logical_cores": 4, "usable_cores": 2, "governor": None}


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def bench_row(
    quant: str | None = "Q4_0",
    *,
    rate: float | None = 0.0,
    adapter: str | None = None,
    decode: float = 40.0,
    prefill: float = 300.0,
    model_mb: float = 90.0,
    rss_mb: float | None = 200.0,
    **other: Any,
) -> dict[str, Any]:
    """A row as `edgeq bench -o` writes it; `other` replaces fields."""
    rng = np.random.default_rng(int(model_mb * 10))
    steps = [np.sort(rng.gamma(20.0, 1000 / decode / 20, 40)) for _ in range(3)]
    itl = np.concatenate(steps)
    row = {
        "artifact": f"build/{quant}",
        "name": f"{quant}",
        "quant": quant,
        "runtime": "llama.cpp",
        "device": "cpu",
        "rate": rate,
        "adapter": adapter,
        "prompt_tokens": 512,
        "gen_tokens": 40,
        "batch": 1,
        "threads": 2,
        "kv_type": "f16",
        "load_s": 0.123,
        "load_cold_s": None,
        "ttft_ms": 512 / prefill * 1000 + 1,
        "prefill_tok_s": prefill,
        "decode_tok_s": decode,
        "itl_ms": {f"p{q}": float(np.percentile(itl, q)) for q in (50, 95, 99)},
        "peak_rss_bytes": None if rss_mb is None else int(rss_mb * 1e6),
        "steady_rss_bytes": None,
        "model_bytes": int(model_mb * 1e6),
        "kv_bytes": 12_582_912,
        "compute_bytes": 20_000_000,
        "vram_bytes": None,
        "energy_j_per_token": None,
        "artifact_bytes": int(model_mb * 1e6) + 4321,
        "artifact_sha256": digest(quant, rate),
        "intervals": {"decode_tok_s": [decode * 0.99, decode * 1.01], "prefill_tok_s": [prefill * 0.99, prefill * 1.01]},
        "warnings": [],
        "samples": {"repeats": [{"itl_ms": list(step)} for step in steps]},
        "environment": {
            "cpu": CPU,
            "memory_bytes": 8 << 30,
            "gpus": [],
            "os": "Linux 6.1 x86_64",
            "software": {"edgeq": "0.1.0", "llama_cpp": "0.3.36"},
            "repeat": 3,
            "artifact_sha256": digest(quant, rate),
        },
    }
    return row | other


def quality_rows(quant: str, *, rate: float = 0.0, adapter: str | None = None, **figures: float) -> list[dict[str, Any]]:
    """Rows as `edgeq eval -o` writes them, one per metric."""
    common = {
        "artifact": f"build/{quant}",
        "name": quant,
        "artifact_sha256": digest(quant, rate),
        "runtime": "llama.cpp",
        "quant": quant,
        "rate": rate,
        "adapter": adapter,
        "settings": {"ctx": 512, "chunks": None, "chat": False},
        "n": 2044,
        "library": "llama-cpp-python 0.3.36",
    }
    return [
        common
        | {"task": "text", "metric": metric, "value": value, "stderr": value / 100, "reference": "F16", "difference": value / 10}
        | {"difference_stderr": value / 200, "data": {"name": "book.txt", "sha256": digest("book")}}
        for metric, value in figures.items()
    ]


def write(path: Path, kind: str, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"edgeq_results": 2, "kind": kind, "rows": list(rows)}))
    return path


def results(folder: Path) -> list[Path]:
    """Seven timed variants, one of them slower than a larger one and one with an adapter, and quality of six and of one more."""
    bench = [
        bench_row("Q8_0", decode=30, prefill=280, model_mb=145, rss_mb=270),
        bench_row("Q4_1", decode=26, prefill=150, model_mb=98, rss_mb=222),
        bench_row("Q4_0", decode=41, prefill=310, model_mb=90, rss_mb=214),
        bench_row("Q4_0", rate=0.15, decode=46, prefill=355, model_mb=80, rss_mb=199, warnings=["other processes used 0.40 of a core"]),
        bench_row("Q4_0", rate=0.25, decode=51, prefill=398, model_mb=72, rss_mb=188),
        bench_row("Q2_K", decode=44, prefill=160, model_mb=66, rss_mb=180),
        bench_row("Q4_0", adapter="sql", decode=38, prefill=250, model_mb=90, rss_mb=219, adapter_switch_ms=2.5),
    ]
    quality = [
        *quality_rows("Q8_0", perplexity=17.1, kl_mean=0.007),
        *quality_rows("Q4_1", perplexity=17.9, kl_mean=0.041),
        *quality_rows("Q4_0", perplexity=18.1, kl_mean=0.052),
        *quality_rows("Q4_0", rate=0.15, perplexity=24.0, kl_mean=0.31),
        *quality_rows("Q4_0", rate=0.25, perplexity=33.5, kl_mean=0.66),
        *quality_rows("Q2_K", perplexity=40.2, kl_mean=0.93),
        *quality_rows("F16", perplexity=17.0, kl_mean=0.0),
    ]
    return [write(folder / "bench.json", "bench", bench), write(folder / "quality.json", "quality", quality)]
