"""What `edgeq inspect` tells about a package, a GGUF file or an opened model, as one JSON-ready document each. Reads no weights.

ONNX folders are described by `edgeq.runtime.onnx_describe`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgeq.gguf_file import Header, read_header
from edgeq.grids import Grid
from edgeq.model import Model, Vocabulary
from edgeq.package import Package
from edgeq.spec import ModelSpec

_ADAPTER_FACTS = ("name", "disposition", "kind", "scale", "rank", "bytes", "lost_energy", "path")
_LONG = 64  # arrays with more items are told by their length


# By port: how freely a model can be cut, and why not more freely. The carrier knows; it comes in as values.
Cuttable = Mapping[str, Mapping[str, str]]


def describe_package(package: Package) -> dict[str, Any]:
    manifest = package.manifest
    elastic = manifest.get("elastic")
    return {
        "kind": "package",
        "status": package.status,
        "model": dict(manifest["model"]),
        "export": dict(manifest["export"]),
        "artifacts": [record.to_json() for record in package.artifacts],
        "side_files": [record.to_json() for record in package.side_files],
        "tokenizer": dict(manifest["tokenizer"]),
        "memory": dict(manifest["plan"]["memory"]),
        "cuts": [] if elastic is None else [dict(size) for size in elastic["sizes"]],
        "cuttable": [] if elastic is None else _ports(elastic["cuttable"]),
        "adapters": [{key: adapter.get(key) for key in _ADAPTER_FACTS} for adapter in manifest.get("adapters", [])],
        "regrid": dict(manifest["regrid"]),
        "gate": manifest["gate"],
        "tools": dict(manifest["tools"]),
        "formats": _planned_formats(manifest["plan"]["tensors"]),
    }


def _planned_formats(tensors: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As `_by_grid`, of what a manifest says was written."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for tensor in tensors:
        rows.setdefault(tensor["grid"], []).append(tensor)
    described = []
    for name, members in rows.items():
        weights, n_bytes = sum(math.prod(t["shape"]) for t in members), sum(t["bytes"] for t in members)
        row = {"format": name, "tensors": len(members), "weights": weights, "bytes": n_bytes}
        described.append({**row, "bits_per_weight": round(8 * n_bytes / weights, 4)})
    return sorted(described, key=lambda row: -row["bytes"])


def describe_gguf(path: Path, cuttable: Cuttable | None = None) -> dict[str, Any]:
    """cuttable: what an elastic export of this file could be cut by; None where that is not known."""
    header = read_header(path)
    return {
        "kind": "gguf",
        "file": {"path": str(path), "bytes": header.file_bytes, "version": header.version, "alignment": header.alignment},
        "metadata": _metadata(header),
        "cuttable": _ports(cuttable or {}),
        "formats": _by_grid((t.grid, t.shape, t.nbytes) for t in header.tensors.values()),
    }


def describe_model(model: Model, cuttable: Cuttable | None = None) -> dict[str, Any]:
    """cuttable: as for `describe_gguf`."""
    return {
        "kind": "model",
        "name": model.name,
        "format": model.format,
        "quantization": None if model.quantization is None else dict(model.quantization),
        "files": [file.name for file in model.files],
        "spec": _spec(model.spec),
        "tokenizer": {**_tokenizer(model.tokenizer.vocabulary), "differs": list(model.tokenizer.differs)},
        "cuttable": _ports(cuttable or {}),
        "formats": _by_grid((t.grid, t.shape, t.nbytes) for t in model.tensors.values()),
    }


def _ports(cuttable: Cuttable) -> list[dict[str, str]]:
    return [{"port": port, "cut": cut["freedom"], "reason": cut["reason"]} for port, cut in cuttable.items()]


def _metadata(header: Header) -> dict[str, Any]:
    described = {}
    for key, field in header.fields.items():
        described[key] = f"{field.count:,} items" if field.item_type is not None and field.count > _LONG else field.value
    return described


def _by_grid(tensors: Iterable[tuple[Grid, tuple[int, ...], int]]) -> list[dict[str, Any]]:
    counts: Counter[Grid] = Counter()
    weights: Counter[Grid] = Counter()
    sizes: Counter[Grid] = Counter()
    for grid, shape, n_bytes in tensors:
        counts[grid] += 1
        weights[grid] += math.prod(shape)
        sizes[grid] += n_bytes
    return [
        {
            "format": grid.name,
            "tensors": counts[grid],
            "weights": weights[grid],
            "bytes": sizes[grid],
            "bits_per_weight": round(grid.bits, 4),
        }
        for grid, _ in sizes.most_common()
    ]


def _spec(spec: ModelSpec) -> dict[str, Any]:
    attention, mlps = spec.attention, spec.mlps
    return {
        "family": spec.family,
        "n_layers": spec.n_layers,
        "n_embd": spec.n_embd,
        "n_vocab": spec.n_vocab,
        "n_ctx": spec.n_ctx,
        "n_heads": _same(b.n_heads for b in attention),
        "n_kv_heads": _same(b.n_kv_heads for b in attention),
        "head_dim": _same(b.head_dim for b in attention),
        "n_ff": _same(b.n_ff for b in mlps),
        "windows": _same(b.window for b in attention),
        "rope": {"kind": spec.rope.kind, "dim": spec.rope.dim, "base": spec.rope.base},
        "tied": spec.tied,
        "biases": sorted(spec.biases),
    }


def _same(values: Iterable[int | None]) -> int | list[int | None] | None:
    """The one value that all layers share, else the list."""
    listed = list(values)
    return listed[0] if len(set(listed)) == 1 else listed


def _tokenizer(vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "kind": vocabulary.kind,
        "pre": vocabulary.pre,
        "n_tokens": len(vocabulary.tokens),
        "special_ids": dict(vocabulary.special_ids),
        "chat_template": vocabulary.chat_template,
    }
