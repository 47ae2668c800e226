import doctest

import pytest

from edgeq import sizes
from edgeq.errors import UsageError
from edgeq.sizes import parse_bytes, size


def test_examples() -> None:
    assert doctest.testmod(sizes).failed == 0


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        *(("70MB", 70_000_000), ("70 mb", 70_000_000), (" 64MiB ", 64 << 20), ("1.5GB", 1_500_000_000)),
        *(("12", 12), ("3B", 3), (".5kb", 500), ("2GiB", 2 << 30)),
    ],
)
def test_sizes_are_read(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "MB", "70 furlongs", "-5MB", "1e9", "0", "1..5MB", "nan", "9" * 400])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a size. Give a positive number of bytes, or one with a unit: 70MB, 64MiB, 1.5GB"):
        parse_bytes(text)


def test_sizes_are_shown() -> None:
    assert [size(n) for n in (None, 5, 1500, 2_500_000, 3_210_000_000)] == ["-", "5 B", "1.5 kB", "2.5 MB", "3.21 GB"]
