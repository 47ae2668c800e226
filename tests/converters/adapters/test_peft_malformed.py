"""Adapters that are broken, incomplete, for another model, or of a meaning edgeq cannot carry: each says so in its own words."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from peft_oracle import base_model, make
from safetensors.numpy import load_file, save_file
from tiny import edit_json

from edgeq.converters.adapters.peft import read_peft_folder
from edgeq.deltas.lora import LoRA
from edgeq.deltas.merge import merged
from edgeq.errors import EdgeqError, ShapeError, SourceError, UnsupportedError

Q = "base_model.model.model.layers.0.self_attn.q_proj."
Tensors = dict[str, Any]


@cache
def sound(use_dora: bool = False) -> Path:
    from peft import LoraConfig

    folder = Path(mkdtemp()) / "sql"
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=["q_proj", "up_proj"], use_dora=use_dora)
    make("llama", config, folder, merge=False)
    edit_json(folder / "adapter_config.json", lambda c: c.update(base_model_name_or_path="someone/tiny-llama"))
    return folder


def broken(folder: Path, *, tensors: Callable[[Tensors], Any] | None = None, dora: bool = False, **config: Any) -> Path:
    """A copy of a sound adapter with changed tensors and config values (None: null)."""
    shutil.copytree(sound(dora), folder)
    if tensors is not None:
        state = load_file(folder / "adapter_model.safetensors")
        tensors(state)
        save_file(state, folder / "adapter_model.safetensors")
    edit_json(folder / "adapter_config.json", lambda c: c.update(config))
    return folder


def drop(*keys: str) -> Callable[[Tensors], Any]:
    return lambda state: [state.pop(key) for key in keys]


def put(key: str, value: Any) -> Callable[[Tensors], Any]:
    return lambda state: state.update({key: np.ascontiguousarray(value, dtype=np.float32)})


def renamed(old: str, new: str) -> Callable[[Tensors], Any]:
    def change(state: Tensors) -> None:
        for key in list(state):
            state[key.replace(old, new)] = state.pop(key)

    return change


NAN = np.full((4, 64), np.nan)
TENSORS: dict[str, tuple[Callable[[Tensors], Any], type[EdgeqError], str]] = {
    "half a pair": (drop(Q + "lora_B.weight"), SourceError, r"layers.0.self_attn.q_proj: lora_B.weight is missing, there is lora_A.weight"),
    "other half": (drop(Q + "lora_A.weight"), SourceError, r"q_proj: lora_A.weight is missing, there is lora_B.weight"),
    "whole module": (
        drop(Q + "lora_A.weight", Q + "lora_B.weight"),
        SourceError,
        r"selects model.layers.0.self_attn.q_proj \(1 such modules\), for",
    ),
    "wrong rank": (put(Q + "lora_A.weight", np.ones((5, 64))), ShapeError, r"lora_A.weight has shape \[5, 64\], expected \[4, 64\]"),
    "rank 0": (put(Q + "lora_A.weight", np.ones((0, 64))), ShapeError, r"lora_A.weight has shape \[0, 64\], expected \[4, 64\]"),
    "wrong base": (
        put(Q + "lora_A.weight", np.ones((4, 96))),
        ShapeError,
        r"this one's module is \[96, 64\].* trained on someone/tiny-llama",
    ),
    "vector": (put(Q + "lora_A.weight", np.ones(64)), ShapeError, r"lora_A.weight has shape \[64\], expected \[4, 64\]"),
    "nan": (put(Q + "lora_A.weight", NAN), SourceError, r"q_proj.lora_A.weight: 256 values are NaN, 0 infinite"),
    "infinite": (put(Q + "lora_A.weight", NAN * 0 + np.inf), SourceError, r"256 values are NaN|0 values are NaN, 256 infinite"),
    "alien part": (
        put(Q + "lora_C.weight", np.ones((4, 64))),
        UnsupportedError,
        r"q_proj.lora_C.weight belongs to no module .* or to no part",
    ),
    "alien module": (
        put("base_model.model.vision.lora_A.weight", np.ones((4, 64))),
        UnsupportedError,
        r"vision.lora_A.weight belongs to no module",
    ),
    "alien root": (put("something", np.ones((4, 64))), UnsupportedError, r"something belongs to no module"),
    "unselected module": (
        renamed("up_proj", "down_proj"),
        SourceError,
        r"has tensors for model.layers.0.mlp.down_proj, which target_modules",
    ),
    "other layers": (
        renamed("layers.1", "layers.7"),
        SourceError,
        r"selects model.layers.1.self_attn.q_proj \(2 such modules\), for which",
    ),
    "weight beside": (put(Q + "base_layer.weight", np.ones((96, 64))), UnsupportedError, r"q_proj.base_layer.weight belongs to no module"),
    "magnitude": (put(Q + "lora_magnitude_vector", np.ones(96)), SourceError, r"has magnitudes, but use_dora is false"),
    "bias without base": (put(Q + "base_layer.bias", np.ones(96)), UnsupportedError, r"q_proj.base_layer.bias belongs to no module"),
    "empty": (lambda state: state.clear(), SourceError, r"selects model.layers.0.self_attn.q_proj"),
}
CONFIG: dict[str, tuple[dict[str, Any], type[EdgeqError], str]] = {
    "prompt": ({"peft_type": "PROMPT_TUNING"}, UnsupportedError, "is PROMPT_TUNING: it puts trained vectors before the prompt"),
    "prefix": ({"peft_type": "PREFIX_TUNING"}, UnsupportedError, "is PREFIX_TUNING: it puts trained vectors before the prompt"),
    "router": ({"peft_type": "XLORA"}, UnsupportedError, "is XLORA: what it does depends on the input"),
    "side network": ({"peft_type": "SHADOW"}, UnsupportedError, "is SHADOW: it is a network beside the model"),
    "unknown kind": ({"peft_type": "LILY"}, UnsupportedError, "is 'LILY'; supported: LORA, ADALORA"),
    "no kind": ({"peft_type": None}, SourceError, "peft_type is None, expected a name such as LORA"),
    "rank 0": ({"r": 0}, SourceError, "r is 0, expected a positive whole number"),
    "rank pattern": (
        {"rank_pattern": {"q_proj": 0}},
        SourceError,
        "rank_pattern gives model.layers.0.self_attn.q_proj 0, expected a positive",
    ),
    "rank text": ({"r": "4"}, SourceError, "r is '4', expected a positive whole number"),
    "alpha": ({"lora_alpha": None}, SourceError, "lora_alpha is missing"),
    "alpha pattern": ({"alpha_pattern": {"q_proj": "x"}}, SourceError, "alpha_pattern gives model.layers.0.self_attn.q_proj 'x'"),
    "pattern table": ({"alpha_pattern": [1]}, SourceError, r"alpha_pattern is \[1\], expected an object"),
    "pattern": ({"rank_pattern": {"q_(proj": 3}}, SourceError, r"rank_pattern contains .* which is no regular expression"),
    "targets": ({"target_modules": 7}, SourceError, "target_modules is 7, expected module names or one regular expression"),
    "target pattern": ({"target_modules": "q_(proj"}, SourceError, "target_modules contains .* which is no regular expression"),
    "exclude pattern": ({"exclude_modules": "q_(proj"}, SourceError, "exclude_modules contains .* which is no regular expression"),
    "layers": ({"layers_to_transform": ["a"]}, SourceError, r"layers_to_transform is \['a'\], expected layer numbers"),
    "dora": ({"use_dora": True}, SourceError, "has no magnitudes, but use_dora is true"),
    "rslora": ({"use_rslora": "yes"}, SourceError, "use_rslora is 'yes', expected true or false"),
    "pissa": (
        {"init_lora_weights": "pissa_niter_16"},
        UnsupportedError,
        "'pissa_niter_16': training took the largest singular directions out",
    ),
    "olora": ({"init_lora_weights": "olora"}, UnsupportedError, "'olora': training took an orthonormal part out of the base"),
    "corda": ({"init_lora_weights": "corda"}, UnsupportedError, "path_initial_model_for_weight_conversion"),
    "loftq": ({"init_lora_weights": "loftq"}, UnsupportedError, "'loftq': training took what its 4-bit form cannot hold out of"),
    "lora-ga": ({"init_lora_weights": "lora_ga"}, UnsupportedError, "'lora_ga': training took its gradient's directions out of"),
    "replication": ({"layer_replication": [[0, 2], [1, 2]]}, UnsupportedError, "it stacks copies of layers into a deeper model"),
    "megatron": ({"megatron_config": {"a": 1}}, UnsupportedError, "megatron_config .* split for Megatron"),
    "parameters": ({"target_parameters": ["mlp.experts"]}, UnsupportedError, "it adapts single parameters of expert layers"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, UnsupportedError, "it acts from its invocation tokens on only"),
    "arrow": ({"arrow_config": {"top_k": 2}}, UnsupportedError, "it routes each token to other adapters"),
    "bdlora": ({"use_bdlora": {"nblocks": 0}}, SourceError, "use_bdlora is .*, expected an object with nblocks"),
    "new option": ({"use_wonder": True}, UnsupportedError, "use_wonder is True: edgeq does not know this option of LORA"),
    "new number": ({"wonder": 3}, UnsupportedError, "wonder is 3: edgeq does not know this option of LORA"),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_broken_tensors(fault: str, tmp_path: Path) -> None:
    change, error, message = TENSORS[fault]
    with pytest.raises(error, match=message):
        read_peft_folder(broken(tmp_path / "a", tensors=change), base_model("llama"))


@pytest.mark.parametrize("fault", CONFIG)
def test_broken_or_foreign_configs(fault: str, tmp_path: Path) -> None:
    values, error, message = CONFIG[fault]
    with pytest.raises(error, match=message):
        read_peft_folder(broken(tmp_path / "a", **values), base_model("llama"))


def test_the_sound_adapter_is_sound() -> None:
    """Otherwise none of the tests above would show anything."""
    adapter = read_peft_folder(sound(), base_model("llama"))
    assert adapter.name == "sql" and adapter.kind == "LORA" and adapter.base_name == "someone/tiny-llama"
    assert len(adapter.deltas) == 4
    assert read_peft_folder(sound(True), base_model("llama"), name="style").kind == "DORA"


def test_dora_without_its_magnitude(tmp_path: Path) -> None:
    folder = broken(tmp_path / "a", dora=True, tensors=drop(Q + "lora_magnitude_vector"))
    with pytest.raises(SourceError, match="q_proj has no magnitudes, but use_dora is true"):
        read_peft_folder(folder, base_model("llama"))


def test_files_that_are_missing_cut_short_or_no_json(tmp_path: Path) -> None:
    model = base_model("llama")
    with pytest.raises(SourceError, match=r"adapter_config\.json is missing"):
        read_peft_folder(tmp_path, model)
    folder = broken(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    with pytest.raises(SourceError, match=r"has neither adapter_model\.safetensors nor adapter_model\.bin"):
        read_peft_folder(folder, model)
    for n in (0, 7, 100, len(content) // 2, len(content) - 1):
        weights.write_bytes(content[:n])
        with pytest.raises(SourceError, match="is cut short"):
            read_peft_folder(folder, model)
    weights.write_bytes(content)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(SourceError, match="not valid JSON"):
        read_peft_folder(folder, model)


def test_pickles_are_read_without_running_them(tmp_path: Path) -> None:
    import torch

    folder = broken(tmp_path / "a")
    state = {key: torch.from_numpy(value) for key, value in load_file(folder / "adapter_model.safetensors").items()}
    (folder / "adapter_model.safetensors").unlink()
    torch.save(state, folder / "adapter_model.bin")
    model = base_model("llama")
    pickled, plain = read_peft_folder(folder, model), read_peft_folder(sound(), model)
    for name, delta in plain.deltas.items():
        other = pickled.deltas[name]
        assert isinstance(delta, LoRA) and isinstance(other, LoRA)
        np.testing.assert_array_equal(delta.change(), other.change())

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"x": Evil()}, folder / "adapter_model.bin")
    with pytest.raises(SourceError, match="weights-only loader refuses this file"):
        read_peft_folder(folder, model)
    assert not (tmp_path / "ran").exists()


def test_links_that_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = broken(tmp_path / "a")
    (tmp_path / "outside.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to("../outside.safetensors")
    with pytest.raises(SourceError, match=r"adapter_model\.safetensors leads out of its folder"):
        read_peft_folder(folder, base_model("llama"))


def test_names_in_the_config_are_never_paths(tmp_path: Path) -> None:
    """A base model's name is repeated in messages and nothing else; module names only match."""
    folder = broken(tmp_path / "a", base_model_name_or_path="../../etc/passwd", modules_to_save=["../../x"])
    assert read_peft_folder(folder, base_model("llama")).base_name == "../../etc/passwd"


