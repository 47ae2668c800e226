"""How much of a model survives quantization: edgeq's export beside llama.cpp's own quantizer, same type, same source, same text.

    python benchmarks/quantization.py --text FILE [--model demo] [--quants Q4_0,Q4_K_M] [--windows 12] [--ctx 512] [--calibration FILE]

For each type: `edgeq export` with its importance matrix, and `llama_model_quantize` (requantizing allowed, no importance matrix) of the
same GGUF file. Both are scored in llama.cpp against the float reference on `--windows` windows spread evenly over the text, which must
not be the calibration text. Figures: mean and 99th percentile of KL, top-1 agreement, perplexity. Exit status 1
when ours is worse in mean KL.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import sys
import tempfile
from pathlib import Path

import llama_cpp

import edgeq
from edgeq.calibration import windows_of
from edgeq.converters.gguf.mixes import quant
from edgeq.converters.sources.resolve import open_model
from edgeq.package import read_package
from edgeq.reference import Reference
from edgeq.reference_scores import TorchScores
from edgeq.runtime.llama import library
from edgeq.runtime.quality import Agreement, compare
from edgeq.runtime.worker import ScoringWorker


def llama_quantize(source: Path, target: Path, name: str) -> None:
    """llama-quantize's file type of that name, without an importance matrix."""
    library()  # keeps llama.cpp's log from the screen
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = quant(name).file_type
    params.allow_requantize = True
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if status != 0:
        raise RuntimeError(f"llama_model_quantize returned {status} for {name}")


def score(artifact: Path, reference: TorchScores) -> Agreement:
    with ScoringWorker(artifact, n_ctx=reference.n_ctx) as worker:
        return compare((ids, reference.logits(i), worker.logits(ids)) for i, ids in enumerate(reference.windows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="`demo` or a GGUF file")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--quants", default="Q4_0,Q4_K_M")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--calibration", type=Path)
    arguments = parser.parse_args()

    model = open_model(arguments.model)
    ids = model.tokenizer.encode(arguments.text.read_text(encoding="utf-8"))
    reference = TorchScores(Reference(model.spec, model.tensors), windows_of(ids, length=arguments.ctx, count=arguments.windows))
    print(f"{'':<30}{'bytes':>12}{'mean KL':>10}{'p99 KL':>9}{'top-1':>8}{'ppl':>9}{'ref ppl':>9}")
    worse = False
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.quants.split(","):
            package = Path(folder, name)
            edgeq.export(arguments.model, profile="laptop-cpu", output=package, quant=name, calibration=arguments.calibration, verify=False)
            theirs = Path(folder, f"{name}.gguf")
            llama_quantize(model.files[0], theirs, name)
            found = {}
            for who, artifact in (("edgeq", read_package(package).artifact_path()), ("llama_model_quantize", theirs)):
                agreement = found[who] = score(artifact, reference)
                print(
                    f"{name:<8}{who:<22}{artifact.stat().st_size:>12,}{agreement.kl_mean:>10.4f}{agreement.kl_p99:>9.3f}"
                    f"{agreement.top1_agreement:>8.1%}{math.exp(agreement.nll_artifact):>9.3f}{math.exp(agreement.nll_reference):>9.3f}",
                    flush=True,
                )
            worse |= found["edgeq"].kl_mean > found["llama_model_quantize"].kl_mean
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
