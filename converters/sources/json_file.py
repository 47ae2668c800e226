"""JSON files of a checkpoint: read whole, and never trusted to have the types they should have."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeq.errors import SourceError


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises SourceError when the file is missing, not JSON, or something else than an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path} is missing. Download the model's folder again, with all its files.") from None
    except OSError as err:
        raise SourceError(f"{path}: cannot be read ({err.strerror}).") from err
    except (ValueError, RecursionError) as err:  # a UnicodeDecodeError is a ValueError too
        raise SourceError(f"{path}: not valid JSON ({err}). Download the file again.") from err
    if not isinstance(value, dict):
        raise SourceError(f"{path}: expected a JSON object, found {_kind(value)}. Download the file again.")
    return value


class Section:
    """One object of a JSON file, read key by key with the type each key must have.

    A key whose value is null counts as absent. `used` remembers every key that was asked for, so that the reader can tell
    which ones nobody understood. Messages name file and key. Raises SourceError for a missing key or a value of another type.
    """

    def __init__(self, values: Mapping[str, Any], path: Path, *, within: str = "") -> None:
        self.values = values
        self.path = path
        self.within = within
        self.used: set[str] = set()

    def where(self, key: str) -> str:
        return f"{self.path}: {self.within}{key}"

    def get(self, key: str) -> Any:
        self.used.add(key)
        return self.values.get(key)

    def integer(self, key: str) -> int:
        return self._required(key, self.optional_integer(key))

    def optional_integer(self, key: str) -> int | None:
        value = self.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise SourceError(f"{self.where(key)} is {value!r}, expected a positive whole number")
        return value

    def number(self, key: str) -> float:
        return self._required(key, self.optional_number(key))

    def optional_number(self, key: str) -> float | None:
        value = self.get(key)
        if value is None:
            return None
        if not _is_number(value) or value <= 0:
            raise SourceError(f"{self.where(key)} is {value!r}, expected a positive number")
        return float(value)

    def boolean(self, key: str, *, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise SourceError(f"{self.where(key)} is {value!r}, expected true or false")
        return value

    def optional_list(self, key: str) -> list[Any] | None:
        value = self.get(key)
        if value is not None and not isinstance(value, list):
            raise SourceError(f"{self.where(key)} is {value!r}, expected a list")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        values = self._required(key, self.optional_list(key))
        for value in values:
            if not _is_number(value) or value <= 0:
                raise SourceError(f"{self.where(key)} contains {value!r}, expected positive numbers")
        return tuple(float(v) for v in values)

    def optional_section(self, key: str) -> Section | None:
        """None for an empty object too."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise SourceError(f"{self.where(key)} is {value!r}, expected an object")
        if not value:
            return None
        return Section(value, self.path, within=f"{self.within}{key}.")

    def unused(self) -> list[str]:
        """Keys with a value that nobody asked for, in file order."""
        return [key for key, value in self.values.items() if value is not None and key not in self.used]

    def _required(self, key: str, value: Any) -> Any:
        if value is None:
            raise SourceError(f"{self.where(key)} is missing. The file is not complete: download it again.")
        return value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _kind(value: Any) -> str:
    return {list: "a list", str: "a string", bool: "true or false", type(None): "null"}.get(type(value), "a number")
