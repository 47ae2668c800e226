"""Names of initializers and places of nodes. Tensors of whole models lead back in test_onnx_decoder."""

from __future__ import annotations

import pytest

from edgeq.converters.onnx.names import canonical_name, module_name, place
from edgeq.families import FAMILIES, FUSED, Family, family

LLAMA, GEMMA = family("llama"), family("gemma3")


@pytest.mark.parametrize(
    ("row", "canonical", "module", "path"),
    [
        (LLAMA, "layers.3.wq", "model.layers.3.self_attn.q_proj", "/model/layers.3/attn/q_proj"),
        (LLAMA, "layers.12.down", "model.layers.12.mlp.down_proj", "/model/layers.12/mlp/down_proj"),
        (LLAMA, "layers.0.mlp_norm", "model.layers.0.post_attention_layernorm", "/model/layers.0/post_attention_layernorm"),
        (GEMMA, "layers.0.mlp_norm", "model.layers.0.pre_feedforward_layernorm", "/model/layers.0/pre_feedforward_layernorm"),
        (GEMMA, "layers.0.q_norm", "model.layers.0.self_attn.q_norm", "/model/layers.0/attn/q_norm"),
        (LLAMA, "layers.3.wqkv", "model.layers.3.self_attn.qkv_proj", "/model/layers.3/attn/qkv_proj"),
        (family("phi3"), "layers.3.gate_up", "model.layers.3.mlp.gate_up_proj", "/model/layers.3/mlp/gate_up_proj"),
        (LLAMA, "embed", "model.embed_tokens", "/model/embed_tokens"),
        (LLAMA, "final_norm", "model.norm", "/model/norm"),
        (LLAMA, "head", "lm_head", "/lm_head"),
    ],
)
def test_modules_have_the_names_of_transformers_and_the_places_of_genai(row: Family, canonical: str, module: str, path: str) -> None:
    assert module_name(row, canonical) == module and place(module) == path


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.name)
def test_every_module_leads_back(row: Family) -> None:
    modules = ["embed", "final_norm", "head", *(f"layers.{i}.{role}" for i in (0, 1, 11) for role in (*row.roles, *FUSED))]
    assert len({module_name(row, name) for name in modules}) == len(modules)
    for name in modules:
        for part in ("weight", "MatMul.weight", "MatMulNBits.qweight", "MatMulNBits.scales", "Add.bias"):
            assert canonical_name(row, f"{module_name(row, name)}.{part}") == (name, part)


@pytest.mark.parametrize("name", ["cos_cache", "/model/constants/int/1", "model.layers.3.mlp.other.weight", "model.layersx", "lm_headx.w"])
def test_other_initializers_belong_to_no_module(name: str) -> None:
    assert canonical_name(LLAMA, name) is None
