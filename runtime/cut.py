"""Cutting an elastic GGUF file into a smaller stock one, byte by byte: no value is decoded, no token list parsed.

A cut copies a prefix of every tensor (see `edgeq.runtime.cut_plan`) and the metadata as they stand. It reads the source from start to end
in pieces of half a MiB, so memory does not grow with the model, and a source on a slow disk is read once. With the source's hash given,
all of it is hashed by a second thread beside the writing: what was cut from a damaged file never gets its final name. That costs reading
the source's dropped parts as well, which is why it is the caller's choice: a package has the hash in its manifest.

    result = cut_gguf(Path("model.gguf"), Path("small.gguf"), kept, sha256=record.sha256)
    with cut_to_memory(Path("model.gguf"), kept) as small: LlamaModel.load(small.path)
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path

import numpy as np

from edgeq.elastic import Kept
from edgeq.errors import OutputError, PackageError, SourceError
from edgeq.gguf_file import Header, read_header
from edgeq.gguf_write import TensorData, write_gguf
from edgeq.output import check_disk, staged_file
from edgeq.package import sha256 as file_sha256
from edgeq.progress import Progress, silent
from edgeq.runtime.closing import Closing
from edgeq.runtime.cut_plan import NO_EXTRAS, CutPlan, CutTensor, Extras, plan_cut
from edgeq.tensors import Bytes

CHUNK_BYTES = 512 << 10  # stays in the cache between reading, hashing and writing


@dataclass(frozen=True, kw_only=True)
class CutResult:
    """bytes: of what was written. removed_fraction: of the parameters of all blocks."""

    bytes: int
    removed_fraction: float


def cut_gguf(
    source: Path | Header,
    target: Path,
    kept: Kept,
    *,
    extras: Extras = NO_EXTRAS,
    sha256: SourceCheck | str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> CutResult:
    """Write a cut of `source` to `target`, which is whole or absent, whatever happens.

    source: a file, or its header if that is read already. sha256: what it must hash to, or a check of that under way; None does
    not look. force: replace an existing target. progress: step "write", in bytes.
    Raises PlanError, UnsupportedError and SourceError as `plan_cut`; PackageError for another hash; OutputError when the target exists,
    is the source, or the disk refuses; SourceError when the source cannot be read to its end.
    """
    plan = plan_cut(_header(source), kept, extras)
    with staged_file(target, force=force, inputs=(plan.source,)) as stage:
        check_disk(target, plan.nbytes)
        with verified(plan.source, sha256):
            written = write_plan(plan, stage, progress)
    return CutResult(bytes=written, removed_fraction=plan.removed_fraction)


class MemoryCut(Closing):
    """A cut that is a file by name and takes memory (or, where the system has no such files, a temporary file) until it is closed.

    path: what to load; it stands for this process and its children. A model that was loaded from it stays whole after `close`.
    """

    def __init__(self, path: Path, result: CutResult, release: Callable[[], None]) -> None:
        self.path, self.result = path, result
        self._close = weakref.finalize(self, release)

    def close(self) -> None:
        self._close()


def cut_to_memory(
    source: Path | Header, kept: Kept, *, extras: Extras = NO_EXTRAS, sha256: SourceCheck | str | None = None, progress: Progress = silent
) -> MemoryCut:
    """A cut of `source` in memory. Raises as `cut_gguf`; OutputError when there is not enough memory."""
    return hold_plan(plan_cut(_header(source), kept, extras), sha256=sha256, progress=progress)


def hold_plan(plan: CutPlan, *, sha256: SourceCheck | str | None = None, progress: Progress = silent) -> MemoryCut:
    """What a plan describes, in memory. Raises as `cut_to_memory`."""
    with ExitStack() as undo:
        path, release = _memory_file(plan.nbytes) if hasattr(os, "memfd_create") else _temporary_file()
        undo.callback(release)
        with verified(plan.source, sha256):
            written = write_plan(plan, path, progress)
        undo.pop_all()
    return MemoryCut(path, CutResult(bytes=written, removed_fraction=plan.removed_fraction), release)


def _memory_file(nbytes: int) -> tuple[Path, Callable[[], None]]:
    import psutil  # not for cuts to a file

    free = psutil.virtual_memory().available
    if nbytes > free:
        raise OutputError(f"a cut in memory needs {nbytes:,} bytes, {free:,} are free. Choose a higher rate, or cut to a file.")
    handle = os.memfd_create("edgeq-cut")
    return Path(f"/proc/{os.getpid()}/fd/{handle}"), partial(os.close, handle)


def _temporary_file() -> tuple[Path, Callable[[], None]]:
    import tempfile

    handle, name = tempfile.mkstemp(prefix="edgeq-cut-", suffix=".gguf")
    os.close(handle)
    path = Path(name)

    def release() -> None:
        with suppress(OSError):  # Windows keeps a file that a model is still mapped from
            path.unlink()

    return path, release


def _header(source: Path | Header) -> Header:
    return source if isinstance(source, Header) else read_header(source)


def write_plan(plan: CutPlan, path: Path, progress: Progress = silent) -> int:
    """Write what a plan describes to `path`, and return its size; a failed write leaves what it wrote. Raises as `cut_gguf`."""
    with open_source(plan.source) as file:
        data = []
        for tensor in plan.tensors:
            chunks = tensor.chunks or partial(_prefix, file, plan.source, tensor)
            data.append(TensorData(tensor.layout.name, tensor.layout.shape, tensor.layout.grid, chunks))
        return write_gguf(path, plan.fields, data, alignment=plan.alignment, hashed=False, progress=progress).nbytes


@contextmanager
def open_source(path: Path) -> Iterator[FileIO]:
    try:
        file = path.open("rb", buffering=0)
    except OSError as err:
        raise SourceError(f"{path}: cannot be read: {err.strerror or err}") from err
    with file:
        yield file


def _prefix(file: FileIO, path: Path, tensor: CutTensor) -> Iterable[Bytes]:
    """What stays of a tensor: its first rows or heads, of each the first bytes. Read in whole rows or heads, many at a time.

    What is yielded is overwritten by the next piece.
    """
    assert tensor.source is not None
    n_units, (runs, run_bytes), (kept_runs, kept_bytes) = tensor.runs()
    unit_bytes, offset = runs * run_bytes, tensor.source.offset
    if (runs, run_bytes) == (kept_runs, kept_bytes):
        yield from read_pieces(file, path, offset, n_units * unit_bytes, CHUNK_BYTES)
        return
    step = max(1, CHUNK_BYTES // unit_bytes)
    packed = np.empty((min(step, n_units), kept_runs, kept_bytes), dtype=np.uint8)
    for piece in read_pieces(file, path, offset, n_units * unit_bytes, step * unit_bytes):
        units = piece.reshape(-1, runs, run_bytes)
        np.copyto(packed[: len(units)], units[:, :kept_runs, :kept_bytes])
        yield packed[: len(units)]


def read_pieces(file: FileIO, path: Path, offset: int, n_bytes: int, step: int) -> Iterator[Bytes]:
    """n_bytes from offset on, in pieces of `step` bytes that share one buffer. Raises SourceError."""
    buffer = np.empty(min(step, n_bytes), dtype=np.uint8)
    try:
        file.seek(offset)
        for start in range(0, n_bytes, step):
            piece = buffer[: min(step, n_bytes - start)]
            filled = 0
            while filled < piece.nbytes:
                n = file.readinto(piece[filled:].data)
                if not n:
                    raise SourceError(f"{path}: ended at byte {offset + start + filled} while it was read. Copy the file again.")
                filled += n
            yield piece
    except OSError as err:
        raise SourceError(f"{path}: cannot be read: {err.strerror or err}. Copy the file again.") from err


class _Stopped(Exception):
    """The hashing thread's answer to being told to stop."""


