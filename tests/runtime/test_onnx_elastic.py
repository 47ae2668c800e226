"""Elastic ONNX packages: what cuts make up for, sizes and budgets, sessions that change their rate, damage, and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_folders import copy_of
from tiny import hf_folder
from tiny_elastic_onnx import write_elastic_onnx

from edgeq import api
from edgeq.compensation import compensate
from edgeq.converters.onnx.read import read_weights
from edgeq.elastic import Kept
from edgeq.errors import PackageError, PlanError, SourceError, UsageError
from edgeq.model import Model
from edgeq.package import read_package
from edgeq.ports import with_sizes
from edgeq.runtime.elastic_package import check_elastic, open_elastic
from edgeq.runtime.onnx_compensated import onnx_compensated
from edgeq.runtime.onnx_cut import cut_onnx
from edgeq.runtime.onnx_elastic import ElasticOnnx
from edgeq.runtime.session import load

IDS = [3, 17, 250, 99, 4, 4, 31]
GRIDS = ("fp32", "fp16", "int8", "int8-asym", "int4", "int4-asym")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_folder(tmp_path_factory.mktemp("sources") / "llama", "llama")


@pytest.fixture(scope="module")
def packages(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    """A folder of packages by grid, and the model that all hold."""
    folder = tmp_path_factory.mktemp("packages")
    for quant in GRIDS:
        model = write_elastic_onnx(folder / quant, source, quant=quant)
    return folder, model


@pytest.fixture
def package(packages: tuple[Path, Model], tmp_path: Path) -> Iterator[Path]:
    yield copy_of(packages[0] / "fp32", tmp_path / "package")


def opened(folder: Path) -> ElasticOnnx:
    elastic = open_elastic(folder)
    assert isinstance(elastic, ElasticOnnx)
    return elastic


@pytest.mark.parametrize("quant", GRIDS)
def test_lost_channels_are_made_up_for(packages: tuple[Path, Model], tmp_path: Path, quant: str) -> None:
    """In floats as `compensate` computes it. In codes, outputs are nearer to those of the whole MLP than with columns copied: by the hidden
    model, whose activations are drawn here, and much nearer with many codes."""
    folder, model = packages
    elastic, kept = opened(folder / quant), Kept(n_ff=(96, 128), n_kv=(2, 2))
    with onnx_compensated(elastic.file, elastic.elastic.hidden, kept, threads=2) as extras:
        cut_onnx(elastic.file, tmp_path / "made_up", kept, extras=extras)
    cut_onnx(elastic.file, tmp_path / "copied", kept)
    whole = read_weights(elastic.path, model.spec)
    cut = {kind: read_weights(tmp_path / kind / "model.onnx", with_sizes(model.spec, kept)) for kind in ("made_up", "copied")}
    for layer, n_kept in enumerate(kept.n_ff):
        hidden, down = elastic.elastic.hidden[layer], whole[f"layers.{layer}.down.weight"].decode()
        columns, bias = compensate(down, hidden, n_kept)
        found, added = (cut["made_up"][f"layers.{layer}.down.{kind}"].decode() for kind in ("weight", "bias"))
        assert np.abs(added - bias).max() <= (1e-5 if quant != "fp16" else 2e-3) * max(1, np.abs(bias).max())
        if quant == "fp32":
            assert np.abs(found - columns).max() <= 1e-6
        rng = np.random.default_rng(layer)
        noise = np.sqrt(hidden.noise) * rng.standard_normal((500, len(hidden.mean)))
        h = hidden.mean + rng.standard_normal((500, hidden.factors.shape[1])) @ hidden.factors.T + noise
        target, copied = h @ down.T, cut["copied"][f"layers.{layer}.down.weight"].decode()
        best = np.square(h[:, :n_kept] @ columns.T + bias - target).mean()
        got = np.square(h[:, :n_kept] @ found.T + added - target).mean()
        without = np.square(h[:, :n_kept] @ copied.T + bias - target).mean()
        assert got < without
        most = {"int4": 0.3, "int4-asym": 0.3, "int8-asym": 0.02}.get(quant, 0.01)  # with zero points, scales stay
        assert got - best <= most * (without - best)


def test_other_weights_are_copied(packages: tuple[Path, Model], tmp_path: Path) -> None:
    elastic, kept = opened(packages[0] / "int4"), Kept(n_ff=(96, 160), n_kv=(2, 2))
    cut_onnx(elastic.file, tmp_path / "copied", kept)
    with onnx_compensated(elastic.file, elastic.elastic.hidden, kept) as extras:
        assert {name.split(".mlp.")[0] for name in extras.replace} == {"model.layers.0"}
        cut_onnx(elastic.file, tmp_path / "made_up", kept, extras=extras)
    a, b = (onnx.load(tmp_path / name / "model.onnx") for name in ("copied", "made_up"))
    differ = [x.name for x, y in zip(a.graph.initializer, b.graph.initializer, strict=True) if x.raw_data != y.raw_data]
    assert differ[0] == "model.layers.0.mlp.down_proj.MatMulNBits.qweight"
    assert differ[-1] == "model.layers.0.mlp.down_proj.Add.bias"
    assert set(differ) <= set(extras.replace)


def test_cuts_have_the_bytes_that_were_foretold_and_are_the_same_on_any_number_of_threads(
    packages: tuple[Path, Model], tmp_path: Path
) -> None:
    for quant in ("fp32", "int4", "int8-asym"):
        elastic = opened(packages[0] / quant)
        size = elastic.at_rate(0.25)
        for threads in (1, 3):
            result = elastic.cut(size, tmp_path / f"{quant}{threads}", threads=threads)
        folders = [tmp_path / f"{quant}{threads}" for threads in (1, 3)]
        assert result.bytes == elastic.bytes_of(size.kept)
        assert result.bytes == sum((folders[0] / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
        assert all((folders[0] / file.name).read_bytes() == file.read_bytes() for file in folders[1].iterdir())


def test_rate_zero_is_the_artifact(package: Path, tmp_path: Path) -> None:
    found = api.cut(package, output=tmp_path / "cut", rate=0.0)
    assert {path.name: path.read_bytes() for path in (tmp_path / "cut").iterdir()} == {
        path.name: path.read_bytes() for path in (package / "tiny-fp32").iterdir()
    }
    assert found.removed_fraction == 0


def test_higher_rates_keep_less_of_the_same(packages: tuple[Path, Model]) -> None:
    elastic = opened(packages[0] / "fp32")
    sizes = [elastic.at_steps(n) for n in range(len(elastic.elastic.ladder.steps) + 1)]
    bytes_of = [elastic.bytes_of(size.kept) for size in sizes]
    assert bytes_of == sorted(bytes_of, reverse=True)
    assert len(set(bytes_of)) == len(bytes_of)


def test_a_budget_takes_the_largest_cut_that_fits(package: Path, tmp_path: Path) -> None:
    elastic = opened(package)
    wanted = elastic.bytes_of(elastic.at_steps(3).kept)
    assert api.cut(package, output=tmp_path / "cut", budget=wanted).bytes == wanted
    assert elastic.at_budget(wanted - 1).n_steps == 4
    with pytest.raises(PlanError, match="below the smallest cut of this package"):
        elastic.at_budget(1000)


def test_sessions_cut_and_change_their_rate(package: Path, tmp_path: Path) -> None:
    for rate in (0.15, 0.3):
        api.cut(package, output=tmp_path / f"{rate}", rate=rate)
    said = {}
    for rate in (0.15, 0.3):
        with load(tmp_path / f"{rate}", n_ctx=64) as session:
            said[rate] = session.score(IDS)
    with load(package, rate=0.15, n_ctx=64) as session:
        assert np.allclose(session.score(IDS), said[0.15], atol=1e-5)
        session.set_rate(0.3)
        assert np.allclose(session.score(IDS), said[0.3], atol=1e-5)
        assert session.rate == 0.3
        session.set_rate(0.0)
        assert not np.allclose(session.score(IDS), said[0.3], atol=1e-3)
    assert not np.allclose(said[0.15], said[0.3], atol=1e-3)


def test_the_smallest_rate_that_fits_is_found(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeq.runtime import fitting

    elastic = opened(package)
    with load(package, rate="auto", n_ctx=64) as session:
        assert session.rate == 0
    needed = fitting.needed_bytes(elastic, fitting_facts(elastic), elastic.at_steps(2), n_ctx=64, kv_type="f32", isa=())
    monkeypatch.setattr(fitting, "available_ram", lambda: needed)
    with load(package, rate="auto", n_ctx=64) as session:
        assert session.removed_fraction == elastic.at_steps(2).removed_fraction
    monkeypatch.setattr(fitting, "available_ram", lambda: 1000)
    with pytest.raises(PlanError, match="even the smallest cut needs"):
        load(package, rate="auto", n_ctx=64)


def fitting_facts(elastic: ElasticOnnx) -> object:
    from edgeq.runtime.engine import read_facts

    return read_facts(elastic.path)


def test_outputs_are_folders(package: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"small.gguf: a cut of an ONNX package is a folder; give a name without .gguf"):
        api.cut(package, output=tmp_path / "small.gguf", rate=0.1)
    with pytest.raises(PackageError, match="is an ONNX folder: what it may be cut to"):
        open_elastic(package / "tiny-fp32")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"])
def test_damage_is_found(package: Path, tmp_path: Path, name: str) -> None:
    path = package / "tiny-fp32" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises((PackageError, SourceError), match=name):
        api.cut(package, output=tmp_path / "cut", rate=0.2)
    assert not (tmp_path / "cut").exists()


def test_files_that_are_mixed_up_are_refused(package: Path, tmp_path: Path) -> None:
    document = json.loads((package / "manifest.json").read_text())
    ladder = json.loads((package / "elastic.json").read_text())
    artifacts = document["artifacts"]
    document["artifacts"] = artifacts[:1]
    (package / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(PackageError, match="has a graph and one file of weights, this one 1 artifacts"):
        open_elastic(package)
    from edgeq.package import record_files

    ladder["ladder"]["n_kv"] = [4, 2]
    ladder["ladder"]["steps"] = []
    (package / "elastic.json").write_text(json.dumps(ladder))
    records = [record for record in document["side_files"] if record["path"] != "elastic.json"]
    side = [*records, record_files(package, [package / "elastic.json"])[0].to_json()]
    (package / "manifest.json").write_text(json.dumps(document | {"artifacts": artifacts, "side_files": side}))
    with pytest.raises(PackageError, match="are not those that the package's ladder starts from"):
        check_elastic(read_package(package))


_MEMORY = """
import resource, sys
import numpy, onnx, hashlib, concurrent.futures, json, tempfile
def rss():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:")) << 10
bare = rss()
from pathlib import Path
from edgeq.runtime.elastic_package import opened_to_cut
with opened_to_cut(Path(sys.argv[1])) as elastic:
    elastic.cut(elastic.at_rate(0.25), Path(sys.argv[2]))
print(rss() - bare, *sorted({"torch", "transformers", "onnxruntime", "onnx_ir", "llama_cpp"} & sys.modules.keys()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_cut_takes_little_memory_and_no_runtime(package: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _MEMORY, str(package), str(tmp_path / "cut")], capture_output=True, text=True, check=True)
    above, *loaded = done.stdout.split()
    assert loaded == []
    assert int(above) <= 150 << 20
