"""What it costs to switch by a sparse patch beside fusing a LoRA of as many parameters into the same weights.

    python benchmarks/patch.py MODEL.gguf [--rank 8] [--repeat 9]      a model whose matrices are F16 or F32
    python benchmarks/patch.py --synthetic F16|F32 [...]               random, of the shape of SmolLM2-135M; made and removed again

Both change every matrix of every layer of the model that llama.cpp has loaded, and in turns: reading a patch file and applying it in place;
reading the factors of a LoRA from a file and adding b @ a with numpy, matrix by matrix, in float32, rounded to the weight's type, in place
too. The patch touches as many places of each matrix as the LoRA has parameters there: rank x (n_in + n_out). Caches are warm. Undoing is
timed as well: a patch puts back the values it kept; a fused LoRA has to be subtracted, which does not give back the same bits. The number
of values that it leaves wrong is counted. Medians are printed. Exit status 1 when loading a patch is not faster, or undoing is not exact.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeq.errors import EdgeqError
from edgeq.gguf_fields import Field
from edgeq.gguf_file import Header, read_header
from edgeq.gguf_write import TensorData, write_gguf
from edgeq.grids import F32, GRIDS, Grid
from edgeq.patch_file import DTYPES, Sparse, read_patch, write_patch
from edgeq.runtime.llama import LlamaModel
from edgeq.runtime.patch import Patches, Weights

Floats = npt.NDArray[np.float32]


def matrices(header: Header) -> dict[str, tuple[int, int]]:
    """(n_out, n_in) of the matrices of layers."""
    found = {name: t.shape for name, t in header.tensors.items() if name.startswith("blk.") and len(t.shape) == 2 and t.grid.name in DTYPES}
    if not found:
        raise EdgeqError(f"{header.path}: has no F16 or F32 matrices. Give a model in one of these formats, or --synthetic.")
    return {name: (shape[0], shape[1]) for name, shape in found.items()}


def make_files(header: Header, folder: Path, rank: int) -> tuple[Path, Path]:
    """A patch, and a LoRA of as many parameters for each matrix: an .npz of all a, and all b, end to end."""
    rng = np.random.default_rng(0)
    deltas: dict[str, Sparse] = {}
    factors: tuple[list[Floats], list[Floats]] = [], []
    for name, (n_out, n_in) in matrices(header).items():
        count = rank * (n_in + n_out)
        deltas[name] = rng.choice(n_in * n_out, count, replace=False), rng.standard_normal(count).astype(np.float32) * 1e-2
        factors[0].append(rng.standard_normal(rank * n_in).astype(np.float32))
        factors[1].append(rng.standard_normal(n_out * rank).astype(np.float32) * 1e-3)
    lora = folder / "lora.npz"
    np.savez(lora, a=np.concatenate(factors[0]), b=np.concatenate(factors[1]))
    return write_patch(folder / "sparse.eqpatch", deltas, header), lora


def fuse(weights: Weights, shapes: dict[str, tuple[int, int]], path: Path, rank: int, *, sign: float) -> None:
    """Add or subtract a LoRA."""
    with np.load(path) as file:
        a, b = file["a"], file["b"]
    for name, (n_out, n_in) in shapes.items():
        weight = weights[name].reshape(n_out, n_in)
        part_a, a = a[: rank * n_in].reshape(rank, n_in), a[rank * n_in :]
        part_b, b = b[: rank * n_out].reshape(n_out, rank), b[rank * n_out :]
        weight[:] = weight.astype(np.float32) + sign * (part_b @ part_a)


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure(path: Path, *, rank: int, repeat: int) -> bool:
    """Print the table; whether the patch is faster and its undoing exact."""
    shapes = matrices(read_header(path))
    times: dict[str, list[float]] = {"patch on": [], "LoRA fused": [], "patch off": [], "LoRA subtracted": []}
    with tempfile.TemporaryDirectory() as folder, LlamaModel.load(path, use_mmap=False) as model:
        patch, lora = make_files(read_header(path), Path(folder), rank)
        weights, patches = Weights(model), Patches(model)
        before = {name: weights[name].copy() for name in shapes}
        exact = True
        for _ in range(repeat):
            times["patch on"].append(seconds(lambda: patches.apply(read_patch(patch), name="x")))
            times["patch off"].append(seconds(lambda: patches.undo("x")))
            exact &= all(np.array_equal(weights[name], before[name]) for name in shapes)
            times["LoRA fused"].append(seconds(lambda: fuse(weights, shapes, lora, rank, sign=1.0)))
            times["LoRA subtracted"].append(seconds(lambda: fuse(weights, shapes, lora, rank, sign=-1.0)))
            wrong = sum(int((weights[name] != before[name]).sum()) for name in shapes)
            for name in shapes:
                weights[name][:] = before[name]
        n_values = sum(rank * (n_in + n_out) for n_out, n_in in shapes.values())
        n_weights = sum(n_in * n_out for n_out, n_in in shapes.values())
        sizes = patch.stat().st_size, lora.stat().st_size
    print(f"{path.name}: {len(shapes)} matrices of {n_weights:,} weights; {n_values:,} parameters each (rank {rank})")
    print(f"files: patch {sizes[0]:,} bytes, LoRA {sizes[1]:,} bytes; medians of {repeat} in turns")
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(f"  {name:16} {medians[name] * 1e3:8.1f} ms   ({min(values) * 1e3:.1f} to {max(values) * 1e3:.1f})")
    print(f"  LoRA fused / patch on: {medians['LoRA fused'] / medians['patch on']:.1f}")
    print(f"  weights that are wrong after undoing: patch {'none' if exact else 'SOME'}, LoRA {wrong:,} of {n_weights:,}")
    return exact and medians["patch on"] < medians["LoRA fused"]


def synthetic(path: Path, grid: Grid) -> Path:
    """Random matrices in the shape of SmolLM2-135M, with a vocabulary of 64 tokens."""
    n_embd, n_ff, n_heads, n_kv, head_dim, n_layers, n_vocab = 576, 1536, 9, 3, 64, 30, 64
    tokens = [f"t{i}" for i in range(n_vocab)]
    fields = [
        Field.of("general.architecture", "llama"),
        Field.of("llama.block_count", n_layers),
        Field.of("llama.context_length", 256),
        Field.of("llama.embedding_length", n_embd),
        Field.of("llama.feed_forward_length", n_ff),
        Field.of("llama.attention.head_count", n_heads),
        Field.of("llama.attention.head_count_kv", n_kv),
        Field.of("llama.attention.layer_norm_rms_epsilon", 1e-5),
        Field.of("tokenizer.ggml.model", "gpt2"),
        Field.of("tokenizer.ggml.tokens", tokens),
        Field.of("tokenizer.ggml.token_type", [1] * n_vocab),
        Field.of("tokenizer.ggml.merges", ["t 0"]),
    ]
    layer = {
        "attn_q": (n_heads * head_dim, n_embd),
        "attn_k": (n_kv * head_dim, n_embd),
        "attn_v": (n_kv * head_dim, n_embd),
        "attn_output": (n_embd, n_heads * head_dim),
        "ffn_gate": (n_ff, n_embd),
        "ffn_up": (n_ff, n_embd),
        "ffn_down": (n_embd, n_ff),
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (n_vocab, n_embd), "output_norm.weight": (n_embd,)}
    for i in range(n_layers):
        shapes |= {f"blk.{i}.{role}.weight": shape for role, shape in layer.items()}
        shapes |= {f"blk.{i}.{role}_norm.weight": (n_embd,) for role in ("attn", "ffn")}
    rng = np.random.default_rng(0)

    def values(shape: tuple[int, ...]) -> Iterator[npt.NDArray[np.uint8]]:
        array = rng.standard_normal(shape, dtype=np.float32) * 0.05 if len(shape) == 2 else np.ones((1, *shape), dtype=np.float32)
        yield np.ascontiguousarray(array.astype(DTYPES[grids[len(shape)].name])).view(np.uint8)

    grids = {1: F32, 2: grid}
    data = [TensorData(name, shape, grids[len(shape)], partial(values, shape)) for name, shape in shapes.items()]
    write_gguf(path, fields, data)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--synthetic", choices=tuple(DTYPES))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    if (args.model is None) == (args.synthetic is None):
        parser.error("give a model, or --synthetic")
    with tempfile.TemporaryDirectory() as folder:
        path = synthetic(Path(folder) / "synthetic.gguf", GRIDS[args.synthetic]) if args.synthetic else args.model
        try:
            return 0 if measure(path, rank=args.rank, repeat=args.repeat) else 1
        except EdgeqError as err:
            print(err, file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
