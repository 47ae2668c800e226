"""The command line: parse, call one function, show the result. With its neighbours `cli_*` the only module that knows all parts.

Results go to stdout (text or, with --json, one JSON document); progress and notices go to stderr. Exit status: 0 done, 1 failed or
gate not passed, 2 usage, 130 interrupted. Heavy libraries load inside the commands, so that `edgeq --help` is quick.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any, Literal, NoReturn

import click

from edgeq import __version__
from edgeq.cli_adapters import adapters
from edgeq.cli_bench import bench
from edgeq.cli_embed import embed, export_encoder
from edgeq.cli_eval import evaluate
from edgeq.cli_parts import FILE, PATH, json_option, print_json, read_json, read_utf8, with_progress
from edgeq.cli_report import report
from edgeq.cli_serve import serve
from edgeq.cli_sweep import sweep
from edgeq.errors import EdgeqError

threads_option = click.option(
    "--threads", type=click.IntRange(1, 512), help="CPU threads. Default: the physical cores this process may use."
)


adapter_option = click.option(
    "--adapter", metavar="NAME", help="With this adapter of the package, or the GGUF adapter at this path; it is cut as the model is."
)


def main() -> NoReturn:
    """Entry point: turns errors and interrupts into one line and an exit status."""
    signal.signal(signal.SIGTERM, _terminate)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        status = cli.main(standalone_mode=False)  # click hands back the status of --help and ctx.exit, and None from commands
    except click.exceptions.Abort:
        click.echo("interrupted; nothing was left half-written", err=True)
        sys.exit(130)
    except click.ClickException as err:
        err.show()
        sys.exit(err.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except EdgeqError as err:
        click.echo(f"error: {err}", err=True)
        sys.exit(err.exit_code)
    sys.exit(status or 0)


def program() -> NoReturn:
    """The program: `main`, and an end that does not take the interpreter apart first, which takes longer than some commands do.

    Whoever wants to clean up at the end of the process does (atexit), and what is printed arrives.
    """
    try:
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        status = 1
    os._exit(status)


def _terminate(number: int, frame: object) -> NoReturn:
    raise click.exceptions.Abort


def _rate_or_auto(context: click.Context, option: click.Parameter, value: str | None) -> float | Literal["auto"] | None:
    if value is None or value == "auto":
        return value  # type: ignore[return-value]  # mypy does not narrow str to its only value here
    try:
        return float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor auto.") from None


def _no_plan(plan: object) -> None:
    """JSON output carries the plan itself."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edgeq")
def cli() -> None:
    """Fit a fine-tuned language model onto the device you own.

    MODEL is a folder in Hugging Face layout, a .gguf file, a hub id org/name[@revision], or `demo`
    (SmolLM2-135M-Instruct). A package is the folder that `edgeq export` writes.
    """


