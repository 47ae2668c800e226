"""The ONNX graph of an encoder: token ids and mask to the last layer's vectors and one vector per text.

    input_ids, attention_mask, token_type_ids   int64 [batch_size, sequence_length]; the last where the model has kinds of segments
    last_hidden_state                           float [batch_size, sequence_length, n_embd]
    sentence_embedding                          float [batch_size, n_out]

Inputs and last_hidden_state are called as other exporters call them. Operators of com.microsoft where one does what takes several
otherwise: MultiHeadAttention (biases and mask of padding inside), SkipLayerNormalization (bias and residual inside), BiasGelu for the exact
GELU and FastGelu for its tanh form. Both outputs are float32, and pooling computes in it, whatever the format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from edgeq.converters.encoders.families import encoder_family
from edgeq.converters.encoders.hf_bert import checkpoint_name
from edgeq.converters.encoders.int8_rows import linear_rows
from edgeq.converters.onnx import weights
from edgeq.converters.onnx.builder import MS, Builder, Dim, shape_of
from edgeq.converters.onnx.int8 import Int8Grid
from edgeq.converters.onnx.packed import as_float_type, float_columns
from edgeq.encoder_spec import EncoderSpec, Pooling, SentenceSpec, relative_buckets
from edgeq.grids import F16, F32, Grid
from edgeq.tensors import LazyTensor

_FLOAT, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64
_TOKENS: list[Dim] = ["batch_size", "sequence_length"]
_MASKED = np.float32(-1e9)  # of padding, below every value that is pooled
_LEAST_LENGTH = np.float32(1e-12)


def encoder(spec: EncoderSpec, sentence: SentenceSpec, tensors: Mapping[str, LazyTensor], *, float_type: ir.DataType) -> Builder:
    """tensors: rounded to their grids already (`formats.rounded`), whose codes are kept. A single kind of segment is folded."""
    assert spec.n_types != 1, "fold a single kind of segment into positions"
    g = Builder(f"{spec.family}-encoder", float_type=float_type)
    ids = g.input("input_ids", _INT64, _TOKENS)
    mask = g.input("attention_mask", _INT64, _TOKENS)
    types = g.input("token_type_ids", _INT64, _TOKENS) if spec.n_types else None
    made = _Encoder(g, spec, tensors)
    x = made.embed(ids, types)
    mask32 = _cast(g, mask, ir.DataType.INT32, "/attention_mask")
    bias = made.relative_bias(ids) if spec.n_buckets else None
    for layer in range(spec.n_layers):
        x = made.layer(layer, x, mask32, bias)
    if float_type != _FLOAT:
        x = _cast(g, x, _FLOAT, "/last_hidden_state")
    pooled = _pooled(g, x, mask, sentence, tensors)
    g.output(x, "last_hidden_state", _FLOAT, [*_TOKENS, spec.n_embd])
    g.output(pooled, "sentence_embedding", _FLOAT, ["batch_size", sentence.n_out])
    return g


class _Encoder:
    """What the layers share: the builder, sizes and weights."""

    def __init__(self, g: Builder, spec: EncoderSpec, tensors: Mapping[str, LazyTensor]) -> None:
        self.g, self.spec, self.tensors = g, spec, tensors
        family = encoder_family(spec.family)
        assert family is not None
        self.family = family

    def embed(self, ids: ir.Value, types: ir.Value | None) -> ir.Value:
        x = self._rows("embed", ids)
        if types is not None:
            x = self._add(x, self._rows("types", types), "/embeddings/Add")
        return self._norm("embed_norm", x, self._rows("positions", self._places(ids)), None)

    def layer(self, layer: int, x: ir.Value, mask: ir.Value, bias: ir.Value | None) -> ir.Value:
        spec, g = self.spec, self.g
        prefix = f"layers.{layer}"
        q, k, v = (self._linear(f"{prefix}.{role}", x) for role in ("wq", "wk", "wv"))
        biases = self._stream(f"{prefix}.qkv.bias", [f"{prefix}.{role}.bias" for role in ("wq", "wk", "wv")])
        path = self._path(f"{prefix}.wq").rsplit("/", 1)[0]
        mixed = g.node(
            "MultiHeadAttention",
            [q, k, v, biases, mask, *([] if bias is None else [bias])],
            path=f"{path}/MultiHeadAttention",
            shape=shape_of(x),
            domain=MS,
            attributes={"num_heads": spec.n_heads, "scale": spec.head_dim**-0.5},
        )
        x = self._norm(f"{prefix}.attn_norm", self._linear(f"{prefix}.wo", mixed), x, f"{prefix}.wo.bias")
        hidden = self._activated(f"{prefix}.up", self._linear(f"{prefix}.up", x))
        return self._norm(f"{prefix}.mlp_norm", self._linear(f"{prefix}.down", hidden), x, f"{prefix}.down.bias")

    def relative_bias(self, ids: ir.Value) -> ir.Value:
        """What attention adds by distance, [1, n_heads, n_tokens, n_tokens]: a table by distance, gathered."""
        g, most = self.g, self.spec.n_positions
        path = f"/{self.family.modules['relative'].replace('.', '/')}"
        buckets = relative_buckets(most, self.spec.n_buckets)
        by_distance = np.concatenate([buckets[-1, :-1], buckets[0]])  # distances -(most - 1) .. most - 1

        def table() -> list[np.ndarray]:
            weight = self.tensors["relative.weight"]
            return [as_float_type(np.ascontiguousarray(weight.decode()[by_distance].T), g.float_type, weight.origin)]

        rows = g.stream(f"{self.family.modules['relative']}.by_distance", g.float_type, (self.spec.n_heads, len(by_distance)), table)
        places = self._range(ids)
        square: list[Dim] = ["sequence_length", "sequence_length"]
        column = g.node(
            "Unsqueeze", [places, _ints(g, "/constants/axis1", [1])], path=f"{path}/Unsqueeze", dtype=_INT64, shape=["sequence_length", 1]
        )
        distance = g.node("Sub", [places, column], path=f"{path}/Sub", dtype=_INT64, shape=square)
        index = g.node("Add", [distance, g.constant(f"{path}/first", np.array(most - 1))], path=f"{path}/Add", dtype=_INT64, shape=square)
        found = g.node("Gather", [rows, index], path=f"{path}/Gather", shape=[self.spec.n_heads, *square], attributes={"axis": 1})
        return g.node("Unsqueeze", [found, _ints(g, "/constants/axis0", [0])], path=f"{path}/Batch", shape=[1, self.spec.n_heads, *square])

    def _places(self, ids: ir.Value) -> ir.Value:
        """Rows of the table of positions: [1, n_tokens] places, or [batch_size, n_tokens] numbers of tokens that are not padding."""
        g, path = self.g, "/embeddings/position_ids"
        if not self.spec.counts_positions:
            axis = _ints(g, "/constants/axis0", [0])
            return g.node("Unsqueeze", [self._range(ids), axis], path=f"{path}/Unsqueeze", dtype=_INT64, shape=[1, "sequence_length"])
        padding = g.constant(f"{path}/padding", np.array(self.spec.padding_id))
        same = g.node("Equal", [ids, padding], path=f"{path}/Equal", dtype=ir.DataType.BOOL, shape=_TOKENS)
        there = g.node("Not", [same], path=f"{path}/Not", dtype=ir.DataType.BOOL, shape=_TOKENS)
        there = _cast(g, there, _INT64, f"{path}/There")
        axis = g.constant("/constants/one_axis", np.array(1))
        counted = g.node("CumSum", [there, axis], path=f"{path}/CumSum", dtype=_INT64, shape=_TOKENS)
        counted = g.node("Mul", [counted, there], path=f"{path}/Mul", dtype=_INT64, shape=_TOKENS)
        return g.node("Add", [counted, padding], path=f"{path}/Add", dtype=_INT64, shape=_TOKENS)

    def _range(self, ids: ir.Value) -> ir.Value:
        """0 .. n_tokens - 1."""
        g, path = self.g, "/embeddings/range"

        def make() -> ir.Value:
            shape = g.node("Shape", [ids], path=f"{path}/Shape", dtype=_INT64, shape=[2])
            n_tokens = g.node(
                "Gather", [shape, g.constant("/constants/one_axis", np.array(1))], path=f"{path}/Gather", dtype=_INT64, shape=[]
            )
            zero, step = g.constant(f"{path}/zero", np.array(0)), g.constant(f"{path}/step", np.array(1))
            return g.node("Range", [zero, n_tokens, step], path=f"{path}/Range", dtype=_INT64, shape=["sequence_length"])

        return g.once(path, make)

    def _linear(self, name: str, x: ir.Value) -> ir.Value:
        weight = self.tensors[f"{name}.weight"]
        if isinstance(weight.grid, Int8Grid):
            return linear_rows(self.g, x, weight, path=self._path(name), name=self._name(name))
        grid = self._grid(weight)
        return weights.linear(self.g, x, weight, None, path=self._path(name), name=self._name(name), grid=grid)

    def _rows(self, name: str, ids: ir.Value) -> ir.Value:
        weight = self.tensors[f"{name}.weight"]
        return weights.embedding(self.g, ids, weight, path=self._path(name), name=self._name(name), grid=self._grid(weight))

    def _grid(self, weight: LazyTensor) -> Grid:
        if weight.grid.is_float:
            return F32 if self.g.float_type == _FLOAT else F16
        return weight.grid

    def _activated(self, name: str, x: ir.Value) -> ir.Value:
        g, path = self.g, self._path(name)
        bias = self._stream(f"{name}.bias", [f"{name}.bias"])
        if self.spec.activation == "relu":
            return g.node("Relu", [self._add(x, bias, f"{path}/Add")], path=f"{path}/Relu", shape=shape_of(x))
        op = {"gelu": "BiasGelu", "gelu_tanh": "FastGelu"}[self.spec.activation]
        return g.node(op, [x, bias], path=f"{path}/{op}", shape=shape_of(x), domain=MS)

    def _norm(self, name: str, x: ir.Value, skip: ir.Value, bias: str | None) -> ir.Value:
        """LayerNorm of x + skip + bias."""
        parts = [self._stream(f"{name}.{part}", [f"{name}.{part}"]) for part in ("weight", "bias")]
        if bias is not None:
            parts.append(self._stream(bias, [bias]))
        return self.g.node(
            "SkipLayerNormalization",
            [x, skip, *parts],
            path=f"{self._path(name)}/SkipLayerNormalization",
            shape=shape_of(x),
            domain=MS,
            attributes={"epsilon": self.spec.norm_eps},
        )

    def _add(self, x: ir.Value, y: ir.Value, path: str) -> ir.Value:
        return self.g.node("Add", [x, y], path=path, shape=shape_of(x))

    def _stream(self, name: str, parts: Sequence[str]) -> ir.Value:
        """Vectors joined end to end, as one initializer."""
        g, sources = self.g, [self.tensors[part] for part in parts]
        n = sum(source.n_cols for source in sources)
        label = f"{self._name(parts[0].rpartition('.')[0]).rpartition('.')[0]}.qkv.bias" if len(parts) > 1 else self._name(*parts)
        return g.stream(label, g.float_type, (n,), lambda: [as_float_type(s.decode(), g.float_type, s.origin) for s in sources])

    def _name(self, name: str) -> str:
        """Initializers are called as in checkpoints."""
        if name.endswith((".weight", ".bias")):
            return checkpoint_name(name, self.family)
        return checkpoint_name(f"{name}.weight", self.family).removesuffix(".weight")

    def _path(self, name: str) -> str:
        """Where nodes stand: the checkpoint's name, with slashes but for the number of a layer."""
        return "/" + self._name(name).replace("layer.", "layer:").replace(".", "/").replace(":", ".")


