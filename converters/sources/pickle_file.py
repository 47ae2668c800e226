"""Pickle checkpoints (`pytorch_model.bin`, `.pt`): read only as far as torch's weights-only loader vouches for them.

A pickle can run code when it is opened; the weights-only loader admits tensors and plain containers and nothing else. Files are
mapped into memory, so tensors stay lazy. What that loader refuses, and what cannot be mapped, has to become safetensors first.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeq.converters.sources.stored import StoredTensor
from edgeq.errors import MissingDependency, SourceError
from edgeq.grids import Grid
from edgeq.tensors import Bytes, LazyTensor

if TYPE_CHECKING:
    import torch

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "uint8": "U8", "int8": "I8", "bool": "BOOL"}
_DTYPES |= {"int16": "I16", "int32": "I32", "int64": "I64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_REMEDY = (
    "Convert the model to safetensors on a machine that trusts it: "
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER, safe_serialization=True)"
)


def read_pickle(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a state dict. Raises SourceError when the file is broken, or holds more than tensors by name."""
    try:
        import torch
    except ImportError:
        raise MissingDependency("torch", "export") from None
    if not path.is_file():
        raise SourceError(f"{path} is missing. Download the model's folder again, with all its files.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as err:  # a broken pickle can make the loader raise nearly anything
        reason = str(err).strip().split("\n")[0]
        raise SourceError(f"{path}: torch's weights-only loader refuses this file ({reason}). {_REMEDY}") from err
    if not isinstance(state, dict) or not all(isinstance(k, str) and _is_plain(v) for k, v in state.items()):
        raise SourceError(f"{path}: expected tensors by name and nothing else. {_REMEDY}")
    return {name: _stored(path, name, tensor) for name, tensor in state.items()}


def _is_plain(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized


def _stored(path: Path, name: str, tensor: torch.Tensor) -> StoredTensor:
    dtype = str(tensor.dtype).removeprefix("torch.")

    def load(grid: Grid) -> LazyTensor:
        import torch

        rows = tensor.detach().reshape(-1, tensor.shape[-1])

        def read(start: int, stop: int) -> Bytes:
            return rows[start:stop].contiguous().view(torch.uint8).numpy()

        return LazyTensor(shape=tuple(tensor.shape), grid=grid, read=read, origin=f"{path}: {name}")

    def data() -> Bytes:
        import torch

        return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()

    return StoredTensor(file=path, name=name, dtype=_DTYPES.get(dtype, dtype), shape=tuple(tensor.shape), load=load, data=data)
