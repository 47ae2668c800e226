"""Bytes for people: read from the command line and shown. Powers of ten unless binary units are named, as disks and downloads are sold."""

from __future__ import annotations

import math
import re

from edgeq.errors import UsageError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)")


def parse_bytes(text: str) -> int:
    """A number of bytes, with a unit or without; fractions of a byte are dropped. Raises UsageError.

    >>> parse_bytes("70MB"), parse_bytes("1.5 GiB"), parse_bytes("800")
    (70000000, 1610612736, 800)
    """
    match = _SIZE.fullmatch(text.strip())
    unit = None if match is None else _UNITS.get(match[2].upper())
    value = 0.0 if match is None else float(match[1])
    if unit is None or not value or not math.isfinite(value * unit):
        raise UsageError(f"{text!r} is not a size. Give a positive number of bytes, or one with a unit: 70MB, 64MiB, 1.5GB.")
    return int(value * unit)


def size(n_bytes: float | None) -> str:
    """Bytes for people, in powers of ten; "-" for what is not known."""
    if n_bytes is None:
        return "-"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.2f} {unit}" if unit == "GB" else f"{n_bytes / scale:.1f} {unit}"
    return f"{n_bytes:.0f} B"
