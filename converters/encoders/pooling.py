"""How a text becomes one vector: what a sentence-transformers folder says beside its model.

    modules.json                       the steps in order: Transformer, Pooling, then Dense and Normalize where there are any
    1_Pooling/config.json              which poolings
    2_Dense/config.json                sizes and activation of a linear layer; weights beside it
    sentence_bert_config.json          max_seq_length, do_lower_case
    config_sentence_transformers.json  prompts by name

A folder without modules.json pools by the mean, as sentence-transformers does with it.
https://sbert.net/docs/package_reference/sentence_transformer/models.html
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeq.converters.sources.json_file import Section, read_json_object
from edgeq.converters.sources.stored import StoredTensor
from edgeq.encoder_spec import POOLINGS, DenseActivation, EncoderSpec, Pooling, SentenceSpec
from edgeq.errors import SourceError, UnsupportedError

Reader = Callable[[Path], tuple[dict[str, StoredTensor], tuple[Path, ...]]]

_FLAGS: Mapping[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
}
_OTHER_FLAGS = ("pooling_mode_weightedmean_tokens", "pooling_mode_lasttoken")
_DENSE: Mapping[str, DenseActivation] = {
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.linear.Identity": "identity",
}
_CARRIED = ("sentence_bert_config.json", "config_sentence_transformers.json")


@dataclass(frozen=True, kw_only=True)
class Steps:
    """sentence: what to do. files: what said so, by path in the folder. dense: stored weights of the linear layer, by canonical name."""

    sentence: SentenceSpec
    files: Mapping[str, Path]
    dense: Mapping[str, StoredTensor]


def read_steps(folder: Path, spec: EncoderSpec, stored: Reader) -> Steps:
    """stored: reads the tensors of a folder, for a Dense step.

    Raises SourceError for files that are broken or contradict the model, UnsupportedError for steps and poolings that are not known.
    """
    modules, modules_file = _modules(folder)
    steps = [(_kind(entry, modules_file), entry) for entry in modules]
    kinds = [kind for kind, _ in steps]
    if kinds and kinds not in (["Transformer", "Pooling", *rest] for rest in ([], ["Normalize"], ["Dense"], ["Dense", "Normalize"])):
        raise UnsupportedError(
            f"{modules_file}: the steps are {', '.join(kinds)}; supported: Transformer, Pooling, then Dense and Normalize or one of them."
        )
    found = {"modules.json": modules_file} if steps else {}
    pooling: tuple[Pooling, ...] = ("mean",)
    n_out, dense = spec.n_embd, None
    weights: dict[str, StoredTensor] = {}
    for kind, entry in steps:
        where = _inside(folder, entry, modules_file)
        file = where / "config.json"
        if kind == "Pooling":
            pooling = _poolings(file, spec)
            n_out *= len(pooling)
        elif kind == "Dense":
            n_out, dense, weights = _dense(file, where, n_out, stored)
            found |= {tensor.file.relative_to(folder).as_posix(): tensor.file for tensor in weights.values()}
        if kind in ("Pooling", "Dense"):
            found[file.relative_to(folder).as_posix()] = file
    found |= {name: folder / name for name in _CARRIED if (folder / name).is_file()}
    max_tokens, lowercase = _limits(folder, spec)
    prompts, default = _prompts(folder / "config_sentence_transformers.json")
    return Steps(
        sentence=SentenceSpec(
            pooling=pooling,
            normalize="Normalize" in kinds,
            max_tokens=max_tokens,
            n_out=n_out,
            dense=dense,
            lowercase=lowercase,
            prompts=prompts,
            default_prompt=default,
            assumed=not steps,
        ),
        files=found,
        dense=weights,
    )


def _modules(folder: Path) -> tuple[list[Any], Path]:
    path = folder / "modules.json"
    if not path.is_file():
        return [], path
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise SourceError(f"{path}: not valid JSON ({err}). Download the file again.") from err
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
        raise SourceError(f"{path}: expected a list of steps. Download the file again.")
    return value, path


def _kind(entry: Mapping[str, Any], path: Path) -> str:
    kind = entry.get("type")
    if not isinstance(kind, str):
        raise SourceError(f"{path}: a step has no type. Download the file again.")
    return kind.rsplit(".", 1)[-1]


def _inside(folder: Path, entry: Mapping[str, Any], path: Path) -> Path:
    """The folder of a step: a list must not lead out of the model's."""
    name = entry.get("path", "")
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise SourceError(f"{path}: {name!r} is not a folder of this model. Download the file again.")
    return folder / name


