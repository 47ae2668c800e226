"""Adapters trained for real on a small model: a LoRA, an rsLoRA of rank 64 and a DoRA that have learnt to write a lighthouse keeper's log.

    python benchmarks/train_adapters.py --work DIR [--model demo] [--text FILE] [--steps 40] [--kinds lora,rslora,dora]

transformers runs the model in float32 with the values that edgeq decodes, PEFT adapts every projection and saves the adapter in DIR/<kind>.
The text is made up from fixed phrases and a seed, or the first nine tenths of a text file; adapters are used again by a later run with
the same settings, which DIR/<kind>/training.json holds. Exit status 1 when an adapter has not moved the model: mean KL of the adapted
model from the base on text that training did not see, at least 0.1 nats a token.

Needs edgeq[export], peft and transformers. On one core of 2023 an adapter takes about five minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.converters.adapters.sites import model_sites
from edgeq.converters.sources.resolve import open_model
from edgeq.errors import EdgeqError, UnsupportedError, UsageError
from edgeq.model import Model

WINDOW = 128  # tokens
BATCH = 2  # windows per step
HELD_OUT = 4  # windows
MOVED = 0.1  # mean KL in nats from which an adapter counts as having learnt something
SETTINGS = "training.json"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """options: of PEFT's LoraConfig. rate: AdamW's learning rate at the start; it falls to a tenth along a cosine."""

    options: Mapping[str, Any]
    rate: float


KINDS = {
    "lora": Kind(options={"r": 16, "lora_alpha": 32}, rate=1e-3),
    # alpha / sqrt r is 2 here; read as alpha / r the adapter would come out eight times too weak
    "rslora": Kind(options={"r": 64, "lora_alpha": 16, "use_rslora": True}, rate=3e-4),
    "dora": Kind(options={"r": 16, "lora_alpha": 32, "use_dora": True}, rate=1e-3),
}


def log_book(entries: int, seed: int) -> str:
    """Entries of a log whose every line has the same shape: a narrow style that a few minutes teach."""
    pick = random.Random(seed)
    winds = ("north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west")
    seas = ("Sea slight.", "Sea moderate, breaking on the bar.", "Sea rough; spray over the gallery rail.", "Sea like slate.")
    ships = ("collier", "drifter", "pilot cutter", "grain barque", "mail packet", "tug with two lighters")
    ways = ("inbound", "outbound", "hove to beyond the bar", "steering wide of the reef")
    duties = ("Trimmed both wicks", "Wound the clockwork", "Wiped salt from the lower panes", "Carried four cans up", "Oiled the bearings")
    guests = (
        "The one-legged gull came for bread",
        "A wren slept in the oil store",
        "Moths thick on the glass",
        "A seal sang below the landing",
    )
    ends = ("Nothing further.", "So ends the watch.", "All is in order, and nobody asked.", "Barometer as before. I am as before.")
    lines = []
    for number in range(1, entries + 1):
        lit = f"{pick.randint(16, 20)}.{pick.randint(0, 59):02d}"
        wind = f"Wind {pick.choice(winds)}, force {pick.randint(1, 10)}."
        seen = f"One {pick.choice(ships)} {pick.choice(ways)}, answered our signal."
        oil = f"{pick.choice(duties)}; {pick.randint(9, 60)} gallons remain."
        lines.append(f"Watch {number}. Lamp lit {lit}. {wind} {pick.choice(seas)} {seen} {oil} {pick.choice(guests)}. {pick.choice(ends)}")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class Texts:
    """To learn from, and not seen while learning."""

    train: str
    held_out: str


def texts(file: Path | None, entries: int = 400) -> Texts:
    """Raises UsageError for a file that is no UTF-8 text."""
    if file is None:
        return Texts(train=log_book(entries, seed=1), held_out=log_book(40, seed=2))
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise UsageError(f"--text {file}: cannot be read as UTF-8 ({err})") from err
    at = content.rfind("\n", 0, len(content) * 9 // 10) + 1
    return Texts(train=content[:at], held_out=content[at:])


def windows(model: Model, text: str, count: int | None = None) -> list[list[int]]:
    """Whole windows of WINDOW tokens. Raises UsageError when there are fewer than asked for (or none)."""
    ids = model.tokenizer.encode(text)
    found = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
    if len(found) < (count or 1):
        raise UsageError(f"a text of {len(ids)} tokens has {len(found)} windows of {WINDOW}, {count or 1} are needed. Give a longer one.")
    return found if count is None else found[:count]


def transformers_model(model: Model) -> Any:
    """The model as transformers runs it, with the values that edgeq decodes. Raises UnsupportedError for other families than Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    spec = model.spec
    if spec.family != "llama" or not spec.tied:
        raise UnsupportedError(f"{model.name} is no Llama model with a shared embedding. Train on the demo model.")
    attention, mlp = spec.attention[0], spec.mlps[0]
    config = LlamaConfig(
        vocab_size=spec.n_vocab,
        hidden_size=spec.n_embd,
        intermediate_size=mlp.n_ff,
        num_hidden_layers=len(spec.attention),
        num_attention_heads=attention.n_heads,
        num_key_value_heads=attention.n_kv_heads,
        head_dim=attention.head_dim,
        max_position_embeddings=spec.n_ctx,
        rms_norm_eps=spec.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope.base},
        tie_word_embeddings=True,
        name_or_path=model.name,
    )
    hf = LlamaForCausalLM(config)
    with torch.no_grad():
        for path, site in model_sites(spec).items():
            names = [f"{stem}.weight" for stem, _ in site.pieces]
            if all(name in model.tensors for name in names):
                hf.get_submodule(path).weight.copy_(torch.from_numpy(np.concatenate([model.tensors[name].decode() for name in names])))
    return hf.eval()


