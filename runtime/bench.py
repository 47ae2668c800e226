"""Measure artifacts on this device: one definition per figure, the same prompt for all, each artifact in a process of its own.

What is measured (METRICS_VERSION changes with any of this):

load_s              loading the model and making its context, in a fresh process, after import of the libraries. The files have just
                    been read for their hash, so their pages are in the system's cache as far as they fit.
prefill_tok_s       prompt_tokens / time of computing the prompt from an empty cache, logits of the last token included.
ttft_ms             the same time plus choosing the first token.
itl_ms              time between tokens: computing one token (one llama_decode) plus finding the likeliest next one, after the prompt.
                    Percentiles (linear interpolation) over all steps of all repeats.
decode_tok_s        gen_tokens / time of gen_tokens such steps. End-of-generation tokens do not stop it.
peak_rss_bytes      most memory the process ever had resident (VmHWM), Python and libraries included
                    (`samples.rss_before_load_bytes` is what those took before the model was loaded).
model_bytes         all tensors of the artifact.
kv_bytes            keys and values of the context, prompt_tokens + gen_tokens (rounded up to 256 cells in llama.cpp), as the runtime
                    allocates them: F16 in llama.cpp, in ONNX Runtime what the graph has.
vram_bytes          GPU memory of the process by NVML.
adapter_switch_ms   with an adapter: what changing to it, once it is in memory, adds to the next computation (`edgeq.runtime.switching`).
energy_j_per_token  energy of the decode steps / gen_tokens: processor packages (RAPL) on the CPU, the GPU's counter (NVML) on a GPU.
                    The counters are the device's, not the process's.
samples             the raw figures, one entry per repeat, in the order they were taken.

Single figures are medians over repeats; what the device does not tell is None. The prompt is a fixed pseudo-random sequence of ids
below the smallest vocabulary of the artifacts, the same ids for all, so nothing is tokenized. One warm-up comes first: the whole prompt
and a few steps, thrown away. Repeats go in turns, A B A B, cuts of one package like artifacts of their own, so that a slow spell of the
machine meets all of them; processes that wait use no processor. A cut is made in memory before anything is timed. Use of the machine by
others is recorded per repeat and `environment.contention.warning` says when it passed 5 % of a core.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from edgeq.adapter_records import find_adapter
from edgeq.elastic import MAX_RATE
from edgeq.errors import PlanError, UsageError
from edgeq.progress import Progress, silent
from edgeq.runtime.adapter_formats import check_base, read_adapter
from edgeq.runtime.child import Child
from edgeq.runtime.contention import THRESHOLD
from edgeq.runtime.device import parse_device
from edgeq.runtime.elastic_package import open_elastic
from edgeq.runtime.engine import Facts, artifact_sha256, default_kv_type, kv_bytes, open_artifact, prepare, read_facts, runtime_of
from edgeq.runtime.environment import describe

METRICS_VERSION = 1
_PROMPT_SEED = 20240229
_WARM_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """One row; fields and units as in the module docstring.

    rate: what the model is cut or pruned by, None for a file that does not say. adapter: name of the one beside it, on all tokens.
    """

    artifact: str
    runtime: str
    device: str
    rate: float | None
    adapter: str | None
    load_s: float
    ttft_ms: float
    prefill_tok_s: float
    decode_tok_s: float
    itl_ms: Mapping[str, float]
    peak_rss_bytes: int | None
    model_bytes: int
    kv_bytes: int
    vram_bytes: int | None
    energy_j_per_token: float | None
    adapter_switch_ms: float | None
    samples: Mapping[str, Any]
    environment: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """An artifact to measure, or a cut of one, which is in memory already. adapter: name and file, cut alike."""

    artifact: str
    path: Path
    is_cut: bool = False
    rate: float | None
    facts: Facts
    sha256: str
    adapter: tuple[str, Path] | None = None

    @property
    def kv_type(self) -> str:
        return default_kv_type(self.facts)

    def kv_bytes(self, n_ctx: int) -> int:
        return kv_bytes(self.facts, n_ctx, self.kv_type)


def bench(
    artifacts: Sequence[Path | str],
    *,
    prompt_tokens: int = 512,
    gen_tokens: int = 128,
    repeat: int = 5,
    threads: int | None = None,
    device: str = "cpu",
    rates: Sequence[float] | None = None,
    adapter: str | None = None,
    progress: Progress = silent,
) -> list[BenchResult]:
    """Measure packages, GGUF files or ONNX folders side by side; results in the order given.

    rates: measure every artifact at each of these rates. adapter: with this adapter of the package, by name, or a GGUF adapter of the uncut
    model, by path. threads: default is every core this process may use. device: "cpu", "cuda" or
    "cuda:N".
    Raises UsageError for counts below 1, an unknown device or rates that make no list, PlanError when the artifacts do not fit into memory
    together, PackageError for a rate above 0 of what cannot be cut, SourceError/UnsupportedError/PackageError for a bad artifact,
    AdapterError for an adapter that is broken or another model's, RuntimeFailure when a runtime refuses or dies.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("gen_tokens", gen_tokens), ("repeat", repeat)):
        if value < 1:
            raise UsageError(f"{name} is {value}; expected at least 1")
    if not artifacts:
        raise UsageError("nothing to measure; give at least one package or GGUF file")
    gpu = parse_device(device)
    device = "cpu" if gpu is None else f"cuda:{gpu}"
    n_ctx = prompt_tokens + gen_tokens
    check_rates(rates)
    with ExitStack() as cuts:
        entries = [_entry(artifact, rate, adapter, cuts) for artifact in artifacts for rate in (rates if rates is not None else [None])]
        if gpu is not None:
            for path in {runtime_of(entry.path): entry.path for entry in entries}.values():
                prepare(path, gpu)
        _check_memory(entries, n_ctx)
        return _measure(entries, prompt_tokens, gen_tokens, repeat, threads, device, progress)


