"""The header reader: against gguf-py, and against every kind of damage."""

from __future__ import annotations

import ctypes
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import KEYS, TENSORS, demo_file, ggml_library, write_with_gguf_py
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeq.errors import SourceError
from edgeq.gguf_file import Header, ValueType, read_header, read_parts
from edgeq.gguf_write import header_bytes
from edgeq.grids import GRIDS


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_with_gguf_py(tmp_path_factory.mktemp("gguf") / "sample.gguf", "llama", KEYS, TENSORS)


def assert_equals_gguf_py(header: Header, path: Path) -> None:
    reader = gguf.GGUFReader(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(header.fields) == list(fields)
    for name, field in fields.items():
        ours = header.fields[name]
        assert ours.type == field.types[0]
        assert ours.item_type == (field.types[1] if ours.type is ValueType.ARRAY else None)
        some = slice(None, None, max(1, len(field.data) // 500)) if ours.type is ValueType.ARRAY else None
        assert (ours.value[some] if some else ours.value) == field.contents(some if some else slice(None))
    assert list(header.tensors) == [t.name for t in reader.tensors]
    for theirs in reader.tensors:
        tensor = header.tensors[theirs.name]
        assert tensor.shape == tuple(int(n) for n in reversed(theirs.shape))
        assert tensor.grid.id == theirs.tensor_type
        assert (tensor.offset, tensor.nbytes) == (theirs.data_offset, theirs.n_bytes)
    assert (header.data_offset, header.alignment) == (reader.data_offset, reader.alignment)
    with path.open("rb") as file:
        assert header_bytes(header.fields.values(), header.tensors.values()) == file.read(header.data_offset)


def test_equals_gguf_py_on_every_value_type(sample: Path) -> None:
    header = read_header(sample)
    assert header.value("t.string") == "größer 你好"
    assert header.value("absent") is None and header.value("absent", 3) == 3
    assert (header.version, header.file_bytes) == (3, sample.stat().st_size)
    assert_equals_gguf_py(header, sample)


@pytest.mark.parametrize("odd", ["plain", "", "a\0b", "\0" * 9, "x" * 255, "y" * 256, "z" * 70_000])
@pytest.mark.parametrize("at", [0, 700, 1499])
def test_long_lists_of_strings_end_where_gguf_py_says(tmp_path: Path, odd: str, at: int) -> None:
    """Most lists are skipped at once; those with an empty, long or zero-bearing string are walked."""
    tokens = [f"t{i}" for i in range(1500)]
    tokens[at] = odd
    keys = {"t.tokens": (gguf.GGUFValueType.ARRAY, tokens), "t.after": (gguf.GGUFValueType.UINT32, 7)}
    path = write_with_gguf_py(tmp_path / "long.gguf", "llama", keys, TENSORS)
    header = read_header(path)
    assert list(header.value("t.tokens")) == tokens
    assert header.value("t.after") == 7
    assert_equals_gguf_py(header, path)


def test_equals_gguf_py_on_the_demo_model() -> None:
    path = demo_file()
    header = read_header(path)
    assert header.fields["tokenizer.ggml.tokens"].count == 49152
    assert header.tensors["blk.0.attn_k.weight"].shape == (192, 576)
    assert header.tensors["blk.0.attn_k.weight"].grid is GRIDS["Q4_1"]
    assert_equals_gguf_py(header, path)


def test_alignment_of_the_file_counts(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(128)
    for name in ("one", "two"):
        writer.add_tensor(name, np.ones(3, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "a.gguf")
    assert header.alignment == 128 and header.data_offset % 128 == 0
    assert header.tensors["two"].offset == header.data_offset + 128


def test_version_2_reads_alike(sample: Path, tmp_path: Path) -> None:
    old = tmp_path / "v2.gguf"
    old.write_bytes(b"GGUF\2\0\0\0" + sample.read_bytes()[8:])
    assert read_header(old).version == 2
    assert read_header(old).tensors == read_header(sample).tensors


def test_a_file_without_tensors(tmp_path: Path) -> None:
    path = write_with_gguf_py(tmp_path / "vocab.gguf", "llama", {}, {})
    header = read_header(path)
    assert not header.tensors and header.value("general.architecture") == "llama"


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def u32_field(key: str | bytes, value: int, kind: int = 4) -> bytes:
    return string(key) + struct.pack("<II", kind, value)


def tensor(name: str | bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(fields: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (), data: int = 64, **head: int) -> bytes:
    """A GGUF file from raw parts; head overrides version, n_tensors, n_fields."""
    head = {"version": 3, "n_tensors": len(tensors), "n_fields": len(fields)} | head
    out = struct.pack("<4sIQQ", b"GGUF", head["version"], head["n_tensors"], head["n_fields"]) + b"".join(fields + tensors)
    return out + bytes(-len(out) % 32) + bytes(data)


DAMAGED = {
    "empty": (b"", "0 bytes are too few for a GGUF file"),
    "magic": (b"GGML" + bytes(40), r"starts with b'GGML', not b'GGUF': this is not a GGUF file"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian GGUF file; edgeq reads little-endian ones"),
    "version": (build(version=1), "is GGUF version 1; versions 2 and 3 are supported"),
    "counts": (build(n_tensors=2**60), "claims 0 fields and 1152921504606846976 tensors, which 72 bytes cannot hold"),
    "key length": (build((struct.pack("<Q", 200),)), r"key of field 0 at byte 32 needs 200 bytes, 64 are left\. The file is truncated"),
    "long key": (build((struct.pack("<Q", 2**40),), n_fields=1), "key of field 0 claims 1099511627776 bytes"),
    "empty key": (build((u32_field("", 1),)), "field 0 has an empty key"),
    "key text": (build((u32_field(b"\xff\xfe", 1),)), "key of field 0 is not UTF-8"),
    "value type": (build((u32_field("k", 1, kind=77),)), "field 'k': unknown value type 77"),
    "nested": (build((string("k") + struct.pack("<IIQ", 9, 9, 0),)), "field 'k' is an array of arrays"),
    "long array": (build((string("k") + struct.pack("<IIQ", 9, 10, 2**61),)), r"field 'k' at byte 49 needs 18446744073709551616 bytes"),
    "long strings": (build((string("k") + struct.pack("<IIQ", 9, 8, 2**61),)), r"field 'k' at byte 49 needs 18446744073709551616 bytes"),
    "string end": (build((string("k") + struct.pack("<IIQQQ", 9, 8, 2, 2**63, 5),)), "field 'k' runs beyond the end of the file"),
    "duplicate key": (build((u32_field("k", 1), u32_field("k", 1))), "field 'k' occurs twice"),
    "alignment": (build((u32_field("general.alignment", 24),)), "general.alignment is 24; expected a power of two, as UINT32"),
    "alignment type": (build((u32_field("general.alignment", 32, kind=5),)), "general.alignment is 32; expected a power of two, as UINT32"),
    "duplicate tensor": (build(tensors=(tensor("t", (4,)), tensor("t", (4,), offset=32))), "tensor 't' occurs twice"),
    "tensor name": (build(tensors=(tensor("n" * 64, (4,)),)), "the name of tensor 0 has 64 bytes, at most 63 are allowed"),
    "no dims": (build(tensors=(tensor("t", ()),), data=99), "tensor 't' has 0 dimensions, expected 1 to 4"),
    "many dims": (build(tensors=(tensor("t", (1, 1, 1, 1, 4)),)), "tensor 't' has 5 dimensions, expected 1 to 4"),
    "zero dim": (build(tensors=(tensor("t", (4, 0)),)), r"tensor 't' has shape \[0, 4\], whose dimensions must be positive"),
    "overflow": (build(tensors=(tensor("t", (2**40, 2**40)),)), "its size below 2"),
    "unknown type": (build(tensors=(tensor("t", (4,), kind=999),)), "tensor 't': unknown ggml type id 999"),
    "integers": (build(tensors=(tensor("t", (4,), kind=26),)), "tensor 't': ggml type 26 is I32, whole numbers"),
    "removed type": (build(tensors=(tensor("t", (32,), kind=31),)), "ggml type 31 is Q4_0_4_4, removed from llama.cpp; use the Q4_0 file"),
    "blocks": (
        build(tensors=(tensor("t", (33, 2), kind=2),)),
        "rows of 33 values, which do not divide into Q4_0 blocks of 32",
    ),
    "unaligned": (
        build(tensors=(tensor("t", (4,), offset=4),)),
        "lies at data offset 4, which is not a multiple of 32; expected 0",
    ),
    "gap": (
        build(tensors=(tensor("t", (4,), offset=32),)),
        "'t' lies at data offset 32, which leaves a gap or overlaps; expected 0",
    ),
    "beyond": (build(tensors=(tensor("t", (17,)),)), r"tensor 't' ends at byte 132, the file at 128\. The file is truncated"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(case: str, tmp_path: Path) -> None:
    raw, message = DAMAGED[case]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(raw)
    with pytest.raises(SourceError, match=message) as caught:
        read_header(path)
    assert str(caught.value).startswith(str(path))


def test_damage_in_a_long_field(tmp_path: Path) -> None:
    path = tmp_path / "long.gguf"
    head = build((string("k") + struct.pack("<IQ", 8, 1 << 29),), data=0)
    path.write_bytes(head)
    with path.open("r+b") as file:
        file.truncate(1 << 30)  # sparse: no such disk space is used
    with pytest.raises(SourceError, match="field 'k' claims 536870920 bytes"):
        read_header(path)


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"absent\.gguf: cannot be read: No such file"):
        read_header(tmp_path / "absent.gguf")
    with pytest.raises(SourceError, match="cannot be read: Is a directory"):
        read_header(tmp_path)


def test_text_that_is_not_utf8_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_bytes(build((string("k") + struct.pack("<I", 8) + string(b"\xff"),)))
    with pytest.raises(SourceError, match=r"text\.gguf: k: string 0 is not UTF-8"):
        read_header(path).value("k")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "f.gguf"


class InitParams(ctypes.Structure):
    """struct gguf_init_params of gguf.h."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def accepted_by_ggml(path: Path) -> bool:
    """Whether the reader in the C library takes the file."""
    base = ggml_library()
    base.gguf_init_from_file.restype = ctypes.c_void_p
    base.gguf_init_from_file.argtypes = [ctypes.c_char_p, InitParams]
    base.gguf_free.argtypes = [ctypes.c_void_p]
    context = base.gguf_init_from_file(str(path).encode(), InitParams(True, None))
    if context:
        base.gguf_free(context)
    return bool(context)


def test_ggml_takes_our_sample(sample: Path) -> None:
    assert accepted_by_ggml(sample)


def read_or_refuse(raw: bytes, path: Path) -> None:
    """Whatever the bytes are: a header that ggml takes too, and values; or SourceError. And little memory."""
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        header = read_header(path)
        assert accepted_by_ggml(path)
        for key in header.fields:
            header.value(key)
    except SourceError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2_000_000


@given(st.floats(0, 1, exclude_max=True))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_truncation_is_refused(sample: Path, scratch: Path, share: float) -> None:
    raw = sample.read_bytes()
    last = max(t.offset + t.nbytes for t in read_header(sample).tensors.values())
    scratch.write_bytes(raw[: int(share * last)])
    with pytest.raises(SourceError):
        read_header(scratch)


@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damaged_byte_is_refused_or_harmless(sample: Path, scratch: Path, damage: list[tuple[float, int]]) -> None:
    raw = bytearray(sample.read_bytes())
    end = read_header(sample).data_offset
    for share, value in damage:
        raw[int(share * end)] = value
    read_or_refuse(bytes(raw), scratch)


@given(st.binary(max_size=300))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_refused_or_harmless(scratch: Path, tail: bytes) -> None:
    read_or_refuse(b"GGUF\3\0\0\0" + tail, scratch)


# ---- split files


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    writer.add_uint32("llama.block_count", 1)
    for name in "abcde":
        writer.add_tensor(name, np.full(8, ord(name), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(tmp_path.glob("m-*.gguf"))


def test_parts_are_read_from_any_of_them(parts: list[Path]) -> None:
    assert [p.name for p in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for named in parts:
        headers = read_parts(named)
        assert [h.path for h in headers] == parts
        assert [list(h.tensors) for h in headers] == [["a", "b"], ["c", "d"], ["e"]]
    assert headers[0].value("llama.block_count") == 1


def test_a_whole_file_is_one_part(sample: Path) -> None:
    assert [h.path for h in read_parts(sample)] == [sample]


def test_parts_that_do_not_belong(parts: list[Path], tmp_path: Path) -> None:
    renamed = tmp_path / "model.gguf"
    renamed.write_bytes(parts[0].read_bytes())
    with pytest.raises(SourceError, match=r"one of 3 parts, but its name does not end in -00001-of-00003\.gguf.*gguf-split --merge"):
        read_parts(renamed)
    second = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(SourceError, match=r"-00002-of-00003\.gguf: says it is part 2 of 3, counted from 0"):
        read_parts(parts[0])
    parts[1].write_bytes(second.replace(b"\1" + bytes(7) + b"c", b"\1" + bytes(7) + b"a"))
    with pytest.raises(SourceError, match="the parts hold 5 tensors, expected 5 with distinct names"):
        read_parts(parts[0])
    parts[1].unlink()
    with pytest.raises(SourceError, match=r"-00002-of-00003\.gguf: part 2 of 3 is missing\. Put all parts side by side"):
        read_parts(parts[0])
