"""Config options of PEFT adapters, against PEFT: its merge where that is right, base plus adapter where merging changes a shared weight."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft_oracle import TOLERANCE, Case, base_folder, base_logits, base_model, difference, hf_base, logits, logits_of, make

from edgeq.converters.adapters.peft import read_peft_folder
from edgeq.deltas.lora import LoRA
from edgeq.deltas.merge import merged
from edgeq.errors import UnsupportedError

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"], **options})


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "layers": ("llama", {"layers_to_transform": [1]}),
    "one layer": ("llama", {"layers_to_transform": 0, "layers_pattern": "layers"}),
    "regex": ("llama", {"target_modules": r".*layers\.1\.self_attn\.(q|v)_proj"}),
    "all-linear": ("qwen2", {"target_modules": "all-linear"}),
    "exclude names": ("llama", {"target_modules": ALL, "exclude_modules": ["layers.0.mlp.up_proj", "k_proj"]}),
    "exclude regex": ("llama", {"target_modules": ALL, "exclude_modules": r".*layers\.0\..*"}),
    "biases of all": ("qwen2", {"bias": "all"}),
    "biases of targets": ("qwen2", {"bias": "lora_only"}),
    "lora bias": ("qwen2", {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
    "saved head": ("llama", {"modules_to_save": ["lm_head"]}),
    "saved embedding": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "saved norms": ("llama", {"modules_to_save": ["input_layernorm", "model.norm"]}),
    "saved gemma norms": ("gemma3", {"modules_to_save": ["input_layernorm"]}),
    "saved fused projection": ("phi3", {"target_modules": ["o_proj"], "modules_to_save": ["qkv_proj"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding dora": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "head dora": ("llama", {"target_modules": ["lm_head"], "use_dora": True}),
    "scaled embedding": ("gemma3", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tokens": ("llama", {"trainable_token_indices": [5, 17, 230]}),
    "tokens by name": ("llama", {"trainable_token_indices": {"embed_tokens": [5, 17, 230]}}),
    "tied head": ("qwen2-tied", {"target_modules": ["lm_head", "q_proj"]}),
    "tied embedding": ("qwen2-tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied saved head": ("qwen2-tied", {"modules_to_save": ["lm_head"]}),
    "tied saved embedding": ("qwen2-tied", {"modules_to_save": ["embed_tokens"]}),
    "tied tokens": ("qwen2-tied", {"trainable_token_indices": [5, 17, 230]}),
    "tied on purpose": ("qwen2-tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "tied saved on purpose": ("qwen2-tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "qk norms": ("qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["q_norm", "k_norm"]}),
}
STAYS_TIED = {"tied tokens", "tied on purpose", "tied saved on purpose", "saved gemma norms"}


@pytest.mark.parametrize("option", OPTIONS)
def test_option(option: str, tmp_path: Path) -> None:
    family, options = OPTIONS[option]
    tied = base_model(family).spec.tied
    case = make(family, lora(**options), tmp_path / "adapter", merge=not tied, std=0.2)
    assert difference(case.adapted, case.base) > 0.01

    model = base_model(family)
    result = merged(model, [(read_peft_folder(case.folder, model), 1.0)])

    # merging in PEFT writes into the weight that head and embedding share; what was trained is base plus adapter
    assert difference(logits_of(family, result), case.adapted) <= TOLERANCE
    if case.merged is not None:
        assert difference(logits_of(family, result), case.merged) <= TOLERANCE
    assert result.spec.tied == (tied and option in STAYS_TIED)


def test_a_norm_tuning_adapter_replaces_norms(tmp_path: Path) -> None:
    from peft import LNTuningConfig

    case = make("gemma3", LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm", "q_norm"]), tmp_path / "a")
    assert difference(case.adapted, case.base) > 0.01
    model = base_model("gemma3")
    result = merged(model, [(read_peft_folder(case.folder, model), 1.0)])
    assert difference(logits_of("gemma3", result), case.adapted) <= TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen2-tied"])
def test_a_trainable_tokens_adapter_sets_rows(family: str, tmp_path: Path) -> None:
    from peft import TrainableTokensConfig

    config = TrainableTokensConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"], token_indices=[1, 17, 99])
    case = make(family, config, tmp_path / "a", merge=False, std=0.5)
    assert difference(case.adapted, case.base) > 0.01
    model = base_model(family)
    result = merged(model, [(read_peft_folder(case.folder, model), 1.0)])
    assert difference(logits_of(family, result), case.adapted) <= TOLERANCE


def test_hira_on_the_embedding(tmp_path: Path) -> None:
    from peft import HiraConfig

    case = make("llama", HiraConfig(task_type="CAUSAL_LM", r=4, target_modules=["embed_tokens", "q_proj"]), tmp_path / "a")
    assert difference(case.adapted, case.base) > 0.01
    model = base_model("llama")
    result = merged(model, [(read_peft_folder(case.folder, model), 1.0)])
    assert difference(logits_of("llama", result), case.adapted) <= TOLERANCE


def test_block_diagonal_factors(tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.tuners.lora.config import BdLoraConfig

    blocks = BdLoraConfig(target_modules_bd_a=["o_proj", "down_proj"], target_modules_bd_b=["q_proj"], nblocks=2)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=["q_proj", "o_proj", "down_proj"], use_bdlora=blocks)
    case = make("llama", config, tmp_path / "a")
    assert case.merged is not None
    assert difference(case.merged, case.base) > 0.01
    model = base_model("llama")
    result = merged(model, [(read_peft_folder(case.folder, model), 1.0)])
    assert difference(logits_of("llama", result), case.merged) <= TOLERANCE


def test_alpha_scale_is_honoured_where_others_get_it_wrong(tmp_path: Path) -> None:
    """The strength itself, not only its effect: alpha / sqrt r, per module."""
    case = make("llama", lora(r=16, use_rslora=True, rank_pattern={"q_proj": 64}, alpha_pattern={"q_proj": 40}), tmp_path / "a")
    deltas = read_peft_folder(case.folder, base_model("llama")).deltas
    query, down = deltas["layers.0.wq.weight"], deltas["layers.0.down.weight"]
    assert isinstance(query, LoRA) and isinstance(down, LoRA)
    assert (query.rank, query.scale) == (64, 5.0)
    assert (down.rank, down.scale) == (16, 4.0)


def test_qalora_averages_inputs_by_group(tmp_path: Path) -> None:
    """PEFT runs QALoRA on GPTQ layers only, so its forward formula is the oracle: mean of each group, times the number of groups."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 16)).astype(np.float32), rng.normal(size=(96, 4)).astype(np.float32)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj."
    save_file({prefix + "lora_A.weight": a, prefix + "lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "use_qalora": True,
        "qalora_group_size": 4,
        "target_modules": ["layers.0.self_attn.q_proj"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    delta = read_peft_folder(tmp_path, base_model("llama")).deltas["layers.0.wq.weight"]
    x = rng.normal(size=(5, 64))
    pooled = x.reshape(5, 16, 4).mean(axis=2) * 16
    np.testing.assert_allclose(x @ delta.apply(np.zeros((96, 64))).T, pooled @ a.T @ b.T * 2.0, rtol=1e-6, atol=1e-6)


def two_adapters(tmp_path: Path, family: str = "llama") -> tuple[Case, Case]:
    first = make(family, lora(), tmp_path / "one", seed=1)
    second = make(family, lora(r=9, lora_alpha=9, target_modules=["q_proj", "up_proj"]), tmp_path / "two", seed=2)
    return first, second


def test_several_adapters_with_scales(tmp_path: Path) -> None:
    from peft import PeftModel

    first, second = two_adapters(tmp_path)
    peft = PeftModel.from_pretrained(hf_base("llama"), first.folder, adapter_name="one")
    peft.load_adapter(second.folder, adapter_name="two")
    peft.add_weighted_adapter(["one", "two"], [0.7, -0.4], "both", combination_type="cat")
    peft.set_adapter("both")
    wanted = logits(peft.merge_and_unload())
    assert difference(wanted, first.base) > 0.01

    model = base_model("llama")
    pair = [(read_peft_folder(first.folder, model), 0.7), (read_peft_folder(second.folder, model), -0.4)]
    assert difference(logits_of("llama", merged(model, pair)), wanted) <= TOLERANCE


def test_several_multiplying_adapters_in_order(tmp_path: Path) -> None:
    """DoRA after DoRA, as PEFT merges them one after the other with the norms of the untouched base."""
    from peft import PeftModel

    first = make("llama", lora(use_dora=True), tmp_path / "one", seed=1)
    second = make("llama", lora(use_dora=True), tmp_path / "two", seed=2)
    peft = PeftModel.from_pretrained(hf_base("llama"), first.folder, adapter_name="one")
    peft.load_adapter(second.folder, adapter_name="two")
    wanted = logits(peft.merge_and_unload(adapter_names=["one", "two"]))
    model = base_model("llama")
    one, two = (read_peft_folder(case.folder, model) for case in (first, second))
    assert difference(logits_of("llama", merged(model, [(one, 1.0), (two, 1.0)])), wanted) <= TOLERANCE
    assert difference(logits_of("llama", merged(model, [(two, 1.0), (one, 1.0)])), wanted) > TOLERANCE


def test_scale_zero_is_the_base_and_untouched_tensors_keep_their_bytes(tmp_path: Path) -> None:
    first, _ = two_adapters(tmp_path)
    model = base_model("llama")
    adapter = read_peft_folder(first.folder, model)
    result = merged(model, [(adapter, 0.0)])
    for name, tensor in model.tensors.items():
        np.testing.assert_array_equal(result.tensors[name].decode(), tensor.decode())
    assert all(result.tensors[name] is tensor for name, tensor in model.tensors.items() if name not in adapter.deltas)
    assert set(first.folder.glob("adapter_*")) <= set(result.files)


@pytest.mark.parametrize("scheme", ["lora", "hra", "embedding dora"])
def test_rows_read_in_pieces_are_those_read_at_once(scheme: str, tmp_path: Path) -> None:
    from peft import HRAConfig

    if scheme == "hra":
        config: Any = HRAConfig(task_type="CAUSAL_LM", r=4, init_weights=False, target_modules=["q_proj"])
    elif scheme == "lora":
        config = lora()
    else:
        config = lora(target_modules=["embed_tokens"], use_dora=True)
    case = make("llama", config, tmp_path / "a")
    model = base_model("llama")
    result = merged(model, [(read_peft_folder(case.folder, model), 1.0)])
    name = "embed.weight" if scheme == "embedding dora" else "layers.1.wq.weight"
    whole = result.tensors[name]
    assert not np.array_equal(whole.decode(), model.tensors[name].decode())
    pieces = [whole.decode(start, min(start + 37, whole.n_rows)) for start in range(0, whole.n_rows, 37)]
    np.testing.assert_allclose(np.concatenate(pieces), whole.decode(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2-tied"])
def test_added_tokens_need_the_adapters_tokenizer(family: str, tmp_path: Path) -> None:
    import torch
    from peft import get_peft_model

    from edgeq.converters.tokenizers.hf import read_hf_tokenizer

    base = hf_base(family)
    base.resize_token_embeddings(328, mean_resizing=False)
    torch.manual_seed(0)
    with torch.no_grad():
        base.get_input_embeddings().weight[320:] = torch.randn(8, base.config.hidden_size) / 8
    peft = get_peft_model(base, lora(init_lora_weights=False)).eval()
    peft.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    wanted = logits(peft)
    assert difference(wanted[..., :320], base_logits(family)) > 0.01

    model = base_model(family)
    adapter = read_peft_folder(tmp_path / "a", model)
    assert "model.embed_tokens is resized from 320 to 328 tokens" in adapter.notes
    with pytest.raises(UnsupportedError, match="changed the vocabulary from 320 to 328 tokens, but brings no tokenizer"):
        merged(model, [(adapter, 1.0)])
    tokenizer = read_hf_tokenizer(base_folder(family), n_vocab=328)
    result = merged(model, [(adapter, 1.0)], tokenizer=tokenizer)
    assert result.spec.n_vocab == 328 and len(result.tokenizer.vocabulary.tokens) == 328
    assert result.spec.tied == model.spec.tied
    assert difference(logits_of(family, result), wanted) <= TOLERANCE
    with pytest.raises(UnsupportedError, match=r"resizes embed\.weight, so its scale must be 1, not 0.5"):
        merged(model, [(adapter, 0.5)], tokenizer=tokenizer)


def test_nested_adapters_are_cut_at_a_rank(tmp_path: Path) -> None:
    case = make("llama", lora(r=6, lora_alpha=12), tmp_path / "a")
    model = base_model("llama")
    whole = read_peft_folder(case.folder, model).deltas["layers.0.wq.weight"]
    cut = read_peft_folder(case.folder, model, rank=2).deltas["layers.0.wq.weight"]
    assert isinstance(whole, LoRA) and isinstance(cut, LoRA)
    np.testing.assert_allclose(cut.change(), 6.0 * (whole.b[:, :2].astype(np.float64) @ whole.a[:2]), rtol=1e-12)
    dora = make("llama", lora(use_dora=True), tmp_path / "dora")
    with pytest.raises(UnsupportedError, match=r"a rank was asked for, but the adapter's change of .* is no LoRA, so it has no first 2"):
        read_peft_folder(dora.folder, model, rank=2)


def test_an_embedding_saved_unchanged_beside_its_lora_is_no_change(tmp_path: Path) -> None:
    """PEFT saves the base of an adapted embedding; equal to the model's own it must not hide the factors, different it counts."""
    from safetensors.numpy import load_file, save_file

    case = make("llama", lora(target_modules=["embed_tokens"]), tmp_path / "a")
    model = base_model("llama")
    assert isinstance(read_peft_folder(case.folder, model).deltas["embed.weight"], LoRA)

    weights = load_file(case.folder / "adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    weights[key] = weights[key] + np.float32(0.5)
    save_file(weights, case.folder / "adapter_model.safetensors")
    moved = merged(model, [(read_peft_folder(case.folder, model), 1.0)]).tensors["embed.weight"].decode()
    low = LoRA(
        a=weights[key.replace("base_layer.weight", "lora_embedding_B")].T, b=weights[key.replace("base_layer.weight", "lora_embedding_A")].T
    )
    np.testing.assert_allclose(moved, weights[key] + 4.0 * low.change(), atol=1e-5)


@pytest.mark.parametrize("body", ["model.language_model.", "language_model.model."])
def test_adapters_of_the_text_part_of_a_wrapped_model(body: str, tmp_path: Path) -> None:
    """Trained with the multimodal class, used on its text model."""
    from safetensors.numpy import load_file, save_file

    case = make("gemma3", lora(), tmp_path / "a", merge=False)
    weights = load_file(case.folder / "adapter_model.safetensors")
    renamed = {key.replace("base_model.model.model.", f"base_model.model.{body}"): value for key, value in weights.items()}
    save_file(renamed, case.folder / "adapter_model.safetensors")
    model = base_model("gemma3")
    assert difference(case.adapted, case.base) > 0.01
    assert difference(logits_of("gemma3", merged(model, [(read_peft_folder(case.folder, model), 1.0)])), case.adapted) <= TOLERANCE
    save_file(
        {**renamed, "base_model.model.vision_tower.q_proj.lora_A.weight": np.ones((4, 4), dtype=np.float32)},
        case.folder / "adapter_model.safetensors",
    )
    with pytest.raises(UnsupportedError, match=r"vision_tower.* belongs to no module of gemma3"):
        read_peft_folder(case.folder, model)


def test_adalora_after_its_ranks_were_pruned(tmp_path: Path) -> None:
    """The config then lists which directions of each module are left, down to none; the strength stays that of the first rank."""
    from peft import AdaLoraConfig, PeftModel

    def prune(model: Any) -> None:
        masks = [[True, False, True, True, False, False], [False] * 6, [True] * 6, [True, True] + [False] * 4]
        names = [name.removeprefix("base_model.model.") for name, _ in model.named_parameters() if "lora_E" in name]
        model.peft_config["default"].rank_pattern = dict(zip(names, masks, strict=True))

    options: dict[str, Any] = {"init_r": 6, "target_r": 4, "total_step": 10, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    case = make("llama", AdaLoraConfig(task_type="CAUSAL_LM", **options), tmp_path / "a", change=prune, merge=False, std=0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes the table for LoRA's first
        wanted = logits(PeftModel.from_pretrained(hf_base("llama"), case.folder))
    assert difference(wanted, case.base) > 0.01
    model = base_model("llama")
    adapter = read_peft_folder(case.folder, model)
    assert len(adapter.deltas) == 3
    assert difference(logits_of("llama", merged(model, [(adapter, 1.0)])), wanted) <= TOLERANCE
