"""Adapters beside the weights of a package: written for its artifact, in the order that sorting has given it.

    adapters/NAME.gguf    a LoRA as stock llama.cpp loads it, in F16, or in F32 where the weights are

and an entry of the manifest's list `adapters` for each, see `edgeq.adapter_records`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeq.adapter_plan import AdapterPlan
from edgeq.adapter_records import AdapterRecord
from edgeq.base_fingerprint import take_fingerprint
from edgeq.converters.adapters.gguf_writer import write_lora
from edgeq.converters.adapters.keep import sorted_factors
from edgeq.converters.disposition import Kept
from edgeq.converters.gguf.lowering import Lowered
from edgeq.converters.records import hash_inputs
from edgeq.deltas.adapter import Adapter
from edgeq.grids import Grid
from edgeq.model import Model
from edgeq.progress import Progress, silent
from edgeq.sorting import Sorting
from edgeq.spec import ModelSpec

FOLDER = "adapters"


@dataclass(frozen=True, kw_only=True)
class KeptFile:
    """reference: what the artifact computes with this adapter, in float."""

    name: str
    path: Path
    reference: Model
    record: AdapterRecord


def write_kept(
    folder: Path,
    kept: Sequence[Kept],
    spec: ModelSpec,
    model: Model,
    lowered: Lowered,
    sorting: Sorting | None,
    *,
    grid: Grid,
    base_sha256: str,
    progress: Progress = silent,
) -> list[KeptFile]:
    """Write all of them into a package's folder. spec: of the model before sorting. model, lowered: as they went into the artifact, whose
    hash is base_sha256. sorting: None when nothing was moved. grid: of the factors.
    """
    if not kept:
        return []
    (folder / FOLDER).mkdir()
    fingerprint, files = str(take_fingerprint(model.tensors)), []
    for one in kept:
        found = replace(one.factors(), base_name=_title(one.adapter.base_name), base_fingerprint=fingerprint)
        if sorting is not None:
            moved = sorted_factors(spec, found.factors, sorting.orders, pair_order=sorting.pair_order, rotations=sorting.rotations)
            found = replace(found, factors=moved)
        path = folder / FOLDER / f"{one.plan.name}.gguf"
        written = write_lora(path, found, lowered, grid=grid, progress=progress)
        facts = {
            **_facts(one.plan, one.adapter, progress),
            "rank": one.plan.keep.rank,
            "lost_energy": one.plan.keep.lost_energy,
            "base": fingerprint,
        }
        record = AdapterRecord(
            name=one.plan.name,
            path=path.relative_to(folder).as_posix(),
            bytes=written.nbytes,
            sha256=written.sha256,
            base_sha256=base_sha256,
            facts=facts,
        )
        files.append(KeptFile(name=one.plan.name, path=path, reference=one.reference, record=record))
    return files


def merged_entry(plan: AdapterPlan, adapter: Adapter, progress: Progress) -> dict[str, Any]:
    """What the manifest says of an adapter that is part of the weights."""
    return {"name": plan.name, **_facts(plan, adapter, progress)}


def _facts(plan: AdapterPlan, adapter: Adapter, progress: Progress) -> dict[str, Any]:
    return {
        "disposition": plan.disposition,
        "kind": plan.kind,
        "scale": plan.scale,
        "trained_on": _title(adapter.base_name),
        "files": [file.to_json() for file in hash_inputs(adapter.files, progress)],
    }


def _title(base_name: str | None) -> str | None:
    """What an adapter says it was trained on; of a path on some machine the last part."""
    return Path(base_name).name if base_name is not None and Path(base_name).is_absolute() else base_name
