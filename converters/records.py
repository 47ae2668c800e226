"""What a manifest records beside the artifact: what went in, what rounding lost, which tools did it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import reduce
from importlib import metadata
from operator import add
from pathlib import Path
from typing import Any

from edgeq.converters.gguf.encode import RegridError
from edgeq.device_memory import TensorPlan
from edgeq.model import Vocabulary
from edgeq.package import FileRecord, sha256
from edgeq.progress import Progress

MOST_LOST = 0.5  # of a tensor's squared values; Q2_K loses about 0.1 of Gaussian ones


def hash_inputs(files: Sequence[Path], progress: Progress) -> list[FileRecord]:
    sizes = [file.stat().st_size for file in files]
    done, total = 0, sum(sizes)

    def count(n: int) -> None:
        nonlocal done
        done += n
        progress("hash", done, total)

    return [FileRecord(path=f.name, bytes=size, sha256=sha256(f, on_bytes=count)) for f, size in zip(files, sizes, strict=True)]


def fingerprint(vocabulary: Vocabulary) -> dict[str, Any]:
    """What tells two tokenizers apart: hashes of the vocabulary with its merges, and of the chat template."""
    content = json.dumps([vocabulary.kind, vocabulary.pre, vocabulary.tokens, vocabulary.types, vocabulary.merges], ensure_ascii=False)
    template = vocabulary.chat_template
    return {
        "kind": vocabulary.kind,
        "pre": vocabulary.pre,
        "n_tokens": len(vocabulary.tokens),
        "sha256": hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest(),
        "chat_template_sha256": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
    }


def regrid_summary(tensors: Sequence[TensorPlan], errors: Mapping[str, RegridError]) -> dict[str, Any]:
    """What changing grids lost, per kind of tensor and in `total`: relative squared error, plain and weighted by importance.

    Kinds that were copied, and a total of nothing, are left out. For a quantized source this is what is lost on top of its quantization.
    """
    by_role: dict[str, RegridError] = {}
    for tensor in tensors:
        error = errors.get(tensor.name)
        if error is not None:
            by_role[tensor.role] = by_role[tensor.role] + error if tensor.role in by_role else error
    if by_role:
        by_role["total"] = reduce(add, by_role.values())
    return {role: {"relative": e.relative, "weighted_relative": e.weighted_relative} for role, e in by_role.items()}


def rounding_faults(tensors: Sequence[TensorPlan], errors: Mapping[str, RegridError]) -> list[str]:
    """Tensors of which rounding kept next to nothing, as sentences: in a coarse format one lost tensor may hide in the logits."""
    return [
        f"{t.name}: rounding to {t.grid.name} lost {error.relative:.0%} of it (squared error relative to its values)"
        for t in tensors
        if (error := errors.get(t.name)) is not None and error.relative > MOST_LOST
    ]


def versions(tools: Sequence[str]) -> dict[str, str]:
    return {name: metadata.version(name) for name in tools}
