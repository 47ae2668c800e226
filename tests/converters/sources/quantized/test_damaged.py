"""Damaged and unknown quantized checkpoints: each its own message, and all of them when the model is opened, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import edit_json, hf_folder
from tiny_quantized import Method, awq, bnb4, bnb8, compressed, edit_tensors, fp8, gptq, hqq, quantize

from edgeq.converters.sources.hf_weights import read_hf_weights
from edgeq.errors import EdgeqError, SourceError, UnsupportedError

Q = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


def drop(suffix: str) -> Callable[[Tensors], Any]:
    return lambda state: state.pop(f"{Q}.{suffix}")


def put(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Any]:
    def edit(state: Tensors) -> None:
        state[f"{Q}.{suffix}"] = change(state[f"{Q}.{suffix}"]).contiguous()

    return edit


def new(suffix: str, value: torch.Tensor) -> Callable[[Tensors], Any]:
    return lambda state: state.update({f"{Q}.{suffix}": value})


def text(value: str) -> torch.Tensor:
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
DAMAGED = [
    (gptq(), drop("scales"), r"q_proj.scales is missing, without which gptq weights cannot be decoded. Download"),
    (gptq(), drop("qzeros"), r"q_proj.qzeros is missing, without which gptq weights"),
    (gptq(), drop("qweight"), r"q_proj.g_idx .*has no place in a llama model"),
    (gptq(), put("qweight", lambda t: t[:, :-8]), r"q_proj.scales has shape \[2, 96\], but gptq of this module's size has \[2, 88\]"),
    (gptq(), put("qweight", lambda t: t.long()), r"q_proj.qweight is stored as I64; gptq has it as I32"),
    (gptq(), put("scales", lambda t: t.long()), r"q_proj.scales is stored as I64; gptq has it as F16 or BF16 or F32"),
    (gptq(), put("scales", lambda t: t[:1]), r"q_proj.scales has shape \[1, 96\], but gptq of this module's size has \[2, 96\]"),
    (gptq(), put("g_idx", lambda t: t + 1), r"q_proj.weight: columns belong to groups 1 to 2, but there are 2. Download"),
    (gptq(), put("g_idx", lambda t: t[:-1]), r"q_proj.g_idx has shape \[63\], but gptq of this module's size has \[64\]"),
    (gptq(), new("weight", torch.ones(96, 64)), r"q_proj.weight is stored as floats and quantized by gptq too"),
    (awq(), drop("qzeros"), r"q_proj.qzeros is missing, without which awq weights"),
    (awq(), put("qzeros", lambda t: t[:, :-1]), r"q_proj.qzeros has shape \[2, 11\], but awq of this module's size has \[2, 12\]"),
    (awq(), put("qweight", lambda t: t[:-1]), r"q_proj.qweight has 63 rows, which do not divide into groups of 32 as config.json has them"),
    (bnb4(), drop("weight.absmax"), r"q_proj.weight.absmax is missing, without which bitsandbytes weights"),
    (bnb4(), drop(NF4_STATE), r"q_proj.weight is stored as U8, but the scales that bitsandbytes keeps beside it are missing"),
    (bnb4(), put("weight", lambda t: t[:-1]), r"q_proj.weight has 3071 bytes, but 96 x 64 values of 4 bits take 3072"),
    (bnb4(), put("weight.absmax", lambda t: t[:-1]), r"absmax has shape \[95\], but bitsandbytes of this module's size has \[96\]"),
    (bnb4(), put("weight.absmax", lambda t: t.half()), r"absmax is stored as F16; bitsandbytes has it as F32"),
    (bnb4(nested=True), drop("weight.nested_quant_map"), r"q_proj.weight.nested_quant_map is missing"),
    (bnb4(), put("weight.quant_map", lambda t: t.flip(0)), r"q_proj.weight.quant_map is not the nf4 table"),
    (bnb4(), put(NF4_STATE, lambda t: t[:-1]), r"quant_state.bitsandbytes__nf4 is not valid JSON"),
    (bnb4(), put(NF4_STATE, lambda t: text('{"quant_type": "nf4", "blocksize": 64}')), r"shape is None, expected rows and columns"),
    (bnb4(), put(NF4_STATE, lambda t: text('{"quant_type": "fp4", "shape": [96, 64]}')), r"quant_type is 'fp4', expected 'nf4'"),
    (bnb4(), put(NF4_STATE, lambda t: text('{"quant_type": "nf4", "shape": [96, 64]}')), r"nf4: blocksize is missing"),
    (
        bnb4(),
        put(NF4_STATE, lambda t: text('{"quant_type": "nf4", "shape": [96, 64], "blocksize": 64, "nested_offset": "x"}')),
        r"nested_offset is 'x', expected a number",
    ),
    (
        bnb4(),
        new("weight.quant_state.bitsandbytes__fp4", text("{}")),
        r"bitsandbytes__fp4 contradicts .*bnb_4bit_quant_type, which is 'nf4'",
    ),
    (bnb8(), drop("SCB"), r"q_proj.weight is stored as I8, but the scales that bitsandbytes keeps beside it are missing"),
    (bnb8(), put("SCB", lambda t: t[:-1]), r"q_proj.SCB has shape \[95\], but bitsandbytes of this module's size has \[96\]"),
    (bnb8(), put("weight_format", lambda t: t + 2), r"q_proj.weight_format is 2; supported: 0 \(rows\)"),
    (bnb8(), put("weight_format", lambda t: torch.zeros(2, dtype=torch.uint8)), r"weight_format has shape \[2\], expected one number"),
    (hqq(), drop("scale"), r"q_proj.scale is missing, without which hqq weights"),
    (hqq(), drop("packing"), r"q_proj.packing is missing: codes that are not packed are not read"),
    (hqq(), put("packing", lambda t: text("5bit_u8")), r"q_proj.packing is '5bit_u8'; supported: 8bit_u8, 4bit_u8"),
    (hqq(), put("W_q", lambda t: t[:-1]), r"q_proj.W_q has 3040 bytes, but 96 x 64 values of 4 bits in groups of 32 take 3072"),
    (hqq(), put("scale", lambda t: t[:-1]), r"q_proj.zero has shape \[192, 1\], but hqq of this module's size has \[191, 1\]"),
    (hqq(), put("group_size", lambda t: t * 2), r"has 192 scales for 96 x 64 values, which are not groups of 64"),
    (hqq(), put("axis", lambda t: t + 1), r"q_proj.axis is 2; supported: 0, 1"),
    (hqq(), put("shape", lambda t: t * 0), r"q_proj.shape is \[0, 0\], expected rows and columns"),
    (hqq(), new("quant_zero", torch.ones((), dtype=torch.uint8)), r"q_proj.quant_zero is set: scales or zero points are quantized too"),
    (compressed(), drop("weight_scale"), r"q_proj.weight_scale is missing, without which compressed-tensors weights"),
    (compressed(), drop("weight_shape"), r"q_proj.weight_shape is missing"),
    (compressed(), put("weight_packed", lambda t: t[:, :-1]), r"has shape \[96, 7\], but 96 x 64 values of 4 bits take \[96, 8\]"),
    (compressed(), put("weight_scale", lambda t: t[:, :-1]), r"has shape \[96, 1\], expected \[96, 2\] for 96 x 64 values in groups of 32"),
    (compressed(symmetric=False), drop("weight_zero_point"), r"q_proj.weight_zero_point is missing"),
    (compressed(symmetric=False), put("weight_zero_point", lambda t: t[:-1]), r"weight_zero_point has shape \[11, 2\], expected \[12, 2\]"),
    (compressed("int-quantized", bits=8, strategy="channel"), put("weight_scale", lambda t: t[:-1]), r"has shape \[95, 1\], expected"),
    (fp8(), drop("weight_scale_inv"), r"q_proj.weight is stored as F8_E4M3, but the scales that fp8 keeps beside it are missing"),
    (fp8(), put("weight_scale_inv", lambda t: t[:-1]), r"has shape \[2, 1\], expected \[3, 1\] for a weight of shape \[96, 64\]"),
    (fp8(), put("weight", lambda t: t.float()), r"q_proj.weight is stored as F32; fp8 has it as F8_E4M3 or F8_E5M2"),
]


@pytest.mark.parametrize(("method", "damage", "message"), DAMAGED)
def test_damaged_tensors(method: Method, damage: Callable[[Tensors], Any], message: str, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "llama", num_hidden_layers=1, num_key_value_heads=4)
    quantize(folder, method)
    edit_tensors(folder, damage)
    with pytest.raises((SourceError, UnsupportedError), match=message):
        read_hf_weights(folder)


def options(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda quantization: quantization.update(values)


def weights_options(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda quantization: quantization["config_groups"]["group_0"]["weights"].update(values)


UNKNOWN = [
    (gptq(), options(bits=5), r"quantization_config.bits is 5; supported: 2, 3, 4, 8. Use the float checkpoint"),
    (gptq(), options(bits=True), r"quantization_config.bits is True; supported"),
    (gptq(), options(group_size=0), r"quantization_config.group_size is 0, expected a positive whole number, or -1"),
    (gptq(), options(checkpoint_format="marlin"), r"checkpoint_format is 'marlin'; supported: gptq, gptq_v2"),
    (gptq(), options(is_marlin_format=True), r"is_marlin_format is True; supported: False"),
    (gptq(), options(pack_dtype="int16"), r"pack_dtype is 'int16'; supported: int32"),
    (gptq(), options(dynamic={"+:.*down.*": {"bits": 8}}), r"dynamic gives modules bits or groups of their own"),
    (gptq(), options(rotation="hadamard"), r"rotation \(value 'hadamard'\) is an option edgeq does not know. Remove it if"),
    (gptq(), options(sym="yes"), r"quantization_config.sym is 'yes', expected true or false"),
    (awq(), options(bits=8), r"quantization_config.bits is 8; supported: 4"),
    (awq(), options(version="gemv"), r"quantization_config.version is 'gemv'; supported: gemm"),
    (awq(), options(zero_point=False), r"zero_point is False; supported: True"),
    (awq(), options(group_size="128"), r"group_size is '128', expected a positive whole number, or -1"),
    (bnb4(), options(bnb_4bit_quant_type="af4"), r"bnb_4bit_quant_type is 'af4'; supported: nf4, fp4"),
    (bnb4(), options(load_in_8bit=True), r"load_in_4bit and load_in_8bit must say which of the two it is"),
    (bnb8(), options(new_option=1), r"quantization_config.new_option \(value 1\) is an option edgeq does not know"),
    (hqq(), options(new_option=1), r"quantization_config.new_option \(value 1\) is an option edgeq does not know"),
    (fp8(), options(weight_block_size=[128]), r"weight_block_size is \[128\], expected rows and columns"),
    (fp8(), options(expert_dtype="fp4"), r"expert_dtype is 'fp4'; supported: fp8"),
    (compressed(), options(format="marlin-24"), r"group_0.format is 'marlin-24'; supported: pack-quantized, int-quantized"),
    (compressed(), options(config_groups=None), r"config_groups is missing"),
    (
        compressed(),
        options(sparsity_config={"format": "sparse-24-bitmask"}),
        r"sparsity_config.format is 'sparse-24-bitmask'; supported: dense",
    ),
    (compressed(), options(transform_config={"config_groups": {"a": {}}}), r"transform_config changes weights when the model runs"),
    (compressed(), weights_options(num_bits=3), r"weights.num_bits is 3; supported: 4, 8"),
    (compressed(), weights_options(type="float", num_bits=8), r"weights.type is 'float' in a pack-quantized checkpoint; supported: int"),
    (
        compressed(),
        weights_options(strategy="tensor_group"),
        r"weights.strategy is 'tensor_group'; supported: tensor, channel, group, block",
    ),
    (compressed(), weights_options(group_size=None), r"weights.group_size is None, expected a positive whole number"),
    (compressed(), weights_options(strategy="block"), r"weights.block_structure is None, expected rows and columns"),
    (compressed(), weights_options(dynamic=True), r"weights.dynamic is True; supported: False"),
    (
        compressed(),
        lambda q: q["config_groups"]["group_0"].update(targets=["re:.*mlp.*"]),
        r"config_groups: no group has model.layers.0.self_attn.k_proj among its targets",
    ),
    (compressed(), lambda q: q["config_groups"]["group_0"].update(weights=None), r"group_0.weights is missing: only weights that"),
]


@pytest.mark.parametrize(("method", "change", "message"), UNKNOWN)
def test_options_that_are_not_described(method: Method, change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "llama", num_hidden_layers=1)
    quantize(folder, method)
    edit_json(folder / "config.json", lambda c: change(c["quantization_config"]))
    with pytest.raises(EdgeqError, match=message):
        read_hf_weights(folder)


def test_floats_that_config_calls_quantized(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "llama", num_hidden_layers=1)
    edit_json(folder / "config.json", lambda c: c.update(quantization_config=dict(awq().config)))
    with pytest.raises(SourceError, match=r"quantization_config says awq, but no tensor is quantized so. Download"):
        read_hf_weights(folder)


def test_modules_that_are_left_in_float_stay_so(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "llama")
    expected = quantize(folder, awq(), skip=("lm_head", "embed", "layers.1.", "down_proj"))
    assert len(expected) == 6
    tensors = read_hf_weights(folder).tensors
    assert {name for name, tensor in tensors.items() if tensor.grid.name == "AWQ 4-bit"} == {
        f"layers.0.{role}.weight" for role in ("wq", "wk", "wv", "wo", "gate", "up")
    }


def test_two_schemes_in_one_checkpoint(tmp_path: Path) -> None:
    """Modules are matched by name or pattern before class."""
    import numpy as np

    folder = hf_folder(tmp_path / "m", "llama", num_hidden_layers=1)
    four, eight = compressed(), compressed(bits=8, strategy="channel")
    expected = quantize(folder, eight, skip=("lm_head", "embed", "self_attn"))
    expected |= quantize(folder, four, skip=("lm_head", "embed", "mlp"))

    def both(config: dict[str, Any]) -> None:
        groups = config["quantization_config"]["config_groups"]
        groups["group_1"] = {**eight.config["config_groups"]["group_0"], "targets": ["re:.*mlp.*"]}

    edit_json(folder / "config.json", both)
    tensors = read_hf_weights(folder).tensors
    np.testing.assert_allclose(
        tensors["layers.0.down.weight"].decode(), expected["model.layers.0.mlp.down_proj.weight"], rtol=2.5e-7, atol=1e-9
    )
    np.testing.assert_allclose(
        tensors["layers.0.wo.weight"].decode(), expected["model.layers.0.self_attn.o_proj.weight"], rtol=2.5e-7, atol=1e-9
    )
