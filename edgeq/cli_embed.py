"""Embedding models on the command line: `edgeq embed`, and what `edgeq export` does with an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli_parts import PATH, json_option, print_json

if TYPE_CHECKING:
    from edgeq.encoder_api import EncoderExportResult

_SHOWN = 8  # numbers of an embedding that are printed


@click.command()
@click.argument("package", type=PATH)
@click.option("-t", "--text", "texts", multiple=True, required=True, help="Text to embed. May be given several times.")
@click.option(
    "--prompt", metavar="NAME", help="Prompt of the model to put before every text, e.g. query; '' for none. Default: the model's."
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--threads", type=click.IntRange(1, 512), help="CPU threads. Default: the physical cores this process may use.")
@json_option
def embed(package: Path, texts: tuple[str, ...], prompt: str | None, device: str, threads: int | None, as_json: bool) -> None:
    """Embed texts with a package of an encoder: one vector each, and how similar they are.

    Text output shows the first numbers of every vector and, for several texts, the cosine of every pair; --json has all.
    """
    from edgeq.encoder_api import load_embedder

    with load_embedder(package, threads=threads, device=device) as embedder:
        vectors = embedder.embed(texts, prompt=prompt)
        n_tokens = [len(ids) for ids in embedder.tokenize(texts, prompt=prompt)]
        similarity = embedder.similarity(vectors, vectors)
        cut = [n == embedder.max_tokens for n in n_tokens]
    if as_json:
        rows = [
            {"text": text, "tokens": n, "embedding": [float(x) for x in vector]}
            for text, n, vector in zip(texts, n_tokens, vectors, strict=True)
        ]
        print_json({"package": str(package), "n_out": vectors.shape[1], "texts": rows, "similarity": similarity.tolist()})
        return
    for i, (text, vector) in enumerate(zip(texts, vectors, strict=True), 1):
        shown = " ".join(f"{x:.4f}" for x in vector[:_SHOWN])
        click.echo(f"{i}. {text}\n   {n_tokens[i - 1]} tokens, {len(vector)} numbers: {shown}{' ...' if len(vector) > _SHOWN else ''}")
        if cut[i - 1]:
            click.echo(f"   The model takes {embedder.max_tokens} tokens; a longer text is cut there.", err=True)
    if len(texts) > 1:
        click.echo("Cosine:")
        for row in similarity:
            click.echo("   " + " ".join(f"{x:6.3f}" for x in row))


def export_encoder(
    model: str, settings: Mapping[str, Any], *, others: Mapping[str, bool], file_format: str, as_json: bool, progress: Any
) -> None:
    """`edgeq export` of an encoder. settings: arguments of `edgeq.encoder_api.export_encoder`. others: whether options were given that only
    models that generate text have, by name."""
    from edgeq.encoder_api import export_encoder as run

    if file_format == "gguf":
        raise click.UsageError(f"--format gguf: {model} is an encoder, which edgeq writes as ONNX. Use --format onnx or auto.")
    for name, given in others.items():
        if given:
            raise click.UsageError(f"{name} is for models that generate text; {model} is an encoder, which is exported whole and as it is.")
    result = run(model, progress=progress, on_plan=lambda plan: None, **settings)
    if as_json:
        print_json(result.to_json())
    else:
        _show(result)
    if result.gate is not None and not result.gate.passed:
        click.echo(f"error: {result.package} did not pass its gate and is marked failed: {'; '.join(result.gate.failures)}", err=True)
        raise click.exceptions.Exit(1)


def _show(result: EncoderExportResult) -> None:
    from edgeq import display
    from edgeq.sizes import size

    plan = result.plan
    why, bits = "; ".join(plan.notes), f"{plan.bits_per_weight:.2f} bits per weight"
    click.echo(f"Plan: {plan.quant} for {plan.profile} ({why}): {size(plan.file_bytes)}, {bits}")
    if result.package is None:
        click.echo("Dry run: nothing was written.")
        return
    for artifact in result.artifacts:
        click.echo(f"Wrote {result.package}/{artifact.path}  {size(result.bytes)} with its data  sha256 {artifact.sha256[:16]}")
    if result.gate is None:
        click.echo("Gate: not run (--no-verify); the package is marked unverified.")
    else:
        display.show_gate(result.gate)
    click.echo(f"Took {result.seconds:.1f} s, peak memory {size(result.peak_rss_bytes)}.")
