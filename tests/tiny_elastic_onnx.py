"""Tiny ONNX folders as an export writes them, and an elastic package of one without an export: a ladder and hidden models made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from edgeq.compensation import HiddenModel
from edgeq.converters.onnx.carrier import write_onnx
from edgeq.converters.onnx.cuttable import with_down_bias
from edgeq.converters.onnx.decoder import decoder
from edgeq.converters.onnx.genai import GENAI_FILE, genai_config, shares_buffer, to_bytes
from edgeq.converters.onnx.quants import choose_grids, onnx_quant
from edgeq.converters.onnx.tokenizer_files import tokenizer_files
from edgeq.converters.sources.resolve import open_model
from edgeq.elastic import Ladder, Step
from edgeq.elastic_files import write_elastic
from edgeq.model import Model
from edgeq.package import record_files, write_manifest

QUANTS = ("fp32", "fp16", "int8", "int8-asym", "int4", "int4-asym")
STEP, RANK = 32, 8

Floats = np.ndarray[Any, np.dtype[np.float32]]


def model_of(folder: Path) -> Model:
    return open_model(folder)


def write_model(model: Model, folder: Path, quant: str = "fp32", **settings: Any) -> None:
    """Graph, weights and genai_config.json. settings: of `decoder`."""
    folder.mkdir(parents=True)
    half = quant == "fp16"
    float_type = ir.DataType.FLOAT16 if half else ir.DataType.FLOAT
    graph = decoder(model, choose_grids(onnx_quant(quant), model, half=half), float_type=float_type, **settings)
    write_onnx(folder, graph)
    shared = shares_buffer(graph.model())
    config = genai_config(
        model.spec, model.tokenizer.vocabulary, filename="model.onnx", n_ctx=model.spec.n_ctx, max_length=64, share_buffer=shared
    )
    (folder / GENAI_FILE).write_bytes(to_bytes(config))


def session_logits(folder: Path, ids: Sequence[int]) -> Floats:
    """(n_tokens, n_vocab), by onnxruntime, of one prompt at once."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    feed: dict[str, Any] = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), dtype=np.int64)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            dtype = np.float16 if "float16" in value.type else np.float32
            feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), dtype=dtype)
    found: Floats = session.run(["logits"], feed)[0][0].astype(np.float32)
    return found


def write_elastic_onnx(folder: Path, source: Path, *, quant: str = "fp32", hidden: bool = True) -> Model:
    """A package of the model in a Hugging Face folder, and the model that it holds, with biases for down projections. Unsigned."""
    model = with_down_bias(open_model(source), "edgeq")
    artifact = folder / f"tiny-{quant}"
    write_model(model, artifact, quant)
    beside = tokenizer_files(model.tokenizer, n_ctx=model.spec.n_ctx).write(artifact)
    rng = np.random.default_rng(1)
    models = {block.layer: hidden_model(rng, block.n_ff) for block in model.spec.mlps} if hidden else {}
    orders = [np.arange(n) for b in model.spec.attention for n in (b.n_kv_heads, model.spec.mlps[b.layer].n_ff)]
    side = write_elastic(folder, ladder=ladder(model, with_groups=quant.startswith("fp")), hidden=models, orders=orders, sort="edgeq")
    artifacts = record_files(folder, [artifact / "model.onnx", artifact / "model.onnx.data"])
    side_files = record_files(folder, [artifact / GENAI_FILE, *beside, *side])
    export = {"profile": "laptop-cpu", "n_ctx": 128, "kv_type": "f16" if quant == "fp16" else "f32", "rate": 0.0, "removed_fraction": 0.0}
    memory = {"compute_bytes": 1_000_000, "runtime_bytes": 2_000_000, "n_ctx": 128}
    write_manifest(
        folder,
        {
            "status": "unverified",
            "export": {**export, "format": "onnx", "elastic": True},
            "plan": {"memory": memory},
            "artifacts": [{**record.to_json(), "format": "onnx"} for record in artifacts],
            "side_files": [record.to_json() for record in side_files],
            "adapters": [],
        },
    )
    return model


def hidden_model(rng: np.random.Generator, n_ff: int) -> HiddenModel:
    return HiddenModel(
        mean=rng.standard_normal(n_ff).astype(np.float32),
        factors=rng.standard_normal((n_ff, RANK)).astype(np.float32),
        noise=(0.2 + rng.random(n_ff)).astype(np.float32),
    )


def ladder(model: Model, *, with_groups: bool) -> Ladder:
    """Widths down to 32 in turns, and one KV group of the last layer halfway."""
    spec, steps = model.spec, []
    n_ff, n_kv = tuple(b.n_ff for b in spec.mlps), tuple(b.n_kv_heads for b in spec.attention)
    for start in range(n_ff[0], STEP, -STEP):
        for layer in range(spec.n_layers):
            removed = 3 * spec.n_embd * STEP
            steps.append(Step(layer=layer, port="ffn", start=start, stop=start - STEP, removed=removed, damage=0.1))
        if start == n_ff[0] - STEP and with_groups:
            last = spec.attention[-1]
            removed = 2 * spec.n_embd * last.head_dim * (1 + last.n_heads // last.n_kv_heads)
            kv = last.n_kv_heads
            steps.append(Step(layer=last.layer, port="kv_group", start=kv, stop=kv - 1, removed=removed, damage=0.5))
    total = sum(prod(t.shape) for name, t in model.tensors.items() if name.startswith("layers.") and not name.endswith("down.bias"))
    return Ladder(n_ff=n_ff, n_kv=n_kv, block_params=total, steps=tuple(steps))
