"""Batchers on tiny random models: answers, errors and cancellations of many requests at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from lora_files import write_lora
from onnx_folders import write_tiny_onnx
from tiny_gguf import write_tiny_gguf

from edgeq.errors import ContextOverflow, QueueFull, RuntimeFailure, UsageError
from edgeq.runtime.adapters import Request
from edgeq.runtime.batcher import Batcher
from edgeq.runtime.session import Session, load

PROMPTS = [[3 + (7 * i + 5 * j) % 250 for j in range(3 + i % 9)] for i in range(24)]
ADAPTERS = (None, "sql", "poems")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("batcher") / "tiny.gguf")


@pytest.fixture
def session(model: Path, tmp_path: Path) -> Iterator[Session]:
    with load(model, n_ctx=256, threads=1) as opened:
        for seed, name in enumerate(ADAPTERS[1:]):
            opened.load_adapter(write_lora(tmp_path / f"{name}.gguf", seed=seed + 1, rank=3 + seed))
        yield opened


def alone(session: Session, adapter: str | None, prompt: list[int], **options: object) -> tuple[int, ...]:
    """With an empty cache."""
    session.set_adapter(adapter)
    session.context.clear()
    session._cached = []
    return session.generate(prompt, **options).tokens


@pytest.mark.parametrize("slots", [1, 3])
def test_answers_are_those_of_single_requests(session: Session, slots: int) -> None:
    """In F32 on one thread sums of several sequences come out alike too."""
    wanted = [(ADAPTERS[i % 3], prompt) for i, prompt in enumerate(PROMPTS)]
    expected = [alone(session, adapter, prompt, max_tokens=12) for adapter, prompt in wanted]
    assert len(set(expected)) > len(PROMPTS) // 2
    with Batcher(session, slots=slots) as batcher:
        jobs = [batcher.submit(prompt, adapter=adapter, max_tokens=12) for adapter, prompt in wanted]
        found = [job.result(timeout=60) for job in jobs]
        assert [completion.tokens for completion in found] == expected
        assert batcher.stats.done == len(PROMPTS)
        assert (batcher.stats.queued, batcher.stats.active) == (0, 0)
        assert batcher.stats.tokens_in == sum(map(len, PROMPTS))
        assert batcher.stats.tokens_out == sum(len(completion.tokens) for completion in found)


def test_text_comes_in_pieces(session: Session) -> None:
    session.set_adapter(None)
    expected = session.generate("the quick brown", max_tokens=20).text
    with Batcher(session, slots=2) as batcher:
        job = batcher.submit("the quick brown", max_tokens=20)
        pieces = list(job)
    assert "".join(pieces) == expected == job.result().text
    assert len(pieces) > 1


def test_draws_repeat_by_their_seed(session: Session) -> None:
    with Batcher(session, slots=3) as batcher:
        jobs = [batcher.submit(PROMPTS[0], max_tokens=16, temperature=1.5, seed=seed) for seed in (1, 2, 1)]
        a, b, c = (job.result(timeout=60).tokens for job in jobs)
    assert a == c != b


def test_stop_tokens_and_stop_strings_end_an_answer(session: Session) -> None:
    whole = alone(session, None, PROMPTS[3], max_tokens=12)
    with Batcher(session, slots=2) as batcher:
        found = batcher.submit(PROMPTS[3], max_tokens=12, stop_tokens=[whole[4]]).result(timeout=60)
    assert found.tokens == whole[: whole.index(whole[4])]
    assert found.finish_reason == "stop"


@pytest.mark.parametrize("slots", [1, 2])
def test_a_bad_request_does_not_hurt_the_others(session: Session, slots: int) -> None:
    with Batcher(session, slots=slots) as batcher:
        good = batcher.submit(PROMPTS[0], max_tokens=8)
        with pytest.raises(UsageError, match="no adapter is named 'nobody'"):
            batcher.submit(PROMPTS[0], adapter="nobody")
        with pytest.raises(ContextOverflow, match="does not fit the context of 256 tokens"):
            batcher.submit([5] * 257)
        with pytest.raises(UsageError, match="temperature"):
            batcher.submit(PROMPTS[0], temperature=-1)
        with pytest.raises(UsageError, match="the prompt is empty"):
            batcher.submit([], max_tokens=1)
        assert len(good.result(timeout=60).tokens) == 8


@pytest.mark.parametrize("slots", [1, 2])
def test_a_failure_of_one_answer_reaches_its_owner_only(session: Session, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = type(session._active).set

    def broken(self: object, choice: object) -> None:
        if choice == {"poems": 1.0}:
            raise RuntimeFailure("the adapter is gone")
        real(self, choice)  # type: ignore[arg-type]

    monkeypatch.setattr(type(session._active), "set", broken)
    with Batcher(session, slots=slots) as batcher:
        jobs = [batcher.submit(PROMPTS[i], adapter=ADAPTERS[i % 3], max_tokens=5) for i in range(6)]
        for i, job in enumerate(jobs):
            if i % 3 == 2:
                with pytest.raises(RuntimeFailure, match="the adapter is gone"):
                    job.result(timeout=60)
            else:
                assert job.result(timeout=60).tokens
        assert (batcher.stats.failed, batcher.stats.done) == (2, 4)


@pytest.mark.parametrize("slots", [1, 2])
def test_cancelled_requests_leave_their_place(session: Session, slots: int) -> None:
    """One that runs, and one that waits."""
    with Batcher(session, slots=slots) as batcher:
        running = batcher.submit(PROMPTS[1])
        next(iter(running))
        others = [batcher.submit(PROMPTS[i]) for i in range(slots)]
        waiting = batcher.submit(PROMPTS[2], max_tokens=5)
        running.cancel()
        with pytest.raises(RuntimeFailure, match="the request was cancelled"):
            running.result(timeout=60)
        for job in others:
            job.cancel()
        assert len(waiting.result(timeout=60).tokens) == 5
        assert batcher.stats.cancelled == 1 + slots


def test_a_full_queue_is_said(session: Session) -> None:
    with Batcher(session, slots=1, max_queue=2) as batcher:
        running = batcher.submit(PROMPTS[0])
        next(iter(running))
        waiting = [batcher.submit(PROMPTS[1], max_tokens=1) for _ in range(2)]
        with pytest.raises(QueueFull, match="2 requests wait already"):
            batcher.submit(PROMPTS[1])
        running.cancel()
        for job in waiting:
            job.result(timeout=60)


def test_what_came_late_for_the_adapter_of_now_is_let_in_a_bounded_number_of_times(session: Session) -> None:
    with Batcher(session, slots=1, max_queue=200) as batcher:
        first = batcher.submit(PROMPTS[0], adapter="sql")
        next(iter(first))
        other = batcher.submit(PROMPTS[2], adapter="poems", max_tokens=2)
        late = [batcher.submit(PROMPTS[i % 24], adapter="sql", max_tokens=6) for i in range(30)]
        first.cancel()
        other.result(timeout=60)
        assert sum(job.completion is not None for job in late) < 15
        for job in late:
            job.result(timeout=60)


def test_requests_from_many_threads(session: Session) -> None:
    expected = {i: alone(session, ADAPTERS[i % 3], PROMPTS[i], max_tokens=6) for i in range(12)}
    found: dict[int, tuple[int, ...]] = {}
    with Batcher(session, slots=3) as batcher:

        def ask(i: int) -> None:
            found[i] = batcher.submit(PROMPTS[i], adapter=ADAPTERS[i % 3], max_tokens=6).result(timeout=60).tokens

        threads = [threading.Thread(target=ask, args=(i,)) for i in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert found == expected


def test_closing_at_once_cancels_and_closing_in_order_answers(session: Session) -> None:
    batcher = Batcher(session, slots=2)
    jobs = [batcher.submit(PROMPTS[i]) for i in range(5)]
    next(iter(jobs[0]))
    batcher.close(wait=False)
    assert any(job.completion is None for job in jobs), "nobody waits for the last ones"
    with pytest.raises(RuntimeFailure, match="the batcher is closed"):
        batcher.submit(PROMPTS[0])
    batcher = Batcher(session, slots=2)
    jobs = [batcher.submit(PROMPTS[i], max_tokens=4) for i in range(5)]
    batcher.close()
    batcher.close()
    assert all(job.completion is not None for job in jobs)
    session.set_adapter(None)
    assert session.generate(PROMPTS[0], max_tokens=2).tokens


def test_an_answer_does_not_wait_for_its_reader(session: Session) -> None:
    with Batcher(session, slots=2) as batcher:
        unread = batcher.submit(PROMPTS[0], max_tokens=20)
        batcher.submit(PROMPTS[1], max_tokens=20).result(timeout=60)
        deadline = time.monotonic() + 60
        while batcher.stats.active and time.monotonic() < deadline:
            time.sleep(0.01)
        assert unread.completion is not None
        with pytest.raises(TimeoutError):
            batcher.submit(PROMPTS[2]).result(timeout=0.0)
        batcher.close(wait=False)


def test_onnx_runs_one_at_a_time(tmp_path: Path) -> None:
    write_tiny_onnx(tmp_path / "tiny")
    with load(tmp_path / "tiny", n_ctx=128, threads=1) as session:
        expected = [session.generate(prompt, max_tokens=6).tokens for prompt in PROMPTS[:6]]
        with Batcher(session, slots=4) as batcher:
            assert batcher.slots == 1
            assert [batcher.submit(prompt, max_tokens=6).result(timeout=60).tokens for prompt in PROMPTS[:6]] == expected


def test_generate_many_in_slots(session: Session) -> None:
    requests = [Request(prompt=prompt, adapter=ADAPTERS[i % 3]) for i, prompt in enumerate(PROMPTS[:9])]
    one = session.generate_many(requests, max_tokens=5)
    assert [found.tokens for found in session.generate_many(requests, slots=3, max_tokens=5)] == [found.tokens for found in one]


def test_bad_numbers(session: Session) -> None:
    for settings in ({"slots": 0}, {"max_queue": 0}):
        with pytest.raises(UsageError, match="expected at least 1"):
            Batcher(session, **settings)


def test_exact_sessions_reuse_whole_batches_of_prompts_only(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeq.runtime.session.EXACT_STEP", 8)
    ids = np.random.default_rng(0).integers(3, 250, 40).tolist()
    first = session.generate(ids, max_tokens=12)
    session.exact = True
    again = session.generate([*ids, *first.tokens], max_tokens=2)
    assert again.timings.reused_tokens == 40
    session.exact = False
    assert session.generate([*ids, *first.tokens], max_tokens=2).timings.reused_tokens > 40
