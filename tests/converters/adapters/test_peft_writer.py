"""Squeezed adapters as PEFT loads them, as edgeq reads them back, and as codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_adapters import made_adapter
from peft_oracle import TOLERANCE, base_folder, base_model, difference, logits, logits_of
from tiny import hf_model

from edgeq.codec import Coded, encode
from edgeq.converters.adapters import coded as coded_module
from edgeq.converters.adapters.coded import CODED, CodedTensors, load_coded, read_coded, save_coded, save_tensors
from edgeq.converters.adapters.keep import kept_factors
from edgeq.converters.adapters.peft import CONFIG, WEIGHTS, read_peft_folder
from edgeq.converters.adapters.peft_writer import by_module, by_tensor, decoded_folder, write_coded_folder, write_peft_folder
from edgeq.deltas.adapter import Adapter
from edgeq.deltas.delta import Factors
from edgeq.deltas.lora import LoRA
from edgeq.deltas.merge import merged
from edgeq.errors import OutputError, PlanError, SourceError, UnsupportedError
from edgeq.squeeze import squeeze


def peft_logits(family: str, folder: Path) -> Any:
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(hf_model(base_folder(family)), str(folder)).eval())


def ours(family: str, modules: dict[str, Factors]) -> Any:
    """Logits of the model with these factors merged."""
    model = base_model(family)
    deltas = {name: LoRA(a=f.a, b=f.b) for name, f in by_tensor(model.spec, modules).items()}
    return logits_of(family, merged(model, [(Adapter(name="made", kind="LORA", deltas=deltas), 1.0)]))


def module_factors(family: str, ranks: tuple[int, ...] = (2, 5, 3)) -> dict[str, Factors]:
    model = base_model(family)
    return by_module(model.spec, kept_factors(made_adapter(model, ranks, outer=not model.spec.tied), model).factors)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_peft_loads_what_was_squeezed(family: str, tmp_path: Path) -> None:
    """Ranks differ by module after an energy was kept; embedding and head are among them."""
    model, whole = base_model(family), module_factors(family, (8, 6))
    left = {path: module.factors for path, module in squeeze(whole, energy=0.8).items() if module.factors is not None}
    assert len({factors.rank for factors in left.values()}) > 1
    write_peft_folder(tmp_path / "out", left, model.spec, base_name="tiny/model")
    found = peft_logits(family, tmp_path / "out")
    assert difference(found, logits(hf_model(base_folder(family)))) > 0.1
    assert difference(found, ours(family, left)) < TOLERANCE
    assert difference(found, ours(family, whole)) > 1e-3  # a fifth of the energy has gone
    adapter = read_peft_folder(tmp_path / "out", model)
    assert adapter.base_name == "tiny/model"
    assert difference(found, logits_of(family, merged(model, [(adapter, 1.0)]))) < TOLERANCE
    again = by_module(model.spec, kept_factors(adapter, model).factors)
    assert {path: factors.rank for path, factors in again.items()} == {path: factors.rank for path, factors in left.items()}


def test_a_module_without_anything_left_is_no_target(tmp_path: Path) -> None:
    model, whole = base_model("llama"), module_factors("llama")
    whole["model.layers.1.self_attn.k_proj"] = Factors(a=np.zeros((2, 64)), b=np.zeros((48, 2)))
    squeezed = squeeze(whole, budget=10_000)
    left = {path: module.factors for path, module in squeezed.items() if module.factors is not None}
    assert "model.layers.1.self_attn.k_proj" not in left
    write_peft_folder(tmp_path / "out", left, model.spec, base_name=None)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["target_modules"] == list(left)
    assert difference(peft_logits("llama", tmp_path / "out"), ours("llama", left)) < TOLERANCE
    assert sum(module.nbytes for module in squeezed.values()) <= 10_000


def test_16_bits_halve_the_file(tmp_path: Path) -> None:
    model, whole = base_model("llama"), module_factors("llama")
    for bits in (16, 32):
        write_peft_folder(tmp_path / str(bits), whole, model.spec, base_name=None, bits=bits)  # type: ignore[arg-type]
    small, large = ((tmp_path / name / WEIGHTS).stat().st_size for name in ("16", "32"))
    assert small < 0.6 * large
    assert difference(peft_logits("llama", tmp_path / "16"), peft_logits("llama", tmp_path / "32")) < 1e-2


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_come_back_as_the_numbers_they_stand_for(bits: int, tmp_path: Path) -> None:
    model, whole = base_model("llama"), module_factors("llama", (8,))
    squeezed = squeeze(whole, bits=bits)
    write_coded_folder(tmp_path / "coded", squeezed, model.spec, base_name="tiny/model")
    decoded_folder(tmp_path / "coded", tmp_path / "decoded")
    expected = ours("llama", {path: module.factors for path, module in squeezed.items() if module.factors is not None})
    assert difference(peft_logits("llama", tmp_path / "decoded"), expected) < TOLERANCE
    payload = (tmp_path / "coded" / CODED).stat().st_size
    assert payload < sum(module.nbytes for module in squeezed.values()) + 400 * len(whole)  # names and metadata
    # Read in place of numbers by edgeq's own reader.
    adapter = read_peft_folder(tmp_path / "coded", model)
    assert difference(logits_of("llama", merged(model, [(adapter, 1.0)])), expected) < TOLERANCE


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    model, whole = base_model("llama"), module_factors("llama")
    for name in ("a", "b"):
        write_peft_folder(tmp_path / name, whole, model.spec, base_name=None)
        write_coded_folder(tmp_path / f"{name}-coded", squeeze(whole, bits=4), model.spec, base_name=None)
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (tmp_path / "a-coded" / CODED).read_bytes() == (tmp_path / "b-coded" / CODED).read_bytes()
    with pytest.raises(OutputError, match=r"a exists and is kept"):
        write_peft_folder(tmp_path / "a", whole, model.spec, base_name=None)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    spec = base_model("llama").spec
    with pytest.raises(PlanError, match=r"the adapter changes nothing, so there is nothing to write"):
        write_peft_folder(tmp_path / "out", {}, spec, base_name=None)
    huge = {"model.layers.0.self_attn.q_proj": Factors(a=np.full((1, 64), 1e6), b=np.ones((96, 1)))}
    with pytest.raises(PlanError, match=r"q_proj: factors are beyond the largest 16-bit number\. Use 32 bits\."):
        write_peft_folder(tmp_path / "out", huge, spec, base_name=None, bits=16)
    assert not (tmp_path / "out").exists()


def made_codes(path: Path) -> Coded:
    coded = encode(np.arange(12, dtype=np.float32).reshape(3, 4), 2)
    save_coded(path, {"x": coded})
    return coded


def test_damaged_files_of_codes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / CODED
    coded = made_codes(path)
    np.testing.assert_array_equal(load_coded(path)["x"].codes, coded.codes)
    assert read_coded(path)["x"].shape == (3, 4)
    whole = path.read_bytes()
    for cut in (0, 7, 40, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(SourceError):
            load_coded(path)
    codes = {"x": coded.codes}

    def document(**changes: Any) -> str:
        return json.dumps({"version": 1, "tensors": [[2, [3, 4], 0.0, 1.0]], **changes})

    cases: list[tuple[str, type[Exception], str]] = [
        ("{", SourceError, r"its edgeq\.codec is not valid JSON"),
        (document(version=2), UnsupportedError, r"version 2 of edgeq\.codec, expected 1\. Use the edgeq that wrote the file"),
        (document(tensors=[]), SourceError, r"its metadata describes 0 tensors, it holds 1\. Get the file again"),
        (document(tensors=[[2, [3, 5], 0.0, 1.0]]), SourceError, r"x is no coded tensor \(3 bytes of 2-bit codes"),
        (document(tensors=[[3, [3, 4], 0.0, 1.0]]), SourceError, r"x is no coded tensor \(3 bits per value are not supported"),
        (document(tensors=[[2, [3, -4], 0.0, 1.0]]), SourceError, r"x is no coded tensor"),
        (document(tensors=[[2, "no", 0.0, 1.0]]), SourceError, r"x is no coded tensor"),
        (document(tensors=[5]), SourceError, r"x is no coded tensor"),
    ]
    for text, error, message in cases:
        save_tensors(path, codes, key=coded_module.KEY, value=text)
        with pytest.raises(error, match=message):
            load_coded(path)
    save_tensors(path, codes)
    with pytest.raises(SourceError, match=r"has no edgeq\.codec in its metadata"):
        load_coded(path)
    made_codes(path)
    with pytest.raises(SourceError, match=r"x should hold whole numbers, which are never coded"):
        CodedTensors(path).take_indices("x")
