"""Fingerprints tell the same weights in another file, the same in another number format, and others of the same shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny import hf_folder

from edgeq.base_fingerprint import Fingerprint, check_base, take_fingerprint
from edgeq.converters.gguf.carrier import write_model
from edgeq.converters.gguf.lowering import lower
from edgeq.converters.sources.gguf import read_gguf_model
from edgeq.converters.sources.hf_folder import open_hf_folder
from edgeq.errors import SourceError
from edgeq.grids import F32, grid
from edgeq.model import Model
from edgeq.tensors import LazyTensor, from_values


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_hf_folder(hf_folder(tmp_path_factory.mktemp("m") / "m", "llama"))


def rounded(tensors: Mapping[str, LazyTensor], name: str) -> dict[str, LazyTensor]:
    def one(tensor: LazyTensor) -> LazyTensor:
        if len(tensor.shape) == 1:
            return tensor
        packed = gguf.quantize(tensor.decode(), gguf.GGMLQuantizationType[name])
        return LazyTensor(shape=tensor.shape, grid=grid(name), read=lambda lo, hi: packed[lo:hi], origin="rounded")

    return {key: one(tensor) if tensor.n_cols % 32 == 0 else tensor for key, tensor in tensors.items()}


def test_the_same_weights_in_another_file(model: Model, tmp_path: Path) -> None:
    """GGUF has rows of q and k in another order, and other names."""
    low = lower(model)
    write_model(tmp_path / "m.gguf", low, {t.name: F32 for t in low.tensors})
    again = read_gguf_model(tmp_path / "m.gguf")
    taken = take_fingerprint(model.tensors)
    assert take_fingerprint(again.tensors) == taken
    assert Fingerprint.parse(str(taken), where="x") == taken
    assert taken.kinship(taken) == "same" and taken.distance(taken) == 0


@pytest.mark.parametrize(("name", "most"), [("Q8_0", 0.03), ("Q4_0", 0.2)])
def test_the_same_weights_rounded(model: Model, name: str, most: float) -> None:
    taken, other = take_fingerprint(model.tensors), take_fingerprint(rounded(model.tensors, name))
    assert 0 < taken.distance(other) < most
    assert taken.kinship(other) == "near"
    note = check_base(str(taken), rounded(model.tensors, name), adapter="sql", model="m", where="x")
    assert note is not None and "'sql' was made for weights that are close to those of m but not the same" in note


def test_other_weights_of_the_same_shapes(model: Model, tmp_path: Path) -> None:
    other = open_hf_folder(hf_folder(tmp_path / "m", "llama", seed=5))
    stored = str(take_fingerprint(other.tensors))
    with pytest.raises(
        SourceError, match=r"adapter 'sql' was made for other weights than those of m, .* Use its own base model, or --other-base"
    ):
        check_base(stored, model.tensors, adapter="sql", model="m", where="x")
    assert "for other weights" in (check_base(stored, model.tensors, adapter="sql", model="m", where="x", force=True) or "")
    assert check_base(None, model.tensors, adapter="sql", model="m", where="x") is None
    assert check_base(str(take_fingerprint(model.tensors)), model.tensors, adapter="sql", model="m", where="x") is None


def test_any_sampled_change_shows(model: Model) -> None:
    taken = take_fingerprint(model.tensors)
    for name in ("final_norm.weight", "layers.1.down.weight"):
        values = model.tensors[name].decode()
        values[-1] += np.float32(1e-3)
        assert take_fingerprint({**model.tensors, name: from_values(values, origin=name)}).digest != taken.digest
    fewer = {name: tensor for name, tensor in model.tensors.items() if name != "head.weight"}
    assert take_fingerprint(fewer).digest != taken.digest


@pytest.mark.parametrize("text", ["", "2:" + "0" * 64 + ":" + "0" * 128, "1:" + "0" * 64 + ":00"])
def test_what_is_no_fingerprint(text: str) -> None:
    with pytest.raises(SourceError, match=r"a\.gguf is '.*', which is no fingerprint of a model that this edgeq reads"):
        Fingerprint.parse(text, where="a.gguf")


def test_a_model_without_matrices() -> None:
    taken = take_fingerprint({"norm": from_values(np.ones(4), origin="norm")})
    assert taken.sketch == (0,) * 64 and taken.distance(taken) == 0
