"""What `edgeq.runtime.cut` costs beside copying the same bytes: time and peak memory.

    python benchmarks/cut.py ELASTIC.gguf [--rates 0.15,0.25,0.35] [--repeat 7] [--folder DIR]
    python benchmarks/cut.py --synthetic 2GB [...]     a random layered model of about that size, made and removed again
    python benchmarks/cut.py --synthetic demo [...]    of the shape and Q4_1 grids of SmolLM2-135M

Each rate cuts MLP widths to whole steps of 32 and leaves attention alone: of all cuts of that size the one that reads the most, since every
row of a down projection is shortened. A round runs, in turns: cutting with the source's hash checked, as `edgeq cut` does; cutting without;
and copying a file of the result's size (shutil.copyfile, and fsync, which a cut does too). Caches are warm. Each cut is a process of its
own that imports numpy first and then is timed from the import of edgeq to its end, so start-up is in it; the peak is its VmHWM beside
that of an interpreter with numpy alone. Medians are printed. Exit status 1 when a checked cut takes more than 3 copies and 0.3 s, or its
peak is more than 150 MiB over the bare interpreter's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from edgeq.elastic import Kept
from edgeq.errors import EdgeqError
from edgeq.gguf_fields import Field
from edgeq.gguf_file import read_header
from edgeq.gguf_write import TensorData, write_gguf
from edgeq.grids import F32, GRIDS, Grid
from edgeq.package import sha256
from edgeq.runtime.cut_plan import plan_cut, read_sizes

TIMES, SECONDS, MIB_OVER = 3, 0.3, 150
_CHILD = """
import json, sys, time, numpy
began = time.perf_counter()
request = json.loads(sys.argv[1])
if request:
    from pathlib import Path
    from edgeq.elastic import Kept
    from edgeq.runtime.cut import cut_gguf
    kept = Kept(n_ff=tuple(request["n_ff"]), n_kv=tuple(request["n_kv"]))
    cut_gguf(Path(request["source"]), Path(request["target"]), kept, sha256=request["sha256"], force=True)
seconds = time.perf_counter() - began
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([seconds, peak / 1024]))
"""
# n_embd, n_ff, n_heads, n_kv_heads, head_dim, n_layers, n_vocab, grid of matrices
_SHAPES = {"demo": (576, 1536, 9, 3, 64, 30, 49152, "Q4_1"), "2GB": (2048, 8192, 32, 8, 64, 30, 128256, "Q8_0")}


def child(request: dict[str, object]) -> tuple[float, float]:
    """(seconds, peak MiB) of a cut in a fresh process; an empty request measures the interpreter with numpy."""
    run = subprocess.run([sys.executable, "-c", _CHILD, json.dumps(request)], capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(run.stderr)
    seconds, peak = json.loads(run.stdout)
    return seconds, peak


def copy(source: Path, target: Path) -> float:
    target.unlink(missing_ok=True)
    began = time.perf_counter()
    shutil.copyfile(source, target)
    handle = os.open(target, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    return time.perf_counter() - began


def kept_at(source: Path, rate: float) -> Kept:
    """The widest MLPs, alike in all layers and in steps of 32, that remove at least `rate` of the block parameters."""
    header = read_header(source)
    sizes = read_sizes(header)
    for n_ff in range(max(sizes.n_ff), 0, -32):
        kept = Kept(n_ff=tuple(min(n_ff, n) for n in sizes.n_ff), n_kv=sizes.n_kv)
        if plan_cut(header, kept).removed_fraction >= rate:
            return kept
    raise SystemExit(f"rate {rate} is more than MLPs can give")


def synthetic(path: Path, name: str) -> None:
    n_embd, n_ff, n_heads, n_kv, head_dim, n_layers, n_vocab, grid_name = _SHAPES[name]
    q, kv = n_heads * head_dim, n_kv * head_dim
    per_layer = {"attn_norm": (n_embd,), "attn_q": (q, n_embd), "attn_k": (kv, n_embd), "attn_v": (kv, n_embd), "attn_output": (n_embd, q)}
    per_layer |= {"ffn_norm": (n_embd,), "ffn_gate": (n_ff, n_embd), "ffn_up": (n_ff, n_embd), "ffn_down": (n_embd, n_ff)}
    shapes = {"token_embd.weight": (n_vocab, n_embd), "output_norm.weight": (n_embd,)}
    shapes |= {f"blk.{i}.{role}.weight": shape for i in range(n_layers) for role, shape in per_layer.items()}
    noise = np.random.default_rng(0).integers(0, 256, 1 << 22, dtype=np.uint8)

    def data(name: str, shape: tuple[int, ...]) -> TensorData:
        grid: Grid = GRIDS["Q8_0" if name.startswith("token") else grid_name] if len(shape) == 2 else F32
        nbytes = int(np.prod(shape[:-1])) * grid.row_bytes(shape[-1])
        return TensorData(name, shape, grid, lambda: (noise[: min(len(noise), nbytes - at)] for at in range(0, nbytes, len(noise))))

    fields = [
        Field.string("general.architecture", "deci"),
        Field.u32("deci.block_count", n_layers),
        Field.u32("deci.attention.key_length", head_dim),
        Field.i32s("deci.feed_forward_length", [n_ff] * n_layers),
        Field.i32s("deci.attention.head_count", [n_heads] * n_layers),
        Field.i32s("deci.attention.head_count_kv", [n_kv] * n_layers),
        Field.strings("tokenizer.ggml.tokens", [f"token {i}" for i in range(n_vocab)]),
        Field.strings("tokenizer.ggml.merges", [f"left{i} right{i}" for i in range(n_vocab)]),
    ]
    write_gguf(path, fields, [data(tensor, shape) for tensor, shape in shapes.items()])


def measure(source: Path, rate: float, repeat: int, folder: Path) -> bool:
    kept = kept_at(source, rate)
    target, copied = folder / "cut.gguf", folder / "copy.gguf"
    request = {"source": str(source), "target": str(target), "n_ff": kept.n_ff, "n_kv": kept.n_kv}
    digest = sha256(source)
    checked, plain, copies, peaks, bare = [], [], [], [], []
    for _ in range(repeat):
        seconds, peak = child({**request, "sha256": digest})
        checked.append(seconds)
        peaks.append(peak)
        copies.append(copy(target, copied))
        plain.append(child({**request, "sha256": None})[0])
        bare.append(child({})[1])
    copied.unlink()
    one, fast, beside = (statistics.median(values) for values in (checked, plain, copies))
    over = max(peaks) - statistics.median(bare)
    limit = TIMES * beside + SECONDS
    ok = one <= limit and over <= MIB_OVER
    print(
        f"rate {rate:.2f}: {target.stat().st_size / 1e6:8.1f} MB   cut {one:.3f} s (without hashing the source {fast:.3f} s)   "
        f"copy {beside:.3f} s   limit {limit:.3f} s   peak {over:+.1f} MiB   {'ok' if ok else 'TOO MUCH'}"
    )
    return ok


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("source", type=Path, nargs="?", help="an elastic GGUF file")
    what.add_argument("--synthetic", choices=sorted(_SHAPES))
    parser.add_argument("--rates", default="0.15,0.25,0.35")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        source = arguments.source
        if source is None:
            source = folder / "elastic.gguf"
            synthetic(source, arguments.synthetic)
        try:
            results = [measure(source, float(rate), arguments.repeat, folder) for rate in arguments.rates.split(",")]
        except EdgeqError as err:
            print(f"error: {err}", file=sys.stderr)
            return 1
    return 0 if all(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