class SourceCheck(Closing):
    """The hash of a file, computed by a thread from now on, and compared with what it should be when someone waits for it.

    with SourceCheck(path, expected) as check:
        ...
        check.wait()
    """

    def __init__(self, path: Path, expected: str) -> None:
        self.path, self.expected = path, expected
        self._stopped = False
        self._pool = ThreadPoolExecutor(1)
        self._digest = self._pool.submit(file_sha256, path, on_bytes=self._go_on)

    def _go_on(self, _: int) -> None:
        if self._stopped:
            raise _Stopped

    def wait(self) -> None:
        """Raises PackageError for another hash, SourceError when the file cannot be read."""
        try:
            found = self._digest.result()
        except OSError as err:
            raise SourceError(f"{self.path}: cannot be read: {err.strerror or err}. Copy the file again.") from err
        if found != self.expected:
            raise PackageError(
                f"{self.path} does not match its hash ({found[:12]}, the package says {self.expected[:12]}): it is damaged. "
                "Copy the package again."
            )

    def close(self) -> None:
        """Stop the thread, if it is still at work."""
        self._stopped = True
        self._pool.shutdown()


@contextmanager
def verified(path: Path, check: SourceCheck | str | None) -> Iterator[None]:
    """Hash a file while the block runs, unless that is under way; when it ends without an error, wait for the hash and compare."""
    if check is None:
        yield
        return
    with ExitStack() as stack:
        running = check if isinstance(check, SourceCheck) else stack.enter_context(SourceCheck(path, check))
        yield
        running.wait()
