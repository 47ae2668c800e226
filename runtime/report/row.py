"""A row of a results file, read field by field: missing is unknown, a wrong type is an error that names file, row and field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgeq.errors import SourceError


class Row:
    """A row that says where it is when a field is wrong."""

    def __init__(self, where: str, fields: Mapping[str, Any]) -> None:
        self.where, self.fields = where, fields

    def number(self, key: str) -> float | None:
        value = self.fields.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise SourceError(f"{self.where}: {key} is {value!r}; expected a number or null.")
        return value

    def whole(self, key: str) -> int | None:
        value = self.number(key)
        return None if value is None else int(value)

    def text(self, key: str) -> str | None:
        value = self.fields.get(key)
        if value is not None and not isinstance(value, str):
            raise SourceError(f"{self.where}: {key} is {value!r}; expected a text or null.")
        return value

    def needed(self, key: str) -> str:
        value = self.text(key)
        if not value:
            raise SourceError(f"{self.where}: {key} is missing. The file is damaged; measure again.")
        return value

    def inside(self, key: str) -> Row:
        """A field that is an object; one without fields where it is unknown."""
        value = self.fields.get(key)
        if value is not None and not isinstance(value, dict):
            raise SourceError(f"{self.where}: {key} is {value!r}; expected an object or null.")
        return Row(f"{self.where}, {key}", value or {})

    def objects(self, key: str) -> list[Row]:
        value = self.fields.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(one, dict) for one in value)):
            raise SourceError(f"{self.where}: {key} is no list of objects. The file is damaged; measure again.")
        return [Row(f"{self.where}, {key}[{i}]", one) for i, one in enumerate(value or [])]

    def numbers(self, key: str) -> list[float]:
        value = self.fields.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise SourceError(f"{self.where}: {key} is {value!r}; expected a list of numbers or null.")
        wrapped = Row(self.where, {f"{key}[{i}]": one for i, one in enumerate(value)})
        return [number for name in wrapped.fields if (number := wrapped.number(name)) is not None]
