"""Sparse adapters as patches: what a session with the patch says is what the merged model says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_adapters import IDS, made_adapter
from tiny import hf_folder

import edgeq
from edgeq.converters.adapters.patch_writer import patch_places
from edgeq.converters.gguf.lowering import lower
from edgeq.converters.sources.resolve import open_model
from edgeq.deltas.adapter import Adapter
from edgeq.deltas.merge import merged
from edgeq.deltas.spectral import Entries, SHiRA
from edgeq.errors import UnsupportedError, UsageError
from edgeq.gguf_file import read_header
from edgeq.model import Model
from edgeq.patch_file import write_patch
from edgeq.reference import Reference
from edgeq.reference_scores import TorchScores


def sparse_adapter(model: Model) -> Adapter:
    """SHiRA on every projection of every layer, of q and k in all heads."""
    rng, deltas = np.random.default_rng(5), {}
    for name in sorted(model.tensors):
        shape: Any = model.tensors[name].shape
        if name.startswith("layers.") and len(shape) == 2:
            at = rng.choice(shape[0] * shape[1], size=shape[0] * shape[1] // 20, replace=False)
            values = rng.standard_normal(len(at)) / np.sqrt(shape[1])
            deltas[name] = SHiRA(entries=Entries(rows=at // shape[1], cols=at % shape[1], values=values, shape=shape))
    return Adapter(name="sparse", kind="SHIRA", deltas=deltas)


def logits(model: Model) -> np.ndarray:
    return TorchScores(Reference(model.spec, model.tensors), [IDS], n_ctx=256).logits(0)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3", "smollm3"])
def test_a_patched_session_is_the_merged_model(family: str, tmp_path: Path) -> None:
    source = hf_folder(tmp_path / family, family)
    edgeq.export(source, profile="laptop-cpu", output=tmp_path / "p", quant="F32", elastic=False, verify=False)
    file, model = next((tmp_path / "p").glob("*.gguf")), open_model(source)
    adapter = sparse_adapter(model)
    path = write_patch(tmp_path / "s.eqpatch", patch_places(adapter, model, lower(model)), read_header(file))
    expected = logits(merged(model, [(adapter, 1.0)]))
    scores = expected[:-1] - np.log(np.exp(expected[:-1]).sum(1, keepdims=True))
    targets = scores[np.arange(len(IDS) - 1), IDS[1:]]
    with edgeq.load(file, n_ctx=256, threads=1, patchable=True) as session:
        plain = session.score(IDS)
        session.apply_patch(path)
        np.testing.assert_allclose(session.score(IDS), targets, atol=2e-2)  # of the plain model: 5e-3, by attention in F16
        assert np.abs(plain - targets).max() > 0.1
        session.undo_patch("s")
        np.testing.assert_array_equal(session.score(IDS), plain)


def test_convert_writes_a_patch_for_a_gguf_file(tmp_path: Path, run: Any) -> None:
    import peft
    from peft_folders import lora_folder
    from peft_oracle import make

    source, folder = hf_folder(tmp_path / "llama", "llama"), tmp_path / "shira"
    edgeq.export(source, profile="laptop-cpu", output=tmp_path / "p", quant="F16", elastic=False, verify=False)
    file = next((tmp_path / "p").glob("*.gguf"))
    make("llama", peft.ShiraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"]), folder, merge=False)
    status, out, err = run("adapters", "convert", folder, "--base", file, "-o", tmp_path / "s.eqpatch", "--other-base", "--json")
    assert status == 0, err
    assert json.loads(out)["bytes"] == (tmp_path / "s.eqpatch").stat().st_size
    with edgeq.load(file, n_ctx=64, threads=1, patchable=True) as session:
        before = session.score(IDS[:20])
        session.apply_patch(tmp_path / "s.eqpatch")
        assert np.abs(session.score(IDS[:20]) - before).max() > 1e-4
    status, _, err = run("adapters", "convert", folder, "--base", source, "-o", tmp_path / "t.eqpatch", "--other-base")
    assert status == UsageError.exit_code
    assert "a patch is for one GGUF file in F16 or F32. Export the model with --fixed --quant F16" in err
    lora = tmp_path / "lora"
    lora_folder(lora, source, rank=2, seed=1, gain=0.3)
    status, _, err = run("adapters", "convert", lora, "--base", file, "-o", tmp_path / "t.eqpatch", "--other-base")
    assert status == 1
    assert "a patch holds sparse changes alone. Merge it at export, or convert it to a LoRA" in err


def test_changes_that_the_file_has_no_place_for_are_refused(tmp_path: Path) -> None:
    model = open_model(hf_folder(tmp_path / "llama", "llama"))
    adapter = sparse_adapter(model)
    far = Adapter(name="far", kind="SHIRA", deltas={"layers.9.wq.weight": adapter.deltas["layers.0.wq.weight"]})
    with pytest.raises(UnsupportedError, match=r"'far' changes layers.9.wq.weight, for which the file has no tensor"):
        patch_places(far, model, lower(model))
    with pytest.raises(UnsupportedError, match=r"'made' \(LORA\) changes all of layers.0.wq.weight"):
        patch_places(made_adapter(model), model, lower(model))
