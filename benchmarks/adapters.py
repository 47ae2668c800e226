"""What shipping an adapter merged or kept costs, on adapters trained for real; and quantized checkpoints taken in.

    python benchmarks/adapters.py --work DIR [--model demo] [--text FILE] [--quant Q4_0] [--steps 40] [--windows 4]
                                  [--tables adapters,checkpoints,cuts] [-o results.json]

adapters      for a LoRA, an rsLoRA of rank 64 and a DoRA (`benchmarks/train_adapters.py`), merged and kept: KL from the float base plus
              adapter, on text that training did not see; tokens per second; what a switch costs. A DoRA is kept in the nearest low rank.
              What the base alone loses in the same format is the yardstick: kept may lose no more than YARDSTICK times that.
checkpoints   the model as NF4, GPTQ and AWQ checkpoints (encoded by the tests' own code) exported to GGUF: the gate's verdict, and what
              rounding on top of the checkpoint's own lost
cuts          an elastic package in F16 with the LoRA kept, cut at 0.15 and 0.25: logits beside the float reference on the same cut of the
              merged model; and perplexity beside a package with the LoRA merged, cut alike

KL and perplexity as in `edgeq.runtime.quality`. Packages and adapters in DIR are used again. Exit status 1 when a limit is missed.
Needs edgeq[all], peft and transformers, and this repository's tests folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from train_adapters import KINDS, Texts, mean_kl, perplexity, texts, train, transformers_model, windows

import edgeq
from edgeq.compensation import compensate
from edgeq.converters.adapters.open import open_adapter
from edgeq.converters.sources.gguf import read_gguf_model
from edgeq.converters.sources.resolve import open_model
from edgeq.deltas.merge import merged
from edgeq.errors import EdgeqError
from edgeq.model import Model
from edgeq.package import read_package
from edgeq.ports import cut as cut_ports
from edgeq.reference import Reference
from edgeq.tensors import from_values

PROFILE = "laptop-cpu"
YARDSTICK = 1.25  # another text, another model: the base's own loss is no exact bound of what it loses beside an adapter
APPROX_RANK = 64  # of a DoRA that is kept
RATES = (0.15, 0.25)
CUT_KL = 0.05  # nats: F16 on both sides, and the constant of the estimate of lost channels, for which a LoRA has no place
TABLES = ("adapters", "checkpoints", "cuts")
REPEAT, NEW_TOKENS = 5, 48

Logits = list[np.ndarray]


@dataclass
class Judge:
    missed: list[str] = field(default_factory=list)

    def check(self, what: str, *, ok: bool) -> str:
        if not ok:
            self.missed.append(what)
        return "" if ok else "  MISSED"


@dataclass(frozen=True, kw_only=True)
class Setting:
    model_ref: str
    model: Model
    work: Path
    text: Texts
    held_out: list[list[int]]
    quant: str


def reference_logits(model: Model, ids: Sequence[Sequence[int]]) -> Logits:
    """Of edgeq's float reference."""
    reference = Reference(model.spec, model.tensors)
    return [reference.logits(hidden).float().numpy() for hidden in reference.hidden(ids)]


def session_logits(session: Any, ids: Sequence[Sequence[int]]) -> Logits:
    """Of llama.cpp, with whatever adapters the session has set."""
    found = []
    for window in ids:
        session.score(window)  # brings the session's adapters to the context
        found.append(np.array(session.context.logits_of(window)))
    return found


def export(
    setting: Setting, name: str, *, model: str | Path | None = None, quant: str | None = None, adapter: Path | None = None, **options: Any
) -> Path:
    """Export into DIR/name, unless it is there and younger than the adapter, and see to it that the gate has passed."""
    folder = setting.work / name
    if folder.exists() and adapter is not None and folder.stat().st_mtime < (adapter / "adapter_model.safetensors").stat().st_mtime:
        shutil.rmtree(folder)
    if not folder.exists():
        with_adapter = {} if adapter is None else {"adapters": [str(adapter)], **options}
        rest = options if adapter is None else {}
        edgeq.export(model or setting.model_ref, profile=PROFILE, output=folder, quant=quant or setting.quant, **with_adapter, **rest)
    package = read_package(folder)
    if package.status != "passed":
        raise SystemExit(f"{folder} did not pass its gate: {package.manifest['gate']['failures']}")
    return folder


def speeds(session: Any, ids: Sequence[int]) -> dict[str, float]:
    """Medians over REPEAT runs, after one that does not count."""
    prompt, runs = list(ids), []
    for _ in range(REPEAT + 1):
        session.score(prompt[:2])  # so that nothing else of the prompt is in the cache
        runs.append(session.generate(prompt, max_tokens=NEW_TOKENS).timings)
    return {
        "prefill_tok_s": statistics.median(run.prefill_tok_s for run in runs[1:]),
        "decode_tok_s": statistics.median(run.decode_tok_s for run in runs[1:] if run.decode_tok_s is not None),
    }


