"""The plan of an export: a grid for every tensor, exact file size, predicted memory on the device, and whether it all fits.

How `auto` chooses, in this order:
1. A quantized source is not inflated: a listed grid is struck off when its block matrices would take more than 0.25 bits per weight
   above the source's. More bits than the source has cannot bring back what it lost.
2. When that strikes off grids, the source's own grid takes their place, unless a grid with the same base remains: it is a copy of the
   source's bytes, so nothing smaller in the list can be better.
3. On a CPU, a grid is passed over when llama.cpp would not rearrange most of its weights for speed while another grid's it would; this
   applies to the source's own grid and to listed ones that lose the speed because the model's rows do not divide into their blocks.
4. Of the grids that are left, from best to smallest, the first whose memory fits the profile's budget is taken; when none of them fits,
   the first that rule 3 passed over and that does.

Planning knows no file format: the carrier comes in as a callable that lays out the model under a quant name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from edgeq.adapter_plan import AdapterPlan
from edgeq.detect import available_ram
from edgeq.device_memory import MemoryEstimate, TensorPlan, decode_bound, estimate_memory
from edgeq.elastic import CutSize
from edgeq.errors import PlanError, UnsupportedError
from edgeq.footprint import MIB, has_flash_attention, is_repacked
from edgeq.grids import Grid, grid
from edgeq.profile_keys import base_grid
from edgeq.profiles import DeviceProfile
from edgeq.spec import Mlp, ModelSpec

MARGIN_BITS = 0.25  # rule 1: Q4_K_M stays possible for a Q4_1 source, not for a Q4_0 source
MOSTLY = 0.5  # rule 3: share of the block weights

# Export: Python with torch, numpy, tokenizers, gguf and the llama library, resident after import; measured on x86-64 Linux.
EXPORT_PROCESS_BYTES = 240 * MIB
SIDE_BYTES = 2 << 20  # manifest, fingerprint
SIDE_RANK = 64  # columns of a layer's model of hidden activations, in half precision
_EXPORT_BATCH_TOKENS = 1024  # tokens that pass through a block together (edgeq.reference)
_EXPORT_HEAD_BYTES = 512 * MIB  # a larger head is decoded in pieces (edgeq.reference)
_GATE_WINDOW_TOKENS = 512
_GATE_LOGITS = 4  # the reference's, the artifact's, and values between while they are compared


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A model under one quant name: tensors in file order, exact size of the file."""

    tensors: tuple[TensorPlan, ...]
    file_bytes: int


class RuntimeMemory(Protocol):
    """What planning asks of the runtime that a file is for."""

    def quants(self, profile: DeviceProfile) -> Sequence[str]:
        """Names of quants that may fit where another does not, best first."""
        ...

    def kv_type(self, profile: DeviceProfile, spec: ModelSpec) -> tuple[str, list[str]]:
        """What keys and values are kept in, and notes on why."""
        ...

    def estimate(
        self, profile: DeviceProfile, spec: ModelSpec, tensors: Iterable[TensorPlan], *, n_ctx: int, kv_type: str
    ) -> MemoryEstimate:
        """Memory on the profile's device for one sequence of n_ctx tokens."""
        ...


class _LlamaCpp:
    def quants(self, profile: DeviceProfile) -> Sequence[str]:
        return profile.export.grids

    def kv_type(self, profile: DeviceProfile, spec: ModelSpec) -> tuple[str, list[str]]:
        return _kv_type(profile, spec)

    def estimate(
        self, profile: DeviceProfile, spec: ModelSpec, tensors: Iterable[TensorPlan], *, n_ctx: int, kv_type: str
    ) -> MemoryEstimate:
        return estimate_memory(profile, spec, tensors, n_ctx=n_ctx, kv_type=kv_type)


LLAMA_CPP: RuntimeMemory = _LlamaCpp()

# The carrier: from a quant name to a layout. Raises UnsupportedError for a name it does not know.
LayOut = Callable[[str], Layout]


