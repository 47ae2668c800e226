"""What a GGUF header says about sizes, in llama.cpp's terms, and whether llama.cpp may see the file at all.

llama.cpp answers most bad files with an error, but some header values reach an assertion that ends the process. Those are checked
here first, from the header alone. Sources: `load_hparams` in llama-model.cpp, the graph builders in models/*.cpp and
`llama_vocab::impl::load` in llama-vocab.cpp of llama.cpp (the version that llama-cpp-python 0.3.36 carries).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeq.errors import SourceError, UnsupportedError
from edgeq.families import FAMILIES
from edgeq.gguf_file import Header, TensorLayout, read_parts
from edgeq.runtime.cut_plan import LAYERED

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
ROPE_SCALING_TYPES = ("none", "linear", "yarn", "longrope")
PARTIAL_ROTARY = frozenset({"phi3", "gemma3"})  # graphs that rotate the first n_rot dimensions of a head; the others want all
WINDOWED = frozenset({"gemma3"})  # loaders that keep a smaller cache for layers with a sliding window; phi3 ignores its window
DEFAULT_WINDOW_PATTERN = 6  # gemma3: every sixth layer looks back without limit
ARCHITECTURES = frozenset({family.gguf_arch for family in FAMILIES} | LAYERED)


@dataclass(frozen=True, kw_only=True)
class GgufFacts:
    """Sizes of a model on disk.

    n_heads, n_kv_heads, windowed: one value per layer. window: tokens a windowed layer looks back, 0 when no layer is windowed.
    tensor_bytes: bytes of all tensors, over all parts of a split file, without padding. tensors: shape and grid of each, by name.
    """

    path: Path
    arch: str
    name: str | None
    n_layers: int
    n_embd: int
    n_ctx_train: int
    n_vocab: int
    n_heads: tuple[int, ...]
    n_kv_heads: tuple[int, ...]
    key_length: int
    value_length: int
    window: int
    windowed: tuple[bool, ...]
    tensor_bytes: int
    tensors: Mapping[str, TensorLayout] = field(repr=False)


def read_facts(path: Path) -> GgufFacts:
    """Read and check the header of a GGUF file or of all parts of a split one.

    Raises SourceError for a file that is missing, damaged or would make llama.cpp abort; UnsupportedError for another architecture.
    """
    if not path.exists():
        raise SourceError(f"{path} does not exist. Give a GGUF file or a package folder.")
    if not path.is_file():
        raise SourceError(f"{path} is not a regular file. Give a GGUF file.")
    headers = read_parts(path)
    return _facts(headers[0], {name: tensor for header in headers for name, tensor in header.tensors.items()})


def _facts(header: Header, tensors: Mapping[str, TensorLayout]) -> GgufFacts:
    path, arch = header.path, header.value("general.architecture")
    if arch is None:
        raise SourceError(f"{path}: has no general.architecture. It is not a model; fetch or convert it again.")
    if arch not in ARCHITECTURES:
        raise UnsupportedError(f"{path}: architecture {arch!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}")
    reader = _Reader(header, arch)
    n_layers = reader.integer("block_count")
    if not 1 <= n_layers <= MAX_LAYERS:
        raise reader.fault("block_count", n_layers, f"expected 1 to {MAX_LAYERS}")
    n_heads = reader.per_layer("attention.head_count", n_layers)
    n_kv_heads = reader.per_layer("attention.head_count_kv", n_layers, default=n_heads)
    n_embd = reader.integer("embedding_length")
    if n_heads[0] < 1:
        raise reader.fault("attention.head_count", n_heads[0], "the first layer must have attention heads")
    key_length = reader.integer("attention.key_length", n_embd // n_heads[0])
    facts = GgufFacts(
        path=path,
        arch=arch,
        name=header.value("general.name"),
        n_layers=n_layers,
        n_embd=n_embd,
        n_ctx_train=reader.integer("context_length"),
        n_vocab=_n_vocab(header),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        key_length=key_length,
        value_length=reader.integer("attention.value_length", n_embd // n_heads[0]),
        window=reader.integer("attention.sliding_window", 0) if arch in WINDOWED else 0,
        windowed=_windowed(reader, n_layers) if arch in WINDOWED else (False,) * n_layers,
        tensor_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        tensors=tensors,
    )
    _check_heads(reader, facts)
    if arch in LAYERED and reader.per_layer("feed_forward_length", n_layers)[-1] == 0:
        raise reader.fault("feed_forward_length", 0, "the last layer must have neurons, or llama.cpp returns logits of other tokens")
    _check_experts(reader)
    scaling = reader.value("rope.scaling.type", "linear")
    if scaling not in ROPE_SCALING_TYPES:
        raise reader.fault("rope.scaling.type", scaling, f"expected one of {', '.join(ROPE_SCALING_TYPES)}")
    return facts


class _Reader:
    """Fields below the architecture's prefix, with messages that name them."""

    def __init__(self, header: Header, arch: str) -> None:
        self.header, self.arch = header, arch

    def fault(self, key: str, value: Any, expected: str) -> SourceError:
        return SourceError(f"{self.header.path}: {self.arch}.{key} is {value!r}; {expected}. Convert the model again.")

    def value(self, key: str, default: Any = None) -> Any:
        return self.header.value(f"{self.arch}.{key}", default)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.value(key, default)
        if value is None:
            raise SourceError(f"{self.header.path}: has no {self.arch}.{key}. Convert the model again.")
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.fault(key, value, "expected a number of at least 0")
        return value

    def per_layer(self, key: str, n_layers: int, *, default: Sequence[int] | None = None) -> tuple[int, ...]:
        """A value for each layer from a scalar or an array."""
        value = self.value(key)
        if value is None and default is not None:
            return tuple(default)
        if not isinstance(value, list):
            return (self.integer(key),) * n_layers
        if len(value) != n_layers or not all(isinstance(v, int) and v >= 0 for v in value):
            raise self.fault(key, value, f"expected {n_layers} numbers of at least 0, one per layer")
        return tuple(value)


