"""What edgeq's timed decode loop costs beside a loop that does nothing but call llama_decode.

    python benchmarks/decode_loop.py MODEL [--pairs 60] [--tokens 16] [--prompt-tokens 128] [--threads N]

One model is loaded once. Each pair runs both loops from the same cache, in turns (bare first, then edgeq first); pairs are short and
many, so that a slow spell of the machine meets both loops:
bare   llama_decode of fixed tokens through a prepared batch: no sampling, no logits read, one clock reading at each end.
edgeq  `edgeq.runtime.decoding.greedy_steps`, as `edgeq bench` times it: llama_decode, the likeliest next token, a clock reading, per
       token.
The figure is the median over pairs of time(edgeq) / time(bare); exit status 1 when it exceeds 1.02.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np

from edgeq.errors import EdgeqError
from edgeq.package import resolve_artifact
from edgeq.runtime.bench import contention, prompt_ids
from edgeq.runtime.contention import others_meter
from edgeq.runtime.decoding import greedy_steps
from edgeq.runtime.llama import LlamaContext, LlamaModel

LIMIT = 1.02


def bare_loop(context: LlamaContext, tokens: list[int]) -> float:
    """Seconds to decode `tokens` one by one, knowing nothing of what comes out."""
    n_past = context.n_past
    batch = llama_cpp.llama_batch_init(1, 0, 1)
    batch.n_tokens = 1
    batch.n_seq_id[0], batch.seq_id[0][0], batch.logits[0] = 1, 0, 1
    pointer, decode = context.pointer, llama_cpp.llama_decode
    try:
        began = time.perf_counter()
        for i, token in enumerate(tokens):
            batch.token[0] = token
            batch.pos[0] = n_past + i
            if decode(pointer, batch):
                raise SystemExit("llama_decode failed")
        return time.perf_counter() - began
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(pointer), 0, n_past, -1)  # `context` did not see these tokens


def edgeq_loop(context: LlamaContext, token: int, n_tokens: int) -> float:
    """Seconds of a greedy generation as it is timed for a report."""
    stamps = greedy_steps(context, token, n_tokens)
    return float(stamps[-1] - stamps[0]) / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file or a package")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    try:
        path, _ = resolve_artifact(options.model)
        with LlamaModel.load(path) as model:
            return compare(model, options)
    except EdgeqError as err:
        print(f"error: {err}", file=sys.stderr)
        return err.exit_code


def compare(model: LlamaModel, options: argparse.Namespace) -> int:
    """Print the table; 0 when the median ratio is within LIMIT, else 1."""
    n_prompt, n_tokens = options.prompt_tokens, options.tokens
    tokens = prompt_ids(model.n_vocab, n_tokens)
    seconds: dict[str, list[float]] = {"bare": [], "edgeq": []}
    with LlamaContext(model, n_ctx=n_prompt + n_tokens, threads=options.threads, max_outputs=1) as context:
        print(f"{model.path.name}: {model.description}, {n_prompt} tokens of prompt, {n_tokens} steps, {context.threads} threads")
        context.decode(prompt_ids(model.n_vocab, n_prompt))
        others = others_meter()
        for pair in range(-1, options.pairs):  # the first pair warms up
            for loop in ("bare", "edgeq") if pair % 2 == 0 else ("edgeq", "bare"):
                context.truncate(n_prompt)
                taken = bare_loop(context, tokens) if loop == "bare" else edgeq_loop(context, tokens[0], n_tokens)
                if pair >= 0:
                    seconds[loop].append(taken)
        other_cores = others()
    bare, ours = (np.array(seconds[loop]) / n_tokens * 1e3 for loop in ("bare", "edgeq"))
    print(f"{'':>14}  {'fastest':>9}  {'quartile':>9}  {'median':>9}  {'quartile':>9}")
    for name, values in (("bare, ms", bare), ("edgeq, ms", ours), ("edgeq / bare", ours / bare)):
        print(f"{name:>14}  " + "  ".join(f"{value:>9.4f}" for value in np.percentile(values, [0, 25, 50, 75])))
    overhead = float(np.median(ours / bare))
    print(f"median of {options.pairs} paired ratios: {overhead:.4f}, limit {LIMIT}")
    if warning := contention([other_cores])["warning"]:
        print(f"warning: {warning}", file=sys.stderr)
    return 0 if overhead <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
