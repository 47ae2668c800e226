"""GGUF metadata fields: typed keys and values, kept as the bytes a file has until someone asks for the value.

A field in a file is: key (string), value type (u32), payload. Payload by type, all little-endian:

    integers, floats    1, 2, 4 or 8 bytes
    BOOL                1 byte, 0 or not
    STRING              length u64, UTF-8 bytes
    ARRAY               item type u32, count u64, then the items' payloads (arrays of arrays do not exist in llama.cpp)

Layout: docs/gguf.md of ggml-org/ggml, and gguf.cpp of llama.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np

from edgeq.errors import SourceError


class ValueType(IntEnum):
    """Type ids of GGUF metadata values."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


# struct codes; numpy understands the same ones.
_CODES = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
SCALAR_BYTES = {kind: struct.calcsize("<" + code) for kind, code in _CODES.items()}
_LENGTH = struct.Struct("<Q")
_ARRAY_HEAD = struct.Struct("<IQ")


@dataclass(frozen=True)
class Field:
    """One metadata field. payload: the bytes that follow the value type in a file, exactly as they stand there.

    `value` decodes them once, on first use: str, int, float, bool or a list of those. Build fields with `Field.of` and its
    short forms; two fields are equal when their bytes are.
    """

    key: str
    type: ValueType
    payload: bytes

    @property
    def item_type(self) -> ValueType | None:
        """Type of an array's items; None for scalars and strings."""
        return ValueType(_ARRAY_HEAD.unpack_from(self.payload)[0]) if self.type is ValueType.ARRAY else None

    @property
    def count(self) -> int:
        """Number of items of an array; 1 for anything else."""
        return _ARRAY_HEAD.unpack_from(self.payload)[1] if self.type is ValueType.ARRAY else 1

    @cached_property
    def value(self) -> Any:
        """Raises SourceError when a string is not UTF-8."""
        if self.type is ValueType.STRING:
            return _decode_strings(self.key, self.payload, 0, 1)[0]
        if self.type is not ValueType.ARRAY:
            return struct.unpack("<" + _CODES[self.type], self.payload)[0]
        item_type, count = _ARRAY_HEAD.unpack_from(self.payload)
        if item_type == ValueType.STRING:
            return _decode_strings(self.key, self.payload, _ARRAY_HEAD.size, count)
        return np.frombuffer(self.payload, "<" + _CODES[ValueType(item_type)], offset=_ARRAY_HEAD.size, count=count).tolist()

    def to_bytes(self) -> bytes:
        """The whole field as it stands in a file: key, value type, payload."""
        return _encode_string(self.key) + struct.pack("<I", self.type) + self.payload

    def renamed(self, key: str) -> Field:
        return Field(key, self.type, self.payload)

    @classmethod
    def of(cls, key: str, value: Any, type: ValueType | None = None, item_type: ValueType | None = None) -> Field:
        """A field from a Python value; types that are not given follow the value.

        bool is BOOL, str STRING, float FLOAT32; int is UINT32, or INT32 when negative; a sequence is an ARRAY whose items follow
        its first item, except that int items are INT32 (as llama.cpp's converter has them). Asserts that the value fits its type.
        """
        if type is None:
            type = ValueType.ARRAY if _is_sequence(value) else _type_of(value, ValueType.UINT32)
        if type is not ValueType.ARRAY:
            assert item_type is None and not _is_sequence(value), f"{key}: {value!r} is not a {type.name}"
            return cls(key, type, _encode(key, value, type))
        assert _is_sequence(value), f"{key}: {value!r} is not a sequence"
        if item_type is None:
            assert len(value), f"{key}: an empty array needs its item type"
            item_type = _type_of(value[0], ValueType.INT32)
        return cls(key, type, _ARRAY_HEAD.pack(item_type, len(value)) + _encode_items(key, value, item_type))

    @classmethod
    def u32(cls, key: str, value: int) -> Field:
        return cls.of(key, value, ValueType.UINT32)

    @classmethod
    def f32(cls, key: str, value: float) -> Field:
        return cls.of(key, value, ValueType.FLOAT32)

    @classmethod
    def boolean(cls, key: str, value: bool) -> Field:
        return cls.of(key, value, ValueType.BOOL)

    @classmethod
    def string(cls, key: str, value: str) -> Field:
        return cls.of(key, value, ValueType.STRING)

    @classmethod
    def strings(cls, key: str, values: Sequence[str]) -> Field:
        return cls.of(key, values, ValueType.ARRAY, ValueType.STRING)

    @classmethod
    def i32s(cls, key: str, values: Sequence[int]) -> Field:
        return cls.of(key, values, ValueType.ARRAY, ValueType.INT32)

    @classmethod
    def f32s(cls, key: str, values: Sequence[float]) -> Field:
        return cls.of(key, values, ValueType.ARRAY, ValueType.FLOAT32)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)


def _type_of(value: Any, int_type: ValueType) -> ValueType:
    if isinstance(value, bool | np.bool_):
        return ValueType.BOOL
    if isinstance(value, str):
        return ValueType.STRING
    if isinstance(value, int | np.integer):
        return ValueType.INT32 if value < 0 else int_type
    assert isinstance(value, float | np.floating), f"no GGUF type for {value!r}"
    return ValueType.FLOAT32


def _encode_string(text: str) -> bytes:
    data = text.encode("utf-8")
    return _LENGTH.pack(len(data)) + data


_PYTHON: dict[ValueType, Any] = {
    ValueType.STRING: str,
    ValueType.BOOL: bool | np.bool_,
    ValueType.FLOAT32: float | int | np.floating | np.integer,
    ValueType.FLOAT64: float | int | np.floating | np.integer,
}


def _encode(key: str, value: Any, type: ValueType) -> bytes:
    wanted = _PYTHON.get(type, int | np.integer)
    assert isinstance(value, wanted), f"{key}: {value!r} is not a {type.name}"
    assert type is ValueType.BOOL or not isinstance(value, bool), f"{key}: {value!r} is not a {type.name}"
    if type is ValueType.STRING:
        return _encode_string(value)
    try:
        return struct.pack("<" + _CODES[type], value)
    except (struct.error, OverflowError) as err:
        raise AssertionError(f"{key}: {value!r} does not fit {type.name}") from err


def _encode_items(key: str, values: Sequence[Any], item_type: ValueType) -> bytes:
    assert item_type is not ValueType.ARRAY, f"{key}: arrays of arrays do not exist"
    return b"".join([_encode(key, value, item_type) for value in values])


def _decode_strings(key: str, payload: bytes, position: int, count: int) -> list[str]:
    strings = []
    unpack, size = _LENGTH.unpack_from, _LENGTH.size
    for _ in range(count):
        start = position + size
        position = start + unpack(payload, position)[0]
        try:
            strings.append(payload[start:position].decode())
        except UnicodeDecodeError as err:
            raise SourceError(
                f"{key}: string {len(strings)} is not UTF-8: {payload[start:position][:40]!r}. Convert the model again."
            ) from err
    return strings
