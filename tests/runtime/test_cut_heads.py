"""Cutting heads of an elastic file: which bytes stay, what happens to rotation, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from test_cut import BIASED, GQA, HEAD_DIM, N_FF, N_KV, N_LAYERS, Made

from edgeq.elastic import Kept
from edgeq.errors import PlanError, SourceError, UnsupportedError
from edgeq.gguf_fields import Field
from edgeq.gguf_file import Header, TensorInfo, read_header
from edgeq.gguf_write import TensorData, write_gguf
from edgeq.grids import F16, F32, GRIDS, Grid
from edgeq.runtime import cut as cut_module
from edgeq.runtime.cut import cut_gguf
from edgeq.runtime.cut_plan import cut_bytes, plan_cut

SMALLER = Kept(n_ff=(N_FF, 64, 0, 32), n_kv=(2, 3, 0, 1), head_dim=HEAD_DIM // 2)


def elastic(
    path: Path, *, grid: Grid = F16, wide: int = 1, fields: tuple[Field, ...] = (), factors: Mapping[str, int] | None = None
) -> Path:
    """An elastic file of random bytes with more fields, and rotary divisors 1, 2, 3, ... of given lengths in front."""
    made = Made(grid, wide=wide)
    tensors = [
        TensorData(name, (n,), F32, lambda n=n: [np.arange(1, n + 1, dtype=np.float32).view(np.uint8)])  # type: ignore[misc]
        for name, n in (factors or {}).items()
    ]
    tensors += [TensorData(name, shape, g, lambda p=p: [p]) for name, (shape, g, p) in made.data.items()]  # type: ignore[misc]
    write_gguf(path, [*made.fields((N_FF * wide,) * N_LAYERS, (N_KV,) * N_LAYERS), *fields], tensors)
    return path


def read(header: Header, name: str) -> np.ndarray:
    info = header.tensors[name]
    rows = int(np.prod(info.shape[:-1]))
    return np.fromfile(header.path, np.uint8, info.nbytes, offset=info.offset).reshape(rows, -1)


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_0", "Q6_K"])
@pytest.mark.parametrize("chunk", [None, 300])
def test_of_every_head_the_first_rows_or_blocks_of_columns_stay(
    name: str, chunk: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = GRIDS[name]
    wide = max(1, 2 * grid.block_size // HEAD_DIM)  # half a head is a whole block
    if chunk is not None:
        monkeypatch.setattr(cut_module, "CHUNK_BYTES", chunk)
    d, kept_d = HEAD_DIM * wide, HEAD_DIM * wide // 2
    kept = Kept(n_ff=tuple(n * wide for n in SMALLER.n_ff), n_kv=SMALLER.n_kv, head_dim=kept_d)
    source = elastic(tmp_path / "elastic.gguf", grid=grid, wide=wide)
    result = cut_gguf(source, tmp_path / "cut.gguf", kept)
    before, after = read_header(source), read_header(tmp_path / "cut.gguf")
    assert result.bytes == after.file_bytes == cut_bytes(before, kept)
    for layer, n_kv in enumerate(kept.n_kv):
        if not n_kv:
            assert not [t for t in after.tensors if t.startswith(f"blk.{layer}.")]
            continue
        for role, heads in (("attn_q", n_kv * GQA), ("attn_k", n_kv), ("attn_v", n_kv)):
            old = read(before, f"blk.{layer}.{role}.weight").reshape(-1, d, grid.row_bytes(before.tensors["token_embd.weight"].shape[1]))
            expected = old[:heads, :kept_d].reshape(heads * kept_d, -1)
            np.testing.assert_array_equal(read(after, f"blk.{layer}.{role}.weight"), expected)
            bias = read(before, f"blk.{layer}.{role}.bias").view(np.uint32).reshape(-1, d)[:heads, :kept_d]
            np.testing.assert_array_equal(read(after, f"blk.{layer}.{role}.bias").view(np.uint32).ravel(), bias.ravel())
        old = read(before, f"blk.{layer}.attn_output.weight")
        expected = old.reshape(len(old), N_KV * GQA, -1)[:, : n_kv * GQA, : grid.row_bytes(kept_d)].reshape(len(old), -1)
        np.testing.assert_array_equal(read(after, f"blk.{layer}.attn_output.weight"), expected)
        np.testing.assert_array_equal(read(after, f"blk.{layer}.attn_output.bias"), read(before, f"blk.{layer}.attn_output.bias"))
    assert len(BIASED) == 7


def test_divisors_and_fields_follow(tmp_path: Path) -> None:
    fields = (
        Field.f32("deci.rope.freq_base", 500.0),
        Field.f32("deci.rope.scaling.attn_factor", 2.0),
        Field.u32("deci.rope.dimension_count", 16),
    )
    source = elastic(tmp_path / "elastic.gguf", fields=fields, factors={"rope_freqs.weight": 8})
    cut_gguf(source, tmp_path / "cut.gguf", SMALLER)
    header = read_header(tmp_path / "cut.gguf")
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        assert header.value(f"deci.{key}") == 8
    assert header.value("deci.rope.scaling.attn_factor") == pytest.approx(2 * 0.5**0.25)
    found = read(header, "rope_freqs.weight").view("<f4").ravel()
    speeds = 500.0 ** -(np.arange(8) / 8) / np.arange(1, 9)  # of 8 pairs
    np.testing.assert_allclose(500.0 ** -(np.arange(4) / 4) / found, speeds[:4], rtol=1e-6)
    assert next(iter(header.tensors)) == "rope_freqs.weight"


def test_divisors_that_were_not_needed_before_come_first(tmp_path: Path) -> None:
    cut_gguf(elastic(tmp_path / "elastic.gguf"), tmp_path / "cut.gguf", SMALLER)
    header = read_header(tmp_path / "cut.gguf")
    assert next(iter(header.tensors)) == "rope_freqs.weight"
    assert header.value("deci.rope.scaling.attn_factor") == pytest.approx(0.5**0.25)
    np.testing.assert_allclose(
        10000.0 ** -(np.arange(4) / 4) / read(header, "rope_freqs.weight").view("<f4").ravel(), 10000.0 ** -(np.arange(4) / 8), rtol=1e-6
    )
    full = dataclasses.replace(SMALLER, head_dim=HEAD_DIM)
    cut_gguf(tmp_path / "elastic.gguf", tmp_path / "full.gguf", full)
    cut_gguf(tmp_path / "elastic.gguf", tmp_path / "same.gguf", dataclasses.replace(full, head_dim=None))
    assert (tmp_path / "full.gguf").read_bytes() == (tmp_path / "same.gguf").read_bytes()


def test_longrope_has_two_sets_of_divisors(tmp_path: Path) -> None:
    kind = (Field.string("deci.rope.scaling.type", "longrope"),)
    names = {"rope_factors_long.weight": 8, "rope_factors_short.weight": 8}
    cut_gguf(elastic(tmp_path / "elastic.gguf", fields=kind, factors=names), tmp_path / "cut.gguf", SMALLER)
    header = read_header(tmp_path / "cut.gguf")
    assert list(header.tensors)[:2] == list(names)
    assert header.tensors["rope_factors_short.weight"].shape == (4,)
    assert "rope_freqs.weight" not in header.tensors
    one = read_header(elastic(tmp_path / "one.gguf", fields=kind, factors={"rope_factors_long.weight": 8}))
    with pytest.raises(SourceError, match=r"one\.gguf: scales RoPE by longrope without rope_factors_long\.weight and rope_factors_short"):
        plan_cut(one, SMALLER)


def test_head_sizes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    header = read_header(elastic(tmp_path / "elastic.gguf"))
    for head_dim in (0, 7, 18):
        message = rf"heads of 16 dimensions cannot be cut to {head_dim}\. Keep an even number from 2 to 16\."
        with pytest.raises(PlanError, match=message):
            plan_cut(header, dataclasses.replace(SMALLER, head_dim=head_dim))
    with pytest.raises(PlanError, match=r"head sizes \[8, 16\] by layer: llama\.cpp has one for all layers\. Keep the same in every layer"):
        plan_cut(header, dataclasses.replace(SMALLER, head_dim=None, head_dims=(16, 8, 16, 16)))
    coarse = read_header(elastic(tmp_path / "coarse.gguf", grid=GRIDS["Q8_0"], wide=4))
    message = r"blk\.0\.attn_output\.weight: heads cut from 64 to 48 columns do not divide into Q8_0 blocks of 32\. Keep another head size"
    with pytest.raises(PlanError, match=message):
        plan_cut(coarse, Kept(n_ff=(384,) * 4, n_kv=(2,) * 4, head_dim=48))


def test_architectures_without_divisors_keep_their_heads(tmp_path: Path) -> None:
    header = read_header(Made(F16, arch="smollm3", biases=False).write(tmp_path / "smollm3.gguf"))
    kept = Kept(n_ff=(64,) * 4, n_kv=(2,) * 4, head_dim=8)
    with pytest.raises(
        PlanError, match=r"heads cannot be cut to 8 dimensions: llama\.cpp's smollm3 architecture has no divisors for RoPE pairs\. Ke"
    ):
        plan_cut(header, kept)


def test_files_whose_rotation_cannot_be_cut_are_refused(tmp_path: Path) -> None:
    header = read_header(elastic(tmp_path / "elastic.gguf", factors={"rope_freqs.weight": 8}))

    def changed(*fields: Field) -> Header:
        return dataclasses.replace(header, fields={**header.fields, **{f.key: f for f in fields}})

    freqs = header.tensors["rope_freqs.weight"]
    short = dataclasses.replace(header, tensors={**header.tensors, freqs.name: dataclasses.replace(freqs, shape=(4,))})
    for broken, error, message in (
        (
            changed(Field.string("deci.rope.scaling.type", "yarn")),
            UnsupportedError,
            r"YaRN scales RoPE pairs by their number, which changes",
        ),
        (
            changed(Field.u32("deci.rope.dimension_count", 8)),
            UnsupportedError,
            r"deci\.rope\.dimension_count is 8, but heads have 16 dimen",
        ),
        (changed(Field.u32("deci.attention.value_length", 8)), UnsupportedError, r"deci\.attention\.value_length is 8, but heads have 16"),
        (
            changed(Field.f32("deci.rope.freq_base", -1.0)),
            SourceError,
            r"deci\.rope\.freq_base is -1\.0, expected a positive number\. Export",
        ),
        (short, SourceError, r"tensor rope_freqs\.weight has shape \[4\] in F32, expected \[8\] in F32\. Export the model again"),
    ):
        with pytest.raises(error, match=message):
            plan_cut(broken, SMALLER)
    assert plan_cut(header, SMALLER).nbytes


def test_divisors_are_read_when_they_are_written(tmp_path: Path) -> None:
    source = elastic(tmp_path / "elastic.gguf", factors={"rope_freqs.weight": 8})
    plan = plan_cut(read_header(source), SMALLER)
    first = plan.tensors[0]
    assert isinstance(first.source, TensorInfo | None) and first.chunks is not None
    source.write_bytes(source.read_bytes()[: read_header(source).data_offset + 4])
    with pytest.raises(SourceError, match=r"elastic\.gguf: ended within rope_freqs\.weight while it was read\. Copy the file again"):
        list(first.chunks())
    source.unlink()
    with pytest.raises(SourceError, match=r"elastic\.gguf: cannot be read: No such file"):
        list(first.chunks())
