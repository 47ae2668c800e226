from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_files import lora_factors, merged, write_lora
from tiny import N_VOCAB
from tiny_gguf import write_tiny_gguf

from edgeq.errors import AdapterError, RuntimeFailure, UsageError
from edgeq.runtime.adapter_file import read_adapter
from edgeq.runtime.adapter_pool import AdapterPool
from edgeq.runtime.adapters import AdapterChoice, Request, _last_place, grouped
from edgeq.runtime.llama import LlamaAdapter, LlamaModel
from edgeq.runtime.llama_context import LlamaContext
from edgeq.runtime.session import Session, load
from edgeq.runtime.switching import switch_times

PROMPT = "the quick brown fox jumps over the lazy dog"
RANKS = (2, 5, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and 20 adapters of three ranks and different strengths: a00.gguf to a19.gguf."""
    folder = tmp_path_factory.mktemp("adapters")
    write_tiny_gguf(folder / "tiny.gguf")
    for i in range(20):
        write_lora(folder / f"a{i:02d}.gguf", rank=RANKS[i % 3], alpha=1.0 + i, seed=i)
    return folder


@pytest.fixture
def session(folder: Path) -> Iterator[Session]:
    with load(folder / "tiny.gguf", n_ctx=256, threads=1) as session:
        yield session


def alone(folder: Path, adapter: AdapterChoice, prompt: str = PROMPT, model: str = "tiny.gguf", n: int = 12) -> tuple[int, ...]:
    """Greedy tokens of a session that never saw another adapter."""
    with load(folder / model, n_ctx=256, threads=1) as session:
        for name in () if adapter is None else (adapter,) if isinstance(adapter, str) else adapter:
            session.load_adapter(folder / f"{name}.gguf")
        session.set_adapter(adapter)
        return session.generate(prompt, max_tokens=n).tokens


def test_twenty_adapters_in_random_order_within_a_budget(folder: Path) -> None:
    names = [f"a{i:02d}" for i in range(20)]
    rng = np.random.default_rng(0)
    prompts = [PROMPT, "once upon a time", "hello"]
    expected = {name: alone(folder, name, prompts[i % 3]) for i, name in enumerate(names)}
    assert len(set(expected.values())) == 20, "each adapter says something of its own"
    sizes = {name: read_adapter(folder / f"{name}.gguf").resident_bytes for name in names}
    budget = 2 * max(sizes.values()) + min(sizes.values())
    with load(folder / "tiny.gguf", n_ctx=256, threads=1, adapter_budget=budget) as session:
        for name in names:
            session.load_adapter(folder / f"{name}.gguf")
        order = rng.permutation(np.repeat(np.arange(20), 4))
        for i in order:
            session.set_adapter(names[i])
            assert session.generate(prompts[i % 3], max_tokens=12).tokens == expected[names[i]]
            resident = session.adapter_pool.resident
            assert sum(sizes[name] for name in resident) == session.adapter_pool.stats.resident_bytes <= budget
        stats = session.adapter_pool.stats
    changes = 1 + int((np.diff(order) != 0).sum())
    assert stats.hits + stats.misses == changes
    assert stats.hits > 0
    assert stats.evictions == stats.misses - len(resident) > 20
    assert max(sizes.values()) < stats.peak_bytes <= budget


def test_the_count_of_bytes_is_what_llama_takes(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="edgeq.runtime.llama")
    file = read_adapter(folder / "a02.gguf")
    with LlamaModel.load(folder / "tiny.gguf") as model:
        LlamaAdapter.load(model, file.path).close()
    mib = [float(found[1]) for found in (re.search(r"LoRA buffer size = +([\d.]+) MiB", line) for line in caplog.messages) if found]
    assert sum(mib) * 2**20 == pytest.approx(file.resident_bytes, abs=0.01 * 2**20), "printed with two decimals"


def test_switching_leaves_no_stale_cache(session: Session, folder: Path) -> None:
    for name in ("a01", "a02"):
        session.load_adapter(folder / f"{name}.gguf")
    choices: list[AdapterChoice] = [None, "a01", "a02", {"a01": 1.0, "a02": -0.5}, "a01", {"a01": 0.25}, None]
    for choice in choices:
        session.set_adapter(choice)
        completion = session.generate(PROMPT, max_tokens=12)
        assert completion.timings.reused_tokens == 0, "what is cached was computed under other adapters"
        assert completion.tokens == alone(folder, choice)
    session.set_adapter("a01")
    session.set_adapter(None)
    assert session.generate(PROMPT, max_tokens=12).timings.reused_tokens > 0, "nothing was computed in between"


def test_scores_follow_the_adapter(session: Session, folder: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(3).integers(3, N_VOCAB, 129).tolist()
    plain = session.score(ids)
    session.load_adapter(folder / "a04.gguf")
    session.set_adapter({"a04": 0.5})
    kept = session.score(ids)
    merged(folder / "tiny.gguf", tmp_path / "merged.gguf", (lora_factors(RANKS[1], seed=4), 0.5 * 5.0 / RANKS[1]))
    with load(tmp_path / "merged.gguf", n_ctx=256, threads=1) as other:
        expected = other.score(ids)
    assert np.abs(plain - expected).max() > 1
    np.testing.assert_allclose(kept, expected, atol=0.1)  # the last token's attention sums in float16
    assert session.generate(ids, max_tokens=3).timings.reused_tokens == 128
    session.set_adapter(None)
    np.testing.assert_array_equal(session.score(ids), plain)


def test_several_adapters_are_their_sum(folder: Path, tmp_path: Path) -> None:
    parts = [(lora_factors(RANKS[i % 3], seed=i), scale * (1.0 + i) / RANKS[i % 3]) for i, scale in ((3, 0.7), (7, -0.4))]
    merged(folder / "tiny.gguf", tmp_path / "merged.gguf", *parts)
    assert alone(folder, {"a03": 0.7, "a07": -0.4}) == alone(tmp_path, None, model="merged.gguf") != alone(folder, {"a03": 0.7})


def test_a_scale_of_zero_is_no_adapter(session: Session, folder: Path) -> None:
    session.load_adapter(folder / "a01.gguf")
    plain = session.generate(PROMPT, max_tokens=12)
    session.set_adapter({"a01": 0.0})
    assert session.generate(PROMPT, max_tokens=12).timings.reused_tokens > 0
    assert session.last is not None and session.last.tokens == plain.tokens
    assert session.adapters[0].scale is None


def test_what_a_session_knows(session: Session, folder: Path) -> None:
    assert session.load_adapter(folder / "a01.gguf") == "a01"
    assert session.load_adapter(folder / "a02.gguf", "sql") == "sql"
    session.set_adapter({"sql": 0.5})
    found = {info.name: (info.path.name, info.scale, info.resident) for info in session.adapters}
    assert found == {"a01": ("a01.gguf", None, False), "sql": ("a02.gguf", 0.5, True)}
    with pytest.raises(UsageError, match=r"adapter 'sql' is in use. Set another one first."):
        session.unload_adapter("sql")
    with pytest.raises(UsageError, match=r"an adapter named 'sql' is loaded already, from .*a02.gguf. Unload it or choose another name."):
        session.load_adapter(folder / "a03.gguf", "sql")
    with pytest.raises(UsageError, match=r"no adapter is named 'poems'; there are 'a01', 'sql'. Load it from its file first."):
        session.set_adapter("poems")
    with pytest.raises(UsageError, match=r"the scale of adapter 'sql' is nan; expected a finite number"):
        session.set_adapter({"sql": float("nan")})
    with pytest.raises(UsageError, match=r"the adapter's name is empty. Give one."):
        session.load_adapter(folder / "a03.gguf", "")
    session.set_adapter(None)
    session.unload_adapter("sql")
    assert [info.name for info in session.adapters] == ["a01"]
    assert session.adapter_pool.stats.resident_bytes == 0
    session.unload_adapter("a01")
    with pytest.raises(UsageError, match=r"no adapter is named 'a01'; none is loaded."):
        session.set_adapter("a01")


def test_a_name_can_come_to_mean_another_adapter(session: Session, folder: Path) -> None:
    for file in ("a01", "a02"):
        session.load_adapter(folder / f"{file}.gguf", "x")
        session.set_adapter("x")
        assert session.generate(PROMPT, max_tokens=12).tokens == alone(folder, file)
        session.set_adapter(None)
        session.unload_adapter("x")


def test_a_file_that_changes_is_read_again(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    size = read_adapter(folder / "a02.gguf").resident_bytes
    with load(folder / "tiny.gguf", n_ctx=256, threads=1, adapter_budget=size) as session:
        path.write_bytes((folder / "a02.gguf").read_bytes())
        session.load_adapter(path)
        session.load_adapter(folder / "a01.gguf")
        session.set_adapter("x")
        first = session.generate(PROMPT, max_tokens=12).tokens
        assert first == alone(folder, "a02")
        session.set_adapter("a01")  # x has to go
        path.write_bytes((folder / "a05.gguf").read_bytes())
        os.utime(path, ns=(1, 1))
        session.set_adapter("x")
        assert session.generate(PROMPT, max_tokens=12).tokens == alone(folder, "a05") != first
        session.set_adapter("a01")
        path.write_bytes(b"GGUF")
        with pytest.raises(Exception, match=r"x.gguf: 4 bytes are too few for a GGUF file"):
            session.set_adapter("x")
        assert session.generate(PROMPT, max_tokens=12).tokens == alone(folder, "a01"), "the adapter before stays"


def test_budgets(folder: Path) -> None:
    sizes = [read_adapter(folder / f"a{i:02d}.gguf").resident_bytes for i in range(3)]
    with pytest.raises(UsageError, match=r"the budget for adapters is -1 bytes; expected at least 0"):
        load(folder / "tiny.gguf", adapter_budget=-1)
    with load(folder / "tiny.gguf", n_ctx=256, threads=1, adapter_budget=sizes[1] + 10) as session:
        with pytest.raises(
            AdapterError, match=rf"a02.gguf: takes {sizes[2]:,} bytes, the budget for adapters is {sizes[1] + 10:,}. Raise the"
        ):
            session.load_adapter(folder / "a02.gguf")
        for i in range(2):
            session.load_adapter(folder / f"a{i:02d}.gguf")
        session.set_adapter("a01")
        before = session.generate(PROMPT, max_tokens=12).tokens
        both = sizes[0] + sizes[1]
        message = (
            rf"adapters a00, a01 take {both:,} bytes together, the budget for adapters is {sizes[1] + 10:,}. Use fewer at once or raise"
        )
        with pytest.raises(AdapterError, match=message):
            session.set_adapter({"a00": 1.0, "a01": 1.0})
        assert [info.scale for info in session.adapters] == [None, 1.0]
        assert session.generate(PROMPT, max_tokens=12).tokens == before


def test_adapters_in_use_stay(folder: Path) -> None:
    """Least recently used first, but not what is acquired; what is acquired twice is released twice."""
    size = read_adapter(folder / "a00.gguf").resident_bytes
    with LlamaModel.load(folder / "tiny.gguf") as model:
        pool = AdapterPool(model, budget_bytes=2 * size)
        for i in (0, 3, 6):  # of rank 2
            pool.add(folder / f"a{i:02d}.gguf")
        pool.acquire(["a00"])
        pool.acquire(["a00", "a03"])
        pool.release(["a00", "a03"])
        pool.acquire(["a06"])
        assert pool.resident == ("a00", "a06")
        with pytest.raises(AdapterError, match=r"adapters a03, a00, a06 take"):
            pool.acquire(["a03"])
        pool.release(["a00"])
        pool.acquire(["a03"])
        assert pool.resident == ("a06", "a03")
        assert (pool.stats.hits, pool.stats.misses, pool.stats.evictions) == (1, 4, 2)


def test_low_level_guards(folder: Path) -> None:
    with LlamaModel.load(folder / "tiny.gguf") as model, LlamaModel.load(folder / "tiny.gguf") as other:
        adapter = LlamaAdapter.load(model, folder / "a00.gguf")
        with LlamaContext(other, n_ctx=256, threads=1) as context, pytest.raises(UsageError, match="was loaded for another model"):
            context.set_adapters({adapter: 1.0})
        with LlamaContext(model, n_ctx=256, threads=1) as context:
            with pytest.raises(UsageError, match=r"the adapter's scale is inf; expected a finite number"):
                context.set_adapters({adapter: float("inf")})
            context.set_adapters({adapter: 1.0})
            with pytest.raises(RuntimeFailure, match=r"a00.gguf: the adapter is in use. Set another one first."):
                adapter.close()
        adapter.close()
        adapter.close()
        with (
            LlamaContext(model, n_ctx=256, threads=1) as context,
            pytest.raises(RuntimeFailure, match=r"the adapter was unloaded. Load it"),
        ):
            context.set_adapters({adapter: 1.0})


def test_an_unfinished_stream_keeps_its_adapter(session: Session, folder: Path) -> None:
    session.load_adapter(folder / "a01.gguf")
    stream = session.stream(PROMPT, max_tokens=12)
    next(stream)
    with pytest.raises(RuntimeFailure, match="busy with an unfinished stream"):
        session.set_adapter("a01")
    stream.close()
    session.set_adapter("a01")


def test_many_requests_switch_once_per_adapter(session: Session, folder: Path) -> None:
    names = ["a01", "a02", "a05"]
    for name in names:
        session.load_adapter(folder / f"{name}.gguf")
    session.set_adapter("a05")
    choices: list[AdapterChoice] = ["a01", None, "a02", "a05", "a01", {"a02": 1.0}, None, {"a02": 0.5}]
    requests = [Request(prompt=f"{PROMPT} {i}", adapter=choice) for i, choice in enumerate(choices)]
    counts = session.adapter_pool.stats
    results = session.generate_many(requests, max_tokens=12)
    for request, result in zip(requests, results, strict=True):
        assert isinstance(request.prompt, str)
        assert result.tokens == alone(folder, request.adapter, request.prompt)
    after = session.adapter_pool.stats
    assert (after.misses - counts.misses, after.hits - counts.hits) == (2, 2), "a01, a02; a02 at half strength, and a05 again"
    assert [info.scale for info in session.adapters] == [None, None, 1.0]


@settings(deadline=None)
@given(choices=st.lists(st.sampled_from([None, "a", "b", "c"])), now=st.sampled_from([None, "a"]), resident=st.sets(st.sampled_from("abc")))
def test_grouped(choices: list[str | None], now: str | None, resident: set[str]) -> None:
    order = grouped([Request(prompt="", adapter=c) for c in choices], now=() if now is None else ((now, 1.0),), resident=resident)
    assert sorted(order) == list(range(len(choices)))
    ordered = [choices[i] for i in order]
    switches = sum(a != b for a, b in zip([now, *ordered], ordered, strict=False))
    assert switches == len(set(choices) - {now})
    assert all(i < j for i, j in pairwise(order) if choices[i] == choices[j])
    seen = list(dict.fromkeys(c for c in ordered if c != now))
    missing = [c is not None and c not in resident for c in seen]
    assert missing == sorted(missing)


def test_alora_acts_from_its_invocation_on(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    invocation = [40, 41]
    write_lora(tmp_path / "late.gguf", rank=4, alpha=8.0, seed=9, invocation=invocation)
    write_lora(tmp_path / "early.gguf", rank=4, alpha=8.0, seed=9)
    prompt = [1, 40, 41, 9, 10, 11, 40, 41, 12, 13]
    start = 6  # the last place of the invocation

    def by_hand(prompt: list[int], start: int, n: int = 12) -> tuple[int, ...]:
        """Greedy tokens in two phases: the model alone, then with the adapter."""
        with LlamaModel.load(folder / "tiny.gguf") as model, LlamaContext(model, n_ctx=256, threads=1) as context:
            if start:
                context.decode(prompt[:start])
            if start < len(prompt):
                context.set_adapters({LlamaAdapter.load(model, tmp_path / "early.gguf"): 1.0})
                logits = context.decode(prompt[start:])
            else:
                context.clear()
                logits = context.decode(prompt)
            tokens: list[int] = []
            for _ in range(n):
                token = int(logits[-1].argmax())
                if token in model.eog:
                    break
                tokens.append(token)
                logits = context.decode([token])
            return tuple(tokens)

    with load(folder / "tiny.gguf", n_ctx=256, threads=1) as session:
        session.load_adapter(tmp_path / "late.gguf")
        plain = session.generate(prompt, max_tokens=12)
        session.set_adapter("late")
        completion = session.generate(prompt, max_tokens=12)
        assert completion.timings.reused_tokens == start, "what comes before the invocation does not depend on the adapter"
        assert completion.tokens == by_hand(prompt, start)
        others = (plain.tokens, by_hand(prompt, 0), by_hand(prompt, 1), by_hand(prompt, start - 1), by_hand(prompt, start + 1))
        assert completion.tokens not in others
        again = session.generate([*prompt, *completion.tokens[:3], 9], max_tokens=5)
        assert again.timings.reused_tokens == len(prompt) + 3, "a conversation that goes on under the same adapter"

        text = np.random.default_rng(0).integers(3, N_VOCAB, 60).tolist()
        scores = session.score([*text, *invocation, *text])
        session.set_adapter(None)
        alone = session.score([*text, *invocation, *text])
        np.testing.assert_allclose(scores[:59], alone[:59], atol=0.05)  # batches of other lengths
        assert np.abs(scores[60:] - alone[60:]).max() > 1

        session.set_adapter("late")
        without = [token for token in prompt if token not in invocation]
        assert session.generate(without, max_tokens=12).tokens == by_hand(without, len(without))
    assert "adapter late stays off: the prompt does not hold its invocation tokens [40, 41]" in caplog.messages


def test_alora_beside_a_plain_adapter(folder: Path, tmp_path: Path) -> None:
    write_lora(tmp_path / "late.gguf", rank=4, alpha=8.0, seed=5, invocation=[40])
    write_lora(tmp_path / "early.gguf", rank=4, alpha=8.0, seed=5)
    prompt = [1, 7, 8, 40, 9]
    with load(folder / "tiny.gguf", n_ctx=256, threads=1) as session:
        session.load_adapter(tmp_path / "late.gguf")
        session.load_adapter(folder / "a00.gguf")
        session.set_adapter({"late": 1.0, "a00": 2.0})
        tokens = session.generate(prompt, max_tokens=8).tokens
    with LlamaModel.load(folder / "tiny.gguf") as model, LlamaContext(model, n_ctx=256, threads=1) as context:
        plain, late = (LlamaAdapter.load(model, path) for path in (folder / "a00.gguf", tmp_path / "early.gguf"))
        context.set_adapters({plain: 2.0})
        context.decode(prompt[:3])
        context.set_adapters({plain: 2.0, late: 1.0})
        assert tokens[0] == context.decode(prompt[3:])[-1].argmax()


def test_switch_times_leave_the_session_as_it_was(session: Session, folder: Path) -> None:
    for name in ("a01", "a02"):
        session.load_adapter(folder / f"{name}.gguf")
    session.set_adapter({"a02": 0.5})
    times = switch_times(session, "a01", repeat=3)
    assert (session.adapter_pool.stats.misses, session.adapter_pool.stats.hits) == (1 + 3, 3 + 1)
    assert [info.scale for info in session.adapters] == [None, 0.5]
    assert set(times.to_json()) == {"same_s", "switched_s", "loaded_s", "repeat"}
    assert min(times.same_s, times.switched_s, times.loaded_s) > 0
    with pytest.raises(UsageError, match=r"repeat is 0; expected at least 1"):
        switch_times(session, "a01", repeat=0)
    with pytest.raises(UsageError, match=r"adapter 'a02' is in use. Set another one first."):
        session.adapter_pool.drop("a02")


def test_the_place_of_an_invocation_is_that_of_peft() -> None:
    variants = pytest.importorskip("peft.tuners.lora.variants")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for _ in range(300):
        ids, wanted = rng.integers(0, 3, rng.integers(1, 12)).tolist(), rng.integers(0, 3, rng.integers(1, 4)).tolist()
        config = {"x": SimpleNamespace(alora_invocation_tokens=wanted)}
        (offset,) = variants.calculate_alora_offsets(config, "x", torch.tensor([ids]))
        assert _last_place(ids, wanted) == (None if offset is None else len(ids) - offset)
