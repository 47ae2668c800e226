"""Write docs/cli.md from the commands' own help. `make docs` runs it; a test fails when the file is stale."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from edgeq.cli import cli

TARGET = Path(__file__).parent / "cli.md"
INTRO = """# Command line

Generated from `--help` by `make docs`. Results go to stdout, progress and notices to stderr.
With `--json`, stdout holds one JSON document and nothing else.
Exit status: 0 done, 1 failed or gate not passed, 2 usage, 130 interrupted.
"""


def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            yield from commands(command.commands[name], f"{path} {name}")


def reference() -> str:
    parts = [INTRO]
    for path, command in commands(cli, "edgeq"):
        context = click.Context(command, info_name=path, help_option_names=["-h", "--help"], max_content_width=100, terminal_width=100)
        parts.append(f"## {path}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