def measure(setting: Setting, folder: Path, reference: Logits, adapter: str | None) -> dict[str, float]:
    """A package against a float reference: kl, perplexity, speeds, bytes; with an adapter, what changing it costs."""
    from edgeq.runtime.switching import switch_times

    ids = setting.held_out
    with edgeq.load(folder, adapter=adapter) as session:
        logits = session_logits(session, ids)
        found = {"kl": mean_kl(reference, logits), "perplexity": perplexity(logits, ids), **speeds(session, ids[0])}
        if adapter is not None:
            times = switch_times(session, adapter)
            found |= {"switch_ms": 1000 * (times.switched_s - times.same_s), "first_use_ms": 1000 * (times.loaded_s - times.same_s)}
    package = read_package(folder)
    found["bytes"] = sum(file.bytes for file in package.artifacts) + sum(one.get("bytes", 0) for one in package.manifest["adapters"])
    return found


def adapters_table(setting: Setting, judge: Judge, steps: int) -> dict[str, Any]:
    ids = setting.held_out
    base = reference_logits(setting.model, ids)
    alone = measure(setting, export(setting, f"base-{setting.quant}", elastic=False), base, None)
    results: dict[str, Any] = {"base": alone}
    print(f"\n{setting.quant}, {sum(map(len, ids))} held-out tokens; base alone: {_row(alone)}", flush=True)
    for kind in KINDS:
        trained = train(setting.model, kind, setting.work / kind, setting.text, steps=steps)
        adapted = merged(setting.model, [(open_adapter(setting.work / kind, setting.model), 1.0)])
        reference = reference_logits(adapted, ids)
        print(
            f"{kind}: KL {trained['kl']:.3f} from the base; float base plus adapter: perplexity {perplexity(reference, ids):.3f}, "
            f"{mean_kl(base, reference):.3f} from the base by edgeq's reference",
            flush=True,
        )
        results[kind] = {"trained": trained}
        for mode in ("merge", "keep"):
            options: dict[str, Any] = {"adapter_mode": mode, "elastic": False}
            if mode == "keep" and kind == "dora":
                options["approx_rank"] = APPROX_RANK
            folder = export(setting, f"{kind}-{mode}-{setting.quant}", adapter=setting.work / kind, **options)
            found = measure(setting, folder, reference, kind if mode == "keep" else None)
            note = ""
            if mode == "keep" and kind != "dora":
                most = YARDSTICK * alone["kl"]
                note = judge.check(f"{kind}, kept: KL {found['kl']:.4f}, at most {most:.4f}", ok=found["kl"] <= most)
            results[kind][mode] = found
            print(f"  {mode:<6}{_row(found)}{note}", flush=True)
    return results


def _row(found: dict[str, float]) -> str:
    text = (
        f"KL {found['kl']:.4f}, perplexity {found['perplexity']:.3f}, prefill {found['prefill_tok_s']:.1f} tok/s, "
        f"decode {found['decode_tok_s']:.1f} tok/s, {found['bytes']:,} bytes"
    )
    if "switch_ms" in found:
        text += f", switch {found['switch_ms']:.1f} ms, first use {found['first_use_ms']:.1f} ms"
    return text


