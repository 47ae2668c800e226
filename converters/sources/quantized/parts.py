"""The tensors that make up one quantized weight, taken with the types and shapes that the method stores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeq.converters.sources.stored import StoredTensor
from edgeq.errors import SourceError
from edgeq.tensors import LazyTensor

AGAIN = "Download the model's folder again, with all its files."
SCALES = ("F16", "BF16", "F32")


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What a method made of a checkpoint. weights: by stored name of the weight. parts: names of every stored tensor it took.

    summary: method and options, for people.
    """

    weights: Mapping[str, LazyTensor]
    parts: frozenset[str]
    summary: Mapping[str, Any]


@dataclass(kw_only=True)
class Parts:
    """Tensors of a checkpoint, taken part by part for one module after another; `taken` remembers their names.

    method: how messages call it.
    """

    stored: Mapping[str, StoredTensor]
    method: str
    taken: set[str] = field(default_factory=set)

    def modules(self, suffix: str) -> Iterator[str]:
        """Modules that store a tensor of this name, in file order."""
        return (name.removesuffix("." + suffix) for name in self.stored if name.endswith("." + suffix))

    def has(self, module: str, suffix: str) -> bool:
        return f"{module}.{suffix}" in self.stored

    def take(self, module: str, suffix: str, dtypes: Sequence[str], shape: tuple[int | None, ...] | None = None) -> StoredTensor:
        """None in `shape` is any size. Raises SourceError when the tensor is missing, or has another type or shape."""
        name = f"{module}.{suffix}"
        tensor = self.stored.get(name)
        if tensor is None:
            raise SourceError(f"{name} is missing, without which {self.method} weights cannot be decoded. {AGAIN}")
        self.taken.add(name)
        if dtypes and tensor.dtype not in dtypes:
            raise SourceError(f"{tensor.origin} is stored as {tensor.dtype}; {self.method} has it as {' or '.join(dtypes)}")
        if shape is not None and not _fits(tensor.shape, shape):
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise SourceError(f"{tensor.origin} has shape {list(tensor.shape)}, but {self.method} of this module's size has [{wanted}]")
        return tensor

    def drop(self, module: str, *suffixes: str) -> None:
        """Take tensors that say nothing about weights, where they are there."""
        self.taken |= {f"{module}.{suffix}" for suffix in suffixes} & self.stored.keys()

    def scalar(self, module: str, suffix: str) -> Any:
        """The one number of a tensor."""
        tensor = self.take(module, suffix, ())
        values = tensor.array().reshape(-1)
        if len(values) != 1:
            raise SourceError(f"{tensor.origin} has shape {list(tensor.shape)}, expected one number")
        return values[0].item()

    def text(self, module: str, suffix: str) -> str:
        """A string stored as the codes of its characters."""
        return "".join(map(chr, self.take(module, suffix, ("U8",)).array().reshape(-1).tolist()))


def _fits(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(found) == len(wanted) and all(w in (None, n) for n, w in zip(found, wanted, strict=True))
