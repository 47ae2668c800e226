"""`edgeq adapters`: look at fine-tuning adapters, write them in another form, make them smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeq.cli_parts import PATH, json_option, print_json, with_progress

base_option = click.option("--base", required=True, metavar="MODEL", help="The model that the adapter was trained on.")
force_option = click.option("--force", is_flag=True, help="Replace an existing output.")
other_base_option = click.option("--other-base", is_flag=True, help="Take an adapter that says it was made for other weights.")
output_option = click.option("-o", "--output", type=PATH, required=True, help="A .gguf file for llama.cpp, or a folder for PEFT.")


@click.group()
def adapters() -> None:
    """Fine-tuning adapters: what they are, and their files."""


@adapters.command()
@click.argument("path", type=PATH)
@click.option("--base", metavar="MODEL", help="Its model: shows what merging, keeping and squeezing would do with every tensor.")
@json_option
@with_progress
def inspect(path: Path, base: str | None, as_json: bool, progress: Any) -> None:
    """Describe the adapter at PATH: kind, ranks, what it changes, which model it belongs to."""
    from edgeq import adapters_api, display

    description = adapters_api.inspect_adapter(path, base=base, progress=progress)
    if as_json:
        print_json(description)
    else:
        display.show_adapter(description)


@adapters.command()
@click.argument("path", type=PATH)
@base_option
@output_option
@click.option(
    "--format",
    type=click.Choice(["F32", "F16", "Q8_0"]),
    default="F16",
    show_default=True,
    help="Of the numbers in a .gguf file; a folder has float32.",
)
@click.option("--adapter-rank", type=click.IntRange(min=1), metavar="K", help="Use the first K directions of an adapter of nested ranks.")
@click.option("--approx-rank", type=click.IntRange(min=1), metavar="K", help="Replace changes of full rank by their best of rank K.")
@click.option(
    "--approx-energy",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="E",
    help="Replace them by the fewest factors with this fraction of their energy.",
)
@other_base_option
@force_option
@json_option
@with_progress
def convert(path: Path, base: str, output: Path, as_json: bool, progress: Any, **settings: Any) -> None:
    """Write the adapter at PATH, of any kind, as a LoRA, or a sparse one as a patch.

    A .gguf file is for stock llama.cpp with the unsorted base; adapters of an elastic package are written by `edgeq export`. An
    .eqpatch file changes single weights of the base, a GGUF file in F16 or F32, in a running session (`session.apply_patch`).
    """
    from edgeq import adapters_api, display

    if settings["approx_rank"] is not None and settings["approx_energy"] is not None:
        raise click.UsageError("--approx-rank and --approx-energy are two ways to say the same: give one of them.")
    written = adapters_api.convert_adapter(path, base=base, output=output, progress=progress, **settings)
    if as_json:
        print_json(written.to_json())
    else:
        display.show_written_adapter(written)


@adapters.command()
@click.argument("path", type=PATH)
@base_option
@output_option
@click.option("--rank", type=click.IntRange(min=1), metavar="K", help="Rank of every module.")
@click.option("--energy", type=click.FloatRange(0, 1, min_open=True), metavar="E", help="Fraction of every module's energy to keep.")
@click.option("--budget", metavar="SIZE", help="Bytes for all factors, e.g. 2MB; spent where they keep the most.")
@click.option(
    "--bits",
    type=click.Choice(["32", "16", "8", "4", "2", "1"]),
    default="16",
    show_default=True,
    help="Of each number. Below 16, a folder holds codes that edgeq reads and `convert` turns into floats.",
)
@other_base_option
@force_option
@json_option
@with_progress
def squeeze(
    path: Path,
    base: str,
    output: Path,
    rank: int | None,
    energy: float | None,
    budget: str | None,
    bits: str,
    other_base: bool,
    force: bool,
    as_json: bool,
    progress: Any,
) -> None:
    """Make the adapter at PATH smaller after training: lower ranks, fewer bits.

    Give --rank, --energy or --budget, or none of them for fewer bits alone. Energy is that of the change of outputs on edgeq's calibration
    text.
    """
    from edgeq import adapters_api, display

    if sum(value is not None for value in (rank, energy, budget)) > 1:
        raise click.UsageError("--rank, --energy and --budget are three ways to say how much to keep: give one of them.")
    written = adapters_api.squeeze_adapter(
        path,
        base=base,
        output=output,
        rank=rank,
        energy=energy,
        budget=budget,
        bits=int(bits),
        other_base=other_base,
        force=force,
        progress=progress,
    )
    if as_json:
        print_json(written.to_json())
    else:
        display.show_written_adapter(written)
