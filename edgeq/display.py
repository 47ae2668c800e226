"""What the command line shows a person: tables on stdout, progress on stderr. Reads results, decides nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from edgeq.progress import Progress as ProgressCallback
from edgeq.progress import silent
from edgeq.sizes import size

if TYPE_CHECKING:
    from pathlib import Path

    from edgeq.adapter_plan import AdapterPlan
    from edgeq.adapters_api import WrittenAdapter
    from edgeq.api import ExportResult, Verification
    from edgeq.detect import Detection
    from edgeq.encoder_gate import EncoderGate
    from edgeq.gate import GateResult
    from edgeq.planning import Plan
    from edgeq.profiles import DeviceProfile
    from edgeq.runtime.answer import Timings
    from edgeq.runtime.quality import Evaluation

_STEPS = {
    "hash": "Hashing inputs",
    "sort": "Sorting",
    "calibrate": "Calibrating",
    "compensate": "Rounding with compensation",
    "write": "Quantizing and writing",
    "reference": "Computing reference",
    "gate reference": "Computing reference",
    "gate": "Comparing with reference",
    "verify": "Checking files",
    "embed": "Embedding",
    "eval": "Scoring",
    "choices": "Choosing",
    "exact": "Answering",
    "sweep": "Sweep",
    "bench": "Measuring",
    "download": "Downloading",
}


@contextmanager
def progress_display() -> Iterator[ProgressCallback]:
    """One bar per step with the time left, on stderr; nothing at all when stderr is not a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield silent
        return
    columns = (TextColumn("{task.description:<26}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(step: str, done: float, total: float) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(_STEPS.get(step, step), total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield show


def _out() -> Console:
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120  # a pipe has no width of its own; the same text for everyone
    return console


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left")
    return table


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def show_plan(plan: Plan) -> None:
    out = _out()
    columns = ("tensors", "from", "to", "count", "bytes", "share")
    table = _table(*columns, right=columns[3:])
    for row in plan.summary():
        table.add_row(row.role, row.source_grid, row.grid, str(row.count), size(row.nbytes), f"{row.share:.1%}")
    out.print(f"[bold]Plan: {plan.quant} for {plan.profile}[/], {plan.bits_per_weight:.2f} bits per weight")
    out.print(table)
    memory = plan.memory
    out.print(
        f"File {size(plan.file_bytes)}. Memory at {memory.n_ctx} tokens of context: {size(memory.total_bytes)} "
        f"(weights {size(memory.model_bytes)}, {memory.kv_type} cache {size(memory.kv_bytes)}, compute {size(memory.compute_bytes)}, "
        f"process {size(memory.runtime_bytes)}) of {size(plan.budget_bytes)}."
    )
    if plan.cut_sizes:
        sizes = ", ".join(f"{cut.rate:.0%}: {size(cut.bytes)}" for cut in plan.cut_sizes)
        out.print(f"Elastic. Cut by a rate of {sizes}; sorting may shift these a little.")
    if plan.adapters:
        show_adapter_plans(plan.adapters)
    for note in plan.notes:
        out.print(f"Note: {note}")


def show_adapter_plans(plans: Sequence[AdapterPlan]) -> None:
    """Both ways of every adapter, the chosen one marked; then why."""
    out = _out()
    columns = ("adapter", "kind", "scale", "way", "format", "model and adapter", "rounding noise", "slower", "rank", "lost energy")
    table = _table(*columns, right=columns[5:])
    for plan in plans:
        for name, way in (("merge", plan.merge), ("keep", plan.keep)):
            chosen = f"[bold]{name}[/]" if name == plan.disposition else name
            figures = ["not possible", *["-"] * 5]
            if way.possible:
                rank = "-" if way.rank is None else str(way.rank)
                noise = "-" if way.noise is None else f"{way.noise:.2g}"
                figures = [way.quant or "-", size(way.bytes), noise, f"{way.slowdown:.0%}", rank, f"{way.lost_energy:.2g}"]
            table.add_row(plan.name, plan.kind, f"{plan.scale:g}", chosen, *figures)
    out.print(table)
    out.print("Rounding noise is relative to what the adapter changes: at 1, rounding moves outputs as far as the adapter does.")
    for plan in plans:
        out.print(f"{plan.name}: {plan.disposition}; {plan.reason}", markup=False)


def show_adapter(description: Mapping[str, Any]) -> None:
    """Lists of tensors by role, so that a page shows a whole model."""
    shown = {key: value for key, value in description.items() if key not in ("targets", "tensors")}
    show_description(shown)
    out = _out()
    if "targets" in description:
        roles: dict[tuple[str, ...], int] = {}
        for target in description["targets"]:
            parts = target["name"].split(".")
            role = ".".join(parts[2:]) if parts[0] == "layers" else target["name"]
            ways = (target[way]["how"] for way in ("merge", "keep", "squeeze"))
            row = (role, "x".join(map(str, target["shape"])), "-" if target["rank"] is None else str(target["rank"]), *ways)
            roles[row] = roles.get(row, 0) + 1
        table = _table("tensor", "shape", "rank", "merge", "keep", "squeeze", "count", right=("rank", "count"))
        for row, count in roles.items():
            table.add_row(*row, str(count))
        out.print(table)
    else:
        out.print(f"{len(description['tensors'])} tensors. Name the model with --base to see what can be done with each.")


def show_written_adapter(written: WrittenAdapter) -> None:
    out = _out()
    ranks = [int(module["rank"]) for module in written.modules.values()]
    before = [int(module["before"]) for module in written.modules.values()]
    out.print(f"Wrote {written.path}  {size(written.bytes)}", markup=False)
    if not ranks:
        return
    out.print(
        f"{len(ranks)} modules, rank {_span(before)} before, {_span(ranks)} now; lost of the change's energy: at most "
        f"{written.lost_energy:.2%} of a module"
    )


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def show_export(result: ExportResult) -> None:
    out = _out()
    if result.package is None:
        show_plan(result.plan)
        out.print("Dry run: nothing was written.")
        return
    for artifact in (*result.artifacts, *result.adapters):
        out.print(f"Wrote {result.package}/{artifact.path}  {size(artifact.bytes)}  sha256 {artifact.sha256[:16]}")
    if result.regrid:
        lost = ", ".join(f"{kind} {errors['relative']:.2%}" for kind, errors in result.regrid.items())
        out.print(f"Lost in rounding, of squared values: {lost}.")
    if result.gate is None:
        out.print("Gate: not run (--no-verify); the package is marked unverified.")
    else:
        show_gate(result.gate)
    out.print(f"Took {result.seconds:.1f} s, peak memory {size(result.peak_rss_bytes)}.")


def show_gate(gate: GateResult | EncoderGate) -> None:
    out = _out()
    verdict = "[bold green]passed[/]" if gate.passed else "[bold red]failed[/]"
    out.print(f"Gate: {verdict} in {gate.runtime}, {gate.compared}")
    table = _table("", "measured", "limit", right=("measured", "limit"))
    for name, measured, limit in gate.rows():
        table.add_row(name, measured, limit)
    out.print(table)
    for failure in gate.failures:
        out.print(f"  {failure}", markup=False)


def show_verification(result: Verification) -> None:
    out = _out()
    out.print(f"Files: {result.files} match their hashes. Exported as: {result.status}.")
    if result.gate is not None:
        show_gate(result.gate)
    elif result.passed:
        out.print("The package carries no fingerprint of a reference (exported with --no-verify): only hashes were checked.")


def show_evaluation(artifact: Path, result: Evaluation) -> None:
    _out().print(
        f"{artifact}: perplexity {result.perplexity:.4f} (nll {result.nll_mean:.5f}) over {result.tokens:,} tokens, "
        f"{result.chunks} windows of {result.ctx}",
        markup=False,
    )


def show_timings(timings: Timings) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"{timings.prompt_tokens} prompt tokens, first token after {timings.ttft_s * 1000:.0f} ms, "
        f"{timings.new_tokens} tokens at {_number(timings.decode_tok_s)} tok/s",
        style="dim",
    )


def show_description(description: Mapping[str, Any]) -> None:
    out = _out()
    for section, content in description.items():
        if isinstance(content, Mapping):
            out.print(f"[bold]{section}[/]")
            for key, value in content.items():
                out.print(f"  {key}: {_short(value)}", markup=False)
        elif isinstance(content, list) and content and isinstance(content[0], Mapping):
            out.print(f"[bold]{section}[/]")
            table = _table(*content[0])
            for row in content:
                table.add_row(*(_short(value, limit=300) for value in row.values()))
            out.print(table)
        else:
            out.print(f"[bold]{section}[/]: {_short(content)}")


def _short(value: Any, limit: int = 100) -> str:
    text = str(value).replace("\n", "\\n")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def show_profiles(profiles: Sequence[DeviceProfile]) -> None:
    table = _table("name", "runs on", "memory", "budget", "formats", "context", right=("memory", "budget", "context"))
    for p in profiles:
        memory, budget = (size(mib * 2**20) for mib in (p.model_memory_mib, p.memory.budget_mib))
        table.add_row(p.name, p.runtime.device, memory, budget, ", ".join(p.export.grids), str(p.export.n_ctx))
    _out().print(table)


def show_profile(profile: DeviceProfile) -> None:
    show_description({key: value for key, value in profile.to_json().items() if value is not None})


def show_detection(detection: Detection) -> None:
    out = _out()
    show_description({"machine": detection.machine.to_json()})
    out.print(f"Nearest profile: [bold]{detection.profile}[/] ({'; '.join(detection.reasons)})")
