"""What `edgeq cut` costs beside copying the same bytes: time and peak memory.

    python benchmarks/cut.py PACKAGE [--rates 0.15,0.25,0.35] [--repeat 7] [--folder DIR]
    python benchmarks/cut.py --synthetic 2GB [...]     a random layered model of about that size, made and removed again
    python benchmarks/cut.py --synthetic demo [...]    of the shape of SmolLM2-135M, in Q4_1
    python benchmarks/cut.py --synthetic demo-q8 [...] the same in Q8_0, whose down projections are rounded again

A synthetic package has random models of hidden activations, and a ladder that takes MLP channels in steps of 32 from all layers in turns
and leaves attention alone: of all cuts of that size the one that reads and compensates the most. A round runs, in turns: `edgeq cut` as a
process of its own, from its start to its end; the same without compensation; an interpreter that imports numpy and ends; and copying a file
of the result's size (shutil.copyfile, and fsync, which a cut does too). Caches are warm. The peak is VmHWM of the cutting process beside
that of the interpreter with numpy. Medians of times are printed, the processor time of a cut, and the largest peak. Exit status 1 when a
cut takes more than 3 copies and 0.3 s, or its peak is more than 150 MiB over the bare interpreter's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path

import numpy as np

from edgeq import ggml
from edgeq.compensation import HiddenModel
from edgeq.elastic import Ladder, Step
from edgeq.elastic_files import write_elastic
from edgeq.errors import EdgeqError
from edgeq.gguf_fields import Field
from edgeq.gguf_write import TensorData, write_gguf
from edgeq.grids import F32, GRIDS, Grid
from edgeq.package import record_files, write_manifest

TIMES, SECONDS, MIB_OVER = 3, 0.3, 150
RANK = 64
# Runs the command line, or nothing, and reports what it took on its stderr. VmHWM is that of the process itself.
_CHILD = """
import sys, time
def report():
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(time.process_time(), peak / 1024, file=sys.stderr)
if len(sys.argv) == 1:
    import numpy
    report()
else:
    sys.stdout = open("/dev/null", "w")
    if sys.argv[1] == "plain":
        import edgeq.runtime.compensated as compensated
        compensated._downs = lambda *_: []
    del sys.argv[1]
    import atexit
    import edgeq.cli
    atexit.register(report)
    edgeq.cli.program()
