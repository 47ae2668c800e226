"""Which grids the names of ONNX quants stand for, and which codes of a quantized source they keep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import hf_folder
from tiny_quantized import awq, bnb4, gptq, hqq, quantize

from edgeq.converters.onnx.quants import (
    QUANT_NAMES,
    auto_names,
    choose_grids,
    fallback_notes,
    is_quantized,
    onnx_quant,
)
from edgeq.converters.sources.resolve import open_model
from edgeq.errors import UnsupportedError
from edgeq.families import LINEAR_ROLES
from edgeq.grids import GRIDS, Grid
from edgeq.model import Model
from edgeq.nbits import NBits, answer_for
from edgeq.tensors import LazyTensor

WQ = "layers.0.wq.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_model(hf_folder(tmp_path_factory.mktemp("llama") / "m", "llama"))


def grids(model: Model, name: str, *, half: bool = False) -> dict[str, str]:
    return {tensor: grid.name for tensor, grid in choose_grids(onnx_quant(name), model, half=half).items()}


@pytest.mark.parametrize(
    ("name", "block", "head"),
    [
        ("fp32", "F32", "F32"),
        ("fp16", "F16", "F16"),
        ("int8", "Q8_0", "Q8_0"),
        ("int8-asym", "INT8_B32_ASYM", "INT8_B32_ASYM"),
        ("int8-b128", "INT8_B128", "INT8_B128"),
        ("int4", "Q4_0", "Q8_0"),
        ("int4-asym", "INT4_B32_ASYM", "Q8_0"),
        ("int4-b64", "INT4_B64", "Q8_0"),
        ("int4-asym-b128", "INT4_B128_ASYM", "Q8_0"),
        ("int4-full", "Q4_0", "Q4_0"),
        ("int4-b64-full", "INT4_B64", "INT4_B64"),
    ],
)
def test_names_and_their_grids(llama: Model, name: str, block: str, head: str) -> None:
    chosen = grids(llama, name, half=onnx_quant(name).half)
    assert {chosen[f"layers.1.{role}.weight"] for role in LINEAR_ROLES} == {block}
    assert (chosen["embed.weight"], chosen["head.weight"]) == (head, head)
    assert chosen["final_norm.weight"] == ("F16" if name == "fp16" else "F32")


def test_every_name_is_known_in_any_case_and_some_in_gguf_spelling() -> None:
    for name in QUANT_NAMES:
        assert onnx_quant(name.upper()).name == name
    assert [onnx_quant(name).name for name in ("Q4_0", "q8_0", "F32", "f16", "int4-b32", "int8-asym-b32")] == [
        *("int4", "int8", "fp32", "fp16", "int4", "int8-asym")
    ]


@pytest.mark.parametrize("name", ["Q4_K_M", "int5", "int4-b48", "int8-full", "int4-full-asym", ""])
def test_unknown_names_are_told_the_known_ones(name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"unknown quantization '{name}' for ONNX; known: fp32, fp16, int8, .*source"):
        onnx_quant(name)


def test_every_grid_has_a_kernel(llama: Model) -> None:
    for name in QUANT_NAMES:
        if onnx_quant(name).kind == "blocks":
            for tensor, grid in choose_grids(onnx_quant(name), llama, half=False).items():
                if not grid.is_float:
                    form = answer_for(grid, llama.tensors[tensor].n_cols).form
                    assert isinstance(form, NBits) and not form.minima, (name, tensor)
                    assert grid.fits(llama.tensors[tensor].n_cols)


def test_vectors_are_floats_of_the_graph(llama: Model) -> None:
    assert {grids(llama, "int4", half=half)["layers.1.attn_norm.weight"] for half in (False, True)} == {"F32", "F16"}
    assert choose_grids(onnx_quant("int4"), llama, half=True)[WQ] is GRIDS["Q4_0"]


@pytest.mark.parametrize(
    ("method", "kept_by"),
    [
        (gptq(bits=4, group_size=32), {"int8", "int4", "int4-b64", "source"}),
        (awq(32), {"int8", "int4", "source"}),
        (bnb4("nf4"), {"int8", "int4", "int4-b64", "source"}),
        (hqq(4, 32, as_float=True), {"int8", "source"}),  # zero points between codes: minima, another float for each block
        (gptq(bits=8, group_size=32), {"int8", "source"}),
    ],
    ids=["gptq4", "awq", "nf4", "hqq", "gptq8"],
)
def test_codes_are_kept_where_another_grid_would_not_be_smaller(tmp_path: Path, method: object, kept_by: set[str]) -> None:
    quantize(hf_folder(tmp_path / "m", "llama"), method)  # type: ignore[arg-type]  # a Method, built by the helpers above
    model = open_model(tmp_path / "m")
    own = model.tensors[WQ].grid
    assert is_quantized(model)
    for name in ("fp32", "fp16", "int8", "int4", "int4-b64", "source"):
        chosen = choose_grids(onnx_quant(name), model, half=False)
        assert (chosen[WQ] == own) == (name in kept_by), name
        assert fallback_notes(onnx_quant(name), model, chosen) == ()
    assert grids(model, "source")["head.weight"] == "Q8_0"  # it came in floats


def stored_in(model: Model, grid: Grid) -> Model:
    """The model with all matrices in a grid, of zeros."""

    def empty(tensor: LazyTensor) -> LazyTensor:
        if len(tensor.shape) == 1 or not grid.fits(tensor.n_cols):
            return tensor
        width = grid.row_bytes(tensor.n_cols)
        return LazyTensor(shape=tensor.shape, grid=grid, read=lambda a, b: np.zeros((b - a, width), np.uint8), origin=tensor.origin)

    return replace(model, tensors={name: empty(tensor) for name, tensor in model.tensors.items()})


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("Q8_0", {"int8", "source"}),
        ("Q5_0", {"int8", "source"}),
        ("Q4_1", {"int8", "source"}),
        ("Q4_0", {"int8", "int4", "source"}),
        ("IQ4_NL", set()),
    ],
)
def test_blocks_of_gguf(llama: Model, source: str, names: set[str]) -> None:
    model = stored_in(llama, GRIDS[source])
    for name in ("int8", "int4", "source"):
        assert (grids(model, name)[WQ] == source) == (name in names), name


def test_act_order_has_no_kernel_and_becomes_8_bits(tmp_path: Path) -> None:
    quantize(hf_folder(tmp_path / "m", "llama"), gptq(bits=4, group_size=32, act_order=True))
    model = open_model(tmp_path / "m")
    chosen = choose_grids(onnx_quant("source"), model, half=False)
    assert chosen[WQ].name == "Q8_0"
    (note,) = {note.split(": ", 1)[1] for note in fallback_notes(onnx_quant("source"), model, chosen)}
    assert note.startswith("its groups are not runs of columns (act-order)")
    assert note.endswith("to Q8_0.")


def test_source_is_for_quantized_models(llama: Model) -> None:
    assert not is_quantized(llama)
    with pytest.raises(UnsupportedError, match=r"is not quantized, so there are no codes to keep\. Choose fp16, int8 or int4"):
        grids(llama, "source")


def test_what_auto_tries() -> None:
    listed = ("F16", "Q8_0", "Q6_K", "Q4_K_M", "Q3_K_M")
    assert auto_names(listed, quantized=False) == ("fp16", "int8", "int4")
    assert auto_names(("Q4_K_M", "Q2_K"), quantized=True) == ("source", "int4")
