"""`edgeq sweep`: try a grid of number formats and rates, and end in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeq.cli_eval import rate_list
from edgeq.cli_parts import FILE, PATH, json_option, print_json, with_progress


def _names(context: click.Context, option: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else [name.strip() for name in value.split(",")]


@click.command()
@click.argument("model")
@click.option(
    "-o", "--output", type=PATH, required=True, help="Folder of the sweep: packages, measurements, report. A sweep's own goes on."
)
@click.option("--profile", required=True, metavar="NAME", help="Device to export for; its budget and targets mark what qualifies.")
@click.option("--quants", callback=_names, metavar="TYPE,TYPE,...", help="Number formats to try. Default: those the profile prefers.")
@click.option("--rates", callback=rate_list, default="0,0.15,0.25", show_default=True, metavar="R,R,...", help="Cuts to try; 0 for none.")
@click.option(
    "--format", "file_format", type=click.Choice(["gguf", "onnx", "auto"]), default="auto", show_default=True, help="As in export."
)
@click.option("--calibration", type=FILE, help="As in export.")
@click.option("--no-verify", is_flag=True, help="Skip the gates.")
@click.option("--text", type=FILE, help="UTF-8 text to measure quality on: perplexity, KL, top-1 agreement.")
@click.option("--choices", type=FILE, help="Multiple choice: a jsonl file of prompt, choices, answer.")
@click.option("--exact", type=FILE, help="Exact match: a jsonl file of prompt, answer.")
@click.option("--reference", metavar="PATH", help="What quality is compared with. Default: MODEL.")
@click.option("--chat", is_flag=True, help="Send the prompts of --choices and --exact through the model's chat template.")
@click.option("--ctx", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens per window of the text, and of context.")
@click.option("--chunks", type=click.IntRange(min=1), help="Score the first N windows of the text only.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--gen-tokens", type=click.IntRange(min=2), default=128, show_default=True)
@click.option("--repeat", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--budget", metavar="SIZE", help="Memory that may be used, instead of the profile's, e.g. 512MB.")
@click.option("--threads", type=click.IntRange(1, 512), help="CPU threads. Default: the physical cores this process may use.")
@json_option
@with_progress
def sweep(
    model: str,
    output: Path,
    profile: str,
    quants: list[str] | None,
    rates: tuple[float, ...],
    file_format: Any,
    as_json: bool,
    no_verify: bool,
    **settings: Any,
) -> None:
    """Export MODEL in several formats, cut each at several rates, measure all, and report.

    What is in the folder already is not made again, as long as nothing it comes from has changed: stop a sweep and start it again, or
    start it again with one more format. A format that cannot be exported is left out and named. Without --text, --choices or --exact the
    report knows of speed and memory only.
    """
    from edgeq.cli_report import show_report
    from edgeq.sweep import sweep as run

    result = run(model, output=output, profile=profile, quants=quants, rates=rates, format=file_format, verify=not no_verify, **settings)
    if as_json:
        print_json(result.to_json())
        return
    show_report(result.report, tables=True)
    for one in result.failures:
        click.echo(f"Left out {one.quant}: {one.reason}")
    click.echo(f"{result.made} steps done, {result.reused} were done before, in {result.seconds:.0f} s.")
    for path in result.reports:
        click.echo(f"Wrote {path}")
