"""How fast the cuts of an elastic package are beside the package at rate 0.

    python benchmarks/speed.py PACKAGE [--rates 0,0.05,0.15,0.25,0.35] [--rounds 40] [--prompt-tokens 256] [--tokens 12] [--threads 2]

All cuts are in one process, each with a context of its own, and take turns of a few tokens: a process for each takes its turns so far
apart that on a machine which others use what changed meanwhile is more than what is looked for. A round computes a prompt and then single
tokens, with all cuts, every second round in opposite order. Ratios are medians of those within a round, with a bootstrap interval of 95 %.
Exit status 1 when a cut is slower than one at a lower rate, by more than its interval.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import edgeq
from edgeq.runtime.llama import LlamaModel
from edgeq.runtime.llama_context import LlamaContext

RATES = (0.0, 0.05, 0.15, 0.25, 0.35)


@dataclass(frozen=True)
class Ratio:
    """Of speeds. tok_s: median speed of the cut itself."""

    median: float
    low: float
    high: float
    tok_s: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f}, {self.tok_s:.1f} tok/s)"


def speeds(
    package: Path, rates: Sequence[float] = RATES, *, rounds: int = 40, n_prompt: int = 256, n_tokens: int = 12, threads: int = 2
) -> dict[float, dict[str, Ratio]]:
    """By rate, "prefill" and "decode" beside the first of the rates."""
    took: dict[float, dict[str, list[float]]] = {rate: {"prefill": [], "decode": []} for rate in rates}
    with tempfile.TemporaryDirectory() as folder:
        contexts = {rate: _context(package, rate, Path(folder) / f"{rate:g}.gguf", n_prompt + n_tokens, threads) for rate in rates}
        prompt = np.arange(n_prompt) % 97 + 100
        for number in range(rounds + 1):
            for rate in rates if number % 2 else tuple(reversed(rates)):
                context = contexts[rate]
                context.clear()
                began = time.perf_counter()
                context.decode(prompt)
                filled = time.perf_counter()
                for token in range(n_tokens):
                    context.decode([token + 100])
                ended = time.perf_counter()
                if number:  # the first round warms up
                    took[rate]["prefill"].append((filled - began) / n_prompt)
                    took[rate]["decode"].append((ended - filled) / n_tokens)
        for context in contexts.values():
            context.model.close()
    return {rate: {what: _ratio(took[rates[0]][what], own) for what, own in found.items()} for rate, found in took.items()}


def _context(package: Path, rate: float, path: Path, n_ctx: int, threads: int) -> LlamaContext:
    return LlamaContext(LlamaModel.load(edgeq.cut(package, output=path, rate=rate).path), n_ctx=n_ctx, threads=threads)


def _ratio(base: Sequence[float], own: Sequence[float]) -> Ratio:
    ratios = np.array(base) / np.array(own)
    again = np.median(np.random.default_rng(0).choice(ratios, size=(2000, len(ratios))), axis=1)
    low, high = np.percentile(again, [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high), float(1 / np.median(own)))


def slower(found: dict[float, dict[str, Ratio]]) -> list[str]:
    """What is slower than at a lower rate."""
    missed = []
    for what in ("prefill", "decode"):
        best = 0.0
        for rate, ratios in found.items():
            if ratios[what].high < best:
                missed.append(f"{what} at rate {rate:g}")
            best = max(best, ratios[what].median)
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--rates", default=",".join(map(str, RATES)))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    rates = [float(rate) for rate in arguments.rates.split(",")]
    found = speeds(
        arguments.package,
        rates,
        rounds=arguments.rounds,
        n_prompt=arguments.prompt_tokens,
        n_tokens=arguments.tokens,
        threads=arguments.threads,
    )
    for rate, ratios in found.items():
        print(f"rate {rate:.2f}: " + "   ".join(f"{what} {ratio}" for what, ratio in ratios.items()))
    missed = slower(found)
    print("slower than at a lower rate: " + ", ".join(missed) if missed else "no cut is slower than one at a lower rate")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
