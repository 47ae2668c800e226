"""Sparse patches on a loaded model: single weights changed where llama.cpp holds them, and put back bit by bit.

    with LlamaModel.load(path, use_mmap=False) as model:
        patches = Patches(model)
        patches.apply(read_patch(Path("sql.eqpatch")), name="sql"); ...; patches.undo("sql")

Patches that are on at the same time must not touch the same place, so that their order does not matter and each can be undone alone:
one that overlaps another is refused. Keys and values cached before a change are stale after it; a context must be cleared.

Weights must lie in memory of our own (`use_mmap=False`) on the CPU: pages of a mapped file cannot be written. llama.cpp has no public
call that finds a weight; its own `llama_model::get_tensor` is used, which the library exports by its C++ name.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import AdapterError, RuntimeFailure, UsageError
from edgeq.patch_file import DTYPES, Ints, Patch, TensorPatch, base_hash, check_patchable
from edgeq.runtime.llama import LlamaModel

_GET_TENSOR = "_ZNK11llama_model10get_tensorEPKc"  # Itanium C++ ABI: Linux and macOS

Values = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class _Change:
    """Places of one weight, and what stood there before."""

    weight: Values
    indices: Ints
    before: Values


class Weights:
    """The tensors of a model where llama.cpp holds them, flat, in their own number format; writing to one changes the model."""

    def __init__(self, model: LlamaModel) -> None:
        if model.mapped:
            raise UsageError(f"{model.path}: its weights are mapped from the file and cannot change. Open the session with patchable=True.")
        if model.gpu_layers:
            raise UsageError(f"{model.path}: is on a GPU; patches are applied in CPU memory only. Open the session on the CPU.")
        library: Any = model.native
        try:
            self._tensor, self._data, self._bytes = library[_GET_TENSOR], library["ggml_get_data"], library["ggml_nbytes"]
        except AttributeError as err:
            raise RuntimeFailure("this build of llama.cpp does not let its weights be found, so patches cannot be applied.") from err
        self._tensor.restype, self._tensor.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]
        self._data.restype, self._data.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        self._bytes.restype, self._bytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
        self.model = model

    def __getitem__(self, name: str) -> Values:
        """One F16 or F32 tensor. It must not be used after the model is closed."""
        layout = self.model.facts.tensors[name]
        tensor = self._tensor(self.model.pointer, name.encode())
        assert tensor and self._bytes(tensor) == layout.nbytes, f"llama.cpp holds {name} as the file does"
        memory: Any = (ctypes.c_char * layout.nbytes).from_address(self._data(tensor))
        return np.frombuffer(memory, dtype=DTYPES[layout.grid.name])


class Patches:
    """The patches on a model. Not for two threads at once, nor while the model computes."""

    def __init__(self, model: LlamaModel) -> None:
        self.model, self._weights = model, Weights(model)
        self._applied: dict[str, dict[str, _Change]] = {}

    @property
    def applied(self) -> tuple[str, ...]:
        """Names of the patches that are on, in the order applied."""
        return tuple(self._applied)

    def apply(self, patch: Patch, *, name: str | None = None, scale: float = 1.0) -> str:
        """Add a patch, times scale, to the weights; returns its name (the file's by default). It is applied whole or not at all.

        Sums are formed in float32 and rounded once to the tensor's format.
        Raises UsageError for a name that is taken or a bad scale; AdapterError for another base, for overlap with a patch that is on,
        and when a sum is beyond the format's range.
        """
        name = patch.path.stem if name is None else name
        if name in self._applied:
            raise UsageError(f"a patch named {name!r} is applied already. Undo it or choose another name.")
        if not math.isfinite(scale):
            raise UsageError(f"the scale of patch {name!r} is {scale}; expected a finite number")
        self._check_overlap(patch)
        changes, after = {}, {}
        for tensor in patch.tensors:
            changes[tensor.name], after[tensor.name] = self._prepared(patch, tensor, scale)
        for tensor_name, change in changes.items():
            change.weight[change.indices] = after[tensor_name]
        self._applied[name] = changes
        return name

    def undo(self, name: str) -> None:
        """Put back what stood in the places of a patch, bit by bit. Raises UsageError for a patch that is not on."""
        if name not in self._applied:
            known = f"applied are {', '.join(map(repr, self._applied))}" if self._applied else "none is applied"
            raise UsageError(f"no patch named {name!r} is applied; {known}")
        assert self.model.pointer  # raises when the model, and with it the memory, is gone
        for change in self._applied.pop(name).values():
            change.weight[change.indices] = change.before

    def _check_overlap(self, patch: Patch) -> None:
        for other, changes in self._applied.items():
            for tensor in patch.tensors:
                if tensor.name in changes and (shared := _n_shared(changes[tensor.name].indices, tensor.indices)):
                    raise AdapterError(
                        f"{patch.path}: changes {shared} values of {tensor.name} that patch {other!r} changes too. Undo {other!r} first, "
                        "or merge both into one patch."
                    )

    def _prepared(self, patch: Patch, tensor: TensorPatch, scale: float) -> tuple[_Change, Values]:
        """The change that a patch makes to one tensor, and the values after it."""
        weight = self._weight(patch.path, tensor)
        before = weight[tensor.indices]
        if base_hash(before) != tensor.base_sha256:
            raise AdapterError(
                f"{patch.path}: the values of {tensor.name} that it changes are not those it was made for. "
                "Use the artifact that the patch was made for."
            )
        with np.errstate(over="ignore"):
            after = (before.astype(np.float32) + np.float32(scale) * tensor.values).astype(weight.dtype)
        if not np.isfinite(after).all():
            raise AdapterError(f"{patch.path}: values of {tensor.name} would leave the range of {tensor.grid.name}. Use a smaller scale.")
        return _Change(weight, tensor.indices, before), after

    def _weight(self, path: Path, tensor: TensorPatch) -> Values:
        """A model's tensor where it lies, flat."""
        held = self.model.facts.tensors.get(tensor.name)
        if held is None:
            raise AdapterError(f"{path}: {self.model.path.name} has no tensor {tensor.name}. Use the artifact that the patch was made for.")
        check_patchable(path, tensor.name, held.grid)
        if (held.shape, held.grid) != (tensor.shape, tensor.grid):
            raise AdapterError(
                f"{path}: was made for {tensor.name} as {tensor.grid.name} {list(tensor.shape)}, in {self.model.path.name} it is "
                f"{held.grid.name} {list(held.shape)}. Use the artifact that the patch was made for."
            )
        return self._weights[tensor.name]


def _n_shared(a: Ints, b: Ints) -> int:
    """Number of values that two ascending lists share."""
    places = np.searchsorted(a, b)
    return int((a[np.minimum(places, len(a) - 1)] == b).sum())
