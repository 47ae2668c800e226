"""Adapters inside the quantizer: codes are those of numpy's round and clip, and reach GGUF blocks untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from edgeq.converters.gguf.encode import encode_tensor
from edgeq.deltas.delta import Array, split_rows
from edgeq.deltas.inside import Initial, Inside
from edgeq.deltas.lora import LoRA
from edgeq.errors import EdgeqError, ShapeError, SourceError
from edgeq.grids import grid
from edgeq.group_grids import GroupGrid
from edgeq.tensors import from_values

RNG = np.random.default_rng(0)
N_OUT, N_IN = 24, 128
W0 = RNG.normal(size=(N_OUT, N_IN)).astype(np.float32)
A, B = RNG.normal(size=(4, N_IN)).astype(np.float32), RNG.normal(size=(N_OUT, 4)).astype(np.float32)
MOVED = W0 + 0.1 * B.astype(np.float64) @ A.astype(np.float64)


def halves(groups: int, size: float = 0.3) -> Any:
    """Steps that F16 holds."""
    return (size * RNG.uniform(0.8, 1.2, size=(N_OUT, groups))).astype(np.float16).astype(np.float32)


def wide(values: Array) -> Array:
    return np.repeat(values.astype(np.float64), N_IN // values.shape[1], axis=1)


def inside(**options: Any) -> Inside:
    return Inside(**{"lora": LoRA(a=A, b=B, scale=0.1), "step": halves(4), "low": -8, "high": 7, **options})


STEP32, STEP_ROW, ODD_STEP = halves(4), halves(1), RNG.uniform(0.2, 0.4, size=(N_OUT, 4)).astype(np.float32)
OFFSET = (halves(4) - 0.3).astype(np.float16).astype(np.float32)
LEAST = (-8 * STEP32 + OFFSET).astype(np.float16).astype(np.float32)
EXACT_OFFSET = LEAST + 8 * STEP32  # so that F16 holds the value of code 0 as well
ZERO = RNG.integers(5, 11, size=(N_OUT, 4)).astype(np.float32)
SMALL = halves(4, 0.02)

# kind: (adapter, codes by numpy, values by numpy, the grid it opens in)
KINDS: dict[str, tuple[Inside, Array, Array, str]] = {}


def kind(name: str, delta: Inside, x: Array, values: Callable[[Array], Array], opens: str) -> None:
    zero = 0 if delta.zero is None else wide(delta.zero)
    codes = np.clip(np.round(x) + zero, delta.low, delta.high)
    KINDS[name] = (delta, codes, values(codes).astype(np.float32), opens)


kind("L4Q", inside(step=STEP32), MOVED / wide(STEP32), lambda q: q * wide(STEP32), "Q4_0")
kind("L4Q by row", inside(step=STEP_ROW), MOVED / wide(STEP_ROW), lambda q: q * wide(STEP_ROW), "Q4_0")
kind("L4Q 3-bit", inside(step=STEP32, low=-4, high=3), MOVED / wide(STEP32), lambda q: q * wide(STEP32), "Q4_0")
kind("L4Q 8-bit", inside(step=SMALL, low=-128, high=127), MOVED / wide(SMALL), lambda q: q * wide(SMALL), "Q8_0")
kind(
    "L4Q with offsets",
    inside(step=STEP32, offset=EXACT_OFFSET),
    (MOVED - wide(EXACT_OFFSET)) / wide(STEP32),
    lambda q: q * wide(STEP32) + wide(EXACT_OFFSET),
    "Q4_1",
)
kind(
    "L4Q with offsets beyond F16",
    inside(step=STEP32, offset=OFFSET + np.float32(1e-6)),
    (MOVED - wide(OFFSET + np.float32(1e-6))) / wide(STEP32),
    lambda q: q * wide(STEP32) + wide(OFFSET + np.float32(1e-6)),
    "4-bit with its own steps",
)
kind("L4Q beyond F16", inside(step=ODD_STEP), MOVED / wide(ODD_STEP), lambda q: q * wide(ODD_STEP), "4-bit with its own steps")
kind(
    "EfficientDM",
    inside(step=STEP32, zero=ZERO, low=0, high=15),
    MOVED / wide(STEP32),
    lambda q: (q - wide(ZERO)) * wide(STEP32),
    "4-bit with its own steps",  # some minima take more digits than F16 has
)
kind(
    "EfficientDM at 8",
    inside(step=STEP32, zero=np.full((N_OUT, 4), 8.0), low=0, high=15),
    MOVED / wide(STEP32),
    lambda q: (q - 8) * wide(STEP32),
    "Q4_0",
)


def lr_qat(downcast: Any) -> None:
    x = torch.from_numpy(W0) / torch.from_numpy(ODD_STEP).repeat_interleave(32, 1)
    frozen = {
        "float32": lambda: x,
        "bfloat16": lambda: x.bfloat16().float(),
        "fixed8": lambda: torch.clamp(torch.round(x * 16), -128, 127) / 16,
    }[downcast]()
    change = 0.1 * B.astype(np.float64) @ A.astype(np.float64)
    delta = inside(step=STEP32, initial=Initial(step=ODD_STEP, downcast=downcast))
    kind(f"LR-QAT {downcast}", delta, frozen.double().numpy() + change, lambda q: q * wide(STEP32), "Q4_0")


for each in ("float32", "bfloat16", "fixed8"):
    lr_qat(each)


def ggml_codes(packed: Any, name: str) -> Array:
    """Codes of Q4_0, Q4_1 and Q8_0 blocks, counted as ggml does, read off their bytes."""
    header = {"Q4_0": 2, "Q4_1": 4, "Q8_0": 2}[name]
    blocks = packed.reshape(-1, grid(name).block_bytes)[:, header:]
    if name == "Q8_0":
        return blocks.view(np.int8).reshape(N_OUT, N_IN).astype(np.float64)
    codes = np.concatenate([blocks & 15, blocks >> 4], axis=1).reshape(N_OUT, N_IN).astype(np.float64)
    return codes - 8 if name == "Q4_0" else codes


@pytest.mark.parametrize("name", KINDS)
def test_codes_equal_numpys(name: str) -> None:
    delta, codes, values, opens = KINDS[name]
    np.testing.assert_array_equal(delta.codes(W0.astype(np.float64)), codes)
    assert len(np.unique(codes)) > delta.high - delta.low - 40  # all over the range, for the comparison to mean something
    np.testing.assert_array_equal(delta.apply(W0.astype(np.float64)).astype(np.float32), values)
    tensor = delta.quantized(from_values(W0, origin="w"))
    assert tensor.grid.name == opens
    np.testing.assert_allclose(tensor.decode(), values, rtol=1.2e-7, atol=1e-8)
    np.testing.assert_array_equal(tensor.packed(5, 17), tensor.packed()[5:17])
    assert tensor.packed(3, 3).shape == (0, tensor.row_bytes)
    if isinstance(tensor.grid, GroupGrid):
        stored, _, _ = tensor.grid.unpack(tensor.packed())
        np.testing.assert_array_equal(stored.astype(np.float64) + delta.low, codes)
    else:
        zero = delta.low if opens == "Q4_1" else 0 if delta.zero is None else wide(delta.zero)
        np.testing.assert_array_equal(ggml_codes(tensor.packed(), opens) + zero, codes)
        by_others = gguf.dequantize(np.ascontiguousarray(tensor.packed()), gguf.GGMLQuantizationType[opens])
        np.testing.assert_array_equal(by_others.reshape(N_OUT, N_IN), tensor.decode())


@pytest.mark.parametrize(("name", "target"), [("L4Q beyond F16", "Q4_0"), ("EfficientDM", "Q4_1"), ("L4Q with offsets beyond F16", "Q4_1")])
def test_codes_stay_when_steps_have_to_be_rounded(name: str, target: str) -> None:
    """The carrier's own encoder writes them as they are, and says what rounding the steps has lost."""
    delta, codes, _, _ = KINDS[name]
    chunks = list(encode_tensor(delta.quantized(from_values(W0, origin="w")), grid(target), threads=1, measure=True))
    packed = np.concatenate([chunk.packed for chunk in chunks])
    np.testing.assert_array_equal(ggml_codes(packed, target) + (delta.low if target == "Q4_1" else 0), codes)
    lost = sum(chunk.error.squared for chunk in chunks if chunk.error is not None)
    assert 0 < lost < 1e-5 * sum(chunk.error.norm for chunk in chunks if chunk.error is not None)


