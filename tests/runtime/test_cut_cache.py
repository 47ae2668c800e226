"""Cuts kept in memory: found again, limited, and whole as long as someone holds them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_elastic import write_tiny_elastic

from edgeq.errors import OutputError, PlanError
from edgeq.runtime import cut_cache as module
from edgeq.runtime import fitting
from edgeq.runtime.cut import MemoryCut
from edgeq.runtime.cut_cache import CutCache, cached_cut
from edgeq.runtime.elastic_package import ElasticGguf, open_elastic
from edgeq.runtime.fitting import fitting_size, needed_bytes
from edgeq.runtime.gguf_facts import read_facts
from edgeq.runtime.memory import kv_bytes


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> ElasticGguf:
    return open_elastic(write_tiny_elastic(tmp_path_factory.mktemp("elastic") / "p"))


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> CutCache:
    cache = CutCache(10**9)
    monkeypatch.setattr(module, "process_cuts", lambda: cache)
    return cache


def test_the_same_size_is_cut_once(elastic: ElasticGguf, cache: CutCache, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []
    real = ElasticGguf.cut_to_memory
    monkeypatch.setattr(ElasticGguf, "cut_to_memory", lambda self, size, **more: made.append(size.rate) or real(self, size, **more))
    first = cached_cut(elastic, elastic.at_rate(0.2))
    again = cached_cut(open_elastic(elastic.package.folder), elastic.at_rate(0.2))
    near = cached_cut(elastic, elastic.at_rate(0.2001))  # one step takes both
    assert first is again is near
    assert made == [0.2]
    assert cached_cut(elastic, elastic.at_rate(0.3)) is not first
    assert made == [0.2, 0.3]
    assert cache.nbytes == sum(elastic.bytes_of(elastic.at_rate(rate).kept) for rate in (0.2, 0.3))


def test_the_least_recently_used_go_first(elastic: ElasticGguf, cache: CutCache) -> None:
    a, b, c = (elastic.at_rate(rate) for rate in (0.1, 0.2, 0.3))
    cache.max_bytes = elastic.bytes_of(a.kept) + elastic.bytes_of(b.kept)
    path_a, path_b = cached_cut(elastic, a).path, cached_cut(elastic, b).path
    assert cached_cut(elastic, a).path == path_a
    path_c = cached_cut(elastic, c).path
    assert path_a.exists() and path_c.exists()
    assert path_c == path_b or not path_b.exists()  # the number of its handle may be in use again
    assert cache.nbytes == elastic.bytes_of(a.kept) + elastic.bytes_of(c.kept)


def test_what_is_held_outlives_its_place(elastic: ElasticGguf, cache: CutCache) -> None:
    cache.max_bytes = 1
    cut = cached_cut(elastic, elastic.at_rate(0.2))
    assert cache.nbytes == 0
    assert cut.path.read_bytes()[:4] == b"GGUF"


def test_other_cuts_make_room_when_memory_is_short(elastic: ElasticGguf, cache: CutCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cached_cut(elastic, elastic.at_rate(0.1))
    real, tries = ElasticGguf.cut_to_memory, []

    def short(self: ElasticGguf, *arguments: object, **more: object) -> MemoryCut:
        tries.append(cache.nbytes)
        if cache.nbytes:
            raise OutputError("a cut in memory needs more than is free")
        return real(self, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(ElasticGguf, "cut_to_memory", short)
    cut = cached_cut(elastic, elastic.at_rate(0.2))
    assert len(tries) == 2 and tries[0] and not tries[1]
    assert cache.nbytes == cut.result.bytes
    cache.make_room()
    monkeypatch.setattr(ElasticGguf, "cut_to_memory", lambda *_, **__: (_ for _ in ()).throw(OutputError("needs more than is free")))
    with pytest.raises(OutputError, match="needs more than is free"):
        cached_cut(elastic, elastic.at_rate(0.3))


def test_the_cache_of_the_process_takes_a_quarter_of_the_memory() -> None:
    import psutil

    assert module.process_cuts().max_bytes == psutil.virtual_memory().total // 4
    assert module.process_cuts() is module.process_cuts()


N_CTX = 256


def need(elastic: ElasticGguf, n_steps: int, isa: tuple[str, ...] = ()) -> int:
    size = elastic.at_steps(n_steps)
    return needed_bytes(elastic, read_facts(elastic.path), size, n_ctx=N_CTX, kv_type="f16", isa=isa)  # type: ignore[arg-type]


def test_what_a_cut_needs_is_what_it_consists_of(elastic: ElasticGguf, tmp_path: Path) -> None:
    size = elastic.at_rate(0.3)
    elastic.cut(size, tmp_path / "cut.gguf")
    left = read_facts(tmp_path / "cut.gguf")
    masks = 4 * 512 * (N_CTX - 128)
    assert need(elastic, size.n_steps) == (tmp_path / "cut.gguf").stat().st_size + kv_bytes(left, N_CTX) + 3_000_000 + masks


def test_rearranged_weights_count_twice_unless_they_come_from_the_artifact(tmp_path: Path) -> None:
    elastic = open_elastic(write_tiny_elastic(tmp_path / "p", quant="Q4_0"))
    last = len(elastic.elastic.ladder.steps)
    assert need(elastic, 0, ("avx2",)) == need(elastic, 0)
    assert need(elastic, last, ("avx2",)) > need(elastic, last) + 30_000


def test_the_smallest_rate_that_fits_is_taken(elastic: ElasticGguf, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = read_facts(elastic.path)
    last = elastic.at_rate(0.35).n_steps
    for n in range(last + 1):
        for spare, expected in ((0, n), (-1, n + 1)):
            monkeypatch.setattr(fitting, "available_ram", lambda n=n, spare=spare: need(elastic, n) + spare)
            if expected <= last:
                assert fitting_size(elastic, facts, n_ctx=N_CTX, kv_type="f16").n_steps == expected
    with pytest.raises(PlanError, match=r"of memory are free, but even the smallest cut needs .* with 256 tokens of context. Close other"):
        fitting_size(elastic, facts, n_ctx=N_CTX, kv_type="f16")