def _pooled(g: Builder, x: ir.Value, mask: ir.Value, sentence: SentenceSpec, tensors: Mapping[str, LazyTensor]) -> ir.Value:
    """One vector per text, float32 [batch_size, n_out]."""
    n_embd = int(shape_of(x)[-1])
    found = [_pooling(g, x, mask, kind, n_embd) for kind in sentence.pooling]
    pooled = found[0]
    if len(found) > 1:
        width = n_embd * len(found)
        pooled = g.node("Concat", found, path="/pooling/Concat", dtype=_FLOAT, shape=["batch_size", width], attributes={"axis": 1})
    if sentence.dense is not None:
        pooled = _dense(g, pooled, sentence, tensors)
    if not sentence.normalize:
        return pooled
    shape: list[Dim] = ["batch_size", 1]
    axis = _ints(g, "/constants/last_axis", [-1])
    length = g.node("ReduceL2", [pooled, axis], path="/normalize/ReduceL2", dtype=_FLOAT, shape=shape, attributes={"keepdims": 1})
    length = g.node(
        "Max", [length, g.constant("/normalize/least", np.array(_LEAST_LENGTH))], path="/normalize/Max", dtype=_FLOAT, shape=shape
    )
    return g.node("Div", [pooled, length], path="/normalize/Div", dtype=_FLOAT, shape=["batch_size", sentence.n_out])