def test_another_models_adapter_names_the_first_mismatch(tmp_path: Path) -> None:
    adapter = read_peft_folder(sound(), base_model("llama"))
    with pytest.raises(
        SourceError,
        match=r"adapter 'sql' does not fit qwen2: layers\.0\.wq\.weight is \[96, 96\] there, the adapter was made for \[96, 64\]\. It says",
    ):
        merged(base_model("qwen2"), [(adapter, 1.0)])
    with pytest.raises(ShapeError, match=r"expected \[4, 96\].*trained on someone/tiny-llama"):
        read_peft_folder(sound(), base_model("qwen2"))
    with pytest.raises(UnsupportedError, match="two adapters are called 'sql'"):
        merged(base_model("llama"), [(adapter, 1.0), (adapter, 0.5)])


def test_a_lora_bias_needs_a_bias(tmp_path: Path) -> None:
    bias = put(Q + "lora_B.bias", np.ones(96))
    folder = broken(tmp_path / "a", tensors=bias, lora_bias=True, target_modules=["layers.0.self_attn.q_proj"])
    state = load_file(folder / "adapter_model.safetensors")
    save_file({key: value for key, value in state.items() if key.startswith(Q)}, folder / "adapter_model.safetensors")
    adapter = read_peft_folder(folder, base_model("llama"))
    with pytest.raises(
        SourceError, match=r"changes layers\.0\.wq\.bias, which llama does not have. Merging a bias needs a model that has one"
    ):
        merged(base_model("llama"), [(adapter, 1.0)])


def test_results_that_are_not_finite_are_refused_when_read(tmp_path: Path) -> None:
    folder = broken(tmp_path / "a", tensors=put(Q + "lora_B.weight", np.full((96, 4), 3e38)))
    result = merged(base_model("llama"), [(read_peft_folder(folder, base_model("llama")), 1e6)])
    with pytest.raises(SourceError, match=re.escape("layers.0.wq.weight with a merged: 0 values are NaN, ")):
        result.tensors["layers.0.wq.weight"].decode()