def logits_of(hf: Any, ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """(n, n_vocab) for each window."""
    import torch

    with torch.no_grad():
        return [hf(torch.tensor([list(window)])).logits[0].float().numpy() for window in ids]


def mean_kl(reference: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """Mean over all positions of KL from the reference, in nats."""
    total = 0.0
    for one, two in zip(reference, other, strict=True):
        p, q = (x - x.max(axis=1, keepdims=True) for x in (one.astype(np.float64), two.astype(np.float64)))
        p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (p, q))
        total += float((np.exp(p) * (p - q)).sum())
    return total / sum(len(x) for x in reference)


def perplexity(logits: Sequence[np.ndarray], ids: Sequence[Sequence[int]]) -> float:
    total = 0.0
    for rows, window in zip(logits, ids, strict=True):
        x = rows[:-1].astype(np.float64)
        top = x.max(axis=1)
        chosen = x[np.arange(len(x)), list(window[1:])]
        total += float((top + np.log(np.exp(x - top[:, None]).sum(axis=1)) - chosen).sum())
    return math.exp(total / sum(len(window) - 1 for window in ids))


def train(model: Model, kind: str, folder: Path, text: Texts, *, steps: int, threads: int = 1) -> dict[str, float]:
    """Train an adapter and save it in `folder`, or use the one that is there; what it has done to the held-out text.

    Returns kl (of the adapted model from the base, mean over tokens), perplexity_base, perplexity_adapted, seconds (of training).
    """
    settings = {
        "kind": kind,
        "options": dict(KINDS[kind].options),
        "steps": steps,
        "batch": [BATCH, WINDOW],
        "rate": KINDS[kind].rate,
        "model": model.name,
        "text": hashlib.sha256(text.train.encode() + b"\0" + text.held_out.encode()).hexdigest(),
    }
    done = folder / SETTINGS
    if done.is_file():
        stored = json.loads(done.read_text(encoding="utf-8"))
        if stored["settings"] == settings:
            found: dict[str, float] = stored["results"]
            return found
    import torch
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    held_out = windows(model, text.held_out, HELD_OUT)
    base = transformers_model(model)
    before = logits_of(base, held_out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **KINDS[kind].options)
        adapted = get_peft_model(base, config)
    began = time.monotonic()
    _learn(adapted, windows(model, text.train), kind, steps)
    seconds = time.monotonic() - began
    adapted.eval()
    after = logits_of(adapted, held_out)
    results = {
        "kl": mean_kl(before, after),
        "perplexity_base": perplexity(before, held_out),
        "perplexity_adapted": perplexity(after, held_out),
        "seconds": seconds,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder)
    done.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n", encoding="utf-8")
    return results


def _learn(adapted: Any, data: list[list[int]], kind: str, steps: int) -> None:
    import torch

    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=KINDS[kind].rate, weight_decay=0.0)
    order = random.Random(0)
    adapted.train()
    for step in range(steps):
        part = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = KINDS[kind].rate * part * min(1.0, (step + 1) / 5)
        batch = torch.tensor(order.sample(data, min(BATCH, len(data))))
        loss = adapted(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9 or step == steps - 1:
            print(f"  {kind}: step {step + 1} of {steps}, loss {loss.item():.3f}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the adapters")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, help="a text to learn instead of the log")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(KINDS))
    arguments = parser.parse_args()
    wrong = sorted(set(arguments.kinds.split(",")) - set(KINDS))
    if wrong:
        parser.error(f"unknown kind {wrong[0]!r}; known: {', '.join(KINDS)}")
    lazy = False
    try:
        model, text = open_model(arguments.model), texts(arguments.text)
        for kind in arguments.kinds.split(","):
            found = train(model, kind, arguments.work / kind, text, steps=arguments.steps, threads=arguments.threads)
            lazy |= found["kl"] < MOVED
            print(
                f"{kind}: KL {found['kl']:.3f} from the base, perplexity {found['perplexity_base']:.2f} to "
                f"{found['perplexity_adapted']:.2f} on held-out text, trained in {found['seconds']:.0f} s"
                f"{'' if found['kl'] >= MOVED else f'  MISSED: below {MOVED}'}",
                flush=True,
            )
    except EdgeqError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    return 1 if lazy else 0


if __name__ == "__main__":
    raise SystemExit(main())
