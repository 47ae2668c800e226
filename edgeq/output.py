"""Output that is whole or absent: everything is built in a hidden sibling and renamed when it is complete.

A run that is killed leaves at most a sibling named `.NAME.partial-PID`; the next run to the same place removes it once its process
is gone. Replacing an existing output keeps the old one as `.NAME.old-PID` until the new one stands.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgeq.errors import OutputError


@contextmanager
def staged_folder(target: Path, *, force: bool = False, inputs: tuple[Path, ...] = ()) -> Iterator[Path]:
    """A private folder that becomes `target` when the block ends without an error, and vanishes otherwise.

    Raises OutputError when the target exists (unless it is an empty folder or `force`), when an input file lies in it, or when the
    disk refuses.
    """
    check_target(target, force=force, inputs=inputs)
    target = target.resolve()
    with _os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        stage = target.parent / f".{target.name}.partial-{os.getpid()}"
        if stage.exists():
            shutil.rmtree(stage)
        stage.mkdir()
    try:
        with _os_errors(target):
            yield stage
            for path in sorted(stage.rglob("*")):
                if path.is_file():
                    _sync(path)
            _sync(stage)
            _replace(stage, target)
            _sync(target.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def staged_file(target: Path, *, force: bool = False, inputs: tuple[Path, ...] = ()) -> Iterator[Path]:
    """A private path whose file becomes `target` when the block ends without an error. Raises as `staged_folder`."""
    check_file_target(target, force=force, inputs=inputs)
    target = target.resolve()
    with _os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
    stage = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        with _os_errors(target):
            yield stage
            _sync(stage)
            stage.replace(target)
            _sync(target.parent)
    finally:
        with suppress(FileNotFoundError):
            stage.unlink()


def check_target(target: Path, *, force: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Refuse an output folder before any work is done for it. Raises OutputError."""
    for path in inputs:
        if _same(target, path) or _inside(path, target):
            raise OutputError(f"{target}: the output would replace the input {path}. Choose another output folder.")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise OutputError(f"{target} exists and is not a folder. Choose another output folder.")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise OutputError(f"{target} exists and is kept. Choose another folder or pass --force to replace it.")


def check_file_target(target: Path, *, force: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Refuse an output file before any work is done for it. Raises OutputError."""
    if any(_same(target, path) for path in inputs):
        raise OutputError(f"{target}: the output is the same file as an input. Choose another output path.")
    if target.is_dir():
        raise OutputError(f"{target} is a folder; give a file name.")
    if target.exists() and not force:
        raise OutputError(f"{target} exists and is kept. Choose another path or pass --force to replace it.")


def check_disk(target: Path, needed: int) -> None:
    """Refuse before the first byte when the file system of `target` has less than `needed` bytes free. Raises OutputError."""
    folder = target.resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{target}: needs {needed:,} bytes, but only {free:,} are free on that disk. Free some space or choose another output."
        )


def _replace(stage: Path, target: Path) -> None:
    if target.is_dir() and any(target.iterdir()):
        old = target.parent / f".{target.name}.old-{os.getpid()}"
        target.rename(old)
        stage.rename(target)
        shutil.rmtree(old)
    else:
        stage.rename(target)  # replaces an empty folder in one step


def _sweep(target: Path) -> None:
    """Remove leftovers of dead processes; bring back an output whose replacement was cut short."""
    for kind in ("partial", "old"):
        for path in target.parent.glob(f".{glob.escape(target.name)}.{kind}-*"):
            import psutil

            pid = path.name.rsplit("-", 1)[-1]
            if not pid.isdigit() or (int(pid) != os.getpid() and psutil.pid_exists(int(pid))):
                continue
            if kind == "old" and not target.exists():
                path.rename(target)
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def _os_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(
                f"{target}: the disk is full ({err.strerror}). Nothing was left under that name; free some space and run again."
            ) from err
        if err.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(f"{target}: cannot write there ({err.strerror}). Choose another output.") from err
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def _inside(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents
