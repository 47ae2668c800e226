"""Writing a whole file: plan, bytes, progress, errors."""

from __future__ import annotations

import dataclasses
import filecmp
import hashlib
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf_files import demo_file
from made_models import made_model, made_spec

from edgeq.converters.gguf.carrier import plan_tensors, write_model
from edgeq.converters.gguf.lowering import Lowered, lower
from edgeq.converters.gguf.mixes import QUANTS, choose_grids
from edgeq.converters.sources.gguf import read_gguf_model
from edgeq.errors import PlanError, SourceError
from edgeq.gguf_fields import Field
from edgeq.gguf_file import read_header
from edgeq.grids import GRIDS, Grid, grid
from edgeq.tensors import Floats, from_values

WIDE = {"n_embd": 256, "n_ff": 288, "n_heads": 8, "n_kv_heads": 2, "head_dim": 32}


@pytest.fixture(scope="module")
def low() -> Lowered:
    return lower(made_model(made_spec("llama", **WIDE)))


def grids_of(low: Lowered, name: str) -> dict[str, Grid]:
    return choose_grids(name, low, has_importance=False)


def importance_of(low: Lowered, *, without: str | None = None) -> dict[str, Floats]:
    rng = np.random.default_rng(5)
    keys = {t.importance_key: t.tensor.n_cols for t in low.tensors if t.importance_key is not None and t.layer is not None}
    return {key: rng.gamma(0.3, 1.0, n).astype(np.float32) for key, n in keys.items() if key != without}


