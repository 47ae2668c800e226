"""Where a model's tensors live on a device, what they and everything around them take there, and how fast memory lets them be read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgeq.footprint import CUDA_BYTES, compute_bytes, has_flash_attention, is_repacked, kv_bytes, process_bytes
from edgeq.grids import Grid
from edgeq.profiles import DeviceProfile
from edgeq.spec import ModelSpec

Action = Literal["copy", "encode"]


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """One tensor of the file to come.

    role: canonical role, or a carrier's name for joined ones. layer: None outside the blocks. shape: (n,) or (n_out, n_in).
    nbytes: without padding. action: "copy" keeps the source's bytes.
    """

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    source_grid: Grid
    grid: Grid
    nbytes: int
    action: Action

    @property
    def n_values(self) -> int:
        return self.shape[0] * (self.shape[1] if len(self.shape) == 2 else 1)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "role": self.role,
            "layer": self.layer,
            "shape": list(self.shape),
            "source_grid": self.source_grid.name,
            "grid": self.grid.name,
            "bytes": self.nbytes,
            "action": self.action,
        }


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Predicted memory while a model runs, in bytes.

    model, kv, compute and runtime_bytes are in the memory that the budget is for (VRAM of a discrete accelerator, else RAM); host_bytes
    is what stays in RAM beside a discrete accelerator, else 0. reclaimable_bytes: pages of the file whose weights llama.cpp holds in a
    second, rearranged form; they count in the resident size until the system wants them back, so a budget need not hold them.
    """

    model_bytes: int
    kv_bytes: int
    compute_bytes: int
    runtime_bytes: int
    host_bytes: int
    reclaimable_bytes: int
    n_ctx: int
    kv_type: str
    flash_attention: bool

    @property
    def total_bytes(self) -> int:
        return self.model_bytes + self.kv_bytes + self.compute_bytes + self.runtime_bytes

    def to_json(self) -> dict[str, Any]:
        return {
            "total_bytes": self.total_bytes,
            "model_bytes": self.model_bytes,
            "kv_bytes": self.kv_bytes,
            "compute_bytes": self.compute_bytes,
            "runtime_bytes": self.runtime_bytes,
            "host_bytes": self.host_bytes,
            "reclaimable_bytes": self.reclaimable_bytes,
            "n_ctx": self.n_ctx,
            "kv_type": self.kv_type,
            "flash_attention": self.flash_attention,
        }


def estimate_memory(profile: DeviceProfile, spec: ModelSpec, tensors: Iterable[TensorPlan], *, n_ctx: int, kv_type: str) -> MemoryEstimate:
    """Memory on the profile's device, one sequence of n_ctx tokens, weights mapped from the file."""
    tensors = tuple(tensors)
    device, isa = profile.runtime.device, profile.cpu.isa
    flash = has_flash_attention(spec, device)
    kv = kv_bytes(spec, n_ctx, kv_type, flash_attention=flash)
    compute = compute_bytes(spec, n_ctx, flash_attention=flash)
    process = process_bytes(spec)
    shared: dict[str, Any] = {"n_ctx": n_ctx, "kv_type": kv_type, "flash_attention": flash}
    if device == "cpu":
        matrices = [t for t in tensors if len(t.shape) == 2 and (t.role != "embed" or spec.tied)]
        return MemoryEstimate(
            model_bytes=sum(t.nbytes for t in tensors),
            kv_bytes=kv,
            compute_bytes=compute,
            runtime_bytes=process,
            host_bytes=0,
            reclaimable_bytes=sum(t.nbytes for t in matrices if is_repacked(t.grid, t.shape[0], isa)),
            **shared,
        )
    offloaded = _offloaded(profile, spec)
    on_device = sum(t.nbytes for t in tensors if _is_offloaded(t, offloaded, spec))
    gpu_runtime = CUDA_BYTES if device == "cuda" else 0
    if profile.discrete is None:
        # Metal maps the file itself; CUDA copies what it computes with, and the file's pages can go.
        return MemoryEstimate(
            model_bytes=sum(t.nbytes for t in tensors),
            kv_bytes=kv,
            compute_bytes=compute,
            runtime_bytes=process + gpu_runtime,
            host_bytes=0,
            reclaimable_bytes=on_device if device == "cuda" else 0,
            **shared,
        )
    kv_on_device = kv_bytes(spec, n_ctx, kv_type, flash_attention=flash, layers=offloaded)
    # Embeddings are looked up in RAM; a tied one is in both memories, for the head computes on the device.
    stays = sum(t.nbytes for t in tensors if t.role == "embed" or not _is_offloaded(t, offloaded, spec))
    host_compute = compute if kv_on_device < kv else 0
    return MemoryEstimate(
        model_bytes=on_device,
        kv_bytes=kv_on_device,
        compute_bytes=compute,
        runtime_bytes=gpu_runtime,
        host_bytes=stays + kv - kv_on_device + host_compute + process,
        reclaimable_bytes=0,
        **shared,
    )


def decode_bound(profile: DeviceProfile, spec: ModelSpec, tensors: Sequence[TensorPlan]) -> float:
    """Tokens per second if reading every weight once per token were all the work."""
    read = [t for t in tensors if t.role != "embed" or spec.tied]
    fast = set() if profile.runtime.device == "cpu" else _offloaded(profile, spec)
    on_device = sum(t.nbytes for t in read if _is_offloaded(t, fast, spec))
    on_cpu = sum(t.nbytes for t in read) - on_device
    seconds = on_cpu / profile.cpu.mem_bandwidth_gb_s
    if on_device:
        assert profile.accelerator is not None
        seconds += on_device / profile.accelerator.mem_bandwidth_gb_s
    return 1e9 / seconds


def _offloaded(profile: DeviceProfile, spec: ModelSpec) -> frozenset[int]:
    """Layers on the accelerator; the head counts as layer n_layers. llama.cpp takes them from the end."""
    n = spec.n_layers + 1
    count = n if profile.runtime.gpu_layers is None else min(profile.runtime.gpu_layers, n)
    return frozenset(range(n - count, n))


def _is_offloaded(t: TensorPlan, offloaded: Collection[int], spec: ModelSpec) -> bool:
    if t.role == "embed" and not spec.tied:
        return False  # looked up on the CPU; a tied one is copied for the head
    return (spec.n_layers if t.layer is None else t.layer) in offloaded
