"""Importance overheard is importance measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import hf_folder

from edgeq.calibration import importance
from edgeq.converters.sources.resolve import open_model
from edgeq.listening import Listening
from edgeq.reference import Reference
from edgeq.sensitivity import layer_statistics

WINDOWS = np.random.default_rng(5).integers(0, 320, (3, 40)).tolist()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_what_is_overheard_in_sorting_equals_a_calibration_of_its_own(tmp_path: Path, name: str) -> None:
    """The head is heard on every token but the last of each window, which predicts nothing."""
    torch.set_num_threads(1)
    model = open_model(str(hf_folder(tmp_path / "m", name)))
    reference = Listening(model.spec, model.tensors)
    assert reference.importance() is None
    assert len(list(layer_statistics(reference, WINDOWS))) == model.spec.n_layers
    heard, measured = reference.importance(), importance(Reference(model.spec, model.tensors), WINDOWS)
    assert heard is not None
    assert heard.keys() == measured.keys()
    for key, values in measured.items():
        np.testing.assert_allclose(heard[key], values, rtol=0.1 if key == "head" else 1e-4, err_msg=key)
