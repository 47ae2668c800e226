"""What the word MODEL may be, and how each form is opened."""

from __future__ import annotations

from pathlib import Path

from edgeq.converters.sources import hub
from edgeq.converters.sources.demo import demo_file
from edgeq.converters.sources.gguf import read_gguf_model
from edgeq.converters.sources.hf_folder import open_hf_folder
from edgeq.errors import SourceError
from edgeq.model import Model
from edgeq.progress import Progress, silent

DEMO = "demo"
FORMS = "a folder in Hugging Face layout, a .gguf file, a hub id org/name[@revision], or demo"


def open_model(ref: str | Path, *, progress: Progress = silent) -> Model:
    """Open a model: headers and tokenizer are read, weights stay where they are.

    ref: `demo`; a path, which wins over a hub id of the same spelling when it exists (./demo is a path too); else a hub id.
    progress hears of a download only. Raises SourceError when ref is none of these, and what the readers raise.
    """
    if ref == DEMO:
        return read_gguf_model(demo_file())
    path = Path(ref)
    if path.exists():
        return _open_path(path)
    if isinstance(ref, str) and hub.is_hub_id(ref) and path.suffix != ".gguf":
        return open_hf_folder(hub.download(ref, progress=progress), name=hub.hub_name(ref))
    raise SourceError(f"{ref} does not exist, and does not look like a hub id. MODEL is {FORMS}.")


def _open_path(path: Path) -> Model:
    if path.is_dir():
        return open_hf_folder(path)
    if path.suffix == ".gguf":
        return read_gguf_model(path)
    if path.suffix in (".safetensors", ".bin", ".pt"):
        raise SourceError(f"{path} is a part of a model. Pass the folder that holds it, with its config.json and tokenizer: {path.parent}")
    raise SourceError(f"{path} is not a model that edgeq reads. MODEL is {FORMS}.")
