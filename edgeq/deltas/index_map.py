"""Adapters of a pruned model on the full one and back: LoRAM (arXiv:2502.13533), and every cut that keeps listed rows and columns.

`recover` scatters a pruned module's factors to full size with zeros where nothing was trained; `restrict` takes from a full adapter
what a cut keeps. restrict(recover(x)) is x.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgeq.deltas.delta import Indices
from edgeq.deltas.lora import LoRA
from edgeq.errors import ShapeError


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexMap:
    """Which rows (outputs) and columns (inputs) of a full matrix a smaller one holds, in its order; None: all of them."""

    full: tuple[int, int]
    rows: Indices | None = None
    cols: Indices | None = None

    def __post_init__(self) -> None:
        for name, index, size in (("rows", self.rows, self.full[0]), ("columns", self.cols, self.full[1])):
            if index is not None and (len(set(index.tolist())) < len(index) or not all(0 <= i < size for i in index.tolist())):
                raise ShapeError(f"the index map's {name} must be distinct numbers from 0 to {size - 1}")

    @property
    def small(self) -> tuple[int, int]:
        return (self.full[0] if self.rows is None else len(self.rows), self.full[1] if self.cols is None else len(self.cols))


def recover(lora: LoRA, index: IndexMap) -> LoRA:
    """The adapter of the small matrix, on the full one. Raises ShapeError when it does not have the map's small shape."""
    if lora.shape != index.small:
        raise ShapeError(f"the adapter fits a matrix of {list(lora.shape)}, the index map leads from {list(index.small)}")
    a, b = lora.a, lora.b
    if index.cols is not None:
        a = np.zeros((lora.rank, index.full[1]), dtype=lora.a.dtype)
        a[:, index.cols] = lora.a
    if index.rows is not None:
        b = np.zeros((index.full[0], lora.rank), dtype=lora.b.dtype)
        b[index.rows] = lora.b
    return LoRA(a=a, b=b, scale=lora.scale)


def restrict(lora: LoRA, index: IndexMap) -> LoRA:
    """What of a full adapter acts on the kept rows and columns. Raises ShapeError when it does not have the map's full shape."""
    if lora.shape != index.full:
        raise ShapeError(f"the adapter fits a matrix of {list(lora.shape)}, the index map leads to {list(index.full)}")
    a = lora.a if index.cols is None else lora.a[:, index.cols]
    b = lora.b if index.rows is None else lora.b[index.rows]
    return LoRA(a=a, b=b, scale=lora.scale)


def query_rows(kept_heads: Indices, group: int, head_dim: int) -> Indices:
    """Rows of wq (or columns of wo) that stay when these KV heads do: `group` query heads of head_dim rows each per KV head."""
    return (kept_heads[:, None] * (group * head_dim) + np.arange(group * head_dim)).reshape(-1).astype(np.intp)
