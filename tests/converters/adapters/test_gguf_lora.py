"""GGUF LoRA files written with gguf-py in llama.cpp's layout, read back, and run by llama.cpp beside the model merged by edgeq."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import write_with_gguf_py
from peft_oracle import TOLERANCE, base_model, difference, logits_of, make

from edgeq.converters.adapters.gguf_lora import read_gguf_lora
from edgeq.deltas.lora import LoRA
from edgeq.deltas.merge import merged
from edgeq.errors import EdgeqError, ShapeError, SourceError, UnsupportedError
from edgeq.families import GGUF_NAMES

V = gguf.GGUFValueType
FIELDS = {"general.type": (V.STRING, "adapter"), "adapter.type": (V.STRING, "lora"), "adapter.lora.alpha": (V.FLOAT32, 12.0)}


def interleaved(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows in rotate-half order to pairs side by side, as llama.cpp's converter permutes q and k (conversion/llama.py)."""
    return rows.reshape(n_heads, 2, rows.shape[0] // n_heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def peft_to_gguf(folder: Path, path: Path, family: str) -> Path:
    """What llama.cpp's own adapter converter makes of a plain PEFT LoRA, written out for these two families."""
    from safetensors.numpy import load_file

    names = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    names |= {"qkv_proj": "wqkv", "gate_up_proj": "up"}
    tensors: dict[str, Any] = {}
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        parts = key.removeprefix("base_model.model.model.").split(".")
        if "base_layer" in parts:
            continue
        if parts[0] == "embed_tokens":
            half = parts[-1][-1].lower()
            tensors[f"token_embd.weight.lora_{half}"] = np.ascontiguousarray(value.T if half == "a" else value)
            continue
        half = parts[4][-1].lower()
        if family == "llama" and half == "b" and parts[3] in ("q_proj", "k_proj"):
            value = interleaved(value, 4 if parts[3] == "q_proj" else 2)
        tensors[GGUF_NAMES[names[parts[3]]].format(i=parts[1]) + f".weight.lora_{half}"] = np.ascontiguousarray(value)
    return write_with_gguf_py(path, family, FIELDS, tensors)


@pytest.mark.parametrize(
    ("family", "targets"),
    [("llama", ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "embed_tokens"]), ("phi3", ["qkv_proj", "o_proj", "gate_up_proj"])],
)
def test_a_gguf_lora_merges_like_the_peft_adapter_it_came_from(family: str, targets: list[str], tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(task_type="CAUSAL_LM", r=6, lora_alpha=12, rank_pattern={"o_proj": 3}, target_modules=targets)
    case = make(family, config, tmp_path / "peft")
    path = peft_to_gguf(case.folder, tmp_path / "adapter.gguf", family)
    model = base_model(family)
    adapter = read_gguf_lora(path, model)
    output = adapter.deltas["layers.0.wo.weight"]
    assert isinstance(output, LoRA) and (output.rank, output.scale) == (3, 4.0)
    result = merged(model, [(adapter, 1.0)])
    assert case.merged is not None and difference(case.merged, case.base) > 0.01
    assert difference(logits_of(family, result), case.merged) <= TOLERANCE


def write(path: Path, tensors: Mapping[str, Any] | None = None, arch: str = "llama", **fields: Any) -> Path:
    rng = np.random.default_rng(0)
    if tensors is None:
        tensors = {"blk.0.ffn_down.weight.lora_a": rng.normal(size=(32, 160)), "blk.0.ffn_down.weight.lora_b": rng.normal(size=(64, 32))}
    given = {key: value if isinstance(value, tuple) else value.astype(np.float32) for key, value in tensors.items()}
    return write_with_gguf_py(path, arch, {k: v for k, v in {**FIELDS, **fields}.items() if v is not None}, given)


def test_strength_is_one_without_alpha(tmp_path: Path) -> None:
    model = base_model("llama")
    for alpha in ({"adapter.lora.alpha": None}, {"adapter.lora.alpha": (V.FLOAT32, 0.0)}):
        delta = read_gguf_lora(write(tmp_path / "a.gguf", **alpha), model).deltas["layers.0.down.weight"]
        assert isinstance(delta, LoRA) and delta.scale == 1.0


def test_quantized_factors_are_decoded(tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(size=(32, 160)).astype(np.float32)
    packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    tensors = {
        "blk.0.ffn_down.weight.lora_a": (packed, gguf.GGMLQuantizationType.Q8_0),
        "blk.0.ffn_down.weight.lora_b": np.ones((64, 32), dtype=np.float32),
    }
    delta = read_gguf_lora(write(tmp_path / "a.gguf", tensors), base_model("llama")).deltas["layers.0.down.weight"]
    assert isinstance(delta, LoRA)
    np.testing.assert_array_equal(delta.a, gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))


A, B = np.ones((4, 160)), np.ones((64, 4))
PAIR = {"blk.0.ffn_down.weight.lora_a": A, "blk.0.ffn_down.weight.lora_b": B}
BAD: dict[str, tuple[dict[str, Any], type[EdgeqError], str]] = {
    "no adapter": ({"general.type": (V.STRING, "model")}, SourceError, "general.type is 'model', expected 'adapter'"),
    "kind": ({"adapter.type": (V.STRING, "control_vector")}, UnsupportedError, "adapter.type is 'control_vector'; supported: lora"),
    "architecture": ({"arch": "qwen2"}, SourceError, "for architecture 'qwen2', llama is 'llama'"),
    "alora": ({"adapter.alora.invocation_tokens": (V.ARRAY, [1, 2])}, UnsupportedError, "acts from its invocation tokens on only"),
    "alpha": ({"adapter.lora.alpha": (V.FLOAT32, float("nan"))}, SourceError, "adapter.lora.alpha is nan, expected a number"),
    "half a pair": ({"tensors": {"blk.0.ffn_down.weight.lora_a": A}}, SourceError, "blk.0.ffn_down.weight.lora_b is missing"),
    "other half": ({"tensors": {"blk.0.ffn_down.weight.lora_b": B}}, SourceError, "blk.0.ffn_down.weight.lora_a is missing"),
    "norm": (
        {"tensors": {**PAIR, "blk.0.attn_norm.weight": np.ones(64)}},
        UnsupportedError,
        "attn_norm.weight is neither lora_a nor lora_b",
    ),
    "layer": (
        {"tensors": {k.replace("blk.0", "blk.9"): v for k, v in PAIR.items()}},
        SourceError,
        "changes blk.9.ffn_down.weight, which llama",
    ),
    "bias": (
        {"tensors": {k.replace("weight", "bias"): v for k, v in PAIR.items()}},
        SourceError,
        "changes blk.0.ffn_down.bias, which llama",
    ),
    "rank": (
        {"tensors": {**PAIR, "blk.0.ffn_down.weight.lora_b": np.ones((64, 5))}},
        ShapeError,
        r"\[4, 160\] and \[64, 5\], which do not fit",
    ),
    "shape": ({"tensors": {**PAIR, "blk.0.ffn_down.weight.lora_a": np.ones((4, 96))}}, ShapeError, r"where it is \[64, 160\]"),
    "vector": ({"tensors": {**PAIR, "blk.0.ffn_down.weight.lora_a": np.ones(160)}}, ShapeError, r"has shape \[160\], expected a matrix"),
    "nan": ({"tensors": {**PAIR, "blk.0.ffn_down.weight.lora_a": A * np.nan}}, SourceError, "640 values are NaN"),
    "empty": ({"tensors": {}}, SourceError, "the adapter has no tensors"),
}


@pytest.mark.parametrize("fault", BAD)
def test_faults_have_their_own_errors(fault: str, tmp_path: Path) -> None:
    options, error, message = BAD[fault]
    path = write(tmp_path / "a.gguf", **options)
    with pytest.raises(error, match=message):
        read_gguf_lora(path, base_model("llama"))
