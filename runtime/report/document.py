"""Everything a report says, as plain values: what `-o report.json` holds, and what the page, the Markdown and the terminal show.

A table is {"title", "note", "columns": [{"name", "unit"}], "rows": [{"variant": number, "cells": [...]}]}; a cell is null, a text, or
{"value": number, "shown": text, "low", "high"}: the number is that of the results file, shown is for people.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgeq import __version__
from edgeq.runtime.report.advice import (
    METRICS,
    TOLERANCE,
    Limits,
    Recommendation,
    SlowVariant,
    frontier,
    judge,
    own_warnings,
    quality_key,
    recommend,
    slow_variants,
)
from edgeq.runtime.report.definitions import DEFINITIONS
from edgeq.runtime.report.read import Source, Variant
from edgeq.runtime.report.tables import figure_cell, number_cell, quality_cell, tables

REPORT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report's content. frontier: numbers of the variants on it. speaks: column of the metric that stands for quality, if any."""

    title: str
    limits: Limits | None
    variants: tuple[Variant, ...]
    sources: tuple[Source, ...]
    recommendations: tuple[Recommendation, ...]
    slow: tuple[SlowVariant, ...]
    frontier: frozenset[int]
    speaks: str | None

    def variant(self, number: int) -> Variant:
        return self.variants[number - 1]

    @property
    def chosen(self) -> frozenset[int]:
        return frozenset(one.variant for one in self.recommendations if one.variant is not None)

    @property
    def adapters(self) -> bool:
        return any(v.adapter for v in self.variants)


def make_report(
    variants: Sequence[Variant], sources: Sequence[Source], *, limits: Limits | None = None, title: str = "edgeq report"
) -> Report:
    """Draw the conclusions."""
    timed = [v for v in variants if v.setup is not None]
    return Report(
        title=title,
        limits=limits,
        variants=tuple(variants),
        sources=tuple(sources),
        recommendations=recommend(variants, limits),
        slow=slow_variants(timed),
        frontier=frontier(timed),
        speaks=quality_key(timed) if timed else quality_key(variants),
    )


def to_json(report: Report) -> dict[str, Any]:
    """The whole content. Raw times between tokens stay in the results files."""
    verdicts = {v.number: judge(v, report.limits) for v in report.variants}
    return {
        "edgeq_report": REPORT_VERSION,
        "title": report.title,
        "summary": summary(report),
        "limits": None if report.limits is None else asdict(report.limits),
        "recommendations": [recommendation(report, one) for one in report.recommendations],
        "warnings": warnings(report),
        "variants": [
            {
                **{
                    name: value for name, value in vars(v).items() if name not in ("itl_ms", "setup", "environment", "intervals", "quality")
                },
                "figures": dict(v.figures),
                "warnings": list(v.warnings),
                "against": {name: list(ratio) for name, ratio in v.against.items()},
                "intervals": {name: list(span) for name, span in v.intervals.items()},
                "quality": {key: asdict(one) for key, one in v.quality.items()},
                "setup": None if v.setup is None else asdict(v.setup),
                "qualifies": None if report.limits is None or v.setup is None else verdicts[v.number].qualifies,
                "misses": list(verdicts[v.number].misses),
                "on_frontier": v.number in report.frontier,
            }
            for v in report.variants
        ],
        "tables": tables(report.variants, report.limits),
        "environments": environments(report),
        "sources": [asdict(source) for source in report.sources],
        "definitions": [{"word": word, "meaning": meaning} for word, meaning in DEFINITIONS],
        "tolerance": TOLERANCE,
        "edgeq": __version__,
    }


def summary(report: Report) -> str:
    timed = sum(v.setup is not None for v in report.variants)
    files = ", ".join(source.name for source in report.sources)
    judged = sum(bool(v.quality) for v in report.variants)
    return f"{_plural(len(report.variants), 'variant')}: {timed} timed, {judged} with quality. From {files}."


def _plural(n: int, thing: str) -> str:
    return f"{n} {thing}{'' if n == 1 else 's'}"


def recommendation(report: Report, one: Recommendation) -> dict[str, Any]:
    chosen = None if one.variant is None else report.variant(one.variant)
    return {
        "adapter": one.adapter,
        "variant": one.variant,
        "label": None if chosen is None else chosen.label,
        "artifact": None if chosen is None else chosen.artifact,
        "heading": heading(report, one),
        "reasons": list(one.reasons),
        "facts": [] if chosen is None else [fact for fact in _facts(chosen, report.speaks) if fact["cell"] is not None],
    }


def heading(report: Report, one: Recommendation) -> str:
    who = "" if not report.adapters else f" with {one.adapter}" if one.adapter else " without an adapter"
    return f"Nothing fits{who}" if one.variant is None else f"Use this{who}: {report.variant(one.variant).label}"


def _facts(v: Variant, speaks: str | None) -> list[dict[str, Any]]:
    facts: list[dict[str, Any]] = [
        {"name": "decode tok/s", "cell": figure_cell(v, "decode_tok_s", 1)},
        {"name": "TTFT ms", "cell": figure_cell(v, "ttft_ms", 0)},
        {"name": "peak memory MB", "cell": number_cell(v.memory_bytes, 1, 1e6)},
        {"name": "model MB", "cell": figure_cell(v, "model_bytes", 1, 1e6)},
    ]
    if speaks in v.quality and speaks is not None:
        facts.append({"name": METRICS.get(v.quality[speaks].metric, v.quality[speaks].metric), "cell": quality_cell(v.quality[speaks])})
    return facts


def warnings(report: Report) -> list[dict[str, Any]]:
    """Slow variants first, then what the bench said, each once with the variants that it is about."""
    found: list[dict[str, Any]] = [
        {"variants": [one.variant], "kind": "slow", "text": one.text, "reason": one.reason} for one in report.slow
    ]
    said: dict[str, list[int]] = {}
    for v in report.variants:
        for text in own_warnings(v):
            said.setdefault(text, []).append(v.number)
    return found + [{"variants": numbers, "kind": "bench", "text": text, "reason": None} for text, numbers in said.items()]


_MACHINE = ("cpu", "memory_bytes", "gpus", "os", "software")


def environments(report: Report) -> list[dict[str, Any]]:
    """Machines and software that measured, each once with the variants that ran there."""
    found: list[dict[str, Any]] = []
    for v in report.variants:
        if not v.environment:
            continue
        facts = dict(_flat({key: v.environment[key] for key in _MACHINE if key in v.environment}))
        same = next((one for one in found if one["facts"] == facts), None)
        if same is None:
            found.append({"variants": [v.number], "facts": facts})
        else:
            same["variants"].append(v.number)
    return found


def _flat(value: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    for key, one in value.items():
        name = f"{before}{key.replace('_', ' ')}"
        if isinstance(one, Mapping):
            yield from _flat(one, f"{name} ")
        elif isinstance(one, list):
            texts = [
                ", ".join(f"{k.replace('_', ' ')} {x}" for k, x in item.items()) if isinstance(item, Mapping) else str(item) for item in one
            ]
            yield name, "; ".join(texts) if any(isinstance(item, Mapping) for item in one) else " ".join(texts) or "none"
        else:
            yield name, "unknown" if one is None else str(one)
