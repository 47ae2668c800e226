"""Merging on a quantized base: what the grid decodes to is what the adapter is added to, in float64, and nothing else is touched."""

from __future__ import annotations

from dataclasses import dataclass, replace

import gguf
import numpy as np
import pytest
from tiny_gguf import write_tiny_gguf

from edgeq.converters.sources.gguf import read_gguf_model
from edgeq.deltas.adapter import Adapter
from edgeq.deltas.delta import AnyFloats, Array, Delta, Replace
from edgeq.deltas.lora import DoRA, LoRA
from edgeq.deltas.merge import merged
from edgeq.errors import ShapeError, SourceError
from edgeq.grids import F32, grid
from edgeq.model import Model
from edgeq.tensors import LazyTensor

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The tiny GGUF model, with its down projections in Q4_0."""
    source = read_gguf_model(write_tiny_gguf(tmp_path_factory.mktemp("m") / "m.gguf"))
    tensors = {name: quantized(t) if name.endswith("down.weight") else t for name, t in source.tensors.items()}
    return replace(source, tensors=tensors)


def quantized(tensor: LazyTensor) -> LazyTensor:
    packed = gguf.quantize(tensor.decode(), gguf.GGMLQuantizationType.Q4_0)
    return LazyTensor(shape=tensor.shape, grid=grid("Q4_0"), read=lambda lo, hi: packed[lo:hi], origin="quantized")


def low(tensor: LazyTensor) -> LoRA:
    n_out, n_in = tensor.shape
    return LoRA(a=RNG.normal(size=(4, n_in)).astype(np.float32), b=RNG.normal(size=(n_out, 4)).astype(np.float32), scale=0.1)


def adapter(deltas: dict[str, Delta], name: str = "a") -> Adapter:
    return Adapter(name=name, kind="LORA", deltas=deltas)


@pytest.mark.parametrize("dora", [False, True])
def test_a_quantized_base_is_what_it_decodes_to(model: Model, dora: bool) -> None:
    base = model.tensors["layers.0.down.weight"]
    delta = low(base)
    magnitude = RNG.normal(size=base.shape[0]).astype(np.float32)
    kind: Delta = DoRA(lora=delta, magnitude=magnitude) if dora else delta
    result = merged(model, [(adapter({"layers.0.down.weight": kind}), 1.0)])

    assert base.grid.name == "Q4_0"
    wanted = base.decode().astype(np.float64) + 0.1 * delta.b.astype(np.float64) @ delta.a.astype(np.float64)
    if dora:
        wanted *= (magnitude / np.linalg.norm(wanted, axis=1))[:, None]
    tensor = result.tensors["layers.0.down.weight"]
    assert tensor.grid is F32
    np.testing.assert_array_equal(tensor.decode(), wanted.astype(np.float32))
    other = result.tensors["layers.1.down.weight"]
    assert other is model.tensors["layers.1.down.weight"] and other.grid.name == "Q4_0"


@dataclass(frozen=True, eq=False)
class Counting(Delta):
    """Changes a tensor as a whole, and says how often."""

    inner: LoRA
    calls: list[int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    def apply(self, weight: Array, base: Array | None = None) -> Array:
        self.calls.append(1)
        return self.inner.apply(weight, base)


def test_a_tensor_read_in_pieces_is_computed_once(model: Model) -> None:
    calls: list[int] = []
    delta = Counting(low(model.tensors["layers.0.wq.weight"]), calls)
    tensor = merged(model, [(adapter({"layers.0.wq.weight": delta}), 1.0)]).tensors["layers.0.wq.weight"]
    assert not calls  # nothing happens before a tensor is read
    pieces = [tensor.decode(start, start + 8) for start in range(0, tensor.n_rows, 8)]
    assert len(calls) == 1
    np.testing.assert_array_equal(np.concatenate(pieces), tensor.decode())


def test_vectors_can_be_changed_too(model: Model) -> None:
    base = model.tensors["final_norm.weight"]
    values: AnyFloats = RNG.normal(size=base.shape).astype(np.float32)
    result = merged(model, [(adapter({"final_norm.weight": Replace(values, base.shape)}), 0.25)])
    wanted = 0.75 * base.decode().astype(np.float64) + 0.25 * values
    np.testing.assert_allclose(result.tensors["final_norm.weight"].decode(), wanted, rtol=1e-6)


def test_embedding_and_head_must_agree_on_their_size(model: Model) -> None:
    embed = model.tensors["embed.weight"]
    grown = Replace(np.zeros((embed.shape[0] + 8, embed.shape[1]), dtype=np.float32), embed.shape)
    with pytest.raises(ShapeError, match=r"merged, embedding and head have 328 and 320 rows\. An adapter that adds tokens must bring both"):
        merged(model, [(adapter({"embed.weight": grown}), 1.0)])


def test_what_the_model_does_not_have(model: Model) -> None:
    base = model.tensors["layers.0.wq.weight"]
    with pytest.raises(SourceError, match=r"adapter 'a' changes layers\.7\.wq\.weight, which .* does not have"):
        merged(model, [(adapter({"layers.7.wq.weight": low(base)}), 1.0)])
