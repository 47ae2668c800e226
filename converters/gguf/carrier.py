"""Writing a lowered model as one GGUF file: what will be written, tensor by tensor, and the writing itself.

A tensor whose grid stays is copied byte for byte; any other is decoded and encoded in chunks, so memory holds one chunk per thread and
never a tensor. The file's bytes depend on the model, the grids and the importance alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from edgeq.converters.gguf.encode import RegridError, copy_tensor, encode_tensor
from edgeq.converters.gguf.lowering import CarrierTensor, Lowered
from edgeq.converters.gguf.metadata import with_quantization
from edgeq.converters.gguf.mixes import file_type
from edgeq.device_memory import TensorPlan
from edgeq.errors import PlanError
from edgeq.gguf_fields import Field
from edgeq.gguf_file import TensorLayout
from edgeq.gguf_write import TensorData, predicted_bytes, write_gguf
from edgeq.grids import Grid
from edgeq.progress import Progress, silent
from edgeq.tensors import Bytes, Floats


@dataclass(frozen=True, kw_only=True)
class FilePlan:
    """nbytes: exact size of the file that `write_model` will write with these grids."""

    tensors: tuple[TensorPlan, ...]
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Written:
    """tensors: what was written, in file order. errors: what encoding lost, by tensor name; empty unless measured."""

    nbytes: int
    sha256: str
    tensors: tuple[TensorPlan, ...]
    errors: Mapping[str, RegridError]


def plan_tensors(lowered: Lowered, grids: Mapping[str, Grid]) -> FilePlan:
    """What `write_model` will do. Raises PlanError when a tensor has no grid or its rows do not divide into blocks."""
    plans = tuple(_plan(t, grids) for t in lowered.tensors)
    layouts = [TensorLayout(p.name, p.shape, p.grid) for p in plans]
    return FilePlan(tensors=plans, nbytes=predicted_bytes(_fields(lowered, grids), layouts, lowered.alignment))


def write_model(
    path: Path,
    lowered: Lowered,
    grids: Mapping[str, Grid],
    importance: Mapping[str, Floats] | None = None,
    *,
    threads: int | None = None,
    measure: bool = False,
    progress: Progress = silent,
) -> Written:
    """Write the file to `path`; a failed write leaves what it wrote, so callers write to a temporary name and rename.

    importance: by canonical linear ("layers.3.wq"), float32 (n_in,); with it, every block matrix that is encoded needs an entry.
    measure: also report what encoding lost. progress: step "write", in bytes. Raises PlanError as `plan_tensors` and for values beyond
    a grid's range, SourceError for values that are not finite, OutputError when the disk refuses, MissingDependency when block types
    are to be encoded without the llama library.
    """
    plans = plan_tensors(lowered, grids).tensors
    errors: dict[str, RegridError] = {}
    data = []
    for t, plan in zip(lowered.tensors, plans, strict=True):
        weights = _weights(t, plan, importance)
        chunks = partial(_packed, t, plan, weights, threads, errors if measure else None)
        data.append(TensorData(plan.name, plan.shape, plan.grid, chunks))
    written = write_gguf(path, _fields(lowered, grids), data, alignment=lowered.alignment, progress=progress)
    return Written(nbytes=written.nbytes, sha256=written.sha256, tensors=plans, errors=errors)


def _plan(t: CarrierTensor, grids: Mapping[str, Grid]) -> TensorPlan:
    if t.name not in grids:
        raise PlanError(f"{t.name}: no grid was chosen for it")
    grid, tensor = grids[t.name], t.tensor
    if not grid.fits(tensor.n_cols):
        raise PlanError(
            f"{t.name}: rows of {tensor.n_cols} values do not divide into {grid.name} blocks of {grid.block_size}. "
            f"Keep a multiple of {grid.block_size}, or use F16 for this tensor."
        )
    return TensorPlan(
        name=t.name,
        role=t.role,
        layer=t.layer,
        shape=tensor.shape,
        source_grid=tensor.grid,
        grid=grid,
        nbytes=tensor.n_rows * grid.row_bytes(tensor.n_cols),
        action="copy" if grid == tensor.grid else "encode",
    )


def _fields(lowered: Lowered, grids: Mapping[str, Grid]) -> tuple[Field, ...]:
    """Metadata of the file. An unchanged file keeps what its source says about its quantization, if it says so."""
    unchanged = all(grids[t.name] == t.tensor.grid for t in lowered.tensors)
    if unchanged and lowered.carried:
        return lowered.fields
    return tuple(with_quantization(lowered.fields, file_type(lowered, grids)))


def _weights(t: CarrierTensor, plan: TensorPlan, importance: Mapping[str, Floats] | None) -> Floats | None:
    if importance is None or t.importance_key is None or plan.action == "copy" or plan.grid.is_float:
        return None
    weights = importance.get(t.importance_key)
    if weights is None and t.layer is not None:
        raise PlanError(f"{t.name}: importance has no entry {t.importance_key!r}. Calibrate this model, or write it without importance.")
    return None if weights is None else np.asarray(weights, dtype=np.float32)


def _packed(
    t: CarrierTensor, plan: TensorPlan, weights: Floats | None, threads: int | None, errors: dict[str, RegridError] | None
) -> Iterator[Bytes]:
    if plan.action == "copy":
        yield from copy_tensor(t.tensor)
        return
    for chunk in encode_tensor(t.tensor, plan.grid, weights, threads=threads, measure=errors is not None):
        if errors is not None and chunk.error is not None:
            errors[t.name] = errors[t.name] + chunk.error if t.name in errors else chunk.error
        yield chunk.packed
