"""`edgeq report`: one page of results files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeq.cli_parts import FILE, PATH, json_option, print_json

if TYPE_CHECKING:
    from edgeq.runtime.report.document import Report
    from edgeq.runtime.report.tables import Cell


@click.command()
@click.argument("results", type=FILE, nargs=-1, required=True, metavar="RESULTS...")
@click.option(
    "-o", "--output", "outputs", type=PATH, multiple=True, help="Write this .html, .md or .json file. May be given several times."
)
@click.option("--profile", metavar="NAME", help="Draw in the limits of this profile: its memory budget and targets.")
@click.option("--budget", metavar="SIZE", help="Memory that may be used, instead of the profile's, e.g. 512MB.")
@click.option("--title", default="edgeq report", show_default=True, help="Title of the report.")
@click.option("--force", is_flag=True, help="Replace an existing report.")
@json_option
def report(
    results: tuple[Path, ...], outputs: tuple[Path, ...], profile: str | None, budget: str | None, title: str, force: bool, as_json: bool
) -> None:
    """Tables, figures and a recommendation from what `edgeq bench -o` and `edgeq eval -o` wrote.

    Files of both kinds are joined by the hash of what was measured; all should be about variants of one model. The page is one file
    that needs no network. Without -o the terminal shows the same tables. HTML needs edgeq[report].
    """
    from edgeq import report_api

    made = report_api.report(results, output=outputs, profile=profile, budget=budget, title=title, force=force)
    if as_json:
        from edgeq.runtime.report.document import to_json

        print_json(to_json(made))
        return
    if not outputs:
        show_report(made, tables=True)
        return
    show_report(made, tables=False)
    for path in outputs:
        click.echo(f"Wrote {path}")


def show_report(made: Report, *, tables: bool) -> None:
    """Recommendations and warnings; with `tables` every row as well."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from edgeq.runtime.report import document

    out = Console(highlight=False, soft_wrap=True)
    if not out.is_terminal:
        out.width = 1000  # a pipe has no width of its own; nothing is folded
    content = document.to_json(made)
    if tables:
        for table in content["tables"]:
            out.print(Text(f"{table['title']}: {table['note']}".rstrip(": "), style="bold"))
            shown = Table(header_style="bold", box=None, pad_edge=False)
            shown.add_column("variant")
            for name in table["columns"]:
                shown.add_column(Text(name), justify="right")
            for row in table["rows"]:
                shown.add_row(Text(f"{row['variant']} {row['label']}"), *(Text(_shown(cell)) for cell in row["cells"]))
            out.print(shown)
            out.print()
    for one in content["recommendations"]:
        out.print(Text(one["heading"], style="bold green" if one["variant"] else "bold red"))
        for reason in one["reasons"]:
            out.print(Text(f"  {reason}"))
    for one in content["warnings"]:
        why = one["reason"] or ("The reason is not known." if one["kind"] == "slow" else "")
        out.print(Text(f"Warning: {one['text']} {why}".rstrip(), style="yellow"))


def _shown(cell: Cell) -> str:
    return "-" if cell is None else cell if isinstance(cell, str) else cell["shown"]
