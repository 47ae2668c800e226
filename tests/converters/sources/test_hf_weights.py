"""Weights of Hugging Face folders: every tensor against the transformers state dict, and every folder that must be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY_FAMILIES, edit_json, hf_folder, hf_model

from edgeq.converters.sources.hf_weights import read_hf_weights
from edgeq.errors import SourceError, UnsupportedError
from edgeq.families import family
from edgeq.grids import BF16, F16, F32
from edgeq.reference import Reference
from edgeq.spec import Attention
from edgeq.tensors import LazyTensor


def canonical_state(name: str, state: dict[str, torch.Tensor], spec: Any) -> dict[str, np.ndarray]:
    """A transformers state dict in canonical names, written down a second time and by hand."""
    names = {
        "model.embed_tokens": "embed",
        "model.norm": "final_norm",
        "lm_head": "head",
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "wq",
        "self_attn.k_proj": "wk",
        "self_attn.v_proj": "wv",
        "self_attn.o_proj": "wo",
        "self_attn.q_norm": "q_norm",
        "self_attn.k_norm": "k_norm",
        "post_attention_layernorm": "post_attn_norm" if name == "gemma3" else "mlp_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "post_mlp_norm",
        "mlp.gate_proj": "gate",
        "mlp.up_proj": "up",
        "mlp.down_proj": "down",
    }
    out: dict[str, np.ndarray] = {}
    for key, tensor in state.items():
        values = tensor.float().numpy()
        module, kind = key.rsplit(".", 1)
        layer = ""
        if module.startswith("model.layers."):
            _, _, i, module = module.split(".", 3)
            layer = f"layers.{i}."
        if module == "self_attn.qkv_proj":
            q, k = 4 * 24, 2 * 24
            parts = {"wq": values[:q], "wk": values[q : q + k], "wv": values[q + k :]}
        elif module == "mlp.gate_up_proj":
            parts = {"gate": values[:160], "up": values[160:]}
        elif name == "gemma3" and module.endswith("norm"):
            parts = {names[module]: 1.0 + values}
        else:
            parts = {names[module]: values}
        out |= {f"{layer}{role}.{kind}": part for role, part in parts.items()}
    if spec.tied:
        out.pop("head.weight", None)
    return out


def assert_tensors_equal(tensors: Any, expected: dict[str, np.ndarray]) -> None:
    assert set(tensors) == set(expected)
    for name, values in expected.items():
        assert tensors[name].shape == values.shape, name
        np.testing.assert_array_equal(tensors[name].decode(), values, err_msg=name)


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_tensors_equal_the_state_dict(tmp_path: Path, name: str) -> None:
    folder = hf_folder(tmp_path / name, name)
    weights = read_hf_weights(folder)
    assert_tensors_equal(weights.tensors, canonical_state(name, hf_model(folder).state_dict(), weights.spec))
    assert weights.files == (folder / "config.json", folder / "model.safetensors")


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_spec_and_tensors_compute_what_transformers_computes(tmp_path: Path, name: str) -> None:
    """Logits of order 1 agree to float32 rounding; 80 tokens reach past every window and past LongRoPE's switch at 64."""
    folder = hf_folder(tmp_path / name, name, dtype="bfloat16", shards=2)
    ids = np.random.default_rng(5).integers(3, 320, size=80)
    with torch.no_grad():
        expected = hf_model(folder)(torch.from_numpy(ids)[None]).logits[0]
    weights = read_hf_weights(folder)
    reference = Reference(weights.spec, weights.tensors)
    logits = reference.logits(reference.hidden([ids.tolist()])[0])
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen3", {"attention_bias": True}), ("gemma3", {"attention_bias": True})],
)
def test_biases(tmp_path: Path, name: str, overrides: dict[str, Any]) -> None:
    folder = hf_folder(tmp_path / name, name, **overrides)
    weights = read_hf_weights(folder)
    expected = canonical_state(name, hf_model(folder).state_dict(), weights.spec)
    assert sum(key.endswith(".bias") for key in expected) == len(weights.spec.biases) * weights.spec.n_layers
    assert_tensors_equal(weights.tensors, expected)


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3"])
def test_sharded_equals_unsharded(tmp_path: Path, name: str) -> None:
    whole, sharded = hf_folder(tmp_path / "one", name), hf_folder(tmp_path / "three", name, shards=3)
    expected = {key: tensor.decode() for key, tensor in read_hf_weights(whole).tensors.items()}
    weights = read_hf_weights(sharded)
    assert_tensors_equal(weights.tensors, expected)
    assert [path.name for path in weights.files] == [
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]


