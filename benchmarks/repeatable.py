"""Whether `edgeq bench` says the same twice, and whether its memory figures are psutil's.

    python benchmarks/repeatable.py ARTIFACT [--repeat 7] [--prompt-tokens 128] [--gen-tokens 64] [--threads N]

again    two runs of one configuration, one after the other: 95 % intervals of the main figures, and whether they overlap
memory   resident memory that the measured process read from /proc, beside what psutil says of it from outside; and of the second run beside
         the first

Exit status 1 when intervals of a figure do not overlap, or memory differs by more than 2 %. Use an idle machine: between runs on a machine
that others use, what they do differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from edgeq.errors import EdgeqError
from edgeq.runtime import bench as module
from edgeq.runtime.bench_stats import overlap
from edgeq.runtime.child import Child

FIGURES = ("load_s", "ttft_ms", "prefill_tok_s", "decode_tok_s", "itl_p50_ms")
MEMORY_LIMIT = 0.02


class Watched(Child):
    """A child that psutil looks at before it ends."""

    seen: list[int] = []  # noqa: RUF012 (one list for all of them)

    def ask(self, request: Mapping[str, Any], **settings: Any) -> Any:
        if request["op"] == "end":
            self.seen.append(psutil.Process(self.pid).memory_info().rss)
        return super().ask(request, **settings)


def main() -> int:
    here = Path(__file__).resolve().parent  # what is named onnx here is not the library
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != here]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="a GGUF file, a package or an ONNX folder")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--gen-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    sizes = {"prompt_tokens": options.prompt_tokens, "gen_tokens": options.gen_tokens, "repeat": options.repeat, "threads": options.threads}
    module.Child = Watched  # type: ignore[misc]
    try:
        (first,), (second,) = (module.bench([options.artifact], **sizes) for _ in range(2))
    except EdgeqError as err:
        print(f"error: {err}", file=sys.stderr)
        return err.exit_code
    kept = True
    for figure in FIGURES:
        a, b = (tuple(row.intervals[figure] or ()) for row in (first, second))
        same = len(a) == len(b) == 2 and overlap(a, b)
        kept &= same
        shown = (
            "   ".join(f"{low:.5g} to {high:.5g}" for low, high in (a, b)) if len(a) == len(b) == 2 else "no interval: repeat more often"
        )
        print(f"again    {figure:<17} {shown}   {'overlap' if same else 'DO NOT OVERLAP'}")
    samples = [s for row in (first, second) for s in (*row.samples["repeats"], *row.samples["discarded"])]
    ratios = [ours / theirs for ours, theirs in zip(sorted(s["steady_rss_bytes"] for s in samples), sorted(Watched.seen), strict=True)]
    worst = max(ratios, key=lambda ratio: abs(ratio - 1))
    print(f"memory   /proc beside psutil in {len(ratios)} processes: the worst ratio is {worst:.4f}")
    drift = (second.steady_rss_bytes or 0) / (first.steady_rss_bytes or 1)
    print(f"memory   second run beside the first: {drift:.4f}")
    for text in dict.fromkeys((*first.warnings, *second.warnings)):
        print(f"warning: {text}", file=sys.stderr)
    return 0 if kept and max(abs(worst - 1), abs(drift - 1)) <= MEMORY_LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
