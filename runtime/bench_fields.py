"""What `edgeq bench` reports: every field, defined once. METRICS_VERSION changes with any of this.

A repeat is one process: it loads the artifact, warms up, computes the prompt, then generates. Single figures are medians over repeats
unless it says otherwise here; what the device does not tell is None, never 0.

artifact            what was measured, as it was named; `name` is its last part
artifact_sha256     of the GGUF file, or of model.onnx and its data one after another; of a cut, not of what it was cut from
artifact_bytes      size of those files
elastic_package     name of the elastic package that it is, or was cut from
quant               number format: what the package was exported in, else the format of most bytes of a GGUF file's matrices
rate                what the model is cut or pruned by, None for a file that does not say
adapter             name of the one beside it, on all tokens
prompt_tokens       tokens of the prompt of each sequence
gen_tokens          tokens generated after it
batch               sequences that are computed together (llama.cpp only), each with a prompt of its own
threads             CPU threads that compute
kv_type             number format of keys and values

load_s              loading the model and making its context, in a fresh process, after import of the libraries, the files in the system's
                    page cache as far as they fit
load_cold_s         the same with the files' pages dropped from the page cache before, every second repeat. None where that cannot be
                    shown to have worked (`edgeq.runtime.page_cache`), for cuts, which are in memory, and for a single repeat
prefill_tok_s       batch x prompt_tokens / time of computing the prompts from an empty cache, logits of the last tokens included
ttft_ms             the same time plus choosing the first tokens
itl_ms              time between tokens: computing one token of each sequence (one llama_decode) plus finding the likeliest next ones,
                    after the prompt. Percentiles p50, p95, p99 (linear interpolation) over all steps of all repeats
decode_tok_s        batch x gen_tokens / time of gen_tokens such steps. End-of-generation tokens do not stop it
peak_rss_bytes      most memory the process ever had resident (VmHWM), Python and libraries included, the most of all repeats
                    (`samples.rss_before_load_bytes` is what those took before the model was loaded)
steady_rss_bytes    resident memory of the process (VmRSS) when the last token is out
model_bytes         all tensors of the artifact
kv_bytes            keys and values of the context, prompt_tokens + gen_tokens of each sequence (rounded up to 256 cells in llama.cpp), as
                    the runtime allocates them
compute_bytes       buffers for intermediate results on all devices, as llama.cpp states them; ONNX Runtime does not
vram_bytes          GPU memory of the process by NVML, the most of all repeats
adapter_switch_ms   with an adapter and batch 1: what changing to it, once it is in memory, adds to the next computation
                    (`edgeq.runtime.switching`)
energy_j_per_token  energy of the decode steps / (batch x gen_tokens): processor packages (RAPL) on the CPU, the GPU's counter (NVML) on a
                    GPU. The counters are the device's, not the process's
temperature_c       of the hottest processor sensor, or of the GPU, after a repeat: the highest
frequency_drift     mean clock after the last repeat / after the first - 1

intervals           95 % bootstrap intervals [low, high] by figure (`edgeq.runtime.bench_stats`), of the percentiles as itl_p50_ms and so on
spread              interquartile ranges over repeats, by figure
against             by figure, {ratio, low, high}: this row / the base, median and interval over rounds; None without a base
warnings            what to know before believing the figures, as sentences
samples             repeats: the raw figures, one entry per repeat, in the order they were taken; discarded: those of rounds taken again
environment         machine, software and settings
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

METRICS_VERSION = 2
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """One row; fields and units as in the module docstring."""

    artifact: str
    name: str
    artifact_sha256: str
    artifact_bytes: int
    elastic_package: str | None
    quant: str | None
    runtime: str
    device: str
    rate: float | None
    adapter: str | None
    prompt_tokens: int
    gen_tokens: int
    batch: int
    threads: int
    kv_type: str
    load_s: float | None
    load_cold_s: float | None
    ttft_ms: float
    prefill_tok_s: float
    decode_tok_s: float
    itl_ms: Mapping[str, float]
    peak_rss_bytes: int | None
    steady_rss_bytes: int | None
    model_bytes: int
    kv_bytes: int
    compute_bytes: int | None
    vram_bytes: int | None
    energy_j_per_token: float | None
    adapter_switch_ms: float | None
    temperature_c: float | None
    frequency_drift: float | None
    intervals: Mapping[str, Sequence[float] | None]
    spread: Mapping[str, float | None]
    against: Mapping[str, Mapping[str, float | None]] | None
    warnings: Sequence[str]
    samples: Mapping[str, Any]
    environment: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {name: _plain(value) for name, value in vars(self).items()}


def _plain(value: Any) -> Any:
    """Mappings and sequences as JSON has them."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
