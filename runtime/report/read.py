"""Results files of `edgeq bench -o` and `edgeq eval -o`, joined to variants: one per measured configuration of one artifact.

A file is {"edgeq_results": 2, "kind": "bench" | "quality", "rows": [...]}, or the bare list of rows that `edgeq bench --json` prints.
A field that is missing or null is unknown; one of another type than it should have is an error that names file, row and field.
Quality belongs to a model and not to a way of running it: rows are joined by hash of the artifact and adapter, and several measurements of
one artifact (prompt lengths, threads, devices) share its quality. A report is about variants of one model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeq.errors import SourceError
from edgeq.runtime.report.row import Row

RESULTS_VERSION = 2
LATENCY = ("p50", "p95", "p99")
_MAX_SAMPLES = 20_000  # inter-token times kept of a variant: enough for every percentile shown


@dataclass(frozen=True, kw_only=True)
class Source:
    """A results file: bare name and hash."""

    name: str
    sha256: str
    kind: str
    rows: int


@dataclass(frozen=True, kw_only=True)
class Quality:
    """One figure of quality, fields as in `edgeq.runtime.evaluation.QualityRow`. data: bare name of the task's file."""

    task: str
    metric: str
    data: str
    value: float
    stderr: float | None
    n: int | None
    reference: str | None
    difference: float | None
    difference_stderr: float | None


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How something was run."""

    runtime: str | None
    device: str | None
    prompt_tokens: int | None
    gen_tokens: int | None
    batch: int | None
    threads: int | None
    kv_type: str | None
    repeat: int | None


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the report; None is unknown. number: by which figures name it. figures: what the bench measured, by field name; the
    percentiles of the time between tokens are "itl_p50_ms" and so on. intervals: 95 % of a figure, where known. against: ratio of a
    figure to the bench's base, with its interval. quality: by column key.
    itl_ms: raw times between tokens, sorted, maybe thinned. setup is None for what was not timed."""

    number: int
    label: str
    artifact: str
    name: str
    sha256: str | None
    quant: str | None
    rate: float | None
    adapter: str | None
    setup: Setup | None
    figures: Mapping[str, float | None]
    intervals: Mapping[str, tuple[float, float]]
    against: Mapping[str, tuple[float, float | None, float | None]]
    itl_ms: tuple[float, ...]
    quality: Mapping[str, Quality]
    warnings: tuple[str, ...]
    environment: Mapping[str, Any]

    def figure(self, name: str) -> float | None:
        return self.figures.get(name)

    @property
    def size_bytes(self) -> float | None:
        """What was stored: how compressed a variant is goes by this."""
        return self.figure("model_bytes") or self.figure("artifact_bytes")

    @property
    def memory_bytes(self) -> float | None:
        """What running it takes: of the GPU where it ran on one, else the process's peak; None when it was not measured."""
        on_gpu = self.setup is not None and (self.setup.device or "").startswith("cuda")
        return self.figure("vram_bytes") if on_gpu else self.figure("peak_rss_bytes")


FIGURES = (
    *("load_s", "load_cold_s", "ttft_ms", "prefill_tok_s", "decode_tok_s", "energy_j_per_token", "adapter_switch_ms"),
    *("peak_rss_bytes", "steady_rss_bytes", "model_bytes", "kv_bytes", "compute_bytes", "vram_bytes", "artifact_bytes"),
    *("frequency_drift", "temperature_c"),
)


def read_results(paths: Sequence[Path]) -> tuple[tuple[Variant, ...], tuple[Source, ...]]:
    """Variants of all files, in the order of their rows, and the files. Raises SourceError."""
    bench: list[Row] = []
    quality: list[Row] = []
    sources = []
    for path in paths:
        kind, rows, digest = _read(path)
        sources.append(Source(name=path.name, sha256=digest, kind=kind, rows=len(rows)))
        (bench if kind == "bench" else quality).extend(rows)
    if not bench and not quality:
        raise SourceError(f"{', '.join(path.name for path in paths)}: no rows. Measure something with `edgeq bench -o` or `edgeq eval -o`.")
    return _labelled(_joined(bench, quality)), tuple(sources)


def _read(path: Path) -> tuple[str, list[Row], str]:
    try:
        content = path.read_bytes()
        document = json.loads(content.decode("utf-8"))
    except OSError as err:
        raise SourceError(f"{path}: cannot be read ({err.strerror}).") from err
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as err:
        raise SourceError(f"{path} is not valid JSON ({err}). Give a file that `edgeq bench -o` or `edgeq eval -o` wrote.") from err
    if isinstance(document, list):
        document = {"edgeq_results": RESULTS_VERSION, "kind": "bench", "rows": document}
    if not isinstance(document, dict) or "edgeq_results" not in document:
        raise SourceError(f"{path} is no results file. Give one that `edgeq bench -o` or `edgeq eval -o` wrote.")
    version, kind, rows = document["edgeq_results"], document.get("kind"), document.get("rows")
    if version != RESULTS_VERSION:
        raise SourceError(f"{path}: results of version {version!r}, this edgeq reads version {RESULTS_VERSION}. Measure again, or update.")
    if kind not in ("bench", "quality"):
        raise SourceError(f"{path}: results of kind {kind!r}; expected bench or quality.")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SourceError(f'{path}: "rows" is no list of objects. The file is damaged; measure again.')
    return kind, [Row(f"{path}, row {i}", row) for i, row in enumerate(rows, 1)], hashlib.sha256(content).hexdigest()


