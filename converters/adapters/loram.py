"""LoRAM: adapters that were trained on a pruned model and run on the full one (arXiv:2502.13533).

The adapter is a PEFT folder with the pruned model's shapes. What was taken out stands in lists, one file per pruned module in the form of
junzhang-zj/LoRAM (step 3), or in edgeq_adapter.json:

    model.layers.N.mlp.gate_proj.pt       {"pruned_idx": FFN channels}
    model.layers.N.self_attn.k_proj.pt    {"pruned_idx": rows of k}; whole KV heads, whose query heads go with them

Of the two ways in which the authors fill what was taken out, only zeros are offered: the other draws random numbers that no seed fixes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.converters.adapters.peft import read_peft_folder
from edgeq.converters.sources.json_file import Section
from edgeq.deltas.adapter import Adapter
from edgeq.deltas.delta import Delta, Indices
from edgeq.deltas.index_map import IndexMap, query_rows, recover, restrict
from edgeq.deltas.lora import LoRA
from edgeq.elastic import Kept
from edgeq.errors import ShapeError, SourceError, UnsupportedError
from edgeq.model import Model
from edgeq.ports import with_sizes
from edgeq.spec import Attention, Mlp

_MODULES = ("mlp.gate_proj", "self_attn.k_proj")


@dataclass(frozen=True, kw_only=True, eq=False)
class Removed:
    """What was taken out of one layer: FFN channels, and rows of k, all of whole KV heads. None: nothing."""

    channels: Indices | None = None
    keys: Indices | None = None


def has_lists(folder: Path) -> bool:
    return any(next(folder.glob(f"model.layers.*.{module}.pt"), None) for module in _MODULES)


def read_loram(folder: Path, model: Model, *, options: Section | None = None, name: str | None = None) -> Adapter:
    """A PEFT adapter of the pruned model, on the full one. options: of edgeq_adapter.json, where the lists are not files of this folder."""
    removed = _removed(folder, model, options)
    adapter = read_peft_folder(folder, replace(model, spec=with_sizes(model.spec, _kept(model, removed))), name=name)
    note = "trained on a pruned model: it changes nothing of the parts that were taken out"
    return replace(recovered(adapter, model, removed), notes=(*adapter.notes, note))


def read_pruned_indices(folder: Path, model: Model) -> dict[int, Removed]:
    """LoRAM's lists, by layer. Raises SourceError for files that are no such lists, or when there is none."""
    found = {
        i: Removed(
            channels=_list(folder / f"model.layers.{i}.mlp.gate_proj.pt"), keys=_list(folder / f"model.layers.{i}.self_attn.k_proj.pt")
        )
        for i, _ in model.spec.layers()
    }
    if all(one.channels is None and one.keys is None for one in found.values()):
        raise SourceError(
            f"{folder} has no model.layers.N.mlp.gate_proj.pt and no model.layers.N.self_attn.k_proj.pt. Name LoRAM's folder."
        )
    return found


def recovered(adapter: Adapter, model: Model, removed: Mapping[int, Removed]) -> Adapter:
    """An adapter of the pruned model, on the full one. Raises ShapeError or UnsupportedError naming the tensor that does not fit."""
    return _moved(adapter, model, removed, recover, "spread over the full model")


def restricted(adapter: Adapter, model: Model, removed: Mapping[int, Removed]) -> Adapter:
    """What of an adapter of the full model acts on what pruning has left. model: the full one. Raises as `recovered`."""
    return _moved(adapter, model, removed, restrict, "cut with the model")


def _moved(adapter: Adapter, model: Model, removed: Mapping[int, Removed], move: Callable[[LoRA, IndexMap], LoRA], what: str) -> Adapter:
    maps = {name: index for i, lists in removed.items() for name, index in _maps(i, lists, model).items()}
    deltas: dict[str, Delta] = {}
    for name, delta in adapter.deltas.items():
        index = maps.get(name)
        if index is None:
            deltas[name] = delta
            continue
        if not isinstance(delta, LoRA):
            raise UnsupportedError(f"adapter {adapter.name!r}: its change of {name} is no LoRA, so it cannot be {what}")
        try:
            deltas[name] = move(delta, index)
        except ShapeError as err:
            raise ShapeError(f"adapter {adapter.name!r}: {name}: {err}") from err
    return replace(adapter, deltas=deltas)


def _removed(folder: Path, model: Model, options: Section | None) -> dict[int, Removed]:
    stated = None if options is None else options.get("removed")
    where = "." if options is None else options.get("indices") or "."
    if options is not None and stated is not None:
        return _stated(stated, options.where("removed"), model)
    lists = folder / where if isinstance(where, str) else folder
    if not isinstance(where, str) or not lists.resolve().is_relative_to(folder.resolve()):
        assert options is not None
        raise SourceError(f"{options.where('indices')} is {where!r}, expected a folder inside {folder}")
    return read_pruned_indices(lists, model)