def check_rates(rates: Sequence[float] | None) -> None:
    """Raises UsageError for an empty list, one that repeats a rate, and rates outside 0 to MAX_RATE."""
    if rates is None:
        return
    if not rates or len(set(rates)) < len(rates) or not all(0 <= rate <= MAX_RATE for rate in rates):
        given = ", ".join(f"{rate:g}" for rate in rates) or "none"
        raise UsageError(f"rates to measure are {given}. Give different numbers from 0 to {MAX_RATE}, e.g. 0,0.15,0.25.")


def _measure(
    entries: Sequence[_Entry], prompt_tokens: int, gen_tokens: int, repeat: int, threads: int | None, device: str, progress: Progress
) -> list[BenchResult]:
    n_ctx = prompt_tokens + gen_tokens
    prompt = prompt_ids(min(entry.facts.n_vocab for entry in entries), prompt_tokens)
    total = len(entries) * (2 + repeat)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress("bench", done, total)

    progress("bench", 0, total)
    with ExitStack() as stack:
        children = [stack.enter_context(_child(entry)) for entry in entries]
        loaded = []
        for entry, child in zip(entries, children, strict=True):
            files = {"path": str(entry.path), "adapter": None if entry.adapter is None else str(entry.adapter[1])}
            request = {**files, "threads": threads, "device": device, "n_ctx": n_ctx, "kv_type": entry.kv_type}
            loaded.append(child.ask({"op": "load", **request}))
            step()
        for child in children:
            child.ask({"op": "repeat", "prompt": prompt, "gen_tokens": min(gen_tokens, _WARM_STEPS)})
            step()
        samples: list[list[dict[str, Any]]] = [[] for _ in entries]
        for _ in range(repeat):
            for child, taken in zip(children, samples, strict=True):
                taken.append(child.ask({"op": "repeat", "prompt": prompt, "gen_tokens": gen_tokens}))
                step()
        ended = [child.ask({"op": "end", "repeat": repeat}) for child in children]
    settings = {"prompt_tokens": prompt_tokens, "gen_tokens": gen_tokens, "repeat": repeat, "n_ctx": n_ctx}
    return [
        _result(entry, device, settings, start, taken, end)
        for entry, start, taken, end in zip(entries, loaded, samples, ended, strict=True)
    ]


def _child(entry: _Entry) -> Child:
    return Child("edgeq.runtime._bench_child", entry.artifact, runtime=runtime_of(entry.path))


def prompt_ids(n_vocab: int, n_tokens: int) -> list[int]:
    """The prompt of every measurement: pseudo-random ids, the same for the same vocabulary size; longer ones start with shorter ones."""
    return np.random.default_rng(_PROMPT_SEED).integers(0, n_vocab, n_tokens).tolist()


