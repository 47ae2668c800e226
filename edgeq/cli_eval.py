"""`edgeq eval`: how well artifacts predict, choose and answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli_parts import FILE, PATH, json_option, print_json, with_progress

if TYPE_CHECKING:
    from edgeq.runtime.evaluation import QualityRow


def rate_list(context: click.Context, option: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """A list of rates; that they are rates is checked where they are used."""
    if value is None:
        return None
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of rates like 0,0.15,0.25.") from None


@click.command(name="eval")
@click.argument("artifacts", type=PATH, nargs=-1, required=True, metavar="ARTIFACT...")
@click.option("--text", type=FILE, help="UTF-8 text to score: perplexity, and with --reference KL and top-1 agreement.")
@click.option("--choices", type=FILE, help="Multiple choice: a jsonl file of prompt, choices, answer.")
@click.option("--exact", type=FILE, help="Exact match: a jsonl file of prompt, answer.")
@click.option("--reference", metavar="PATH", help="Compare with this artifact, or on the text with this model in Hugging Face layout.")
@click.option("--chat", is_flag=True, help="Send the prompts of --choices and --exact through the model's chat template.")
@click.option("--ctx", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens per window, and of context.")
@click.option("--chunks", type=click.IntRange(min=1), help="Score the first N windows of the text only.")
@click.option("--rate", type=float, help="Score a cut of an elastic package: fraction of block parameters removed, 0 to 0.35.")
@click.option("--rates", metavar="R,R,...", callback=rate_list, help="Score cuts of elastic packages at these rates, e.g. 0,0.15,0.25.")
@click.option(
    "--adapter", metavar="NAME", help="With this adapter of the package, or the GGUF adapter at this path; it is cut as the model is."
)
@click.option("-o", "--output", type=PATH, help="Also write the results to this JSON file, for `edgeq report`.")
@click.option("--force", is_flag=True, help="Replace an existing results file.")
@click.option("--threads", type=click.IntRange(1, 512), help="CPU threads. Default: the physical cores this process may use.")
@json_option
@with_progress
def evaluate(
    artifacts: tuple[Path, ...],
    text: Path | None,
    choices: Path | None,
    exact: Path | None,
    reference: str | None,
    chat: bool,
    ctx: int,
    chunks: int | None,
    rate: float | None,
    rates: tuple[float, ...] | None,
    adapter: str | None,
    output: Path | None,
    force: bool,
    threads: int | None,
    as_json: bool,
    progress: Any,
) -> None:
    """Quality of packages, GGUF files and ONNX folders: perplexity, likeness to a reference, choices, exact answers.

    One artifact and a text give its perplexity. Several artifacts, several tasks, a reference or a results file give one row per figure,
    with standard errors, side by side; with --adapter then without it and with it. The windows of a text do not overlap.
    """
    if text is None and choices is None and exact is None:
        raise click.UsageError("Missing option '--text', '--choices' or '--exact'.")
    if rate is not None and rates is not None:
        raise click.UsageError("--rate and --rates: give one of them.")
    if chat and choices is None and exact is None:
        raise click.UsageError("--chat is for the prompts of --choices and --exact; give one of them.")
    if chunks is not None and text is None:
        raise click.UsageError("--chunks counts windows of a text; give --text.")
    if text is not None and len(artifacts) == 1 and not any((choices, exact, reference, rates, output)):
        from edgeq import api, display

        result = api.evaluate(artifacts[0], text, ctx=ctx, chunks=chunks, rate=rate, adapter=adapter, threads=threads, progress=progress)
        if as_json:
            print_json(result.to_json())
        else:
            display.show_evaluation(artifacts[0], result)
        return
    from edgeq.quality_api import evaluate_tasks

    rows = evaluate_tasks(
        artifacts,
        text=text,
        choices=choices,
        exact=exact,
        reference=reference,
        ctx=ctx,
        chunks=chunks,
        rates=(rate,) if rate is not None else rates,
        adapter=adapter,
        chat=chat,
        threads=threads,
        output=output,
        force=force,
        progress=progress,
    )
    if as_json:
        print_json([row.to_json() for row in rows])
    else:
        show_quality(rows)


def show_quality(rows: Sequence[QualityRow]) -> None:
    """One line per artifact, cut and adapter; one column per metric, with standard errors."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = Console(highlight=False, soft_wrap=True)
    if not out.is_terminal:
        out.width = 1000  # a pipe has no width of its own; nothing is folded
    metrics = list(dict.fromkeys(row.metric for row in rows if row.metric != "nll_mean"))
    subjects: dict[tuple[str, str, str], dict[str, QualityRow]] = {}
    for row in rows:
        key = row.artifact, "-" if row.rate is None else f"{row.rate:g}", row.adapter or "-"
        subjects.setdefault(key, {})[row.metric] = row
    table = Table(header_style="bold", box=None, pad_edge=False)
    for column in ("artifact", "rate", "adapter"):
        table.add_column(column)
    for metric in metrics:
        table.add_column(metric, justify="right")
    for key, found in subjects.items():
        table.add_row(*map(Text, key), *(Text(_figure(found.get(metric))) for metric in metrics))
    out.print(table)
    out.print("Figures with standard errors; in brackets the difference from the reference.", markup=False)


def _figure(row: QualityRow | None) -> str:
    if row is None:
        return "-"
    error = "" if row.stderr is None else f" ± {row.stderr:.2g}"
    change = "" if row.difference is None else f" ({row.difference:+.3g})"
    return f"{row.value:.4g}{error}{change}"