"""
# n_embd, n_ff, n_heads, n_kv_heads, head_dim, n_layers, n_vocab, grid of matrices
_SHAPES = {
    "demo": (576, 1536, 9, 3, 64, 30, 49152, "Q4_1"),
    "demo-q8": (576, 1536, 9, 3, 64, 30, 49152, "Q8_0"),
    "2GB": (2048, 8192, 32, 8, 64, 30, 128256, "Q8_0"),
}


def child(*arguments: str) -> tuple[float, float, float]:
    """(seconds, processor seconds, peak MiB) of `edgeq ARGUMENTS`; of an interpreter with numpy when there are none."""
    began = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", _CHILD, *arguments], stderr=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - began
    if run.returncode:
        raise SystemExit(run.stderr)
    cpu, peak = run.stderr.split()[-2:]
    return seconds, float(cpu), float(peak)


def copy(source: Path, target: Path) -> float:
    target.unlink(missing_ok=True)
    began = time.perf_counter()
    shutil.copyfile(source, target)
    handle = os.open(target, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    return time.perf_counter() - began


def synthetic(folder: Path, name: str) -> None:
    """Write a package."""
    folder.mkdir()
    path = folder / "elastic.gguf"
    n_embd, n_ff, n_heads, n_kv, head_dim, n_layers, n_vocab, grid_name = _SHAPES[name]
    q, kv = n_heads * head_dim, n_kv * head_dim
    per_layer = {"attn_norm": (n_embd,), "attn_q": (q, n_embd), "attn_k": (kv, n_embd), "attn_v": (kv, n_embd), "attn_output": (n_embd, q)}
    per_layer |= {"ffn_norm": (n_embd,), "ffn_gate": (n_ff, n_embd), "ffn_up": (n_ff, n_embd), "ffn_down": (n_embd, n_ff)}
    shapes = {"token_embd.weight": (n_vocab, n_embd), "output_norm.weight": (n_embd,)}
    shapes |= {f"blk.{i}.{role}.weight": shape for i in range(n_layers) for role, shape in per_layer.items()}
    values = np.random.default_rng(0).standard_normal((2048, 1024), dtype=np.float32) / 32
    packed = {name: ggml.encode(values, GRIDS[name]).reshape(-1) for name in {grid_name, "Q8_0", "F32"}}

    def data(name: str, shape: tuple[int, ...]) -> TensorData:
        grid: Grid = GRIDS["Q8_0" if name.startswith("token") else grid_name] if len(shape) == 2 else F32
        nbytes, noise = prod(shape[:-1]) * grid.row_bytes(shape[-1]), packed[grid.name]
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
    steps = [
        Step(layer=layer, port="ffn", start=start, stop=start - 32, removed=3 * 32 * n_embd, damage=1.0)
        for start in range(n_ff, n_ff // 4, -32)
        for layer in range(n_layers)
    ]
    block_params = n_layers * sum(prod(shape) for shape in per_layer.values())
    ladder = Ladder(n_ff=(n_ff,) * n_layers, n_kv=(n_kv,) * n_layers, block_params=block_params, steps=tuple(steps))
    rng = np.random.default_rng(1)
    model = HiddenModel(
        mean=rng.standard_normal(n_ff, dtype=np.float32),
        factors=rng.standard_normal((n_ff, RANK), dtype=np.float32) / 8,
        noise=1 + rng.random(n_ff, dtype=np.float32),
    )
    orders = [np.arange(n) for _ in range(n_layers) for n in (n_kv, n_ff)]
    side = write_elastic(folder, ladder=ladder, hidden=dict.fromkeys(range(n_layers), model), orders=orders, sort="edgeq")
    records = record_files(folder, [path, *side])
    manifest = {
        "status": "unverified",
        "export": {"profile": "laptop-cpu", "elastic": True},
        "artifacts": [{**records[0].to_json(), "format": "gguf"}],
        "side_files": [record.to_json() for record in records[1:]],
    }
    write_manifest(folder, manifest)


def measure(package: Path, rate: str, repeat: int, folder: Path) -> bool:
    target, copied = folder / "cut.gguf", folder / "copy.gguf"
    command = ("cut", str(package), "-o", str(target), "--rate", rate, "--json")

    def cut(how: str) -> tuple[float, float, float]:
        target.unlink(missing_ok=True)
        return child(how, *command)

    cuts, plain, copies, bare = [], [], [], []
    cut("")  # compiles modules and warms caches
    for _ in range(repeat):
        plain.append(cut("plain"))
        copies.append(copy(target, copied))
        bare.append(child())
        cuts.append(cut(""))
    copied.unlink()
    seconds, cpu, without, alone = (statistics.median(row[i] for row in rows) for rows, i in ((cuts, 0), (cuts, 1), (plain, 0), (bare, 0)))
    beside, over = statistics.median(copies), max(row[2] for row in cuts) - statistics.median(row[2] for row in bare)
    limit = TIMES * beside + SECONDS
    ok = seconds <= limit and over <= MIB_OVER
    print(
        f"rate {rate}: {target.stat().st_size / 1e6:8.1f} MB   cut {seconds:.3f} s ({cpu:.2f} s of processor time; without compensation "
        f"{without:.3f} s; numpy alone {alone:.3f} s)   copy {beside:.3f} s   limit {limit:.3f} s   peak {over:+.1f} MiB   "
        f"{'ok' if ok else 'TOO MUCH'}"
    )
    return ok


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("source", type=Path, nargs="?", help="an elastic package")
    what.add_argument("--synthetic", choices=sorted(_SHAPES))
    parser.add_argument("--rates", default="0.15,0.25,0.35")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        source = arguments.source
        if source is None:
            source = folder / "package"
            synthetic(source, arguments.synthetic)
        try:
            results = [measure(source, rate, arguments.repeat, folder) for rate in arguments.rates.split(",")]
        except EdgeqError as err:
            print(f"error: {err}", file=sys.stderr)
            return 1
    return 0 if all(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
