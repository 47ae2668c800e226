"""Measure artifacts on this device: one definition per figure, the same prompt for all, each configuration in processes of its own.

The figures are defined in `edgeq.runtime.bench_fields`. The prompt is a fixed pseudo-random sequence of ids below the smallest vocabulary
of the artifacts, the same ids for all, so nothing is tokenized.

A run goes in rounds. In each, every configuration (artifact, cut, adapter, prompt length, batch, threads) gets a fresh process, one after
another, so that a slow spell or a warming device meets all of them alike: A B A B. The process loads, warms up with the prompt (its first
512 tokens) and 4 steps, thrown away, and is measured once; every second load is from files that were dropped from the page cache. A cut is
made in memory before anything is timed.

Use of the machine by others is watched before the run and in every repeat. Two llama.cpp processes of two threads each on two cores were
20 times slower than one, so rounds in which others used more than 5 % of a core are taken again, up to `retakes` of them, and what stays
disturbed is told by a warning of the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil

from edgeq.errors import PlanError, UsageError
from edgeq.progress import Progress, silent
from edgeq.runtime.bench_fields import METRICS_VERSION, BenchResult
from edgeq.runtime.bench_plan import Configuration, Entry, check_rates, configurations, counts, open_entry, prompt_ids, prompts_of
from edgeq.runtime.bench_rows import Measured, Run, Sample, rows_of
from edgeq.runtime.bench_warnings import contention, is_disturbed
from edgeq.runtime.child import Child
from edgeq.runtime.contention import wait_for_quiet
from edgeq.runtime.device import parse_device
from edgeq.runtime.engine import prepare
from edgeq.runtime.environment import describe
from edgeq.runtime.page_cache import drop_pages, read_pages, resident_fraction

__all__ = ["METRICS_VERSION", "BenchResult", "bench", "check_rates", "contention", "prompt_ids"]

RETAKES = 2
_WARM_PROMPT, _WARM_STEPS = 512, 4

Round = list[Sample]  # one sample of each configuration


def bench(
    artifacts: Sequence[Path | str],
    *,
    prompt_tokens: int | Sequence[int] = 512,
    gen_tokens: int = 128,
    repeat: int = 5,
    batch: int | Sequence[int] = 1,
    threads: int | Sequence[int] | None = None,
    device: str = "cpu",
    kv_type: str | None = None,
    rates: Sequence[float] | None = None,
    adapter: str | None = None,
    against: Path | str | None = None,
    cold: bool = True,
    retakes: int = RETAKES,
    wait_s: float = 0.0,
    progress: Progress = silent,
) -> list[BenchResult]:
    """Measure packages, GGUF files or ONNX folders side by side; results in the order given.

    prompt_tokens, batch, threads: every artifact at each of these. threads: default is every core this process may use. rates: measure
    every artifact at each of these rates. adapter: with this adapter of the package, by name, or a GGUF adapter of the uncut model, by
    path. against: an artifact that is measured too, as it is, without cut or adapter, and that the others are compared with; its rows come
    first unless it is one of them. device: "cpu", "cuda" or "cuda:N". cold: also time loading from files that are not in the page cache.
    retakes: rounds to take again at most when others used the machine. wait_s: how long to wait for a quiet machine before the run.
    Raises UsageError for counts below 1, an unknown device or KV type, rates that make no list, a batch of sequences in ONNX Runtime,
    PackageError for a rate above 0 of what cannot be cut, SourceError/UnsupportedError/PackageError for a bad artifact, AdapterError for an
    adapter that is broken or another model's, PlanError when keys and values exceed the memory, RuntimeFailure when a runtime refuses or
    dies, or was not built for the device.
    """
    lengths, sequences = counts("prompt_tokens", prompt_tokens), counts("batch", batch)
    thread_counts: tuple[int | None, ...] = (None,) if threads is None else counts("threads", threads)
    for name, value, least in (("gen_tokens", gen_tokens, 1), ("repeat", repeat, 1), ("retakes", retakes, 0), ("wait_s", wait_s, 0)):
        if value < least:
            raise UsageError(f"{name} is {value}; expected at least {least}")
    if not artifacts:
        raise UsageError("nothing to measure; give at least one package or GGUF file")
    gpu = parse_device(device)
    device = "cpu" if gpu is None else f"cuda:{gpu}"
    check_rates(rates)
    with ExitStack() as cuts:
        entries = [
            open_entry(artifact, rate, adapter, cuts, kv_type=kv_type)
            for artifact in artifacts
            for rate in (rates if rates is not None else [None])
        ]
        base = None if against is None else open_entry(against, None, None, cuts, kv_type=kv_type)
        plan = configurations(entries, base, prompt_tokens=lengths, gen_tokens=gen_tokens, batch=sequences, threads=thread_counts)
        for path in {c.entry.runtime: c.entry.path for c in plan}.values():
            prepare(path, gpu)
        if gpu is None:
            _check_memory(plan)
        before, waited_s = wait_for_quiet(wait_s)
        kept, discarded = _rounds(plan, repeat, retakes, device, cold, progress)
        run = Run(device=device, repeat=repeat, before=before, waited_s=waited_s, machine=describe())
        measured = [
            Measured(configuration=c, samples=[one[i] for one in kept], discarded=[one[i] for one in discarded]) for i, c in enumerate(plan)
        ]
        return rows_of(measured, run)


def _check_memory(plan: Sequence[Configuration]) -> None:
    """Keys and values alone must fit the machine: runtimes would fill gigabytes before they find that they do not."""
    total = psutil.virtual_memory().total
    for c in plan:
        needed = c.entry.kv_bytes(c.n_ctx, c.batch)
        if needed > total:
            raise PlanError(
                f"{c.entry.artifact}: {c.batch} times {c.n_ctx} tokens of context need {needed / 1e9:.1f} GB of keys and values, this "
                f"machine has {total / 1e9:.1f} GB. Measure a smaller batch or a shorter prompt."
            )


def _rounds(
    plan: Sequence[Configuration], repeat: int, retakes: int, device: str, cold: bool, progress: Progress
) -> tuple[list[Round], list[Round]]:
    """Rounds that count, and those that were taken again or no better."""
    n_vocab = min(c.entry.facts.n_vocab for c in plan)
    done, total = 0, repeat * len(plan)

    def take(is_cold: bool) -> Round:
        nonlocal done
        samples: Round = []
        for c in plan:
            samples.append(_sample(c, prompts_of(c, n_vocab), device, is_cold))
            done += 1
            progress("bench", done, total)
        return samples

    progress("bench", 0, total)
    kept = [take(cold and i % 2 == 1) for i in range(repeat)]
    discarded: list[Round] = []
    for _ in range(retakes):
        worst = max(range(repeat), key=lambda i: disturbance(kept[i]))
        if not disturbance(kept[worst]):
            break
        total += len(plan)
        again = take(cold and worst % 2 == 1)
        if disturbance(again) < disturbance(kept[worst]):
            again, kept[worst] = kept[worst], again
        discarded.append(again)
    return kept, discarded


def disturbance(samples: Sequence[Sample]) -> float:
    """Most cores that others used in a repeat of a round; 0 for what is not worth another round."""
    suffered = (s["other_cores"] for s in samples if is_disturbed(s["other_cores"], s["prefill_s"] + s["decode_s"]))
    return max(suffered, default=0.0)


def _sample(configuration: Configuration, prompts: list[list[int]], device: str, cold: bool) -> Sample:
    """One repeat in a fresh process."""
    c, entry = configuration, configuration.entry
    files = {"path": str(entry.path), "adapter": None if entry.adapter is None else str(entry.adapter[1])}
    settings = {"threads": c.threads, "device": device, "n_ctx": c.n_ctx, "kv_type": entry.kv_type, "batch": c.batch}
    with _child(entry) as child:
        cold = cold and not entry.is_cut and drop_pages(entry.files)
        cached = 0.0 if cold else _warm_up(entry)
        loaded = child.ask({"op": "load", **files, **settings})
        child.ask({"op": "repeat", "prompts": [ids[:_WARM_PROMPT] for ids in prompts], "gen_tokens": min(c.gen_tokens, _WARM_STEPS)})
        repeated = child.ask({"op": "repeat", "prompts": prompts, "gen_tokens": c.gen_tokens})
        ended = child.ask({"op": "end"})
    return {"cold": cold, "resident_fraction": cached, **loaded, **repeated, **ended}


def _warm_up(entry: Entry) -> float | None:
    """Bring an entry's files into the page cache if they fit: the fraction that is there."""
    cached = resident_fraction(entry.files)
    if cached is None or cached == 1 or entry.n_bytes > psutil.virtual_memory().available:
        return cached
    read_pages(entry.files)
    return resident_fraction(entry.files)


def _child(entry: Entry) -> Child:
    return Child("edgeq.runtime._bench_child", entry.artifact, runtime=entry.runtime)
