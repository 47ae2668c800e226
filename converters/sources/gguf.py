"""GGUF files as a source: metadata, lazy tensors under canonical names, tokenizer.

Nothing but the header is read here. Tensors stay in the grid they are stored in; q and k rows that GGUF keeps as interleaved pairs
("norm" order) are taken in rotate-half order, fused projections are cut into theirs. Both are moves of packed rows, so a block
tensor that goes back to GGUF unchanged has the same bytes again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.converters.sources.gguf_spec import RULES, Metadata, read_spec
from edgeq.converters.tokenizers.gguf import read_gguf_tokenizer
from edgeq.errors import SourceError, UnsupportedError
from edgeq.families import GGUF_NAMES, Family, family_of_gguf
from edgeq.gguf_file import Header, TensorInfo, read_parts
from edgeq.model import Model
from edgeq.spec import Attention, Mlp, ModelSpec
from edgeq.tensors import LazyTensor, check_finite, from_file, from_values, slice_rows, take_rows

# `general.*` keys that describe the file, not the model: the carrier writes its own.
_OF_THE_FILE = frozenset({"architecture", "type", "file_type", "quantization_version", "alignment"})


def read_gguf_model(path: Path) -> Model:
    """Open a GGUF model; of a split one, any part may be named.

    Raises SourceError for files that are damaged or contradict themselves, UnsupportedError for families, keys and tensors without
    a row of ours, TokenizerError for tokenizers.
    """
    headers = read_parts(path)
    header = headers[0]
    arch, family = _family(header)
    stored = _Stored(headers)
    n_vocab = stored.n_vocab(header)
    spec = read_spec(
        Metadata(header, arch),
        family,
        n_vocab=n_vocab,
        tied=not stored.has("output.weight"),
        biases=frozenset(role for role in RULES[arch].biases if stored.any_bias(role)),
        vector=stored.vector,
    )
    tensors = stored.in_file_order(_tensors(stored, family, spec))
    stored.refuse_rest()
    metadata = _general(header)
    return Model(
        name=str(metadata.get("name") or path.stem),
        spec=spec,
        tensors=tensors,
        tokenizer=read_gguf_tokenizer(header),
        files=tuple(h.path for h in headers),
        format="gguf",
        metadata=metadata,
        gguf_fields=header.fields,
    )


def _family(header: Header) -> tuple[str, Family]:
    """`general.architecture`, and the family as which such a file is read."""
    kind = header.value("general.type", "model")
    if kind != "model":
        raise UnsupportedError(f"{header.path}: holds {kind!r}, not a model. Name the model's own GGUF file.")
    arch = header.value("general.architecture")
    if not isinstance(arch, str):
        raise SourceError(f"{header.path}: general.architecture is missing. The file is incomplete; convert the model again.")
    try:
        return arch, family_of_gguf(arch)
    except UnsupportedError as err:
        raise UnsupportedError(f"{header.path}: {err}") from err


def _general(header: Header) -> Mapping[str, Any]:
    general = {key.removeprefix("general."): key for key in header.fields if key.startswith("general.")}
    return {name: header.value(key) for name, key in general.items() if name not in _OF_THE_FILE}


class _Stored:
    """Tensors of a file (or of its parts) by GGUF name; what is taken is ticked off."""

    def __init__(self, headers: tuple[Header, ...]) -> None:
        self.path = headers[0].path
        self._found: dict[str, tuple[Path, TensorInfo]] = {
            name: (header.path, info) for header in headers for name, info in header.tensors.items()
        }
        self._left = set(self._found)

    def has(self, name: str) -> bool:
        return name in self._found

    def any_bias(self, role: str) -> bool:
        """Whether any layer has a bias for this role, be it within the fused one."""
        roles = (role, "wqkv") if role in ("wq", "wk", "wv") else (role,)
        ends = tuple(GGUF_NAMES[r].removeprefix("blk.{i}") + ".bias" for r in roles)
        return any(name.startswith("blk.") and name.endswith(ends) for name in self._found)

    def n_vocab(self, header: Header) -> int:
        """Rows of the embedding, which must be as many as there are tokens."""
        embed = self._found.get("token_embd.weight")
        if embed is None:
            raise self._missing("token_embd.weight")
        tokens = header.fields.get("tokenizer.ggml.tokens")
        rows = embed[1].shape[-2] if len(embed[1].shape) > 1 else 1
        if tokens is not None and tokens.count != rows:
            raise SourceError(
                f"{self.path}: token_embd.weight has {rows} rows, but tokenizer.ggml.tokens lists {tokens.count} tokens. "
                "The file contradicts itself; convert the model again."
            )
        return rows

    def take(self, name: str, shape: tuple[int, ...]) -> LazyTensor:
        """The tensor `name`, which must have this shape. Raises SourceError."""
        if name not in self._found:
            raise self._missing(name)
        path, info = self._found[name]
        self._left.discard(name)
        have = info.shape
        while len(have) > len(shape) and have[0] == 1:
            have = have[1:]
        if have != shape:
            raise SourceError(
                f"{path}: tensor {name} has shape {list(info.shape)}, expected {list(shape)} by the metadata. "
                "The file contradicts itself; convert the model again."
            )
        return from_file(path, offset=info.offset, shape=shape, grid=info.grid, origin=f"{path}: {name}")

    def vector(self, name: str, n: int) -> tuple[float, ...] | None:
        """Values of a small tensor of n positive numbers, or None if it is not there."""
        if not self.has(name):
            return None
        tensor = self.take(name, (n,))
        values = tensor.decode()
        check_finite(values, origin=tensor.origin)
        if values.min() <= 0:
            raise SourceError(f"{tensor.origin}: value {values.min()} found, all must be positive. Convert the model again.")
        return tuple(values.tolist())

    def in_file_order(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """The same tensors in the order of the file, so that a carrier can keep it. Parts of a fused one stay together."""
        position = {f"{path}: {name}": i for i, (name, (path, _)) in enumerate(self._found.items())}
        return dict(sorted(tensors.items(), key=lambda item: position[item[1].origin]))

    def refuse_rest(self) -> None:
        if self._left:
            rest = sorted(self._left)
            shown = ", ".join(rest[:5]) + (f" and {len(rest) - 5} more" if len(rest) > 5 else "")
            raise UnsupportedError(f"{self.path}: tensors that this family does not have: {shown}")

    def _missing(self, name: str) -> SourceError:
        return SourceError(f"{self.path}: tensor {name} is missing. The file is incomplete; fetch or convert it again.")


def _tensors(stored: _Stored, family: Family, spec: ModelSpec) -> dict[str, LazyTensor]:
    """Every tensor of the model under its canonical name."""
    tensors = {"embed.weight": stored.take("token_embd.weight", (spec.n_vocab, spec.n_embd))}
    for block in spec.blocks:
        if isinstance(block, Attention):
            roles = _attention(stored, family, spec, block)
        else:
            roles = _mlp(stored, family, spec, block)
        tensors |= {f"layers.{block.layer}.{role}": tensor for role, tensor in roles.items()}
    tensors["final_norm.weight"] = stored.take("output_norm.weight", (spec.n_embd,))
    if not spec.tied:
        tensors["head.weight"] = stored.take("output.weight", (spec.n_vocab, spec.n_embd))
    return tensors


def _attention(stored: _Stored, family: Family, spec: ModelSpec, block: Attention) -> dict[str, LazyTensor]:
    """Tensors of one attention block, by role and suffix ("wq.weight", ...)."""
    n_q, n_kv = block.n_heads * block.head_dim, block.n_kv_heads * block.head_dim
    shapes = {"attn_norm": (spec.n_embd,), "wo": (spec.n_embd, n_q)}
    if family.post_norms:
        shapes["post_attn_norm"] = (spec.n_embd,)
    if family.qk_norm:
        shapes |= {"q_norm": (block.head_dim,), "k_norm": (block.head_dim,)}
    tensors = _weights(stored, spec, block.layer, shapes)

    rows = {"wq": n_q, "wk": n_kv, "wv": n_kv}
    projections = _projections(stored, block.layer, rows, ".weight", (spec.n_embd,))
    if "wq" in spec.biases:
        projections |= _projections(stored, block.layer, rows, ".bias", ())
    if family.gguf_rope == "norm":
        for name, heads in (("wq", block.n_heads), ("wk", block.n_kv_heads)):
            order = rotate_half_rows(heads, block.head_dim)
            for key in {name + ".weight", name + ".bias"} & projections.keys():
                projections[key] = take_rows(projections[key], order)
    return tensors | projections


def _mlp(stored: _Stored, family: Family, spec: ModelSpec, block: Mlp) -> dict[str, LazyTensor]:
    shapes = {"mlp_norm": (spec.n_embd,), "down": (spec.n_embd, block.n_ff)}
    if family.post_norms:
        shapes["post_mlp_norm"] = (spec.n_embd,)
    if family.fused_gate_up:
        fused = stored.take(f"blk.{block.layer}.ffn_up.weight", (2 * block.n_ff, spec.n_embd))
        halves = {"gate.weight": slice_rows(fused, 0, block.n_ff), "up.weight": slice_rows(fused, block.n_ff, 2 * block.n_ff)}
        return _weights(stored, spec, block.layer, shapes) | halves
    return _weights(stored, spec, block.layer, shapes | {"gate": (block.n_ff, spec.n_embd), "up": (block.n_ff, spec.n_embd)})


def _weights(stored: _Stored, spec: ModelSpec, layer: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    """Weights of these shapes by role, and the biases that the spec has for them: zeros in layers that have none, as in a cut file.

    Loaders that read biases of these roles do not require them.
    """
    tensors = {}
    for role, shape in shapes.items():
        name = GGUF_NAMES[role].format(i=layer)
        tensors[role + ".weight"] = stored.take(name + ".weight", shape)
        if role in spec.biases:
            bias = name + ".bias"
            none = from_values(np.zeros(shape[0], dtype=np.float32), origin=tensors[role + ".weight"].origin)
            tensors[role + ".bias"] = stored.take(bias, shape[:1]) if stored.has(bias) else none
    return tensors


def _projections(stored: _Stored, layer: int, rows: Mapping[str, int], suffix: str, width: tuple[int, ...]) -> dict[str, LazyTensor]:
    """q, k and v of one layer, from one fused tensor (rows in this order) or from one each."""
    fused_name = GGUF_NAMES["wqkv"].format(i=layer) + suffix
    if not stored.has(fused_name):
        return {role + suffix: stored.take(GGUF_NAMES[role].format(i=layer) + suffix, (n, *width)) for role, n in rows.items()}
    fused = stored.take(fused_name, (sum(rows.values()), *width))
    stops = np.cumsum(list(rows.values())).tolist()
    return {role + suffix: slice_rows(fused, stop - n, stop) for (role, n), stop in zip(rows.items(), stops, strict=True)}


def rotate_half_rows(n_heads: int, head_dim: int) -> npt.NDArray[np.intp]:
    """Stored row for each row in rotate-half order, when heads are stored as interleaved pairs: 0 2 4 ... 1 3 5 ... in every head."""
    rows = np.arange(n_heads * head_dim).reshape(n_heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)
