"""A tiny elastic package without an export: a random model of three layers, a ladder made by hand, random models of hidden activations."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from tiny_gguf import HEAD_DIM, N_EMBD, N_FF, write_tiny_gguf

from edgeq import ggml
from edgeq.compensation import HiddenModel
from edgeq.elastic import Ladder, Step
from edgeq.elastic_files import write_elastic
from edgeq.gguf_file import read_header
from edgeq.gguf_write import TensorData, write_gguf
from edgeq.grids import F32, Grid, grid
from edgeq.package import record_files, write_manifest

N_LAYERS, N_HEADS, N_KV, STEP = 3, 4, 2, 32
N_CTX = 128
FFN_PARAMS, KV_PARAMS = 3 * N_EMBD * STEP, 2 * N_EMBD * HEAD_DIM * (1 + N_HEADS // N_KV)


def write_tiny_elastic(
    folder: Path, *, quant: str = "F32", arch: str = "deci", hidden: bool = True, export: Mapping[str, Any] | None = None
) -> Path:
    """A package whose matrices are in grid `quant`, as far as they divide into its blocks. Unsigned: status unverified."""
    folder.mkdir(parents=True, exist_ok=True)
    alike = arch != "deci"
    per_layer: dict[str, Any] = {"feed_forward_length": N_FF if alike else [N_FF] * N_LAYERS}
    sizes: dict[str, Any] = {"n_heads": N_HEADS, "n_kv_heads": N_KV} if alike else {"n_heads": [N_HEADS] * 3, "n_kv_heads": [N_KV] * 3}
    norms = {f"blk.{i}.attn_{kind}_norm.weight": np.ones(HEAD_DIM, np.float32) for i in range(N_LAYERS) for kind in "qk"}
    extra = norms if arch == "qwen3" else {}
    plain = write_tiny_gguf(folder / "plain.gguf", arch=arch, n_layers=N_LAYERS, fields=per_layer, extra=extra, **sizes)
    artifact = folder / "tiny.gguf"
    in_grid(plain, artifact, grid(quant))
    plain.unlink()
    steps = ladder(artifact, alike=alike, with_groups=quant == "F32" and not alike)
    rng = np.random.default_rng(1)
    models = {layer: hidden_model(rng) for layer in range(N_LAYERS)} if hidden else {}
    orders = [np.arange(n) for _ in range(N_LAYERS) for n in (N_KV, N_FF)]
    side = write_elastic(folder, ladder=steps, hidden=models, orders=orders, sort="edgeq")
    sign(folder, artifact, side, export or {})
    return folder


def sign(folder: Path, artifact: Path, side: list[Path], export: Mapping[str, Any]) -> None:
    records = record_files(folder, [artifact, *side])
    memory = {"compute_bytes": 1_000_000, "runtime_bytes": 2_000_000, "n_ctx": N_CTX}
    manifest = {
        "status": "unverified",
        "export": {
            "profile": "laptop-cpu",
            "n_ctx": N_CTX,
            "kv_type": "f16",
            "rate": 0.0,
            "removed_fraction": 0.0,
            "elastic": True,
            **export,
        },
        "plan": {"memory": memory},
        "artifacts": [{**records[0].to_json(), "format": "gguf"}],
        "side_files": [record.to_json() for record in records[1:]],
    }
    write_manifest(folder, manifest)


def in_grid(source: Path, target: Path, wanted: Grid) -> None:
    """The same file with its matrices in a grid."""
    header, data = read_header(source), source.read_bytes()

    def packed(info: Any) -> TensorData:
        raw = np.frombuffer(data, np.uint8, info.nbytes, info.offset)
        if len(info.shape) == 1 or info.grid is not F32 or not wanted.fits(info.shape[1]):
            return TensorData(info.name, info.shape, info.grid, lambda: [raw])
        values = raw.view(np.float32).reshape(info.shape)
        return TensorData(info.name, info.shape, wanted, lambda: [ggml.encode(values, wanted)])

    write_gguf(target, header.fields.values(), [packed(info) for info in header.tensors.values()], alignment=header.alignment)


def ladder(artifact: Path, *, alike: bool, with_groups: bool) -> Ladder:
    """Widths from N_FF down to 32 in turns, and one KV group of layer 1 halfway; of all layers at once if they are alike."""
    tensors = read_header(artifact).tensors.values()
    steps = []
    for start in range(N_FF, STEP, -STEP):
        for layer in [None] if alike else range(N_LAYERS):
            removed = FFN_PARAMS * (N_LAYERS if alike else 1)
            steps.append(Step(layer=layer, port="ffn", start=start, stop=start - STEP, removed=removed, damage=0.1))
        if start == N_FF - STEP and with_groups:
            steps.append(Step(layer=1, port="kv_group", start=2, stop=1, removed=KV_PARAMS, damage=0.5))
    block_params = sum(prod(t.shape) for t in tensors if t.name.startswith("blk."))
    return Ladder(n_ff=(N_FF,) * N_LAYERS, n_kv=(N_KV,) * N_LAYERS, block_params=block_params, steps=tuple(steps))


def hidden_model(rng: np.random.Generator, rank: int = 8) -> HiddenModel:
    return HiddenModel(
        mean=rng.standard_normal(N_FF).astype(np.float32),
        factors=rng.standard_normal((N_FF, rank)).astype(np.float32),
        noise=(0.2 + rng.random(N_FF)).astype(np.float32),
    )
