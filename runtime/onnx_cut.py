"""Cutting an elastic ONNX folder into a smaller stock one: model.onnx anew, weights copied in pieces, nothing decoded.

The graph follows from `edgeq.runtime.onnx_cut_plan`; the data file is read once from start to end, half a MiB at a time, so memory does not
grow with the model. genai_config.json is kept true: sizes of the first layer are those that are left there. All other files of the folder
(tokenizer, chat template) are copied. With hashes given, every file is checked against its own, and what was cut from a damaged folder
never gets its final name.

    result = cut_onnx(Path("package/model"), Path("small"), kept)
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.elastic import Kept
from edgeq.errors import OutputError, PackageError, PlanError, SourceError
from edgeq.gguf_write import OutputFile
from edgeq.output import check_disk, staged_folder
from edgeq.package import MODEL_ONNX, sha256
from edgeq.progress import Progress, silent
from edgeq.runtime.cut import CHUNK_BYTES, CutResult, MemoryCut, SourceCheck, open_source, read_pieces, verified
from edgeq.runtime.onnx_cut_plan import CutTensor, OnnxCutPlan, plan_onnx_cut
from edgeq.runtime.onnx_facts import CONFIG
from edgeq.runtime.onnx_file import OnnxFile, read_onnx
from edgeq.tensors import Bytes

Chunks = Callable[[], Iterable[Bytes]]


@dataclass(frozen=True, kw_only=True)
class OnnxExtras:
    """Initializers whose bytes come from elsewhere than their prefix, by name: as many bytes, in order. Each is called once, in turn."""

    replace: Mapping[str, Chunks] = field(default_factory=dict)


NO_EXTRAS = OnnxExtras()


@dataclass(frozen=True, kw_only=True)
class Hashes:
    """What files of a folder must hash to, by name; data: of the weights, or a check of that under way."""

    files: Mapping[str, str] = field(default_factory=dict)
    data: SourceCheck | str | None = None


NO_HASHES = Hashes()


def cut_onnx(
    source: Path | OnnxFile,
    target: Path,
    kept: Kept,
    *,
    extras: OnnxExtras = NO_EXTRAS,
    hashes: Hashes = NO_HASHES,
    force: bool = False,
    progress: Progress = silent,
) -> CutResult:
    """Write a cut of a folder (or its model.onnx, read already) to the folder `target`, which is whole or absent, whatever happens.

    removed_fraction of the result: of the weights of linear layers in blocks. force: replace an existing folder. progress: step
    "write", in bytes. Raises as `plan_onnx_cut`; PackageError for another hash; OutputError when the target exists, holds the source, or
    the disk refuses; SourceError for a source that cannot be read.
    """
    file = source if isinstance(source, OnnxFile) else read_onnx(source / MODEL_ONNX)
    plan = plan_onnx_cut(file, kept)
    beside = _beside(file)
    with staged_folder(target, force=force, inputs=(*file.files, *beside)) as stage:
        check_disk(target, plan.nbytes + sum(path.stat().st_size for path in beside))
        write_folder(plan, stage, beside, extras=extras, hashes=hashes, progress=progress)
    return CutResult(bytes=plan.nbytes, removed_fraction=plan.removed_fraction)


def cut_onnx_to_memory(
    source: OnnxFile, kept: Kept, *, extras: OnnxExtras = NO_EXTRAS, hashes: Hashes = NO_HASHES, progress: Progress = silent
) -> MemoryCut:
    """A cut in a folder of its own, in memory where the system has files there (/dev/shm), else among temporary files.

    path of the result: its model.onnx. Raises as `cut_onnx`.
    """
    plan, beside = plan_onnx_cut(source, kept), _beside(source)
    needed = plan.nbytes + sum(path.stat().st_size for path in beside)
    with ExitStack() as undo:
        folder = Path(tempfile.mkdtemp(prefix="edgeq-cut-", dir=roomy(needed)))
        release = partial(shutil.rmtree, folder, ignore_errors=True)
        undo.callback(release)
        try:
            write_folder(plan, folder, beside, extras=extras, hashes=hashes, progress=progress)
        except OSError as err:
            raise OutputError(f"{folder}: a cut cannot be written there ({err.strerror}). Cut to a folder of your choice.") from err
        undo.pop_all()
    return MemoryCut(folder / MODEL_ONNX, CutResult(bytes=plan.nbytes, removed_fraction=plan.removed_fraction), release)


def roomy(needed: int) -> Path:
    """Where temporary files of this size go. Raises OutputError when there is no room."""
    places = [place for place in (Path("/dev/shm"), Path(tempfile.gettempdir())) if place.is_dir()]
    free = [shutil.disk_usage(place).free for place in places]
    for place, n in zip(places, free, strict=True):
        if needed < n:
            return place
    raise OutputError(f"a temporary cut needs {needed:,} bytes, {max(free):,} are free. Choose a higher rate, or cut to a folder.")


def write_folder(
    plan: OnnxCutPlan,
    folder: Path,
    beside: Iterable[Path],
    *,
    extras: OnnxExtras = NO_EXTRAS,
    hashes: Hashes = NO_HASHES,
    progress: Progress = silent,
) -> None:
    """Write what a plan describes into an empty folder; a failed write leaves what it wrote. beside: other files that are copied."""
    unused = sorted(extras.replace.keys() - {tensor.name for tensor in plan.tensors})
    if unused:
        raise PlanError(f"{unused[0]}: there is no such weight in {plan.source.path} to replace.")
    _check(plan.source.path, hashes)
    if plan.data is not None:
        with open_source(plan.data) as file, verified(plan.data, hashes.data):
            _write(folder / plan.location, _data(file, plan, extras), plan.nbytes, progress)
    (folder / plan.source.path.name).write_bytes(plan.graph)
    for path in beside:
        _check(path, hashes)
        if path.name == CONFIG:
            (folder / CONFIG).write_bytes(_config(path, plan))
        else:
            shutil.copyfile(path, folder / path.name)
    progress("write", plan.nbytes, plan.nbytes)


def _beside(file: OnnxFile) -> tuple[Path, ...]:
    """The other files of a model's folder."""
    own = {path.resolve() for path in file.files}
    return tuple(path for path in sorted(file.path.parent.iterdir()) if path.is_file() and path.resolve() not in own)


