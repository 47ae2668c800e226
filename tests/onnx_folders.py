"""Tiny ONNX decoder folders, laid out as onnxruntime-genai's builder does: what the runtime's tests load.

A hand-written graph of a random Llama-like model (`tiny.hf_folder`), small enough to read: whatever the exporter writes, the runtime is
tested against this one too. `attention` chooses the operator: "GroupQueryAttention" writes its cache in place and rotates by itself,
"Attention" copies it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from tiny import CHAT_TEMPLATE, hf_folder

from edgeq.converters.onnx.builder import MS, Builder
from edgeq.converters.onnx.carrier import write_onnx
from edgeq.converters.sources.resolve import open_model
from edgeq.model import Model

N_CTX, HEAD_DIM = 256, 32
AttentionOp = Literal["GroupQueryAttention", "Attention"]
_I64, _I32 = ir.DataType.INT64, ir.DataType.INT32


def write_tiny_onnx(
    folder: Path,
    *,
    attention: AttentionOp = "GroupQueryAttention",
    float_type: ir.DataType = ir.DataType.FLOAT,
    n_layers: int = 2,
    seed: int = 0,
    gain: float = 3.0,
    config: Callable[[dict[str, Any]], Any] = lambda config: None,
    **overrides: Any,
) -> Model:
    """Write a folder and return the model it holds. gain spreads the logits; config edits genai_config.json's `model`."""
    values = {"head_dim": HEAD_DIM, "num_hidden_layers": n_layers, **overrides}
    source = hf_folder(folder.with_name(folder.name + "-source"), "llama", seed=seed, **values)
    model = open_model(source)
    folder.mkdir(parents=True)
    write_onnx(folder, _Graph(model, attention, float_type, gain).builder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    described = genai_config(model, config, shared=attention == "GroupQueryAttention")
    (folder / "genai_config.json").write_text(json.dumps(described, indent=1), encoding="utf-8")
    return model


def edit_graph(folder: Path, change: Callable[[Any], Any]) -> Path:
    """Rewrite model.onnx after `change` has altered its ModelProto in place; weights stay. Returns its path."""
    import onnx

    path = folder / "model.onnx"
    proto = onnx.load(path, load_external_data=False)
    change(proto)
    path.write_bytes(proto.SerializeToString())
    return path


def copy_of(folder: Path, target: Path) -> Path:
    """A copy of a folder whose files are its own."""
    return Path(shutil.copytree(folder, target))


def genai_tokens(folder: Path, ids: Sequence[int], n: int, *, adapter: Path | None = None) -> list[int]:
    """Greedy continuation by onnxruntime-genai, with an adapter if one is given, up to the first end of generation, which is left out."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    described = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    shared, ends = described["search"]["past_present_share_buffer"], described["model"]["eos_token_id"]
    parameters.set_search_options(max_length=len(ids) + n, do_sample=False, past_present_share_buffer=shared)
    generator = og.Generator(model, parameters)
    if adapter is not None:
        adapters = og.Adapters(model)
        adapters.load(str(adapter), "adapter")
        generator.set_active_adapter(adapters, "adapter")
    generator.append_tokens(np.array(ids, dtype=np.int32))
    tokens: list[int] = []
    while len(tokens) < n:
        generator.generate_next_token()
        token = int(generator.get_next_tokens()[0])
        if token in ends:
            break
        tokens.append(token)
    return tokens


def genai_config(model: Model, change: Callable[[dict[str, Any]], Any] = lambda config: None, *, shared: bool = True) -> dict[str, Any]:
    spec = model.spec
    layer = spec.attention[0]
    described: dict[str, Any] = {
        "type": "llama",
        "bos_token_id": 1,
        "eos_token_id": [2, 0],
        "pad_token_id": 2,
        "context_length": spec.n_ctx,
        "vocab_size": spec.n_vocab,
        "decoder": {
            "filename": "model.onnx",
            "head_size": layer.head_dim,
            "hidden_size": spec.n_embd,
            "num_attention_heads": layer.n_heads,
            "num_key_value_heads": layer.n_kv_heads,
            "num_hidden_layers": spec.n_layers,
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
        },
    }
    change(described)
    return {"model": described, "search": {"max_length": N_CTX, "past_present_share_buffer": shared}}


class _Graph:
    """The decoder of a Llama-like model without biases."""

    def __init__(self, model: Model, attention: AttentionOp, float_type: ir.DataType, gain: float) -> None:
        self.model, self.spec, self.attention, self.gain = model, model.spec, attention, gain
        self.builder = g = Builder("tiny", float_type=float_type)
        self.dtype = float_type.numpy()
        self.ids = g.input("input_ids", _I64, ["batch_size", "sequence_length"])
        self.mask = g.input("attention_mask", _I64, ["batch_size", "total_sequence_length"])
        self.past = [
            [g.input(f"past_key_values.{i}.{kind}", float_type, self.cache_shape(i, "past")) for kind in ("key", "value")]
            for i in range(self.spec.n_layers)
        ]
        self.counts()
        self.tables()
        x = g.node("Gather", [self.weight("embed.weight"), self.ids], path="/model/embed_tokens/Gather", shape=self.states())
        for i in range(self.spec.n_layers):
            x = self.add(x, self.attend(i, self.norm(x, f"layers.{i}.attn_norm.weight", i)), f"/model/layers.{i}/attn/Add")
            x = self.add(x, self.mlp(i, self.norm(x, f"layers.{i}.mlp_norm.weight", i)), f"/model/layers.{i}/mlp/Add")
        x = self.norm(x, "final_norm.weight", "final")
        logits = self.linear(x, "head.weight", "/lm_head", gain=gain)
        g.output(logits, "logits", float_type, ["batch_size", "sequence_length", self.spec.n_vocab])

    def cache_shape(self, layer: int, which: str) -> list[int | str]:
        block = self.spec.attention[layer]
        return ["batch_size", block.n_kv_heads, f"{which}_sequence_length", block.head_dim]

    def states(self, width: int | None = None) -> list[int | str]:
        return ["batch_size", "sequence_length", width or self.spec.n_embd]

    def weight(self, name: str, *, turned: bool = False, gain: float = 1.0) -> ir.Value:
        values = gain * self.model.tensors[name].decode()
        array = np.ascontiguousarray(values.T if turned else values).astype(self.dtype)
        return self.builder.weight(f"model.{name}", self.builder.float_type, array.shape, lambda: array)

    def linear(self, x: ir.Value, name: str, path: str, *, gain: float = 1.0) -> ir.Value:
        w = self.weight(name, turned=True, gain=gain)
        return self.builder.node("MatMul", [x, w], path=f"{path}/MatMul", shape=self.states(self.model.tensors[name].shape[0]))

    def norm(self, x: ir.Value, name: str, where: object) -> ir.Value:
        attributes = {"axis": -1, "epsilon": self.spec.norm_eps, "stash_type": 1}
        path = f"/model/{name.removesuffix('.weight')}/{where}/SimplifiedLayerNormalization"
        inputs = [x, self.weight(name)]
        return self.builder.node("SimplifiedLayerNormalization", inputs, path=path, shape=self.states(), attributes=attributes)

    def add(self, a: ir.Value, b: ir.Value, path: str) -> ir.Value:
        return self.builder.node("Add", [a, b], path=path, shape=self.states())

    def mlp(self, i: int, x: ir.Value) -> ir.Value:
        g, path, n_ff = self.builder, f"/model/layers.{i}/mlp", self.spec.mlps[i].n_ff
        gate, up = (self.linear(x, f"layers.{i}.{role}.weight", f"{path}/{role}") for role in ("gate", "up"))
        act = g.node("Mul", [gate, g.node("Sigmoid", [gate], path=f"{path}/act/Sigmoid", shape=self.states(n_ff))], path=f"{path}/act/Mul")
        return self.linear(g.node("Mul", [act, up], path=f"{path}/Mul", shape=self.states(n_ff)), f"layers.{i}.down.weight", f"{path}/down")

    def counts(self) -> None:
        """Tokens behind which the last one stands, and all of them; for the other operator, positions."""
        g, one = self.builder, self.builder.constant("/c/1", np.array([1]))
        total = g.node("Gather", [g.node("Shape", [self.mask], path="/m/Shape", dtype=_I64), one], path="/m/total", dtype=_I64, shape=[1])
        if self.attention == "GroupQueryAttention":
            sum = g.node("ReduceSum", [self.mask, one], path="/m/ReduceSum", dtype=_I64, attributes={"keepdims": 0})
            less = g.node("Sub", [sum, one], path="/m/Sub", dtype=_I64)
            self.before = g.node("Cast", [less], path="/m/seqlens_k", dtype=_I32, attributes={"to": _I32.value}, shape=["batch_size"])
            alone = g.node("Squeeze", [total], path="/m/Squeeze", dtype=_I64, shape=[])
            self.total = g.node("Cast", [alone], path="/m/total_sequence_length", dtype=_I32, attributes={"to": _I32.value}, shape=[])
            return
        new = g.node("Gather", [g.node("Shape", [self.ids], path="/i/Shape", dtype=_I64), one], path="/i/new", dtype=_I64, shape=[1])
        start = g.node("Squeeze", [g.node("Sub", [total, new], path="/i/Sub", dtype=_I64)], path="/i/start", dtype=_I64)
        stop = g.node("Squeeze", [total], path="/i/stop", dtype=_I64)
        run = g.node("Range", [start, stop, g.constant("/c/step", np.array(1))], path="/i/Range", dtype=_I64)
        self.positions = g.node("Unsqueeze", [run, g.constant("/c/axis", np.array([0]))], path="/i/Unsqueeze", dtype=_I64)

    def tables(self) -> None:
        dim = self.spec.rope.dim
        angles = np.outer(np.arange(N_CTX), self.spec.rope.base ** (-np.arange(0, dim, 2) / dim))
        self.cos = self.builder.constant("cos_cache", np.cos(angles).astype(self.dtype))
        self.sin = self.builder.constant("sin_cache", np.sin(angles).astype(self.dtype))

    def attend(self, i: int, x: ir.Value) -> ir.Value:
        g, block, path = self.builder, self.spec.attention[i], f"/model/layers.{i}/attn"
        q, k, v = (self.linear(x, f"layers.{i}.{role}.weight", f"{path}/{role}") for role in ("wq", "wk", "wv"))
        heads = {"num_heads": block.n_heads, "kv_num_heads": block.n_kv_heads}
        outputs: list[Any] = [(g.float_type, self.states(block.n_heads * block.head_dim))]
        outputs += [(g.float_type, self.cache_shape(i, "total"))] * 2
        if self.attention == "GroupQueryAttention":
            inputs = [q, k, v, *self.past[i], self.before, self.total, self.cos, self.sin]
            attributes = {**heads, "scale": self.spec.attn_scale, "do_rotary": 1, "rotary_interleaved": 0}
            domain = MS
        else:
            inputs = [self.turned(q, block.n_heads, f"{path}/q"), self.turned(k, block.n_kv_heads, f"{path}/k"), v, None, *self.past[i]]
            attributes = {"q_num_heads": block.n_heads, "kv_num_heads": block.n_kv_heads, "scale": self.spec.attn_scale, "is_causal": 1}
            domain = ""
        y, *present = g.nodes(
            self.attention, inputs, path=f"{path}/{self.attention}", outputs=outputs, domain=domain, attributes=attributes
        )
        for kind, value in zip(("key", "value"), present, strict=True):
            g.output(value, f"present.{i}.{kind}", g.float_type, self.cache_shape(i, "total"))
        return self.linear(y, f"layers.{i}.wo.weight", f"{path}/wo")

    def turned(self, x: ir.Value, n_heads: int, path: str) -> ir.Value:
        inputs = [x, self.cos, self.sin, self.positions]
        return self.builder.node("RotaryEmbedding", inputs, path=f"{path}/RotaryEmbedding", attributes={"num_heads": n_heads})