@dataclass(frozen=True, kw_only=True)
class SummaryRow:
    """One row of a plan's table. share: of the bytes of all tensors."""

    role: str
    source_grid: str
    grid: str
    count: int
    nbytes: int
    share: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A model laid out for a device.

    quant: the name that was chosen, never "auto". file_bytes: exact. decode_bound_tok_s: tokens per second that memory bandwidth allows,
    for one sequence with an empty cache. cut_sizes: of an elastic package, as if all parts of the model mattered the same. adapters: what
    becomes of each.
    """

    profile: str
    quant: str
    tensors: tuple[TensorPlan, ...]
    file_bytes: int
    memory: MemoryEstimate
    budget_bytes: int
    decode_bound_tok_s: float
    notes: tuple[str, ...] = ()
    cut_sizes: tuple[CutSize, ...] = ()
    adapters: tuple[AdapterPlan, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors, scales included."""
        return 8 * sum(t.nbytes for t in self.tensors) / sum(t.n_values for t in self.tensors)

    @property
    def needs_importance(self) -> bool:
        """Whether a tensor is to be encoded in blocks, which an importance matrix improves."""
        return any(t.action == "encode" and not t.grid.is_float for t in self.tensors)

    @property
    def needs_ranges(self) -> bool:
        """Whether inputs of linears are to be rounded to calibrated ranges."""
        return self.quant == "w8a8-static"

    def with_notes(self, *notes: str) -> Plan:
        """The same plan with more notes at its end."""
        return replace(self, notes=(*self.notes, *notes))

    def summary(self) -> tuple[SummaryRow, ...]:
        """Tensors by role, source grid and grid, in order of first appearance."""
        groups: dict[tuple[str, str, str], list[int]] = {}
        for t in self.tensors:
            groups.setdefault((t.role, t.source_grid.name, t.grid.name), []).append(t.nbytes)
        total = sum(t.nbytes for t in self.tensors)
        return tuple(
            SummaryRow(role=role, source_grid=source, grid=name, count=len(sizes), nbytes=sum(sizes), share=sum(sizes) / total)
            for (role, source, name), sizes in groups.items()
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "profile": self.profile,
            "quant": self.quant,
            "file_bytes": self.file_bytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "budget_bytes": self.budget_bytes,
            "memory": self.memory.to_json(),
            "decode_bound_tok_s": round(self.decode_bound_tok_s, 2),
            "notes": list(self.notes),
            "cut_sizes": [size.to_json() for size in self.cut_sizes],
            "adapters": [adapter.to_json() for adapter in self.adapters],
            "tensors": [t.to_json() for t in self.tensors],
        }


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    quant: str
    tensors: tuple[TensorPlan, ...]
    file_bytes: int
    memory: MemoryEstimate

    @property
    def matrices(self) -> tuple[TensorPlan, ...]:
        return _block_matrices(self.tensors)

    @property
    def bits(self) -> float:
        """Bits per weight of the block matrices."""
        return _average((t.grid.bits, t.n_values) for t in self.matrices)


def make_plan(
    profile: DeviceProfile, quant: str, lay_out: LayOut, spec: ModelSpec, *, n_ctx: int | None = None, runtime: RuntimeMemory | None = None
) -> Plan:
    """Choose grids and check that the model fits the device, before any work is done.

    quant: a name the carrier knows, or "auto". n_ctx: context to plan memory for, the profile's by default; the model's own length is
    the most. runtime: what will run the file, llama.cpp by default; the rules of auto are made for that. Raises PlanError with needed and
    available bytes and remedies when nothing fits, UnsupportedError for an unknown quant.
    """
    wanted_ctx = profile.export.n_ctx if n_ctx is None else n_ctx
    if wanted_ctx < 1:
        raise PlanError(f"a context of {wanted_ctx} tokens cannot be planned. Use at least 1.")
    notes: list[str] = []
    used_ctx = min(wanted_ctx, spec.n_ctx)
    if used_ctx < wanted_ctx:
        notes.append(f"context: {wanted_ctx:,} tokens wanted, planned for the {used_ctx:,} that the model was trained for")
    runtime = runtime or LLAMA_CPP
    kv_type, kv_note = runtime.kv_type(profile, spec)
    notes += kv_note

    def candidate(name: str) -> _Candidate:
        layout = lay_out(name)
        memory = runtime.estimate(profile, spec, layout.tensors, n_ctx=used_ctx, kv_type=kv_type)
        return _Candidate(quant=name, tensors=layout.tensors, file_bytes=layout.file_bytes, memory=memory)

    if quant == "auto":
        chosen, choice_notes = _choose(profile, spec, candidate, runtime)
        notes += choice_notes
    else:
        chosen = candidate(quant)
        if not _fits(profile, chosen):
            raise PlanError(
                _refusal(
                    profile,
                    spec,
                    chosen,
                    f"{quant} does not fit {profile.name}",
                    _alternatives(profile, chosen, candidate, runtime),
                    runtime,
                )
            )
    bound = decode_bound(profile, spec, chosen.tensors)
    if profile.targets is not None and bound < profile.targets.decode_tok_s:
        notes.append(
            f"speed: memory bandwidth allows at most {bound:.3g} tokens/s, {profile.name} aims at {profile.targets.decode_tok_s:g} "
            f"(for {profile.targets.model})"
        )
    return Plan(
        profile=profile.name,
        quant=chosen.quant,
        tensors=chosen.tensors,
        file_bytes=chosen.file_bytes,
        memory=chosen.memory,
        budget_bytes=profile.memory.budget_mib * MIB,
        decode_bound_tok_s=bound,
        notes=tuple(notes),
    )


