"""Sessions on packages with adapters: by name, at any rate, beside patches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from lora_files import SHAPES, write_lora
from tiny_elastic import N_CTX, N_LAYERS, write_tiny_elastic

import edgeq
from edgeq.errors import AdapterError, PackageError, UsageError
from edgeq.gguf_file import read_header
from edgeq.package import record_files
from edgeq.patch_file import write_patch
from edgeq.runtime.cut_adapter import cut_adapter
from edgeq.runtime.elastic_package import open_elastic
from edgeq.runtime.session import load

IDS = [5, 17, 80, 33, 2, 190, 44, 3]
TARGETS = tuple(f"blk.{i}.{role}.weight" for i in range(N_LAYERS) for role in SHAPES)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_elastic(tmp_path_factory.mktemp("elastic") / "p")
    (folder / "adapters").mkdir()
    for i, name in enumerate(("sql", "poems")):
        write_lora(folder / f"adapters/{name}.gguf", rank=3 + i, alpha=2.0, seed=i, targets=TARGETS, arch="deci")
    manifest = json.loads((folder / "manifest.json").read_text())
    records = record_files(folder, sorted((folder / "adapters").iterdir()))
    manifest["adapters"] = [{"name": Path(record.path).stem, **record.to_json()} for record in records]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_adapters_of_a_package_by_name(package: Path) -> None:
    with edgeq.load(package, threads=1, adapter="sql", adapter_budget=1 << 20) as session:
        assert session.adapter_pool.budget_bytes == 1 << 20
        assert {info.name: (info.scale, info.resident) for info in session.adapters} == {"poems": (None, False), "sql": (1.0, True)}
        sql = session.score(IDS)
        session.set_adapter({"poems": 0.5})
        poems = session.score(IDS)
        session.set_adapter(None)
        plain = session.score(IDS)
        with pytest.raises(UsageError, match=r"p has an adapter named 'sql' itself. Choose another name."):
            session.load_adapter(package / "adapters/poems.gguf", "sql")
        session.unload_adapter("sql")
        assert "sql" in [info.name for info in session.adapters], "the package still has it"
        session.set_adapter("sql")
        np.testing.assert_array_equal(session.score(IDS), sql)
    assert min(np.abs(a - b).max() for a, b in ((sql, poems), (sql, plain), (poems, plain))) > 0.5
    with load(package / "tiny.gguf", threads=1, n_ctx=N_CTX, adapter={str(package / "adapters/poems.gguf"): 0.5}) as session:
        np.testing.assert_array_equal(session.score(IDS), poems)
    with pytest.raises(UsageError, match=r"no adapter is named 'code': .*p has 'poems', 'sql'."):
        load(package, adapter="code")


def test_adapters_follow_the_rate(package: Path, tmp_path: Path) -> None:
    elastic = open_elastic(package)
    files = {}
    for rate in (0.2, 0.3):
        size = elastic.at_rate(rate)
        files[rate] = tmp_path / f"{rate}.gguf", tmp_path / f"sql-{rate}.gguf"
        elastic.cut(size, files[rate][0])
        cut_adapter(package / "adapters/sql.gguf", files[rate][1], elastic.path, size.kept, hidden=elastic.elastic.hidden)
    expected = {}
    for rate, (model, adapter) in files.items():
        with load(model, n_ctx=N_CTX, threads=1) as session:
            plain = session.score(IDS)
            session.load_adapter(adapter, "sql")
            session.set_adapter({"sql": 2.0})
            expected[rate] = session.score(IDS)
            assert np.abs(plain - expected[rate]).max() > 0.5
    with load(package, rate=0.2, threads=1, adapter={"sql": 2.0}) as session:
        np.testing.assert_array_equal(session.score(IDS), expected[0.2])
        session.load_adapter(files[0.2][1], "cut")
        session.set_adapter({"cut": 2.0})
        np.testing.assert_array_equal(session.score(IDS), expected[0.2])
        with pytest.raises(AdapterError, match=r"sql-0.2.gguf: changes .* Export the adapter with this package."):
            session.set_rate(0.3)
        assert session.rate == 0.2
        np.testing.assert_array_equal(session.score(IDS), expected[0.2])
        session.set_adapter({"sql": 2.0})
        session.unload_adapter("cut")
        session.set_rate(0.3)
        assert [info.scale for info in session.adapters] == [None, 2.0]
        np.testing.assert_array_equal(session.score(IDS), expected[0.3])
        session.set_adapter(None)
        session.set_adapter({"sql": 2.0})
        session.set_rate(0)
        whole = session.score(IDS)
    with load(package, threads=1, adapter={"sql": 2.0}) as session:
        np.testing.assert_array_equal(session.score(IDS), whole)


def test_a_cut_model_takes_only_adapters_cut_alike(package: Path, tmp_path: Path) -> None:
    elastic = open_elastic(package)
    elastic.cut(elastic.at_rate(0.3), tmp_path / "cut.gguf")
    with (
        load(tmp_path / "cut.gguf", n_ctx=N_CTX) as session,
        pytest.raises(AdapterError, match=r"For a cut model that is an adapter cut alike."),
    ):
        session.load_adapter(package / "adapters/sql.gguf")


def test_patches_are_for_one_size(package: Path, tmp_path: Path) -> None:
    name = "blk.0.ffn_up.weight"
    path = write_patch(tmp_path / "x.eqpatch", {name: (np.arange(50), np.ones(50))}, read_header(package / "tiny.gguf"))
    with edgeq.load(package, threads=1, patchable=True) as session:
        session.apply_patch(path)
        with pytest.raises(UsageError, match=r"patch 'x' is for the size of now. Undo it before changing the rate."):
            session.set_rate(0.3)
        session.undo_patch("x")
        session.set_rate(0.3)
        with pytest.raises(AdapterError, match=r"x.eqpatch: was made for blk.0.ffn_up.weight as F32 \[160, 64\]"):
            session.apply_patch(path)


def test_a_damaged_package(package: Path, tmp_path: Path) -> None:
    manifest = json.loads((package / "manifest.json").read_text())
    manifest["adapters"][0]["bytes"] += 1
    for file in package.iterdir():
        if file.name != "manifest.json":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with load(tmp_path, threads=1) as session, pytest.raises(PackageError, match=r"poems.gguf has [\d,]+ bytes, the manifest says"):
        session.set_adapter("poems")
