"""From samples to rows: figures, intervals, ratios and warnings of every configuration of a run. Reads no device, runs nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from edgeq.runtime import bench_warnings as say
from edgeq.runtime.bench_fields import METRICS_VERSION, PERCENTILES, BenchResult
from edgeq.runtime.bench_kernels import Phase, kernel_reason
from edgeq.runtime.bench_plan import Configuration, main_grid
from edgeq.runtime.bench_stats import interval, median, paired_ratio, percentile_interval, pooled_percentile, spread
from edgeq.runtime.gguf_facts import GgufFacts

Sample = Mapping[str, Any]
_SPEEDS: tuple[tuple[str, Phase], ...] = (("decode_tok_s", "decode"), ("prefill_tok_s", "prefill"))


@dataclass(frozen=True, kw_only=True)
class Run:
    """What all rows of a run share. machine: as `edgeq.runtime.environment.describe` says. before: cores others used before it."""

    device: str
    repeat: int
    before: float | None
    waited_s: float
    machine: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A configuration and its samples, one per round, the same rounds for all configurations of a run."""

    configuration: Configuration
    samples: Sequence[Sample]
    discarded: Sequence[Sample]

    @cached_property
    def values(self) -> Mapping[str, tuple[float | None, ...]]:
        """By figure, one value per round; None where a round has none."""
        c = self.configuration
        warm = [None if s["cold"] else s["load_s"] for s in self.samples]
        cold = [s["load_s"] if s["cold"] else None for s in self.samples]
        energy = [None if s["energy_j"] is None else s["energy_j"] / (c.batch * c.gen_tokens) for s in self.samples]
        return {
            "load_s": tuple(warm),
            "load_cold_s": tuple(cold),
            "ttft_ms": tuple(s["ttft_ms"] for s in self.samples),
            "prefill_tok_s": tuple(c.batch * c.prompt_tokens / s["prefill_s"] for s in self.samples),
            "decode_tok_s": tuple(c.batch * c.gen_tokens / s["decode_s"] for s in self.samples),
            **{f"itl_p{p}_ms": tuple(pooled_percentile([s["itl_ms"]], p) for s in self.samples) for p in PERCENTILES},
            "peak_rss_bytes": tuple(s["peak_rss_bytes"] for s in self.samples),
            "steady_rss_bytes": tuple(s["steady_rss_bytes"] for s in self.samples),
            "energy_j_per_token": tuple(energy),
            "adapter_switch_ms": tuple(s["adapter_switch_ms"] for s in self.samples),
        }

    def known(self, figure: str) -> list[float]:
        return [value for value in self.values[figure] if value is not None]

    @property
    def model_bytes(self) -> int:
        return self.samples[0]["model_bytes"]


def rows_of(measured: Sequence[Measured], run: Run) -> list[BenchResult]:
    """Rows in the order of the configurations."""
    return [_row(one, measured, run) for one in measured]


def _row(one: Measured, measured: Sequence[Measured], run: Run) -> BenchResult:
    c, samples = one.configuration, one.samples
    entry, first = c.entry, samples[0]
    steps = [s["itl_ms"] for s in samples]
    speeds: dict[str, float] = {name: median(one.known(name)) or 0.0 for name in ("ttft_ms", "prefill_tok_s", "decode_tok_s")}
    steady = median(one.known("steady_rss_bytes"))
    contention = say.contention([s["other_cores"] for s in samples], before=run.before, waited_s=run.waited_s)
    settings = {"prompt_tokens": c.prompt_tokens, "gen_tokens": c.gen_tokens, "batch": c.batch, "repeat": run.repeat, "n_ctx": c.n_ctx}
    return BenchResult(
        artifact=entry.artifact,
        name=entry.name,
        artifact_sha256=entry.sha256,
        artifact_bytes=entry.n_bytes,
        elastic_package=entry.elastic_package,
        quant=entry.quant,
        runtime=entry.runtime,
        device=run.device,
        rate=entry.rate,
        adapter=None if entry.adapter is None else entry.adapter[0],
        prompt_tokens=c.prompt_tokens,
        gen_tokens=c.gen_tokens,
        batch=c.batch,
        threads=first["threads"],
        kv_type=entry.kv_type,
        load_s=median(one.known("load_s")),
        load_cold_s=median(one.known("load_cold_s")),
        **speeds,
        itl_ms={f"p{p}": pooled_percentile(steps, p) for p in PERCENTILES},
        peak_rss_bytes=_most(samples, "peak_rss_bytes"),
        steady_rss_bytes=None if steady is None else round(steady),
        model_bytes=one.model_bytes,
        kv_bytes=entry.kv_bytes(c.n_ctx, c.batch),
        compute_bytes=_most(samples, "compute_bytes"),
        vram_bytes=_most(samples, "vram_bytes"),
        energy_j_per_token=median(one.known("energy_j_per_token")),
        adapter_switch_ms=median(one.known("adapter_switch_ms")),
        temperature_c=_most(samples, "temperature_c"),
        frequency_drift=frequency_drift(samples),
        intervals=_intervals(one),
        spread={name: spread(one.known(name)) for name in one.values},
        against=_against(one, measured),
        warnings=list(_warnings(one, measured, run, contention["warning"])),
        samples={
            "rss_before_load_bytes": round(median([s["rss_before_load_bytes"] for s in samples]) or 0),
            "repeats": list(samples),
            "discarded": list(one.discarded),
        },
        environment={
            **run.machine,
            "artifact_sha256": entry.sha256,
            "metrics_version": METRICS_VERSION,
            "model": first["description"],
            "threads": first["threads"],
            **settings,
            "kv_type": entry.kv_type,
            "contention": contention,
        },
    )