def export_bytes(spec: ModelSpec, tokens: int) -> int:
    """Estimate of an export's peak memory, for `tokens` tokens of calibration: what `check_ram` should find free.

    The process; the largest block (attention or MLP of one layer) in float32, twice for decoding and encoding buffers; hidden states in
    float32, before and after a block; intermediate values of one batch; the head, or a piece of it; and the gate's logits of one window.
    SmolLM2-135M with 8,192 tokens: 821 MiB, measured were 825, gate included. The child process that runs the artifact comes on top.
    """
    blocks = [2 * spec.n_embd * (b.n_heads + b.n_kv_heads) * b.head_dim for b in spec.attention] + [
        3 * spec.n_embd * b.n_ff for b in spec.mlps
    ]
    widest = max([b.n_heads * b.head_dim for b in spec.attention] + [b.n_ff for b in spec.mlps])
    batch = min(tokens, _EXPORT_BATCH_TOKENS)
    head = min(4 * spec.n_vocab * spec.n_embd, _EXPORT_HEAD_BYTES)
    logits = _GATE_LOGITS * 4 * spec.n_vocab * min(tokens, _GATE_WINDOW_TOKENS)
    states = 2 * 4 * spec.n_embd * tokens + 4 * batch * (4 * spec.n_embd + 4 * widest)
    return EXPORT_PROCESS_BYTES + 2 * 4 * max(blocks) + states + head + logits


def sorting_bytes(spec: ModelSpec, tokens: int) -> int:
    """Estimate of the peak memory of sorting on `tokens` tokens.

    The process; hidden states in front of every layer in float32, which the way back reads; and the larger of two: the head with the slopes
    of one window's logits; or one layer in float32 with what a batch leaves behind in it for the gradient, and second moments of its widest
    MLP as sum, mean, in sorted order and as correlations. SmolLM2-135M with 8,704 tokens: 1,363 MiB, measured were 1,373 of a whole
    export. A random 1B Llama with 1,536 and 4,608 tokens: 2,332 and 2,788 MiB, measured were 2,338 and 2,749 of sorting alone.
    """
    sizes: dict[int, int] = {}
    for b in spec.blocks:
        n = 3 * spec.n_embd * b.n_ff if isinstance(b, Mlp) else 2 * spec.n_embd * (b.n_heads + b.n_kv_heads) * b.head_dim
        sizes[b.layer] = sizes.get(b.layer, 0) + n
    widest = max((b.n_ff for b in spec.mlps), default=0)
    attention = max((b.n_heads for b in spec.attention), default=0)
    batch = min(tokens, _EXPORT_BATCH_TOKENS)
    graph = 4 * batch * (12 * spec.n_embd + 8 * widest + 4 * attention * _GATE_WINDOW_TOKENS)
    states = 4 * spec.n_embd * tokens * (spec.n_layers + 3)
    head = min(4 * spec.n_vocab * spec.n_embd, _EXPORT_HEAD_BYTES) + _GATE_LOGITS * 4 * spec.n_vocab * _GATE_WINDOW_TOKENS
    return EXPORT_PROCESS_BYTES + states + max(4 * max(sizes.values()) + graph + 4 * 4 * widest**2, head)


