"""The writer: byte for byte what gguf-py writes, and refusals before the first byte."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import KEYS, TENSORS, write_with_gguf_py
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeq import gguf_write
from edgeq.errors import OutputError, PlanError, ShapeError
from edgeq.gguf_fields import Field, ValueType
from edgeq.gguf_file import TensorLayout, read_header
from edgeq.gguf_write import TensorData, header_bytes, predicted_bytes, write_gguf
from edgeq.grids import F32, GRIDS, Grid


def chunks_of(data: np.ndarray) -> Callable[[], Iterator[np.ndarray]]:
    return lambda: iter((data,))


def as_ours() -> tuple[list[Field], list[TensorData]]:
    """KEYS and TENSORS in our types; gguf-py writes general.architecture first."""
    fields = [Field.string("general.architecture", "llama")]
    for key, (kind, value) in KEYS.items():
        fields.append(Field.of(key, value, ValueType(kind)))
    tensors = []
    for name, tensor in TENSORS.items():
        if isinstance(tensor, tuple):
            grid = GRIDS[tensor[1].name]
            shape = gguf.quant_shape_from_byte_shape(tensor[0].shape, tensor[1])
            raw = tensor[0]
        else:
            grid, shape, raw = GRIDS["F32" if tensor.dtype == np.float32 else "F16"], tensor.shape, tensor.view(np.uint8)
        tensors.append(TensorData(name, tuple(shape), grid, chunks_of(raw)))
    return fields, tensors


def test_bytes_equal_gguf_py(tmp_path: Path) -> None:
    theirs = write_with_gguf_py(tmp_path / "theirs.gguf", "llama", KEYS, TENSORS).read_bytes()
    fields, tensors = as_ours()
    told: list[tuple[str, float, float]] = []
    written = write_gguf(tmp_path / "ours.gguf", iter(fields), tensors, progress=lambda *values: told.append(values))
    ours = (tmp_path / "ours.gguf").read_bytes()
    assert ours == theirs
    assert written.nbytes == len(ours) == predicted_bytes(fields, tensors)
    assert written.sha256 == hashlib.sha256(ours).hexdigest()
    assert ours.startswith(header_bytes(fields, tensors))
    assert [step for step, _, _ in told] == ["write"] * len(told)
    assert told[-1][1:] == (len(ours), len(ours)) and [d for _, d, _ in told] == sorted(d for _, d, _ in told)


def test_gguf_py_reads_what_we_write(tmp_path: Path) -> None:
    fields, tensors = as_ours()
    write_gguf(tmp_path / "ours.gguf", fields, tensors)
    reader = gguf.GGUFReader(tmp_path / "ours.gguf")
    assert reader.fields["t.strings"].contents() == KEYS["t.strings"][1]
    for tensor, theirs in zip(tensors, reader.tensors, strict=True):
        assert theirs.name == tensor.name
        assert theirs.data.tobytes() == b"".join(chunk.tobytes() for chunk in tensor.chunks())


def test_alignment_of_the_metadata(tmp_path: Path) -> None:
    fields = [Field.u32("general.alignment", 64)]
    tensors = [TensorData(name, (3,), F32, chunks_of(np.full(12, 7, dtype=np.uint8))) for name in ("one", "two")]
    write_gguf(tmp_path / "a.gguf", fields, tensors, alignment=64)
    assert [t.data_offset % 64 for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors] == [0, 0]
    assert (tmp_path / "a.gguf").stat().st_size == predicted_bytes(fields, tensors, 64)


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=15)
grids = st.sampled_from([g for g in GRIDS.values() if g.name != "F64"])


@st.composite
def layouts(draw: st.DrawFn) -> list[TensorLayout]:
    out = []
    for name in draw(st.lists(names, unique=True, max_size=4)):
        grid: Grid = draw(grids)
        rows = draw(st.lists(st.integers(1, 5), max_size=3))
        out.append(TensorLayout(name, (*rows, draw(st.integers(1, 3)) * grid.block_size), grid))
    return out


@given(
    layouts(),
    st.lists(st.tuples(names, st.one_of(st.booleans(), st.text("aé你"), st.lists(st.text("aé"), min_size=1))), unique_by=lambda f: f[0]),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_write_then_read_is_the_identity(tmp_path: Path, tensors: list[TensorLayout], values: list[tuple[str, object]]) -> None:
    fields = [Field.of(key, value) for key, value in values]
    data = {t.name: np.random.default_rng(i).integers(0, 256, t.nbytes, dtype=np.uint8) for i, t in enumerate(tensors)}

    def chunks(raw: np.ndarray) -> Iterator[np.ndarray]:
        yield from np.array_split(raw, 3)

    path = tmp_path / "f.gguf"
    write_gguf(path, fields, [TensorData(t.name, t.shape, t.grid, lambda raw=data[t.name]: chunks(raw)) for t in tensors])
    header, raw = read_header(path), path.read_bytes()
    assert list(header.fields.values()) == fields
    assert [TensorLayout(t.name, t.shape, t.grid) for t in header.tensors.values()] == tensors
    for info in header.tensors.values():
        assert raw[info.offset : info.offset + info.nbytes] == data[info.name].tobytes()
    assert header_bytes(header.fields.values(), header.tensors.values()) == raw[: header.data_offset] or not tensors


def data(name: str, shape: tuple[int, ...], grid: Grid = F32, n: int | None = None) -> TensorData:
    layout = TensorLayout(name, shape, grid)
    return TensorData(name, shape, grid, chunks_of(np.zeros(layout.nbytes if n is None else n, dtype=np.uint8)))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (data("t", (4,), GRIDS["F64"]), "t: llama.cpp dies on F64 tensors while decoding. Write F32 or F16."),
        (data("n" * 64, (4,)), "tensor names have 1 to 63 bytes in GGUF, this one 64"),
        (data("", (4,)), "tensor names have 1 to 63 bytes in GGUF, this one 0"),
    ],
)
def test_refused_before_the_first_byte(tmp_path: Path, tensor: TensorData, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        write_gguf(tmp_path / "f.gguf", [], [tensor])
    assert not (tmp_path / "f.gguf").exists()


@pytest.mark.parametrize(
    ("fields", "tensors", "alignment", "message"),
    [
        ([Field.u32("k", 1), Field.u32("k", 2)], [], 32, "metadata keys must be distinct"),
        ([], [data("t", (4,)), data("t", (4,))], 32, "tensor names must be distinct"),
        ([Field.u32("general.alignment", 64)], [], 32, "alignment 32 differs from general.alignment 64"),
        ([], [data("t", (1, 1, 1, 1, 4))], 32, "t: shape"),
    ],
)
def test_our_own_mistakes(fields: list[Field], tensors: list[TensorData], alignment: int, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        header_bytes(fields, tensors, alignment)


@pytest.mark.parametrize(("n", "message"), [(15, "t: its data is 1 bytes too short for 16"), (20, "4 bytes too long for 16")])
def test_data_of_another_size(tmp_path: Path, n: int, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        write_gguf(tmp_path / "f.gguf", [], [data("t", (4,), n=n)])


class Disk:
    """A file on a disk with little room."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, view: memoryview) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        n = min(self.room, len(view))
        self.room -= n
        return n

    def close(self) -> None:
        pass


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_write.Path, "open", lambda *args, **kwargs: Disk(100))
    message = r"f\.gguf: writing stopped after 100 of 4160 bytes: No space left on device\. Make room for 4060 more bytes"
    with pytest.raises(OutputError, match=message):
        write_gguf(tmp_path / "f.gguf", [], [data("t", (1024,))])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_device() -> None:
    with pytest.raises(OutputError, match="/dev/full: writing stopped after 0 of 4160 bytes: No space left on device"):
        write_gguf(Path("/dev/full"), [], [data("t", (1024,))])


def test_a_place_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"absent/f\.gguf: writing stopped after 0 of 32 bytes: No such file or directory"):
        write_gguf(tmp_path / "absent" / "f.gguf", [], [])


def test_errors_of_the_source_pass_through(tmp_path: Path) -> None:
    def chunks() -> Iterator[np.ndarray]:
        raise OSError(errno.EIO, "source disk")
        yield

    with pytest.raises(OSError, match="source disk"):
        write_gguf(tmp_path / "f.gguf", [], [TensorData("t", (4,), F32, chunks)])
