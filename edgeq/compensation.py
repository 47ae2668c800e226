"""What a cut MLP does about the channels it has lost: for any number of kept ones, from one small model of the hidden activations.

Sorting stores, by layer, the mean of every channel and a factor model of its variation: Cov(h) ~ U U^T + diag(noise), with U of a
few columns. From it follows the least-squares estimate of lost channels by kept ones, for whichever were kept:

    h_lost ~ mean_lost + R (h_kept - mean_kept),   R = U_lost (I + U_kept^T N^-1 U_kept)^-1 U_kept^T N^-1,   N = diag(noise_kept)

(the Woodbury identity; Woodbury 1950, and Thomson's regression of factor scores). So down_proj keeps its shape: its kept columns
take on W_lost R and a bias takes the rest. Channels are in order of importance: a cut to k keeps the first k.

Runs on the device: numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from edgeq.errors import ShapeError
from edgeq.tiled import product, times

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class HiddenModel:
    """Hidden activations of one MLP: mean (n_ff,), factors (n_ff, rank), noise (n_ff,), which is positive where factors are not 0.

    A rank of 0 leaves the mean alone: lost channels then become a bias and kept columns stay as they are.
    """

    mean: Floats
    factors: Floats
    noise: Floats

    def __post_init__(self) -> None:
        n_ff = len(self.mean)
        if self.mean.shape != (n_ff,) or self.noise.shape != (n_ff,) or self.factors.ndim != 2 or len(self.factors) != n_ff:
            raise ShapeError(
                f"hidden model: mean {list(self.mean.shape)}, factors {list(self.factors.shape)} and noise {list(self.noise.shape)} "
                "do not describe the same channels. Export the package again."
            )


@dataclass(frozen=True, kw_only=True)
class Regression:
    """Lost channels by kept ones: h_lost ~ left @ right @ h_kept + intercept.

    left (n_lost, rank), right (rank, n_kept), intercept (n_lost,).
    """

    left: Floats
    right: Floats
    intercept: Floats

    def columns(self, down: Floats) -> Floats:
        """Rows of down_proj (n, n_ff) as their kept columns (n, n_kept), which have taken on the lost ones."""
        kept = self.right.shape[1]
        columns = self.spread(self.taken(down[:, kept:]))
        columns += down[:, :kept]
        return np.ascontiguousarray(columns)

    def taken(self, lost: Floats) -> Floats:
        """Lost columns (n, n_lost) as weights of factors, (n, rank)."""
        return product(lost, self.left)

    def spread(self, taken: Floats) -> Floats:
        """What kept columns take on of that, (n, n_kept)."""
        return product(taken, self.right)

    def sizes(self, taken: Floats) -> Floats:
        """Root mean square of every row of `spread(taken)`, (n,), without computing it."""
        squares = np.einsum("ij,ij->i", product(taken, self._gram), taken)
        return np.sqrt(np.maximum(squares, 0) / self.right.shape[1])

    @cached_property
    def _gram(self) -> Floats:
        return product(self.right, np.ascontiguousarray(self.right.T))

    def bias(self, lost: Floats) -> Floats:
        """What lost columns (n, n_lost) come to beside that, (n,)."""
        return times(lost, self.intercept)


def regression(model: HiddenModel, kept: int, *, intercept: bool = True) -> Regression:
    """The least-squares estimate of what a cut to `kept` channels has lost. Raises ShapeError when `kept` is not within the model.

    intercept: False for MLPs that have no place for a bias: the estimate is then the best one through the origin, and 0 its intercept.
    """
    n_ff = len(model.mean)
    if not 0 <= kept <= n_ff:
        raise ShapeError(f"a cut to {kept} channels: the hidden model describes {n_ff}. Export the package again.")
    if not intercept:  # second moments about 0 are those of one more factor
        model = HiddenModel(mean=np.zeros_like(model.mean), factors=np.column_stack([model.factors, model.mean]), noise=model.noise)
    left, right = _low_rank(model, kept)
    return Regression(left=left, right=right, intercept=model.mean[kept:] - times(left, times(right, model.mean[:kept])))


def compensate(down: Floats, model: HiddenModel, kept: int) -> tuple[Floats, Floats]:
    """down_proj (n_embd, n_ff) cut to its first `kept` columns, and the bias (n_embd,) to add to what its block already has.

    Nothing is lost for kept == n_ff, everything for kept == 0, where the bias is the mean output. Raises ShapeError when the
    model has another width or `kept` is not within it.
    """
    n_ff = len(model.mean)
    if down.shape[1] != n_ff or not 0 <= kept <= n_ff:
        raise ShapeError(
            f"down_proj of {down.shape[1]} columns, cut to {kept}: the hidden model describes {n_ff}. Export the package again."
        )
    found = regression(model, kept)
    return found.columns(down), found.bias(down[:, kept:])


def _low_rank(model: HiddenModel, kept: int) -> tuple[Floats, Floats]:
    """R = left (n_ff - kept, rank) @ right (rank, kept). Solved in float64: U^T N^-1 U spans many orders of magnitude."""
    factors, noise = model.factors[:kept], model.noise[:kept, None]
    unit = np.divide(factors, np.sqrt(noise), out=np.zeros_like(factors), where=noise > 0).astype(np.float64)
    inner = np.eye(factors.shape[1]) + product(np.ascontiguousarray(unit.T), unit)
    weighted = np.divide(factors, noise, out=np.zeros_like(factors), where=noise > 0)
    return model.factors[kept:], product(np.linalg.inv(inner), weighted.T.astype(np.float64)).astype(np.float32)
