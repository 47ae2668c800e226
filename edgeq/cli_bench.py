"""`edgeq bench`: how fast artifacts run here, and what memory they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli_eval import rate_list
from edgeq.cli_parts import PATH, json_option, print_json, with_progress

if TYPE_CHECKING:
    from edgeq.runtime.bench_fields import BenchResult

_MOST_THREADS = 512
_COMPARED = (("decode_tok_s", "decode"), ("prefill_tok_s", "prefill"), ("ttft_ms", "TTFT"), ("peak_rss_bytes", "peak RSS"))


def whole_numbers(context: click.Context, option: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """A list of numbers of at least 1, all different."""
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts) or len(set(map(int, parts))) < len(parts):
        raise click.BadParameter(f"{value!r} is not a list of different whole numbers of at least 1, like 128,512.")
    return tuple(map(int, parts))


@click.command()
@click.argument("artifacts", type=PATH, nargs=-1, required=True)
@click.option("--prompt-tokens", metavar="N,N,...", default="512", show_default=True, callback=whole_numbers, help="Tokens of the prompt.")
@click.option("--gen-tokens", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens generated after it.")
@click.option("--repeat", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds; each measures everything once, in turns.")
@click.option(
    "--batch", metavar="N,N,...", default="1", show_default=True, callback=whole_numbers, help="Sequences computed together (llama.cpp)."
)
@click.option(
    "--threads",
    metavar="N,N,...",
    callback=whole_numbers,
    help="CPU threads. Default: the physical cores this process may use.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--kv-type", metavar="TYPE", help="Number format of keys and values, e.g. f16, q8_0. Default: f16; of ONNX, the graph's.")
@click.option("--rates", metavar="R,R,...", callback=rate_list, help="Measure cuts of elastic packages at these rates, e.g. 0,0.15,0.25.")
@click.option(
    "--adapter", metavar="NAME", help="With this adapter of the package, or the GGUF adapter at this path; it is cut as the model is."
)
@click.option("--against", type=PATH, metavar="BASE", help="Also measure this artifact as it is, in the same turns, and give ratios to it.")
@click.option("--cold/--no-cold", default=True, help="Drop the files from the page cache before every second load, to time that too.")
@click.option("--retakes", type=click.IntRange(min=0), default=2, show_default=True, help="Most rounds to repeat when others were busy.")
@click.option("--wait", "wait_s", type=click.FloatRange(min=0), default=0.0, metavar="SECONDS", help="Wait for a quiet machine first.")
@click.option("-o", "--output", type=PATH, help="Also write the results to this JSON file, for `edgeq report`.")
@click.option("--force", is_flag=True, help="Replace an existing results file.")
@json_option
@with_progress
def bench(
    artifacts: tuple[Path, ...],
    prompt_tokens: tuple[int, ...],
    gen_tokens: int,
    repeat: int,
    batch: tuple[int, ...],
    threads: tuple[int, ...] | None,
    device: str,
    kv_type: str | None,
    rates: tuple[float, ...] | None,
    adapter: str | None,
    against: Path | None,
    cold: bool,
    retakes: int,
    wait_s: float,
    output: Path | None,
    force: bool,
    as_json: bool,
    progress: Any,
) -> None:
    """Measure packages, GGUF files and ONNX folders: load, first token, prefill, decode, latency percentiles, memory, energy.

    Every artifact, at every rate, prompt length, batch and number of threads that is given, is measured in turns within one run, each in
    processes of its own and with the same prompt. Figures are medians; their definitions are in docs/bench.md.
    """
    from edgeq import api

    if threads is not None and max(threads) > _MOST_THREADS:
        raise click.BadParameter(f"{max(threads)} is more than {_MOST_THREADS}.", param_hint="'--threads'")
    results = api.bench(
        artifacts,
        prompt_tokens=prompt_tokens,
        gen_tokens=gen_tokens,
        repeat=repeat,
        batch=batch,
        threads=threads,
        device=device,
        kv_type=kv_type,
        rates=rates,
        adapter=adapter,
        against=against,
        cold=cold,
        retakes=retakes,
        wait_s=wait_s,
        output=output,
        force=force,
        progress=progress,
    )
    if as_json:
        print_json([result.to_json() for result in results])
    else:
        show_bench(results)


def show_bench(results: Sequence[BenchResult]) -> None:
    """One line per row, with columns for what differs between rows; then ratios to the base, and warnings."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from edgeq.sizes import size

    out = Console(highlight=False, soft_wrap=True)
    if not out.is_terminal:
        out.width = 160  # a pipe has no width of its own; the same text for everyone
    columns: dict[str, list[str]] = {"artifact": [_name(row, results) for row in results]}
    columns["rate"] = [_plain(row.rate) for row in results]
    for name, field in (("adapter", "adapter"), ("prompt", "prompt_tokens"), ("batch", "batch"), ("threads", "threads")):
        values = [getattr(row, field) for row in results]
        if len(set(values)) > 1 or (field == "adapter" and values[0]):
            columns[name] = [_plain(value) for value in values]
    columns["load s"] = [_plain(row.load_s, 2) for row in results]
    columns["cold"] = [_plain(row.load_cold_s, 2) for row in results]
    columns["TTFT ms"] = [_plain(row.ttft_ms, 1) for row in results]
    for title, figure in (("prefill tok/s", "prefill_tok_s"), ("decode tok/s", "decode_tok_s")):
        columns[title] = [_between(getattr(row, figure), row.intervals[figure]) for row in results]
    columns["ITL p50 ms"] = [_plain(row.itl_ms["p50"], 2) for row in results]
    columns |= {p: [_plain(row.itl_ms[p], 2) for row in results] for p in ("p95", "p99")}
    columns["peak RSS"] = [size(row.peak_rss_bytes) for row in results]
    columns["model"] = [size(row.model_bytes) for row in results]
    columns["KV"] = [size(row.kv_bytes) for row in results]
    for title, figure, scale, digits in (
        ("VRAM", "vram_bytes", 0, 0),
        ("J/token", "energy_j_per_token", 1, 3),
        ("°C", "temperature_c", 1, 0),
    ):
        values = [getattr(row, figure) for row in results]
        if any(value is not None for value in values):
            columns[title] = [_plain(value, digits) if scale else size(value) for value in values]
    table = Table(header_style="bold", box=None, pad_edge=False)
    for title in columns:
        table.add_column(title, justify="left" if title == "artifact" else "right", overflow="fold")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, cells))
    out.print(table)
    out.print(_summary(results), markup=False)
    for row in results:
        if row.against is not None:
            out.print(f"{_label(row, results)} against the base: {_ratios(row.against)}", markup=False)
    for adapter, milliseconds in {row.adapter: row.adapter_switch_ms for row in results if row.adapter_switch_ms is not None}.items():
        out.print(f"Switching to {adapter} takes {milliseconds:.1f} ms once it is in memory.", markup=False)
    everywhere = [text for text in results[0].warnings if all(text in row.warnings for row in results)]
    for text in everywhere:
        out.print(f"Warning: {text}.", style="yellow", markup=False)
    for row in results:
        for text in (text for text in row.warnings if text not in everywhere):
            out.print(f"Warning: {_label(row, results)}: {text}.", style="yellow", markup=False)