def _stated(stated: Any, where: str, model: Model) -> dict[int, Removed]:
    layers = {str(i): i for i, _ in model.spec.layers()}
    if not isinstance(stated, dict) or not stated:
        raise SourceError(f"{where} must map layer numbers to lists")
    found = {}
    for layer, lists in stated.items():
        sound = isinstance(lists, dict) and set(lists) <= {"channels", "kv_heads"}
        if layer not in layers or not sound or not all(_is_list(numbers) for numbers in lists.values()):
            raise SourceError(
                f"{where}: {layer!r} must be a layer from 0 to {len(layers) - 1}, with whole numbers in channels and kv_heads"
            )
        channels, heads = lists.get("channels"), lists.get("kv_heads")
        keys = None
        if heads is not None:
            head_dim = _attention(model, layers[layer]).head_dim
            keys = (np.array(heads, dtype=np.intp)[:, None] * head_dim + np.arange(head_dim)).reshape(-1)
        found[layers[layer]] = Removed(channels=None if channels is None else np.array(channels, dtype=np.intp), keys=keys)
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int for v in value)


def _list(path: Path) -> Indices | None:
    if not path.is_file():
        return None
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # a broken pickle can make the loader raise nearly anything
        raise SourceError(f"{path}: torch's weights-only loader refuses this file ({str(err).splitlines()[0]})") from err
    index = content.get("pruned_idx") if isinstance(content, dict) else None
    if not isinstance(index, torch.Tensor) or index.ndim != 1 or index.is_floating_point():
        raise SourceError(f"{path}: expected a list of numbers under 'pruned_idx'")
    return index.numpy().astype(np.intp)


def _kept(model: Model, removed: Mapping[int, Removed]) -> Kept:
    n_ff, n_kv = [], []
    for i, blocks in model.spec.layers():
        lists = removed.get(i, Removed())
        mlp = next((b for b in blocks if isinstance(b, Mlp)), None)
        attention = next((b for b in blocks if isinstance(b, Attention)), None)
        n_ff.append(0 if mlp is None else len(_left(lists.channels, mlp.n_ff, f"layer {i}, channels")))
        keys = 0 if attention is None else attention.n_kv_heads * attention.head_dim
        rows = _left(lists.keys, keys, f"layer {i}, rows of k")
        n_kv.append(0 if attention is None else len(_whole_heads(rows, attention)))
    return Kept(n_ff=tuple(n_ff), n_kv=tuple(n_kv))


def _left(index: Indices | None, size: int, what: str) -> Indices:
    """What stays of 0 to size - 1."""
    if index is None:
        return np.arange(size)
    if len(np.unique(index)) < len(index) or (len(index) and not 0 <= int(index.min()) <= int(index.max()) < size):
        raise ShapeError(f"{what}: those taken out must be distinct numbers from 0 to {size - 1}. The lists are of another model.")
    return np.setdiff1d(np.arange(size), index)


def _maps(i: int, lists: Removed, model: Model) -> dict[str, IndexMap]:
    """Index maps of one layer's matrices."""
    maps: dict[str, IndexMap] = {}
    if lists.channels is not None:
        kept = _left(lists.channels, _shape(model, i, "gate")[0], f"layer {i}, channels")
        maps |= {f"layers.{i}.{role}.weight": IndexMap(full=_shape(model, i, role), rows=kept) for role in ("gate", "up")}
        maps[f"layers.{i}.down.weight"] = IndexMap(full=_shape(model, i, "down"), cols=kept)
    if lists.keys is not None:
        block = _attention(model, i)
        rows = _left(lists.keys, _shape(model, i, "wk")[0], f"layer {i}, rows of k")
        queries = query_rows(_whole_heads(rows, block), block.n_heads // block.n_kv_heads, block.head_dim)
        maps |= {f"layers.{i}.{role}.weight": IndexMap(full=_shape(model, i, role), rows=rows) for role in ("wk", "wv")}
        maps[f"layers.{i}.wq.weight"] = IndexMap(full=_shape(model, i, "wq"), rows=queries)
        maps[f"layers.{i}.wo.weight"] = IndexMap(full=_shape(model, i, "wo"), cols=queries)
    return maps


def _attention(model: Model, i: int) -> Attention:
    return next(b for b in model.spec.attention if b.layer == i)


def _whole_heads(rows: Indices, block: Attention) -> Indices:
    heads = np.unique(rows // block.head_dim)
    if len(rows) != len(heads) * block.head_dim:
        raise ShapeError(f"layer {block.layer}: the rows taken out of k are not whole heads of {block.head_dim}")
    return heads


def _shape(model: Model, i: int, role: str) -> tuple[int, int]:
    n_out, n_in = model.tensors[f"layers.{i}.{role}.weight"].shape
    return n_out, n_in
