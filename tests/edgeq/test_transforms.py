"""The law of transforms: logits in float64 stay what they were, whatever is done to a port; and what would break it is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY_FAMILIES, hf_folder

from edgeq import ports, transforms
from edgeq.axes import Index, Take, Values, along
from edgeq.converters.sources.resolve import open_model
from edgeq.errors import ShapeError, UnsupportedError
from edgeq.families import family
from edgeq.reference import Reference
from edgeq.spec import Attention, Block, ModelSpec
from edgeq.tensors import LazyTensor
from edgeq.transforms import Change, Order, Rotation, Scale, Shift, TensorPort, Turn, moves, shifted, transformed

VARIANTS = {name: (name, {}) for name in TINY_FAMILIES} | {
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-no-gqa": ("llama", {"num_key_value_heads": 4}),
    "qwen3-biases": ("qwen3", {"attention_bias": True}),
}
NAMES = tuple(VARIANTS)
IDS = np.random.default_rng(3).integers(0, 320, 70).tolist()  # beyond the 64 tokens from which LongRoPE has other factors


class Models:
    """Tiny models by name of a variant, each made once, and their logits in float64."""

    def __init__(self, folder: Path) -> None:
        self.open = cache(lambda name: open_model(str(hf_folder(folder / name, VARIANTS[name][0], **VARIANTS[name][1]))))
        self.logits = cache(lambda name: logits(self.open(name).spec, self.open(name).tensors))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    torch.set_num_threads(1)
    return Models(tmp_path_factory.mktemp("transforms"))


@dataclass(frozen=True, kw_only=True)
class Exact(LazyTensor):
    """A tensor of float64 values, so that what is done to them rounds no more than the reference does."""

    values: Values

    def decode(self, start: int = 0, stop: int | None = None) -> Values:  # type: ignore[override]
        return self.values if self.values.ndim == 1 else self.values[start:stop]


def exact(tensors: Mapping[str, LazyTensor]) -> dict[str, Exact]:
    return {name: with_values(tensor, tensor.decode().astype(np.float64)) for name, tensor in tensors.items()}


def with_values(tensor: LazyTensor, values: Values) -> Exact:
    return Exact(shape=values.shape, grid=tensor.grid, read=tensor.read, origin=tensor.origin, values=values)


def logits(spec: ModelSpec, tensors: Mapping[str, LazyTensor]) -> torch.Tensor:
    reference = Reference(spec, tensors, dtype=torch.float64)
    return reference.logits(reference.hidden([IDS])[0])


def changed(spec: ModelSpec, tensors: Mapping[str, Exact], block: Block, port: TensorPort, change: Change) -> dict[str, Exact]:
    """What `transformed` does, in float64; an adapter's factors are changed in the same way."""
    new = dict(tensors)
    for role, (axis, move) in moves(spec, block, port, change).items():
        for name in transforms.stored(tensors, block.layer, role, axis):
            new[name] = with_values(new[name], along(new[name].values, 0 if axis == "rows" else 1, move))
    return new


def permutations(rng: np.random.Generator, *shape: int) -> Index:
    return rng.permuted(np.broadcast_to(np.arange(shape[-1]), shape), axis=-1)


def signs(rng: np.random.Generator, *shape: int) -> Values:
    return rng.uniform(0.25, 4, shape) * rng.choice([-1, 1], shape)


