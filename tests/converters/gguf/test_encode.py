"""Encoding against gguf-py's and llama.cpp's own bytes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_models import made_model, made_spec
from real_llama import quantize

from edgeq import ggml
from edgeq.converters.gguf import encode
from edgeq.converters.gguf.carrier import write_model
from edgeq.converters.gguf.encode import RegridError, copy_tensor, encode_rows, encode_tensor, usable_importance
from edgeq.converters.gguf.lowering import lower
from edgeq.converters.gguf.mixes import QUANTS, choose_grids
from edgeq.converters.sources.gguf import read_gguf_model
from edgeq.errors import MissingDependency, PlanError, ShapeError, SourceError, UnsupportedError
from edgeq.ggml import ENCODABLE
from edgeq.gguf_file import read_header
from edgeq.grids import BF16, F16, F32, GRIDS, Grid, grid
from edgeq.tensors import Floats, LazyTensor, from_values

IN_GGUF_PY = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")
# Grids whose encoder weighs columns; Q8_0 and MXFP4 have nothing to choose.
WEIGHING = tuple(name for name in ENCODABLE if name not in ("Q8_0", "MXFP4"))
# Left out: what is ours alone, and other names for the same file type.
QUANTIZED = tuple(name for name in QUANTS if name not in ("MXFP4", "Q4_K", "Q5_K", "Q3_K"))
LOWERED = lower(made_model(made_spec("llama", n_embd=256, n_ff=288, n_heads=8, n_kv_heads=2, head_dim=32)))
# Squared error relative to the squared norm, for normally distributed values: measured values, rounded up by a fifth.
LARGEST_ERROR = {
    "F32": 0.0, "F16": 6e-8, "BF16": 3.5e-6, "Q8_0": 4e-5, "Q6_K": 5e-4, "Q5_K": 1.7e-3, "Q5_1": 1.6e-3, "Q5_0": 2.2e-3, "Q4_K": 7e-3,
    "Q4_1": 7e-3, "Q4_0": 9.5e-3, "IQ4_NL": 7.5e-3, "IQ4_XS": 7.5e-3, "MXFP4": 1.7e-2, "Q3_K": 2.8e-2, "Q2_K": 1e-1,
}  # fmt: skip


def values(n_rows: int = 24, n_cols: int = 512, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((n_rows, n_cols), dtype=np.float32)


def importance(n_cols: int = 512) -> Floats:
    return np.random.default_rng(9).gamma(0.3, 1.0, n_cols).astype(np.float32)


@pytest.mark.parametrize("name", IN_GGUF_PY)
def test_bytes_equal_those_of_gguf_py(name: str) -> None:
    x = values() * np.logspace(-3, 3, 24, dtype=np.float32)[:, None]
    theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType[name]).view(np.uint8)
    assert np.array_equal(encode_rows(x, grid(name)), theirs)


@pytest.mark.parametrize("name", LARGEST_ERROR)
def test_decoding_gives_back_the_values_up_to_the_grids_error(name: str) -> None:
    x = values()
    packed = encode_rows(x, grid(name))
    assert packed.shape == (24, grid(name).row_bytes(512))
    error = ((grid(name).decode(packed, 512) - x) ** 2).sum() / (x**2).sum()
    assert error <= LARGEST_ERROR[name]
    if name != "F32":
        assert error > LARGEST_ERROR[name] / 2


@pytest.mark.parametrize("name", WEIGHING)
def test_importance_changes_the_bytes_and_lowers_the_weighted_error(name: str) -> None:
    x, w = values(), importance()
    plain, weighted = (encode_rows(x, grid(name), i) for i in (None, w))
    assert not np.array_equal(plain, weighted)
    errors = [(((grid(name).decode(p, 512) - x) ** 2) @ w).sum() for p in (plain, weighted)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", ["Q8_0", "MXFP4", "F16"])
def test_grids_without_choices_ignore_importance(name: str) -> None:
    assert np.array_equal(encode_rows(values(), grid(name)), encode_rows(values(), grid(name), importance()))


@pytest.mark.parametrize("name", ["F16", "Q4_0", "Q4_K", "IQ4_XS"])
def test_neither_threads_nor_chunks_change_a_byte(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = values(301), importance()
    w[:40] = 0
    whole = encode_rows(x, grid(name), w)
    monkeypatch.setattr(encode, "FLOAT_BYTES_IN_FLIGHT", 64 * 512 * 4)
    for threads in (1, 2, 5):
        chunks = list(encode_tensor(from_values(x, origin="x"), grid(name), w, threads=threads))
        assert len(chunks) > 4
        assert np.array_equal(np.concatenate([c.packed for c in chunks]), whole)


def test_at_most_the_allowed_float_values_are_decoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "FLOAT_BYTES_IN_FLIGHT", 12 * 512 * 4)
    reads: list[int] = []
    whole = from_values(values(100), origin="x")

    def read(start: int, stop: int) -> np.ndarray:
        reads.append(stop - start)
        return whole.read(start, stop)

    tensor = LazyTensor(shape=whole.shape, grid=F32, read=read, origin="x")
    assert sum(len(c.packed) for c in encode_tensor(tensor, grid("Q8_0"), threads=3)) == 100
    assert max(reads) * (3 + 1) <= 12


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_file_has_the_bytes_that_llama_quantize_writes(name: str, float_file: Path, quantized: Path, tmp_path: Path) -> None:
    """Without importance. The metadata has the same values too."""
    ours = tmp_path / "ours.gguf"
    write_model(ours, LOWERED, choose_grids(name, LOWERED, has_importance=False), threads=2)
    theirs = quantized / f"{name}.gguf"
    assert tensor_bytes(ours) == tensor_bytes(theirs)
    assert {k: f.value for k, f in read_header(ours).fields.items()} == {k: f.value for k, f in read_header(theirs).fields.items()}


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K_M", "Q8_0"])
def test_a_quantized_source_is_quantized_again_as_llama_quantize_does_it(name: str, quantized: Path, tmp_path: Path) -> None:
    source = quantized / "Q4_1.gguf"
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    low = lower(read_gguf_model(source))
    write_model(ours, low, choose_grids(name, low, has_importance=False), threads=2)
    quantize(source, {theirs: QUANTS[name].file_type})
    assert tensor_bytes(ours) == tensor_bytes(theirs)


def test_a_file_has_the_bytes_that_llama_quantize_writes_with_an_imatrix(float_file: Path, tmp_path: Path) -> None:
    low = LOWERED
    rng = np.random.default_rng(3)
    by_linear = {
        t.importance_key: rng.gamma(0.5, 1.0, t.tensor.n_cols).astype(np.float32) + 0.01
        for t in low.tensors
        if t.importance_key is not None and t.layer is not None
    }
    imatrix = {t.name: by_linear[t.importance_key].tolist() for t in low.tensors if t.layer is not None and t.importance_key is not None}
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    write_model(ours, low, choose_grids("Q4_K_M", low, has_importance=True), by_linear, threads=2)
    quantize(float_file, {theirs: QUANTS["Q4_K_M"].file_type}, imatrix=imatrix)
    assert tensor_bytes(ours) == tensor_bytes(theirs)


def test_the_measured_error_is_that_of_the_decoded_file() -> None:
    x, w = values(40), importance()
    chunks = list(encode_tensor(from_values(x, origin="x"), grid("Q4_K"), w, threads=2, measure=True))
    total = RegridError(0.0, 0.0, 0.0, 0.0)
    for chunk in chunks:
        assert chunk.error is not None
        total += chunk.error
    lost = (grid("Q4_K").decode(np.concatenate([c.packed for c in chunks]), 512) - x).astype(np.float64) ** 2
    assert total.relative == pytest.approx(lost.sum() / (x.astype(np.float64) ** 2).sum(), rel=1e-5)
    weighted = (lost @ w).sum() / ((x.astype(np.float64) ** 2) @ w).sum()
    assert total.weighted_relative == pytest.approx(weighted, rel=1e-5)
    assert RegridError(0.0, 0.0, 0.0, 0.0).relative == RegridError(0.0, 0.0, 0.0, 0.0).weighted_relative == 0.0
    assert all(c.error is None for c in encode_tensor(from_values(x, origin="x"), grid("Q4_K"), threads=2))


@pytest.mark.parametrize("name", WEIGHING)
def test_columns_that_calibration_never_saw_still_decode(name: str) -> None:
    """All zero importance, and zero over whole blocks: the error there stays of the grid's own size."""
    x = values()
    assert np.array_equal(encode_rows(x, grid(name), np.zeros(512, np.float32)), encode_rows(x, grid(name)))
    w = importance()
    w[:256] = 0
    decoded = grid(name).decode(encode_rows(x, grid(name), w), 512)
    assert ((decoded - x)[:, :256] ** 2).sum() / (x[:, :256] ** 2).sum() < 1.5 * LARGEST_ERROR[name]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=32, max_size=32))
