"""Cutting a package on the device: what is written, what makes up for what is lost, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_elastic import N_FF, N_LAYERS, write_tiny_elastic

from edgeq import ggml
from edgeq.compensation import HiddenModel, compensate, regression
from edgeq.elastic import Kept
from edgeq.errors import MissingDependency, OutputError, PackageError, PlanError, SourceError
from edgeq.gguf_file import read_header
from edgeq.grids import GRIDS
from edgeq.package import record_files
from edgeq.runtime import compensated as module
from edgeq.runtime.compensated import compensated, planned
from edgeq.runtime.cut import cut_gguf
from edgeq.runtime.elastic_package import ElasticPackage, check_elastic, open_elastic
from edgeq.runtime.llama import LlamaModel
from edgeq.runtime.llama_context import LlamaContext

FOLDERS = ("F32", "F16", "Q8_0", "Q4_0")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("elastic")
    made = {quant: write_tiny_elastic(base / quant, quant=quant) for quant in FOLDERS}
    return made | {"qwen3": write_tiny_elastic(base / "qwen3", arch="qwen3"), "mean": write_tiny_elastic(base / "mean", hidden=False)}


def values(path: Path, name: str) -> np.ndarray:
    info = read_header(path).tensors[name]
    packed = np.frombuffer(path.read_bytes(), np.uint8, info.nbytes, info.offset)
    found = info.grid.decode(packed.reshape(-1, info.grid.row_bytes(info.shape[-1])), info.shape[-1])
    return found.reshape(info.shape)


def test_rate_0_is_the_artifact_byte_for_byte(packages: dict[str, Path], tmp_path: Path) -> None:
    for name, package in packages.items():
        elastic = open_elastic(package)
        elastic.cut(elastic.at_rate(0), tmp_path / f"{name}.gguf")
        assert (tmp_path / f"{name}.gguf").read_bytes() == elastic.path.read_bytes()


@pytest.mark.parametrize("quant", ["F32", "F16", "Q8_0"])
def test_down_projections_take_on_what_is_lost(packages: dict[str, Path], quant: str, tmp_path: Path) -> None:
    elastic = open_elastic(packages[quant])
    size, small = elastic.at_rate(0.2), tmp_path / "small.gguf"
    elastic.cut(size, small)
    assert 0 < min(size.kept.n_ff) < N_FF
    for layer, n_ff in enumerate(size.kept.n_ff):
        down = values(elastic.path, f"blk.{layer}.ffn_down.weight")
        columns, bias = compensate(down, elastic.elastic.hidden[layer], n_ff)
        step = {"F32": 0, "F16": 2**-11, "Q8_0": 1 / 127}[quant]  # of a block's largest value
        found = values(small, f"blk.{layer}.ffn_down.weight")
        np.testing.assert_allclose(found, columns, atol=1e-6 + step * np.abs(columns).max())
        np.testing.assert_allclose(values(small, f"blk.{layer}.ffn_down.bias"), bias, atol=2e-5)
        assert np.abs(columns - down[:, :n_ff]).max() > 10 * step  # it is worth something here


@pytest.mark.parametrize("name", ["F32", "Q8_0", "qwen3"])
def test_llama_cpp_takes_a_cut(packages: dict[str, Path], name: str, tmp_path: Path) -> None:
    elastic, small = open_elastic(packages[name]), tmp_path / "small.gguf"
    size = elastic.at_rate(0.35)
    elastic.cut(size, small)
    with LlamaModel.load(small) as model, LlamaContext(model, n_ctx=64) as context:
        logits = context.logits_of(list(range(5, 25)))
        assert model.facts.n_kv_heads == size.kept.n_kv
    with LlamaModel.load(elastic.path) as model, LlamaContext(model, n_ctx=64) as context:
        whole = context.logits_of(list(range(5, 25)))
    assert np.isfinite(logits).all()
    assert not np.allclose(logits, whole, atol=0.1)


def test_without_a_place_for_biases_the_mean_goes_through_the_columns(packages: dict[str, Path], tmp_path: Path) -> None:
    elastic = open_elastic(packages["qwen3"])
    size, small = elastic.at_rate(0.2), tmp_path / "small.gguf"
    elastic.cut(size, small)
    for layer, n_ff in enumerate(size.kept.n_ff):
        down = values(elastic.path, f"blk.{layer}.ffn_down.weight")
        expected = regression(elastic.elastic.hidden[layer], n_ff, intercept=False).columns(down)
        np.testing.assert_allclose(values(small, f"blk.{layer}.ffn_down.weight"), expected, atol=1e-6)
    assert not any(name.endswith("bias") for name in read_header(small).tensors)


def test_columns_that_are_not_merged_stay_as_they_are(packages: dict[str, Path], tmp_path: Path) -> None:
    elastic = open_elastic(packages["Q4_0"])
    kept, small = Kept(n_ff=(64, 96, N_FF), n_kv=(2,) * N_LAYERS), tmp_path / "small.gguf"
    with compensated(elastic.header, elastic.elastic.hidden, kept, merged=frozenset()) as extras:
        assert not extras.replace
        cut_gguf(elastic.path, small, kept, extras=extras)
    for layer, n_ff in enumerate(kept.n_ff):
        down = values(elastic.path, f"blk.{layer}.ffn_down.weight")
        np.testing.assert_array_equal(values(small, f"blk.{layer}.ffn_down.weight"), down[:, :n_ff])
        if n_ff == N_FF:
            assert f"blk.{layer}.ffn_down.bias" not in read_header(small).tensors
            continue
        mean = elastic.elastic.hidden[layer].mean[n_ff:]
        np.testing.assert_allclose(values(small, f"blk.{layer}.ffn_down.bias"), down[:, n_ff:] @ mean, atol=2e-5)


def weaker(elastic: ElasticPackage) -> dict[int, HiddenModel]:
    """Models of hidden activations that tell less of lost channels than the package's: columns then take on less than a step."""
    return {
        layer: HiddenModel(mean=model.mean, factors=model.factors / 20, noise=model.noise)
        for layer, model in elastic.elastic.hidden.items()
    }