def _pooling(g: Builder, x: ir.Value, mask: ir.Value, kind: Pooling, n_embd: int) -> ir.Value:
    path = f"/pooling/{kind}"
    shape: list[Dim] = ["batch_size", n_embd]
    if kind == "cls":
        return g.node(
            "Gather",
            [x, g.constant(f"{path}/first", np.array(0))],
            path=f"{path}/Gather",
            dtype=_FLOAT,
            shape=shape,
            attributes={"axis": 1},
        )
    axis = _ints(g, "/constants/axis1", [1])
    if kind == "max":
        there = g.once("there", lambda: _cast(g, mask, ir.DataType.BOOL, "/pooling/there"))
        there = g.node(
            "Unsqueeze", [there, _ints(g, "/constants/axis2", [2])], path=f"{path}/Unsqueeze", dtype=ir.DataType.BOOL, shape=[*_TOKENS, 1]
        )
        masked = g.node(
            "Where", [there, x, g.constant(f"{path}/masked", np.array(_MASKED))], path=f"{path}/Where", dtype=_FLOAT, shape=shape_of(x)
        )
        return g.node("ReduceMax", [masked, axis], path=f"{path}/ReduceMax", dtype=_FLOAT, shape=shape, attributes={"keepdims": 0})
    total, n_tokens = g.once_all("sums", lambda: _sums(g, x, mask, n_embd))
    if kind == "mean_sqrt_len":
        n_tokens = g.node("Sqrt", [n_tokens], path=f"{path}/Sqrt", dtype=_FLOAT, shape=["batch_size", 1])
    return g.node("Div", [total, n_tokens], path=f"{path}/Div", dtype=_FLOAT, shape=shape)


