"""LoRA adapters for the models of tests/tiny_gguf.py, written with gguf-py, and those models with an adapter merged into their weights.

`fields` replaces metadata (None leaves a field out), `tensors` replaces or adds tensors (None leaves one out): files that must be refused
are made that way.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from tiny import N_VOCAB
from tiny_gguf import HEAD_DIM, N_EMBD, N_FF

Floats = npt.NDArray[np.float32]

# (n_out, n_in) of what an adapter may change: 4 heads, 2 KV heads.
SHAPES = {
    "attn_q": (4 * HEAD_DIM, N_EMBD),
    "attn_k": (2 * HEAD_DIM, N_EMBD),
    "attn_v": (2 * HEAD_DIM, N_EMBD),
    "attn_output": (N_EMBD, 4 * HEAD_DIM),
    "ffn_gate": (N_FF, N_EMBD),
    "ffn_up": (N_FF, N_EMBD),
    "ffn_down": (N_EMBD, N_FF),
}
EVERY_MATRIX = tuple(f"blk.{i}.{role}.weight" for i in range(2) for role in SHAPES)
OUTER = {"token_embd.weight": (N_EMBD, N_VOCAB), "output.weight": (N_VOCAB, N_EMBD)}
WHOLE_MODEL = (*EVERY_MATRIX, *OUTER)


def shape_of(target: str) -> tuple[int, int]:
    """(n_out, n_in); of the embedding table (n_embd, n_vocab), as its factors are laid out."""
    return OUTER[target] if target in OUTER else SHAPES[target.split(".")[2]]


def lora_factors(rank: int, *, seed: int, targets: Sequence[str] = EVERY_MATRIX, gain: float = 1.0) -> dict[str, tuple[Floats, Floats]]:
    """Random (a (rank, n_in), b (n_out, rank)) of each target, of a strength that changes greedy tokens."""
    rng = np.random.default_rng(seed)
    factors = {}
    for target in targets:
        n_out, n_in = shape_of(target)
        a = rng.standard_normal((rank, n_in)) / np.sqrt(n_in)
        b = rng.standard_normal((n_out, rank)) * gain / np.sqrt(rank)
        factors[target] = (a.astype(np.float32), b.astype(np.float32))
    return factors


def write_lora(
    path: Path,
    *,
    rank: int = 4,
    alpha: float | None = None,
    seed: int = 1,
    targets: Sequence[str] = EVERY_MATRIX,
    gain: float = 1.0,
    arch: str = "llama",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    invocation: Sequence[int] | None = None,
    fields: Mapping[str, Any] | None = None,
    tensors: Mapping[str, npt.NDArray[Any] | None] | None = None,
) -> Path:
    """Write an adapter and return its path. alpha: its rank by default, so that the strength is 1; invocation: token ids of an aLoRA."""
    values: dict[str, Any] = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(rank if alpha is None else alpha),
    }
    values |= fields or {}
    if invocation is not None:
        values["adapter.alora.invocation_tokens"] = invocation
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", arch))
    for key, value in values.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif value is not None:
            writer.add_key_value(key, list(value), gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType.UINT32)
    arrays: dict[str, npt.NDArray[Any] | None] = {}
    for target, (a, b) in lora_factors(rank, seed=seed, targets=targets, gain=gain).items():
        # Of the embedding table llama.cpp takes rows of the first factor by token.
        arrays[f"{target}.lora_a"] = a.T if target == "token_embd.weight" else a
        arrays[f"{target}.lora_b"] = b
    for name, array in (arrays | dict(tensors or {})).items():
        if array is None:
            continue
        array = np.ascontiguousarray(array)
        if array.dtype == np.float32 and array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def merged(base: Path, target: Path, *adapters: tuple[Mapping[str, tuple[Floats, Floats]], float]) -> Path:
    """A copy of a float32 model with scale * b @ a added to its weights, for each (factors, scale)."""
    shutil.copyfile(base, target)
    for tensor in gguf.GGUFReader(target, "r+").tensors:
        for factors, scale in adapters:
            if tensor.name in factors:
                a, b = factors[tensor.name]
                delta = scale * (b.astype(np.float64) @ a)
                tensor.data[:] += (delta.T if tensor.name == "token_embd.weight" else delta).astype(np.float32)
    return target
