"""The reference's logits against transformers', on tiny random models of every family."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TINY_FAMILIES, hf_folder, hf_model

from edgeq import reference
from edgeq.converters.sources.resolve import open_model
from edgeq.errors import SourceError, UnsupportedError, UsageError
from edgeq.model import Model
from edgeq.reference import Reference
from edgeq.spec import Attention, Mlp, ModelSpec
from edgeq.tensors import LazyTensor, from_values, map_values, take_rows

# Longer than every sliding window here (7 and 8) and than every original context (32 and 64), and two of one length.
LENGTHS = (1, 5, 90, 31, 90, 130)

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **{name: (name, {}) for name in TINY_FAMILIES},
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-no-gqa": ("llama", {"num_key_value_heads": 4}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "gemma3-scale": ("gemma3", {"query_pre_attn_scalar": 40}),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3-biases": ("qwen3", {"attention_bias": True}),
    "phi3-window": ("phi3", {"sliding_window": 7}),
    "smollm3-biases": ("smollm3", {"attention_bias": True, "mlp_bias": True}),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from threads, and waiting for them takes seconds on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def windows(lengths: tuple[int, ...] = LENGTHS, *, n_vocab: int = 320) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, n_vocab, length).tolist() for length in lengths]


def reference_of(model: Model, **kwargs: Any) -> Reference:
    return Reference(model.spec, model.tensors, **kwargs)


def logits_of(spec: ModelSpec, tensors: Mapping[str, LazyTensor], ids: list[int]) -> torch.Tensor:
    """In float64, so that what must be equal is equal to rounding."""
    ref = Reference(spec, tensors, dtype=torch.float64)
    return ref.logits(ref.hidden([ids])[0])


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """Tiny models by family name, each written once."""
    models: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in models:
            models[name] = open_model(hf_folder(tmp_path_factory.mktemp(name), name))
        return models[name]

    return get


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(tmp_path: Path, variant: str) -> None:
    name, overrides = VARIANTS[variant]
    folder = hf_folder(tmp_path, name, **overrides)
    ref, oracle = reference_of(open_model(folder)), hf_model(folder)
    ids = windows()
    for window, hidden in zip(ids, ref.hidden(ids), strict=True):
        with torch.no_grad():
            expected = oracle(torch.tensor([window])).logits[0]
        logits = ref.logits(hidden)
        assert logits.dtype == torch.float32
        assert (logits - expected).abs().max() <= 1e-4
        assert 0.5 < expected.std() < 2


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_every_tensor_is_used(opened: Callable[[str], Model], name: str) -> None:
    """Noise on any one tensor changes the logits; a constant factor would not do, as the norms of q and k undo it."""
    model = opened(name)
    [ids] = windows((12,))
    before = logits_of(model.spec, model.tensors, ids)
    rng = np.random.default_rng(0)
    for changed in model.tensors:
        values = model.tensors[changed].decode()
        noisy = from_values(values + 0.1 * rng.standard_normal(values.shape), origin=changed)
        after = logits_of(model.spec, {**model.tensors, changed: noisy}, ids)
        assert (after - before).abs().max() > 1e-3, changed


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_windows_do_not_touch_each_other(opened: Callable[[str], Model], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BATCH_TOKENS", 20)
    ref = reference_of(opened(name), dtype=torch.float64)
    ids = windows((9, 4, 9, 25, 9))
    together = ref.hidden(ids)
    for window, hidden in zip(ids, together, strict=True):
        torch.testing.assert_close(ref.hidden([window])[0], hidden, rtol=0, atol=1e-12)


def test_no_windows(opened: Callable[[str], Model]) -> None:
    assert reference_of(opened("llama")).hidden([]) == []


def test_a_later_token_changes_nothing_before_it(opened: Callable[[str], Model]) -> None:
    model = opened("llama")
    [ids] = windows((12,))
    changed = [*ids[:7], (ids[7] + 1) % 320, *ids[8:]]
    before, after = logits_of(model.spec, model.tensors, ids), logits_of(model.spec, model.tensors, changed)
    torch.testing.assert_close(before[:7], after[:7], rtol=0, atol=1e-12)
    assert ((before[7:] - after[7:]).abs().amax(-1) > 1e-3).all()


def test_longrope_goes_by_the_context_length_asked_for(tmp_path: Path) -> None:
    """transformers chooses by the longest position it sees, so the first 40 of 130 tokens show the long factors."""
    folder = hf_folder(tmp_path, "phi3-longrope")
    ref = reference_of(open_model(folder))
    [ids] = windows((130,))
    with torch.no_grad():
        expected = hf_model(folder)(torch.tensor([ids])).logits[0, :40]
    long = ref.logits(ref.hidden([ids[:40]], n_ctx=65)[0])
    assert (long - expected).abs().max() <= 1e-4
    short = ref.logits(ref.hidden([ids[:40]])[0])
    assert (short - expected).abs().max() > 1e-2


def test_float64_sees_no_difference_when_mlp_channels_are_permuted(opened: Callable[[str], Model]) -> None:
    model = opened("gemma3")
    [ids] = windows((20,))
    order = np.random.default_rng(0).permutation(160)
    moved = dict(model.tensors)
    for role in ("gate", "up"):
        moved[f"layers.1.{role}.weight"] = take_rows(model.tensors[f"layers.1.{role}.weight"], order)
    assert (logits_of(model.spec, moved, ids) - logits_of(model.spec, model.tensors, ids)).abs().max() > 1e-2
    moved["layers.1.down.weight"] = map_values(model.tensors["layers.1.down.weight"], lambda values: values[:, order])
    torch.testing.assert_close(logits_of(model.spec, moved, ids), logits_of(model.spec, model.tensors, ids), rtol=0, atol=1e-12)


def test_sizes_are_those_of_each_block(opened: Callable[[str], Model]) -> None:
    """Removing channels and a kv group of one layer, and a whole attention, equals zeroing their columns."""
    model = opened("qwen3")
    [ids] = windows((20,))
    cut, zeroed = dict(model.tensors), dict(model.tensors)

    def keep(name: str, n: int, *, of_columns: bool = False) -> None:
        tensor = model.tensors[name]
        if not of_columns:
            cut[name] = take_rows(tensor, np.arange(n))
            return
        cut[name] = map_values(tensor, lambda values: values[:, :n], shape=(tensor.n_rows, n))
        zeroed[name] = map_values(tensor, lambda values: values * (np.arange(tensor.n_cols) < n))

    for role in ("gate", "up"):
        keep(f"layers.0.{role}.weight", 96)
    keep("layers.0.down.weight", 96, of_columns=True)
    for role, rows in (("wq", 48), ("wk", 24), ("wv", 24)):
        keep(f"layers.0.{role}.weight", rows)
    keep("layers.0.wo.weight", 48, of_columns=True)
    zeroed["layers.1.wo.weight"] = map_values(model.tensors["layers.1.wo.weight"], np.zeros_like)
    first, _, _, last = model.spec.blocks
    assert isinstance(first, Attention)
    smaller = (dataclasses.replace(first, n_heads=2, n_kv_heads=1), Mlp(layer=0, n_ff=96), last)
    spec = dataclasses.replace(model.spec, blocks=smaller)
    torch.testing.assert_close(logits_of(spec, cut, ids), logits_of(model.spec, zeroed, ids), rtol=0, atol=1e-12)


def test_one_block_is_in_memory_at_a_time(opened: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever a tensor is decoded, and whenever an observer looks, the weights still referenced belong to one block."""
    model = opened("llama")
    loaded: list[tuple[str, weakref.ref[torch.Tensor]]] = []
    load = Reference._load

    def alive() -> set[str]:
        return {name for name, values in loaded if values() is not None}

    def watched(self: Reference, name: str) -> torch.Tensor:
        before.append((name, alive()))
        values = load(self, name)
        loaded.append((name, weakref.ref(values)))
        return values

    before: list[tuple[str, set[str]]] = []
    during: dict[tuple[int | None, str], set[str]] = {}
    monkeypatch.setattr(Reference, "_load", watched)
    reference_of(model).hidden(windows(), observe=lambda layer, point, x: during.update({(layer, point): alive()}))

    attention, mlp = ("attn_norm", "wq", "wk", "wv", "wo"), ("mlp_norm", "gate", "up", "down")
    expected: dict[tuple[int | None, str], set[str]] = {(None, "head_in"): {"final_norm.weight"}}
    for layer in (0, 1):
        for roles, points in ((attention, ("attn_in", "queries", "attn_out")), (mlp, ("mlp_in", "mlp_hidden"))):
            names = [f"layers.{layer}.{role}.weight" for role in roles]
            expected.update({(layer, point): set(names) for point in points})
            assert before[: len(names)] == [(name, set(names[:i])) for i, name in enumerate(names)]
            del before[: len(names)]
    assert before == [("final_norm.weight", set())]
    assert during == expected
    assert alive() == set()