@cli.command()
@click.argument("model")
@click.option("-o", "--output", type=PATH, help="Package folder to write. Required unless --dry-run.")
@click.option("--profile", required=True, metavar="NAME", help="Device to export for: a name from `edgeq profiles list`, or a .toml file.")
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["gguf", "onnx", "auto"]),
    default="auto",
    show_default=True,
    help="GGUF for llama.cpp, ONNX for ONNX Runtime; auto is for the profile's runtime.",
)
@click.option(
    "--quant",
    default="auto",
    show_default=True,
    metavar="TYPE",
    help="Number format, e.g. Q4_0, Q4_K_M, F16, for ONNX int4, int8, fp16; auto lets the profile choose.",
)
@click.option(
    "--elastic/--fixed",
    default=None,
    help="A package that the device cuts to any size, or one of one size. Default: elastic if the model allows.",
)
@click.option(
    "--sort",
    type=click.Choice(["edgeq", "uniql", "none"]),
    help="Order in which parts may go: by measured loss, as published for UniQL, or as they come. Default: edgeq; none with --fixed.",
)
@click.option(
    "--prune",
    type=click.FloatRange(0, 0.35),
    default=0.0,
    metavar="RATE",
    help="Write one size, cut by this rate: a fraction of block parameters.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="PATH[=NAME][:SCALE]",
    help="Fine-tuning adapter to ship with the model: a PEFT folder, a .gguf file, ... May be given several times.",
)
@click.option(
    "--adapters",
    "adapter_mode",
    type=click.Choice(["merge", "keep", "auto"]),
    help="Into the weights, beside them, or what suits profile and model better; several are kept. Default: auto.",
)
@click.option("--adapter-rank", type=click.IntRange(min=1), metavar="K", help="Use the first K directions of adapters of nested ranks.")
@click.option("--approx-rank", type=click.IntRange(min=1), metavar="K", help="Keep changes of full rank as their best factors of rank K.")
@click.option(
    "--approx-energy",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="E",
    help="Keep changes of full rank as the fewest factors with this fraction of their energy.",
)
@click.option("--other-base", is_flag=True, help="Take adapters that say they were made for other weights.")
@click.option("--calibration", type=FILE, help="UTF-8 text that stands for the model's use. Default: a mixed text that comes with edgeq.")
@click.option("--ctx", "n_ctx", type=click.IntRange(min=1), help="Context to plan memory for. Default: the profile's.")
@click.option("--dry-run", is_flag=True, help="Print the plan with predicted bytes and memory; write nothing.")
@click.option("--no-verify", is_flag=True, help="Skip the gate; the package is marked unverified.")
@click.option("--force", is_flag=True, help="Replace an existing output folder.")
@threads_option
@json_option
@with_progress
def export(
    model: str,
    output: Path | None,
    profile: str,
    file_format: Literal["gguf", "onnx", "auto"],
    quant: str,
    elastic: bool | None,
    sort: Literal["edgeq", "uniql", "none"] | None,
    prune: float,
    adapters: tuple[str, ...],
    adapter_mode: Literal["merge", "keep", "auto"] | None,
    adapter_rank: int | None,
    approx_rank: int | None,
    approx_energy: float | None,
    other_base: bool,
    calibration: Path | None,
    n_ctx: int | None,
    dry_run: bool,
    no_verify: bool,
    force: bool,
    threads: int | None,
    as_json: bool,
    progress: Any,
) -> None:
    """Turn MODEL into a package for a device, and prove it.

    Plans number formats from the profile, sorts what can be cut, calibrates, quantizes, writes a GGUF file for stock llama.cpp or a
    folder for stock ONNX Runtime, then compares its outputs, and those of a cut of it, with the model's. A failed gate marks the
    package as failed and exits 1.

    Adapters go into the weights before these are quantized, or beside them as files that llama.cpp loads; either way the outputs are
    compared with those of the float model that has them.
    """
    from edgeq import api, display
    from edgeq.encoder_api import is_encoder

    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--output' (only --dry-run goes without).")
    if is_encoder(model):
        settings: dict[str, Any] = {"profile": profile, "output": output, "quant": quant, "calibration": calibration}
        settings |= {"dry_run": dry_run, "verify": not no_verify, "force": force, "threads": threads}
        others = {"--elastic/--fixed": elastic is not None, "--sort": sort is not None, "--prune": prune > 0, "--adapter": bool(adapters)}
        others |= {"--adapters": adapter_mode is not None, "--adapter-rank": adapter_rank is not None, "--ctx": n_ctx is not None}
        others |= {"--approx-rank": approx_rank is not None, "--approx-energy": approx_energy is not None, "--other-base": other_base}
        export_encoder(model, settings, others=others, file_format=file_format, as_json=as_json, progress=progress)
        return
    result = api.export(
        model,
        output=output,
        profile=profile,
        format=file_format,
        quant=quant,
        sort=sort,
        elastic=elastic,
        prune=prune,
        adapters=adapters,
        adapter_mode=adapter_mode,
        adapter_rank=adapter_rank,
        approx_rank=approx_rank,
        approx_energy=approx_energy,
        other_base=other_base,
        calibration=calibration,
        n_ctx=n_ctx,
        dry_run=dry_run,
        verify=not no_verify,
        force=force,
        threads=threads,
        progress=progress,
        on_plan=_no_plan if as_json or dry_run else display.show_plan,
    )
    if as_json:
        print_json(result.to_json())
    else:
        display.show_export(result)
    if result.gate is not None and not result.gate.passed:
        click.echo(f"error: {output} did not pass its gate and is marked failed: {'; '.join(result.gate.failures)}", err=True)
        raise click.exceptions.Exit(1)


