"""The plan of an encoder's export: format, grids, exact sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeq.converters.encoders.formats import FULL_RANGE, NARROW_RANGE, EncoderFormat, FormatName, parse_format
from edgeq.converters.encoders.graph import encoder
from edgeq.converters.encoders.rounding import rounded
from edgeq.converters.onnx.carrier import predicted_bytes
from edgeq.encoder_spec import EncoderModel
from edgeq.errors import PlanError
from edgeq.profile_keys import X86_ISA
from edgeq.profiles import DeviceProfile

_MIB = 1 << 20
_CPU_ONLY: tuple[FormatName, ...] = ("int8", "int4", "Q8_0")


@dataclass(frozen=True, kw_only=True)
class EncoderPlan:
    """file_bytes: model.onnx and model.onnx.data. weights: numbers in all tensors. grids: by canonical name. notes: why, for people."""

    profile: str
    format: EncoderFormat
    file_bytes: int
    weights: int
    grids: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def quant(self) -> str:
        return self.format.name

    @property
    def bits_per_weight(self) -> float:
        """Of the whole artifact, graph, norms and scales included."""
        return 8 * self.file_bytes / self.weights

    def to_json(self) -> dict[str, Any]:
        return {
            "profile": self.profile,
            "format": "onnx",
            "quant": self.quant,
            "file_bytes": self.file_bytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "grids": dict(self.grids),
            "notes": list(self.notes),
        }


def plan_encoder(model: EncoderModel, device: DeviceProfile, quant: str) -> EncoderPlan:
    """auto: float16 where the model runs on a GPU of NVIDIA, else int8, else int4 where int8 does not fit the budget.

    Raises UsageError for unknown formats, PlanError for those that the device has no kernels or no room for.
    """
    cuda = device.runtime.device == "cuda"
    budget = device.memory.budget_mib * _MIB
    if quant != "auto":
        name = parse_format(quant)
        if cuda and name in _CPU_ONLY:
            raise PlanError(f"{device.name} runs on cuda, where ONNX Runtime has no kernels for {name} encoders. Choose fp16 or fp32.")
        plan = _plan(model, device, name, ("as asked for",))
        if plan.file_bytes > budget:
            raise PlanError(
                f"{model.name} in {name} takes {plan.file_bytes:,} bytes; {device.name} has room for {budget:,}. Choose a smaller format."
            )
        return plan
    choices: tuple[tuple[FormatName, str], ...] = (("fp16", "for a GPU"),)
    if not cuda:
        choices = (("int8", "the fastest on a CPU"), ("int4", "int8 does not fit the budget"))
    for name, why in choices:
        plan = _plan(model, device, name, (why,))
        if plan.file_bytes <= budget:
            return plan
    raise PlanError(f"{model.name} in {choices[-1][0]} takes {plan.file_bytes:,} bytes; {device.name} has room for {budget:,}.")


def _plan(model: EncoderModel, device: DeviceProfile, name: FormatName, notes: tuple[str, ...]) -> EncoderPlan:
    isa = set(device.cpu.isa)
    narrow = name == "int8" and bool(isa & set(X86_ISA)) and "avx512_vnni" not in isa
    if narrow:
        notes = (*notes, "weights of 7 bits: x86 CPUs without VNNI add their products in 16 bits")
    form = EncoderFormat(name, NARROW_RANGE if narrow else FULL_RANGE)
    tensors = rounded(model, form)
    graph = encoder(model.spec, model.sentence, tensors, float_type=form.float_type)
    return EncoderPlan(
        profile=device.name,
        format=form,
        file_bytes=predicted_bytes(graph),
        weights=sum(math.prod(tensor.shape) for tensor in model.tensors.values()),
        grids={key: tensor.grid.name if form.name != "fp16" else form.grid(key, tensor).name for key, tensor in tensors.items()},
        notes=notes,
    )
