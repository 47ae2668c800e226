"""The format of a device profile, key by key: where a key stands, its type, what is wrong with a value, what it means.

`docs/profiles.md` contains `key_table()`; a test keeps it so. Rules between keys are with the reader, in `edgeq.profiles`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgeq.grids import GRIDS, Grid

X86_ISA = ("avx2", "avx512", "avx512_vnni")
ARM_ISA = ("neon", "dotprod", "i8mm")
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
# What `--quant` takes: block types that can be encoded, and llama-quantize's mixes of them.
QUANT_NAMES = (
    *("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_K", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_K", "Q4_1", "Q4_0"),
    *("IQ4_NL", "IQ4_XS", "MXFP4", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q3_K", "Q2_K"),
)


def base_grid(quant: str) -> Grid:
    """The grid that most block matrices get under a quant name: Q4_K for "Q4_K_M"."""
    return GRIDS[re.sub("_[SML]$", "", quant)]


@dataclass(frozen=True)
class Key:
    """One key of the format. section: "" for the top. check(value) returns what is wrong with a value, or None. kind: type in words."""

    section: str
    name: str
    kind: str
    check: Callable[[Any], str | None]
    meaning: str
    required: bool = True

    @property
    def path(self) -> str:
        return f"{self.section}.{self.name}" if self.section else self.name


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else "expected a text"


def _name(value: Any) -> str | None:
    fine = isinstance(value, str) and re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", value)
    return None if fine else "expected lower-case words, digits and hyphens, as in my-laptop"


def _count(value: Any) -> str | None:
    return None if type(value) is int and value > 0 else "expected a whole number of at least 1"


def _number(value: Any) -> str | None:
    return None if type(value) in (int, float) and 0 < value < float("inf") else "expected a number above 0"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "expected true or false"


def _layers(value: Any) -> str | None:
    return None if value == "all" or (type(value) is int and value >= 0) else 'expected "all" or a whole number of at least 0'


def _one_of(*choices: str) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        return None if isinstance(value, str) and value in choices else f"expected one of {', '.join(choices)}"

    return check


def _list_of(*choices: str) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            return "expected a list of texts"
        for v in value:
            if v not in choices:
                near = difflib.get_close_matches(v.upper() if choices[0].isupper() else v.lower(), choices, 1)
                return f"{v!r} is not known{f'; did you mean {near[0]}?' if near else '.'} Known: {', '.join(choices)}"
            if value.count(v) > 1:
                return f"{v!r} stands there twice"
        return None

    return check


KEYS = (
    Key("", "name", "text", _name, "What the profile is called: lower-case words and hyphens. A shipped file is named after it."),
    Key("", "description", "text", _text, "One line for people."),
    Key("cpu", "cores", "whole number", _count, "Physical cores."),
    Key("cpu", "threads", "whole number", _count, "Hardware threads, at least as many as cores."),
    Key(
        "cpu",
        "isa",
        "list",
        _list_of(*X86_ISA, *ARM_ISA),
        "Instruction sets that decide which weights llama.cpp rearranges for speed: avx2, avx512, avx512_vnni or neon, dotprod, i8mm.",
    ),
    Key("cpu", "mem_bandwidth_gb_s", "number", _number, "Peak bandwidth of the RAM in GB/s (10^9 bytes): bounds tokens per second."),
    Key("memory", "ram_mib", "whole number", _count, "RAM as the operating system counts it, in MiB."),
    Key(
        "memory",
        "budget_mib",
        "whole number",
        _count,
        "What a model with its cache and the runtime may use of the memory it lives in: VRAM of a discrete accelerator, else RAM.",
    ),
    Key(
        "accelerator",
        "kind",
        "cuda, metal, vulkan or none",
        _one_of("cuda", "metal", "vulkan", "none"),
        "Programming interface; none is the same as no section.",
    ),
    Key("accelerator", "name", "text", _text, "Product name. Required unless kind is none.", False),
    Key(
        "accelerator",
        "vram_mib",
        "whole number",
        _count,
        "Memory of its own, in MiB. Required for a discrete accelerator, absent for a unified one.",
        False,
    ),
    Key(
        "accelerator", "mem_bandwidth_gb_s", "number", _number, "Peak bandwidth of its memory in GB/s. Required unless kind is none.", False
    ),
    Key("accelerator", "unified", "true or false", _flag, "Whether it shares the RAM. Required unless kind is none.", False),
    Key(
        "runtime",
        "name",
        "llama.cpp or onnxruntime",
        _one_of("llama.cpp", "onnxruntime"),
        "The runtime that packages are made for, unless the command says otherwise: GGUF for the one, ONNX for the other.",
    ),
    Key("runtime", "device", "cpu, cuda or metal", _one_of("cpu", "cuda", "metal"), "Where it computes."),
    Key(
        "runtime",
        "gpu_layers",
        '"all" or whole number',
        _layers,
        "Layers on the accelerator, the last ones first, the head counted as one more. Required unless device is cpu.",
        False,
    ),
    Key(
        "export",
        "grids",
        "list",
        _list_of(*QUANT_NAMES),
        "Number formats that `--quant auto` tries, from best quality to smallest; bits per weight must not rise along the list.",
    ),
    Key(
        "export",
        "adapters",
        "merge, keep or auto",
        _one_of("merge", "keep", "auto"),
        "What becomes of adapters unless the command says otherwise.",
    ),
    Key("export", "n_ctx", "whole number", _count, "Context in tokens that memory is planned for."),
    Key("export", "kv_type", "text", _one_of(*KV_TYPES), f"Number format of the key-value cache: {', '.join(KV_TYPES)}."),
    Key("targets", "model", "text", _text, "The class of models and the prompt that the targets are for.", False),
    Key("targets", "ttft_ms", "number", _number, "Time to the first token, in milliseconds.", False),
    Key("targets", "decode_tok_s", "number", _number, "Tokens per second after the first.", False),
)


def key_table() -> str:
    """The format as a Markdown table, for `docs/profiles.md`."""
    lines = ["| key | value | meaning |", "| --- | --- | --- |"]
    for key in KEYS:
        kind = key.kind if key.required else f"{key.kind}, optional"
        lines.append(f"| `{key.path}` | {kind} | {key.meaning} |")
    return "\n".join(lines) + "\n"
