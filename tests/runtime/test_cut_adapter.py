"""Adapters cut with their base, run by llama.cpp: equal to the cut of the merged float model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from made_adapters import TOLERANCE, difference, made_adapter, moved, run, write_base
from tiny import hf_folder

from edgeq import ports
from edgeq.compensation import HiddenModel, compensate
from edgeq.converters.adapters.gguf_writer import write_lora
from edgeq.converters.adapters.keep import KeptAdapter, kept_factors
from edgeq.converters.gguf.lowering import lower
from edgeq.converters.sources.hf_folder import open_hf_folder
from edgeq.deltas.adapter import Adapter
from edgeq.deltas.lora import LoRA
from edgeq.deltas.merge import merged
from edgeq.elastic import Kept
from edgeq.errors import AdapterError, EdgeqError, OutputError, PlanError
from edgeq.gguf_fields import Field
from edgeq.gguf_file import read_header
from edgeq.gguf_write import TensorData, write_gguf
from edgeq.grids import F32, GRIDS
from edgeq.model import Model
from edgeq.runtime.cut import cut_gguf
from edgeq.runtime.cut_adapter import compensated_a, cut_adapter, cut_adapter_to_memory
from edgeq.runtime.cut_plan import Extras, Replacement
from edgeq.tensors import from_values

# Of 4 layers: one smaller, one without attention, one gone, one smaller still.
FOUR = {"num_hidden_layers": 4}
KEPT = Kept(n_ff=(96, 64, 0, 32), n_kv=(2, 0, 0, 1))
HEADS = Kept(n_ff=(160, 64, 0, 96), n_kv=(1, 2, 0, 2), head_dim=16)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("models")
    return {name: open_hf_folder(hf_folder(folder / name, name, **FOUR)) for name in ("llama3", "qwen2", "phi3")}


def merged_kept(model: Model, kept: KeptAdapter) -> Model:
    """The model with kept factors added, by the merge of deltas."""
    deltas = {name: LoRA(a=f.a, b=f.b) for name, f in kept.factors.items()}
    return merged(model, [(Adapter(name=kept.name, kind="LORA", deltas=deltas), 1.0)])


def write_cut(path: Path, model: Model, kept: Kept) -> Path:
    """The cut that an export would write of the float model."""
    spec, tensors = ports.cut(model.spec, model.tensors, kept)
    return write_base(path, lower(dataclasses.replace(model, spec=spec, tensors=tensors), elastic=True))


@pytest.mark.parametrize("cut", [KEPT, HEADS], ids=["groups", "heads"])
@pytest.mark.parametrize("family", ["llama3", "qwen2", "phi3"])
def test_cut_base_and_cut_adapter_are_the_cut_of_the_merged_model(family: str, cut: Kept, models: dict[str, Model], tmp_path: Path) -> None:
    model, made = models[family], made_adapter(models[family], (32, 5), outer=True)
    whole, kept = moved(model, kept_factors(made, model), heads=cut.head_dim is not None)
    base, small = write_base(tmp_path / "base.gguf", lower(whole, elastic=True)), tmp_path / "small.gguf"
    cut_gguf(base, small, cut)
    files: dict[str, tuple[Path, Path | None]] = {"base": (small, None)}
    files["merged"] = (write_cut(tmp_path / "merged.gguf", merged_kept(whole, kept), cut), None)
    for grid in ("F32", "F16", "Q8_0"):
        full, part = tmp_path / f"{grid}.gguf", tmp_path / f"{grid}-small.gguf"
        write_lora(full, kept, lower(whole, elastic=True), grid=GRIDS[grid])
        result = cut_adapter(full, part, base, cut)
        assert 0 < result.removed_fraction < 1
        assert result.bytes == part.stat().st_size
        with cut_adapter_to_memory(full, base, cut) as held:
            assert held.path.read_bytes() == part.read_bytes()
        assert not [name for name in read_header(part).tensors if name.startswith("blk.2.")]
        files[grid] = (small, part)
    found = run(files)
    assert difference(found["base"], found["merged"]) > 0.1
    # F32: rounding of sums. F16 and Q8_0: ggml rounds the activations that an adapter meets to 11 and 8 bits as well.
    for grid, tolerance in {"F32": 3 * TOLERANCE, "F16": 1e-2, "Q8_0": 0.1}.items():
        assert difference(found[grid], found["merged"]) < tolerance


def hidden_model(n_ff: int, *, seed: int = 0, rank: int = 6) -> HiddenModel:
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((n_ff, rank)).astype(np.float32)
    return HiddenModel(mean=rng.standard_normal(n_ff).astype(np.float32), factors=factors, noise=np.full(n_ff, 0.1, np.float32))


def test_a_compensated_adapter_reads_what_lost_channels_come_to(models: dict[str, Model], tmp_path: Path) -> None:
    """The base's down has other columns and a bias then; the adapter's a the best without one. Both as float arithmetic has it."""
    model = models["qwen2"]
    kept = kept_factors(made_adapter(model, only=("down", "up")), model)
    low, cut = lower(model, elastic=True), dataclasses.replace(KEPT, n_kv=(2, 2, 0, 2))
    base = write_base(tmp_path / "base.gguf", low)
    write_lora(tmp_path / "lora.gguf", kept, low, grid=F32)
    hidden = {i: hidden_model(160, seed=i) for i in (0, 1, 3)}
    add, replace = {}, {}
    spec, tensors = ports.cut(model.spec, model.tensors, cut)
    for layer, known in hidden.items():
        name, n_ff = f"layers.{layer}.down.weight", cut.n_ff[layer]
        columns, bias = compensate(model.tensors[name].decode(), known, n_ff)
        add[f"blk.{layer}.ffn_down.bias"] = bias
        replace[f"blk.{layer}.ffn_down.weight"] = Replacement(F32, lambda columns=columns: [columns.view(np.uint8)])  # type: ignore[misc]
        factors = kept.factors[name]
        delta = factors.b @ compensated_a(factors.a.astype(np.float32), known, n_ff)
        tensors[name] = from_values(columns + delta, origin=name)
        tensors[f"layers.{layer}.down.bias"] = from_values(bias, origin=name)
        up = f"layers.{layer}.up.weight"
        tensors[up] = from_values(tensors[up].decode() + kept.factors[up].product()[:n_ff], origin=up)
    cut_gguf(base, tmp_path / "small.gguf", cut, extras=Extras(add=add, replace=replace))
    cut_adapter(tmp_path / "lora.gguf", tmp_path / "small-lora.gguf", base, cut, hidden=hidden)
    together = dataclasses.replace(model, spec=dataclasses.replace(spec, biases=spec.biases | {"down"}), tensors=tensors)
    expected = write_base(tmp_path / "merged.gguf", lower(together, elastic=True))
    small = tmp_path / "small.gguf"
    found = run({"base": (small, None), "kept": (small, tmp_path / "small-lora.gguf"), "merged": (expected, None)})
    assert difference(found["base"], found["merged"]) > 0.1
    assert difference(found["kept"], found["merged"]) < 3 * TOLERANCE


def test_the_estimate_is_the_best_one_without_a_constant() -> None:
    """On samples of the factor model itself: as good as least squares on them, better than dropping columns, and than the
    covariances' own estimate, whose constant an adapter has no place for."""
    rng, known, n_kept = np.random.default_rng(1), hidden_model(40), 24
    n = 200_000
    samples = known.mean + rng.standard_normal((n, 6)) @ known.factors.T + rng.standard_normal((n, 40)) * np.sqrt(known.noise)
    a = rng.standard_normal((3, 40)).astype(np.float32)
    target, seen = samples @ a.T, samples[:, :n_kept]

    def error(columns: np.ndarray) -> float:
        return float(np.mean((target - seen @ columns.T) ** 2))

    ours = error(compensated_a(a, known, n_kept))
    fitted = error(np.linalg.lstsq(seen, target, rcond=None)[0].T)
    assert fitted <= ours < 1.01 * fitted
    assert ours < 0.5 * error(a[:, :n_kept])
    assert ours < 0.9 * error(compensate(a, known, n_kept)[0])


