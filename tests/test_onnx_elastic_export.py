"""Elastic ONNX exports end to end on tiny models: what a cut of them computes, in every family, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import hf_folder

import edgeq
from edgeq.errors import UnsupportedError
from edgeq.package import read_package

PROFILE = "laptop-cpu"
FAMILIES = ("llama", "qwen2-tied", "qwen3", "phi3-longrope", "gemma3", "smollm3")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"The {i} quick brown fox {i * 7 % 13} jumps over {i * i % 97} lazy dogs." for i in range(900)))
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_elastic_in_each_layer(name: str, text: Path, tmp_path: Path) -> None:
    """In fp32 the gate allows a mean KL of 0.0002 from the source at rate 0, and from the cut's own weights at a quarter."""
    result = edgeq.export(
        hf_folder(tmp_path / "model", name),
        profile=PROFILE,
        output=tmp_path / "out",
        format="onnx",
        quant="fp32",
        calibration=text,
        n_ctx=128,
    )
    assert result.gate is not None and result.gate.cut is not None
    assert result.gate.failures == ()
    assert result.gate.cut.kl_mean <= 2e-4
    manifest = read_package(tmp_path / "out").manifest
    assert manifest["export"]["elastic"] is True
    free = {port: found["freedom"] for port, found in manifest["elastic"]["cuttable"].items()}
    assert free == {"ffn": "per layer", "kv_group": "per layer"} | dict.fromkeys(("layer", "head", "vo", "qk"), "no")
    for size in manifest["elastic"]["sizes"]:
        cut = edgeq.cut(tmp_path / "out", output=tmp_path / f"{size['rate']}", rate=size["rate"])
        assert cut.bytes == size["bytes"]
        assert cut.removed_fraction == pytest.approx(size["removed_fraction"], abs=1e-6)
    with edgeq.load(tmp_path / "0.25") as session:
        assert session.generate("The quick brown fox", max_tokens=4).tokens


@pytest.mark.parametrize("quant", ["int4-b64", "int8-asym", "int4-asym-full"])
def test_blocks_are_cut_whole(quant: str, text: Path, tmp_path: Path) -> None:
    model = hf_folder(tmp_path / "model", "llama", intermediate_size=320, num_attention_heads=8, num_key_value_heads=4, head_dim=32)
    result = edgeq.export(
        model, profile=PROFILE, output=tmp_path / "out", format="onnx", quant=quant, elastic=True, calibration=text, n_ctx=128
    )
    assert result.gate is not None
    assert result.gate.failures == ()
    sizes = [size["bytes"] for size in read_package(tmp_path / "out").manifest["elastic"]["sizes"]]
    assert sizes == sorted(sizes, reverse=True)
    assert [size.rate for size in result.plan.cut_sizes] == [0.05, 0.15, 0.25, 0.35]


def test_the_same_export_gives_the_same_package(text: Path, tmp_path: Path) -> None:
    model = hf_folder(tmp_path / "model", "llama")
    for name in ("a", "b"):
        edgeq.export(model, profile=PROFILE, output=tmp_path / name, format="onnx", quant="int4", calibration=text, n_ctx=128, verify=False)
        edgeq.cut(tmp_path / name, output=tmp_path / f"{name}-cut", rate=0.2)
    for kind in ("", "-cut"):
        files = {
            path.relative_to(tmp_path / f"a{kind}"): path.read_bytes() for path in (tmp_path / f"a{kind}").rglob("*") if path.is_file()
        }
        assert {
            path.relative_to(tmp_path / f"b{kind}"): path.read_bytes() for path in (tmp_path / f"b{kind}").rglob("*") if path.is_file()
        } == files


def test_fixed_packages_are_not_cut(text: Path, tmp_path: Path) -> None:
    model = hf_folder(tmp_path / "model", "llama")
    edgeq.export(
        model,
        profile=PROFILE,
        output=tmp_path / "out",
        format="onnx",
        quant="fp32",
        elastic=False,
        calibration=text,
        n_ctx=128,
        verify=False,
    )
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["export"]["elastic"] is False
    assert not any("down_proj.Add" in str(path) for path in (tmp_path / "out").rglob("*"))
    with pytest.raises(edgeq.errors.PackageError, match="is not elastic: it has one size"):
        edgeq.cut(tmp_path / "out", output=tmp_path / "cut", rate=0.1)


def test_scales_of_whole_rows_are_not_cut(text: Path, tmp_path: Path) -> None:
    model = hf_folder(tmp_path / "model", "llama")
    with pytest.raises(
        UnsupportedError, match=r"w8 has scales for whole rows, of which a cut takes a part. Choose int8 or int4, or --fixed"
    ):
        edgeq.export(model, profile=PROFILE, output=tmp_path / "out", format="onnx", quant="w8", elastic=True, calibration=text)
