"""ONNX as a carrier of packages: a folder of its own in the package, which onnxruntime and onnxruntime-genai load as it is.

    NAME/model.onnx, model.onnx.data                    the graph and its weights
    NAME/genai_config.json                              sizes, names, where a generation ends
    NAME/tokenizer.json, tokenizer_config.json, ..      the tokenizer and the chat template

Packages are elastic (`cuttable`), or have one size: the model's, or what --prune leaves of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir

from edgeq import ports
from edgeq.base_fingerprint import take_fingerprint
from edgeq.calibration import Importance, Ranges
from edgeq.converters.adapters.keep import KeptAdapter
from edgeq.converters.carriers import Artifact, Format
from edgeq.converters.disposition import Kept
from edgeq.converters.draft import RATES, Draft, Wish, artifact_name, instead
from edgeq.converters.gguf.cuttable import Cuttable
from edgeq.converters.gguf.encode import RegridError
from edgeq.converters.kept_files import Base, KeptFile, write_kept
from edgeq.converters.onnx.adapter_writer import write_kept_adapter
from edgeq.converters.onnx.builder import Builder
from edgeq.converters.onnx.carrier import DATA_FILE, MODEL_FILE, predicted_bytes, write_onnx
from edgeq.converters.onnx.cuttable import elastic_grids, elastic_model, find_cuts, grid_for, with_down_bias
from edgeq.converters.onnx.decoder import decoder
from edgeq.converters.onnx.genai import GENAI_FILE, genai_config, shares_buffer, to_bytes
from edgeq.converters.onnx.lora import places_for
from edgeq.converters.onnx.lowering import HEAD_STEP, describe, lowerings
from edgeq.converters.onnx.names import canonical_name, module_name
from edgeq.converters.onnx.quants import OnnxQuant, auto_names, choose_grids, fallback_notes, is_quantized, onnx_quant
from edgeq.converters.onnx.tokenizer_files import tokenizer_files
from edgeq.converters.sorted_model import LEAST_STEP, Cuts, even_ladder
from edgeq.device_memory import TensorPlan
from edgeq.elastic import Kept as Sizes
from edgeq.elastic import steps_for_rate
from edgeq.errors import PlanError, UnsupportedError
from edgeq.families import FUSED, family
from edgeq.gguf_write import Written
from edgeq.grids import Grid
from edgeq.model import Model
from edgeq.onnx_adapter_file import PLAN_KEY, SUFFIX
from edgeq.onnx_memory import OnnxRuntimeMemory
from edgeq.package import ArtifactRecord
from edgeq.planning import Layout, Plan, make_plan
from edgeq.profiles import DeviceProfile
from edgeq.progress import Progress, silent
from edgeq.sorting import Sorting
from edgeq.spec import ModelSpec
from edgeq.transforms import NORMED

_LEAST_POSITIONS = 32768  # 16 MiB of cosines and sines for heads of 128 dimensions


class OnnxCarrier:
    """`edgeq.converters.carriers.Carrier`. Grids are those of `quants`."""

    format: Format = "onnx"

    def draft(
        self, model: Model, device: DeviceProfile, quant: str, wish: Wish, *, n_ctx: int | None, adapted: Collection[str] = ()
    ) -> Draft:
        places = places_for(model, adapted)
        if wish.elastic is False and not wish.prune:
            return self._fixed(model, device, quant, places, n_ctx=n_ctx)
        if not wish.prune:
            return self._elastic(model, device, quant, wish, places, n_ctx=n_ctx)
        cuts, sort = _cuts(quant, model.spec), wish.sort or "edgeq"
        ladder = even_ladder(model, cuts, sort)
        spec, tensors = ports.cut(model.spec, model.tensors, ladder.kept(steps_for_rate(ladder, wish.prune)))
        plan = self.plan(replace(model, spec=spec, tensors=tensors), device, quant, n_ctx=n_ctx)
        note = f"pruned by {wish.prune:g}: sizes are those of a cut that takes the same from all layers; sorting will decide"
        plan = plan.with_notes(note, *cuts.notes)
        return Draft(plan=plan, elastic=False, sort=sort, prune=wish.prune, cuts=cuts, down_bias=True)

    def _fixed(self, model: Model, device: DeviceProfile, quant: str, places: frozenset[str], *, n_ctx: int | None) -> Draft:
        plan = self._plan(model, device, quant, choose_grids, places, n_ctx=n_ctx)
        return Draft(plan=plan, elastic=False, sort="none", prune=0.0, cuts=None, adapted=places, tied_apart=True)

    def _elastic(self, model: Model, device: DeviceProfile, quant: str, wish: Wish, places: frozenset[str], *, n_ctx: int | None) -> Draft:
        sort = wish.sort or "edgeq"

        def fixed() -> Draft:
            return self._fixed(model, device, quant, places, n_ctx=n_ctx)

        try:
            ready = elastic_model(model, sort)
            plan = self._plan(ready, device, quant, partial(elastic_grids, came=model), places, n_ctx=n_ctx)
            chosen = onnx_quant(plan.quant)
            half = plan.memory.kv_type == "f16"
            grids = elastic_grids(chosen, came=model, model=ready, half=half)
            cuts = find_cuts(ready, grids)
            ladder = even_ladder(model, cuts, sort)
        except UnsupportedError as err:
            return instead(model, wish, err, fixed)

        def nbytes(kept: Sizes) -> int:
            spec, tensors = ports.cut(ready.spec, ready.tensors, kept)
            left = replace(ready, spec=spec, tensors=tensors)
            fitted = {name: grid_for(grids[name], ready.tensors[name].n_cols, tensor.n_cols) for name, tensor in tensors.items()}
            builder = decoder(left, fitted, float_type=_float_type(half), n_ctx=_rows(plan, ready), join=True, adapted=places)
            return predicted_bytes(builder, metadata=_metadata(ready, chosen, places))

        plan = replace(plan, cut_sizes=ladder.sizes(nbytes, RATES)).with_notes(*cuts.notes)
        return Draft(plan=plan, elastic=True, sort=sort, prune=0.0, cuts=cuts, adapted=places, tied_apart=True)

    def plan(self, model: Model, device: DeviceProfile, quant: str, *, n_ctx: int | None) -> Plan:
        return self._plan(model, device, quant, choose_grids, frozenset(), n_ctx=n_ctx)

    def _plan(self, model: Model, device: DeviceProfile, quant: str, choose: Choose, places: frozenset[str], *, n_ctx: int | None) -> Plan:
        listed = auto_names(device.export.grids, quantized=is_quantized(model))
        names = listed if quant == "auto" else (onnx_quant(quant).name,)
        rows = n_positions(model.spec, device.export.n_ctx if n_ctx is None else n_ctx)
        refused: PlanError | None = None
        for name in names:
            chosen = onnx_quant(name)
            half = _half(chosen, device)
            lay_out = partial(_layout, model, device=device, rows=rows, choose=choose, places=places)
            try:
                plan = make_plan(device, name, lay_out, model.spec, n_ctx=n_ctx, runtime=OnnxRuntimeMemory(listed, half=half))
            except PlanError as err:
                refused = err
            else:
                lowered = describe(lowerings(model.spec))
                return plan.with_notes(*lowered, *fallback_notes(chosen, model, choose(chosen, model=model, half=half)))
        assert refused is not None
        raise refused

    def refit(self, plan: Plan, model: Model) -> Plan:
        return plan  # sorting changes no size

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
        target = folder / artifact_name(model.name, plan.quant, draft.prune)
        target.mkdir()
        quant, half = onnx_quant(plan.quant), plan.memory.kv_type == "f16"
        errors: dict[str, RegridError] = {}
        adapters = plan_of(model) if draft.adapted else ""
        if draft.elastic:
            model = with_down_bias(model, draft.sort)
            grids = _planned_grids(model, plan)
        else:
            grids = choose_grids(quant, model, half=half, ranges=ranges)
        rows = _rows(plan, model)
        settings: dict[str, Any] = {"join": True, "adapted": draft.adapted, "importance": importance, "errors": errors}
        builder = decoder(model, grids, float_type=_float_type(half), n_ctx=rows, **settings)
        metadata = _metadata(model, quant, draft.adapted, plan=adapters)
        written = {file.name: file for file in write_onnx(target, builder, metadata=metadata, progress=progress)}
        tokenizer = tokenizer_files(model.tokenizer, n_ctx=model.spec.n_ctx)
        config = genai_config(
            model.spec,
            model.tokenizer.vocabulary,
            filename=MODEL_FILE,
            n_ctx=rows,
            max_length=plan.memory.n_ctx,
            share_buffer=shares_buffer(builder.model()),
            provider="cuda" if device.runtime.device == "cuda" else "cpu",
        )
        (target / GENAI_FILE).write_bytes(to_bytes(config))
        records = [
            ArtifactRecord(path=f"{target.name}/{name}", format="onnx", bytes=written[name].nbytes, sha256=written[name].sha256)
            for name in (MODEL_FILE, DATA_FILE)
            if name in written
        ]
        return Artifact(
            path=target / MODEL_FILE,
            records=tuple(records),
            architecture=model.spec.family,
            tensors=plan.tensors,
            errors=errors,
            tokenizer=tokenizer.tokenizer,
            differs=tokenizer.differs,
            side=(target / GENAI_FILE, *tokenizer.write(target)),
            rope_ctx=rows if model.spec.rope.kind == "longrope" else None,
            tools=("edgeq", "numpy", "onnx", "onnx-ir", "tokenizers", "torch"),
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
        half, plan = draft.plan.memory.kv_type == "f16", plan_of(model)

        def write(path: Path, adapter: KeptAdapter) -> Written:
            return write_kept_adapter(path, adapter, model, half=half, plan=plan)

        base = Base(model=model, sorting=sorting, sha256=artifact.records[-1].sha256)
        return write_kept(folder, kept, spec, base, write, suffix=SUFFIX, progress=progress)


def _half(quant: OnnxQuant, device: DeviceProfile) -> bool:
    """Whether the graph computes in float16: CUDA has no attention for float32."""
    return quant.half or (device.runtime.device == "cuda" and quant.name != "fp32")


def _float_type(half: bool) -> ir.DataType:
    return ir.DataType.FLOAT16 if half else ir.DataType.FLOAT


def _metadata(model: Model, quant: OnnxQuant, places: frozenset[str], *, plan: str = "0" * 64) -> dict[str, str]:
    """plan: of adapters (`plan_of`), of a graph that has places for them; another one of that length while sizes are asked for."""
    told = {PLAN_KEY: plan} if places else {}
    return {"edgeq.name": model.name, "edgeq.family": model.spec.family, "edgeq.quant": quant.name, **told}


def plan_of(model: Model) -> str:
    """What adapters for a model are laid out for: its weights, in their order."""
    return take_fingerprint(model.tensors).digest


def n_positions(spec: ModelSpec, planned: int) -> int:
    """Tokens that rotary tables have room for: the planned context, and as much of the model's as costs little.

    LongRoPE's factors go by the planned context alone.
    """
    if spec.rope.kind == "longrope":
        return min(planned, spec.n_ctx)
    return min(spec.n_ctx, max(planned, _LEAST_POSITIONS))


class Choose(Protocol):
    """Grids of a model's tensors."""

    def __call__(self, quant: OnnxQuant, *, model: Model, half: bool) -> Mapping[str, Grid]: ...


