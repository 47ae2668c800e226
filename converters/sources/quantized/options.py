"""Options of a quantization_config: those that decide how weights decode have to be known, or the checkpoint is refused by their name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from edgeq.converters.sources.json_file import Section
from edgeq.errors import UnsupportedError

REMEDY = "Use the float checkpoint this one was made from, or a GGUF file of it."


def choice(config: Section, key: str, known: Sequence[Any], *, default: Any = None) -> Any:
    """The value of a key. An absent key means `default`. Raises UnsupportedError for a value that is not one of `known`."""
    value = config.get(key)
    value = default if value is None else value.lower() if isinstance(value, str) else value
    if not any(isinstance(value, bool) == isinstance(k, bool) and value == k for k in known):
        raise UnsupportedError(f"{config.where(key)} is {value!r}; supported: {', '.join(map(str, known))}. {REMEDY}")
    return value


def refuse(config: Section, harmless: Collection[str]) -> None:
    """Raise UnsupportedError for the first key that was not read and is not known to change nothing."""
    for key in config.unused():
        if key not in harmless:
            raise UnsupportedError(
                f"{config.where(key)} (value {config.values[key]!r}) is an option edgeq does not know. "
                "Remove it if weights decode the same without it, or use the float checkpoint."
            )
