"""Folders as edgeq exports them, of every family: logits of the reference, tokens of onnxruntime-genai, reuse of the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_folders import genai_tokens
from tiny import N_VOCAB, TINY_FAMILIES, hf_folder

from edgeq.converters.onnx.carrier import write_onnx
from edgeq.converters.onnx.decoder import decoder
from edgeq.converters.onnx.genai import GENAI_FILE, genai_config, shares_buffer, to_bytes
from edgeq.converters.onnx.tokenizer_files import tokenizer_files
from edgeq.converters.sources.resolve import open_model
from edgeq.grids import grid
from edgeq.model import Model
from edgeq.reference import Reference
from edgeq.runtime.engine import read_facts
from edgeq.runtime.onnx_model import OnnxModel
from edgeq.runtime.session import load

N_CTX = 96
PROMPT = [1, *range(60, 90)]


def export(folder: Path, family: str, *, head: str | None = None, n_ctx: int = N_CTX, **overrides: Any) -> Model:
    """Write a folder with the exporter's own parts. head: grid of the head and embedding, F32 by default."""
    model = open_model(hf_folder(folder.with_name(folder.name + "-source"), family, seed=3, **overrides))
    grids = {name: grid(head if head and name.startswith(("head", "embed")) else "F32") for name in model.tensors}
    builder = decoder(model, grids, float_type=ir.DataType.FLOAT, n_ctx=n_ctx)
    folder.mkdir()
    write_onnx(folder, builder, metadata={"edgeq.family": model.spec.family})
    tokenizer_files(model.tokenizer, n_ctx=n_ctx).write(folder)
    config = genai_config(
        model.spec,
        model.tokenizer.vocabulary,
        filename="model.onnx",
        n_ctx=n_ctx,
        max_length=n_ctx,
        share_buffer=shares_buffer(builder.model()),
    )
    (folder / GENAI_FILE).write_bytes(to_bytes(config))
    return model


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_runs(tmp_path: Path, family: str) -> None:
    folder = tmp_path / "m"
    model = export(folder, family)
    ids = np.random.default_rng(1).integers(3, N_VOCAB, N_CTX).tolist()
    reference = Reference(model.spec, model.tensors)
    expected = reference.logits(reference.hidden([ids], n_ctx=N_CTX)[0]).numpy()
    with load(folder, threads=1) as session:
        assert isinstance(session.model, OnnxModel) and session.model.chooses_rows
        assert (session.model.facts.arch, session.n_ctx) == (model.spec.family, N_CTX)
        assert session.model.facts.n_positions == N_CTX
        context = session.context
        assert np.abs(context.logits_of(ids) - expected).max() < 1e-4 < np.ptp(expected)
        context.clear()
        np.testing.assert_allclose(context.decode(ids[:-5])[0], expected[-6], atol=1e-4)
        for i in range(N_CTX - 5, N_CTX):
            np.testing.assert_allclose(context.decode([ids[i]])[0], expected[i], atol=1e-4)
        assert context.truncate(40) == 40
        np.testing.assert_allclose(context.decode(ids[40:50])[0], expected[49], atol=1e-4)
        session._cached = []
        tokens = session.generate(PROMPT, max_tokens=40).tokens
        assert session.generate([*PROMPT, *tokens[:7]], max_tokens=3).timings.reused_tokens == len(PROMPT) + 6
    assert list(tokens) == genai_tokens(folder, PROMPT, 40)


@pytest.mark.parametrize("head", ["Q8_0", "Q4_0", "Q4_1"])
def test_quantized_heads_give_logits_of_chosen_tokens(tmp_path: Path, head: str) -> None:
    """Of a Q4_1 head the minima are a second product, of sums over blocks."""
    folder = tmp_path / "m"
    export(folder, "qwen2-tied", head=head)
    with load(folder, threads=1) as session:
        assert isinstance(session.model, OnnxModel) and session.model.chooses_rows
        context = session.context
        every = context.logits_of(PROMPT)
        context.clear()
        np.testing.assert_allclose(context.decode(PROMPT)[0], every[-1], atol=1e-4)
        assert np.ptp(every) > 1
    assert read_facts(folder / "model.onnx").n_vocab == N_VOCAB
