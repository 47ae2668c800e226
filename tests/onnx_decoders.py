"""Decoder graphs in memory: random models of any spec, sessions, and running them with a cache that is fed back or shared.

model = random_decoder(spec)
logits = run(session(decoder(model, float_grids(model), float_type=FLOAT)), ids, steps=(7, 1, 1))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from edgeq.converters.gguf.lowering import expected_shapes
from edgeq.converters.onnx.builder import Builder
from edgeq.grids import F32, Grid
from edgeq.model import Model
from edgeq.reference import Reference
from edgeq.spec import ModelSpec
from edgeq.tensors import LazyTensor, from_values

Array = np.ndarray[Any, np.dtype[Any]]
FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
# Both sides sum in float32, in another order; 5e-6 was measured on logits that span 8.
CLOSE = 1e-4
CPU = ["CPUExecutionProvider"]


def random_decoder(spec: ModelSpec, *, seed: int = 0) -> Model:
    """A model without a tokenizer whose tensors, norms and biases too, are random, and whose logits are of order 1."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, LazyTensor] = {}
    for name, shape in expected_shapes(spec).items():
        values = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 2:
            values /= np.float32(math.sqrt(shape[1]))
        else:
            values = np.float32(0.2) * values + np.float32(0 if name.endswith("bias") else 1)
        tensors[name] = from_values(values, origin=name)
    return with_tensors(spec, tensors)


def with_tensors(spec: ModelSpec, tensors: dict[str, LazyTensor]) -> Model:
    return Model(name="random", spec=spec, tensors=tensors, tokenizer=cast(Any, None), files=(), format="hf")


def float_grids(model: Model) -> dict[str, Grid]:
    return dict.fromkeys(model.tensors, F32)


def reference_logits(model: Model, ids: Sequence[int], *, n_ctx: int | None = None) -> Array:
    """(n_tokens, n_vocab)."""
    reference = Reference(model.spec, model.tensors)
    return reference.logits(reference.hidden([list(ids)], n_ctx=n_ctx)[0]).numpy()


def session(g: Builder) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return ort.InferenceSession(ir.serde.serialize_model(g.model()).SerializeToString(), options, providers=CPU)


def caches(running: ort.InferenceSession) -> Iterator[Any]:
    return (value for value in running.get_inputs() if value.name.startswith("past_key_values."))


def run(running: ort.InferenceSession, ids: Sequence[int], steps: Sequence[int]) -> Array:
    """Logits of all tokens of one text, (n_tokens, n_vocab): `steps` tokens at a time, what is present fed back as past."""
    return run_texts(running, np.array([ids]), np.ones((1, sum(steps)), dtype=np.int64), steps)[0]


def run_texts(running: ort.InferenceSession, ids: Array, mask: Array, steps: Sequence[int]) -> Array:
    """As `run`, for texts (n_texts, n_tokens) with padding where mask is 0."""
    past = {value.name: np.zeros((len(ids), value.shape[1], 0, value.shape[3]), dtype_of(value)) for value in caches(running)}
    names = [value.name for value in running.get_outputs()]
    found, start = [], 0
    for n in steps:
        stop = start + n
        made = running.run(None, {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop], **past})
        outputs = dict(zip(names, made, strict=True))
        past = {name: outputs[name.replace("past_key_values.", "present.")] for name in past}
        found.append(outputs["logits"])
        start = stop
    return np.concatenate(found, axis=1)


def run_shared(running: ort.InferenceSession, ids: Sequence[int], steps: Sequence[int], *, room: int) -> Array:
    """As `run`, with one buffer of `room` tokens that is past and present at once."""
    buffers = {
        value.name: ort.OrtValue.ortvalue_from_numpy(np.zeros((1, value.shape[1], room, value.shape[3]), dtype_of(value)))
        for value in caches(running)
    }
    found, start = [], 0
    for n in steps:
        stop = start + n
        binding = running.io_binding()
        binding.bind_cpu_input("input_ids", np.array([ids[start:stop]]))
        binding.bind_cpu_input("attention_mask", np.ones((1, stop), dtype=np.int64))
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), buffer)
        binding.bind_output("logits")
        running.run_with_iobinding(binding)
        bound = [*(name.replace("past_key_values.", "present.") for name in buffers), "logits"]
        found.append(binding.get_outputs()[bound.index("logits")].numpy()[0])
        start = stop
    return np.concatenate(found)


def dtype_of(value: Any) -> type[np.floating[Any]]:
    return {"tensor(float)": np.float32, "tensor(float16)": np.float16}[value.type]


def nodes(g: Builder, op: str) -> dict[str, ir.Node]:
    """Nodes of an operator by name."""
    return {str(node.name): node for node in g.model().graph if node.op_type == op}
