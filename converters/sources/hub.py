"""Models by hub id: `org/name` or `org/name@revision`, downloaded into huggingface_hub's own cache.

Only what a source reads is fetched: config, tokenizer, model card and safetensors of the top folder (some repositories repeat the
weights in a subfolder or in `consolidated*` files).
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from edgeq.errors import MissingDependency, SourceError
from edgeq.progress import Progress, silent

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)

ALLOWED = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "README.md"]
ALLOWED += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json"]
ALLOWED += ["tokenizer.model"]  # not read, but told apart from no tokenizer at all
IGNORED = ["*/*", "consolidated*"]


def is_hub_id(ref: str) -> bool:
    return HUB_ID.fullmatch(ref) is not None


def hub_name(ref: str) -> str:
    """The model's own name: `HuggingFaceTB/SmolLM2-135M@main` -> `SmolLM2-135M`."""
    return ref.split("@")[0].split("/")[1]


def download(ref: str, *, progress: Progress = silent) -> Path:
    """The folder of a hub model, downloaded first where the cache does not have it.

    Raises SourceError when the hub cannot be reached or does not give the model out, each with what to do.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise MissingDependency("huggingface_hub", "export") from None
    match = HUB_ID.fullmatch(ref)
    assert match is not None
    repo, revision = match["repo"], match["revision"]
    elsewhere = f"download it elsewhere (hf download {repo} --local-dir DIR), copy the folder here and pass its path."
    try:
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=ALLOWED, ignore_patterns=IGNORED, tqdm_class=progress_bar(progress)
        )
    except errors.GatedRepoError as err:
        raise SourceError(f"{repo} is gated: accept its terms on its hub page and log in (hf auth login), or {elsewhere}") from err
    except errors.RevisionNotFoundError as err:
        raise SourceError(f"{repo} has no revision {revision!r}. Name a branch, a tag or a commit after the @.") from err
    except errors.RepositoryNotFoundError as err:
        raise SourceError(
            f"{ref} is neither a path here nor a public model on the hub. Check the spelling; log in (hf auth login) for a private one."
        ) from err
    except errors.HFValidationError as err:
        raise SourceError(f"{ref} is neither a path here nor a valid hub id ({err})") from err
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as err:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise SourceError(
                f"{ref} is neither a path here nor in the hub's cache, and HF_HUB_OFFLINE is set. Unset it, or {elsewhere}"
            ) from err
        raise SourceError(
            f"{ref} is not a path here, and the hub cannot be reached ({_reason(err)}). Check the network, or {elsewhere}"
        ) from err
    except Exception as err:  # whatever the transport raises when a connection or the disk gives out in the middle
        raise SourceError(f"{repo} could not be downloaded ({_reason(err)}). Try again, or {elsewhere}") from err
    path = Path(folder)
    if not any(path.glob("*.safetensors")):
        raise SourceError(f"{repo} has no safetensors weights at its top level. Convert it to safetensors first.")
    return path


def _reason(err: Exception) -> str:
    return str(err).strip().split("\n")[0].removeprefix("Got: ") or type(err).__name__


def progress_bar(progress: Progress) -> type[Any]:
    """A tqdm class for huggingface_hub that draws nothing and passes the bytes on.

    The hub library makes several bars at once, the byte ones for one and the same download; the furthest of these is reported.
    """
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):
        done, size = 0.0, 0.0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def display(self, *args: Any, **kwargs: Any) -> bool:
            if self.unit == "B" and self.total:
                Bar.done, Bar.size = max(Bar.done, self.n), max(Bar.size, self.total)
                progress("download", min(Bar.done, Bar.size), Bar.size)
            return True

    return Bar