def _check(path: Path, hashes: Hashes) -> None:
    if path.name in hashes.files and (found := sha256(path)) != (expected := hashes.files[path.name]):
        raise PackageError(
            f"{path} does not match its hash ({found[:12]}, the package says {expected[:12]}): it is damaged. Copy the package again."
        )


def _write(path: Path, data: Iterable[Bytes | bytes], total: int, progress: Progress) -> None:
    out = OutputFile(path, total, None)
    try:
        for piece in data:
            out.write(piece if isinstance(piece, bytes) else np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
            progress("write", out.written, total)
    finally:
        out.close()


def _data(file: FileIO, plan: OnnxCutPlan, extras: OnnxExtras) -> Iterator[Bytes | bytes]:
    """The data file in pieces; each is overwritten by the next."""
    at = 0
    assert plan.data is not None
    for tensor in plan.tensors:
        yield bytes(tensor.start - at)
        given, left = extras.replace.get(tensor.name), tensor.nbytes
        for piece in _prefix(file, plan.data, tensor) if given is None else given():
            left -= piece.nbytes
            yield piece
        assert not left, f"{tensor.name}: {left} bytes are missing"
        at = tensor.start + tensor.nbytes


def _prefix(file: FileIO, path: Path, tensor: CutTensor) -> Iterator[Bytes]:
    """What stays of a weight, read in whole rows, many at a time."""
    left = tensor.left
    whole = left.kept_bytes == left.row_bytes
    step = max(1, CHUNK_BYTES // left.row_bytes)
    packed = np.empty((step, left.kept_bytes), dtype=np.uint8)
    for first, last in left.rows:
        offset, n_bytes = tensor.offset + first * left.row_bytes, (last - first) * left.row_bytes
        if whole:
            yield from read_pieces(file, path, offset, n_bytes, CHUNK_BYTES)
            continue
        for piece in read_pieces(file, path, offset, n_bytes, step * left.row_bytes):
            rows = piece.reshape(-1, left.row_bytes)
            some, at = packed[: len(rows)], 0
            for start, stop in left.columns:
                np.copyto(some[:, at : at + stop - start], rows[:, start:stop])
                at += stop - start
            if left.last_mask != 0xFF:
                some[:, -1] &= np.uint8(left.last_mask)
            yield some


def _config(path: Path, plan: OnnxCutPlan) -> bytes:
    """genai_config.json with the sizes that are left. Raises SourceError when it is none."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        decoder = document["model"]["decoder"]
        n_kv = plan.kept.n_kv[0]
        decoder["num_attention_heads"], decoder["num_key_value_heads"] = n_kv * plan.sizes.gqa[0], n_kv
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise SourceError(f"{path}: cannot be read ({err}). Copy or export the folder again.") from err
    return (json.dumps(document, indent=4) + "\n").encode()