def drawn(rng: np.random.Generator, spec: ModelSpec, block: Block) -> list[tuple[TensorPort, Change]]:
    """One change of every kind that the block's ports have; norms on queries and keys leave fewer."""
    if not isinstance(block, Attention):
        return [("ffn", Order(permutations(rng, block.n_ff))), ("ffn", Scale(signs(rng, block.n_ff)))]
    n, d = block.n_kv_heads, block.head_dim
    orthogonal = np.linalg.qr(rng.standard_normal((n, d, d)))[0]
    found: list[tuple[TensorPort, Change]] = [
        ("vo", Rotation(orthogonal)),
        ("vo", Rotation(np.eye(d) + 0.2 * orthogonal)),  # invertible is enough
        ("vo", Order(permutations(rng, n, d))),
        ("vo", Scale(signs(rng, n, d))),
        ("kv_group", Order(permutations(rng, n))),
    ]
    if family(spec.family).qk_norm:
        found.append(("qk", Scale(np.tile(signs(rng, 1, d // 2), (n, 1)))))
    else:
        found += [("qk", Turn(rng.uniform(-4, 4, (n, d // 2)))), ("qk", Scale(signs(rng, n, d // 2)))]
    return found


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 2**32 - 1))
def test_one_change_of_one_block_leaves_the_logits(models: Models, name: str, seed: int) -> None:
    spec, rng = models.open(name).spec, np.random.default_rng(seed)
    tensors = exact(models.open(name).tensors)
    block = spec.blocks[rng.integers(len(spec.blocks))]
    choices = drawn(rng, spec, block)
    port, change = choices[rng.integers(len(choices))]
    new = changed(spec, tensors, block, port, change)
    assert any(not np.array_equal(new[n].values, tensors[n].values) for n in new) or isinstance(change, Order)
    torch.testing.assert_close(logits(spec, new), models.logits(name), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_all_changes_of_all_blocks_together_leave_the_logits(models: Models, name: str) -> None:
    spec, rng = models.open(name).spec, np.random.default_rng(1)
    new = exact(models.open(name).tensors)
    for block in spec.blocks:
        for port, change in drawn(rng, spec, block):
            new = changed(spec, new, block, port, change)
    torch.testing.assert_close(logits(spec, new), models.logits(name), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["llama-biases", "phi3-longrope", "qwen3-biases"])
def test_lazy_tensors_change_as_arrays_do(models: Models, name: str) -> None:
    spec, tensors, rng = models.open(name).spec, models.open(name).tensors, np.random.default_rng(2)
    for block in spec.blocks[:2]:
        for port, change in drawn(rng, spec, block):
            lazy, array = transformed(spec, tensors, block, port, change), changed(spec, exact(tensors), block, port, change)
            for key, tensor in lazy.items():
                np.testing.assert_allclose(tensor.decode(), array[key].values, atol=2e-6)
                if len(tensor.shape) == 2:  # in pieces that begin and end within a head
                    np.testing.assert_array_equal(tensor.decode(3, 31), tensor.decode()[3:31])
            assert lazy.keys() == tensors.keys()


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 2**32 - 1))
def test_any_order_of_pairs_leaves_the_logits(models: Models, name: str, seed: int) -> None:
    spec, order = models.open(name).spec, np.random.default_rng(seed).permutation(12)
    new, tensors = ports.order_pairs(spec, models.open(name).tensors, order)
    # Phi-3's LongRoPE divides queries by a magnitude, in float32; anything else moves whole rows.
    atol = 1e-5 if name == "phi3-longrope" else 1e-10
    torch.testing.assert_close(logits(new, tensors), models.logits(name), atol=atol, rtol=0)
    assert new.rope.dim == 24
    again, back = ports.order_pairs(new, tensors, np.argsort(order))
    torch.testing.assert_close(logits(again, back), models.logits(name), atol=atol, rtol=0)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaled_frequencies_follow_their_pairs(models: Models, kind: str) -> None:
    scaled = dataclasses.replace(models.open("llama").spec.rope, kind=kind, factor=4.0, original_n_ctx=64, attn_factor=1.1)
    spec = dataclasses.replace(models.open("llama").spec, rope=scaled)
    new, tensors = ports.order_pairs(spec, models.open("llama").tensors, np.arange(12)[::-1])
    assert new.rope.kind == "factors"
    expected = logits(spec, models.open("llama").tensors)
    torch.testing.assert_close(logits(new, tensors), expected, atol=1e-10, rtol=0)
    assert (expected - models.logits("llama")).abs().max() > 1e-3


def test_a_shift_of_values_goes_into_the_outputs_bias(models: Models) -> None:
    spec, tensors = models.open("llama-biases").spec, models.open("llama-biases").tensors
    for block in spec.attention:
        tensors = shifted(spec, tensors, block, Shift(np.random.default_rng(block.layer).standard_normal((2, 24))))
    assert np.abs(tensors["layers.0.wv.bias"].decode() - models.open("llama-biases").tensors["layers.0.wv.bias"].decode()).max() > 1
    torch.testing.assert_close(logits(spec, tensors), models.logits("llama-biases"), atol=1e-5, rtol=0)  # biases are float32
    with pytest.raises(UnsupportedError, match=r"layer 0: values cannot be shifted, since this model has no biases of wo\."):
        shifted(models.open("qwen2").spec, models.open("qwen2").tensors, models.open("qwen2").spec.attention[0], Shift(np.zeros((2, 24))))
    with pytest.raises(ShapeError, match=r"layer 0: a change of vo has shape \[4, 24\], expected \[2, 24\]\."):
        shifted(spec, tensors, spec.attention[0], Shift(np.zeros((4, 24))))


def test_the_factors_of_an_adapter_take_the_same_changes(models: Models) -> None:
    """delta = B A: rows of B, columns of A."""
    spec, rng = models.open("llama").spec, np.random.default_rng(4)
    block = spec.attention[0]
    factors = {
        "wv": (rng.standard_normal((48, 3)), rng.standard_normal((3, 64))),
        "wo": (rng.standard_normal((64, 3)), rng.standard_normal((3, 96))),
    }
    for port, change in drawn(rng, spec, block):
        for role, (axis, move) in moves(spec, block, port, change).items():
            if role in factors:
                b, a = factors[role]
                wanted = along(b @ a, 0 if axis == "rows" else 1, move)
                factors[role] = (along(b, 0, move), a) if axis == "rows" else (b, along(a, 1, move))
                np.testing.assert_allclose(factors[role][0] @ factors[role][1], wanted, atol=1e-10)


def test_only_what_is_moved_stays_in_its_grid(tmp_path: Path) -> None:
    half = open_model(str(hf_folder(tmp_path / "half", "llama", dtype="float16")))
    block = half.spec.attention[0]
    moved = transformed(half.spec, half.tensors, block, "qk", Order(np.arange(12)[::-1]))
    assert moved["layers.0.wq.weight"].grid.name == "F16"
    turned = transformed(half.spec, half.tensors, block, "qk", Turn(np.zeros((2, 12))))
    assert turned["layers.0.wq.weight"].grid.name == "F32"


REFUSED: Mapping[str, tuple[str, TensorPort, Change, type[Exception], str]] = {
    "turned norms": (
        "qwen3",
        "qk",
        Turn(np.ones((2, 12))),
        UnsupportedError,
        r"qwen3 normalises queries and keys over the whole head, with a",
    ),
    "norms of heads": (
        "gemma3",
        "qk",
        Scale(np.arange(1.0, 25).reshape(2, 12)),
        UnsupportedError,
        r"each dimension: all heads share them and",
    ),
    "mixed groups": (
        "llama",
        "kv_group",
        Scale(np.ones(2)),
        UnsupportedError,
        r"layer 0: a Scale cannot be done to kv_group: a group is heads of",
    ),
    "mixed pairs": (
        "llama",
        "qk",
        Rotation(np.ones((2, 24, 24))),
        UnsupportedError,
        r"a Rotation cannot be done to qk: pairs rotate with the pos",
    ),
    "turned values": (
        "llama",
        "vo",
        Turn(np.ones((2, 12))),
        UnsupportedError,
        r"a Turn cannot be done to vo: values do not rotate with the",
    ),
    "no inverse": (
        "llama",
        "vo",
        Rotation(np.zeros((2, 24, 24))),
        UnsupportedError,
        r"layer 0: a matrix for the values has no inverse, so that",
    ),
    "zero": (
        "llama",
        "vo",
        Scale(np.zeros((2, 24))),
        UnsupportedError,
        r"layer 0: a scale of vo is 0 or not finite, which nothing could undo",
    ),
    "a matrix too many": (
        "llama",
        "vo",
        Rotation(np.ones((3, 24, 24))),
        ShapeError,
        r"a change of vo has shape \[3, 24, 24\], expected \[2, 24",
    ),
    "pairs for dimensions": ("llama", "qk", Scale(np.ones((2, 24))), ShapeError, r"a change of qk has shape \[2, 24\], expected \[2, 12\]"),
    "twice": (
        "llama",
        "vo",
        Order(np.zeros((2, 24), dtype=np.intp)),
        ShapeError,
        r"layer 0: vo has parts 0 to 23, each at most once; got \[0, 0",
    ),
    "no such pair": ("llama", "qk", Order(np.array([12])), ShapeError, r"layer 0: qk has parts 0 to 11, each at most once; got \[12\]"),
    "a port of the MLP": ("llama", "ffn", Scale(np.ones(160)), ShapeError, r"layer 0: Attention has no port ffn\."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_the_function_is_refused(models: Models, case: str) -> None:
    name, port, change, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        moves(models.open(name).spec, models.open(name).spec.attention[0], port, change)


def test_channels_are_not_mixed(models: Models) -> None:
    with pytest.raises(UnsupportedError, match=r"a Rotation cannot be done to ffn: channels are multiplied one by one"):
        moves(models.open("llama").spec, models.open("llama").spec.mlps[0], "ffn", Rotation(np.ones((1, 160, 160))))


def test_a_move_knows_its_length(models: Models) -> None:
    with pytest.raises(ShapeError, match="the axis: places 0 to 9 are asked for, there are 4"):
        along(np.zeros(4), 0, Take(np.arange(10)))
    block = models.open("llama").spec.mlps[0]
    _, move = moves(models.open("llama").spec, block, "ffn", Scale(np.ones(160)))["up"]
    with pytest.raises(ShapeError, match="the axis: 4 places, but the change is one of 160"):
        along(np.zeros(4), 0, move)
