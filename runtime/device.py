"""Names of devices on the command line: "cpu", "cuda" and "cuda:N"."""

from __future__ import annotations

from edgeq.errors import UsageError


def parse_device(name: str) -> int | None:
    """Index of the GPU a device name means, None for the CPU. Raises UsageError."""
    if name == "cpu":
        return None
    kind, colon, index = name.partition(":")
    if kind == "cuda" and (not colon or index.isdecimal()):
        return int(index or 0)
    raise UsageError(f"device {name!r} is not known; expected cpu, cuda or cuda:N, such as cuda:0")