def side_bytes(spec: ModelSpec, *, elastic: bool) -> int:
    """Room that a package's files beside the artifact take: manifest and fingerprint, and of an elastic one orders and hidden models."""
    channels = sum(b.n_ff for b in spec.mlps)
    return SIDE_BYTES + (channels * (2 * SIDE_RANK + 12) + 8 * channels if elastic else 0)


def check_ram(needed: int) -> None:
    """Refuse before any work when less than `needed` bytes of this machine's memory are available. Raises PlanError."""
    available = available_ram()
    if available < needed:
        raise PlanError(
            f"the export needs about {_mib(needed)} of memory, but only {_mib(available)} are available on this machine. "
            "Close other programs, or export on a larger machine."
        )


def _choose(
    profile: DeviceProfile, spec: ModelSpec, candidate: Callable[[str], _Candidate], runtime: RuntimeMemory
) -> tuple[_Candidate, list[str]]:
    listed = [candidate(name) for name in profile.export.grids]
    matrices = listed[0].matrices
    source_bits = _average((t.source_grid.bits, t.n_values) for t in matrices)
    own = _most_common(matrices)
    notes: list[str] = []
    if own.is_float:
        options = [_unquantized(c, own, candidate) for c in listed]
    else:
        options, notes = _not_inflated(listed, own, source_bits, candidate)
    slow = _slow(profile, options, own)
    for c in [*(c for c in options if c.quant not in slow), *(c for c in options if c.quant in slow)]:
        if _fits(profile, c):
            return c, [*notes, *(note for quant, note in slow.items() if quant != c.quant)]
    smallest = min(options, key=lambda c: c.memory.total_bytes)
    raise PlanError(
        _refusal(profile, spec, smallest, f"{profile.name}: no format fits, not even the smallest, {smallest.quant}", "", runtime)
    )


def _not_inflated(
    listed: list[_Candidate], own: Grid, source_bits: float, candidate: Callable[[str], _Candidate]
) -> tuple[list[_Candidate], list[str]]:
    """Rules 1 and 2: what is left of the list for a quantized source, and notes on what is not."""
    options = [c for c in listed if c.bits <= source_bits + MARGIN_BITS]
    struck = [c for c in listed if c.bits > source_bits + MARGIN_BITS]
    if not struck:
        return options, []
    names = ", ".join(f"{c.quant} ({c.bits:.2f})" for c in struck)
    notes = [f"not considered, because more bits per weight than the source's {source_bits:.2f} cannot improve it: {names}"]
    if not any(base_grid(c.quant) == own for c in options):
        try:
            options.insert(0, candidate(own.name))
        except UnsupportedError:
            notes.append(f"the source's own {own.name} cannot be written")
    if not options:
        options = [struck[-1]]
        notes.append(f"{struck[-1].quant} is the smallest in the list and is used although it has more bits than the source")
    return options, notes


def _slow(profile: DeviceProfile, options: list[_Candidate], own: Grid) -> dict[str, str]:
    """Rule 3: quants to take only when nothing else fits, each with the reason."""
    if profile.runtime.device != "cpu":
        return {}
    isa = profile.cpu.isa
    fast = {c.quant: _average((is_repacked(t.grid, t.shape[0], isa), t.n_values) for t in c.matrices) >= MOSTLY for c in options}
    if not any(fast.values()):
        return {}
    slow = {}
    for c in options:
        chosen_for_speed = c.quant not in profile.export.grids or is_repacked(base_grid(c.quant), 8, isa)
        if not fast[c.quant] and chosen_for_speed:
            written = ", ".join(dict.fromkeys(t.grid.name for t in c.matrices))
            why = "the source's own format" if c.quant == own.name else f"this model's rows would make it {written}"
            slow[c.quant] = f"{c.quant} is passed over, because llama.cpp has no fast path for it on this CPU ({why})"
    return slow


def _unquantized(c: _Candidate, own: Grid, candidate: Callable[[str], _Candidate]) -> _Candidate:
    """For a float source, a float grid means the source's own when that is no larger: BF16 and F16 do not hold each other's values."""
    target = base_grid(c.quant)
    return candidate(own.name) if target.is_float and target != own and own.bits <= target.bits else c