def cut_with(elastic: ElasticPackage, target: Path, hidden: dict[int, HiddenModel], n_ff: int) -> None:
    kept = Kept(n_ff=(n_ff,) * N_LAYERS, n_kv=(2,) * N_LAYERS)
    with compensated(elastic.header, hidden, kept) as extras:
        cut_gguf(elastic.header, target, kept, extras=extras)


@pytest.mark.parametrize("name", ["Q5_0", "Q5_1"])
def test_rows_that_move_far_are_packed_anew(name: str, tmp_path: Path) -> None:
    elastic, small = open_elastic(write_tiny_elastic(tmp_path / "p", quant=name)), tmp_path / "small.gguf"
    cut_with(elastic, small, dict(elastic.elastic.hidden), 96)
    columns, _ = compensate(values(elastic.path, "blk.1.ffn_down.weight"), elastic.elastic.hidden[1], 96)
    anew = ggml.decode(ggml.encode(columns, GRIDS[name]), GRIDS[name], 96)
    same = np.isclose(values(small, "blk.1.ffn_down.weight"), anew, atol=1e-6).mean(1) > 0.98  # a value on a border may fall to either side
    assert same.mean() > 0.5


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_codes_of_few_bits_move_within_their_blocks(name: str, tmp_path: Path) -> None:
    elastic, small = open_elastic(write_tiny_elastic(tmp_path / "p", quant=name)), tmp_path / "small.gguf"
    grid, layer, n_ff = GRIDS[name], 1, 96
    cut_with(elastic, small, weak := weaker(elastic), n_ff)
    hidden = weak[layer]
    weight = f"blk.{layer}.ffn_down.weight"
    before, found = values(elastic.path, weight), values(small, weight)
    columns, _ = compensate(before, hidden, n_ff)

    def error(rounded: np.ndarray) -> float:
        """Mean square of what the layer's output is off by, but for its mean, which the bias holds."""
        off = rounded - columns
        return float(((off @ hidden.factors[:n_ff]) ** 2).sum() + (off**2 * hidden.noise[:n_ff]).sum())

    assert error(found) < error(before[:, :n_ff])
    assert error(found) < 1.2 * error(ggml.decode(ggml.encode(columns, grid), grid, n_ff))
    blocks = [
        np.frombuffer(path.read_bytes(), np.uint8, info.nbytes, info.offset).reshape(info.shape[0], -1, grid.block_bytes)
        for path in (elastic.path, small)
        for info in [read_header(path).tensors[weight]]
    ]
    scales = slice(0, 4 if name.endswith("1") else 2)
    same = (blocks[1][..., scales] == blocks[0][:, : n_ff // 32, scales]).all((1, 2))
    assert same.mean() > 0.95  # the others are rows that move far


@pytest.mark.parametrize("threads", [1, 3])
def test_neither_threads_nor_pieces_change_a_byte(
    packages: dict[str, Path], tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    elastic = open_elastic(packages["Q8_0"])
    elastic.cut(elastic.at_rate(0.3), tmp_path / "one.gguf", threads=1)
    monkeypatch.setattr(module, "_PIECE_VALUES", N_FF * 7)
    elastic.cut(elastic.at_rate(0.3), tmp_path / "more.gguf", threads=threads)
    # tiles are of 64 rows whatever the piece, so even sums are the same
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "more.gguf").read_bytes()


def test_a_bias_that_is_there_stays_in(packages: dict[str, Path], tmp_path: Path) -> None:
    """A cut of a cut adds to the biases of the first."""
    elastic = open_elastic(packages["F32"])
    first, second = (Kept(n_ff=(n,) * N_LAYERS, n_kv=(2,) * N_LAYERS) for n in (N_FF, 96))
    from edgeq.runtime.cut_plan import Extras

    bias = np.arange(64, dtype=np.float32)
    with_bias = tmp_path / "bias.gguf"
    cut_gguf(elastic.path, with_bias, first, extras=Extras(add={"blk.1.ffn_down.bias": bias}))
    header = read_header(with_bias)
    with compensated(header, elastic.elastic.hidden, second) as extras:
        cut_gguf(with_bias, tmp_path / "cut.gguf", second, extras=extras)
    alone = compensate(values(with_bias, "blk.1.ffn_down.weight"), elastic.elastic.hidden[1], 96)[1]
    np.testing.assert_allclose(values(tmp_path / "cut.gguf", "blk.1.ffn_down.bias"), alone + bias, atol=2e-5)


@pytest.mark.parametrize("name", [*FOLDERS, "qwen3", "mean"])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.2, 0.35])
def test_sizes_are_known_before_the_cut(packages: dict[str, Path], name: str, rate: float, tmp_path: Path) -> None:
    elastic = open_elastic(packages[name])
    size = elastic.at_rate(rate)
    result = elastic.cut(size, tmp_path / "cut.gguf")
    assert result.bytes == (tmp_path / "cut.gguf").stat().st_size == elastic.bytes_of(size.kept)
    assert result.removed_fraction == pytest.approx(size.removed_fraction)
    assert size.removed_fraction >= rate