class Reads:
    """A tensor that notes which rows are read."""

    def __init__(self, tensor: LazyTensor) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.tensor = dataclasses.replace(tensor, read=lambda start, stop: self._read(tensor, start, stop))

    def _read(self, tensor: LazyTensor, start: int, stop: int) -> Any:
        self.ranges.append((start, stop))
        return tensor.read(start, stop)


def test_embedding_is_read_where_tokens_are(opened: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("llama")
    monkeypatch.setattr(reference, "CHUNK_VALUES", 64 * 50)
    embed = Reads(model.tensors["embed.weight"])
    ids = [[3, 7, 3, 299, 260, 7], [160, 160]]
    hidden = Reference(model.spec, {**model.tensors, "embed.weight": embed.tensor}).hidden(ids)
    assert sorted(embed.ranges) == [(3, 8), (160, 161), (260, 300)]
    for one, window in zip(hidden, ids, strict=True):
        torch.testing.assert_close(one, reference_of(model).hidden([window])[0])


def test_large_head_is_decoded_in_pieces(opened: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("qwen2-tied")
    ref = reference_of(model)
    hidden = ref.hidden(windows((9,)))[0]
    whole = ref.logits(hidden)
    assert torch.equal(ref.logits(hidden), whole)
    head = Reads(model.tensors["embed.weight"])
    monkeypatch.setattr(reference, "HEAD_CACHE_BYTES", 320 * 96 * 4 - 1)
    monkeypatch.setattr(reference, "CHUNK_VALUES", 96 * 100)
    pieces = Reference(model.spec, {"embed.weight": head.tensor}).logits(hidden)
    assert head.ranges == [(0, 100), (100, 200), (200, 300), (300, 320)]
    torch.testing.assert_close(pieces, whole)


def test_a_small_head_is_decoded_once(opened: Callable[[str], Model]) -> None:
    model = opened("llama")
    head = Reads(model.tensors["head.weight"])
    ref = Reference(model.spec, {**model.tensors, "head.weight": head.tensor})
    for hidden in ref.hidden(windows((3, 4))):
        ref.logits(hidden)
    assert head.ranges == [(0, 320)]


def test_observer_sees_the_input_of_every_linear_and_the_queries(opened: Callable[[str], Model]) -> None:
    model = opened("llama")
    seen: list[tuple[int | None, str, tuple[int, ...]]] = []
    reference_of(model).hidden(windows((5, 5)), observe=lambda layer, point, x: seen.append((layer, point, tuple(x.shape))))
    of_layer = (
        ("attn_in", (2, 5, 64)),
        ("queries", (2, 5, 4, 24)),
        ("attn_out", (2, 5, 96)),
        ("mlp_in", (2, 5, 64)),
        ("mlp_hidden", (2, 5, 160)),
    )
    assert seen == [(layer, *point) for layer in (0, 1) for point in of_layer] + [(None, "head_in", (2, 5, 64))]


def test_progress_counts_blocks(opened: Callable[[str], Model]) -> None:
    told: list[tuple[str, float, float]] = []
    reference_of(opened("llama")).hidden(windows((5,)), step="judge", progress=lambda *values: told.append(values))
    assert told == [("judge", done, 4) for done in range(5)]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2], []], "window 1 has no tokens: leave it out"),
        ([[1, 320]], "window 0: token id 320 is outside the vocabulary of 320 tokens"),
        ([[1], [2, -1]], "window 1: token id -1 is outside the vocabulary of 320 tokens"),
    ],
)
def test_windows_that_cannot_run(opened: Callable[[str], Model], ids: list[list[int]], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        reference_of(opened("llama")).hidden(ids)
    assert str(caught.value) == message


def test_missing_tensor_is_named(opened: Callable[[str], Model]) -> None:
    model = opened("llama")
    tensors: dict[str, LazyTensor] = {name: t for name, t in model.tensors.items() if name != "layers.1.up.weight"}
    with pytest.raises(SourceError, match=r"^layers\.1\.up\.weight is missing: the spec of this llama model asks for it$"):
        Reference(model.spec, tensors).hidden([[1]])


def test_unknown_family_is_refused(opened: Callable[[str], Model]) -> None:
    model = opened("llama")
    with pytest.raises(UnsupportedError, match="unknown family 'rwkv'; known: llama, qwen2"):
        Reference(dataclasses.replace(model.spec, family="rwkv"), model.tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_gpu_equals_cpu(opened: Callable[[str], Model], name: str) -> None:
    ref, on_gpu = reference_of(opened(name)), reference_of(opened(name), device="cuda")
    for cpu, gpu in zip(ref.hidden(windows()), on_gpu.hidden(windows()), strict=True):
        assert gpu.device.type == "cuda"
        assert (on_gpu.logits(gpu).cpu() - ref.logits(cpu)).abs().max() <= 1e-4
