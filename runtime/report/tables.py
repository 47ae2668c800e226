"""The tables of a report: every row, by subject, so that each fits a page. `edgeq.runtime.report.document` says what a table is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from edgeq.runtime.report.advice import METRICS, Limits, judge
from edgeq.runtime.report.read import LATENCY, Quality, Variant

Cell = dict[str, Any] | str | None


def tables(variants: Sequence[Variant], limits: Limits | None) -> list[dict[str, Any]]:
    """Speed and memory of what was timed, quality of what was judged."""
    timed = [v for v in variants if v.setup is not None]
    made = []
    if timed:
        setups = [v.setup for v in timed if v.setup is not None]
        varying = [
            name for name in ("prompt_tokens", "gen_tokens", "batch", "threads", "kv_type") if len({getattr(s, name) for s in setups}) > 1
        ]
        speed: list[tuple[str, Callable[[Variant], Cell]]] = [
            ("runtime", lambda v: f"{_setup(v, 'runtime')} {_setup(v, 'device')}"),
            *((name.replace("_", " "), lambda v, name=name: _setup(v, name)) for name in varying),
            ("decode tok/s", lambda v: figure_cell(v, "decode_tok_s", 1)),
            ("prefill tok/s", lambda v: figure_cell(v, "prefill_tok_s", 1)),
            ("decode, of base", lambda v: _ratio(v, "decode_tok_s")),
            ("prefill, of base", lambda v: _ratio(v, "prefill_tok_s")),
            ("TTFT ms", lambda v: figure_cell(v, "ttft_ms", 1)),
            *((f"ITL {p} ms", lambda v, p=p: figure_cell(v, f"itl_{p}_ms", 2)) for p in LATENCY),
            ("load s", lambda v: figure_cell(v, "load_s", 2)),
            ("cold load s", lambda v: figure_cell(v, "load_cold_s", 2)),
            ("adapter switch ms", lambda v: figure_cell(v, "adapter_switch_ms", 1)),
            ("energy J/token", lambda v: figure_cell(v, "energy_j_per_token", 3)),
            ("limits", lambda v: _verdict(v, limits)),
        ]
        made.append(_table("Speed", _run(setups), speed, timed, keep=("decode tok/s", "energy J/token")))
        memory: list[tuple[str, Callable[[Variant], Cell]]] = [
            ("peak RSS MB", lambda v: figure_cell(v, "peak_rss_bytes", 1, 1e6)),
            ("steady RSS MB", lambda v: figure_cell(v, "steady_rss_bytes", 1, 1e6)),
            ("VRAM MB", lambda v: figure_cell(v, "vram_bytes", 1, 1e6)),
            ("model MB", lambda v: figure_cell(v, "model_bytes", 1, 1e6)),
            ("KV MB", lambda v: figure_cell(v, "kv_bytes", 1, 1e6)),
            ("compute MB", lambda v: figure_cell(v, "compute_bytes", 1, 1e6)),
            ("file MB", lambda v: figure_cell(v, "artifact_bytes", 1, 1e6)),
        ]
        made.append(_table("Memory", "Megabytes of 1,000,000 bytes.", memory, timed, keep=("peak RSS MB", "model MB")))
    judged = _one_per_model([v for v in variants if v.quality])
    keys = list(dict.fromkeys(key for v in judged for key in v.quality if not key.startswith("nll_mean ")))
    if judged:
        quality: list[tuple[str, Callable[[Variant], Cell]]] = [
            (column, partial(_quality_in, key)) for key, column in _columns(keys).items()
        ]
        references = {one.reference for v in judged for one in v.quality.values()} - {None}
        note = (
            f"With standard errors; in brackets the difference from {', '.join(sorted(map(str, references)))}."
            if references
            else "With standard errors."
        )
        made.append(_table("Quality", note, quality, judged, keep=tuple(_columns(keys).values())))
    return made


def _columns(keys: Iterable[str]) -> dict[str, str]:
    """Names of quality columns: the metric, and the file's name where one metric was measured on several."""
    metrics = [key.split(" ", 1)[0] for key in keys]
    return {
        key: METRICS.get(metric, metric) + (f" ({key.split(' ', 1)[1]})" if metrics.count(metric) > 1 else "")
        for key, metric in zip(keys, metrics, strict=True)
    }


def _one_per_model(variants: Sequence[Variant]) -> list[Variant]:
    """The first variant of every model: ways of running it share its quality."""
    first: dict[object, Variant] = {}
    for v in variants:
        first.setdefault((v.sha256, v.adapter) if v.sha256 else v.number, v)
    return list(first.values())


def _table(
    title: str, note: str, columns: Sequence[tuple[str, Callable[[Variant], Cell]]], variants: Sequence[Variant], *, keep: tuple[str, ...]
) -> dict[str, Any]:
    """keep: columns that are shown even where nothing is known; others without anything in them are left out."""
    filled = [(name, [cell(v) for v in variants]) for name, cell in columns]
    shown = [(name, cells) for name, cells in filled if name in keep or any(cell is not None for cell in cells)]
    return {
        "title": title,
        "note": note,
        "columns": [name for name, _ in shown],
        "rows": [{"variant": v.number, "label": v.label, "cells": [cells[i] for _, cells in shown]} for i, v in enumerate(variants)],
    }


def _setup(v: Variant, name: str) -> str:
    value = getattr(v.setup, name)
    return "?" if value is None else str(value)


def _run(setups: Sequence[Any]) -> str:
    """What all rows have in common of how they were run."""
    names = {"prompt_tokens": "{} prompt tokens", "gen_tokens": "{} generated", "batch": "batch {}", "threads": "{} threads"}
    names |= {"kv_type": "{} cache", "repeat": "medians of {} repeats"}
    common = [
        text.format(value)
        for name, text in names.items()
        if len(values := {getattr(s, name) for s in setups}) == 1 and (value := values.pop())
    ]
    return f"{', '.join(common)}." if common else ""


def _verdict(v: Variant, limits: Limits | None) -> Cell:
    if limits is None:
        return None
    verdict = judge(v, limits)
    return (
        f"missed: {'; '.join(verdict.misses)}"
        if verdict.misses
        else "kept"
        if not verdict.unknown
        else f"kept; {', '.join(verdict.unknown)} unknown"
    )


def figure_cell(v: Variant, name: str, digits: int, scale: float = 1.0) -> Cell:
    return number_cell(v.figure(name), digits, scale, v.intervals.get(name))


def _ratio(v: Variant, name: str) -> Cell:
    """How a figure compares with that of the bench's --against."""
    if name not in v.against:
        return None
    ratio, low, high = v.against[name]
    return number_cell(ratio, 3, 1.0, None if low is None or high is None else (low, high))


def number_cell(value: float | None, digits: int, scale: float = 1.0, span: tuple[float, float] | None = None) -> Cell:
    if value is None:
        return None
    cell: dict[str, Any] = {"value": value, "shown": f"{value / scale:,.{digits}f}"}
    if span is not None:
        low, high = (f"{end / scale:,.{digits}f}" for end in span)
        cell |= {"low": span[0], "high": span[1], "span": f"{low} to {high}"}
    return cell


def _quality_in(key: str, v: Variant) -> Cell:
    return quality_cell(v.quality[key]) if key in v.quality else None


def quality_cell(one: Quality) -> Cell:
    shown = f"{one.value:.4g}" + ("" if one.stderr is None else f" ± {one.stderr:.2g}")
    if one.difference is not None:
        shown += f" ({one.difference:+.3g}{'' if one.difference_stderr is None else f' ± {one.difference_stderr:.1g}'})"
    return {"value": one.value, "shown": shown}
