"""The weights of a folder in Hugging Face layout: which files hold them, and what they are in edgeq's terms.

Weights are looked for in the order in which transformers does: model.safetensors, its sharded index, and only when there is no
safetensors file, a pickle checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeq.converters.sources.hf_config import read_config
from edgeq.converters.sources.hf_tensors import canonical_tensors
from edgeq.converters.sources.json_file import read_json_object
from edgeq.converters.sources.pickle_file import read_pickle
from edgeq.converters.sources.quantized.methods import put_together
from edgeq.converters.sources.safetensors_file import read_safetensors
from edgeq.converters.sources.stored import StoredTensor
from edgeq.errors import SourceError
from edgeq.spec import ModelSpec
from edgeq.tensors import LazyTensor

# Pickles that training leaves beside a checkpoint and that hold no model.
_NOT_MODELS = ("optimizer", "scheduler", "scaler", "training_args", "rng_state")

Reader = Callable[[Path], dict[str, StoredTensor]]


@dataclass(frozen=True, kw_only=True)
class HfWeights:
    """Spec and canonical lazy tensors of a folder; files: what they were read from.

    quantization: method and options of a quantized checkpoint, None for floats.
    """

    spec: ModelSpec
    tensors: Mapping[str, LazyTensor]
    files: tuple[Path, ...]
    quantization: Mapping[str, Any] | None = None


def read_hf_weights(folder: Path) -> HfWeights:
    """Everything but the tokenizer. Reads headers only, and of quantized weights scales and zero points as far as it has to."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise SourceError(_no_config(folder))
    config = read_config(config_file)
    stored, files = stored_tensors(folder)
    quantization = None
    if config.quantization is not None:
        stored, quantization = put_together(stored, config.quantization)
    tensors = canonical_tensors(stored, config, folder)
    return HfWeights(spec=config.spec, tensors=tensors, files=(config_file, *files), quantization=quantization)


def _no_config(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return f"{folder} holds an adapter, not a model. Pass the model it was trained on as MODEL, and this folder as --adapter."
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    if gguf:
        return f"{folder} has no config.json, but GGUF files: pass one of them as MODEL ({', '.join(gguf[:5])})."
    if (folder / "manifest.json").is_file():
        return f"{folder} is an edgeq package, not a model to export. Pass the model it was made from."
    return f"{folder} has no config.json, so it is not a model folder in Hugging Face layout."


def stored_tensors(folder: Path) -> tuple[dict[str, StoredTensor], tuple[Path, ...]]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return read_safetensors(single), (single,)
    if index.is_file():
        return _sharded(index, read_safetensors)
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        raise SourceError(
            f"{folder} has {', '.join(others[:3])}, but neither model.safetensors nor model.safetensors.index.json. "
            "Download the missing file, or rename the only one to model.safetensors."
        )
    return _pickled(folder)


def _pickled(folder: Path) -> tuple[dict[str, StoredTensor], tuple[Path, ...]]:
    single, index = folder / "pytorch_model.bin", folder / "pytorch_model.bin.index.json"
    if single.is_file():
        return read_pickle(single), (single,)
    if index.is_file():
        return _sharded(index, read_pickle)
    found = sorted(p for p in folder.glob("*.pt") if not p.name.startswith(_NOT_MODELS))
    if len(found) == 1:
        return read_pickle(found[0]), (found[0],)
    if found:
        raise SourceError(f"{folder} has several .pt files ({', '.join(p.name for p in found[:5])}). Keep the one that is the model.")
    raise SourceError(f"{folder} has a config.json but no weights. Download model.safetensors, or its index and every shard, into it.")


def _sharded(index: Path, read: Reader) -> tuple[dict[str, StoredTensor], tuple[Path, ...]]:
    """Tensors of every shard that the index names. Raises SourceError when index and shards do not agree."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(_is_file_name(v) for v in weight_map.values()):
        raise SourceError(f"{index}: weight_map must name a file of this folder for every tensor. Download the file again.")
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise SourceError(f"{index} names {len(missing)} of {len(shards)} files that are missing: {', '.join(missing[:3])}. Download them.")
    contents = {shard: read(index.parent / shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in contents[shard]:
            raise SourceError(f"{index} places {name} in {shard}, which does not have it. Download both again.")
    stored: dict[str, StoredTensor] = {}
    for shard, tensors in contents.items():
        for name, tensor in tensors.items():
            if weight_map.get(name, shard) == shard and stored.setdefault(name, tensor) is not tensor:
                raise SourceError(f"{name} is in {stored[name].file.name} and in {shard}, and {index} names neither. Download both again.")
    return stored, (index, *(index.parent / shard for shard in shards))


def _is_file_name(value: Any) -> bool:
    """A plain name: an index must not lead out of its folder."""
    return isinstance(value, str) and value not in ("", ".", "..") and Path(value).name == value
