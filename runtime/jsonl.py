"""Task files: one JSON object per line, UTF-8. Lines that are blank are skipped; everything else must be what the task expects."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from edgeq.errors import SourceError

T = TypeVar("T")


class Malformed(Exception):
    """What is wrong with a line, for `read_items` to say where."""


def read_items(path: Path, parse: Callable[[int, dict[str, Any]], T], *, expected: str) -> tuple[tuple[T, ...], str]:
    """Items of a file, and its SHA-256. parse: line number and object to item, raising Malformed.

    expected: a line as it should be. Raises SourceError that names file, line, fault and `expected`.
    """
    try:
        content = path.read_bytes()
    except OSError as err:
        raise SourceError(f"{path}: cannot be read ({err.strerror}).") from err
    items = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            items.append(parse(number, _object(line)))
        except Malformed as fault:
            raise SourceError(f"{path}, line {number}: {fault}. Expected one JSON object per line: {expected}") from None
    if not items:
        raise SourceError(f"{path} has no items. Expected one JSON object per line: {expected}")
    return tuple(items), hashlib.sha256(content).hexdigest()


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as err:
        raise Malformed(f"not UTF-8 text (byte {err.start})") from None
    except json.JSONDecodeError as err:
        raise Malformed(f"not valid JSON ({err.msg}, column {err.colno})") from None
    except RecursionError:
        raise Malformed("not valid JSON (nested too deeply)") from None
    if not isinstance(value, dict):
        raise Malformed(f"it holds {_kind(value)}")
    return value


def text_of(document: dict[str, Any], key: str) -> str:
    """A text that must be there. Raises Malformed."""
    if key not in document:
        raise Malformed(f'"{key}" is missing')
    value = document[key]
    if not isinstance(value, str):
        raise Malformed(f'"{key}" is {_kind(value)}')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Malformed(f'"{key}" has half of a character (a lone surrogate)') from None
    return value


def known(document: dict[str, Any], *keys: str) -> None:
    """Raises Malformed for a key that the task does not read: it may be a misspelt one."""
    if extra := sorted(set(document) - set(keys)):
        raise Malformed(f'"{extra[0]}" is not a key of this task')


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names[type(value)]
