"""What a cut puts in place of the MLP channels that it takes: other down projections, and biases.

For every layer whose MLP loses channels, the package's model of hidden activations says what lost ones come to, given those that stay
(`edgeq.compensation`). The part that depends on them goes into the columns of ffn_down that stay, which are decoded, changed and rounded
to the grid they had; the constant part becomes a bias, where the architecture has one (else the first part is fitted without it).

Rounding is not free: values that are rounded again carry a second rounding error. So in grids of few codes scales stay, and codes move
within their blocks by what they take on (`edgeq.code_steps`). What the layer's output is then off by, as the model of its activations has
it, relative to the output, on SmolLM2-135M in Q4_0 cut by 0.25: columns copied 0.0238; packed anew 0.0059, with E[h^2] as weights 0.0052
to 0.0056 at ten times the cost; codes moved 0.0066, and 0.0043 with moves overstated by what rounding loses of them. Perplexity in
llama.cpp on 8 windows of 1024 tokens of WikiText, everything in Q4_0, calibrated on other WikiText (26.3 at rate 0):

    rate                                          0.15   0.25
    bias alone, columns copied                    32.8   42.1
    columns packed anew with weights, and bias    31.9   39.0
    codes moved, and bias                         31.7   38.6

Rows that would move by more than a step on average are packed anew, and so are all in grids of many codes, where that costs nothing. In
the grids that are not in MERGED (K-quants other than Q6_K, which encode 13 million values a second or less) columns are copied byte for
byte, and the bias alone makes up for the mean of what is lost.

Rows are independent, so threads work on pieces of a million values, a few ahead of the writer; memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, chain, pairwise
from threading import Lock

import numpy as np

from edgeq import ggml
from edgeq.code_steps import decoded, gains, movable, moved, row_steps
from edgeq.compensation import Floats, HiddenModel, Regression, regression
from edgeq.elastic import Kept
from edgeq.errors import PackageError, SourceError
from edgeq.gguf_file import Header, TensorInfo
from edgeq.runtime.ahead import Ahead, Job, take_all
from edgeq.runtime.cores import usable_cores
from edgeq.runtime.cut_plan import BIASES, NO_EXTRAS, Extras, Replacement
from edgeq.tensors import Bytes

MERGED = frozenset({"F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_0", "Q5_1", "Q4_0", "Q4_1"})
MAX_THREADS = 4  # each holds about 10 MiB
_FEW_STEPS = 1.0  # beyond it, on average, too many values would leave the range that their block's scale gives them
_PIECE_VALUES = 1 << 20


@contextmanager
def compensated(
    header: Header, hidden: Mapping[int, HiddenModel], kept: Kept, *, merged: frozenset[str] = MERGED, threads: int | None = None
) -> Iterator[Extras]:
    """What a cut of this file gets in place of what it loses; computed while the block runs, as it is asked for.

    hidden: by layer; empty for a package that compensates nothing. merged: names of grids whose columns change. threads: default is the
    cores that this process may use, up to MAX_THREADS. Raises PackageError when models and file differ in size; what is computed raises
    SourceError for a file that cannot be read, MissingDependency without the llama library, PlanError as `edgeq.ggml.encode`.
    """
    downs = _downs(header, hidden, kept, merged)
    if not downs:
        yield NO_EXTRAS
        return
    by_down = [list(down.jobs()) for down in downs]
    stops = list(accumulate(map(len, by_down), initial=0))
    n_threads = threads or min(usable_cores(), MAX_THREADS)
    with ThreadPoolExecutor(n_threads) as pool:
        ahead = Ahead(pool, chain(*by_down), n_threads + 2)
        add: dict[str, Callable[[], Floats]] = {}
        replace: dict[str, Replacement] = {}
        for down, (start, stop) in zip(downs, pairwise(stops), strict=True):
            if down.has_bias:
                stop -= 1
                add[down.bias_name] = partial(ahead.take, stop)
            if down.merged:
                replace[down.info.name] = Replacement(down.info.grid, partial(take_all, ahead, start, stop))
        try:
            yield Extras(add=add, replace=replace)
        finally:
            pool.shutdown(cancel_futures=True)


def planned(header: Header, hidden: Mapping[int, HiddenModel], kept: Kept) -> Extras:
    """Extras of the same sizes, for `cut_bytes`; nothing is computed."""
    downs = _downs(header, hidden, kept, frozenset())
    return Extras(add={down.bias_name: np.zeros(down.info.shape[0], dtype=np.float32) for down in downs if down.has_bias})


def _downs(header: Header, hidden: Mapping[int, HiddenModel], kept: Kept, merged: frozenset[str]) -> list[_Down]:
    """Down projections that are compensated, in the order of the file."""
    has_bias = "ffn_down" in BIASES.get(header.value("general.architecture"), ())
    downs = []
    for layer, n_ff in enumerate(kept.n_ff):
        info = header.tensors.get(f"blk.{layer}.ffn_down.weight")
        if layer not in hidden or info is None or n_ff in (0, info.shape[-1]):
            continue
        down = _Down(header, layer, info, hidden, n_ff, has_bias=has_bias, merged=info.grid.name in merged)
        if down.merged or has_bias:
            downs.append(down)
    return sorted(downs, key=lambda down: down.info.offset)


class _Down:
    """The down projection of one layer, of which the first `kept` columns stay."""

    def __init__(
        self, header: Header, layer: int, info: TensorInfo, hidden: Mapping[int, HiddenModel], kept: int, *, has_bias: bool, merged: bool
    ) -> None:
        self.info, self.kept, self.has_bias, self.merged = info, kept, has_bias, merged
        self.bias_name = f"blk.{layer}.ffn_down.bias"
        self._header, self._layer, self._hidden = header, layer, hidden
        self._lock = Lock()
        self._regression: Regression | None = None
        self._starts = range(0, info.shape[0], max(1, _PIECE_VALUES // info.shape[-1]))
        self._left = (len(self._starts) if merged else 0) + has_bias  # jobs; with the last one the regression goes

    def jobs(self) -> Iterator[Job]:
        """Packed rows piece by piece if they change, then the bias if there is one."""
        if self.merged:
            for start in self._starts:
                yield partial(self._rows, start)
        if self.has_bias:
            yield self._bias

    def _rows(self, start: int) -> Bytes:
        info, packed = self.info, self._packed(start)
        with self._fit() as fit:
            if not movable(info.grid):
                values = ggml.decode(packed, info.grid, info.shape[-1])
                return ggml.encode(fit.columns(values), info.grid, origin=f"{self._header.path}: {info.name}")
            kept, lost = (np.ascontiguousarray(part) for part in np.split(packed, [info.grid.row_bytes(self.kept)], axis=1))
            steps, taken = row_steps(kept, info.grid), fit.taken(self._values(lost))
            size, step = fit.sizes(taken), np.sqrt(np.mean(np.square(steps), axis=1))
            in_steps = np.divide(size, step, out=np.ones_like(size), where=step > 0)
            result = moved(kept, info.grid, steps, fit.spread(taken * gains(in_steps)[:, None]))
            far = in_steps > _FEW_STEPS
            if far.any():
                values = decoded(kept[far], info.grid, steps[far]) + fit.spread(taken[far])
                result[far] = ggml.encode(values, info.grid, origin=f"{self._header.path}: {info.name}")
            return result

    def _bias(self) -> Floats:
        at = self.info.grid.row_bytes(self.kept)
        with self._fit() as fit:
            lost = (np.ascontiguousarray(self._packed(start)[:, at:]) for start in self._starts)
            bias = np.concatenate([fit.bias(self._values(packed)) for packed in lost])
        old = self._header.tensors.get(self.bias_name)
        return bias if old is None else bias + old.grid.decode(_read(self._header, old, 0, 1), len(bias))[0]

    def _values(self, lost: Bytes) -> Floats:
        """Packed columns that are lost, decoded."""
        grid = self.info.grid
        return decoded(lost, grid, row_steps(lost, grid)) if movable(grid) else ggml.decode(lost, grid, self.info.shape[-1] - self.kept)

    def _packed(self, start: int) -> Bytes:
        return _read(self._header, self.info, start, min(start + self._starts.step, self.info.shape[0]))

    @contextmanager
    def _fit(self) -> Iterator[Regression]:
        """Made by the first job that needs it, gone after the last one."""
        with self._lock:
            if self._regression is None:
                model = self._hidden[self._layer]
                if len(model.mean) != self.info.shape[-1]:
                    raise PackageError(
                        f"{self._header.path}: {self.info.name} has {self.info.shape[-1]} columns, but the package describes "
                        f"{len(model.mean)} hidden activations. The package is damaged; export it again."
                    )
                if not self.merged:
                    model = HiddenModel(mean=model.mean, factors=model.factors[:, :0], noise=model.noise)
                self._regression = regression(model, self.kept, intercept=self.has_bias)
            found = self._regression
        yield found
        with self._lock:
            self._left -= 1
            if not self._left:
                self._regression = None


def _read(header: Header, info: TensorInfo, start: int, stop: int) -> Bytes:
    """Packed rows of a tensor; a vector is one row."""
    row_bytes = info.grid.row_bytes(info.shape[-1])
    try:
        with header.path.open("rb") as file:
            file.seek(info.offset + start * row_bytes)
            data = file.read((stop - start) * row_bytes)
    except OSError as err:
        raise SourceError(f"{header.path}: cannot be read: {err.strerror or err}. Copy the file again.") from err
    if len(data) != (stop - start) * row_bytes:
        raise SourceError(f"{header.path}: ended within {info.name} while it was read. Copy the file again.")
    return np.frombuffer(data, dtype=np.uint8).reshape(stop - start, row_bytes)