@cli.command()
@click.argument("package", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="GGUF file or ONNX folder to write.")
@click.option("--rate", type=float, help="Fraction of block parameters to remove, 0 to 0.35.")
@click.option("--budget", metavar="SIZE", help="Largest file that will do, e.g. 70MB, 64MiB or a number of bytes.")
@click.option("--adapter", metavar="NAME", help="Cut this adapter of the package too; it is written beside the file.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@json_option
@with_progress
def cut(
    package: Path, output: Path, rate: float | None, budget: str | None, adapter: str | None, force: bool, as_json: bool, progress: Any
) -> None:
    """Cut an elastic package to a smaller stock GGUF file or ONNX folder, by a rate or to a budget.

    A package in ONNX is cut to a folder; its budget is for graph and weights, without the tokenizer. Needs no torch. The package is
    checked against its hashes while it is read. Rate 0 is the package's own artifact.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy is imported: a cut has threads of its own
    from edgeq import api
    from edgeq.heap import keep_freed_memory
    from edgeq.sizes import size

    keep_freed_memory()
    result = api.cut(package, output=output, rate=rate, budget=budget, adapter=adapter, force=force, progress=progress)
    if as_json:
        print_json(result.to_json())
    else:
        click.echo(
            f"Wrote {result.path}  {size(result.bytes)}  {result.removed_fraction:.1%} of block parameters removed  "
            f"in {result.seconds:.2f} s"
        )
        if result.adapter_path is not None:
            click.echo(f"Wrote {result.adapter_path}")


@cli.command()
@click.argument("package", type=PATH)
@threads_option
@json_option
@with_progress
def verify(package: Path, threads: int | None, as_json: bool, progress: Any) -> None:
    """Check a package on this machine: hashes, then its outputs against the stored reference.

    Of an elastic package also that what cuts are made from belongs to the artifact, and of kept adapters that they fit it.
    """
    from edgeq import api, display

    result = api.verify(package, threads=threads, progress=progress)
    if as_json:
        print_json(result.to_json())
    else:
        display.show_verification(result)
    if not result.passed:
        click.echo(f"error: {package} failed verification: {'; '.join(result.failures)}", err=True)
        raise click.exceptions.Exit(1)


@cli.command()
@click.argument("package", type=PATH)
@click.option("-p", "--prompt", required=True, help="Text to continue.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--chat", is_flag=True, help="Send the prompt as a user message through the model's chat template.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", type=click.IntRange(min=1), help="Sample from the k likeliest tokens.")
@click.option("--top-p", type=click.FloatRange(min=0, max=1), help="Sample from the likeliest tokens that together hold this probability.")
@click.option("--min-p", type=click.FloatRange(min=0, max=1), help="Drop tokens below this fraction of the likeliest one's probability.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--stop", multiple=True, metavar="TEXT", help="End in front of this text. May be given several times.")
@click.option("--json-schema", "schema", type=FILE, help="Answer with JSON that this schema allows (llama.cpp only).")
@click.option("--grammar", type=FILE, help="Answer with text that this GBNF grammar allows (llama.cpp only).")
@click.option(
    "--ctx", "n_ctx", type=click.IntRange(min=2), help="Context length. Default: the package's profile, or the model's own up to 4096."
)
@click.option(
    "--rate", callback=_rate_or_auto, metavar="R|auto", help="Cut an elastic package in memory, 0 to 0.35; auto: by as little as fits."
)
@adapter_option
@threads_option
@json_option
def run(
    package: Path,
    prompt: str,
    max_tokens: int,
    chat: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int,
    stop: tuple[str, ...],
    schema: Path | None,
    grammar: Path | None,
    n_ctx: int | None,
    rate: float | Literal["auto"] | None,
    adapter: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Generate text with a package or GGUF file."""
    from edgeq import api, display

    sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed, "stop": stop}
    sampling |= {"grammar": None if grammar is None else read_utf8(grammar), "json_schema": None if schema is None else read_json(schema)}
    with api.load(package, rate=rate, adapter=adapter, n_ctx=n_ctx, threads=threads) as session:
        text = session.chat_prompt(prompt) if chat else prompt
        if as_json:
            print_json(session.generate(text, max_tokens=max_tokens, **sampling).to_json())
            return
        if not chat:
            click.echo(prompt, nl=False)
        stream = session.stream(text, max_tokens=max_tokens, **sampling)
        for piece in stream:
            click.echo(piece, nl=False)
        click.echo()
        if stream.completion is not None:
            display.show_timings(stream.completion.timings)


@cli.command()
@click.argument("path")
@json_option
def inspect(path: str, as_json: bool) -> None:
    """Describe a package, GGUF file or model: sizes, formats, tokenizer, plan, gate."""
    from edgeq import api, display

    description = api.inspect(path)
    if as_json:
        print_json(description)
    else:
        display.show_description(description)


cli.add_command(adapters)
cli.add_command(bench)
cli.add_command(embed)
cli.add_command(evaluate)
cli.add_command(report)
cli.add_command(serve)
cli.add_command(sweep)


@cli.group()
def profiles() -> None:
    """Device profiles: what a device is and what it prefers."""


@profiles.command(name="list")
@json_option
def list_profiles(as_json: bool) -> None:
    """Name the profiles that come with edgeq."""
    from edgeq import display
    from edgeq.profiles import load_profile, profile_names

    rows = [load_profile(name) for name in profile_names()]
    if as_json:
        print_json([row.to_json() for row in rows])
    else:
        display.show_profiles(rows)


@profiles.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Print one profile: a shipped name or a .toml file."""
    from edgeq import display
    from edgeq.profiles import load_profile

    profile = load_profile(name)
    if as_json:
        print_json(profile.to_json())
    else:
        display.show_profile(profile)


@profiles.command()
@json_option
def detect(as_json: bool) -> None:
    """Describe this machine and name the nearest profile."""
    from edgeq import display
    from edgeq.detect import detect as detect_machine_and_profile

    detection = detect_machine_and_profile()
    if as_json:
        print_json(detection.to_json())
    else:
        display.show_detection(detection)


if __name__ == "__main__":
    program()
