"""Memory that ONNX Runtime takes for a decoder, predicted from the model's sizes, as `edgeq.device_memory` does for llama.cpp.

The runtime maps the file with the weights and keeps matrices rearranged for its kernels beside it, in memory of its own: the file's pages
can go. Keys and values are float32 or float16, as the graph is, with room for the whole context from the start. Measured on x86-64 Linux
with onnxruntime 1.32 and SmolLM2-135M.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from edgeq.device_memory import MemoryEstimate, TensorPlan
from edgeq.footprint import CUDA_BYTES, MIB
from edgeq.profiles import DeviceProfile
from edgeq.spec import ModelSpec

BATCH_TOKENS = 512  # of a prompt, computed together
# Python, numpy and onnxruntime take 68 MiB, the tokenizers library with a vocabulary of 49,152 tokens and its merges 32 MiB.
PROCESS_BYTES = 70 * MIB
VOCABULARY_BYTES_PER_TOKEN = 680
# What the runtime keeps of matrices on a CPU, over their bytes in the file: 147 MiB for 88 of int4, 625 for 540 of fp32; float16 is
# computed with in float32, 543 MiB for 258.
REARRANGED, _KEPT_FLOATS, _KEPT_HALVES = 1.7, 1.2, 2.1


class OnnxRuntimeMemory:
    """`edgeq.planning.RuntimeMemory`. quants: what may fit, best first. half: whether the graph computes in float16."""

    def __init__(self, quants: Sequence[str], *, half: bool) -> None:
        self._quants, self._half = tuple(quants), half

    def quants(self, profile: DeviceProfile) -> Sequence[str]:
        return self._quants

    def kv_type(self, profile: DeviceProfile, spec: ModelSpec) -> tuple[str, list[str]]:
        """What the graph computes in; a profile's wish for something else is told."""
        kind = "f16" if self._half else "f32"
        wanted = profile.export.kv_type
        return kind, [] if wanted in ("f16", kind) else [f"cache: {kind} in place of {wanted}, because keys and values are as the graph is"]

    def estimate(
        self, profile: DeviceProfile, spec: ModelSpec, tensors: Iterable[TensorPlan], *, n_ctx: int, kv_type: str
    ) -> MemoryEstimate:
        tensors = tuple(tensors)
        weights = sum(t.nbytes for t in tensors)
        kv = kv_bytes(spec, n_ctx, half=self._half)
        compute = compute_bytes(spec, min(n_ctx, BATCH_TOKENS), half=self._half)
        process = PROCESS_BYTES + VOCABULARY_BYTES_PER_TOKEN * spec.n_vocab
        on_gpu = profile.runtime.device == "cuda"
        discrete = on_gpu and profile.discrete is not None
        return MemoryEstimate(
            model_bytes=weights if on_gpu else round(sum(self._kept(t) * t.nbytes for t in tensors)),
            kv_bytes=kv,
            compute_bytes=compute,
            runtime_bytes=(CUDA_BYTES if on_gpu else 0) + (0 if discrete else process),
            host_bytes=process if discrete else 0,
            reclaimable_bytes=0 if discrete else weights,
            n_ctx=n_ctx,
            kv_type=kv_type,
            flash_attention=True,
        )

    def _kept(self, tensor: TensorPlan) -> float:
        if not tensor.grid.is_float:
            return REARRANGED
        return _KEPT_HALVES if self._half else _KEPT_FLOATS


def kv_bytes(spec: ModelSpec, n_ctx: int, *, half: bool) -> int:
    """Exact bytes of keys and values for one sequence of n_ctx tokens, where past and present share their room."""
    return sum(2 * b.n_kv_heads * b.head_dim for b in spec.attention) * n_ctx * (2 if half else 4)


def compute_bytes(spec: ModelSpec, n_tokens: int, *, half: bool) -> int:
    """Estimate of values between operators, for n_tokens at once: of the widest MLP or attention and four residuals, twice, because the
    runtime's arena keeps pieces of every size; and one row of logits. 27 MiB for SmolLM2-135M and 512 tokens, measured were 20 to 43.
    """
    widest = max([3 * b.n_ff for b in spec.mlps] + [(2 * b.n_heads + 2 * b.n_kv_heads) * b.head_dim for b in spec.attention])
    return (2 if half else 4) * (2 * n_tokens * (widest + 4 * spec.n_embd) + spec.n_vocab)
