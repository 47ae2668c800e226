"""Adapters beside the weights of a package: written for its artifact, in the order that sorting has given it.

    adapters/NAME.gguf            a LoRA as stock llama.cpp loads it, in F16, or in F32 where the weights are
    adapters/NAME.onnx_adapter    the same as ONNX Runtime loads it, in what the graph computes in

and an entry of the manifest's list `adapters` for each, see `edgeq.adapter_records`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeq.adapter_plan import AdapterPlan
from edgeq.adapter_records import AdapterRecord
from edgeq.base_fingerprint import take_fingerprint
from edgeq.converters.adapters.keep import KeptAdapter, sorted_factors
from edgeq.converters.disposition import Kept
from edgeq.converters.records import hash_inputs
from edgeq.deltas.adapter import Adapter
from edgeq.gguf_write import Written
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


@dataclass(frozen=True, kw_only=True)
class Base:
    """What adapters lie beside. model: as it went into the artifact. sorting: None when nothing was moved. sha256: of the artifact."""

    model: Model
    sorting: Sorting | None
    sha256: str


def write_kept(
    folder: Path,
    kept: Sequence[Kept],
    spec: ModelSpec,
    base: Base,
    write: Callable[[Path, KeptAdapter], Written],
    *,
    suffix: str,
    progress: Progress = silent,
) -> list[KeptFile]:
    """Write all of them into a package's folder. spec: of the model before sorting. write: one adapter, whose factors are on the base's
    model, to a file of that suffix.
    """
    if not kept:
        return []
    (folder / FOLDER).mkdir()
    sorting, fingerprint, files = base.sorting, str(take_fingerprint(base.model.tensors)), []
    for one in kept:
        found = replace(one.factors(), base_name=_title(one.adapter.base_name), base_fingerprint=fingerprint)
        if sorting is not None:
            moved = sorted_factors(spec, found.factors, sorting.orders, pair_order=sorting.pair_order, rotations=sorting.rotations)
            found = replace(found, factors=moved)
        path = folder / FOLDER / f"{one.plan.name}{suffix}"
        written = write(path, found)
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
            base_sha256=base.sha256,
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
