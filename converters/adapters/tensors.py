"""The tensors of an adapter file: checked header, values as numpy arrays, and a record of what nobody has asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgeq.converters.sources.pickle_file import read_pickle
from edgeq.converters.sources.safetensors_file import read_safetensors
from edgeq.deltas.delta import AnyFloats, Indices
from edgeq.errors import MissingDependency, SourceError, UnsupportedError
from edgeq.tensors import check_finite

_FLOATS = ("F64", "F32", "F16", "BF16")
_INTEGERS = ("I64", "I32", "I16", "U8", "int64", "int32", "int16", "uint8")


class Tensors(Protocol):
    """Tensors of one file by name, whatever they are stored as. `left` are those not taken yet."""

    path: Path
    left: dict[str, None]

    def __contains__(self, name: str) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def take(self, name: str) -> AnyFloats: ...

    def take_indices(self, name: str) -> Indices: ...


class AdapterTensors:
    """Tensors of one file by name. `left` are those not taken yet."""

    def __init__(self, path: Path) -> None:
        try:
            import torch  # noqa: F401
        except ImportError:
            raise MissingDependency("torch", "export") from None
        self.path = path
        self._pickled = path.suffix != ".safetensors"
        self._stored = read_pickle(path) if self._pickled else read_safetensors(path)
        self.left = dict.fromkeys(self._stored)
        self._values: Mapping[str, Any] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def take(self, name: str) -> AnyFloats:
        """Values as float32 (float64 where so stored). Raises SourceError for values that are not finite or not floats."""
        stored = self._stored[name]
        if stored.dtype not in _FLOATS:
            raise UnsupportedError(f"{stored.origin} is stored as {stored.dtype}; supported: {', '.join(_FLOATS)}")
        import torch

        tensor = self._load(name)
        array: AnyFloats = tensor.to(torch.float64 if stored.dtype == "F64" else torch.float32).numpy()
        check_finite(array, origin=stored.origin)  # type: ignore[arg-type]
        return array

    def take_indices(self, name: str) -> Indices:
        """Whole numbers from 0; floats count when they are whole (PEFT saves indices so on Windows)."""
        stored = self._stored[name]
        if stored.dtype in _INTEGERS:
            return self._load(name).numpy().astype(np.intp)
        values: npt.NDArray[Any] = self.take(name)
        if (values != np.floor(values)).any():
            raise SourceError(f"{stored.origin} must hold whole numbers")
        return values.astype(np.intp)

    def _load(self, name: str) -> Any:
        self.left.pop(name, None)
        if self._pickled:
            import torch

            if self._values is None:
                self._values = torch.load(self.path, map_location="cpu", weights_only=True)
            return self._values[name].detach()
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name)