def test_a_budget_takes_the_largest_cut_that_fits(packages: dict[str, Path], tmp_path: Path) -> None:
    elastic = open_elastic(packages["F32"])
    sizes = [elastic.bytes_of(elastic.at_steps(n).kept) for n in range(len(elastic.elastic.ladder.steps) + 1)]
    for n in (2, 5, len(sizes) - 1):
        assert elastic.at_budget(sizes[n]).n_steps == n
        assert elastic.at_budget(sizes[n]).rate == elastic.at_budget(sizes[n]).removed_fraction
    assert elastic.at_budget(10**9).n_steps == 0
    with pytest.raises(
        PlanError, match=rf"a budget of {sizes[-1] - 1:,} bytes is below the smallest cut of this package: {sizes[-1]:,} bytes"
    ):
        elastic.at_budget(sizes[-1] - 1)


@pytest.mark.parametrize("rate", [-0.01, 0.36, float("nan")])
def test_rates_outside_the_range_are_refused(packages: dict[str, Path], rate: float) -> None:
    with pytest.raises(PlanError, match=r"rate .* is outside 0 to 0.35"):
        open_elastic(packages["F32"]).at_rate(rate)


def test_cuts_in_memory_are_those_on_disk(packages: dict[str, Path], tmp_path: Path) -> None:
    elastic = open_elastic(packages["Q8_0"])
    elastic.cut(elastic.at_rate(0.2), tmp_path / "cut.gguf")
    with elastic.cut_to_memory(elastic.at_rate(0.2)) as small:
        assert small.path.read_bytes() == (tmp_path / "cut.gguf").read_bytes()