def _n_vocab(header: Header) -> int:
    """Number of tokens; refuses a vocabulary that repeats a token, which llama.cpp answers with an abort."""
    tokens = header.fields.get("tokenizer.ggml.tokens")
    if tokens is None or not isinstance(tokens.value, list):
        raise SourceError(f"{header.path}: has no tokenizer.ggml.tokens, so it cannot turn text into tokens. Convert the model again.")
    if len(set(tokens.value)) != tokens.count:
        first = {token: i for i, token in reversed(list(enumerate(tokens.value)))}
        i, token = next((i, token) for i, token in enumerate(tokens.value) if first[token] != i)
        raise SourceError(f"{header.path}: tokens {first[token]} and {i} are both {token!r}; each must be unique. Convert the model again.")
    return tokens.count


def _windowed(reader: _Reader, n_layers: int) -> tuple[bool, ...]:
    if not reader.integer("attention.sliding_window", 0):
        return (False,) * n_layers
    pattern = reader.value("attention.sliding_window_pattern", DEFAULT_WINDOW_PATTERN)
    if isinstance(pattern, list):
        if len(pattern) != n_layers:
            raise reader.fault("attention.sliding_window_pattern", pattern, f"expected {n_layers} values, one per layer")
        return tuple(bool(v) for v in pattern)
    period = reader.integer("attention.sliding_window_pattern", DEFAULT_WINDOW_PATTERN)
    return tuple(period == 0 or i % period < period - 1 for i in range(n_layers))


def _check_heads(reader: _Reader, facts: GgufFacts) -> None:
    if facts.key_length != facts.value_length:
        raise reader.fault("attention.value_length", facts.value_length, f"expected {facts.key_length}, the length of a key")
    n_rot = reader.integer("rope.dimension_count", facts.key_length)
    whole = facts.arch not in PARTIAL_ROTARY
    if n_rot > facts.key_length or n_rot % 2 or (whole and n_rot != facts.key_length):
        expected = (
            f"expected {facts.key_length}, the head size" if whole else f"expected an even number up to {facts.key_length}, the head size"
        )
        raise reader.fault("rope.dimension_count", n_rot, expected)
    for layer, (n_heads, n_kv_heads) in enumerate(zip(facts.n_heads, facts.n_kv_heads, strict=True)):
        if n_kv_heads and n_heads % n_kv_heads:
            raise reader.fault("attention.head_count_kv", n_kv_heads, f"layer {layer} has {n_heads} heads, which do not divide into that")


def _check_experts(reader: _Reader) -> None:
    for key in ("expert_count", "expert_used_count", "expert_group_count"):
        if reader.value(key, 0):
            raise UnsupportedError(
                f"{reader.header.path}: {reader.arch}.{key} is {reader.value(key)!r}; mixtures of experts are not supported"
            )