def _joined(bench: Sequence[Row], quality: Sequence[Row]) -> list[Variant]:
    """Bench rows with the quality of their artifact, then artifacts that have quality alone."""
    figures: dict[tuple[str, str | None], dict[str, Quality]] = {}
    known: dict[tuple[str, str | None], Row] = {}
    for row in quality:
        key = row.needed("artifact_sha256"), row.text("adapter")
        known.setdefault(key, row)
        one = _quality(row)
        figures.setdefault(key, {})[f"{one.metric} {one.data}"] = one
    variants, timed = [], set()
    for row in bench:
        made = _timed(row)
        if made.sha256 is not None:
            timed.add(key := (made.sha256, made.adapter))
            if key in figures:
                made = replace(made, quality=figures[key], quant=made.quant or known[key].text("quant"))
        variants.append(made)
    for key, row in known.items():
        if key not in timed:
            variants.append(_untimed(row, figures[key]))
    return variants


def _quality(row: Row) -> Quality:
    value = row.number("value")
    if value is None:
        raise SourceError(f"{row.where}: value is missing. The file is damaged; measure again.")
    return Quality(
        task=row.needed("task"),
        metric=row.needed("metric"),
        data=row.inside("data").text("name") or "",
        value=value,
        stderr=row.number("stderr"),
        n=row.whole("n"),
        reference=row.text("reference"),
        difference=row.number("difference"),
        difference_stderr=row.number("difference_stderr"),
    )


def _timed(row: Row) -> Variant:
    environment, samples = row.inside("environment"), row.inside("samples")
    figures = {name: row.number(name) for name in FIGURES}
    figures |= {f"itl_{p}_ms": row.inside("itl_ms").number(p) for p in LATENCY}
    steps = sorted(step for repeat in samples.objects("repeats") for step in repeat.numbers("itl_ms"))
    intervals = row.inside("intervals")
    spans = {name: span for name in intervals.fields if len(span := intervals.numbers(name)) == 2}
    compared = row.inside("against")
    ratios = {name: compared.inside(name) for name in compared.fields}
    setup = Setup(
        runtime=row.text("runtime"),
        device=row.text("device"),
        **{name: _either(row, environment, name) for name in ("prompt_tokens", "gen_tokens", "batch", "threads", "repeat")},
        kv_type=row.text("kv_type") or environment.text("kv_type"),
    )
    warnings = row.fields.get("warnings") or []
    contention = environment.inside("contention").text("warning")
    said = [str(text) for text in warnings] if isinstance(warnings, list) else []
    if contention and contention not in said:
        said.append(contention)
    return Variant(
        number=0,
        label="",
        artifact=row.needed("artifact"),
        name=row.text("name") or Path(row.needed("artifact")).name or row.needed("artifact"),
        sha256=row.text("artifact_sha256") or environment.text("artifact_sha256"),
        quant=row.text("quant"),
        rate=row.number("rate"),
        adapter=row.text("adapter"),
        setup=setup,
        figures=figures,
        intervals={name: (low, high) for name, (low, high) in spans.items()},
        against={
            name: (ratio, r.number("low"), r.number("high")) for name, r in ratios.items() if (ratio := r.number("ratio")) is not None
        },
        itl_ms=tuple(steps if len(steps) <= _MAX_SAMPLES else steps[:: math.ceil(len(steps) / _MAX_SAMPLES)]),
        quality={},
        warnings=tuple(said),
        environment=environment.fields,
    )


def _either(row: Row, environment: Row, key: str) -> int | None:
    value = row.whole(key)
    return environment.whole(key) if value is None else value


def _untimed(row: Row, quality: Mapping[str, Quality]) -> Variant:
    return Variant(
        number=0,
        label="",
        artifact=row.needed("artifact"),
        name=row.text("name") or Path(row.needed("artifact")).name,
        sha256=row.text("artifact_sha256"),
        quant=row.text("quant"),
        rate=row.number("rate"),
        adapter=row.text("adapter"),
        setup=None,
        figures={},
        intervals={},
        against={},
        itl_ms=(),
        quality=quality,
        warnings=(),
        environment={},
    )


def _labelled(variants: Sequence[Variant]) -> tuple[Variant, ...]:
    """Numbers, and labels that are as short as they can be and still differ."""
    labels = [_label(v) for v in variants]
    more = (
        lambda v: v.name,
        lambda v: None if v.setup is None else v.setup.runtime,
        lambda v: "not timed" if v.setup is None else v.setup.device,
        lambda v: None if v.setup is None or v.setup.prompt_tokens is None else f"{v.setup.prompt_tokens} prompt tokens",
        lambda v: None if v.setup is None or v.setup.batch is None else f"batch {v.setup.batch}",
        lambda v: None if v.setup is None or v.setup.threads is None else f"{v.setup.threads} threads",
        lambda v: None if v.setup is None else v.setup.kv_type,
        lambda v: v.artifact,
    )
    for detail in more:
        for label in {label for label in labels if labels.count(label) > 1}:
            same = [i for i, one in enumerate(labels) if one == label]
            details = {i: detail(variants[i]) for i in same}
            if len(set(details.values())) > 1:
                for i, text in details.items():
                    labels[i] = f"{label}, {text}" if text else label
    return tuple(replace(v, number=i, label=label) for i, (v, label) in enumerate(zip(variants, labels, strict=True), 1))


def _label(v: Variant) -> str:
    cut = f" cut {v.rate * 100:g} %" if v.rate else ""
    return f"{v.quant or v.name}{cut}{f' + {v.adapter}' if v.adapter else ''}"