def test_a_single_file_is_refused(packages: dict[str, Path]) -> None:
    with pytest.raises(
        PackageError, match=r"tiny.gguf is a single file: .*is in the package that it came from. Give that folder, or export"
    ):
        open_elastic(packages["F32"] / "tiny.gguf")
    with pytest.raises(PackageError, match=r"is not a folder. A package is the folder"):
        open_elastic(packages["F32"] / "nothing")


def test_packages_of_one_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"is not elastic: it has one size. Export the model again with --elastic"):
        open_elastic(write_tiny_elastic(tmp_path / "p", export={"elastic": False}))


def test_a_damaged_artifact_leaves_nothing(tmp_path: Path) -> None:
    package = write_tiny_elastic(tmp_path / "p")
    path = package / "tiny.gguf"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    elastic = open_elastic(package)
    for rate in (0, 0.2):
        with pytest.raises(PackageError, match=r"tiny.gguf does not match its hash .*Copy the package again"):
            elastic.cut(elastic.at_rate(rate), tmp_path / "cut.gguf")
    with pytest.raises(PackageError, match="does not match its hash"):
        elastic.cut_to_memory(elastic.at_rate(0.2))
    assert not list(tmp_path.glob("*cut.gguf*"))
    path.write_bytes(data[:-100])
    with pytest.raises(PackageError, match=r"tiny.gguf has .* bytes, the manifest says"):
        open_elastic(package)


