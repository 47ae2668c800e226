"""What ONNX packages are worth: beside onnxruntime-genai's own builder, in onnxruntime-genai, cut, and in the memory that an export takes.

    python benchmarks/onnx.py --work DIR --text FILE [--model demo] [--quant int4-full] [--tables builder,speed,greedy,cuts,adapters,memory]
                              [--adapter PATH] [--ctx 1024] [--chunks 8] [--rounds 7] [-o results.json]

builder  the same weights by `onnxruntime_genai.models.builder` (int4, blocks of 32) and by `edgeq export`: seconds, peak memory, bytes, and
         perplexity of both on the second half of the text, by `edgeq eval`
speed    prefill of 512 tokens and decoding of 128 of both through onnxruntime-genai, a fresh process each time, in turns; the ratio of ours
         to the builder's is the median over rounds, with a bootstrap interval
greedy   64 tokens on ten prompts: onnxruntime-genai on our folder beside `edgeq.load`
cuts     perplexity of elastic packages in ONNX and GGUF cut at the same rates, calibrated on the first half of the text; and of ONNX
         packages pruned by `--prune` at these rates, whose layers have head sizes and RoPE pairs of their own
adapters what places for an adapter (--adapter, of the model) cost when none is set, and when it is; the time of a switch
memory   peak of exporting a model of random weights of the shape of a 1B Llama

Packages in DIR are used again. Exit status 1 when a limit is missed: perplexity above the builder's, an interval of speed that ends below
1, other tokens, 4 GiB. Needs edgeq[all], onnxruntime-genai and transformers; speeds want an idle machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import edgeq
from edgeq.converters.sources.resolve import open_model
from edgeq.errors import EdgeqError
from edgeq.gate_prompts import gate_prompts
from edgeq.package import read_package

HERE = Path(__file__).resolve().parent
PROFILE = "laptop-cpu"
TABLES = ("builder", "speed", "greedy", "cuts", "adapters", "memory")
PROMPT_TOKENS, GEN_TOKENS, GREEDY_TOKENS, PROMPTS = 512, 128, 64, 10
COST_LIMIT = 0.98  # speed of a graph with places that nothing takes, beside one without
CUT_RATES = (0.0, 0.15, 0.25, 0.35)
PEAK_LIMIT = 4 << 30
N_EMBD, N_FF, N_HEADS, N_KV, N_LAYERS = 2048, 8192, 32, 8, 16  # with a head of 64: Llama 3.2 1B but for its vocabulary

# Runs a module as a program and reports on stderr how long it took and the most memory it had.
_TIMED = """
import atexit, runpy, sys, time
began = time.perf_counter()
def report():
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(time.perf_counter() - began, peak * 1024, file=sys.stderr)
atexit.register(report)
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
_GENAI = """
import json, sys, time
import numpy as np, onnxruntime_genai as og
folder, prompt, n_new = json.loads(sys.argv[1])
model = og.Model(folder)
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=len(prompt) + n_new + 8, do_sample=False)
for warm in (True, False):
    generator = og.Generator(model, parameters)
    began = time.perf_counter()
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    generator.generate_next_token()
    filled = time.perf_counter()
    for _ in range(n_new - 1 if not warm else 8):
        generator.generate_next_token()
    ended = time.perf_counter()
tokens = [int(token) for token in generator.get_sequence(0)][len(prompt):]
print(json.dumps({"prefill": len(prompt) / (filled - began), "decode": (n_new - 1) / (ended - filled), "tokens": tokens}))
"""


