"""What the modules of the command line share: options, JSON on stdout, progress on stderr."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from edgeq.errors import UsageError
from edgeq.progress import silent

P = ParamSpec("P")
R = TypeVar("R")

PATH = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else on stdout.")


def print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False))


def read_utf8(path: Path) -> str:
    """A small text file from an option. Raises UsageError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise UsageError(f"{path}: cannot be read as UTF-8 text: {err}.") from err


def read_json(path: Path) -> Any:
    """The same, with JSON in it."""
    try:
        return json.loads(read_utf8(path))
    except ValueError as err:
        raise UsageError(f"{path}: is no JSON: {err}.") from err


def with_progress(function: Callable[P, R]) -> Callable[P, R]:
    """Run a command under a progress display on stderr, handed to it as `progress`; silent when stderr is no terminal."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not sys.stderr.isatty():  # as on most devices, where every import counts
            kwargs["progress"] = silent
            return function(*args, **kwargs)
        from edgeq.display import progress_display

        with progress_display() as progress:
            kwargs["progress"] = progress
            return function(*args, **kwargs)

    return run