@pytest.mark.parametrize("name", QUANTS)
def test_the_plan_says_exactly_what_is_written(name: str, low: Lowered, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    plan = plan_tensors(low, grids_of(low, name))
    written = write_model(path, low, grids_of(low, name))
    assert plan.nbytes == written.nbytes == path.stat().st_size
    assert written.tensors == plan.tensors
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    header = read_header(path)
    assert [(p.name, p.shape, p.grid, p.nbytes) for p in plan.tensors] == [
        (t.name, t.shape, t.grid, t.nbytes) for t in header.tensors.values()
    ]
    assert header.value("general.file_type") == QUANTS[name].file_type
    assert header.value("general.quantization_version") == 2


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_K_M", "IQ4_XS", "MXFP4"])
def test_gguf_py_reads_the_same_tensors_back(name: str, low: Lowered, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_model(path, low, grids_of(low, name))
    reader = GGUFReader(path)
    sources = {t.name: t.tensor for t in low.tensors}
    assert [t.name for t in reader.tensors] == list(sources)
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["llama.attention.key_length"].contents() == 32
    for t in reader.tensors:
        source = sources[t.name].decode()
        assert tuple(reversed(t.shape.tolist())) == source.shape
        packed = np.array(t.data).view(np.uint8).reshape(sources[t.name].n_rows, -1)
        decoded = GRIDS[t.tensor_type.name].decode(packed, source.shape[-1]).reshape(source.shape)
        error = ((decoded - source) ** 2).sum() / (source**2).sum()
        assert error < (0.02 if t.tensor_type.name not in ("F32", "F16", "BF16") else 1e-5)


def test_importance_reaches_the_tensor_it_was_measured_for(low: Lowered, tmp_path: Path) -> None:
    """Weighted errors fall for every block matrix, and a different importance gives a different file."""
    grids, importance = grids_of(low, "Q4_0"), importance_of(low)
    plain = write_model(tmp_path / "a.gguf", low, grids, measure=True)
    weighted = write_model(tmp_path / "b.gguf", low, grids, importance, measure=True)
    assert plain.sha256 != weighted.sha256
    sources = {t.name: t for t in low.tensors}
    files = [read_gguf_model(tmp_path / n).tensors for n in ("a.gguf", "b.gguf")]
    for name, t in sources.items():
        if t.importance_key in importance and t.role in ("wo", "wv", "down", "gate", "up"):
            source = lower_source(low, name)
            errors = [((f[f"layers.{t.layer}.{t.role}.weight"].decode() - source) ** 2) @ importance[t.importance_key] for f in files]
            assert errors[1].sum() < errors[0].sum(), name
            assert weighted.errors[name].weighted_squared / weighted.errors[name].weighted_norm < plain.errors[name].relative * 1.2


def lower_source(low: Lowered, name: str) -> Floats:
    return next(t for t in low.tensors if t.name == name).tensor.decode()


def test_errors_are_measured_on_request_and_only_where_something_is_encoded(low: Lowered, tmp_path: Path) -> None:
    grids = grids_of(low, "Q4_K_M")
    unmeasured = write_model(tmp_path / "a.gguf", low, grids)
    measured = write_model(tmp_path / "b.gguf", low, grids, measure=True)
    assert unmeasured.errors == {}
    assert unmeasured.sha256 == measured.sha256
    assert measured.errors.keys() == {t.name for t in measured.tensors if t.action == "encode"}
    assert all(0 < e.relative < 0.02 for e in measured.errors.values())


def test_actions_copy_what_stays_and_encode_what_changes(low: Lowered, tmp_path: Path) -> None:
    write_model(tmp_path / "a.gguf", low, grids_of(low, "Q4_K_M"))
    again = lower(read_gguf_model(tmp_path / "a.gguf"))
    plan = plan_tensors(again, grids_of(again, "Q4_K_M"))
    assert {t.action for t in plan.tensors} == {"copy"}
    plan = plan_tensors(again, grids_of(again, "Q4_K"))
    changed = {t.name: (t.source_grid.name, t.grid.name) for t in plan.tensors if t.action == "encode"}
    assert changed == {"blk.1.attn_v.weight": ("Q6_K", "Q4_K"), "blk.1.ffn_down.weight": ("Q8_0", "Q5_0")}


def test_an_unchanged_file_keeps_what_it_says_about_its_quantization(low: Lowered, tmp_path: Path) -> None:
    """Even if our own naming would say something else, or it says nothing."""
    write_model(tmp_path / "a.gguf", low, grids_of(low, "Q8_0"))
    again = lower(read_gguf_model(tmp_path / "a.gguf"))
    silent = dataclasses.replace(again, fields=tuple(f for f in again.fields if f.key != "general.file_type"))
    write_model(tmp_path / "b.gguf", silent, grids_of(again, "Q8_0"))
    assert "general.file_type" not in read_header(tmp_path / "b.gguf").fields
    write_model(tmp_path / "c.gguf", silent, grids_of(again, "Q4_0"))
    assert read_header(tmp_path / "c.gguf").value("general.file_type") == 2


def test_the_sources_alignment_is_kept(low: Lowered, tmp_path: Path) -> None:
    wide = dataclasses.replace(low, alignment=64, fields=(*low.fields, Field.u32("general.alignment", 64)))
    write_model(tmp_path / "a.gguf", wide, grids_of(low, "Q4_0"))
    again = lower(read_gguf_model(tmp_path / "a.gguf"))
    assert again.alignment == 64
    written = write_model(tmp_path / "b.gguf", again, grids_of(again, "Q5_0"))
    assert written.nbytes == plan_tensors(again, grids_of(again, "Q5_0")).nbytes
    assert all(t.offset % 64 == 0 for t in read_header(tmp_path / "b.gguf").tensors.values())


def test_progress_counts_the_bytes_of_the_file(low: Lowered, tmp_path: Path) -> None:
    seen: list[tuple[str, float, float]] = []
    written = write_model(tmp_path / "m.gguf", low, grids_of(low, "Q4_0"), progress=lambda *args: seen.append(args))
    assert {step for step, _, _ in seen} == {"write"}
    done = [d for _, d, _ in seen]
    assert done == sorted(done)
    assert len(set(done)) > len(low.tensors) / 2
    assert seen[-1] == ("write", written.nbytes, written.nbytes)


def test_what_cannot_be_laid_out_is_refused_before_the_file_is_opened(low: Lowered, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    grids = grids_of(low, "Q4_0")
    with pytest.raises(PlanError, match=r"blk\.1\.ffn_down\.weight: no grid was chosen for it"):
        write_model(path, low, {k: g for k, g in grids.items() if k != "blk.1.ffn_down.weight"})
    message = r"blk\.1\.ffn_down\.weight: rows of 288 values do not divide into Q4_K blocks of 256\. Keep a multiple of 256, or use F16"
    with pytest.raises(PlanError, match=message):
        write_model(path, low, grids | {"blk.1.ffn_down.weight": grid("Q4_K")})
    message = r"blk\.0\.ffn_up\.weight: importance has no entry 'layers\.0\.up'\. Calibrate this model, or write it without importance"
    with pytest.raises(PlanError, match=message):
        write_model(path, low, grids, importance_of(low, without="layers.0.up"))
    assert not path.exists()


def test_a_broken_weight_is_named(low: Lowered, tmp_path: Path) -> None:
    values = np.zeros((288, 256), np.float32)
    values[200, 3] = np.nan
    broken = lower(made_model(made_spec("llama", **WIDE), tensors={"layers.1.gate.weight": from_values(values, origin="shard: gate")}))
    for name in ("F32", "F16", "Q4_0"):
        with pytest.raises(SourceError, match="shard: gate: 1 values are NaN"):
            write_model(tmp_path / "m.gguf", broken, grids_of(broken, name))


def test_the_demo_in_its_own_grids_is_the_same_file_again(tmp_path: Path) -> None:
    source = demo_file()
    demo = lower(read_gguf_model(source))
    written = write_model(tmp_path / "demo.gguf", demo, grids_of(demo, "Q4_1"))
    assert {t.action for t in written.tensors} == {"copy"}
    assert filecmp.cmp(source, tmp_path / "demo.gguf", shallow=False)