def _entry(artifact: Path | str, rate: float | None, adapter: str | None, cuts: ExitStack) -> _Entry:
    """rate: None takes the artifact as it is. cuts: keeps a cut alive as long as it is measured."""
    path, package = open_artifact(Path(artifact))
    beside = None if adapter is None else find_adapter(package, adapter)
    is_elastic = package is not None and package.manifest["export"].get("elastic")
    if rate is not None and (rate or is_elastic):
        elastic = open_elastic(Path(artifact))
        size = elastic.at_rate(rate)
        if size.n_steps:
            cut = cuts.enter_context(elastic.cut_to_memory(size))
            if beside is not None:
                beside = beside[0], cuts.enter_context(elastic.cut_adapter_to_memory(beside[1], size)).path
            facts = _checked(cut.path, beside)
            return _Entry(
                artifact=str(artifact), path=cut.path, is_cut=True, rate=rate, facts=facts, sha256=artifact_sha256(cut.path), adapter=beside
            )
    stated = None if package is None else package.manifest["export"].get("rate")
    facts = _checked(path, beside)
    return _Entry(artifact=str(artifact), path=path, rate=stated, facts=facts, sha256=artifact_sha256(path), adapter=beside)


def _checked(path: Path, adapter: tuple[str, Path] | None) -> Facts:
    """Facts about a model that its adapter fits. Raises AdapterError."""
    facts = read_facts(path)
    if adapter is not None:
        check_base(read_adapter(adapter[1], facts), facts)
    return facts


def _check_memory(entries: Sequence[_Entry], n_ctx: int) -> None:
    """All artifacts stay loaded for the whole run. A single one may still try its luck: its pages need not all be resident."""
    needed = sum((0 if entry.is_cut else entry.facts.tensor_bytes) + entry.kv_bytes(n_ctx) for entry in entries)
    available = psutil.virtual_memory().available
    if len(entries) > 1 and needed > available:
        raise PlanError(
            f"{len(entries)} artifacts side by side need about {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free. "
            "Measure fewer at once."
        )


def _result(
    entry: _Entry,
    device: str,
    settings: Mapping[str, Any],
    loaded: Mapping[str, Any],
    taken: Sequence[Mapping[str, Any]],
    ended: Mapping[str, Any],
) -> BenchResult:
    prompt_tokens, gen_tokens = settings["prompt_tokens"], settings["gen_tokens"]
    steps = np.concatenate([sample["itl_ms"] for sample in taken])
    energies = [sample["energy_j"] for sample in taken if sample["energy_j"] is not None]
    return BenchResult(
        artifact=entry.artifact,
        runtime=runtime_of(entry.path),
        device=device,
        rate=entry.rate,
        adapter=None if entry.adapter is None else entry.adapter[0],
        load_s=loaded["load_s"],
        ttft_ms=median(sample["ttft_ms"] for sample in taken),
        prefill_tok_s=median(prompt_tokens / sample["prefill_s"] for sample in taken),
        decode_tok_s=median(gen_tokens / sample["decode_s"] for sample in taken),
        itl_ms={f"p{q}": float(np.percentile(steps, q)) for q in (50, 95, 99)},
        peak_rss_bytes=ended["peak_rss_bytes"],
        model_bytes=ended["model_bytes"],
        kv_bytes=entry.kv_bytes(settings["n_ctx"]),
        vram_bytes=ended["vram_bytes"],
        energy_j_per_token=median(energies) / gen_tokens if energies else None,
        adapter_switch_ms=ended["adapter_switch_ms"],
        samples={"rss_before_load_bytes": loaded["rss_before_load_bytes"], "repeats": list(taken)},
        environment={
            **describe(artifact_sha256=entry.sha256),
            "metrics_version": METRICS_VERSION,
            "model": loaded["description"],
            "threads": loaded["threads"],
            **settings,
            "kv_type": entry.kv_type,
            "contention": contention([sample["other_cores"] for sample in taken]),
        },
    )


def contention(other_cores: Sequence[float | None]) -> dict[str, Any]:
    """What others used in each repeat, in cores, and a warning when any repeat suffered."""
    known = [cores for cores in other_cores if cores is not None]
    worst = max(known, default=None)
    disturbed = sum(cores > THRESHOLD for cores in known)
    warning = None
    if worst is not None and disturbed:
        warning = f"other processes used up to {worst:.2f} of a core in {disturbed} of {len(other_cores)} repeats; timings may be too slow"
    return {"other_cores": list(other_cores), "worst": worst, "warning": warning}
