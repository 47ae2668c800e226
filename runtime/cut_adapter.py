"""Cutting a kept adapter with its base: from the same plan, and byte by byte where blocks allow.

An adapter's file was written for the elastic file at full size: rows of lora_b lie as the base's rows, columns of lora_a as its columns. So
what a cut keeps of a base tensor, it keeps of the pair beside it: the same first rows of b, the same first columns of a, the same part of
every head; and nothing where the base's tensor goes. Columns that do not divide into blocks any more are decoded and written as F16.

Compensation. A cut MLP's down projection takes on what its lost channels did, estimated from those it keeps (`edgeq.compensation`):

    h_lost ~ mean_lost + R (h_kept - mean_kept)

The adapter's a reads the same channels, and b @ a_lost @ h_lost would be missing. The estimate's constant cannot be had: a LoRA has no
bias, and the base must not carry one that belongs to an adapter. So a takes the best estimate without a constant, the regression on second
moments instead of covariances, whatever the base's own grid let it do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeq import ggml
from edgeq.compensation import HiddenModel, regression
from edgeq.elastic import Kept
from edgeq.errors import AdapterError, PlanError
from edgeq.gguf_file import Header, TensorInfo, TensorLayout, read_header
from edgeq.grids import F16, Grid
from edgeq.output import check_disk, staged_file
from edgeq.progress import Progress, silent
from edgeq.runtime.adapter_file import EMBED, AdapterFile, read_adapter
from edgeq.runtime.cut import CutResult, MemoryCut, hold_plan, write_plan
from edgeq.runtime.cut_plan import CutPlan, CutTensor, HeadPrefix, plan_cut
from edgeq.tensors import Bytes, Floats, from_file

Hidden = Mapping[int, HiddenModel]
Index = npt.NDArray[np.intp]


def cut_adapter(
    source: Path,
    target: Path,
    base: Path,
    kept: Kept,
    *,
    hidden: Hidden | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> CutResult:
    """Write the adapter `source` of the elastic file `base`, cut as that is, to `target`, which is whole or absent.

    hidden: by layer, for a cut that is compensated. removed_fraction: of the adapter's parameters. Raises as `plan_adapter_cut`;
    OutputError when the target exists, is an input, or the disk refuses.
    """
    plan = plan_adapter_cut(source, read_header(base), kept, hidden=hidden)
    with staged_file(target, force=force, inputs=(source, base)) as stage:
        check_disk(target, plan.nbytes)
        written = write_plan(plan, stage, progress)
    return CutResult(bytes=written, removed_fraction=plan.removed_fraction)


def cut_adapter_to_memory(source: Path, base: Path, kept: Kept, *, hidden: Hidden | None = None, progress: Progress = silent) -> MemoryCut:
    """The same as a file in memory, see `edgeq.runtime.cut.MemoryCut`."""
    return hold_plan(plan_adapter_cut(source, read_header(base), kept, hidden=hidden), progress=progress)


def plan_adapter_cut(source: Path, base: Header, kept: Kept, *, hidden: Hidden | None = None) -> CutPlan:
    """Work out the cut. base: header of the file before it is cut.

    Raises AdapterError when the adapter is none, is damaged (`read_adapter`) or belongs to another file, PlanError when nothing of it is
    left; as `plan_cut` besides.
    """
    adapter, header = read_adapter(source), read_header(source)
    _check_base(adapter, base)
    left = {tensor.layout.name: tensor for tensor in plan_cut(base, kept).tensors}
    tensors = []
    for info in header.tensors.values():
        target, half = info.name.rsplit(".lora_", 1)
        if target in left:
            tensors.append(_cut_half(source, info, half, adapter.shapes[target], left[target], _model(target, hidden or {})))
    if not tensors:
        raise PlanError(f"{source}: this cut removes everything that the adapter changes. Choose a lower rate, or leave the adapter out.")
    size = sum(prod(info.shape) for info in header.tensors.values())
    return CutPlan(
        source=source,
        fields=tuple(header.fields.values()),
        tensors=tuple(tensors),
        alignment=header.alignment,
        removed_fraction=1 - sum(prod(tensor.layout.shape) for tensor in tensors) / size,
    )


def compensated_a(a: Floats, hidden: HiddenModel, kept: int) -> Floats:
    """lora_a of a down projection, (rank, n_ff), cut to its first `kept` columns, which take on the most they can of the others."""
    return regression(hidden, kept, intercept=False).columns(a)


def _check_base(adapter: AdapterFile, base: Header) -> None:
    arch = base.value("general.architecture")
    if adapter.arch != arch:
        raise AdapterError(
            f"{adapter.path}: is for architecture {adapter.arch!r}, {base.path.name} is {arch!r}. Export the adapter with this package."
        )
    for target, shape in adapter.shapes.items():
        tensor = base.tensors.get(target)
        expected = None if tensor is None else tensor.shape[::-1] if target == EMBED else tensor.shape
        if expected != shape:
            has = "has no such tensor" if expected is None else f"has it as {list(expected)}"
            raise AdapterError(
                f"{adapter.path}: changes {target} of {list(shape)}, {base.path.name} {has}. Export the adapter with this package."
            )


def _model(target: str, hidden: Hidden) -> HiddenModel | None:
    """What is known of the inputs of a down projection."""
    parts = target.split(".")
    return hidden.get(int(parts[1])) if parts[0] == "blk" and parts[2] == "ffn_down" else None


def _cut_half(path: Path, info: TensorInfo, half: str, full: tuple[int, int], base: CutTensor, hidden: HiddenModel | None) -> CutTensor:
    """What is left of one half of a pair on a matrix of shape `full`, of which `base` is what is left."""
    n_out, n_in = base.layout.shape
    if base.layout.name == EMBED or (n_out == full[0] if half == "b" else n_in == full[1]):
        return CutTensor(layout=TensorLayout(info.name, info.shape, info.grid), source=info)
    if half == "b":
        return CutTensor(layout=TensorLayout(info.name, (n_out, *info.shape[1:]), info.grid), source=info, heads=base.heads)
    shape, runs = (*info.shape[:-1], n_in), (n_in,) if base.heads is None else (base.heads.full, base.heads.kept)
    if hidden is None and all(info.grid.fits(run) for run in runs):
        return CutTensor(layout=TensorLayout(info.name, shape, info.grid), source=info, heads=base.heads)
    grid = info.grid if info.grid.fits(n_in) else F16
    chunks = partial(_rewritten, path, info, _columns(full[1], n_in, base.heads), hidden, grid)
    return CutTensor(layout=TensorLayout(info.name, shape, grid), chunks=chunks)


def _columns(full: int, kept: int, heads: HeadPrefix | None) -> Index:
    """Numbers of the columns that stay."""
    if heads is None:
        return np.arange(kept)
    return np.arange(full).reshape(-1, heads.full)[: kept // heads.kept, : heads.kept].reshape(-1)


def _rewritten(path: Path, info: TensorInfo, columns: Index, hidden: HiddenModel | None, grid: Grid) -> Iterator[Bytes]:
    """The columns that stay in another grid, or with what others come to."""
    shape = (1, *info.shape)[-2:]
    origin = f"{path}: {info.name}"
    values = from_file(path, offset=info.offset, shape=shape, grid=info.grid, origin=origin).decode()
    left = values[:, columns] if hidden is None else compensated_a(values, hidden, len(columns))
    yield ggml.encode(np.ascontiguousarray(left), grid, origin=origin)
