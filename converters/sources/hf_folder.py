"""A folder in Hugging Face layout, opened: config.json, weights, tokenizer, and a README that may state the license."""

from __future__ import annotations

from pathlib import Path

from edgeq.converters.sources.hf_weights import read_hf_weights
from edgeq.converters.sources.model_card import card_metadata
from edgeq.converters.tokenizers.hf import read_hf_tokenizer
from edgeq.model import Model

# Read besides config and weights, where they are there.
_BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "README.md",
)


def open_hf_folder(folder: Path, *, name: str | None = None) -> Model:
    """Open a folder; `name` is what to call the model, else the folder's name is.

    Raises SourceError, UnsupportedError or TokenizerError, naming file and thing, for whatever is missing, broken or not described.
    """
    weights = read_hf_weights(folder)
    title = (name or _name(folder.resolve())).replace("-", " ").replace("_", " ")
    beside = tuple(path for path in (folder / file for file in _BESIDE) if path.is_file())
    return Model(
        name=title,
        spec=weights.spec,
        tensors=weights.tensors,
        tokenizer=read_hf_tokenizer(folder, n_vocab=weights.spec.n_vocab),
        files=weights.files + beside,
        format="hf",
        metadata={"name": title, **card_metadata(folder / "README.md")},
        quantization=weights.quantization,
    )


def _name(folder: Path) -> str:
    """The folder's own name; in the hub's cache (models--org--name/snapshots/commit) the name of the model."""
    repo = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repo.startswith("models--"):
        return repo.split("--")[-1]
    return folder.name
