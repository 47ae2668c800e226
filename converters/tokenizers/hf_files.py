"""The tokenizer files of a Hugging Face folder, parsed and checked for shape.

tokenizer.json              vocabulary, merges, cuts, added tokens
tokenizer_config.json       which tokens are BOS, EOS, ...; flags of added tokens; chat templates (older place)
special_tokens_map.json     the same names again, where the config has none
config.json                 ids of the same, and how many rows the embedding has
generation_config.json      every token that ends a generation
chat_template.jinja         the default chat template (newer place), or chat_template.json
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeq.errors import TokenizerError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HfFiles:
    """where: path of tokenizer.json, for messages. Files that are not there are empty."""

    folder: Path
    where: str
    tokenizer: Mapping[str, Any]
    config: Mapping[str, Any]
    special_map: Mapping[str, Any]
    model_config: Mapping[str, Any]
    generation: Mapping[str, Any]

    @property
    def model(self) -> Mapping[str, Any]:
        return self.tokenizer["model"]

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of config.json, for models of several parts; empty for others."""
        return self.model_config.get("text_config") or {}


def read_hf_files(folder: Path) -> HfFiles:
    """Raises TokenizerError that names the file: missing, not JSON, or not a BPE model that llama.cpp could run."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        found = [name for name in ("tokenizer.model", "tekken.json", "vocab.json") if (folder / name).is_file()]
        has = f"only {' and '.join(found)}, which edgeq does not read" if found else "nor another tokenizer file"
        raise TokenizerError(
            f"{folder}: there is no tokenizer.json, {has}. Save it with transformers "
            "(AutoTokenizer.from_pretrained(folder).save_pretrained(folder)), or take it from the base model."
        )
    tokenizer = read_json(path)
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else None
        raise TokenizerError(f"{path}: model is of type {kind!r}; edgeq can carry only BPE to llama.cpp's tokenizers")
    vocab, added = model.get("vocab"), tokenizer.get("added_tokens") or []
    if not isinstance(vocab, dict) or not vocab or not all(isinstance(id, int) for id in vocab.values()):
        raise TokenizerError(f"{path}: model.vocab is empty or broken; expected an id for every token. Fetch the file again.")
    if not isinstance(added, list):
        raise TokenizerError(f"{path}: added_tokens is a {type(added).__name__}, expected a list. Fetch the file again.")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise TokenizerError(f"{path}: model.{key} is {model[key]!r}; llama.cpp has nothing like it")
    for i, entry in enumerate(added):
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not isinstance(entry.get("id"), int):
            raise TokenizerError(f"{path}: added_tokens[{i}] has no content and id: {entry!r}. Fetch the file again.")
    return HfFiles(
        folder=folder,
        where=str(path),
        tokenizer=tokenizer,
        config=read_json(folder / "tokenizer_config.json"),
        special_map=read_json(folder / "special_tokens_map.json"),
        model_config=read_json(folder / "config.json"),
        generation=read_json(folder / "generation_config.json"),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as err:
        raise TokenizerError(f"{path}: cannot be read as JSON: {err}. Fetch the file again.") from err
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: holds a {type(value).__name__}, expected an object. Fetch the file again.")
    return value


def chat_template(files: HfFiles) -> str | None:
    """The template that applies without further asking, from the place that wins in transformers: its own file before the config.

    Of several named templates it is the one called "default".
    """
    path = files.folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as err:
            raise TokenizerError(f"{path}: cannot be read as UTF-8 text: {err}. Fetch the file again.") from err
    template = read_json(files.folder / "chat_template.json").get("chat_template", files.config.get("chat_template"))
    if template is None or isinstance(template, str):
        return template
    named = (
        {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)} if isinstance(template, list) else {}
    )
    default = named.get("default")
    if not isinstance(default, str):
        names = ", ".join(sorted(map(str, named))) or "unnamed ones"
        log.warning("%s: no chat template is called default, only %s; the model goes without one", files.folder, names)
        return None
    return default
