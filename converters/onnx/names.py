"""What initializers and nodes of a decoder graph are called, and back.

An initializer is called after the module that has the tensor in transformers, with what its operator makes of it behind that; a node after
the place of that module, as onnxruntime-genai's builder does. Joined matrices (`families.FUSED`) are modules of their own.

    canonical           initializers                                                      nodes
    layers.3.wq         model.layers.3.self_attn.q_proj.MatMul.weight, .Add.bias, ..      /model/layers.3/attn/q_proj/MatMul, ..
    layers.3.gate_up    model.layers.3.mlp.gate_up_proj.MatMulNBits.qweight, .scales, ..  /model/layers.3/mlp/gate_up_proj/MatMulNBits, ..
    embed               model.embed_tokens.weight, ..                                     /model/embed_tokens/Gather
    head                lm_head.MatMul.weight, ..                                         /lm_head/MatMul
"""

from __future__ import annotations

import re

from edgeq.families import FUSED, Family

_JOINED = {"wqkv": "layers.{i}.self_attn.qkv_proj", "gate_up": "layers.{i}.mlp.gate_up_proj"}
_OUTSIDE = ("embed", "final_norm")
_HEAD = "lm_head"
_NUMBERED = re.compile(r"layers\.(\d+)\.(.+)")


def module_name(row: Family, canonical: str) -> str:
    """Of a module by its canonical name ("layers.3.wq", "layers.3.wqkv", "embed", "head"), in a family that has it."""
    if canonical == "head":
        return _HEAD
    if (numbered := _NUMBERED.fullmatch(canonical)) is not None:
        name = _JOINED.get(numbered[2]) or row.hf_name(numbered[2])
        return "model." + name.format(i=numbered[1])
    return "model." + row.hf_name(canonical)


def canonical_name(row: Family, initializer: str) -> tuple[str, str] | None:
    """The canonical name of the module that an initializer belongs to, and what follows the module's name in the initializer's.

    None for those that belong to none: rotary tables and constants.
    """
    for module, canonical in _modules(row, initializer):
        if initializer.startswith(f"{module}."):
            return canonical, initializer.removeprefix(f"{module}.")
    return None


def place(module: str) -> str:
    """The path of a module's nodes, by its `module_name`."""
    return "/" + re.sub(r"\.(?!\d)", "/", module).replace("/self_attn/", "/attn/")


def _modules(row: Family, initializer: str) -> list[tuple[str, str]]:
    """Names, and canonical names, of modules that an initializer may belong to."""
    names = ["head", *_OUTSIDE]
    if (numbered := re.match(r"model\.layers\.(\d+)\.", initializer)) is not None:
        names = [f"layers.{numbered[1]}.{role}" for role in (*row.roles, *FUSED)]
    return [(module_name(row, name), name) for name in names]