def adapter_file(path: Path, tensors: dict[str, tuple[int, int]], *, arch: str = "deci") -> Path:
    fields = [
        Field.string("general.architecture", arch),
        Field.string("general.type", "adapter"),
        Field.string("adapter.type", "lora"),
        Field.f32("adapter.lora.alpha", 0.0),
    ]
    data = [TensorData(name, shape, F32, lambda s=shape: [np.ones(s, np.float32).view(np.uint8)]) for name, shape in tensors.items()]  # type: ignore[misc]
    write_gguf(path, fields, data)
    return path


def test_adapters_of_other_files_are_refused(models: dict[str, Model], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.gguf", lower(models["llama3"], elastic=True))
    out = tmp_path / "out.gguf"
    good = {"blk.0.attn_q.weight.lora_a": (2, 64), "blk.0.attn_q.weight.lora_b": (96, 2)}
    cases: list[tuple[Path, type[EdgeqError], str]] = [
        (
            adapter_file(tmp_path / "arch.gguf", good, arch="llama"),
            AdapterError,
            r"arch\.gguf: is for architecture 'llama', base\.gguf is 'deci'",
        ),
        (
            adapter_file(tmp_path / "wide.gguf", {**good, "blk.0.attn_q.weight.lora_a": (2, 65)}),
            AdapterError,
            r"changes blk\.0\.attn_q\.weight of \[96, 65\], base\.gguf has it as \[96, 64\]\. Export the adapter with this package",
        ),
        (
            adapter_file(tmp_path / "deep.gguf", {name.replace("blk.0", "blk.9"): shape for name, shape in good.items()}),
            AdapterError,
            r"changes blk\.9\.attn_q\.weight of \[96, 64\], base\.gguf has no such tensor",
        ),
        (adapter_file(tmp_path / "half.gguf", dict([*good.items()][:1])), AdapterError, r"blk\.0\.attn_q\.weight\.lora_b is missing"),
        (base, AdapterError, r"general\.type is 'model', expected 'adapter'"),
        (
            adapter_file(tmp_path / "gone.gguf", {name.replace("blk.0", "blk.2"): shape for name, shape in good.items()}),
            PlanError,
            r"gone\.gguf: this cut removes everything that the adapter changes\. Choose a lower rate, or leave the adapter out",
        ),
    ]
    for path, error, message in cases:
        with pytest.raises(error, match=message):
            cut_adapter(path, out, base, KEPT)
        assert not out.exists()
    with pytest.raises(OutputError, match=r"same file as an input"):
        cut_adapter(adapter_file(tmp_path / "good.gguf", good), tmp_path / "good.gguf", base, KEPT)


def test_a_cut_that_takes_nothing_is_the_same_file(models: dict[str, Model], tmp_path: Path) -> None:
    model = models["llama3"]
    low = lower(model, elastic=True)
    base = write_base(tmp_path / "base.gguf", low)
    write_lora(tmp_path / "lora.gguf", kept_factors(made_adapter(model, outer=True), model), low)
    everything = Kept(n_ff=(160,) * 4, n_kv=(2,) * 4)
    result = cut_adapter(tmp_path / "lora.gguf", tmp_path / "same.gguf", base, everything)
    assert result.removed_fraction == 0
    assert (tmp_path / "same.gguf").read_bytes() == (tmp_path / "lora.gguf").read_bytes()


def test_a_cut_of_a_cut_is_the_cut(models: dict[str, Model], tmp_path: Path) -> None:
    model = models["qwen2"]
    low = lower(model, elastic=True)
    base = write_base(tmp_path / "base.gguf", low)
    write_lora(tmp_path / "lora.gguf", kept_factors(made_adapter(model), model), low)
    first, second = Kept(n_ff=(128, 96, 96, 160), n_kv=(2, 2, 1, 1)), Kept(n_ff=(96, 96, 0, 64), n_kv=(1, 2, 0, 1))
    cut_gguf(base, tmp_path / "base1.gguf", first)
    cut_adapter(tmp_path / "lora.gguf", tmp_path / "lora1.gguf", base, first)
    cut_adapter(tmp_path / "lora1.gguf", tmp_path / "lora2.gguf", tmp_path / "base1.gguf", second)
    cut_adapter(tmp_path / "lora.gguf", tmp_path / "once.gguf", base, second)
    assert (tmp_path / "lora2.gguf").read_bytes() == (tmp_path / "once.gguf").read_bytes()