def test_usable_importance_is_positive_and_keeps_ratios(raw: list[float]) -> None:
    weights = usable_importance(np.array(raw, dtype=np.float32), 32, origin="w")
    if weights is None:
        assert max(raw) == 0
    else:
        assert np.isfinite(weights).all() and weights.min() > 0
        assert weights[int(np.argmax(raw))] == weights.max()


def test_importance_that_cannot_be_used_is_refused() -> None:
    w = importance()
    with pytest.raises(ShapeError, match=r"ffn: importance has shape \[511\], expected \[512\], one entry per column"):
        encode_rows(values(), grid("Q4_0"), w[:-1], origin="ffn")
    for bad in (-1.0, np.nan, np.inf):
        w[7] = bad
        with pytest.raises(PlanError, match=rf"ffn: importance of column 7 is {bad}, expected a finite number >= 0\. Calibrate again"):
            encode_rows(values(), grid("Q4_0"), w, origin="ffn")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["F16", "Q4_0", "IQ4_NL", "MXFP4"])
def test_a_value_that_is_not_finite_is_refused_by_tensor_name(name: str, bad: float) -> None:
    x = values()
    x[3, 5] = bad
    with pytest.raises(SourceError, match=r"model\.safetensors: blk: [01] values are NaN"):
        list(encode_tensor(from_values(x, origin="model.safetensors: blk"), grid(name), threads=2))