def _kv_type(profile: DeviceProfile, spec: ModelSpec) -> tuple[str, list[str]]:
    """The profile's KV type, or f16 with a note where the model or the device cannot have it."""
    kv_type = profile.export.kv_type
    kind = grid(kv_type.upper())
    if kind.is_float:
        return kv_type, []
    odd = next((b.head_dim for b in spec.attention if not kind.fits(b.head_dim)), None)
    if odd is not None:
        return "f16", [f"cache: f16 in place of {kv_type}, because heads of {odd} do not divide into blocks of {kind.block_size}"]
    if not has_flash_attention(spec, profile.runtime.device):
        return "f16", [
            f"cache: f16 in place of {kv_type}, because llama.cpp has no flash attention for heads of {spec.attention[0].head_dim} on "
            f"{profile.runtime.device}"
        ]
    return kv_type, []


def _fits(profile: DeviceProfile, c: _Candidate) -> bool:
    return c.memory.total_bytes <= profile.memory.budget_mib * MIB and c.memory.host_bytes <= profile.memory.ram_mib * MIB


def _refusal(profile: DeviceProfile, spec: ModelSpec, c: _Candidate, what: str, alternative: str, runtime: RuntimeMemory) -> str:
    m, budget = c.memory, profile.memory.budget_mib * MIB
    if m.total_bytes <= budget:
        return (
            f"{what}: {_mib(m.host_bytes)} ({m.host_bytes:,} bytes) stay in RAM beside the accelerator, memory.ram_mib is "
            f"{profile.memory.ram_mib:,}. Use a smaller context or another profile."
        )
    parts = (
        f"weights {_mib(m.model_bytes)}, cache {_mib(m.kv_bytes)} at {m.n_ctx:,} tokens, compute {_mib(m.compute_bytes)}, "
        f"runtime {_mib(m.runtime_bytes)}"
    )
    shorter = _longest_context(profile, spec, c, runtime)
    context = f"With a context of {shorter:,} tokens it fits" if shorter else "No context is short enough"
    return (
        f"{what}: it needs {_mib(m.total_bytes)} ({m.total_bytes:,} bytes: {parts}), the budget is {_mib(budget)} ({budget:,} bytes). "
        f"{alternative}{context}; or use a profile with more memory, or a smaller model."
    )


def _longest_context(profile: DeviceProfile, spec: ModelSpec, c: _Candidate, runtime: RuntimeMemory) -> int:
    """The longest context, in steps of 256 tokens, with which a candidate fits; 0 when none does."""

    def fits(n_ctx: int) -> bool:
        memory = runtime.estimate(profile, spec, c.tensors, n_ctx=n_ctx, kv_type=c.memory.kv_type)
        return memory.total_bytes <= profile.memory.budget_mib * MIB and memory.host_bytes <= profile.memory.ram_mib * MIB

    low, high = 0, -(-c.memory.n_ctx // 256)  # fits(256 * low) or low == 0; not fits(256 * high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(256 * middle) else (low, middle)
    return 256 * low


def _alternatives(profile: DeviceProfile, c: _Candidate, candidate: Callable[[str], _Candidate], runtime: RuntimeMemory) -> str:
    others = (candidate(name) for name in runtime.quants(profile) if name != c.quant)
    fitting = next((o.quant for o in others if _fits(profile, o)), None)
    return f"--quant {fitting} fits. " if fitting else "No format in the profile's list fits either. "


def _block_matrices(tensors: Iterable[TensorPlan]) -> tuple[TensorPlan, ...]:
    return tuple(t for t in tensors if t.layer is not None and len(t.shape) == 2)


def _most_common(matrices: Iterable[TensorPlan]) -> Grid:
    """The source grid of most weights."""
    sizes: Counter[Grid] = Counter()
    for t in matrices:
        sizes[t.source_grid] += t.n_values
    return sizes.most_common(1)[0][0]


def _average(pairs: Iterable[tuple[float, int]]) -> float:
    """Mean of values with weights."""
    pairs = tuple(pairs)
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def _mib(n: int) -> str:
    return f"{n / MIB:,.0f} MiB"