def _most(samples: Sequence[Sample], name: str) -> Any:
    return max((s[name] for s in samples if s[name] is not None), default=None)


def frequency_drift(samples: Sequence[Sample]) -> float | None:
    """Clock after the last repeat / after the first - 1; None where it was not read twice."""
    clocks = [s["frequency_mhz"] for s in samples if s["frequency_mhz"]]
    return clocks[-1] / clocks[0] - 1 if len(clocks) > 1 else None


def _intervals(one: Measured) -> dict[str, Sequence[float] | None]:
    steps = [s["itl_ms"] for s in one.samples]
    found: dict[str, Sequence[float] | None] = {name: interval(one.known(name)) for name in one.values if name != "peak_rss_bytes"}
    return found | {f"itl_p{p}_ms": percentile_interval(steps, p) for p in PERCENTILES}


def _against(one: Measured, measured: Sequence[Measured]) -> dict[str, Mapping[str, float | None]] | None:
    """Ratios to the base at the same settings; None for the base, and without one."""
    c = one.configuration
    base = next((other for other in measured if other.configuration.base and other.configuration.setup == c.setup), None)
    if base is None or base is one:
        return None
    ratios = {name: paired_ratio(values, base.values[name]) for name, values in one.values.items()}
    return {name: ratio.to_json() for name, ratio in ratios.items() if ratio is not None}


def _warnings(one: Measured, measured: Sequence[Measured], run: Run, contention: str | None) -> Iterator[str]:
    found = (
        say.busy_before(run.before, run.waited_s),
        say.too_many_threads(one.samples[0]["threads"], run.machine["cpu"]["usable_cores"], run.device),
        say.not_cached([s["resident_fraction"] for s in one.samples if not s["cold"]]),
        say.clock_fell(frequency_drift(one.samples), _most(one.samples, "temperature_c")),
        say.slowed_down(one.known("decode_tok_s")),
        contention or say.noisy({"decoding": one.known("decode_tok_s"), "computing the prompt": one.known("prefill_tok_s")}),
    )
    yield from (text for text in found if text is not None)
    yield from slow_warnings(one, measured, run)


def slow_warnings(one: Measured, measured: Sequence[Measured], run: Run) -> Iterator[str]:
    """A sentence for each phase in which a less compressed variant of the same run was faster: the fastest of them is named.

    Failing that, for each in which one that is no larger was faster by more than its bytes explain, where the kernels say why.
    """
    alike = [other for other in measured if other is not one and _comparable(one, other)]
    for figure, phase in _SPEEDS:
        ratios = [(ratio, other) for other in alike if (ratio := paired_ratio(one.values[figure], other.values[figure])) is not None]
        for ratio, other in sorted(ratios, key=lambda pair: (not _is_larger(pair[1], one), pair[0].ratio)):
            reason = _reason(one, other, run, phase)
            facts: dict[str, Any] = {
                "other": other.configuration.entry.label,
                "n_bytes": one.model_bytes,
                "other_bytes": other.model_bytes,
            }
            if _is_larger(other, one):
                if say.is_slower(ratio):
                    yield say.slower_though_smaller(figure, ratio, **facts, reason=reason)
                    break
            elif reason and say.is_slow_for_its_size(ratio, n_bytes=one.model_bytes, other_bytes=other.model_bytes):
                yield say.slower_than_its_size(figure, ratio, **facts, reason=reason)
                break


def _comparable(one: Measured, other: Measured) -> bool:
    """Whether both are variants of one model, run alike."""
    a, b = one.configuration, other.configuration
    alike = a.setup == b.setup and a.entry.runtime == b.entry.runtime and (a.entry.adapter is None) == (b.entry.adapter is None)
    return alike and (a.entry.artifact == b.entry.artifact or _shape(a) == _shape(b))


def _is_larger(other: Measured, one: Measured) -> bool:
    """By at least 1 % of the bytes of tensors."""
    return other.model_bytes > 1.01 * one.model_bytes


def _shape(configuration: Configuration) -> tuple[int | None, ...]:
    """Sizes that variants of one model share."""
    facts = configuration.entry.facts
    return facts.n_vocab, facts.n_layers, facts.n_embd if isinstance(facts, GgufFacts) else None


def _reason(one: Measured, other: Measured, run: Run, phase: Phase) -> str | None:
    slow, fast = (main_grid(m.configuration.entry.facts) for m in (one, other))
    if run.device != "cpu" or slow is None or fast is None or slow.name == fast.name:
        return None
    return kernel_reason(slow, fast, flags=run.machine["cpu"]["flags"], phase=phase)