def test_values_beyond_a_float_grid_are_refused_and_those_that_round_into_it_are_not() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, 0] = np.float32(65519.996)
    assert F16.decode(encode_rows(x, F16), 32)[0, 0] == 65504
    x[0, 0] = 65520
    with pytest.raises(PlanError, match=r"up: 65520 is beyond the largest F16 number\. Use BF16 for this model\."):
        encode_rows(x, F16, origin="up")
    x[0, 0] = np.uint32(0x7F7F7FFF).view(np.float32)
    assert np.isfinite(BF16.decode(encode_rows(x, BF16), 32)).all()
    x[0, 0] = np.uint32(0x7F7F8000).view(np.float32)
    with pytest.raises(PlanError, match=r"up: 3\.39618e\+38 is beyond the largest BF16 number\. Use F32 for this model\."):
        encode_rows(x, BF16, origin="up")


def test_bf16_rounds_halves_to_even() -> None:
    x = np.array([[0x3F808000, 0x3F818000, 0x3F808001, 0xBF817FFF]], dtype=np.uint32).view(np.float32)
    assert encode_rows(x, BF16).view(np.uint16).tolist() == [[0x3F80, 0x3F82, 0x3F81, 0xBF81]]


def test_values_whose_block_scale_overflows_are_refused() -> None:
    with pytest.raises(PlanError, match=r"down: values up to 1e\+09 overflow the block scales of Q4_0\. Use BF16 or F32"):
        encode_rows(np.full((2, 64), 1e9, np.float32), grid("Q4_0"), origin="down")


@pytest.mark.parametrize("name", [n for n in GRIDS if n not in LARGEST_ERROR])
def test_grids_that_cannot_be_written_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"w: {name} cannot be written; choose one of F32, F16, BF16, Q4_0,"):
        encode_rows(values(), grid(name), origin="w")


def test_a_vector_is_not_rows() -> None:
    with pytest.raises(ShapeError, match=r"v: shape \[512\] is not a matrix of rows"):
        encode_rows(values()[0], grid("Q8_0"), origin="v")


def test_rows_that_do_not_divide_into_blocks_are_refused() -> None:
    with pytest.raises(ShapeError, match="rows of 500 values do not divide into Q4_K blocks of 256"):
        encode_rows(values(2, 500), grid("Q4_K"))


def test_copying_checks_what_it_copies() -> None:
    packed = encode_rows(values(), grid("Q4_0"))
    tensor = stored(packed, grid("Q4_0"))
    assert np.array_equal(np.concatenate(list(copy_tensor(tensor))), packed)
    broken = packed.copy()
    broken[3, :2] = np.array([np.nan], np.float16).view(np.uint8)
    with pytest.raises(SourceError, match=r"file\.gguf: w: a block scale in Q4_0 is NaN or infinite\. Fetch the model again"):
        list(copy_tensor(stored(broken, grid("Q4_0"))))
    floats = values()
    floats[0, 0] = np.nan
    with pytest.raises(SourceError, match=r"file\.gguf: w: 1 values are NaN"):
        list(copy_tensor(stored(floats.astype(np.float16).view(np.uint8), F16)))


def test_without_the_llama_library_only_block_types_are_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ggml.library.cache_clear()
    try:
        with pytest.raises(MissingDependency, match=r"llama_cpp is not installed. Install it with: pip install 'edgeq\[llama\]'"):
            encode_rows(values(), grid("Q4_0"))
        assert encode_rows(values(), F16).shape == (24, 1024)
    finally:
        ggml.library.cache_clear()


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "f32.gguf"
    write_model(path, LOWERED, choose_grids("F32", LOWERED, has_importance=False))
    return path


@pytest.fixture(scope="module")
def quantized(float_file: Path) -> Path:
    """A folder with the float file in every quant, by llama.cpp."""
    folder = float_file.parent
    quantize(float_file, {folder / f"{name}.gguf": QUANTS[name].file_type for name in QUANTIZED})
    return folder


def tensor_bytes(path: Path) -> dict[str, tuple[str, bytes]]:
    data = path.read_bytes()
    return {t.name: (t.grid.name, data[t.offset : t.offset + t.nbytes]) for t in read_header(path).tensors.values()}


def stored(packed: np.ndarray, g: Grid) -> LazyTensor:
    return LazyTensor(shape=(24, 512), grid=g, read=lambda a, b: packed[a:b], origin="file.gguf: w")
