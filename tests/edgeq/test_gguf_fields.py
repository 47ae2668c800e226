from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.errors import SourceError
from edgeq.gguf_fields import Field, ValueType

RANGES = {
    ValueType.UINT8: (0, 2**8 - 1),
    ValueType.INT8: (-(2**7), 2**7 - 1),
    ValueType.UINT16: (0, 2**16 - 1),
    ValueType.INT16: (-(2**15), 2**15 - 1),
    ValueType.UINT32: (0, 2**32 - 1),
    ValueType.INT32: (-(2**31), 2**31 - 1),
    ValueType.UINT64: (0, 2**64 - 1),
    ValueType.INT64: (-(2**63), 2**63 - 1),
}


def items(kind: ValueType) -> st.SearchStrategy:
    if kind in RANGES:
        low, high = RANGES[kind]
        return st.integers(low, high)
    return {
        ValueType.FLOAT32: st.floats(width=32, allow_nan=False),
        ValueType.FLOAT64: st.floats(allow_nan=False),
        ValueType.BOOL: st.booleans(),
        ValueType.STRING: st.text(st.characters(exclude_categories=["Cs"])),
    }[kind]


ITEM_TYPES = [kind for kind in ValueType if kind is not ValueType.ARRAY]


@given(st.data(), st.sampled_from(ITEM_TYPES))
def test_values_come_back(data: st.DataObject, kind: ValueType) -> None:
    value, values = data.draw(items(kind)), data.draw(st.lists(items(kind)))
    scalar, array = Field.of("k", value, kind), Field.of("k", values, ValueType.ARRAY, kind)
    assert scalar.value == value and type(scalar.value) is type(value)
    assert array.value == values
    assert (scalar.item_type, scalar.count) == (None, 1)
    assert (array.item_type, array.count) == (kind, len(values))


@pytest.mark.parametrize(
    ("field", "kind", "item_type", "value"),
    [
        (Field.of("k", True), ValueType.BOOL, None, True),
        (Field.of("k", "é"), ValueType.STRING, None, "é"),
        (Field.of("k", 3), ValueType.UINT32, None, 3),
        (Field.of("k", -3), ValueType.INT32, None, -3),
        (Field.of("k", 0.5), ValueType.FLOAT32, None, 0.5),
        (Field.of("k", [1, 2]), ValueType.ARRAY, ValueType.INT32, [1, 2]),
        (Field.of("k", (True, False)), ValueType.ARRAY, ValueType.BOOL, [True, False]),
        (Field.of("k", np.array([1.5], dtype=np.float32)), ValueType.ARRAY, ValueType.FLOAT32, [1.5]),
        (Field.u32("k", 7), ValueType.UINT32, None, 7),
        (Field.f32("k", 2), ValueType.FLOAT32, None, 2.0),
        (Field.boolean("k", False), ValueType.BOOL, None, False),
        (Field.string("k", "v"), ValueType.STRING, None, "v"),
        (Field.strings("k", []), ValueType.ARRAY, ValueType.STRING, []),
        (Field.i32s("k", [4]), ValueType.ARRAY, ValueType.INT32, [4]),
        (Field.f32s("k", [4]), ValueType.ARRAY, ValueType.FLOAT32, [4.0]),
        (Field.u32("old", 7).renamed("k"), ValueType.UINT32, None, 7),
    ],
)
def test_builders(field: Field, kind: ValueType, item_type: ValueType | None, value: object) -> None:
    assert (field.key, field.type, field.item_type, field.value) == ("k", kind, item_type, value)


def test_bytes_in_a_file() -> None:
    assert Field.string("ab", "é").to_bytes() == b"\2" + bytes(7) + b"ab" + b"\10\0\0\0" + b"\2" + bytes(7) + b"\xc3\xa9"
    assert Field.i32s("a", [-1]).to_bytes() == b"\1" + bytes(7) + b"a" + struct.pack("<IIQi", 9, 5, 1, -1)


def test_any_byte_but_zero_is_true() -> None:
    assert Field("k", ValueType.BOOL, b"\2").value is True


@pytest.mark.parametrize(
    ("value", "kind", "item_type"),
    [
        (-1, ValueType.UINT32, None),
        (2**31, ValueType.INT32, None),
        (1e39, ValueType.FLOAT32, None),
        (1.5, ValueType.UINT32, None),
        (True, ValueType.UINT32, None),
        (1, ValueType.BOOL, None),
        (b"raw", ValueType.STRING, None),
        (5, ValueType.STRING, None),
        ([1], ValueType.UINT32, None),
        (1, ValueType.ARRAY, ValueType.INT32),
        ([], None, None),
        ([1, "a"], None, None),
        ([[1]], ValueType.ARRAY, ValueType.ARRAY),
        (None, None, None),
    ],
)
def test_values_that_do_not_fit_their_type(value: object, kind: ValueType | None, item_type: ValueType | None) -> None:
    with pytest.raises(AssertionError):
        Field.of("k", value, kind, item_type)


def test_text_that_is_not_utf8() -> None:
    payload = struct.pack("<IQ", ValueType.STRING, 2) + Field.string("", "ok").payload + struct.pack("<Q", 1) + b"\xff"
    with pytest.raises(SourceError, match=r"k: string 1 is not UTF-8: b'\\xff'\. Convert the model again"):
        _ = Field("k", ValueType.ARRAY, payload).value