def _rows(plan: Plan, model: Model) -> int:
    return n_positions(model.spec, plan.memory.n_ctx)


def _planned_grids(model: Model, plan: Plan) -> dict[str, Grid]:
    """What a plan says, by canonical name."""
    row, planned = family(model.spec.family), {tensor.name: tensor.grid for tensor in plan.tensors}

    def stored(name: str) -> str:
        canonical, kind = name.rsplit(".", 1)
        return f"{module_name(row, canonical)}{'' if kind == 'weight' else '.bias'}"

    return {name: planned[found] if (found := stored(name)) in planned else planned[stored(_joined(name))] for name in model.tensors}


def _layout(model: Model, name: str, *, device: DeviceProfile, rows: int, choose: Choose, places: frozenset[str]) -> Layout:
    quant = onnx_quant(name)
    half = _half(quant, device)
    grids = choose(quant, model=model, half=half)
    builder = decoder(model, grids, float_type=_float_type(half), n_ctx=rows, join=True, adapted=places)
    file_bytes = predicted_bytes(builder, metadata=_metadata(model, quant, places))
    return Layout(tensors=_tensor_plans(model, grids, builder), file_bytes=file_bytes)


def _tensor_plans(model: Model, grids: Mapping[str, Grid], builder: Builder) -> tuple[TensorPlan, ...]:
    """Every tensor of the graph, joined ones under the name of what they make together, with the bytes of its initializers."""
    row = family(model.spec.family)
    sizes: Counter[str] = Counter()
    for name, value in builder.model().graph.initializers.items():
        found = canonical_name(row, name)
        if found is not None and value.const_value is not None and value.const_value.nbytes:
            canonical, part = found
            sizes[f"{canonical}.bias" if part.endswith("bias") else f"{canonical}.weight"] += value.const_value.nbytes
    plans: dict[str, TensorPlan] = {}
    for name, tensor in model.tensors.items():
        stored = name if name in sizes else _joined(name)
        canonical, kind = stored.rsplit(".", 1)
        parts, suffix = canonical.split("."), "" if kind == "weight" else ".bias"
        if stored in plans:
            n_rows = plans[stored].shape[0] + tensor.shape[0]
            plans[stored] = replace(plans[stored], shape=(n_rows, *tensor.shape[1:]))
            continue
        plans[stored] = TensorPlan(
            name=f"{module_name(row, canonical)}{suffix}",
            role=f"{parts[-1]}{suffix}",
            layer=int(parts[1]) if parts[0] == "layers" else None,
            shape=tensor.shape,
            source_grid=tensor.grid,
            grid=grids[name],
            nbytes=sizes[stored],
            action="copy" if grids[name] == tensor.grid else "encode",
        )
    return tuple(plans.values())