def test_an_artifact_that_shrinks_while_it_is_read_leaves_nothing(tmp_path: Path) -> None:
    package = write_tiny_elastic(tmp_path / "p", quant="Q8_0")
    elastic = open_elastic(package)
    os.truncate(elastic.path, elastic.path.stat().st_size // 2)
    with pytest.raises(SourceError, match=r"tiny.gguf: ended .* while it was read. Copy the file again"):
        elastic.cut(elastic.at_rate(0.2), tmp_path / "cut.gguf")
    kept = elastic.at_rate(0.2).kept
    with (
        compensated(elastic.header, elastic.elastic.hidden, kept) as extras,
        pytest.raises(SourceError, match=r"tiny.gguf: ended within blk.2.ffn_down.weight while it was read. Copy the file again"),
    ):
        list(extras.replace["blk.2.ffn_down.weight"].chunks())
    elastic.path.unlink()
    with (
        compensated(elastic.header, elastic.elastic.hidden, kept) as extras,
        pytest.raises(SourceError, match=r"tiny.gguf: cannot be read: No such file or directory. Copy the file again"),
    ):
        list(extras.replace["blk.2.ffn_down.weight"].chunks())
    assert not list(tmp_path.glob("*cut.gguf*"))


def test_side_files_of_another_model_are_refused(tmp_path: Path, packages: dict[str, Path]) -> None:
    package = write_tiny_elastic(tmp_path / "p")
    for name in ("elastic.json", "elastic.npz"):
        text = (package / name).read_bytes()
        if name == "elastic.json":
            text = text.replace(b'"n_kv":[2,2,2]', b'"n_kv":[3,2,2]')
        (package / name).write_bytes(text)
    manifest = json.loads((package / "manifest.json").read_text())
    manifest["side_files"] = [r.to_json() for r in record_files(package, [package / "elastic.json", package / "elastic.npz"])]
    (package / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PackageError, match=r"not those that the package's ladder starts from. The package is mixed up; export it again"):
        open_elastic(package)
    from edgeq.package import read_package

    with pytest.raises(PackageError, match="The package is mixed up"):
        check_elastic(read_package(package))
    check_elastic(read_package(packages["F32"]))


def test_the_input_and_existing_files_are_kept(packages: dict[str, Path], tmp_path: Path) -> None:
    elastic = open_elastic(packages["F32"])
    before = elastic.path.read_bytes()
    for force in (False, True):
        with pytest.raises(OutputError, match="the output is the same file as an input"):
            elastic.cut(elastic.at_rate(0.2), elastic.path, force=force)
    link = tmp_path / "link.gguf"
    link.symlink_to(elastic.path)
    with pytest.raises(OutputError, match="the output is the same file as an input"):
        elastic.cut(elastic.at_rate(0.2), link, force=True)
    assert elastic.path.read_bytes() == before
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(OutputError, match=r"exists and is kept. Choose another path or pass --force"):
        elastic.cut(elastic.at_rate(0.2), tmp_path / "there.gguf")
    assert (tmp_path / "there.gguf").read_text() == "mine"


def test_most_files_are_cut_without_the_llama_library(packages: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "llama_cpp" else found(name, *more))
    ggml.library.cache_clear()
    try:
        for quant in ("F32", "F16", "Q4_0"):
            elastic = open_elastic(packages[quant])
            cut_with(elastic, tmp_path / f"{quant}.gguf", weaker(elastic), 96)
        elastic = open_elastic(packages["Q8_0"])
        with pytest.raises(MissingDependency, match=r"llama_cpp is not installed. Install it with: pip install 'edgeq\[llama\]'"):
            elastic.cut(elastic.at_rate(0.2), tmp_path / "cut.gguf")
        assert not list(tmp_path.glob("*cut.gguf*"))
    finally:
        ggml.library.cache_clear()


def test_models_of_hidden_activations_must_fit_their_layer(packages: dict[str, Path]) -> None:
    elastic = open_elastic(packages["F32"])
    model = elastic.elastic.hidden[0]
    short = type(model)(mean=model.mean[:-1], factors=model.factors[:-1], noise=model.noise[:-1])
    kept = Kept(n_ff=(96, N_FF, N_FF), n_kv=(2,) * N_LAYERS)
    with (
        compensated(elastic.header, {0: short}, kept) as extras,
        pytest.raises(PackageError, match=r"blk.0.ffn_down.weight has 160 columns, but the package describes 159 hidden activations"),
    ):
        list(extras.replace["blk.0.ffn_down.weight"].chunks())
    assert planned(elastic.header, {0: short}, kept).add.keys() == {"blk.0.ffn_down.bias"}


_SLOW = """
import sys, time
from pathlib import Path
from edgeq.runtime import cut
from edgeq.runtime.elastic_package import open_elastic
real = cut.read_pieces
def slow(*arguments):
    for piece in real(*arguments):
        print("piece", flush=True)
        time.sleep(0.05)
        yield piece
cut.read_pieces = slow
elastic = open_elastic(Path(sys.argv[1]))
elastic.cut(elastic.at_rate(0.2), Path(sys.argv[2]), force=True)
print("done", flush=True)
"""


@pytest.mark.parametrize("pieces", [0, 1, 9, 25])
def test_a_kill_at_any_point_leaves_no_file_under_the_final_name(packages: dict[str, Path], tmp_path: Path, pieces: int) -> None:
    package, target = packages["Q8_0"], tmp_path / "cut.gguf"
    process = subprocess.Popen([sys.executable, "-c", _SLOW, str(package), str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(pieces):
        assert process.stdout.readline() == "piece\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert not target.exists()
    elastic = open_elastic(package)
    elastic.cut(elastic.at_rate(0.2), target)  # and the next one sweeps up what is left
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]