@pytest.mark.parametrize("name", ["L4Q", "LR-QAT float32"])
def test_merging_as_a_plain_lora_gives_other_codes(name: str) -> None:
    codes = KINDS[name][1]
    as_lora = LoRA(a=A, b=B, scale=0.1).apply(W0.astype(np.float64)).astype(np.float32)
    measured = gguf.quantize(as_lora, gguf.GGMLQuantizationType.Q4_0)
    assert (ggml_codes(measured, "Q4_0") != codes).mean() > 0.2
    if name.startswith("LR-QAT"):  # even with the trained step: there the change is in units of it
        with_step = np.clip(np.round(as_lora / wide(STEP32)), -8, 7)
        assert (with_step != codes).mean() > 0.05


def test_parts_of_a_fused_module_are_rows() -> None:
    delta, codes, _, _ = KINDS["EfficientDM"]
    parts = split_rows(delta, (("wq", 10), ("wk", 14)))
    for name, rows in (("wq", slice(0, 10)), ("wk", slice(10, 24))):
        part = parts[name]
        assert isinstance(part, Inside)
        np.testing.assert_array_equal(part.codes(W0[rows].astype(np.float64)), codes[rows])
    part = KINDS["LR-QAT bfloat16"][0].rows(4, 9)
    np.testing.assert_array_equal(part.codes(W0[4:9].astype(np.float64)), KINDS["LR-QAT bfloat16"][1][4:9])
    part = KINDS["L4Q with offsets"][0].rows(4, 9)
    np.testing.assert_array_equal(part.codes(W0[4:9].astype(np.float64)), KINDS["L4Q with offsets"][1][4:9])


