"""safetensors headers, against the library that defines the format; and every way a file can be broken."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.converters.sources.safetensors_file import MAX_HEADER_BYTES, read_safetensors
from edgeq.errors import SourceError, UnsupportedError

ARRAYS = {
    "a.weight": np.arange(15, dtype=np.float32).reshape(3, 5),
    "b.bias": np.linspace(-1, 1, 7, dtype=np.float16),
    "ids": np.arange(4, dtype=np.int64),
    "scalar": np.array(2.5, dtype=np.float32),
    "empty": np.zeros((0, 3), dtype=np.float32),
}
WHOLE = safetensors.numpy.save(ARRAYS, metadata={"format": "pt"})


def written(folder: Path, content: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


def file_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    stored = read_safetensors(written(tmp_path, WHOLE))
    assert {name: tensor.shape for name, tensor in stored.items()} == {name: array.shape for name, array in ARRAYS.items()}
    assert {name: tensor.dtype for name, tensor in stored.items()} == {
        "a.weight": "F32",
        "b.bias": "F16",
        "ids": "I64",
        "scalar": "F32",
        "empty": "F32",
    }
    np.testing.assert_array_equal(stored["a.weight"].open().decode(), ARRAYS["a.weight"])
    np.testing.assert_array_equal(stored["a.weight"].open().decode(1, 3), ARRAYS["a.weight"][1:3])
    np.testing.assert_array_equal(stored["b.bias"].open().decode(), ARRAYS["b.bias"].astype(np.float32))
    assert stored["a.weight"].open().origin == f"{tmp_path / 'model.safetensors'}: a.weight"


def test_unaligned_data(tmp_path: Path) -> None:
    """The format lets a header have any length, so that values need not lie at multiples of their size."""
    values = np.array([1.5, -2.25, 3.0], dtype=np.float16)
    header = json.dumps({"t": {"dtype": "F16", "shape": [3], "data_offsets": [0, 6]}}).encode()
    header += b" " * (1 - len(header) % 2)
    stored = read_safetensors(written(tmp_path, file_of(header, values.tobytes())))
    np.testing.assert_array_equal(stored["t"].open().decode(), values.astype(np.float32))


def test_integers_are_listed_but_not_opened(tmp_path: Path) -> None:
    path = written(tmp_path, WHOLE)
    with pytest.raises(UnsupportedError, match=r"model.safetensors: ids is stored as I64; supported: F32, F16, BF16"):
        read_safetensors(path)["ids"].open()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(WHOLE) - 1))
def test_any_truncation_is_our_error(size: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.raises(SourceError, match=r"model.safetensors .*\. Download the file again\."):
        read_safetensors(written(Path(folder), WHOLE[:size]))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(WHOLE) - sum(a.nbytes for a in ARRAYS.values()) - 1), st.integers(0, 255))
def test_any_changed_header_byte_is_our_error_or_understood(position: int, value: int) -> None:
    """What we accept, the library accepts too: it never takes fewer files than we do."""
    broken = bytearray(WHOLE)
    broken[position] = value
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), bytes(broken))
        try:
            stored = read_safetensors(path)
        except SourceError:
            return
        known = {"F32", "F16", "I64"}
        if {tensor.dtype for tensor in stored.values()} <= known and b"__metadata__" in broken:
            with safetensors.safe_open(path, framework="np") as file:
                assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == {n: t.shape for n, t in stored.items()}  # noqa: SIM118


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BROKEN = [
    (b"", "is cut short: it has 0 bytes, a header alone has more"),
    (b"PK\x03\x04" + b"\x01" * 100, "is not a safetensors file: its first 8 bytes promise a header of"),
    (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", f"is not a safetensors file: .* the format allows {MAX_HEADER_BYTES}"),
    (struct.pack("<Q", 100) + b"{}", "is cut short: it has 10 bytes, its header alone needs 108"),
    (file_of(b"{nonsense"), "has a header that is not valid JSON"),
    (file_of(b"\xff\xfe"), "has a header that is not valid JSON"),
    (file_of(b"[]"), "has a header that is not a JSON object"),
    (file_of(b'{"a": {}, "a": {}}'), r"has a header that is not valid JSON \(a key occurs twice\)"),
    (file_of({"t": 3}), "describes 't' in a way that makes no sense"),
    (file_of({"t": entry(dtype=5)}, b"\0" * 8), "describes 't' in a way"),
    (file_of({"t": entry(shape=[-2])}, b"\0" * 8), "describes 't' in a way"),
    (file_of({"t": entry(shape=[2.0])}, b"\0" * 8), "describes 't' in a way"),
    (file_of({"t": entry(shape=[True, 2])}, b"\0" * 8), "describes 't' in a way"),
    (file_of({"t": entry(offsets=[8, 0])}, b"\0" * 8), "describes 't' in a way"),
    (file_of({"t": entry(offsets=[0, 4, 8])}, b"\0" * 8), "describes 't' in a way"),
    (file_of({"t": entry(shape=[3])}, b"\0" * 8), r"gives 't' 8 bytes, but shape \[3\] in F32 needs 12"),
    (file_of({"t": entry()}, b"\0" * 7), "is cut short: its tensors need 8 bytes of data, it has 7"),
    (file_of({"t": entry()}, b"\0" * 9), "has 1 bytes after its last tensor that belong to none"),
    (file_of({"t": entry(offsets=[4, 12])}, b"\0" * 12), r"places 't' at byte 4 of its data, which leaves a gap before it \(expected 0\)"),
    (
        file_of({"s": entry(), "t": entry(offsets=[4, 12])}, b"\0" * 12),
        r"places 't' at byte 4 of its data, which overlaps the tensor before it \(expected 8\)",
    ),
]


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_broken(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=f"model.safetensors {message}"):
        read_safetensors(written(tmp_path, content))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"x.safetensors is missing"):
        read_safetensors(tmp_path / "x.safetensors")


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot be read \(Is a directory\)"):
        read_safetensors(tmp_path)
