"""Sessions on elastic packages: loaded at a rate, and taken to another one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_elastic import N_CTX, write_tiny_elastic
from tiny_gguf import write_tiny_gguf

import edgeq
from edgeq.errors import PackageError, PlanError, RuntimeFailure, UsageError
from edgeq.runtime import fitting
from edgeq.runtime import session as module
from edgeq.runtime.cut_cache import process_cuts
from edgeq.runtime.elastic_package import open_elastic
from edgeq.runtime.llama import LlamaModel
from edgeq.runtime.llama_context import LlamaContext
from edgeq.runtime.session import Session, load

IDS = [5, 17, 80, 33, 2, 190, 44, 3]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_elastic(tmp_path_factory.mktemp("elastic") / "p")


@pytest.fixture(scope="module")
def cuts(package: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    folder, elastic = tmp_path_factory.mktemp("cuts"), open_elastic(package)
    paths = {rate: folder / f"{rate}.gguf" for rate in (0.0, 0.2, 0.3)}
    for rate, path in paths.items():
        elastic.cut(elastic.at_rate(rate), path)
    return paths


def scores(path: Path) -> np.ndarray:
    with load(path, n_ctx=N_CTX) as session:
        return session.score(IDS)


def test_a_session_at_a_rate_is_that_of_the_cut_file(package: Path, cuts: dict[float, Path]) -> None:
    found = {}
    for rate, path in cuts.items():
        with edgeq.load(package, rate=rate) as session:
            found[rate] = session.score(IDS)
            np.testing.assert_array_equal(found[rate], scores(path))
            assert session.rate == rate
            assert session.removed_fraction == open_elastic(package).at_rate(rate).removed_fraction
            assert session.n_ctx == N_CTX
    assert np.abs(found[0.0] - found[0.2]).max() > 1e-3
    assert np.abs(found[0.3] - found[0.2]).max() > 1e-3


def test_without_a_rate_it_is_the_artifact(package: Path, cuts: dict[float, Path]) -> None:
    with load(package) as session:
        np.testing.assert_array_equal(session.score(IDS), scores(cuts[0.0]))
        assert (session.rate, session.removed_fraction) == (0.0, 0.0)
        assert session.model.path == package / "tiny.gguf"


def test_the_rate_changes_and_settings_stay(package: Path, cuts: dict[float, Path]) -> None:
    with load(package, rate=0.2, n_ctx=96, threads=1, kv_type="f32") as session:
        session.generate(IDS, max_tokens=4)
        session.set_rate(0.3)
        settings = (session.n_ctx, session.context.n_ctx, session.context.threads, session.context.kv_type)
        assert settings == (96, 96, 1, "f32")
        assert (session.rate, session.context.n_past) == (0.3, 0)
        with load(cuts[0.3], n_ctx=96, threads=1, kv_type="f32") as other:
            np.testing.assert_array_equal(session.score(IDS), other.score(IDS))
            completion = session.generate(IDS, max_tokens=6)
            assert completion.tokens == other.generate(IDS, max_tokens=6).tokens
        assert session.memory().model_bytes == sum(t.nbytes for t in open_header(cuts[0.3]))
        session.set_rate(0)
        assert session.model.path == package / "tiny.gguf"
        assert session.generate(IDS, max_tokens=6).timings.reused_tokens == 0


def open_header(path: Path) -> list:
    from edgeq.gguf_file import read_header

    return list(read_header(path).tensors.values())


def test_a_rate_of_the_same_size_keeps_the_cache(package: Path) -> None:
    with load(package, rate=0.2) as session:
        session.generate(IDS, max_tokens=2)
        model = session.model
        session.set_rate(0.2001)
        assert session.model is model
        assert session.rate == 0.2001
        assert session.generate(IDS, max_tokens=2).timings.reused_tokens == len(IDS) - 1


def test_memory_reports_the_cut(package: Path) -> None:
    process_cuts().make_room()
    with load(package) as session:
        whole = session.memory()
        assert whole.cuts_bytes == 0
        session.set_rate(0.3)
        small = session.memory()
        cut = open_elastic(package).bytes_of(open_elastic(package).at_rate(0.3).kept)
        assert small.cuts_bytes == cut + session.model.size_bytes  # both are kept for the next time
        assert small.model_bytes < whole.model_bytes
        assert small.kv_bytes <= whole.kv_bytes
        assert small.to_json()["rss_shmem"] is None or small.to_json()["rss_shmem"] > 0


def test_the_second_load_cuts_nothing(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(package, rate=0.25).close()
    from edgeq.runtime.elastic_package import ElasticGguf

    def cut(*_: object, **__: object) -> None:
        raise AssertionError("cut again")

    monkeypatch.setattr(ElasticGguf, "cut_to_memory", cut)
    with load(package, rate=0.25) as session:
        assert session.generate(IDS, max_tokens=2).tokens


def test_sessions_share_what_is_loaded(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process_cuts().make_room()
    first = load(package, rate=0.25)
    said = first.generate(IDS, max_tokens=4).tokens
    monkeypatch.setattr(LlamaModel, "load", lambda *_, **__: (_ for _ in ()).throw(AssertionError("loaded again")))
    with load(package, rate=0.25) as second:
        assert second.model is first.model
        first.close()
        process_cuts().make_room()  # the last user keeps it
        assert second.generate(IDS, max_tokens=4).tokens == said
        model = second.model
    with pytest.raises(RuntimeFailure, match="closed"):
        LlamaContext(model, n_ctx=32)


@pytest.mark.parametrize("part", ["cut", "model", "context"])
def test_a_failure_leaves_the_session_as_it_was(package: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(package, rate=0.2) as session:
        before = session.generate(IDS, max_tokens=4)
        model, context = session.model, session.context

        def fail(*_: object, **__: object) -> None:
            raise RuntimeFailure("out of luck")

        with monkeypatch.context() as patch:
            if part == "cut":
                patch.setattr(module, "cached_model", fail)
            elif part == "model":
                process_cuts().make_room()
                patch.setattr(LlamaModel, "load", fail)
            else:
                patch.setattr(LlamaContext, "__init__", fail)
            with pytest.raises(RuntimeFailure, match="out of luck"):
                session.set_rate(0.3)
        assert (session.model, session.context, session.rate) == (model, context, 0.2)
        again = session.generate(IDS, max_tokens=4)
        assert again.tokens == before.tokens
        assert again.timings.reused_tokens == len(IDS) - 1


def test_an_unfinished_stream_is_not_cut_short(package: Path) -> None:
    with load(package, rate=0.2) as session:
        stream = session.stream(IDS, max_tokens=30)
        next(stream)
        with pytest.raises(RuntimeFailure, match="busy with an unfinished stream"):
            session.set_rate(0.3)
        assert session.rate == 0.2
        stream.close()
        session.set_rate(0.3)
    with pytest.raises(RuntimeFailure, match="the session is closed"):
        session.set_rate(0.2)


def test_rates_that_cannot_be(package: Path) -> None:
    for rate in (-0.1, 0.4, float("nan")):
        with pytest.raises(PlanError, match=r"outside 0 to 0.35"):
            load(package, rate=rate)
    with load(package) as session, pytest.raises(PlanError, match=r"outside 0 to 0.35"):
        session.set_rate(0.5)


def test_what_is_not_elastic_has_one_rate(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "plain.gguf")
    for rate in (0.1, "auto"):
        with pytest.raises(PackageError, match=r"plain.gguf is a single file"):
            load(path, rate=rate)  # type: ignore[arg-type]
    fixed = write_tiny_elastic(tmp_path / "fixed", export={"elastic": False, "rate": 0.1, "removed_fraction": 0.11})
    with pytest.raises(PackageError, match=r"is not elastic: it has one size"):
        load(fixed, rate=0.2)
    with load(path, rate=0) as session:
        assert (session.rate, session.removed_fraction) == (None, None)
        with pytest.raises(PackageError, match=r"plain.gguf is a single file"):
            session.set_rate(0.1)
    with load(fixed) as session:
        assert (session.rate, session.removed_fraction) == (0.1, 0.11)
    with LlamaModel.load(path) as model:
        bare = Session(model, n_ctx=64)
        assert bare.rate is None
        with pytest.raises(PackageError, match=r"this session knows of no package. Open it with edgeq.load"):
            bare.set_rate(0.1)


def test_auto_takes_what_fits(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(package, rate="auto") as session:
        assert session.rate == 0.0
    size = open_elastic(package).at_rate(0.3)
    from edgeq.runtime.fitting import needed_bytes
    from edgeq.runtime.gguf_facts import read_facts

    need = needed_bytes(open_elastic(package), read_facts(package / "tiny.gguf"), size, n_ctx=N_CTX, kv_type="f16", isa=())
    monkeypatch.setattr(fitting, "available_ram", lambda: need)
    with load(package, rate="auto") as session:
        assert session.rate == session.removed_fraction == size.removed_fraction
    monkeypatch.setattr(fitting, "available_ram", lambda: 1000)
    with pytest.raises(PlanError, match=r"1.0 kB of memory are free, but even the smallest cut needs"):
        load(package, rate="auto")
    with pytest.raises(UsageError, match=r'rate="auto" looks at the memory of this computer'):
        load(package, rate="auto", device="cuda")


def test_a_cut_goes_when_nobody_holds_it(package: Path) -> None:
    with load(package, rate=0.2) as session:
        expected = session.score(IDS)
        process_cuts().make_room()  # its file in memory is gone by name; what is mapped stays
        np.testing.assert_array_equal(session.score(IDS), expected)
