from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import pytest

from edgeq.runtime import page_cache
from edgeq.runtime.page_cache import drop_pages, read_pages, resident_fraction

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(40 * mmap.PAGESIZE + 17))
    return path


@LINUX
def test_pages_leave_and_come_back(file: Path) -> None:
    assert resident_fraction([file]) == 1.0, "just written"
    if not drop_pages([file]):
        pytest.skip("this file system keeps its files in memory")
    assert resident_fraction([file]) == 0.0
    with file.open("rb", buffering=0) as stream:
        stream.seek(40 * mmap.PAGESIZE)
        stream.read(1)
    assert 0 < (resident_fraction([file]) or 0) <= 1
    read_pages([file])
    assert resident_fraction([file]) == 1.0


@LINUX
def test_pages_that_somebody_has_mapped_do_not_count_as_dropped(file: Path) -> None:
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[0] >= 0 and len(mapped[:]) == file.stat().st_size
        assert not drop_pages([file])
        assert (resident_fraction([file]) or 0) > 0


@LINUX
def test_several_files_count_by_their_pages(file: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    assert resident_fraction([file, empty]) == 1.0
    assert resident_fraction([empty]) is None, "no pages, no fraction"
    assert resident_fraction([file, tmp_path / "none"]) is None
    assert not drop_pages([tmp_path / "none"])


@LINUX
def test_a_file_in_memory_cannot_be_dropped(file: Path) -> None:
    memory = os.memfd_create("test")
    try:
        os.write(memory, file.read_bytes())
        path = Path(f"/proc/self/fd/{memory}")
        assert not drop_pages([path])
        assert resident_fraction([path]) == 1.0
    finally:
        os.close(memory)


def test_where_the_system_does_not_say_nothing_is_known(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache.sys, "platform", "darwin")
    assert resident_fraction([file]) is None
    assert not drop_pages([file])
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert not drop_pages([file])