def timed(*arguments: str) -> tuple[float, int]:
    """(seconds, peak bytes) of a module run as a program."""
    run = subprocess.run(
        [sys.executable, "-c", _TIMED, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
    )
    if run.returncode:
        raise SystemExit(run.stderr)
    seconds, peak = run.stderr.split()[-2:]
    return float(seconds), int(peak)


def genai(folder: Path, prompt: Sequence[int], n_new: int) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-c", _GENAI, json.dumps([str(folder), list(prompt), n_new])], capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise SystemExit(run.stderr)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def artifact_folder(package: Path) -> Path:
    """The folder that onnxruntime-genai is given."""
    return read_package(package).artifact_path().parent


def exported(work: Path, model: str, quant: str, *options: str, name: str | None = None) -> tuple[Path, float, int]:
    """A package, made now unless it is there, and what it took (0 when it was there)."""
    folder = work / (name or f"edgeq-{quant}")
    if folder.is_dir():
        return folder, 0.0, 0
    command = ["edgeq.cli", "export", model, "--profile", PROFILE, "--quant", quant, "-o", str(folder), *options]
    return folder, *timed(*command)


def hugging_face(work: Path, model: str, package: Path) -> Path:
    """The model as a Hugging Face folder in float32, with the tokenizer files of a package."""
    folder = work / "hf"
    if not folder.is_dir():
        sys.path.append(str(HERE))
        from train_adapters import transformers_model

        transformers_model(open_model(model)).save_pretrained(folder)
        for file in artifact_folder(package).iterdir():
            if file.name.startswith(("tokenizer", "chat_template", "special_tokens")):
                shutil.copy(file, folder)
    return folder


def built(work: Path, model: str, package: Path) -> tuple[Path, float, int]:
    """The same model by the builder of onnxruntime-genai."""
    source, folder = hugging_face(work, model, package), work / "builder-int4"
    if (folder / "genai_config.json").is_file():
        return folder, 0.0, 0
    options = ["int4_block_size=32", "int4_accuracy_level=4"]
    command = [
        "onnxruntime_genai.models.builder",
        "-i",
        str(source),
        "-o",
        str(folder),
        "-p",
        "int4",
        "-e",
        "cpu",
        "-c",
        str(work / "cache"),
    ]
    return folder, *timed(*command, "--extra_options", *options)


def perplexity(artifact: Path, text: Path, ctx: int, chunks: int, rate: float | None = None) -> float:
    return edgeq.evaluate(artifact, text=text, ctx=ctx, chunks=chunks, rate=rate).perplexity


def builder_table(arguments: argparse.Namespace, text: Path) -> dict[str, Any]:
    work, rows = arguments.work, {}
    ours, seconds, peak = exported(work, arguments.model, arguments.quant, "--format", "onnx", "--fixed", "--no-verify")
    theirs, their_seconds, their_peak = built(work, arguments.model, ours)
    for name, folder, took, most in (("edgeq", artifact_folder(ours), seconds, peak), ("builder", theirs, their_seconds, their_peak)):
        nbytes = sum(file.stat().st_size for file in folder.iterdir() if file.name.startswith("model.onnx"))
        found = perplexity(folder, text, arguments.ctx, arguments.chunks)
        rows[name] = {"perplexity": found, "bytes": nbytes, "seconds": took, "peak_rss_bytes": most}
        print(f"{name:8} perplexity {found:.3f}   {nbytes / 1e6:.1f} MB   made in {took:.1f} s   peak {most / 2**20:,.0f} MiB", flush=True)
    rows["ok"] = rows["edgeq"]["perplexity"] <= rows["builder"]["perplexity"]
    return rows


def speed_table(arguments: argparse.Namespace, text: Path) -> dict[str, Any]:
    ours, *_ = exported(arguments.work, arguments.model, arguments.quant, "--format", "onnx", "--fixed", "--no-verify")
    theirs, *_ = built(arguments.work, arguments.model, ours)
    prompt = open_model(arguments.model).tokenizer.encode(text.read_text(encoding="utf-8")[:8000])[:PROMPT_TOKENS]
    runs: dict[str, list[dict[str, Any]]] = {"edgeq": [], "builder": []}
    for _ in range(arguments.rounds):
        for name, folder in (("edgeq", artifact_folder(ours)), ("builder", theirs)):
            runs[name].append(genai(folder, prompt, GEN_TOKENS))
    rows: dict[str, Any] = {"ok": True}
    rng = np.random.default_rng(0)
    for what in ("prefill", "decode"):
        speeds = {name: np.array([run[what] for run in found]) for name, found in runs.items()}
        ratios = speeds["edgeq"] / speeds["builder"]
        again = np.median(rng.choice(ratios, size=(2000, len(ratios))), axis=1)
        low, high = np.percentile(again, [2.5, 97.5])
        rows[what] = {name: float(np.median(found)) for name, found in speeds.items()} | {
            "ratio": float(np.median(ratios)),
            "low": low,
            "high": high,
        }
        print(
            f"{what:8} edgeq {rows[what]['edgeq']:.1f} tok/s   builder {rows[what]['builder']:.1f}   "
            f"ratio {rows[what]['ratio']:.3f} ({low:.3f} to {high:.3f})",
            flush=True,
        )
        rows["ok"] &= bool(high >= 1)
    return rows


def greedy_table(arguments: argparse.Namespace, text: Path) -> dict[str, Any]:
    package, *_ = exported(arguments.work, arguments.model, arguments.quant, "--format", "onnx", "--fixed", "--no-verify")
    tokenizer, same = open_model(arguments.model).tokenizer, []
    prompts = [sample.text[:200] for sample in gate_prompts().texts][:PROMPTS]
    with edgeq.load(package, n_ctx=512) as session:
        for prompt in prompts:
            ids = tokenizer.encode(prompt)
            mine = list(session.generate(ids, max_tokens=GREEDY_TOKENS).tokens)
            theirs = genai(artifact_folder(package), ids, GREEDY_TOKENS)["tokens"][: len(mine)]
            same.append(mine == theirs)
    print(f"greedy   {sum(same)} of {len(same)} prompts give the same {GREEDY_TOKENS} tokens in onnxruntime-genai", flush=True)
    return {"same": same, "ok": all(same)}


def cuts_table(arguments: argparse.Namespace, text: Path) -> dict[str, Any]:
    calibration, rows = arguments.work / "calibration.txt", {}
    for file_format, quant in (("onnx", "int8"), ("gguf", "Q8_0")):
        options = ("--format", file_format, "--elastic", "--no-verify", "--calibration", str(calibration))
        package, *_ = exported(arguments.work, arguments.model, quant, *options, name=f"elastic-{file_format}-{quant}")
        found = [perplexity(package, text, arguments.ctx, arguments.chunks, rate) for rate in CUT_RATES]
        rows[file_format] = dict(zip(map(str, CUT_RATES), found, strict=True))
        print(f"cuts     {file_format} {quant}   perplexity at {_by_rate(rows[file_format])}", flush=True)
    rows["pruned"] = {}
    for rate in CUT_RATES[1:]:
        options = ("--format", "onnx", "--prune", str(rate), "--no-verify", "--calibration", str(calibration))
        package, *_ = exported(arguments.work, arguments.model, "int8", *options, name=f"pruned-onnx-int8-{rate:g}")
        rows["pruned"][str(rate)] = perplexity(package, text, arguments.ctx, arguments.chunks)
    print(f"cuts     onnx int8 --prune   perplexity at {_by_rate(rows['pruned'])}", flush=True)
    return rows | {"ok": True}


def _by_rate(found: dict[str, float]) -> str:
    return "   ".join(f"{rate}: {value:.3f}" for rate, value in found.items())


def adapters_table(arguments: argparse.Namespace, text: Path) -> dict[str, Any]:
    if arguments.adapter is None:
        raise SystemExit("error: the table of adapters needs one: give --adapter, or leave the table out of --tables")
    options = ("--format", "onnx", "--fixed", "--no-verify")
    plain, *_ = exported(arguments.work, arguments.model, arguments.quant, *options)
    beside = ("--adapter", f"{arguments.adapter}=tuned", "--adapters", "keep")
    kept, *_ = exported(arguments.work, arguments.model, arguments.quant, *options, *beside, name=f"edgeq-{arguments.quant}-kept")
    sizes = {"prompt_tokens": PROMPT_TOKENS, "gen_tokens": GEN_TOKENS, "repeat": arguments.rounds}
    alone, off = edgeq.bench([plain, kept], **sizes)
    (on,) = edgeq.bench([kept], adapter="tuned", **sizes)
    pairs = zip(off.samples["repeats"], alone.samples["repeats"], strict=True)
    ratios = np.array([without["decode_s"] / with_places["decode_s"] for with_places, without in pairs])
    again = np.median(np.random.default_rng(0).choice(ratios, size=(2000, len(ratios))), axis=1)
    low, high = np.percentile(again, [2.5, 97.5])
    speeds = {"without": alone.decode_tok_s, "off": off.decode_tok_s, "on": on.decode_tok_s}
    print("adapters " + "   ".join(f"{name} {speed:.1f} tok/s" for name, speed in speeds.items()), flush=True)
    print(
        f"adapters off beside without: {np.median(ratios):.3f} ({low:.3f} to {high:.3f}); a switch takes {on.adapter_switch_ms:.2f} ms",
        flush=True,
    )
    found = {"ratio_off": float(np.median(ratios)), "low": low, "high": high, "switch_ms": on.adapter_switch_ms}
    return {**speeds, **found, "ok": bool(high >= COST_LIMIT)}


def random_model(folder: Path, tokenizer: Path) -> None:
    """A Hugging Face folder of random bfloat16 weights, with somebody else's tokenizer."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "chat_template", "special_tokens")):
            shutil.copy(file, folder)
    n_vocab = json.loads((tokenizer / "genai_config.json").read_text())["model"]["vocab_size"]
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": n_vocab, "hidden_size": N_EMBD}
    config |= {"intermediate_size": N_FF, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS, "num_key_value_heads": N_KV}
    config |= {
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator, kv = torch.Generator().manual_seed(0), N_EMBD // N_HEADS * N_KV
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (n_vocab, N_EMBD), "model.norm": (N_EMBD,)}
    for i in range(N_LAYERS):
        layer = {"self_attn.q_proj": (N_EMBD, N_EMBD), "self_attn.k_proj": (kv, N_EMBD), "self_attn.v_proj": (kv, N_EMBD)}
        layer |= {"self_attn.o_proj": (N_EMBD, N_EMBD), "mlp.gate_proj": (N_FF, N_EMBD), "mlp.up_proj": (N_FF, N_EMBD)}
        norms: dict[str, tuple[int, ...]] = {"input_layernorm": (N_EMBD,), "post_attention_layernorm": (N_EMBD,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in (layer | {"mlp.down_proj": (N_EMBD, N_FF)} | norms).items()}
    tensors = {
        f"{name}.weight": (torch.randn(shape, generator=generator) * 0.02 if len(shape) == 2 else torch.ones(shape)).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def memory_table(arguments: argparse.Namespace, text: Path) -> dict[str, Any]:
    package, *_ = exported(arguments.work, arguments.model, arguments.quant, "--format", "onnx", "--fixed", "--no-verify")
    folder, out = arguments.work / "random-1B", arguments.work / "random-1B-int4"
    if not folder.is_dir():
        random_model(folder, artifact_folder(package))
    shutil.rmtree(out, ignore_errors=True)
    _, seconds, peak = exported(arguments.work, str(folder), "int4", "--format", "onnx", "--fixed", "--no-verify", name=out.name)
    print(
        f"memory   {folder.name}: exported in {seconds:.0f} s, peak {peak / 2**20:,.0f} MiB (limit {PEAK_LIMIT / 2**20:,.0f})", flush=True
    )
    return {"seconds": seconds, "peak_rss_bytes": peak, "ok": peak < PEAK_LIMIT}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--quant", default="int4-full", help="of ours; the builder puts embedding and head in 4 bits too")
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--adapter", type=Path, help="an adapter of the model, in PEFT's layout: see train_adapters.py")
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != HERE]  # else `import onnx` would find this file
    arguments.work.mkdir(parents=True, exist_ok=True)
    whole = arguments.text.read_text(encoding="utf-8")
    evaluation = arguments.work / "evaluation.txt"
    (arguments.work / "calibration.txt").write_text(whole[: len(whole) // 2], encoding="utf-8")
    evaluation.write_text(whole[len(whole) // 2 :], encoding="utf-8")
    makers: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
        "builder": builder_table,
        "speed": speed_table,
        "greedy": greedy_table,
        "cuts": cuts_table,
        "adapters": adapters_table,
        "memory": memory_table,
    }
    try:
        results = {name: makers[name](arguments, evaluation) for name in arguments.tables.split(",")}
    except EdgeqError as err:
        raise SystemExit(f"error: {err}") from err
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    missed = [name for name, rows in results.items() if not rows["ok"]]
    print("missed: " + ", ".join(missed) if missed else "all limits are met")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