def _sums(g: Builder, x: ir.Value, mask: ir.Value, n_embd: int) -> tuple[ir.Value, ir.Value]:
    """Sum of a text's vectors, [batch_size, n_embd], and their number, [batch_size, 1]."""
    axis = _ints(g, "/constants/axis1", [1])
    there = _cast(g, mask, _FLOAT, "/pooling/mask")
    row = g.node("Unsqueeze", [there, axis], path="/pooling/Unsqueeze", dtype=_FLOAT, shape=["batch_size", 1, "sequence_length"])
    total = g.node("MatMul", [row, x], path="/pooling/MatMul", dtype=_FLOAT, shape=["batch_size", 1, n_embd])
    total = g.node("Squeeze", [total, axis], path="/pooling/Squeeze", dtype=_FLOAT, shape=["batch_size", n_embd])
    n_tokens = g.node(
        "ReduceSum", [there, axis], path="/pooling/ReduceSum", dtype=_FLOAT, shape=["batch_size", 1], attributes={"keepdims": 1}
    )
    least = g.constant("/pooling/least", np.array(np.float32(1e-9)))
    return total, g.node("Max", [n_tokens, least], path="/pooling/Max", dtype=_FLOAT, shape=["batch_size", 1])


def _dense(g: Builder, x: ir.Value, sentence: SentenceSpec, tensors: Mapping[str, LazyTensor]) -> ir.Value:
    weight, bias = tensors["dense.weight"], tensors["dense.bias"]
    shape: list[Dim] = ["batch_size", sentence.n_out]
    w = g.stream("dense.linear.weight", _FLOAT, weight.shape[::-1], lambda: float_columns(weight, _FLOAT))
    b = g.stream("dense.linear.bias", _FLOAT, bias.shape, lambda: [as_float_type(bias.decode(), _FLOAT, bias.origin)])
    y = g.node("MatMul", [x, w], path="/dense/MatMul", dtype=_FLOAT, shape=shape)
    y = g.node("Add", [y, b], path="/dense/Add", dtype=_FLOAT, shape=shape)
    return g.node("Tanh", [y], path="/dense/Tanh", dtype=_FLOAT, shape=shape) if sentence.dense == "tanh" else y


def _cast(g: Builder, x: ir.Value, dtype: ir.DataType, path: str) -> ir.Value:
    return g.node("Cast", [x], path=f"{path}/Cast", dtype=dtype, shape=shape_of(x), attributes={"to": dtype})


def _ints(g: Builder, name: str, values: Sequence[int]) -> ir.Value:
    return g.constant(name, np.array(values, dtype=np.int64))
