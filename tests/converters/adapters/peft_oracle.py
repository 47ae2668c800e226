"""Adapters that PEFT makes and saves on tiny models, its own merge of them, and the logits of what edgeq merges.

Every parameter that training would touch is random, so that no kind is a no-op by its initialization.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tiny import hf_folder, hf_model

from edgeq.converters.adapters.sites import model_sites
from edgeq.converters.sources.hf_folder import open_hf_folder
from edgeq.model import Model

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

Logits = npt.NDArray[np.float32]
IDS = [[1, 17, 230, 4, 99, 301, 45, 12, 77, 250, 3, 3, 160, 9]]
TOLERANCE = 1e-4  # of logits of order 1 in float32: both sides round at 1e-7 and sum some hundred values


@cache
def base_folder(family: str) -> Path:
    import torch

    torch.set_num_threads(1)
    return hf_folder(Path(mkdtemp()) / family, family)


@cache
def base_model(family: str) -> Model:
    return open_hf_folder(base_folder(family))


@cache
def _pristine(family: str) -> PreTrainedModel:
    return hf_model(base_folder(family))


def hf_base(family: str) -> PreTrainedModel:
    """The base as transformers runs it, a copy of its own."""
    return copy.deepcopy(_pristine(family))


@cache
def base_logits(family: str) -> Logits:
    return logits(_pristine(family))


def logits(model: Any) -> Logits:
    import torch

    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.float().numpy()


@dataclass(frozen=True)
class Case:
    """folder: the adapter. base, adapted, merged: logits of the base, of base plus adapter, of PEFT's merge (None if PEFT has none)."""

    family: str
    folder: Path
    base: Logits
    adapted: Logits
    merged: Logits | None


def make(
    family: str,
    config: PeftConfig,
    folder: Path,
    *,
    seed: int = 0,
    std: float = 0.1,
    change: Callable[[PeftModel], Any] | None = None,
    merge: bool = True,
    **save: Any,
) -> Case:
    """Attach an adapter of this config, fill it with random values, save it."""
    import torch
    from peft import get_peft_model

    base = hf_base(family)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(std * torch.randn(parameter.shape, generator=generator))
        if change is not None:
            change(model)
        model.eval()
        model.save_pretrained(folder, **save)
        adapted = logits(model)
        merged = logits(model.merge_and_unload()) if merge else None
    return Case(family=family, folder=folder, base=base_logits(family), adapted=adapted, merged=merged)


def logits_of(family: str, model: Model) -> Logits:
    """Logits that transformers computes with edgeq's tensors."""
    import torch

    hf = hf_base(family)
    if model.spec.n_vocab != hf.config.vocab_size:
        hf.resize_token_embeddings(model.spec.n_vocab, mean_resizing=False)
    if hf.config.tie_word_embeddings and not model.spec.tied:
        hf.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight.detach().clone())
    with torch.no_grad():
        for path, site in model_sites(model.spec).items():
            module = hf.get_submodule(path)
            for suffix in ("weight", "bias"):
                names = [f"{stem}.{suffix}" for stem, _ in site.pieces]
                if all(name in model.tensors for name in names):
                    values = np.concatenate([model.tensors[name].decode() for name in names])
                    offset = site.offset if suffix == "weight" else 0.0
                    getattr(module, suffix).copy_(torch.from_numpy(values - np.float32(offset)))
    return logits(hf)


def difference(one: Logits, other: Logits) -> float:
    return float(np.abs(one - other).max())
