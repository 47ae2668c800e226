"""A carrier: what an export asks of a file format. GGUF is for llama.cpp, ONNX for ONNX Runtime and onnxruntime-genai.

A carrier drafts a package (`edgeq.converters.draft`), plans what has changed since, writes the model and the adapters beside it. It sees
models in canonical form (`edgeq.model`), as sorting and pruning leave them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from edgeq.calibration import Importance, Ranges
from edgeq.converters.disposition import Kept
from edgeq.converters.draft import Draft, Wish
from edgeq.converters.gguf.encode import RegridError
from edgeq.converters.kept_files import KeptFile
from edgeq.device_memory import TensorPlan
from edgeq.errors import MissingDependency
from edgeq.model import Model, Tokenizer
from edgeq.package import ArtifactRecord
from edgeq.planning import Plan
from edgeq.profiles import DeviceProfile
from edgeq.progress import Progress, silent
from edgeq.sorting import Sorting
from edgeq.spec import ModelSpec

Format = Literal["gguf", "onnx"]
FormatWish = Literal["gguf", "onnx", "auto"]


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A model that was written into a package's folder.

    path: what its runtime is given: the .gguf, or model.onnx in a folder of its own. records: the files with its weights. side: the
    others. architecture: what the runtime takes it for. tensors, errors: what was written, and what encoding lost, by name. tokenizer:
    the source's, as the runtime has it. differs: on which input a runtime gives other ids than that, in words. tools: packages that
    wrote it. rope_ctx: the context by which LongRoPE chose its factors; None where the runtime does.
    """

    path: Path
    records: tuple[ArtifactRecord, ...]
    architecture: str
    tensors: tuple[TensorPlan, ...]
    errors: Mapping[str, RegridError]
    tokenizer: Tokenizer
    differs: tuple[str, ...]
    side: tuple[Path, ...] = ()
    rope_ctx: int | None = None
    tools: tuple[str, ...] = field(default=("edgeq", "numpy", "torch"))


class Carrier(Protocol):
    @property
    def format(self) -> Format: ...

    def draft(
        self, model: Model, device: DeviceProfile, quant: str, wish: Wish, *, n_ctx: int | None, adapted: Collection[str] = ()
    ) -> Draft:
        """Choose. adapted: matrices that adapters beside the file change ("layers.3.wq", "head").

        Raises PlanError when nothing fits the device, UnsupportedError for an unknown quant or for what cannot be as wished.
        """
        ...

    def plan(self, model: Model, device: DeviceProfile, quant: str, *, n_ctx: int | None) -> Plan:
        """Of a pruned model. Raises as `draft`."""
        ...

    def refit(self, plan: Plan, model: Model) -> Plan:
        """The plan of an elastic package, for the model in sorted order."""
        ...

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
        """Write a model into a package's folder. plan: of this model; draft: what it is to be. importance, ranges: of the inputs of
        linears, where the plan needs them. progress: step "write", in bytes."""
        ...

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
        """Write adapters beside an artifact. spec: of the model before sorting; model: as it was written."""
        ...


def carrier_for(wish: FormatWish, device: DeviceProfile) -> Carrier:
    """The carrier of a format; auto is the one for the profile's runtime."""
    if wish == "onnx" or (wish == "auto" and device.runtime.name == "onnxruntime"):
        try:
            from edgeq.converters.onnx.export import OnnxCarrier
        except ModuleNotFoundError as err:
            raise MissingDependency(err.name or "onnx-ir", "export") from err
        return OnnxCarrier()
    from edgeq.converters.gguf.export import GgufCarrier

    return GgufCarrier()
