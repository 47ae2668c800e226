"""What of a model can be cut later in an ONNX folder, and how its elastic graph is made ready for that.

A graph states sizes at every layer, so MLP channels and KV groups are free in each, in every family. A cut copies whole blocks: channels go
in steps that divide into the blocks of every down projection, and KV groups where the columns of one divide into the blocks of the output
projection, which gets smaller blocks if that makes them. Down projections have a bias of zeros, which the cut fills with what lost
channels do on average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from edgeq.converters.gguf.cuttable import Cuttable
from edgeq.converters.onnx.quants import OnnxQuant, choose_grids
from edgeq.converters.sorted_model import LEAST_STEP, Cuts, ready_to_sort
from edgeq.elastic_files import SortMode
from edgeq.errors import UnsupportedError
from edgeq.grids import Grid
from edgeq.group_grids import GroupGrid
from edgeq.model import Model
from edgeq.nbits import BLOCK_SIZES, NBits, answer_for, nbits_grid, run_length
from edgeq.tensors import from_values

_SMALLEST_BLOCK = 32  # for kernels of GPUs


def elastic_model(model: Model, sort: SortMode) -> Model:
    """The model as an elastic graph has it, in the order it has: what a plan is made from."""
    return with_down_bias(ready_to_sort(model), sort)


def with_down_bias(model: Model, sort: SortMode) -> Model:
    """The same function, with a bias for every down projection if cuts are compensated."""
    if sort != "edgeq" or "down" in model.spec.biases:
        return model
    tensors = dict(model.tensors)
    for block in model.spec.mlps:
        down = tensors[f"layers.{block.layer}.down.weight"]
        tensors[f"layers.{block.layer}.down.bias"] = from_values(np.zeros(down.n_rows, dtype=np.float32), origin=down.origin)
    return replace(model, spec=replace(model.spec, biases=model.spec.biases | {"down"}), tensors=tensors)


def elastic_grids(quant: OnnxQuant, came: Model, model: Model, *, half: bool) -> dict[str, Grid]:
    """Grid of every tensor of `model`, an `elastic_model` of `came`.

    What sorting moves within rows is encoded again: in the grid that it came in, where that can be, else as floats are. Raises as
    `choose_grids`, and UnsupportedError for quants with one scale for a whole output.
    """
    if quant.kind == "rows":
        raise UnsupportedError(f"{quant.name} has scales for whole rows, of which a cut takes a part. Choose int8 or int4, or --fixed.")
    before, grids = choose_grids(quant, came, half=half), choose_grids(quant, model, half=half)
    columns = {b.layer: b.n_heads // b.n_kv_heads * b.head_dim for b in model.spec.attention if b.n_kv_heads > 1}
    for name, tensor in model.tensors.items():
        if name in came.tensors and tensor.grid != came.tensors[name].grid and _encodable(before[name]):
            grids[name] = before[name]
        layer, role = (int(name.split(".")[1]), name.split(".")[2]) if name.startswith("layers.") else (-1, "")
        if role == "wo" and layer in columns and name.endswith(".weight"):
            grids[name] = _finer(grids[name], columns[layer], tensor.n_cols)
    return grids


def find_cuts(model: Model, grids: Mapping[str, Grid]) -> Cuts:
    """What can be cut of an `elastic_model` in a graph of these grids."""
    free = Cuttable("per layer")
    blocks = [_block(grids[f"layers.{b.layer}.down.weight"], b.n_ff) for b in model.spec.mlps]
    ports = {"ffn": free, "kv_group": _groups(model, grids)}
    ports["layer"] = Cuttable("no", "a cut keeps every layer of a graph.")
    whole = Cuttable("no", "a cut keeps heads of a graph as long as they are.")
    return Cuts(ports=ports | dict.fromkeys(("head", "vo", "qk"), whole), channel_step=math.lcm(LEAST_STEP, *blocks))


def grid_for(grid: Grid, n_cols: int, left: int) -> Grid:
    """The grid of a matrix of n_cols columns, for the first `left` of them: grids of blocks that end within a row are of one width."""
    form = None if grid.is_float or grid.fits(left) else answer_for(grid, n_cols).form
    return nbits_grid(form.bits, form.block_size, symmetric=not form.zeros, n_cols=left) if isinstance(form, NBits) else grid


def _groups(model: Model, grids: Mapping[str, Grid]) -> Cuttable:
    for block in model.spec.attention:
        name, columns = f"layers.{block.layer}.wo.weight", block.n_heads // block.n_kv_heads * block.head_dim
        size = _block(grids[name], model.tensors[name].n_cols)
        if block.n_kv_heads > 1 and columns % size:
            return Cuttable(
                "no", f"the query heads of one kv head read {columns} columns of {name}, which do not divide into blocks of {size}."
            )
    return Cuttable("per layer")


def _block(grid: Grid, n_cols: int) -> int:
    """Columns of a block in the file; 1 for floats."""
    if grid.is_float:
        return 1
    form = answer_for(grid, n_cols).form
    assert form is not None, f"{grid.name} was chosen for a graph"
    return form.block_size


def _finer(grid: Grid, columns: int, n_cols: int) -> Grid:
    """A grid of smaller blocks that `columns` divide into, and of as many bits, where there is one and it is needed."""
    form = None if grid.is_float else answer_for(grid, n_cols).form
    if not isinstance(form, NBits) or form.minima or columns % form.block_size == 0:
        return grid
    sizes = [size for size in BLOCK_SIZES if _SMALLEST_BLOCK <= size < form.block_size and columns % size == 0]
    return nbits_grid(form.bits, sizes[-1], symmetric=not form.zeros, n_cols=n_cols) if sizes else grid


def _encodable(grid: Grid) -> bool:
    """Whether values can be rounded to a grid that a checkpoint came in."""
    if not isinstance(grid, GroupGrid):
        return grid.name in ("Q4_0", "Q8_0")
    return (
        not grid.table and not grid.order and grid.zero in ("", "U8") and grid.scale in ("F16", "F32") and run_length(grid) in BLOCK_SIZES
    )