@pytest.mark.parametrize(("dtype", "grid"), [("float32", F32), ("bfloat16", BF16), ("float16", F16)])
def test_weights_keep_their_grid(tmp_path: Path, dtype: Literal["float32", "bfloat16", "float16"], grid: Any) -> None:
    folder = hf_folder(tmp_path / "m", "phi3", dtype=dtype)
    weights = read_hf_weights(folder)
    assert {tensor.grid.name for tensor in weights.tensors.values()} == {grid.name}
    assert_tensors_equal(weights.tensors, canonical_state("phi3", load_file(folder / "model.safetensors"), weights.spec))


def test_tensors_come_in_network_order(tmp_path: Path) -> None:
    names = list(read_hf_weights(hf_folder(tmp_path / "m", "qwen2")).tensors)
    assert (names[0], names[-2], names[-1]) == ("embed.weight", "final_norm.weight", "head.weight")
    layers = [int(name.split(".")[1]) for name in names if name.startswith("layers.")]
    assert layers == sorted(layers)


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    """Opening a folder must not depend on weights: here they are a hole in a sparse file."""
    folder = hf_folder(tmp_path / "m", "llama", hidden_size=1024, vocab_size=320)
    file = folder / "model.safetensors"
    size = file.stat().st_size
    head = file.read_bytes()[: 8 + int.from_bytes(file.read_bytes()[:8], "little")]
    with file.open("wb") as out:
        out.write(head)
        out.truncate(size)
    tensors = read_hf_weights(folder).tensors
    assert not tensors["layers.1.down.weight"].decode(0, 1).any()


def test_pickle_equals_safetensors(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "qwen2-tied", dtype="bfloat16")
    expected = {key: tensor.decode() for key, tensor in read_hf_weights(folder).tensors.items()}
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, folder / "pytorch_model.bin")
    torch.save({"step": 3}, folder / "optimizer.pt")
    assert_tensors_equal(read_hf_weights(folder).tensors, expected)
    (folder / "pytorch_model.bin").rename(folder / "anything.pt")
    assert_tensors_equal(read_hf_weights(folder).tensors, expected)


def test_sharded_pickle(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "llama")
    expected = {key: tensor.decode() for key, tensor in read_hf_weights(folder).tensors.items()}
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {key: f"pytorch_model-0000{1 + (i > 9)}-of-00002.bin" for i, key in enumerate(state)}
    for shard in set(weight_map.values()):
        torch.save({key: state[key] for key in state if weight_map[key] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_tensors_equal(read_hf_weights(folder).tensors, expected)


def test_safetensors_win_over_pickles(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "llama")
    (folder / "pytorch_model.bin").write_bytes(b"not a checkpoint")
    assert folder / "model.safetensors" in read_hf_weights(folder).files


@pytest.mark.parametrize("layout", ["model.language_model.", "language_model.model."])
def test_text_part_of_a_multimodal_checkpoint(tmp_path: Path, layout: str) -> None:
    text = hf_folder(tmp_path / "text", "gemma3")
    expected = {key: tensor.decode() for key, tensor in read_hf_weights(text).tensors.items()}
    state = {key.replace("model.", layout, 1): value for key, value in load_file(text / "model.safetensors").items()}
    vision = "model.vision_tower." if layout.startswith("model.") else "vision_tower."
    state[f"{vision}vision_model.embeddings.patch_embedding.weight"] = torch.ones(2, 3, 4, 4)
    state[f"{vision.replace('vision_tower', 'multi_modal_projector')}mm_input_projection_weight"] = torch.ones(2, 3)
    whole = tmp_path / "whole"
    whole.mkdir()
    save_file(state, whole / "model.safetensors")
    inner = json.loads((text / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": inner}))
    assert_tensors_equal(read_hf_weights(whole).tensors, expected)


# --- what a checkpoint may hold besides, and what it may not


def restate(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file({key: value.clone().contiguous() for key, value in state.items()}, folder / "model.safetensors")


def test_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "llama")
    names = set(read_hf_weights(folder).tensors)
    restate(
        folder,
        lambda s: s.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(12), "model.rotary_emb.inv_freq": torch.ones(12)}),
    )
    assert set(read_hf_weights(folder).tensors) == names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_may_be_stored_again(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = hf_folder(tmp_path / "m", "qwen2-tied", dtype="bfloat16")
    restate(folder, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].to(dtype)}))
    assert "head.weight" not in read_hf_weights(folder).tensors


