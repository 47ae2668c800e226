"""GGUF as a carrier of packages: one file for llama.cpp, LoRA files beside it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from edgeq.calibration import Importance, Ranges
from edgeq.converters.adapters.gguf_writer import write_lora
from edgeq.converters.adapters.keep import KeptAdapter
from edgeq.converters.carriers import Artifact, Format
from edgeq.converters.disposition import Kept, factor_grid
from edgeq.converters.draft import Draft, Wish, artifact_name
from edgeq.converters.gguf.carrier import write_model
from edgeq.converters.gguf.draft import draft_export, plan_export, refitted
from edgeq.converters.gguf.lowering import Lowered, lower
from edgeq.converters.kept_files import Base, KeptFile, write_kept
from edgeq.gguf_write import Written
from edgeq.model import Model
from edgeq.package import ArtifactRecord
from edgeq.planning import Plan
from edgeq.profiles import DeviceProfile
from edgeq.progress import Progress, silent
from edgeq.sorting import Sorting
from edgeq.spec import ModelSpec


class GgufCarrier:
    """`edgeq.converters.carriers.Carrier`. Architectures and grids are those of llama.cpp: see `lowering` and `mixes`."""

    format: Format = "gguf"

    def draft(
        self, model: Model, device: DeviceProfile, quant: str, wish: Wish, *, n_ctx: int | None, adapted: Collection[str] = ()
    ) -> Draft:
        return draft_export(model, device, quant, wish, n_ctx=n_ctx)

    def plan(self, model: Model, device: DeviceProfile, quant: str, *, n_ctx: int | None) -> Plan:
        return plan_export(lower(model, elastic=True), model, device, quant, n_ctx=n_ctx)

    def refit(self, plan: Plan, model: Model) -> Plan:
        return refitted(plan, lower(model, elastic=True))

    def write(
        self,
        folder: Path,
        model: Model,
        device: DeviceProfile,
        draft: Draft,
        plan: Plan,
        importance: Importance | None,
        *,
        ranges: Ranges | None = None,
        threads: int | None = None,
        progress: Progress = silent,
    ) -> Artifact:
        lowered = _lowered(model, draft)
        path = folder / f"{artifact_name(model.name, plan.quant, draft.prune)}.gguf"
        grids = {tensor.name: tensor.grid for tensor in plan.tensors}
        written = write_model(path, lowered, grids, importance, threads=threads, measure=True, progress=progress)
        return Artifact(
            path=path,
            records=(ArtifactRecord(path=path.name, format="gguf", bytes=written.nbytes, sha256=written.sha256),),
            architecture=lowered.arch,
            tensors=written.tensors,
            errors=written.errors,
            tokenizer=model.tokenizer,
            differs=model.tokenizer.differs,
            tools=("edgeq", "gguf", "llama-cpp-python", "numpy", "torch"),
        )

    def write_kept(
        self,
        folder: Path,
        kept: Sequence[Kept],
        spec: ModelSpec,
        model: Model,
        draft: Draft,
        sorting: Sorting | None,
        artifact: Artifact,
        *,
        progress: Progress = silent,
    ) -> list[KeptFile]:
        if not kept:
            return []
        grid, lowered = factor_grid(draft.plan), _lowered(model, draft)

        def write(path: Path, adapter: KeptAdapter) -> Written:
            return write_lora(path, adapter, lowered, grid=grid, progress=progress)

        base = Base(model=model, sorting=sorting, sha256=artifact.records[0].sha256)
        return write_kept(folder, kept, spec, base, write, suffix=".gguf", progress=progress)


def _lowered(model: Model, draft: Draft) -> Lowered:
    return lower(model, elastic=draft.cuts is not None)