def _joined(name: str) -> str:
    """Canonical name of what a tensor is a part of: "layers.3.wqkv.weight" for "layers.3.wq.weight"."""
    prefix, role, kind = name.rsplit(".", 2)
    return f"{prefix}.{next(whole for whole, parts in FUSED.items() if role in parts)}.{kind}"


def _cuts(quant: str, spec: ModelSpec) -> Cuts:
    """What --prune may take: each layer has sizes of its own in a graph. Channels go in whole blocks, as kernels of GPUs want them."""
    block = 32 if quant == "auto" else onnx_quant(quant).block_size
    free = Cuttable("per layer")
    head, sizes = _cut_heads(spec)
    found = {"ffn": free, "kv_group": free, "head": head, "layer": Cuttable("no", "a graph keeps every layer."), "vo": head, "qk": head}
    return Cuts(ports=found, channel_step=math.lcm(LEAST_STEP, block), head_sizes=sizes)


def _cut_heads(spec: ModelSpec) -> tuple[Cuttable, tuple[int, ...]]:
    """Whether heads may lose dimensions, and the sizes that they may have: those that keep GroupQueryAttention, down to a quarter."""
    full = sorted({block.head_dim for block in spec.attention})
    if family(spec.family).qk_norm:
        return Cuttable("no", NORMED.format(spec.family, "without some dimensions all others change")), ()
    if len(full) > 1 or full[0] % 2:
        return Cuttable("no", f"heads of {full} dimensions have no common RoPE pairs."), ()
    top = (full[0] - 1) // HEAD_STEP * HEAD_STEP
    sizes = tuple(range(top, max(HEAD_STEP, full[0] // 4) - 1, -HEAD_STEP))
    if not sizes:
        return Cuttable("no", f"heads of {full[0]} dimensions have no smaller size that GroupQueryAttention takes."), ()
    return Cuttable("per layer"), sizes
