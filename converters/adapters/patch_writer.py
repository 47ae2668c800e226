"""Sparse adapters as patches for a GGUF file: the places that they change, as the file has them.

Rows of q and k lie by pairs in some architectures, and parts of a fused tensor below each other: a place moves as its row does. Strength
is in the values, and so is whatever the file's own rows were multiplied with.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.converters.gguf.architectures import arch_for
from edgeq.converters.gguf.lowering import Lowered, laid_out
from edgeq.deltas.adapter import Adapter
from edgeq.deltas.delta import Delta, Sparse
from edgeq.errors import UnsupportedError
from edgeq.families import FUSED, family
from edgeq.model import Model
from edgeq.patch_file import Sparse as Places
from edgeq.tensors import from_values


def patch_places(adapter: Adapter, model: Model, lowered: Lowered) -> dict[str, Places]:
    """What an adapter adds where, by tensor of the file that `lowered` is: flat places and values.

    Raises UnsupportedError for a change that is not sparse, and for a tensor that the file does not have.
    """
    left: dict[str, Delta] = dict(adapter.deltas)
    places: dict[str, Places] = {}
    for tensor in lowered.tensors:
        stem = "" if tensor.layer is None else f"layers.{tensor.layer}."
        above, found = 0, []
        for role in FUSED.get(tensor.role, (tensor.role,)):
            name = f"{stem}{role}.weight"
            part = model.tensors.get(name)
            if part is None:
                continue
            if left.pop(name, None) is not None:
                sparse, rows = _sparse(adapter, name), _Rows(part.n_rows, role, tensor.layer, lowered)
                at = rows.at[sparse.rows]
                found.append(((above + at) * part.n_cols + sparse.cols, sparse.values * rows.factors[at]))
            above += part.n_rows
        if found:
            places[tensor.name] = (np.concatenate([at for at, _ in found]), np.concatenate([values for _, values in found]))
    if left:
        raise UnsupportedError(f"adapter {adapter.name!r} changes {min(left)}, for which the file has no tensor. Merge it at export.")
    return places


class _Rows:
    """How rows of a tensor lie in a file. at: where each one is. factors: what the row at a place was multiplied with."""

    def __init__(self, n_rows: int, role: str, layer: int | None, lowered: Lowered) -> None:
        spec = lowered.spec
        attention = next((b for b in spec.attention if b.layer == layer), None)
        arch = arch_for(spec, elastic=lowered.arch == family(spec.family).gguf_layered)

        def moved(column: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
            return laid_out(from_values(column[:, None], origin=role), role, attention, spec, arch).decode()[:, 0]

        self.factors = moved(np.ones(n_rows))
        self.at = np.empty(n_rows, dtype=np.int64)
        self.at[np.rint(moved(np.arange(n_rows, dtype=np.float64)) / self.factors).astype(np.int64)] = np.arange(n_rows)


def _sparse(adapter: Adapter, name: str) -> Sparse:
    found = adapter.deltas[name].sparse()
    if found is None:
        raise UnsupportedError(
            f"adapter {adapter.name!r} ({adapter.kind}) changes all of {name}; a patch holds sparse changes alone. "
            "Merge it at export, or convert it to a LoRA (.gguf)."
        )
    return found
