"""What elastic packages are worth: perplexity, size and speed at every rate, beside the published way of cutting (UniQL, arXiv:2512.03383).

    python benchmarks/elastic.py --text FILE --work DIR [--model demo] [--quants Q8_0,Q4_0] [--rates 0,0.05,0.15,0.25,0.35]
                                 [--ctx 1024] [--chunks N] [-o results.json]
    python benchmarks/elastic.py --synthetic 1B [--tokens 2048]     time and memory of sorting random weights of that shape

The first half of the text calibrates, the second is scored. `uniql` cuts the float model in the float reference, because GGUF cannot
express it, with equal rates in all layers and with the published layer rates; at each rate the better of the two is to be beaten. `edgeq`
is exported elastic, calibrated on the text or on the text that comes with edgeq, cut to a stock GGUF file and scored in llama.cpp.
What counts is the increase of perplexity over rate 0 of the same kind, and its ratio to uniql's.

Sizes: the elastic artifact with its side files beside a plain export in the same type. Speed: `speed.py`.
Sorting: a process of its own, from opening the model to the ladder; its peak is that process's VmHWM.

Packages and scores in DIR are used again by a later run with the same settings. Exit status 1 when a limit is missed:
increase at 0.15 and 0.25 at most 0.45 of uniql's (0.65 with edgeq's own text), below it at every rate, never falling with the rate; no
cut slower than one at a lower rate; files at most 8 % larger; sorting in at most 90 s.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from speed import slower, speeds

import edgeq
from edgeq.calibration import SORTING_TOKENS
from edgeq.errors import EdgeqError
from edgeq.grids import F16
from edgeq.package import read_package, sha256
from edgeq.planning import sorting_bytes
from edgeq.rope import RopeSpec
from edgeq.spec import Attention, Mlp, ModelSpec
from edgeq.tensors import LazyTensor

PROFILE = "laptop-cpu"
TEXT_LIMIT, DEFAULT_LIMIT, JUDGED = 0.45, 0.65, (0.15, 0.25)
SIZE_LIMIT, SORT_SECONDS = 1.08, 90
# n_embd, n_ff, n_heads, n_kv_heads, head_dim, n_layers, n_vocab
SHAPES = {"135M": (576, 1536, 9, 3, 64, 30, 49152), "1B": (2048, 8192, 32, 8, 64, 16, 128256), "7B": (4096, 11008, 32, 32, 128, 32, 32000)}

_CHILD = """
import json, sys, time
request = json.loads(sys.argv[1])
sys.path.insert(0, request["folder"])
import elastic
from edgeq.runtime.memory import peak_rss_bytes
began = time.perf_counter()
elastic.sort_once(request)
print(json.dumps({"seconds": time.perf_counter() - began, "peak_rss_bytes": peak_rss_bytes()}))
"""


@dataclass
class Scores:
    """Results so far, kept in a file so that an interrupted run goes on where it was."""

    path: Path
    values: dict[str, Any]

    @staticmethod
    def load(path: Path) -> Scores:
        return Scores(path, json.loads(path.read_text()) if path.is_file() else {})

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self.values:
            self.values[key] = make()
            self.path.write_text(json.dumps(self.values, indent=1))
        return self.values[key]


def child(request: dict[str, Any]) -> dict[str, float]:
    """Sort in a fresh process: {"seconds", "peak_rss_bytes"}."""
    request = {**request, "folder": str(Path(__file__).parent)}
    run = subprocess.run([sys.executable, "-c", _CHILD, json.dumps(request)], capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(run.stderr)
    found: dict[str, float] = json.loads(run.stdout)
    return found


def sort_once(request: dict[str, Any]) -> None:
    """In the child: what an export does to sort a model, or random weights of a shape."""
    from edgeq.calibration import sorting_windows
    from edgeq.converters.draft import Wish
    from edgeq.converters.export import read_calibration
    from edgeq.converters.gguf.cuttable import cuttable
    from edgeq.converters.gguf.draft import draft_export
    from edgeq.converters.sorted_model import Cuts, sort_model
    from edgeq.converters.sources.resolve import open_model
    from edgeq.profiles import load_profile

    if "shape" in request:
        from edgeq.model import Model

        spec, tensors = synthetic(request["shape"])
        ids = np.random.default_rng(0).integers(0, spec.n_vocab, (request["tokens"] // 512 + 1, 512)).tolist()
        model = Model(name="random", spec=spec, tensors=tensors, tokenizer=None, files=(), format="hf")  # type: ignore[arg-type]
        sort_model(model, Cuts(ports=cuttable(spec), channel_step=32), "edgeq", ids[:-1], ids[-1:])
        return
    model = open_model(request["model"])
    ids = model.tokenizer.encode(read_calibration(Path(request["text"])).text)
    windows, held_back = sorting_windows(ids, model.spec.n_ctx)
    cuts = draft_export(model, load_profile(PROFILE), request["quant"], Wish(elastic=True)).cuts
    assert cuts is not None
    sort_model(model, cuts, "edgeq", windows, held_back)


def synthetic(name: str) -> tuple[ModelSpec, dict[str, LazyTensor]]:
    """A Llama of that shape whose F16 weights are pieces of one buffer of noise, made when they are read."""
    n_embd, n_ff, n_heads, n_kv, head_dim, n_layers, n_vocab = SHAPES[name]
    blocks = tuple(
        block
        for i in range(n_layers)
        for block in (Attention(layer=i, n_heads=n_heads, n_kv_heads=n_kv, head_dim=head_dim), Mlp(layer=i, n_ff=n_ff))
    )
    rope = RopeSpec(dim=head_dim, base=500000.0)
    spec = ModelSpec(
        family="llama", n_embd=n_embd, n_vocab=n_vocab, n_ctx=4096, blocks=blocks, rope=rope, norm_eps=1e-5, tied=True,
        attn_scale=1 / math.sqrt(head_dim),
    )  # fmt: skip
    noise = np.random.default_rng(0).standard_normal(1 << 22).astype(np.float16)

    def tensor(name: str, shape: tuple[int, ...]) -> LazyTensor:
        n_cols, seed = shape[-1], sum(name.encode()) * 7919

        def read(start: int, stop: int) -> Any:
            if len(shape) == 1:
                return np.ones((1, n_cols), dtype=np.float16).view(np.uint8)
            index = (np.arange(start, stop)[:, None] * 104729 + seed + np.arange(n_cols)) % len(noise)
            return (noise[index] / np.float16(math.sqrt(n_cols))).view(np.uint8)

        return LazyTensor(shape=shape, grid=F16, read=read, origin=name)

    q, kv = n_heads * head_dim, n_kv * head_dim
    roles: dict[str, tuple[int, ...]] = {"attn_norm": (n_embd,), "wq": (q, n_embd), "wk": (kv, n_embd), "wv": (kv, n_embd)}
    roles |= {"wo": (n_embd, q), "mlp_norm": (n_embd,), "gate": (n_ff, n_embd), "up": (n_ff, n_embd), "down": (n_embd, n_ff)}
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (n_vocab, n_embd), "final_norm.weight": (n_embd,)}
    shapes |= {f"layers.{i}.{role}.weight": shape for i in range(n_layers) for role, shape in roles.items()}
    return spec, {name: tensor(name, shape) for name, shape in shapes.items()}


def halves(text: Path, work: Path) -> tuple[Path, Path]:
    """The text split in two at the line break nearest before its middle."""
    content = text.read_text(encoding="utf-8")
    middle = content.rfind("\n", 0, len(content) // 2) + 1
    parts = work / "calibration.txt", work / "evaluation.txt"
    for path, part in zip(parts, (content[:middle], content[middle:]), strict=True):
        path.write_text(part, encoding="utf-8")
    return parts


def uniql_scores(
    model_ref: str, calibration: Path, text: Path, rates: Sequence[float], ctx: int, chunks: int | None, scores: Scores
) -> Any:
    """Perplexity of the float model: {"full": p, "uniform": {rate: p}, "published": {rate: p}}."""
    from edgeq.converters.export import calibration_windows, read_calibration
    from edgeq.converters.sources.resolve import open_model
    from edgeq.reference import Reference
    from edgeq.uniql import Measurement, layer_rates, masked, measure

    model = open_model(model_ref)
    ids = model.tokenizer.encode(text.read_text(encoding="utf-8"))
    windows = [ids[i * ctx : (i + 1) * ctx] for i in range(min(len(ids) // ctx, chunks or len(ids)))]
    reference = Reference(model.spec, model.tensors)
    found: list[Measurement] = []

    def measured() -> Measurement:
        if not found:
            seen = model.tokenizer.encode(read_calibration(calibration).text)
            found.append(measure(reference, calibration_windows(seen, model.spec.n_ctx)[0]))
        return found[0]

    def cut(kind: str, rate: float) -> float:
        rates = rate if kind == "uniform" else layer_rates(measured().importance, rate)
        return perplexity(Reference(model.spec, masked(reference, measured().moments, rates)), windows)

    key = f"uniql {model_ref} {ctx} {len(windows)}"
    result: dict[str, Any] = {"full": scores.get(f"{key} full", lambda: perplexity(reference, windows))}
    for kind in ("uniform", "published"):
        result[kind] = {r: scores.get(f"{key} {kind} {r:g}", lambda kind=kind, r=r: cut(kind, r)) for r in rates if r}
    return result


def perplexity(reference: Any, windows: Sequence[Sequence[int]], at_once: int = 8) -> float:
    """As `edgeq eval` defines it, in the float reference."""
    import torch

    total, count = 0.0, 0
    for start in range(0, len(windows), at_once):
        part = windows[start : start + at_once]
        for ids, hidden in zip(part, reference.hidden(part), strict=True):
            logits = reference.logits(hidden[:-1]).double()
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
            count += len(ids) - 1
    return math.exp(total / count)


def export(model: str, folder: Path, quant: str, calibration: Path | None, *, elastic: bool) -> dict[str, float]:
    """Export into a folder, unless it is there: bytes of the artifact and of the side files."""
    if not folder.exists():
        edgeq.export(model, profile=PROFILE, output=folder, quant=quant, calibration=calibration, elastic=elastic)
    package = read_package(folder)
    if package.status != "passed":
        raise SystemExit(f"{folder} did not pass its gate: {package.manifest['gate']['failures']}")
    return {"artifact": package.artifacts[0].bytes, "side_files": sum(file.bytes for file in package.side_files)}


class Judge:
    """Collects what misses its limit."""

    def __init__(self) -> None:
        self.missed: list[str] = []

    def check(self, what: str, *, ok: bool) -> str:
        if not ok:
            self.missed.append(what)
        return "" if ok else "  MISSED"


def compare(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    rates = [float(rate) for rate in arguments.rates.split(",")]
    arguments.work.mkdir(parents=True, exist_ok=True)
    calibration, evaluation = halves(arguments.text, arguments.work)
    # What is kept is of these texts and sources: other ones get other results.
    mark = sha256(evaluation)[:12]
    scores = Scores.load(arguments.work / f"scores-{mark}.json")
    judge = Judge()
    uniql = uniql_scores(arguments.model, calibration, evaluation, rates, arguments.ctx, arguments.chunks, scores)
    best = {r: min(("uniform", "published"), key=lambda kind, r=r: uniql[kind][r]) for r in rates if r}
    rise = {r: uniql[best[r]][r] - uniql["full"] for r in rates if r}
    print(f"uniql, float: perplexity {uniql['full']:.3f} at rate 0")
    for r in rise:
        both = ", ".join(f"{kind} {uniql[kind][r]:.3f}" for kind in ("uniform", "published"))
        print(f"  rate {r:.2f}: {both}; increase of the better one {rise[r]:.3f}", flush=True)
    results: dict[str, Any] = {"uniql": {**uniql, "increase": rise, "better": best}, "packages": {}}
    for quant in arguments.quants.split(","):
        plain = export(arguments.model, arguments.work / f"{quant}-fixed", quant, calibration, elastic=False)
        for source, text, limit in (("the text", calibration, TEXT_LIMIT), ("edgeq's text", None, DEFAULT_LIMIT)):
            folder = arguments.work / f"{quant}-{'text' if text else 'default'}"
            size = export(arguments.model, folder, quant, text, elastic=True)
            stamp = read_package(folder).artifacts[0].sha256[:12]
            found = {
                r: scores.get(f"{stamp} {arguments.ctx} {arguments.chunks} {r:g}", lambda f=folder, r=r: score(f, evaluation, r, arguments))
                for r in rates
            }
            results["packages"][f"{quant}, {source}"] = {"rates": found, **size}
            print(f"\nedgeq {quant}, calibrated on {source}: perplexity {found[rates[0]]['perplexity']:.3f} at rate {rates[0]:g}")
            before = 0.0
            for r in rates:
                if not r:
                    continue
                increase = found[r]["perplexity"] - found[rates[0]]["perplexity"]
                ratio = increase / rise[r]
                ok = ratio <= limit if r in JUDGED else (ratio < 1 if text else True)
                note = judge.check(f"{quant}, {source}, rate {r:g}: {ratio:.2f} of uniql's increase", ok=ok)
                note += judge.check(f"{quant}, {source}: perplexity falls at rate {r:g}", ok=increase >= before)
                before = increase
                print(f"  rate {r:.2f}: {found[r]['perplexity']:8.3f}  increase {increase:7.3f}  of uniql's {ratio:5.2f}{note}", flush=True)
            larger = sum(size.values()) / sum(plain.values())
            note = judge.check(f"{quant}, {source}: {larger:.3f} of the plain export's bytes", ok=larger <= SIZE_LIMIT)
            both = [f"{sizes['artifact']:,} + {sizes['side_files']:,} in side files" for sizes in (size, plain)]
            print(f"  bytes: {both[0]}; plain {both[1]}: {larger:.3f}{note}")
        measured = speeds(arguments.work / f"{quant}-text", rates)
        results["packages"][f"{quant}, the text"]["speeds"] = {
            r: {what: asdict(ratio) for what, ratio in ratios.items()} for r, ratios in measured.items()
        }
        for r, ratios in measured.items():
            print(f"  rate {r:.2f}: prefill {ratios['prefill']}, decode {ratios['decode']}")
        for what in slower(measured):
            print(judge.check(f"{quant}: {what} is slower than at a lower rate", ok=False))
    sorting = child({"model": arguments.model, "text": str(calibration), "quant": arguments.quants.split(",")[0]})
    note = judge.check(f"sorting took {sorting['seconds']:.0f} s", ok=sorting["seconds"] <= SORT_SECONDS)
    print(f"\nsorting: {sorting['seconds']:.1f} s, peak {sorting['peak_rss_bytes'] / 2**20:,.0f} MiB{note}")
    results["sorting"] = sorting
    return results, judge.missed


def score(folder: Path, text: Path, rate: float, arguments: argparse.Namespace) -> dict[str, float]:
    found = edgeq.evaluate(folder, text, ctx=arguments.ctx, chunks=arguments.chunks, rate=rate)
    return {"perplexity": found.perplexity, "tokens": found.tokens}


def shape(name: str, tokens: int) -> dict[str, Any]:
    """Sorting with `tokens` and with half of them: what grows with tokens and what does not. Both above a batch of 1024 tokens."""
    spec, _ = synthetic(name)
    half, full = (child({"shape": name, "tokens": n}) for n in (tokens // 2, tokens))
    per_token = {key: (full[key] - half[key]) / (tokens - tokens // 2) for key in full}
    far = {key: full[key] + per_token[key] * (SORTING_TOKENS - tokens) for key in full}
    print(f"{name}, random weights, {tokens} tokens: {full['seconds']:.0f} s, peak {full['peak_rss_bytes'] / 2**20:,.0f} MiB")
    print(
        f"  extrapolated from {tokens // 2} and {tokens} to {SORTING_TOKENS} tokens: {far['seconds']:.0f} s, peak "
        f"{far['peak_rss_bytes'] / 2**20:,.0f} MiB; foretold at export: {sorting_bytes(spec, SORTING_TOKENS) / 2**20:,.0f} MiB"
    )
    large, _ = synthetic("7B")
    print(f"  foretold for a 7B model: {sorting_bytes(large, SORTING_TOKENS) / 2**20:,.0f} MiB")
    return {"shape": name, "tokens": tokens, "measured": full, "extrapolated": far, "foretold": sorting_bytes(spec, SORTING_TOKENS)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", type=Path)
    what.add_argument("--synthetic", choices=sorted(SHAPES))
    parser.add_argument("--work", type=Path, help="folder for packages and scores; needed with --text")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--quants", default="Q8_0,Q4_0")
    parser.add_argument("--rates", default="0,0.05,0.15,0.25,0.35")
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--chunks", type=int)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.tokens < 2048:
        parser.error("--tokens must be at least 2048: below two batches of 1024, memory does not grow as it does later")
    if arguments.text is not None and arguments.work is None:
        parser.error("--text needs --work")
    try:
        if arguments.synthetic:
            results, missed = shape(arguments.synthetic, arguments.tokens), []
        else:
            results, missed = compare(arguments)
    except EdgeqError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({**results, "missed": missed}, indent=1) + "\n", encoding="utf-8")
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
