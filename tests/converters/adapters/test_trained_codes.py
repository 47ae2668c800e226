"""L4Q, EfficientDM and LR-QAT checkpoints from the file to the GGUF file: the codes there are numpy's, untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from peft_oracle import base_model, difference, logits_of
from safetensors.numpy import save_file

from edgeq.converters.adapters.keep import kept_factors
from edgeq.converters.adapters.open import open_adapter
from edgeq.converters.gguf.carrier import write_model
from edgeq.converters.gguf.lowering import lower
from edgeq.deltas.adapter import Adapter
from edgeq.deltas.lora import LoRA
from edgeq.deltas.merge import merged
from edgeq.errors import EdgeqError, ShapeError, SourceError, UnsupportedError, UsageError
from edgeq.grids import F32

DOWN = "model.layers.1.mlp.down_proj"
NAME = "layers.1.down.weight"
RNG = np.random.default_rng(3)
BASE = base_model("llama").tensors[NAME].decode()
N_OUT, N_IN = BASE.shape
STEP = (np.abs(BASE).max() / 9 * RNG.uniform(0.8, 1.2, size=(N_OUT, N_IN // 32))).astype(np.float16).astype(np.float32)
FACTORS = {
    f"{DOWN}.lora_A": RNG.normal(size=(4, N_IN)).astype(np.float32),
    f"{DOWN}.lora_B": (0.1 * RNG.normal(size=(N_OUT, 4))).astype(np.float32),
}
WIDE = np.repeat(STEP.astype(np.float64), 32, axis=1)
PRODUCT = 0.5 * FACTORS[f"{DOWN}.lora_B"].astype(np.float64) @ FACTORS[f"{DOWN}.lora_A"].astype(np.float64)
OPTIONS = {"format": 1, "kind": "L4Q", "bits": 4, "alpha": 2}


def folder(path: Path, tensors: dict[str, Any] | None = None, **options: Any) -> Path:
    path.mkdir()
    save_file({**FACTORS, f"{DOWN}.step": STEP, **(tensors or {})}, path / "checkpoint.safetensors")
    (path / "edgeq_adapter.json").write_text(json.dumps({**OPTIONS, **options}))
    return path


def test_codes_reach_the_file_untouched(tmp_path: Path) -> None:
    model = base_model("llama")
    adapter = open_adapter(folder(tmp_path / "a"), model)
    assert adapter.kind == "L4Q" and adapter.name == "a"
    codes = np.clip(np.round((BASE + PRODUCT) / WIDE), -8, 7)
    result = merged(model, [(adapter, 1.0)])
    assert result.tensors[NAME].grid.name == "Q4_0"
    assert difference(logits_of("llama", result), logits_of("llama", model)) > 0.01

    low = lower(result)
    written = tmp_path / "m.gguf"
    write_model(written, low, {t.name: t.tensor.grid if t.tensor.grid.name == "Q4_0" else F32 for t in low.tensors}, None)
    tensor = next(t for t in GGUFReader(written).tensors if t.name == "blk.1.ffn_down.weight")
    blocks = np.asarray(tensor.data).reshape(-1, 18)
    packed = blocks[:, 2:]
    found = np.concatenate([packed & 15, packed >> 4], axis=1).reshape(N_OUT, N_IN).astype(np.float64) - 8
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(blocks[:, :2].copy().view(np.float16).reshape(STEP.shape), STEP)
    # Negative control: the same factors as a plain LoRA, rounded with steps measured anew.
    plain = merged(model, [(Adapter(name="p", kind="LORA", deltas={NAME: _plain()}), 1.0)])
    again = lower(plain)
    write_model(
        tmp_path / "p.gguf", again, {t.name: F32 for t in again.tensors} | {"blk.1.ffn_down.weight": result.tensors[NAME].grid}, None
    )
    other = next(t for t in GGUFReader(tmp_path / "p.gguf").tensors if t.name == "blk.1.ffn_down.weight")
    theirs = np.asarray(other.data).reshape(-1, 18)[:, 2:]
    assert (theirs != packed).mean() > 0.1


def _plain() -> LoRA:
    return LoRA(a=FACTORS[f"{DOWN}.lora_A"], b=FACTORS[f"{DOWN}.lora_B"], scale=0.5)


def test_every_kind_is_read(tmp_path: Path) -> None:
    model = base_model("llama")
    zero = RNG.integers(6, 10, size=STEP.shape).astype(np.float32)
    initial = (0.9 * STEP).astype(np.float32)
    dm = open_adapter(folder(tmp_path / "dm", {f"{DOWN}.zero_point": zero}, kind="EFFICIENTDM"), model).deltas[NAME]
    wide_zero = np.repeat(zero, 32, axis=1)
    np.testing.assert_array_equal(
        dm.apply(BASE.astype(np.float64)), (np.clip(np.round((BASE + PRODUCT) / WIDE) + wide_zero, 0, 15) - wide_zero) * WIDE
    )
    qat = open_adapter(folder(tmp_path / "qat", {f"{DOWN}.initial_step": initial}, kind="LR-QAT", downcast="float32"), model).deltas[NAME]
    frozen = (BASE / np.repeat(initial, 32, axis=1)).astype(np.float64)
    np.testing.assert_array_equal(qat.apply(BASE.astype(np.float64)), np.clip(np.round(frozen + PRODUCT), -8, 7) * WIDE)
    offset = (0.1 * STEP).astype(np.float32)
    l4q = open_adapter(folder(tmp_path / "l4q", {f"{DOWN}.offset": offset}, bits=3), model).deltas[NAME]
    wide_offset = np.repeat(offset.astype(np.float64), 32, axis=1)
    np.testing.assert_array_equal(
        l4q.apply(BASE.astype(np.float64)), np.clip(np.round((BASE + PRODUCT - wide_offset) / WIDE), -4, 3) * WIDE + wide_offset
    )
    by_row = open_adapter(folder(tmp_path / "row", {f"{DOWN}.step": STEP[:, 0].copy()}), model).deltas[NAME]
    np.testing.assert_array_equal(
        by_row.apply(BASE.astype(np.float64)), np.clip(np.round((BASE + PRODUCT) / WIDE[:, :1]), -8, 7) * WIDE[:, :1]
    )


def test_trained_codes_stand_alone(tmp_path: Path) -> None:
    model = base_model("llama")
    adapter = open_adapter(folder(tmp_path / "a"), model)
    other = Adapter(name="style", kind="LORA", deltas={NAME: _plain()})
    with pytest.raises(UnsupportedError, match=r"'a' has trained the codes of layers\.1\.down\.weight, which 'style' would change"):
        merged(model, [(adapter, 1.0), (other, 1.0)])
    with pytest.raises(UnsupportedError, match=r"so its scale must be 1, not 0\.5"):
        merged(model, [(adapter, 0.5)])
    with pytest.raises(UnsupportedError, match="its codes were trained with it, which a change beside the weights cannot express"):
        kept_factors(adapter, model, rank=4)


FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], type[EdgeqError], str]] = {
    "left over": ({f"{DOWN}.activation_step": STEP}, {}, UnsupportedError, "activation_step is no part of a L4Q adapter"),
    "no zero points": ({}, {"kind": "EFFICIENTDM"}, SourceError, "zero_point is missing, without which EFFICIENTDM weights cannot"),
    "no initial step": ({}, {"kind": "LR-QAT"}, SourceError, "initial_step is missing, without which LR-QAT"),
    "bits": ({}, {"bits": 9}, SourceError, r"edgeq_adapter\.json: bits is 9, expected 2 to 8"),
    "no bits": ({}, {"bits": None}, SourceError, r"edgeq_adapter\.json: bits is missing"),
    "downcast": (
        {f"{DOWN}.initial_step": STEP},
        {"kind": "LR-QAT", "downcast": "int4"},
        SourceError,
        "downcast is 'int4', expected one of",
    ),
    "downcast of another kind": ({}, {"downcast": "float32"}, SourceError, "downcast means nothing for L4Q. Remove it"),
    "shape": ({f"{DOWN}.step": STEP[:4]}, {}, ShapeError, r"down_proj: steps of shape \[4, 5\] do not divide a matrix of \[64, 160\]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_read(fault: str, tmp_path: Path) -> None:
    tensors, options, error, message = FAULTS[fault]
    with pytest.raises(error, match=message):
        open_adapter(folder(tmp_path / "a", tensors, **options), base_model("llama"))


def test_what_has_to_be_said(tmp_path: Path) -> None:
    model = base_model("llama")
    path = folder(tmp_path / "a")
    with pytest.raises(UsageError, match="L4Q trains no nested ranks"):
        open_adapter(path, model, rank=2)
    (path / "edgeq_adapter.json").unlink()
    with pytest.raises(
        SourceError, match=r"may be one of L4Q, EFFICIENTDM, LR-QAT and does not say all that is needed\. Put edgeq_adapter\.json"
    ):
        open_adapter(path, model)
    save_file(FACTORS, path / "checkpoint.safetensors")
    (path / "edgeq_adapter.json").write_text(json.dumps(OPTIONS))
    with pytest.raises(SourceError, match=r"down_proj\.step is missing\. Without its trained step"):
        open_adapter(path, model)
