"""LoRA adapters in GGUF: what their header says, and whether llama.cpp may see them at all.

    general.type "adapter", general.architecture the model's, adapter.type "lora"
    adapter.lora.alpha                 F32; strength is alpha / rank of each pair, or 1 when it is 0 or absent
    adapter.alora.invocation_tokens    UINT32s; an aLoRA acts from these tokens of a prompt on, and not at all without them
    <tensor>.lora_a (rank, n_in), <tensor>.lora_b (n_out, rank)
    token_embd.weight.lora_a (n_vocab, rank), token_embd.weight.lora_b (n_embd, rank)

llama.cpp (`llama_adapter_lora` of the version in llama-cpp-python 0.3.36) refuses some bad files and ends the process, or computes
nonsense in silence, on others; the tests of this module list which. All is checked here first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeq.errors import AdapterError
from edgeq.gguf_fields import ValueType
from edgeq.gguf_file import Header, TensorInfo, padded, read_header
from edgeq.runtime.gguf_facts import GgufFacts
from edgeq.tensors import from_file

GRIDS = ("F32", "F16", "BF16", "Q8_0")
EMBED, HEAD = "token_embd.weight", "output.weight"
# The matrices that graphs multiply through `build_lora_mm`, and the table that `build_inp_embd` reads; llama.cpp ignores pairs of others.
_TARGET = re.compile(r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down))\.weight|(output|token_embd)\.weight")
_PAIR = re.compile(r"(?P<target>.+)\.lora_(?P<half>[ab])")
_PADDING = 128  # bytes between tensors in a buffer: 32 on CPUs, up to 128 elsewhere
_AGAIN = "Convert or download the adapter again."
_OWN_BASE = "Use the model that the adapter was made for."


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """A sound adapter on disk.

    ranks, shapes: of each tensor it changes, the rank of its pair and (n_out, n_in), of the embedding table (n_embd, n_vocab).
    invocation: token ids of an aLoRA, empty for any other. resident_bytes: at most what it takes in memory. stamp: size and time of the
    file when it was read.
    """

    path: Path
    arch: str
    alpha: float
    ranks: Mapping[str, int]
    shapes: Mapping[str, tuple[int, int]]
    invocation: tuple[int, ...]
    resident_bytes: int
    stamp: tuple[int, int]


def file_stamp(path: Path) -> tuple[int, int]:
    """Size and time of last change, which tell one state of a file from another. Raises AdapterError when it is gone."""
    try:
        stat = path.stat()
    except OSError as err:
        raise AdapterError(f"{path}: cannot be read: {err.strerror or err}. Give a GGUF adapter.") from err
    return stat.st_size, stat.st_mtime_ns


def read_adapter(path: Path) -> AdapterFile:
    """Read and check all of an adapter that can be checked without its model, values included.

    Raises AdapterError, or SourceError for what is no GGUF file, naming the file and the first fault.
    """
    stamp = file_stamp(path)
    header = read_header(path)
    arch, alpha, invocation = _metadata(header)
    halves: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in header.tensors.items():
        match = _PAIR.fullmatch(name)
        if match is None:
            raise AdapterError(f"{path}: tensor {name} is neither lora_a nor lora_b, so llama.cpp would leave its effect out. {_AGAIN}")
        if not _TARGET.fullmatch(match["target"]):
            raise AdapterError(f"{path}: llama.cpp applies no adapter to {match['target']}. Merge this adapter into its model instead.")
        halves.setdefault(match["target"], {})[match["half"]] = tensor
    if not halves:
        raise AdapterError(f"{path}: the adapter has no tensors. {_AGAIN}")
    ranks, shapes = {}, {}
    for target, pair in halves.items():
        for half in "ab":
            if half not in pair:
                raise AdapterError(f"{path}: {target}.lora_{half} is missing. {_AGAIN}")
            _check_half(path, pair[half])
        ranks[target], shapes[target] = _pair_sizes(path, target, pair["a"].shape, pair["b"].shape)
    for tensor in header.tensors.values():
        _check_finite(path, tensor)
    return AdapterFile(
        path=path,
        arch=arch,
        alpha=alpha,
        ranks=ranks,
        shapes=shapes,
        invocation=invocation,
        resident_bytes=sum(padded(tensor.nbytes, _PADDING) for tensor in header.tensors.values()),
        stamp=stamp,
    )


def check_base(adapter: AdapterFile, base: GgufFacts) -> None:
    """Raise AdapterError naming the first thing in which an adapter does not fit a model."""
    if adapter.arch != base.arch:
        raise AdapterError(f"{adapter.path}: is for architecture {adapter.arch!r}, {base.path.name} is {base.arch!r}. {_OWN_BASE}")
    for target, (n_out, n_in) in adapter.shapes.items():
        if target == EMBED and HEAD not in base.tensors:
            raise AdapterError(
                f"{adapter.path}: changes {EMBED}, which {base.path.name} uses as its output matrix too; llama.cpp cannot keep such an "
                "adapter. Merge it into its model instead."
            )
        tensor = base.tensors.get(target)
        if tensor is None:
            raise AdapterError(f"{adapter.path}: changes {target}, which {base.path.name} does not have. {_OWN_BASE}")
        expected = tuple(reversed(tensor.shape)) if target == EMBED else tensor.shape
        if expected != (n_out, n_in):
            raise AdapterError(
                f"{adapter.path}: its {target} goes from {n_in} to {n_out} values, that of {base.path.name} from {expected[-1]} to "
                f"{expected[0]}. {_OWN_BASE} For a cut model that is an adapter cut alike."
            )
    outside = [token for token in adapter.invocation if token >= base.n_vocab]
    if outside:
        raise AdapterError(
            f"{adapter.path}: invocation token {outside[0]} is not one of {base.path.name}, which has 0 to {base.n_vocab - 1}. {_OWN_BASE}"
        )


def _metadata(header: Header) -> tuple[str, float, tuple[int, ...]]:
    """(architecture, alpha, invocation tokens). Types matter: llama.cpp aborts on a string or number of another type."""
    path = header.path

    def text(key: str, expected: str | None = None) -> str:
        value = header.value(key)
        if not isinstance(value, str) or expected not in (None, value):
            wanted = "a name" if expected is None else repr(expected)
            hint = "It is no adapter." if key == "general.type" else "Only LoRA adapters can be kept." if expected else _AGAIN
            raise AdapterError(f"{path}: {key} is {value!r}, expected {wanted}. {hint}")
        return value

    text("general.type", "adapter")
    text("adapter.type", "lora")
    arch = text("general.architecture")
    alpha, field = header.value("adapter.lora.alpha", 0.0), header.fields.get("adapter.lora.alpha")
    if field is not None and (field.type is not ValueType.FLOAT32 or not math.isfinite(alpha)):
        raise AdapterError(f"{path}: adapter.lora.alpha is {alpha!r} ({field.type.name}), expected a finite FLOAT32. {_AGAIN}")
    key = "adapter.alora.invocation_tokens"
    tokens = header.fields.get(key)
    if tokens is not None and (tokens.item_type is not ValueType.UINT32 or not tokens.count):
        raise AdapterError(f"{path}: {key} is {tokens.value!r}, expected a list of UINT32 token ids. {_AGAIN}")
    return arch, alpha, tuple(tokens.value) if tokens is not None else ()


def _check_half(path: Path, tensor: TensorInfo) -> None:
    if len(tensor.shape) > 2:
        raise AdapterError(f"{path}: {tensor.name} has shape {list(tensor.shape)}, expected a matrix. {_AGAIN}")
    if tensor.grid.name not in GRIDS:
        raise AdapterError(f"{path}: {tensor.name} is {tensor.grid.name}; expected one of {', '.join(GRIDS)}. {_AGAIN}")


def _pair_sizes(path: Path, target: str, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, tuple[int, int]]:
    """(rank, (n_out, n_in)) of a pair. A vector is a matrix of one row, as in ggml."""
    (a_rows, a_cols), (b_rows, b_cols) = ((1, *shape)[-2:] for shape in (a, b))
    rank, n_in = (a_cols, a_rows) if target == EMBED else (a_rows, a_cols)
    if rank != b_cols:
        raise AdapterError(f"{path}: lora_a and lora_b of {target} are {list(a)} and {list(b)}, of rank {rank} and {b_cols}. {_AGAIN}")
    return rank, (b_rows, n_in)


def _check_finite(path: Path, tensor: TensorInfo) -> None:
    shape = (1, *tensor.shape)[-2:]
    lazy = from_file(path, offset=tensor.offset, shape=shape, grid=tensor.grid, origin=f"{path}: {tensor.name}")
    if tensor.grid.name == "Q8_0":
        scales = np.ascontiguousarray(lazy.packed().reshape(-1, tensor.grid.block_bytes)[:, :2]).view(np.float16)
        finite = np.isfinite(scales).all()
    else:
        finite = np.isfinite(lazy.decode()).all()
    if not finite:
        raise AdapterError(f"{path}: {tensor.name} has values that are not finite. The adapter is damaged; get a sound one.")
