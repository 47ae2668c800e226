"""Importance against hooks on the transformers model; the choice of windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY_FAMILIES, hf_folder, hf_model

from edgeq import reference
from edgeq.calibration import importance, input_ranges, sorting_windows, split, windows_of
from edgeq.converters.sources.resolve import open_model
from edgeq.errors import SourceError, UsageError
from edgeq.families import LINEAR_ROLES, family
from edgeq.reference import Reference
from edgeq.tensors import map_values

FUSED = {"wq": "wqkv", "wk": "wqkv", "wv": "wqkv", "gate": "gate_up", "up": "gate_up"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from threads, and waiting for them takes seconds on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def windows(lengths: tuple[int, ...] = (9, 30, 9, 17)) -> list[list[int]]:
    rng = np.random.default_rng(2)
    return [rng.integers(0, 320, length).tolist() for length in lengths]


def tiny(folder: Path) -> Reference:
    model = open_model(folder)
    return Reference(model.spec, model.tensors)


def hooked_inputs(folder: Path, ids: list[list[int]]) -> dict[str, np.ndarray]:
    """All inputs of each linear module of the transformers model, (n_tokens, n_in) by module name."""
    oracle = hf_model(folder)
    inputs: dict[str, list[np.ndarray]] = {}
    for name, module in oracle.named_modules():
        if isinstance(module, torch.nn.Linear):
            inputs[name] = []
            module.register_forward_pre_hook(lambda _, args, name=name: inputs[name].extend(x.numpy() for x in args[0]))
    with torch.no_grad():
        for window in ids:
            oracle(torch.tensor([window]))
    return {name: np.concatenate(parts) for name, parts in inputs.items()}


def llama_cpp_imatrix(x: np.ndarray) -> np.ndarray:
    """What llama-imatrix accumulates and llama-quantize divides: row after row, values[j] += x[j] * x[j]; counts += 1."""
    values, count = np.zeros(x.shape[1], dtype=np.float64), 0
    for row in x:
        values += row.astype(np.float64) ** 2
        count += 1
    return values / count


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_importance_is_the_mean_square_of_each_input(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BATCH_TOKENS", 20)  # several batches, so that sums add up
    folder = hf_folder(tmp_path, name)
    ref, inputs = tiny(folder), hooked_inputs(folder, windows())
    means = importance(ref, windows())
    row = family(ref.spec.family)
    expected = {"head": inputs["lm_head"]}
    for layer in range(ref.spec.n_layers):
        for role in LINEAR_ROLES:
            fused = row.fused_qkv if role in ("wq", "wk", "wv") else row.fused_gate_up
            module = row.hf_name(FUSED[role] if fused and role in FUSED else role).format(i=layer)
            expected[f"layers.{layer}.{role}"] = inputs[f"model.{module}"]
    assert means.keys() == expected.keys()
    for linear, x in expected.items():
        assert means[linear].dtype == np.float32
        assert len(x) == 65
        np.testing.assert_allclose(means[linear], llama_cpp_imatrix(x), rtol=1e-4)
    assert means["head"].std() > 0.01


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gemma3"])
def test_ranges_span_every_input(tmp_path: Path, name: str) -> None:
    folder = hf_folder(tmp_path, name)
    ref, inputs = tiny(folder), hooked_inputs(folder, windows())
    found = input_ranges(ref, windows())
    row = family(ref.spec.family)
    assert found.keys() == importance(ref, windows()).keys()
    for linear, span in found.items():
        role = linear.rsplit(".", 1)[-1]
        fused = row.fused_qkv if role in ("wq", "wk", "wv") else row.fused_gate_up
        stem = row.hf_name(FUSED[role] if fused and role in FUSED else role) if linear != "head" else ""
        x = inputs["lm_head" if linear == "head" else f"model.{stem.format(i=linear.split('.')[1])}"]
        np.testing.assert_allclose(span, (x.min(), x.max()), rtol=1e-4, atol=1e-5)


def test_importance_is_the_same_every_time(tmp_path: Path) -> None:
    ref = tiny(hf_folder(tmp_path, "llama"))
    first, second = importance(ref, windows()), importance(ref, windows())
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not np.array_equal(first["head"], importance(ref, windows()[:2])["head"])


def test_progress_is_that_of_the_forward_pass(tmp_path: Path) -> None:
    told: list[tuple[str, float, float]] = []
    importance(tiny(hf_folder(tmp_path, "llama")), windows(), progress=lambda *values: told.append(values))
    assert told == [("calibrate", done, 4) for done in range(5)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_input_that_is_no_number_is_named(tmp_path: Path, bad: float) -> None:
    model = open_model(hf_folder(tmp_path, "llama"))
    broken = map_values(model.tensors["layers.1.up.weight"], lambda values: np.where(np.arange(64) == 5, np.float32(bad), values))
    ref = Reference(model.spec, {**model.tensors, "layers.1.up.weight": broken})
    with pytest.raises(SourceError, match=r"^layers\.1\.down: its input is NaN or infinite in calibration, .* download it again$"):
        importance(ref, windows())
    with pytest.raises(SourceError, match=r"^layers\.1\.down: its input is NaN or infinite in calibration, .* download it again$"):
        input_ranges(ref, windows())


def test_no_windows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^no calibration windows: give a text of at least one window$"):
        importance(tiny(hf_folder(tmp_path, "llama")), [])
    with pytest.raises(UsageError, match=r"^no calibration windows: give a text of at least one window$"):
        input_ranges(tiny(hf_folder(tmp_path, "llama")), [])


def test_importance_has_an_entry_for_each_linear_that_runs(tmp_path: Path) -> None:
    model = open_model(hf_folder(tmp_path, "llama"))
    spec = dataclasses.replace(model.spec, blocks=model.spec.blocks[:-1])
    assert "layers.1.wo" in (means := importance(Reference(spec, model.tensors), windows()))
    assert "layers.1.up" not in means


@settings(deadline=None)
@given(n=st.integers(1, 400), length=st.integers(1, 60), count=st.integers(1, 12))
def test_windows_are_spread_over_the_text(n: int, length: int, count: int) -> None:
    tokens = list(range(n))
    if n < length:
        with pytest.raises(UsageError, match=f"^the text has {n} tokens, fewer than one window of {length}: use a longer text"):
            windows_of(tokens, length=length, count=count)
        return
    chosen = windows_of(tokens, length=length, count=count)
    assert len(chosen) == min(count, n // length)
    assert all(window == list(range(window[0], window[0] + length)) for window in chosen)
    starts = [window[0] for window in chosen]
    gaps = np.diff(starts)
    assert starts[0] == 0
    assert len(starts) == 1 or starts[-1] == n - length
    assert (gaps >= length).all()
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


@settings(deadline=None)
@given(n=st.integers(1, 600), length=st.integers(1, 40), count=st.integers(1, 12), held_back=st.integers(1, 5))
def test_split_keeps_the_end_apart(n: int, length: int, count: int, held_back: int) -> None:
    tokens = list(range(n))
    if n < 2 * length:
        with pytest.raises(UsageError, match=f"^the text has {n} tokens; calibration and its check need two windows of {length}: use"):
            split(tokens, length=length, count=count, held_back=held_back)
        return
    used, apart = split(tokens, length=length, count=count, held_back=held_back)
    assert 1 <= len(used) <= count
    assert 1 <= len(apart) <= held_back
    assert [token for window in apart for token in window] == tokens[n - len(apart) * length :]
    assert max(used[-1]) < apart[0][0]
    if n // length >= 5 * held_back:
        assert len(apart) == held_back
        assert len(used) == min(count, n // length - held_back)


@pytest.mark.parametrize(
    ("n_tokens", "n_ctx", "length", "n_windows", "n_held_back"),
    [(100_000, 8192, 256, 24, 4), (100_000, 128, 128, 24, 4), (1500, 8192, 256, 4, 1), (999, 8192, 249, 3, 1), (128, 8192, 32, 3, 1)],
)
def test_sorting_windows(n_tokens: int, n_ctx: int, length: int, n_windows: int, n_held_back: int) -> None:
    used, apart = sorting_windows(range(n_tokens), n_ctx)
    assert (len(used), len(apart)) == (n_windows, n_held_back)
    assert {len(window) for window in used + apart} == {length}
    tokens = [token for window in used + apart for token in window]
    assert len(set(tokens)) == len(tokens), "no token is in two windows"
    if n_held_back > 1:
        assert used[0][0] == 0 and used[-1][-1] == n_tokens - 1
        starts = [window[0] for window in used]
        assert all(starts[0] < window[0] < starts[-1] for window in apart)


def test_a_text_too_short_to_sort_on() -> None:
    with pytest.raises(UsageError, match=r"the calibration text has 127 tokens; sorting needs 128.*--sort none"):
        sorting_windows(range(127), 8192)
