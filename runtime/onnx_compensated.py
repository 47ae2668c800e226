"""What a cut of an ONNX graph puts in place of the MLP channels that it takes: other down projections, and biases.

As `edgeq.runtime.compensated` for GGUF files, which says why: the part of lost channels that depends on those that stay goes into the
columns of down_proj that stay, the rest into its bias, for which an elastic graph has an Add already. Columns are changed in the form they
have in the file:

    floats                       what they take on is added and rounded once
    8-bit codes, one scale per   codes move, in blocks by whole steps of their scale; symmetric 8-bit blocks get a new scale, which costs
    output or block              nothing and makes room where a block's largest value grows
    2 and 4-bit codes            codes move within their blocks, overstated by what rounding loses; rows that would move by more than a step
                                 on average get new scales where blocks are symmetric

Threads work on pieces of a million values, a few ahead of the writer; memory does not grow with the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, pairwise
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.code_steps import gains
from edgeq.compensation import Floats, HiddenModel, Regression, regression
from edgeq.elastic import Kept
from edgeq.errors import PackageError, SourceError
from edgeq.nbits import NBits, Parts, decode, pack, unpack
from edgeq.runtime.ahead import Ahead, Job, take_all
from edgeq.runtime.cores import usable_cores
from edgeq.runtime.onnx_cut import NO_EXTRAS, OnnxExtras
from edgeq.runtime.onnx_file import OnnxFile
from edgeq.runtime.onnx_sizes import Projection, projections
from edgeq.tensors import Bytes
from edgeq.tiled import product, times

MAX_THREADS = 4  # each holds about 20 MiB
_FEW_STEPS = 1.0  # beyond it, on average, too many values would leave the range that their block's scale gives them
_PIECE_VALUES = 1 << 20
_DTYPES: Mapping[int, np.dtype[Any]] = {1: np.dtype("<f4"), 2: np.dtype("u1"), 3: np.dtype("i1"), 10: np.dtype("<f2")}

Array = npt.NDArray[Any]


@contextmanager
def onnx_compensated(file: OnnxFile, hidden: Mapping[int, HiddenModel], kept: Kept, *, threads: int | None = None) -> Iterator[OnnxExtras]:
    """What a cut of this graph gets in place of what it loses; computed while the block runs, as it is asked for.

    hidden: by layer; empty for a package that compensates nothing. threads: default is the cores that this process may use, up to
    MAX_THREADS. Raises PackageError when models and graph differ in size; what is computed raises SourceError for data that cannot be read.
    """
    downs = _downs(file, hidden, kept)
    if not downs:
        yield NO_EXTRAS
        return
    by_down = [list(down.jobs()) for down in downs]
    stops = list(accumulate(map(len, by_down), initial=0))
    n_threads = threads or min(usable_cores(), MAX_THREADS)
    with ThreadPoolExecutor(n_threads) as pool:
        ahead = Ahead(pool, chain(*by_down), n_threads + 2)
        replace: dict[str, Any] = {}
        for down, (start, stop) in zip(downs, pairwise(stops), strict=True):
            replace |= {name: partial(down.rest, name) for name in down.gathered}
            replace[down.weight] = partial(take_all, ahead, start, stop)
        try:
            yield OnnxExtras(replace=replace)
        finally:
            pool.shutdown(cancel_futures=True)


def _downs(file: OnnxFile, hidden: Mapping[int, HiddenModel], kept: Kept) -> list[_Down]:
    """Down projections that are compensated, in the order of the file."""
    weights = (tensor for tensor in file.proto.graph.initializer if ".mlp.down_proj." in tensor.name and ".lora_" not in tensor.name)
    stored = {tensor.name: _Stored.of(file, tensor) for tensor in weights}
    downs: list[_Down] = []
    for p in projections(file).values():
        if p.kind != "down_proj" or p.layer not in hidden or kept.n_ff[p.layer] == p.n_in:
            continue
        parts = {name.removeprefix(f"{p.name}."): tensor for name, tensor in stored.items() if name.startswith(f"{p.name}.")}
        kind = next((kind for part, kind in _KINDS.items() if part in parts), None)
        if kind is not None:
            downs.append(kind(p, parts, hidden, kept.n_ff[p.layer]))
    return sorted(downs, key=lambda down: down.offset)


@dataclass(frozen=True)
class _Stored:
    """An external initializer."""

    name: str
    path: Path
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @staticmethod
    def of(file: OnnxFile, tensor: Any) -> _Stored:
        says = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_type not in _DTYPES or "location" not in says:
            raise SourceError(f"{file.path}: {tensor.name} is not stored as edgeq stores it. Export the model again.")
        return _Stored(tensor.name, file.data[says["location"]], int(says.get("offset", 0)), _DTYPES[tensor.data_type], tuple(tensor.dims))

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        """Entries start to stop of the first axis. Raises SourceError."""
        stop = self.shape[0] if stop is None else stop
        count = int(np.prod(self.shape[1:]))
        try:
            values = np.fromfile(self.path, self.dtype, (stop - start) * count, offset=self.offset + start * count * self.dtype.itemsize)
        except OSError as err:
            raise SourceError(f"{self.path}: cannot be read: {err.strerror or err}. Copy the file again.") from err
        if len(values) != (stop - start) * count:
            raise SourceError(f"{self.path}: ended within {self.name} while it was read. Copy the file again.")
        return values.reshape(stop - start, *self.shape[1:])


class _Down(ABC):
    """The down projection of one layer, of which the first `kept` inputs stay.

    weight: the initializer that jobs make, piece by piece in order. gathered: initializers that come out of these jobs as well and are
    asked for behind it, by name.
    """

    main: str  # what the matrix is stored as

    def __init__(self, p: Projection, parts: Mapping[str, _Stored], hidden: Mapping[int, HiddenModel], kept: int) -> None:
        self.p, self.parts, self.kept = p, parts, kept
        self.bias = parts.get("Add.bias")
        self.offset = parts[self.main].offset
        self.weight = parts[self.main].name
        self.gathered: dict[str, Array] = {}
        if self.bias is not None:
            self.gathered[self.bias.name] = np.zeros(p.n_out, dtype=np.float32)
        self._hidden, self._lock = hidden, Lock()
        self._regression: Regression | None = None
        self._left = 0

    @property
    @abstractmethod
    def _starts(self) -> range:
        """Where pieces begin."""

    @abstractmethod
    def _piece(self, start: int, fit: Regression) -> Bytes: ...

    def jobs(self) -> Iterator[Job]:
        self._left = len(self._starts)
        return (partial(self._job, start) for start in self._starts)

    def _job(self, start: int) -> Bytes:
        piece = self._piece(start, self._fit())
        with self._lock:
            self._left -= 1
            if not self._left:
                self._forget()
        return piece

    def _forget(self) -> None:
        """Called behind the last job."""
        self._regression = None

    def rest(self, name: str) -> Iterator[Bytes]:
        """One of `gathered`, once; the bias with what it was before."""
        values = self.gathered.pop(name)
        if self.bias is not None and name == self.bias.name:
            values = (self.bias.read().astype(np.float32) + values).astype(self.bias.dtype)
        yield np.ascontiguousarray(values)

    def _fit(self) -> Regression:
        with self._lock:
            if self._regression is None:
                model = self._hidden[self.p.layer]
                if len(model.mean) != self.p.n_in:
                    raise PackageError(
                        f"{self.parts[self.main].path}: {self.p.name} has {self.p.n_in} columns, but the package describes "
                        f"{len(model.mean)} hidden activations. The package is damaged; export it again."
                    )
                self._regression = regression(model, self.kept, intercept=self.bias is not None)
            return self._regression


class _Blocks(_Down):
    """MatMulNBits: pieces are some outputs."""

    main = "MatMulNBits.qweight"

    def __init__(self, p: Projection, parts: Mapping[str, _Stored], hidden: Mapping[int, HiddenModel], kept: int) -> None:
        super().__init__(p, parts, hidden, kept)
        self.form = NBits(p.bits, p.block_size, zeros="MatMulNBits.qzeros" in parts, minima="MatMulNBits.minima" in parts)
        self._renews = not (self.form.zeros or self.form.minima)  # symmetric blocks can get new scales
        if self._renews:
            scales = parts["MatMulNBits.scales"]
            self.gathered[scales.name] = np.zeros((p.n_out, kept // p.block_size), dtype=scales.dtype)

    @property
    def _starts(self) -> range:
        return range(0, self.p.n_out, max(1, _PIECE_VALUES // self.p.n_in))

    def _piece(self, start: int, fit: Regression) -> Bytes:
        stop = min(start + self._starts.step, self.p.n_out)
        parts, n_kept = self._parts(start, stop), self.kept // self.form.block_size
        lost = decode(_blocks(parts, slice(n_kept, None), self.form), self.form, self.p.n_in - self.kept)
        if self.bias is not None:
            self.gathered[self.bias.name][start:stop] = fit.bias(lost)
        kept, taken = _blocks(parts, slice(n_kept), self.form), fit.taken(lost)
        size, step = fit.sizes(taken), np.sqrt(np.mean(np.square(kept.scales), axis=1))
        in_steps = np.divide(size, step, out=np.ones_like(size), where=step > 0)
        anew = (in_steps > _FEW_STEPS) | (self.form.bits == 8) if self._renews else np.zeros(len(size), dtype=bool)
        codes = np.empty((len(size), n_kept, self.form.block_size), dtype=np.uint8)
        if not anew.all():
            gain = gains(in_steps) if self.form.bits < 8 else np.ones_like(in_steps)
            codes[~anew] = _moved(kept, ~anew, fit.spread((taken * gain[:, None])[~anew]), self.form)
        if self._renews:
            scales = self.gathered[self.parts["MatMulNBits.scales"].name]
            scales[start:stop] = kept.scales
            if anew.any():
                values = decode(kept, self.form, self.kept)[anew] + fit.spread(taken[anew])
                codes[anew], scales[start:stop][anew] = _rounded(values.reshape(-1, *codes.shape[1:]), self.form.bits, scales.dtype)
        return pack(codes.reshape(len(codes), -1), self.form.bits)

    def _parts(self, start: int, stop: int) -> Parts:
        def read(part: str) -> Array:
            return self.parts[f"MatMulNBits.{part}"].read(start, stop)

        scales = read("scales").astype(np.float32)
        zeros = read("qzeros") if self.form.zeros else None
        return Parts(read("qweight"), scales, zeros, read("minima").astype(np.float32) if self.form.minima else None)


def _blocks(parts: Parts, some: slice, form: NBits) -> Parts:
    """Some blocks of every row."""
    zeros = parts.zeros
    if zeros is not None:
        zeros = pack(np.ascontiguousarray(unpack(zeros, form.bits, parts.scales.shape[1])[:, some]), form.bits)
    minima = None if parts.minima is None else parts.minima[:, some]
    return Parts(np.ascontiguousarray(parts.codes[:, some]), parts.scales[:, some], zeros, minima)


def _moved(parts: Parts, rows: npt.NDArray[np.bool_], moves: Floats, form: NBits) -> Bytes:
    """Codes of some rows (some, n_blocks, block_size), changed by what rounding leaves of `moves`, which is overwritten. Scales stay."""
    steps = parts.scales[rows][..., None]
    moves = moves.reshape(*steps.shape[:2], -1)
    np.rint(np.divide(moves, steps, out=np.zeros_like(moves), where=steps != 0), out=moves)
    codes = unpack(parts.codes[rows].reshape(len(steps), -1), form.bits, moves.shape[1] * form.block_size)
    moves += codes.reshape(moves.shape)
    return np.clip(moves, 0, (1 << form.bits) - 1).astype(np.uint8)


class _Floats(_Down):
    """A matrix (n_in, n_out) of floats: what lost inputs come to is gathered first; pieces are then some of the inputs that stay."""

    main = "MatMul.weight"

    _found: Floats | None = None

    @property
    def _starts(self) -> range:
        return range(0, self.kept, max(1, _PIECE_VALUES // self.p.n_out))

    def _piece(self, start: int, fit: Regression) -> Bytes:
        stop = min(start + self._starts.step, self.kept)
        taken = self._taken(fit)
        return self._changed(start, stop, product(np.ascontiguousarray(fit.right[:, start:stop].T), taken))

    def _forget(self) -> None:
        super()._forget()
        self._found = None

    def _changed(self, start: int, stop: int, moves: Floats) -> Bytes:
        weight = self.parts[self.main]
        moves += weight.read(start, stop).astype(np.float32)
        with np.errstate(over="ignore"):
            return moves.astype(weight.dtype)

    def _lost(self, start: int, stop: int) -> Floats:
        """Values of inputs, (some, n_out)."""
        return self.parts[self.main].read(start, stop).astype(np.float32)

    def _taken(self, fit: Regression) -> Floats:
        """Lost inputs as weights of factors, (rank, n_out), and on the way the bias. Computed by the first job that needs it."""
        with self._lock:
            if self._found is None:
                self._found = np.zeros((fit.left.shape[1], self.p.n_out), dtype=np.float32)
                step = max(1, _PIECE_VALUES // self.p.n_out)
                for start in range(self.kept, self.p.n_in, step):
                    lost, some = self._lost(start, min(start + step, self.p.n_in)), slice(start - self.kept, start - self.kept + step)
                    self._found += product(np.ascontiguousarray(fit.left[some].T), lost)
                    if self.bias is not None:
                        self.gathered[self.bias.name] += times(np.ascontiguousarray(lost.T), fit.intercept[some])
            return self._found


class _Rows8(_Floats):
    """A matrix (n_in, n_out) of 8-bit codes around 0, with a scale for each output."""

    main = "MatMul.weight_quantized"

    def _scales(self) -> Floats:
        return self.parts["MatMul.weight_scale"].read().astype(np.float32)

    def _lost(self, start: int, stop: int) -> Floats:
        return super()._lost(start, stop) * self._scales()

    def _changed(self, start: int, stop: int, moves: Floats) -> Bytes:
        np.rint(np.divide(moves, self._scales(), out=moves), out=moves)
        moves += self.parts[self.main].read(start, stop)
        return np.clip(moves, -127, 127).astype(np.int8)


_KINDS: Mapping[str, type[_Down]] = {kind.main: kind for kind in (_Blocks, _Floats, _Rows8)}


def _rounded(values: Floats, bits: int, dtype: np.dtype[Any]) -> tuple[Bytes, Array]:
    """Blocks (.., size) as codes around 2^(bits-1), and their scales in a type: as Q8_0 and Q4_0 of ggml do it."""
    center = 1 << (bits - 1)
    if bits == 8:
        scales = np.abs(values).max(-1) / np.float32(center - 1)
    else:
        at = np.abs(values).argmax(-1)[..., None]
        scales = np.take_along_axis(values, at, -1)[..., 0] / np.float32(-center)
    stored = scales.astype(dtype)
    wide = stored.astype(np.float32)[..., None]
    codes = np.rint(np.divide(values, wide, out=np.zeros_like(values), where=wide != 0)) + center
    return np.clip(codes, 0, 2 * center - 1).astype(np.uint8), stored