def checkpoints_table(setting: Setting, judge: Judge) -> dict[str, Any]:
    """Each checkpoint in the carrier's format that is nearest to its own."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
    from tiny_quantized import awq, bnb4, gptq, quantize

    results: dict[str, Any] = {}
    print("\nquantized checkpoints", flush=True)
    for name, method, quant in (("nf4", bnb4(nested=True), "Q4_0"), ("gptq", gptq(4, 32), "Q4_0"), ("awq", awq(32), "Q4_1")):
        folder = setting.work / f"checkpoint-{name}"
        if not (folder / "done").is_file():
            write_folder(setting.model, folder)
            quantize(folder, method)
            (folder / "done").touch()
        package = read_package(export(setting, f"{name}-{quant}", model=folder, quant=quant, elastic=False))
        gate, regrid = package.manifest["gate"], package.manifest["regrid"]
        lost = regrid.get("total", {"relative": 0.0})["relative"]
        results[name] = {"quant": quant, "gate": gate, "regrid": regrid}
        note = judge.check(f"{name}: the gate did not pass", ok=gate["passed"])
        kinds = ", ".join(f"{kind} {error['relative']:.2e}" for kind, error in regrid.items() if kind != "total") or "none"
        print(
            f"  {name:<5} to {quant}: gate KL {gate['kl_mean']:.4f}, top-1 {gate['top1_agreement']:.2%}; rounding on top lost {lost:.2e} "
            f"of the squared values ({kinds}){note}",
            flush=True,
        )
    return results


def write_folder(model: Model, folder: Path) -> None:
    """The model as a Hugging Face folder in float32."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    hf = transformers_model(model)
    hf.config.architectures = ["LlamaForCausalLM"]
    hf.config.dtype = "float32"
    hf.config.save_pretrained(folder)
    state = {name: value.contiguous() for name, value in hf.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    vocabulary = model.tokenizer.vocabulary
    library: Any = model.tokenizer
    tokenizer = json.loads(library._library.to_str())
    # edgeq's own step for bytes that the vocabulary lacks, which llama.cpp drops; no checkpoint has such a step
    steps = tokenizer["pre_tokenizer"]["pretokenizers"]
    tokenizer["pre_tokenizer"]["pretokenizers"] = [step for step in steps if step.get("behavior") != "Removed"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    names = {f"{role}_token": vocabulary.tokens[i] for role, i in vocabulary.special_ids.items() if role in ("bos", "eos", "unk", "pad")}
    config = {"tokenizer_class": "GPT2Tokenizer", "chat_template": vocabulary.chat_template, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def cuts_table(setting: Setting, judge: Judge, steps: int) -> dict[str, Any]:
    from edgeq.runtime.elastic_package import open_elastic

    train(setting.model, "lora", setting.work / "lora", setting.text, steps=steps)
    options = {"adapter": setting.work / "lora", "quant": "F16", "elastic": True}
    kept = export(setting, "lora-keep-elastic", adapter_mode="keep", **options)
    whole = export(setting, "lora-merge-elastic", adapter_mode="merge", **options)
    opened = open_elastic(kept)
    results: dict[str, Any] = {}
    print("\ncuts of an elastic package in F16, the LoRA kept", flush=True)
    for rate in RATES:
        reference = reference_logits(cut_of_merged(opened, rate), setting.held_out)
        with edgeq.load(kept, rate=rate, adapter="lora") as session:
            ours = session_logits(session, setting.held_out)
            session.set_adapter(None)
            without = session_logits(session, setting.held_out)
        with edgeq.load(whole, rate=rate) as session:
            theirs = session_logits(session, setting.held_out)
        found = {
            "kl": mean_kl(reference, ours),
            "max_difference": max(float(np.abs(a - b).max()) for a, b in zip(reference, ours, strict=True)),
            "kl_without_adapter": mean_kl(reference, without),
            "perplexity_kept": perplexity(ours, setting.held_out),
            "perplexity_merged": perplexity(theirs, setting.held_out),
        }
        results[f"{rate:g}"] = found
        note = judge.check(f"cut at {rate:g}: KL {found['kl']:.4f}, at most {CUT_KL}", ok=found["kl"] <= CUT_KL)
        print(
            f"  rate {rate:.2f}: KL {found['kl']:.5f} and {found['max_difference']:.3f} at most from the cut of the merged float model "
            f"(without the adapter {found['kl_without_adapter']:.3f}); perplexity {found['perplexity_kept']:.3f}, merged before sorting "
            f"{found['perplexity_merged']:.3f}{note}",
            flush=True,
        )
    return results


def cut_of_merged(opened: Any, rate: float) -> Model:
    """The package's model in its sorted order with the kept adapter merged in float, cut and compensated in float."""
    base = read_gguf_model(opened.path)
    record = opened.package.manifest["adapters"][0]
    whole = merged(base, [(open_adapter(opened.package.folder / record["path"], base), 1.0)])
    kept, hidden = opened.at_rate(rate).kept, opened.elastic.hidden
    spec, tensors = cut_ports(whole.spec, whole.tensors, kept)
    for layer, known in hidden.items():
        name, n_ff = f"layers.{layer}.down.weight", kept.n_ff[layer]
        if n_ff and n_ff < len(known.mean):
            columns, bias = compensate(whole.tensors[name].decode(), known, n_ff)
            tensors |= {name: from_values(columns, origin=name), f"layers.{layer}.down.bias": from_values(bias, origin=name)}
            spec = replace(spec, biases=spec.biases | {"down"})
    if "down" in spec.biases:
        for block in spec.mlps:
            zeros = from_values(np.zeros(spec.n_embd), origin="no bias")
            tensors.setdefault(f"layers.{block.layer}.down.bias", zeros)
    return replace(whole, spec=spec, tensors=tensors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of adapters, checkpoints and packages")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, help="a text to learn instead of the log")
    parser.add_argument("--quant", default="Q4_0")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--windows", type=int, default=4, help="of held-out text, 128 tokens each")
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    chosen = arguments.tables.split(",")
    if wrong := sorted(set(chosen) - set(TABLES)):
        parser.error(f"unknown table {wrong[0]!r}; known: {', '.join(TABLES)}")
    judge, results = Judge(), {}
    try:
        arguments.work.mkdir(parents=True, exist_ok=True)
        model, text = open_model(arguments.model), texts(arguments.text)
        held_out = windows(model, text.held_out, arguments.windows)
        setting = Setting(model_ref=arguments.model, model=model, work=arguments.work, text=text, held_out=held_out, quant=arguments.quant)
        if "adapters" in chosen:
            results["adapters"] = adapters_table(setting, judge, arguments.steps)
        if "checkpoints" in chosen:
            results["checkpoints"] = checkpoints_table(setting, judge)
        if "cuts" in chosen:
            results["cuts"] = cuts_table(setting, judge, arguments.steps)
    except EdgeqError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({**results, "missed": judge.missed}, indent=1) + "\n", encoding="utf-8")
    for line in judge.missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if judge.missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