def test_a_tied_head_that_differs(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "qwen2-tied")
    restate(folder, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"] + 1e-3}))
    with pytest.raises(
        SourceError, match=r"lm_head.weight differs from model.embed_tokens.weight, but .*config.json says tie_word_embeddings: true"
    ):
        read_hf_weights(folder)
    restate(folder, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"][:10]}))
    with pytest.raises(SourceError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        read_hf_weights(folder)


Edit = Callable[[dict[str, torch.Tensor]], Any]
_DOWN = "model.layers.1.mlp.down_proj.weight"
_ASKED = r"but config.json asks for \[64, 160\]"


def add(*names: str) -> Edit:
    return lambda state: state.update({name: torch.ones(64) for name in names})


def drop(name: str) -> Edit:
    return lambda state: state.pop(name)


def down(change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return lambda state: state.update({_DOWN: change(state[_DOWN])})


REFUSED: list[tuple[Edit, type[Exception], str]] = [
    (add("model.router.weight"), UnsupportedError, "model.safetensors: model.router.weight has no place in a llama model of 2 layers"),
    (add("a", "b"), UnsupportedError, r"model.safetensors: a \(and 1 more\) has no place"),
    (add("model.layers.2.input_layernorm.weight"), UnsupportedError, "layers.2.input_layernorm.weight has no place in a llama model"),
    (add("model.layers.0.self_attn.q_proj.bias"), UnsupportedError, "model.layers.0.self_attn.q_proj.bias has no place"),
    (drop(_DOWN), SourceError, f"tensor {_DOWN} is missing. Download the model's folder again"),
    (drop("lm_head.weight"), SourceError, "tensor lm_head.weight is missing.*config.json must say tie_word_embeddings: true"),
    (down(lambda w: w.T), SourceError, rf"model.safetensors: {_DOWN} has shape \[160, 64\], {_ASKED}"),
    (down(lambda w: w[None]), SourceError, rf"has shape \[1, 64, 160\], {_ASKED}"),
    (down(lambda w: w.double()), UnsupportedError, f"model.safetensors: {_DOWN} is stored as F64; supported: F32, F16, BF16. Save"),
    (down(lambda w: w.to(torch.int8)), UnsupportedError, f"{_DOWN} is stored as I8"),
    (down(lambda w: w.to(torch.float8_e4m3fn)), UnsupportedError, f"{_DOWN} is stored as F8_E4M3"),
]


@pytest.mark.parametrize(("edit", "error", "message"), REFUSED)
def test_refused_tensors(tmp_path: Path, edit: Edit, error: type[Exception], message: str) -> None:
    folder = hf_folder(tmp_path / "m", "llama")
    restate(folder, edit)
    with pytest.raises(error, match=message):
        read_hf_weights(folder)


def test_shapes_that_contradict_the_config(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "phi3")
    edit_json(folder / "config.json", lambda c: c.update(num_key_value_heads=4))
    with pytest.raises(SourceError, match=r"self_attn.qkv_proj.weight has shape \[192, 96\], but config.json asks for \[288, 96\]"):
        read_hf_weights(folder)


# --- files that are not there, or do not belong together


def sharded(tmp_path: Path) -> Path:
    return hf_folder(tmp_path / "m", "llama", shards=3)


def test_missing_shard(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(SourceError, match=r"names 1 of 3 files that are missing: model-00002-of-00003.safetensors. Download them"):
        read_hf_weights(folder)


def test_truncated_shard(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    shard = folder / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(SourceError, match=r"model-00003-of-00003.safetensors is cut short"):
        read_hf_weights(folder)


def test_index_that_names_another_file(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    index = folder / "model.safetensors.index.json"
    edit_json(index, lambda v: v["weight_map"].update({"lm_head.weight": "model-00003-of-00003.safetensors"}))
    with pytest.raises(SourceError, match=r"places lm_head.weight in model-00003-of-00003.safetensors, which does not have it"):
        read_hf_weights(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "", 3])
def test_index_that_leads_out_of_the_folder(tmp_path: Path, name: Any) -> None:
    folder = sharded(tmp_path)
    index = folder / "model.safetensors.index.json"
    edit_json(index, lambda v: v["weight_map"].update({"lm_head.weight": name}))
    with pytest.raises(SourceError, match=r"weight_map must name a file of this folder for every tensor"):
        read_hf_weights(folder)


@pytest.mark.parametrize("value", [{}, [], {"weight_map": {}}, {"weight_map": 3}])
def test_index_without_a_map(tmp_path: Path, value: Any) -> None:
    folder = sharded(tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps(value))
    with pytest.raises(SourceError, match=r"model.safetensors.index.json: (weight_map must name|expected a JSON object)"):
        read_hf_weights(folder)


def test_a_tensor_in_two_shards_that_the_index_leaves_open(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    for shard in ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"):
        save_file({**load_file(folder / shard), "twice": torch.ones(2)}, folder / shard)
    with pytest.raises(SourceError, match=r"twice is in model-00001-of-00003.safetensors and in model-00002-of-00003.safetensors"):
        read_hf_weights(folder)


def test_shards_without_an_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(SourceError, match=r"has model-00001-of-00003.safetensors, .*but neither model.safetensors nor .*index.json"):
        read_hf_weights(folder)


def test_no_weights(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"has a config.json but no weights. Download model.safetensors"):
        read_hf_weights(folder)
    for name in ("a.pt", "b.pt"):
        (folder / name).write_bytes(b"")
    with pytest.raises(SourceError, match=r"has several .pt files \(a.pt, b.pt\). Keep the one that is the model"):
        read_hf_weights(folder)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no config.json, so it is not a model folder in Hugging Face layout"):
        read_hf_weights(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(SourceError, match=r"is an edgeq package, not a model to export"):
        read_hf_weights(tmp_path)
    (tmp_path / "m.Q4_0.gguf").write_bytes(b"")
    with pytest.raises(SourceError, match=r"has no config.json, but GGUF files: pass one of them as MODEL \(m.Q4_0.gguf\)"):
        read_hf_weights(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"holds an adapter, not a model. Pass the model it was trained on as MODEL"):
        read_hf_weights(tmp_path)


def test_quantized_checkpoint_is_refused_before_its_tensors(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "llama")
    edit_json(folder / "config.json", lambda c: c.update(quantization_config={"quant_method": "higgs", "bits": 4}))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedError, match=r"quantization_config has quant_method 'higgs'; supported: awq"):
        read_hf_weights(folder)


def test_canonical_names_are_those_of_the_roles(tmp_path: Path) -> None:
    for name in TINY_FAMILIES:
        weights = read_hf_weights(hf_folder(tmp_path / name, name))
        spec = weights.spec
        roles = family(spec.family).roles
        layers = {f"layers.{i}.{role}.weight" for i in range(spec.n_layers) for role in roles}
        assert {key for key in weights.tensors if key.startswith("layers.") and key.endswith(".weight")} == layers
        for block in spec.blocks:
            tensor: LazyTensor = weights.tensors[f"layers.{block.layer}.{'wo' if isinstance(block, Attention) else 'down'}.weight"]
            assert tensor.n_rows == spec.n_embd