def _poolings(path: Path, spec: EncoderSpec) -> tuple[Pooling, ...]:
    config = Section(read_json_object(path), path)
    stated = config.get("pooling_mode")
    if stated is not None:
        names = stated if isinstance(stated, list) else [stated]
        unknown = [name for name in names if name not in POOLINGS]
    else:
        names = [name for flag, name in _FLAGS.items() if config.boolean(flag, default=False)]
        unknown = [flag for flag in _OTHER_FLAGS if config.boolean(flag, default=False)]
    if unknown:
        raise UnsupportedError(f"{path}: pooling {unknown[0]!r} is not supported; supported: {', '.join(POOLINGS)}")
    if not names:
        raise SourceError(f"{path} names no pooling; expected one of {', '.join(_FLAGS)} to be true.")
    if not config.boolean("include_prompt", default=True):
        raise UnsupportedError(f"{path}: include_prompt is false: pooling that leaves the prompt's tokens out is not supported.")
    width = config.optional_integer("word_embedding_dimension") or config.optional_integer("embedding_dimension")
    if width not in (None, spec.n_embd):
        raise SourceError(f"{path}: word_embedding_dimension is {width}, but config.json says hidden size {spec.n_embd}.")
    return tuple(name for name in POOLINGS if name in names)


def _dense(path: Path, folder: Path, n_in: int, stored: Reader) -> tuple[int, DenseActivation, dict[str, StoredTensor]]:
    config = Section(read_json_object(path), path)
    width, n_out = config.integer("in_features"), config.integer("out_features")
    if width != n_in:
        raise SourceError(f"{path}: in_features is {width}, but pooling gives {n_in}.")
    name = config.get("activation_function")
    if name not in _DENSE:
        raise UnsupportedError(f"{path}: activation_function {name!r} is not supported; supported: {', '.join(_DENSE)}")
    if not config.boolean("bias", default=True):
        raise UnsupportedError(f"{path}: bias is false; a Dense step without a bias is not supported.")
    tensors = stored(folder)[0]
    weights = {}
    for part, shape in (("weight", (n_out, n_in)), ("bias", (n_out,))):
        tensor = tensors.get(f"linear.{part}")
        if tensor is None or tensor.shape != shape:
            raise SourceError(f"{folder}: linear.{part} of shape {list(shape)} is missing. Download the model's folder again.")
        weights[f"dense.{part}"] = tensor
    return n_out, _DENSE[name], weights


def _limits(folder: Path, spec: EncoderSpec) -> tuple[int, bool]:
    """Tokens a text is cut to, and whether it is lowered first."""
    limit, lowercase = None, False
    path = folder / "sentence_bert_config.json"
    if path.is_file():
        config = Section(read_json_object(path), path)
        limit, lowercase = config.optional_integer("max_seq_length"), config.boolean("do_lower_case", default=False)
    path = folder / "tokenizer_config.json"
    if limit is None and path.is_file():
        stated = read_json_object(path).get("model_max_length")
        limit = stated if type(stated) is int and stated > 0 else None  # transformers writes 1e30 for "no limit"
    return min(limit or spec.n_ctx, spec.n_ctx), lowercase


def _prompts(path: Path) -> tuple[dict[str, str], str | None]:
    if not path.is_file():
        return {}, None
    config = read_json_object(path)
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise SourceError(f"{path}: prompts must be texts by name. Download the file again.")
    if default is not None and default not in prompts:
        raise SourceError(f"{path}: default_prompt_name is {default!r}, which is not among its prompts.")
    return prompts, default
