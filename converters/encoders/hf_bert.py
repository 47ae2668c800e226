"""An encoder in a Hugging Face folder: config.json to a spec, checkpoint tensors to canonical ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeq.converters.encoders.families import ENCODERS, LEFT_OUT, EncoderFamily, encoder_family
from edgeq.converters.encoders.pooling import read_steps
from edgeq.converters.sources.hf_dialects import HARMLESS, HARMLESS_PREFIXES
from edgeq.converters.sources.hf_weights import stored_tensors
from edgeq.converters.sources.json_file import Section, read_json_object
from edgeq.converters.sources.model_card import card_metadata
from edgeq.converters.sources.stored import StoredTensor
from edgeq.encoder_spec import Activation, EncoderModel, EncoderSpec
from edgeq.errors import ShapeError, SourceError, TokenizerError, UnsupportedError
from edgeq.package import MANIFEST
from edgeq.tensors import LazyTensor

_ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
# Heads that an embedding model may have kept from its training.
_ARCHITECTURE = re.compile(r"\w+(Model|ForMaskedLM|ForPreTraining)")
_OLD_NORM = {"gamma": "weight", "beta": "bias"}  # as TensorFlow calls them
_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def is_encoder_folder(folder: Path) -> bool:
    """Whether config.json names an encoder family. Never raises: what is broken is for others to tell."""
    try:
        values = read_json_object(folder / "config.json")
    except SourceError:
        return False
    return encoder_family(values.get("model_type")) is not None


def open_hf_encoder(folder: Path, *, name: str | None = None) -> EncoderModel:
    """Open a folder; `name` is what to call the model, else the folder's name is.

    Raises SourceError, UnsupportedError or TokenizerError, naming file and thing, for whatever is missing, broken or not described.
    """
    if (folder / MANIFEST).is_file():
        raise SourceError(f"{folder} is an edgeq package, not a model to export. Pass the model it was made from.")
    stored, files = stored_tensors(folder)
    return assemble(folder, stored, files, name=name or folder.resolve().name)


def assemble(
    folder: Path, stored: Mapping[str, StoredTensor], files: tuple[Path, ...], *, name: str, graph: Path | None = None
) -> EncoderModel:
    """A model of stored tensors and the small files of its folder. Raises as `open_hf_encoder`."""
    config_file = folder / "config.json"
    spec, family = read_encoder_config(config_file)
    steps = read_steps(folder, spec, stored_tensors)
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise TokenizerError(
            f"{tokenizer} is missing. Save the model's fast tokenizer there: AutoTokenizer.from_pretrained(..).save_pretrained"
        )
    tensors = canonical_tensors(stored, spec, family, folder)
    tensors |= {name: tensor.open() for name, tensor in steps.dense.items()}
    beside = {"config.json": config_file, "tokenizer.json": tokenizer}
    beside |= {file: folder / file for file in _TOKENIZER_FILES if (folder / file).is_file()}
    beside |= steps.files
    return EncoderModel(
        name=name.replace("-", " ").replace("_", " "),
        spec=spec,
        sentence=steps.sentence,
        tensors=tensors,
        tokenizer=tokenizer,
        files=(*files, *beside.values()),
        beside=beside,
        graph=graph,
        metadata=card_metadata(folder / "README.md"),
    )


def read_encoder_config(path: Path) -> tuple[EncoderSpec, EncoderFamily]:
    """Raises SourceError when the file is broken or contradicts itself, UnsupportedError for what no row describes."""
    values = read_json_object(path)
    family = encoder_family(values.get("model_type"))
    if family is None:
        known = ", ".join(row.model_type for row in ENCODERS)
        raise UnsupportedError(f"{path}: model_type {values.get('model_type')!r} is not an encoder that is supported; supported: {known}")
    config = Section(values, path)
    architectures = config.optional_list("architectures") or []
    if not all(isinstance(name, str) and _ARCHITECTURE.fullmatch(name) for name in architectures):
        raise UnsupportedError(
            f"{path}: architecture {architectures[0]!r} is not an embedding model; supported: {family.model_type} without a head"
        )
    fields: dict[str, Any] = dict(family.fixed)
    for name, key in family.keys.items():
        if name == "activation":
            fields[name] = _activation(config, key)
        elif name == "norm_eps":
            fields[name] = config.number(key)
        else:
            fields[name] = config.integer(key)
    padding = config.get("pad_token_id")
    if padding is not None and (type(padding) is not int or padding < 0):
        raise SourceError(f"{config.where('pad_token_id')} is {padding!r}, expected a token id")
    if "padding_id" not in fields:
        fields["padding_id"] = padding if padding is not None else int(family.counts_positions)
    _check_leftovers(config, family)
    try:
        spec = EncoderSpec(family=family.model_type, counts_positions=family.counts_positions, **fields)
    except ShapeError as err:
        raise SourceError(f"{path}: {err}") from err
    if spec.n_ctx < 1 or spec.padding_id >= spec.n_vocab:
        raise SourceError(f"{path}: pad_token_id {spec.padding_id} leaves no positions of {spec.n_positions} or is outside the vocabulary")
    return spec, family


def canonical_tensors(stored: Mapping[str, StoredTensor], spec: EncoderSpec, family: EncoderFamily, folder: Path) -> dict[str, LazyTensor]:
    """Canonical name -> lazy tensor. Every tensor of the spec must be there, and every stored tensor must be asked for or known to be of no
    use. Raises SourceError and UnsupportedError."""
    found = {_bare(name, family): tensor for name, tensor in stored.items()}
    tensors: dict[str, LazyTensor] = {}
    for name, shape in spec.shapes().items():
        theirs = checkpoint_name(name, family)
        tensor = found.pop(theirs, None)
        if tensor is None:
            raise SourceError(f"{folder}: tensor {theirs} is missing. Download the model's folder again, with all its files.")
        if tensor.shape != shape:
            raise SourceError(f"{tensor.origin} has shape {list(tensor.shape)}, but config.json asks for {list(shape)}")
        tensors[name] = tensor.open()
    unknown = [tensor for name, tensor in found.items() if not LEFT_OUT.fullmatch(name)]
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise UnsupportedError(
            f"{unknown[0].origin}{more} has no place in a {spec.family} model of {spec.n_layers} layers, "
            f"which is what {folder / 'config.json'} describes"
        )
    return tensors


def checkpoint_name(name: str, family: EncoderFamily) -> str:
    """Name in a bare checkpoint of a canonical tensor."""
    module, _, part = name.rpartition(".")
    layer = re.fullmatch(r"layers\.(\d+)\.(\w+)", module)
    if layer is None:
        return f"{family.modules[module]}.{part}"
    return f"{family.modules[f'layers.{{i}}.{layer[2]}']}.{part}".format(i=layer[1])


def _bare(name: str, family: EncoderFamily) -> str:
    name = name.removeprefix(family.prefix)
    module, _, part = name.rpartition(".")
    return f"{module}.{_OLD_NORM.get(part, part)}" if module else name


def _activation(config: Section, key: str) -> Activation:
    value = config.get(key)
    if value not in _ACTIVATIONS:
        raise UnsupportedError(f"{config.where(key)} is {value!r}; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def _check_leftovers(config: Section, family: EncoderFamily) -> None:
    """Refuse every key that was neither read, nor is harmless, nor holds the one value we compute."""
    for key, allowed in family.only.items():
        value = config.get(key)
        if value is not None and value not in allowed:
            raise UnsupportedError(f"{config.where(key)} is {value!r}; supported: {', '.join(map(repr, allowed))}")
    for key in config.unused():
        if key in HARMLESS or key in family.harmless or key.startswith(HARMLESS_PREFIXES):
            continue
        raise UnsupportedError(
            f"{config.where(key)} (value {config.values[key]!r}) is a setting edgeq does not know. "
            "Remove it if the model computes the same without it."
        )