FAULTS: dict[str, tuple[dict[str, Any], type[EdgeqError], str]] = {
    "step of zero": ({"step": np.zeros((N_OUT, 4))}, SourceError, "steps must be above 0, found 0"),
    "step that is not a number": ({"step": np.full((N_OUT, 4), np.nan)}, SourceError, "steps must be above 0, found nan"),
    "groups": ({"step": np.ones((N_OUT, 5))}, ShapeError, r"steps of shape \[24, 5\] do not divide a matrix of \[24, 128\]"),
    "flat steps": ({"step": np.ones(N_OUT)}, ShapeError, r"steps of shape \[24\] do not divide"),
    "zero points": (
        {"zero": np.ones((N_OUT, 2))},
        ShapeError,
        r"zero points have shape \[24, 2\], steps \[24, 4\]: there must be one each",
    ),
    "broken zero points": ({"zero": np.full((N_OUT, 4), 7.5)}, SourceError, "zero points must be whole numbers"),
    "both": ({"zero": np.ones((N_OUT, 4)), "offset": np.ones((N_OUT, 4))}, SourceError, "zero points or offsets, not both"),
    "unit": (
        {"offset": np.ones((N_OUT, 4)), "initial": Initial(step=np.ones((N_OUT, 4)))},
        SourceError,
        "in units of the step is symmetric",
    ),
    "initial": ({"initial": Initial(step=-np.ones((N_OUT, 4)))}, SourceError, "initial steps must be above 0, found -1"),
    "codes": ({"low": 0, "high": 256}, SourceError, "codes from 0 to 256 are not 2 to 256 different ones"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_quantizers_that_make_no_sense(fault: str) -> None:
    options, error, message = FAULTS[fault]
    with pytest.raises(error, match=message):
        inside(**options)


def test_an_unknown_downcast() -> None:
    with pytest.raises(SourceError, match="downcast is 'int4', expected one of float32, bfloat16, fixed8"):
        Initial(step=ODD_STEP, downcast="int4")  # type: ignore[arg-type]
