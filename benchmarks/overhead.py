"""What edgeq's timed decode loop costs beside loops that have nothing of edgeq in them.

    python benchmarks/overhead.py ARTIFACT... [--pairs 60] [--tokens 16] [--prompt-tokens 128] [--threads N]

An artifact is a GGUF file, a package or an ONNX folder. It is loaded once per loop in this process. Each pair runs both loops from the
same cache, in turns (theirs first, then edgeq's first); pairs are short and many, so that a slow spell of the machine meets both:
GGUF   edgeq   `edgeq.runtime.decoding.greedy_steps`, as `edgeq bench` times it
       bare    llama_decode through ctypes over a model and context of its own, numpy's argmax over the logits, a clock reading per token
ONNX   edgeq   the same loop in ONNX Runtime
       genai   generate_next_token of onnxruntime-genai on the same folder, greedy
The figure is the median over pairs of time(edgeq) / time(theirs), with a 95 % bootstrap interval; exit status 1 when a median exceeds 1.02.
Use an idle machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.errors import EdgeqError
from edgeq.runtime.bench_plan import prompt_ids
from edgeq.runtime.bench_stats import paired_ratio
from edgeq.runtime.bench_warnings import contention
from edgeq.runtime.contention import others_meter
from edgeq.runtime.cores import usable_cores
from edgeq.runtime.decoding import greedy_steps
from edgeq.runtime.engine import is_onnx, load_model, new_context, open_artifact
from edgeq.runtime.llama import library

LIMIT = 1.02

Loop = Callable[[], float]  # seconds of a greedy generation after the prompt


@contextmanager
def edgeq_loop(path: Path, n_prompt: int, n_tokens: int, threads: int) -> Iterator[Loop]:
    model = load_model(path, threads=threads)
    context = new_context(model, n_ctx=n_prompt + n_tokens + 1, threads=threads, max_outputs=1)
    first = int(context.decode(prompt_ids(model.n_vocab, n_prompt))[0].argmax())

    def run() -> float:
        context.truncate(n_prompt)
        greedy_steps(context, first, 1)  # whatever the other loop left running comes to rest
        context.truncate(n_prompt)
        stamps = greedy_steps(context, first, n_tokens)
        return float(stamps[-1] - stamps[0]) / 1e9

    yield run
    context.close()
    model.close()


@contextmanager
def bare_loop(path: Path, n_prompt: int, n_tokens: int, threads: int) -> Iterator[Loop]:
    """llama.cpp through the functions of llama-cpp-python, written out."""
    c = library()  # llama-cpp-python, its log turned off
    model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
    n_vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    params = c.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_outputs_max = n_prompt + n_tokens + 1, 512, 512, 1
    params.n_threads = params.n_threads_batch = threads
    context = c.llama_init_from_model(model, params)
    memory, batch = c.llama_get_memory(context), c.llama_batch_init(512, 0, 1)
    ids = prompt_ids(n_vocab, n_prompt)
    for start in range(0, n_prompt, 512):
        part = ids[start : start + 512]
        for i, token in enumerate(part):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
            batch.logits[i] = start + i == n_prompt - 1
        batch.n_tokens = len(part)
        if c.llama_decode(context, batch):
            raise SystemExit("llama_decode of the prompt failed")
    batch.n_tokens, batch.logits[0] = 1, 1
    first = int(np.ctypeslib.as_array(c.llama_get_logits(context), shape=(n_vocab,)).argmax())
    stamps = np.empty(n_tokens, dtype=np.int64)

    def steps(n: int) -> float:
        c.llama_memory_seq_rm(memory, 0, n_prompt, -1)
        token, decode, get_logits, clock = first, c.llama_decode, c.llama_get_logits, time.perf_counter_ns
        began = clock()
        for i in range(n):
            batch.token[0] = token
            batch.pos[0] = n_prompt + i
            if decode(context, batch):
                raise SystemExit("llama_decode failed")
            token = int(np.ctypeslib.as_array(get_logits(context), shape=(n_vocab,)).argmax())
            stamps[i] = clock()
        return float(stamps[n - 1] - began) / 1e9

    def run() -> float:
        steps(1)
        return steps(n_tokens)

    yield run
    c.llama_batch_free(batch)
    c.llama_free(context)
    c.llama_model_free(model)


@contextmanager
def genai_loop(path: Path, n_prompt: int, n_tokens: int, threads: int) -> Iterator[Loop]:
    import onnxruntime_genai as og

    config = og.Config(str(path.parent))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)
    n_vocab = json.loads((path.parent / "genai_config.json").read_text(encoding="utf-8"))["model"]["vocab_size"]
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=n_prompt + n_tokens + 4, min_length=n_prompt + n_tokens + 4, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([prompt_ids(n_vocab, n_prompt)], dtype=np.int32))
    generator.generate_next_token()  # from the prompt's logits: computes nothing

    def run() -> float:
        generator.generate_next_token()
        began = time.perf_counter()
        for _ in range(n_tokens):
            generator.generate_next_token()
        taken = time.perf_counter() - began
        generator.rewind_to(n_prompt + 1)
        return taken

    yield run


def compare(artifact: Path, options: argparse.Namespace) -> bool:
    """Print one artifact's table; whether the median ratio keeps within LIMIT."""
    path, _ = open_artifact(artifact)
    theirs, other = ("genai", genai_loop) if is_onnx(path) else ("bare", bare_loop)
    threads = options.threads or usable_cores()
    sizes: tuple[Any, ...] = (path, options.prompt_tokens, options.tokens, threads)
    seconds: dict[str, list[float]] = {theirs: [], "edgeq": []}
    with other(*sizes) as their_loop, edgeq_loop(*sizes) as our_loop:
        loops = {theirs: their_loop, "edgeq": our_loop}
        print(f"{artifact}: {options.prompt_tokens} tokens of prompt, {options.tokens} steps, {threads} threads")
        others = others_meter()
        for pair in range(-2, options.pairs):  # the first two pairs warm up
            for name in (theirs, "edgeq") if pair % 2 == 0 else ("edgeq", theirs):
                taken = loops[name]()
                if pair >= 0:
                    seconds[name].append(taken)
        other_cores = others()
    base, ours = (np.array(seconds[name]) / options.tokens * 1e3 for name in (theirs, "edgeq"))
    print(f"{'':>14}  {'fastest':>9}  {'quartile':>9}  {'median':>9}  {'quartile':>9}")
    for name, values in ((f"{theirs}, ms", base), ("edgeq, ms", ours), (f"edgeq / {theirs}", ours / base)):
        print(f"{name:>14}  " + "  ".join(f"{value:>9.4f}" for value in np.percentile(values, [0, 25, 50, 75])))
    found = paired_ratio(seconds["edgeq"], seconds[theirs])
    assert found is not None
    sure = "" if found.low is None else f" ({found.low:.4f} to {found.high:.4f})"
    print(f"median of {options.pairs} paired ratios: {found.ratio:.4f}{sure}, limit {LIMIT}", flush=True)
    if warning := contention([other_cores])["warning"]:
        print(f"warning: {warning}", file=sys.stderr)
    return found.ratio <= LIMIT


def main() -> int:
    here = Path(__file__).resolve().parent  # what is named onnx here is not the library
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != here]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+", metavar="ARTIFACT", help="a GGUF file, a package or an ONNX folder")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    try:
        kept = [compare(artifact, options) for artifact in options.artifacts]
    except EdgeqError as err:
        print(f"error: {err}", file=sys.stderr)
        return err.exit_code
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
