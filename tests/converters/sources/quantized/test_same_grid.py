"""Codes go into ggml blocks as they are wherever those hold the same values; what is rounded is said, and the gate passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from tiny import hf_folder
from tiny_quantized import Method, awq, bnb4, bnb8, compressed, edit_tensors, fp8, gptq, hqq, quantize

import edgeq
from edgeq.converters.gguf.encode import encode_tensor
from edgeq.converters.sources.hf_weights import read_hf_weights
from edgeq.errors import ShapeError
from edgeq.grids import grid
from edgeq.group_grids import recode, recodes
from edgeq.package import read_package
from edgeq.tensors import LazyTensor, as_float32

PROFILE = "laptop-cpu"
GATE = "model.layers.0.mlp.gate_proj.weight"


def opened(folder: Path, method: Method, **sizes: int) -> tuple[LazyTensor, np.ndarray]:
    """The gate projection as it opens, and its values."""
    expected = quantize(hf_folder(folder, "llama", num_hidden_layers=1, **sizes), method)
    return read_hf_weights(folder).tensors["layers.0.gate.weight"], expected[GATE]


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (gptq(4), "Q4_0"),
        (gptq(4, 64), "Q4_0"),
        (gptq(4, -1, v2=True), "Q4_0"),
        (gptq(2, symmetric=False), "Q4_0"),
        (gptq(8), "Q8_0"),
        (compressed(), "Q4_0"),
        (compressed(bits=8, strategy="channel"), "Q8_0"),
        (compressed("int-quantized", bits=8, strategy="channel"), "Q8_0"),
        (awq(round_zeros=True), "Q4_1"),
        (awq(), "AWQ 4-bit"),
        (gptq(4, 16), "GPTQ 4-bit"),
        (gptq(4, act_order=True), "GPTQ 4-bit"),
        (gptq(4, symmetric=False), "GPTQ 4-bit"),
        (gptq(8, symmetric=False), "GPTQ 8-bit"),
        (compressed(scale=torch.float32, kind="int", bits=4, strategy="channel"), "Q4_0"),
        (bnb4(), "NF4"),
        (bnb4("fp4"), "FP4"),
        (bnb8(), "INT8"),
        (fp8(), "FP8 E4M3"),
        (hqq(), "HQQ 4-bit"),
        (hqq(axis=0), "F32"),
    ],
)
def test_the_grid_that_a_weight_opens_in(method: Method, name: str, tmp_path: Path) -> None:
    tensor, values = opened(tmp_path / "m", method)
    assert tensor.grid.name == name
    np.testing.assert_allclose(tensor.decode(), values, rtol=2.5e-7, atol=1e-9)
    if name.startswith("Q"):
        by_others = quants.dequantize(np.ascontiguousarray(tensor.packed()), GGMLQuantizationType[name])
        np.testing.assert_array_equal(by_others, tensor.decode())


def test_a_scale_that_f16_cannot_hold_keeps_its_own_grid(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "llama", num_hidden_layers=1)
    quantize(folder, compressed())

    def shrink(state: dict[str, torch.Tensor]) -> None:
        name = GATE.removesuffix("weight") + "weight_scale"
        state[name] = state[name].clone()
        state[name][-1, -1] = 1e-30  # BF16 has it, F16 has not; in the last row, so that all have to be looked at

    edit_tensors(folder, shrink)
    tensors = read_hf_weights(folder).tensors
    assert tensors["layers.0.gate.weight"].grid.name == "INT4"
    assert tensors["layers.0.up.weight"].grid.name == "Q4_0"


def test_rows_move_in_the_grid_of_the_checkpoint(tmp_path: Path) -> None:
    """Phi-3 keeps q, k and v in one tensor, and gate and up in another."""
    folder = hf_folder(tmp_path / "m", "phi3")
    expected = quantize(folder, gptq(4, symmetric=False))
    tensors = read_hf_weights(folder).tensors
    fused = expected["model.layers.1.self_attn.qkv_proj.weight"]
    parts = [tensors[f"layers.1.{role}.weight"] for role in ("wq", "wk", "wv")]
    np.testing.assert_allclose(np.concatenate([p.decode() for p in parts]), fused, rtol=2.5e-7, atol=1e-9)
    assert {p.grid.name for p in parts} == {"GPTQ 4-bit"}


@pytest.mark.parametrize(("method", "target"), [(awq(64), "Q4_1"), (hqq(4, 64), "Q4_1"), (awq(), "Q8_0"), (gptq(4, 16), None)])
def test_encoding_keeps_codes_where_the_target_has_them(method: Method, target: str | None, tmp_path: Path) -> None:
    tensor, values = opened(tmp_path / "m", method, intermediate_size=192, head_dim=32)
    if target is None:  # groups of 16 do not make blocks of 32
        assert not recodes(tensor.grid, grid("Q4_0"))
        with pytest.raises(ShapeError, match="codes of GPTQ 4-bit do not fit into Q4_0"):
            recode(tensor.packed(), tensor.grid, grid("Q4_0"))  # type: ignore[arg-type]
        return
    importance = np.linspace(0, 1, values.shape[1], dtype=np.float32)
    kept, error = encoded(tensor, target, importance)
    decoded = grid(target).decode(kept, values.shape[1])
    if target == "Q8_0":
        assert error == 0
        np.testing.assert_array_equal(decoded, tensor.decode())
    else:
        assert 0 < error < 1e-6  # F16 rounds a minimum by up to 2^-11 of it, which is at most 15 steps
        _, by_ggml = encoded(as_float32(tensor), target, importance)
        assert error < by_ggml / 10


def encoded(tensor: LazyTensor, target: str, importance: np.ndarray) -> tuple[np.ndarray, float]:
    """Packed rows, and the relative error that is reported for them."""
    chunks = list(encode_tensor(tensor, grid(target), importance, threads=1, measure=True))
    assert len(chunks) == 1
    assert chunks[0].error is not None
    return chunks[0].packed, chunks[0].error.relative


def test_a_symmetric_export_copies_codes(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "llama", num_hidden_layers=8)  # with eight layers, importance would give one `down` Q4_1
    expected = quantize(folder, gptq(4))
    result = edgeq.export(folder, profile=PROFILE, output=tmp_path / "out", quant="Q4_0", elastic=False)
    assert result.gate is not None
    assert result.gate.passed
    linears = [t for t in result.plan.tensors if t.layer is not None and len(t.shape) == 2]
    assert {(t.action, t.grid.name) for t in linears} == {("copy", "Q4_0")}
    assert set(result.regrid) == {"embed", "head", "total"}
    stored = {t.name: t for t in GGUFReader(result.package / result.artifacts[0].path).tensors}
    down = stored["blk.0.ffn_down.weight"]
    np.testing.assert_array_equal(
        quants.dequantize(down.data, down.tensor_type), expected["model.layers.0.mlp.down_proj.weight"].astype(np.float32)
    )
    assert down.data.tobytes() == read_hf_weights(folder).tensors["layers.0.down.weight"].packed().tobytes()


@pytest.mark.parametrize("quant", ["auto", "Q4_K"])
@pytest.mark.parametrize("method", [bnb4(nested=True), gptq(4, act_order=True), awq()])
def test_exports_pass_the_gate_and_say_what_was_lost(method: Method, quant: str, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "qwen2", hidden_size=256, intermediate_size=256)
    quantize(folder, method)
    result = edgeq.export(folder, profile=PROFILE, output=tmp_path / "out", quant=quant, elastic=False)
    assert result.gate is not None
    assert result.gate.failures == ()
    manifest = read_package(tmp_path / "out").manifest
    assert manifest["source"]["quantization"]["method"] == method.config["quant_method"]
    assert manifest["regrid"] == result.to_json()["regrid"]
    assert {"wq", "down", "total"} <= set(result.regrid)
    kinds = [lost["relative"] for kind, lost in result.regrid.items() if kind != "total"]
    assert min(kinds) <= result.regrid["total"]["relative"] <= max(kinds)


def test_inspect_names_the_method(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "llama")
    quantize(folder, gptq(4, symmetric=False))
    description = edgeq.inspect(folder)
    assert description["quantization"] == {"method": "gptq", "bits": 4, "group_size": 32, "symmetric": False, "format": "gptq"}
    rows = {row["format"]: row for row in description["formats"]}
    assert rows["GPTQ 4-bit"]["tensors"] == 14
    assert rows["GPTQ 4-bit"]["bits_per_weight"] == 4 + 24 / 32  # a 16-bit scale and a zero point in a byte
    assert edgeq.inspect(hf_folder(tmp_path / "float", "llama"))["quantization"] is None
