"""Rounding linear layers to 4 bits so that what one input's weights lose, the next inputs' weights make up for.

Column by column: a column is rounded, and its error, times how inputs go together in a calibration text, is taken off the columns that are
not rounded yet. Scales and zero points are those of rounding alone. Layers are done in order, each on the outputs of the rounded layers
before it. Frantar et al. 2022, arXiv:2210.17323 (GPTQ).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from edgeq.converters.encoders.formats import BLOCK, EncoderFormat
from edgeq.encoder_reference import EncoderReference
from edgeq.encoder_spec import EncoderModel
from edgeq.group_grids import GroupGrid
from edgeq.nbits_encode import encode
from edgeq.progress import Progress, silent
from edgeq.tensors import Bytes, Floats, LazyTensor, check_finite

Wide = npt.NDArray[np.float64]

_MOST = 15  # the largest code of 4 bits
DAMPING = 0.01  # of the mean square of inputs, added to each: the text does not show every direction


def compensated(
    model: EncoderModel,
    form: EncoderFormat,
    stored: Mapping[str, LazyTensor],
    texts: Sequence[Sequence[int]],
    *,
    progress: Progress = silent,
) -> dict[str, LazyTensor]:
    """`stored`, tensors as they are rounded one by one, with linear layers that are rounded together. texts: token ids to calibrate on.

    Raises SourceError for values that are not finite.
    """
    made: dict[str, LazyTensor] = {}

    def replace(
        layer: int, roles: Sequence[str], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        rows = torch.cat([x.flatten(0, -2) for x in inputs])
        factor = inverse_factor((rows.T @ rows).double() / len(rows))
        found = []
        for role, weight in zip(roles, weights, strict=True):
            name = f"layers.{layer}.{role}.weight"
            source = model.tensors[name]
            check_finite(weight.numpy(), origin=source.origin)
            grid = form.grid(name, source)
            assert isinstance(grid, GroupGrid)
            made[name] = _held(round_together(weight.numpy(), factor, grid), source, grid)
            found.append(torch.from_numpy(made[name].decode()))
        return found

    # embeddings as they will be, linear layers as they are until their turn comes
    mixed = {name: model.tensors[name] if name.startswith("layers.") else tensor for name, tensor in stored.items()}
    EncoderReference(model.spec, mixed).hidden(texts, replace=replace, progress=lambda _, done, total: progress("compensate", done, total))
    return {**stored, **made}


def inverse_factor(together: torch.Tensor) -> Wide:
    """Upper triangular R, R^T R the inverse of `together`, (n, n) float64: mean products of inputs, damped.

    From the factor of H with its order turned around: H = U U^T with U upper triangular, and R is the inverse of U.
    """
    damping = max(DAMPING * float(together.diagonal().mean()), float(np.finfo(np.float32).tiny))
    unit = torch.eye(len(together), dtype=together.dtype)
    upper = torch.linalg.cholesky((together + damping * unit).flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(upper, unit, upper=True).numpy()


def round_together(weight: Floats, factor: Wide, grid: GroupGrid) -> Bytes:
    """(n_out, n_in) to packed rows of the grid. factor: of the inputs, by `inverse_factor`."""
    _, scales, zeros = grid.unpack(encode(weight, grid))
    left = np.ascontiguousarray(weight.T, dtype=np.float64)  # one input after another
    codes = np.empty(left.shape, dtype=np.uint8)
    for block, start in enumerate(range(0, len(left), BLOCK)):
        stop = min(start + BLOCK, len(left))
        scale, zero = (part[:, block].astype(np.float64) for part in (scales, zeros))
        errors = np.empty((stop - start, left.shape[1]))
        for j in range(start, stop):
            steps = np.divide(left[j], scale, out=np.zeros_like(scale), where=scale != 0)
            code = np.minimum(np.maximum(np.rint(steps) + zero, 0), _MOST)
            error = (left[j] - (code - zero) * scale) / factor[j, j]
            left[j + 1 : stop] -= np.outer(factor[j, j + 1 : stop], error)
            codes[j], errors[j - start] = code, error
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return grid.pack(np.ascontiguousarray(codes.T), scales.astype(np.float16), zeros.astype(np.uint8))


def _held(packed: Bytes, source: LazyTensor, grid: GroupGrid) -> LazyTensor:
    return LazyTensor(shape=source.shape, grid=grid, read=lambda start, stop: packed[start:stop], origin=source.origin)
