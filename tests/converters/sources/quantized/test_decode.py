"""Every method: a folder opens, and each weight decodes to the method's own arithmetic in float64, in whole and in pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import edit_json, hf_folder
from tiny_quantized import Method, bnb4, edit_tensors, fp8, gptq, methods, quantize

from edgeq.converters.sources.hf_weights import read_hf_weights
from edgeq.tensors import LazyTensor

NAMES = {"self_attn.q_proj": "wq", "self_attn.k_proj": "wk", "self_attn.v_proj": "wv", "self_attn.o_proj": "wo"}
NAMES |= {"mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"}


def canonical(stored: str) -> str:
    _, _, layer, module, kind, _ = stored.split(".")
    return f"layers.{layer}.{NAMES[f'{module}.{kind}']}.weight"


def assert_decodes(tensor: LazyTensor, expected: np.ndarray) -> None:
    """Products of float32 scales and small whole numbers are rounded once; nested scales and fractional zero points twice."""
    np.testing.assert_allclose(tensor.decode(), expected, rtol=2.5e-7, atol=1e-9)
    n = len(expected)
    pieces = [tensor.decode(start, min(start + 13, n)) for start in range(0, n, 13)]
    np.testing.assert_array_equal(np.concatenate(pieces), tensor.decode())
    assert tensor.decode(5, 5).shape == (0, expected.shape[1])


@pytest.mark.parametrize(("name", "method"), list(methods()))
def test_weights_decode_to_the_methods_own_arithmetic(name: str, method: Method, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "llama", num_hidden_layers=1)
    original = {key: tensor.decode() for key, tensor in read_hf_weights(folder).tensors.items()}
    expected = quantize(folder, method)
    assert len(expected) == 7
    weights = read_hf_weights(folder)
    assert weights.tensors.keys() == original.keys()
    assert weights.quantization is not None
    assert weights.quantization["method"] == method.config["quant_method"]
    for stored, values in expected.items():
        key = canonical(stored)
        assert_decodes(weights.tensors[key], values)
        assert not np.array_equal(values, original[key])  # it was quantized indeed
    untouched = weights.tensors.keys() - {canonical(stored) for stored in expected}
    assert {"embed.weight", "head.weight", "final_norm.weight", "layers.0.attn_norm.weight"} <= untouched
    for key in untouched:
        np.testing.assert_array_equal(weights.tensors[key].decode(), original[key])


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_three_bit_gptq(symmetric: bool, act_order: bool, tmp_path: Path) -> None:
    """The layout needs multiples of 32 on both sides."""
    folder = hf_folder(tmp_path / "m", "llama", num_hidden_layers=1, num_key_value_heads=4)
    expected = quantize(folder, gptq(3, symmetric=symmetric, act_order=act_order))
    weights = read_hf_weights(folder)
    for stored, values in expected.items():
        assert_decodes(weights.tensors[canonical(stored)], values)


def test_zero_points_that_wrap_around(tmp_path: Path) -> None:
    """v1 stores a zero point of 0 as -1 of the packed word, with a borrow; adding one to every value undoes exactly that."""
    folder = hf_folder(tmp_path / "m", "llama", num_hidden_layers=1)
    expected = quantize(folder, gptq(4, symmetric=False, v2=True))

    def clear_and_borrow(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key in state if key.endswith("qzeros")]:
            cleared = state[key] & ~0xF0  # the second of eight outputs gets zero point 0
            state[key] = (cleared.long() - 0x11111111).to(torch.int32)

    edit_tensors(folder, clear_and_borrow)
    edit_json(folder / "config.json", lambda c: c["quantization_config"].update(checkpoint_format="gptq"))
    weights = read_hf_weights(folder)
    for stored, values in expected.items():
        decoded = weights.tensors[canonical(stored)].decode()
        others = np.arange(len(values)) % 8 != 1
        np.testing.assert_allclose(decoded[others], values[others], rtol=2.5e-7, atol=1e-9)
        assert decoded[1].min() >= 0  # codes count up from 0


@pytest.mark.parametrize("method", [gptq(4, symmetric=False), bnb4(nested=True), fp8()])
def test_pickle_checkpoints_decode_to_the_same(method: Method, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "llama", num_hidden_layers=1)
    expected = quantize(folder, method)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    tensors = read_hf_weights(folder).tensors
    for stored, values in expected.items():
        assert_decodes(tensors[canonical(stored)], values)