def _summary(results: Sequence[BenchResult]) -> str:
    first = results[0]
    same = {
        field: len({getattr(row, field) for row in results}) == 1 for field in ("prompt_tokens", "threads", "batch", "kv_type", "runtime")
    }
    parts = [
        f"{first.prompt_tokens} prompt tokens" if same["prompt_tokens"] else "",
        f"{first.gen_tokens} generated",
        f"medians of {first.environment['repeat']} repeats (95 % interval)",
        f"{first.runtime if same['runtime'] else 'llama.cpp and onnxruntime'} on {first.device}",
        f"{first.threads} threads" if same["threads"] else "",
        f"batch {first.batch}" if same["batch"] and first.batch > 1 else "",
        f"{first.kv_type} keys and values" if same["kv_type"] else "",
    ]
    return ", ".join(part for part in parts if part) + "."


def _name(row: BenchResult, results: Sequence[BenchResult]) -> str:
    """The artifact's bare name, or where it lies when several have the same."""
    return row.artifact if len({other.artifact for other in results if other.name == row.name}) > 1 else row.name


def _label(row: BenchResult, results: Sequence[BenchResult]) -> str:
    """What tells a row from the others."""
    parts = [_name(row, results)] + ([f"rate {row.rate:g}"] if row.rate is not None and len({r.rate for r in results}) > 1 else [])
    if row.adapter is not None:
        parts.append(f"with {row.adapter}")
    for word, field in (("prompt", "prompt_tokens"), ("batch", "batch"), ("threads", "threads")):
        if len({getattr(r, field) for r in results}) > 1:
            parts.append(f"{word} {getattr(row, field)}")
    return ", ".join(parts)


def _ratios(against: Mapping[str, Mapping[str, float | None]]) -> str:
    return ", ".join(_ratio(name, against[figure]) for figure, name in _COMPARED if figure in against)


def _ratio(name: str, found: Mapping[str, float | None]) -> str:
    sure = "" if found["low"] is None else f" ({found['low']:.3f} to {found['high']:.3f})"
    return f"{name} {found['ratio']:.3f}x{sure}"


def _between(value: float, interval: Sequence[float] | None) -> str:
    return _plain(value, 1) if interval is None else f"{value:.1f} ({interval[0]:.1f}-{interval[1]:.1f})"


def _plain(value: Any, digits: int | None = None) -> str:
    if value is None:
        return "-"
    if digits is not None:
        return f"{value:,.{digits}f}"
    return f"{value:g}" if isinstance(value, float) else str(value)
