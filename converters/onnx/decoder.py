"""The ONNX graph of a decoder of any family: token ids, mask and cached keys and values to logits and longer caches.

    input_ids               int64 [batch_size, sequence_length]           logits               [batch_size, sequence_length, n_vocab]
    attention_mask          int64 [batch_size, total_sequence_length]     present.I.key        [batch_size, n_kv_heads, total.., head_dim]
    past_key_values.I.key   [batch_size, n_kv_heads, past.., head_dim]    present.I.value
    past_key_values.I.value

Names as onnxruntime-genai's builder has them; floats are in the graph's own type. Every layer has sizes of its own, and one whose
attention is gone has no cache. Opset 23 of ai.onnx; of com.microsoft GroupQueryAttention, SkipSimplifiedLayerNormalization, FastGelu and
what `weights` makes. Every matrix is one call of `weights`, under the name of its module (`names`). Those that read the same input, gate
with up and q with k and v, can be joined: on a 135M model in 4 bits that saves a tenth of a token's time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping

import numpy as np
import onnx_ir as ir

from edgeq.converters.gguf.encode import RegridError
from edgeq.converters.onnx import lora, names, weights
from edgeq.converters.onnx.attention import Attending, cache_shape
from edgeq.converters.onnx.builder import MS, Builder, Dim, shape_of
from edgeq.converters.onnx.lowering import Lowering, Turning, lowerings, value_dims
from edgeq.converters.onnx.norms import Stream, head_norm, norm
from edgeq.converters.onnx.packed import FLOAT_TYPES, as_float_type
from edgeq.converters.onnx.tokens import NEW, Tokens
from edgeq.errors import PlanError, ShapeError, SourceError, UnsupportedError
from edgeq.families import FUSED, family
from edgeq.grids import Grid
from edgeq.model import Model
from edgeq.spec import Attention, Mlp
from edgeq.tensors import Floats, LazyTensor, concat_rows


def decoder(
    model: Model,
    grids: Mapping[str, Grid],
    *,
    float_type: ir.DataType,
    n_ctx: int | None = None,
    turnings: Mapping[int, Turning] | None = None,
    in_place: bool = False,
    join: bool = False,
    adapted: Collection[str] = (),
    importance: Mapping[str, Floats] | None = None,
    errors: MutableMapping[str, RegridError] | None = None,
) -> Builder:
    """The whole graph. Nothing of the weights is read yet.

    grids: of every matrix, by canonical tensor name ("layers.0.wq.weight", "embed.weight"); a tied head with an entry of its own
    ("head.weight") in another grid is stored beside the embedding. n_ctx: tokens that the rotary tables have room for, and by which
    LongRoPE chooses its factors; the model's own if None. turnings, in_place: see `lowerings`. join: matrices that read the same input
    become one where they can (`joined`). adapted: matrices beside which adapters can act (`lora.places_for`), of joined ones all or none.
    importance: of columns, by canonical linear ("layers.3.wq", "head"), for encoding. errors: where what encoding loses is noted when the
    file is written, by the module's name.

    Raises SourceError for a tensor that is missing, ShapeError for one that contradicts the spec, UnsupportedError for one that the family
    does not have, PlanError for a grid without a kernel or a layer that cannot be as was asked.
    """
    wholes = joined(model, grids) if join else {}
    choices = lowerings(model.spec, value_dims=value_dims(model.spec, model.tensors), turnings=turnings, in_place=in_place)
    g = Builder("decoder", float_type=float_type)
    made = _Decoder(model, grids, g, wholes=wholes, adapted=frozenset(adapted), importance=importance or {}, errors=errors)
    made.build({choice.layer: choice for choice in choices}, model.spec.n_ctx if n_ctx is None else n_ctx)
    return made.g


def joined(model: Model, grids: Mapping[str, Grid]) -> dict[str, tuple[str, ...]]:
    """Linear layers that can become one, by the canonical name of the whole: {"layers.0.gate_up": ("layers.0.gate", "layers.0.up")}.

    They are those of one input that came in one grid, go into one grid, and all have a bias or none.
    """
    biases = model.spec.biases
    found = {}
    for layer in range(model.spec.n_layers):
        for whole, roles in FUSED.items():
            names = [f"layers.{layer}.{role}.weight" for role in roles]
            if not all(name in model.tensors and name in grids for name in names):
                continue
            if len({(model.tensors[name].grid, grids[name]) for name in names}) == len({role in biases for role in roles}) == 1:
                found[f"layers.{layer}.{whole}"] = tuple(f"layers.{layer}.{role}" for role in roles)
    return found


class _Decoder:
    """The builder, and modules of the model as calls."""

    def __init__(
        self,
        model: Model,
        grids: Mapping[str, Grid],
        g: Builder,
        *,
        wholes: Mapping[str, tuple[str, ...]],
        adapted: frozenset[str],
        importance: Mapping[str, Floats],
        errors: MutableMapping[str, RegridError] | None,
    ) -> None:
        self.model, self.spec, self.row, self.g = model, model.spec, family(model.spec.family), g
        self._grids, self._wholes, self._adapted, self._importance, self._errors = grids, wholes, adapted, importance, errors
        self._used: set[str] = set()

    def build(self, choices: Mapping[int, Lowering], n_ctx: int) -> None:
        g, spec = self.g, self.spec
        tokens = Tokens(g)
        past = {block.layer: self._cache_inputs(block, choices[block.layer]) for block in spec.attention}
        present: dict[int, tuple[ir.Value, ir.Value]] = {}
        attending = Attending(g, tokens, n_ctx=n_ctx)
        stream = Stream(g, self._embed(tokens.ids))
        for block in spec.blocks:
            prefix = f"layers.{block.layer}"
            if isinstance(block, Attention):
                x = self._normed(stream, f"{prefix}.attn_norm")
                result, present[block.layer] = self._attention(block, choices[block.layer], attending, x, past[block.layer])
                post_norm = f"{prefix}.post_attn_norm"
            else:
                result = self._mlp(block, self._normed(stream, f"{prefix}.mlp_norm"))
                post_norm = f"{prefix}.post_mlp_norm"
            if self.row.post_norms:
                result = norm(g, result, self._vector(post_norm, spec.n_embd), eps=spec.norm_eps, path=self._place(post_norm))
            stream.add(result)
        logits = self._head(self._normed(stream, "final_norm", last=True))
        self._check_all_used()
        g.output(logits, "logits", g.float_type, [*NEW, spec.n_vocab])
        for layer, caches in present.items():
            for kind, value in zip(("key", "value"), caches, strict=True):
                g.output(value, f"present.{layer}.{kind}", g.float_type, shape_of(value))

    def _cache_inputs(self, block: Attention, choice: Lowering) -> tuple[ir.Value, ir.Value]:
        keys, values = (
            self.g.input(f"past_key_values.{block.layer}.{kind}", self.g.float_type, cache_shape(block, length, "past_sequence_length"))
            for kind, length in (("key", block.head_dim), ("value", choice.value_dim))
        )
        return keys, values

    def _embed(self, ids: ir.Value) -> ir.Value:
        g, spec = self.g, self.spec
        weight = self._tensor("embed.weight", (spec.n_vocab, spec.n_embd))
        x = weights.embedding(
            g,
            ids,
            weight,
            path=self._place("embed"),
            name=self._name("embed"),
            grid=self._grid("embed.weight"),
            importance=self._importance.get("head") if spec.tied else None,
            errors=self._errors,
        )
        if "embed" in self._adapted:
            x = lora.added_rows(g, ids, x, self._adapter_place("embed", spec.n_embd), spec.n_vocab)
        if spec.embed_scale == 1:
            return x
        scale = g.constant("/model/constants/embed_scale", np.array(spec.embed_scale, dtype=FLOAT_TYPES[g.float_type]))
        return g.node("Mul", [x, scale], path=f"{self._place('embed')}/Mul", shape=shape_of(x))

    def _attention(
        self, block: Attention, choice: Lowering, attending: Attending, x: ir.Value, past: tuple[ir.Value, ir.Value]
    ) -> tuple[ir.Value, tuple[ir.Value, ir.Value]]:
        prefix, d = f"layers.{block.layer}", block.head_dim
        whole = choice.takes_joined and not self.row.qk_norm
        sizes = (block.n_heads * d, block.n_kv_heads * d, block.n_kv_heads * choice.value_dim)
        qkv = self._linears(prefix, "wqkv", x, sizes, whole=whole)
        if self.row.qk_norm:
            for i, name in enumerate((f"{prefix}.q_norm", f"{prefix}.k_norm")):
                qkv[i] = head_norm(self.g, qkv[i], self._vector(name, d), head_dim=d, eps=self.spec.norm_eps, path=self._place(name))
        path = self._place(f"{prefix}.wq").rsplit("/", 1)[0]
        mixed, caches = attending.attend(block, choice, qkv, past, scale=self.spec.attn_scale, path=path)
        return self._linear(f"{prefix}.wo", mixed, self.spec.n_embd), caches

    def _mlp(self, block: Mlp, x: ir.Value) -> ir.Value:
        g, prefix = self.g, f"layers.{block.layer}"
        gate, up = self._linears(prefix, "gate_up", x, (block.n_ff, block.n_ff))
        path = self._place(f"{prefix}.gate").rsplit("/", 1)[0]
        hidden = g.node("Mul", [self._activated(gate, f"{path}/act_fn"), up], path=f"{path}/Mul", shape=shape_of(up))
        return self._linear(f"{prefix}.down", hidden, self.spec.n_embd)

    def _activated(self, x: ir.Value, path: str) -> ir.Value:
        if self.row.activation == "gelu_tanh":
            return self.g.node("FastGelu", [x], path=f"{path}/FastGelu", shape=shape_of(x), domain=MS)
        share = self.g.node("Sigmoid", [x], path=f"{path}/Sigmoid", shape=shape_of(x))
        return self.g.node("Mul", [x, share], path=f"{path}/Mul", shape=shape_of(x))

    def _head(self, x: ir.Value) -> ir.Value:
        spec, name = self.spec, "head.weight"
        own = not spec.tied or self._grids.get(name, self._grid("embed.weight")) != self._grid("embed.weight")
        source = "embed.weight" if spec.tied else name
        y = weights.head(
            self.g,
            x,
            self._tensor(source, (spec.n_vocab, spec.n_embd)),
            path=self._place("head"),
            name=self._name("head"),
            grid=self._grid(name if own else source),
            tied_to=None if own else self._name("embed"),
            importance=self._importance.get("head"),
            errors=self._errors,
        )
        if "head" not in self._adapted:
            return y
        return lora.added(self.g, x, y, [self._adapter_place("head", spec.n_vocab)], path=self._place("head"))

    def _linears(self, prefix: str, role: str, x: ir.Value, n_outs: tuple[int, ...], *, whole: bool = False) -> list[ir.Value]:
        """Results of linear layers that read the same x. whole: those of joined ones as one value, as they lie side by side."""
        parts = [f"{prefix}.{part}" for part in FUSED[role]]
        if f"{prefix}.{role}" not in self._wholes:
            return [self._linear(part, x, n_out) for part, n_out in zip(parts, n_outs, strict=True)]
        name = f"{prefix}.{role}"
        weight, *bias = (
            concat_rows(tensors, origin=tensors[0].origin)
            for tensors in zip(*(self._pair(part, x, n) for part, n in zip(parts, n_outs, strict=True)), strict=True)
        )
        y = self._multiplied(name, x, weight, bias[0] if bias else None, like=parts[0])
        if whole:
            return [y]
        sizes = self.g.constant(f"/model/constants/split/{'_'.join(map(str, n_outs))}", np.array(n_outs, dtype=np.int64))
        outputs = [(self.g.float_type, [*shape_of(x)[:-1], n_out]) for n_out in n_outs]
        return list(self.g.nodes("Split", [y, sizes], path=f"{self._place(name)}/Split", outputs=outputs, attributes={"axis": -1}))

    def _linear(self, canonical: str, x: ir.Value, n_out: int) -> ir.Value:
        weight, *bias = self._pair(canonical, x, n_out)
        return self._multiplied(canonical, x, weight, bias[0] if bias else None, like=canonical)

    def _multiplied(self, canonical: str, x: ir.Value, weight: LazyTensor, bias: LazyTensor | None, *, like: str) -> ir.Value:
        """like: canonical name of the linear by whose grid and importance it goes."""
        y = weights.linear(
            self.g,
            x,
            weight,
            bias,
            path=self._place(canonical),
            name=self._name(canonical),
            grid=self._grid(f"{like}.weight"),
            importance=self._importance.get(like),
            errors=self._errors,
        )
        parts = self._wholes.get(canonical, (canonical,))
        if like not in self._adapted:
            return y
        n_outs = [self.model.tensors[f"{part}.weight"].n_rows for part in parts]
        places = [self._adapter_place(part, n_out) for part, n_out in zip(parts, n_outs, strict=True)]
        return lora.added(self.g, x, y, places, path=self._place(canonical))

    def _adapter_place(self, canonical: str, n_out: int) -> lora.Place:
        return lora.Place(name=self._name(canonical), path=self._place(canonical), n_out=n_out)

    def _pair(self, canonical: str, x: ir.Value, n_out: int) -> tuple[LazyTensor, ...]:
        """Weight and, if there is one, bias."""
        weight = self._tensor(f"{canonical}.weight", (n_out, _width(x)))
        if canonical.rsplit(".", 1)[-1] not in self.spec.biases:
            return (weight,)
        return weight, self._tensor(f"{canonical}.bias", (n_out,))

    def _normed(self, stream: Stream, canonical: str, *, last: bool = False) -> ir.Value:
        weight = self._vector(canonical, self.spec.n_embd)
        return stream.normed(weight, eps=self.spec.norm_eps, path=self._place(canonical), last=last)

    def _vector(self, canonical: str, n: int) -> ir.Value:
        tensor = self._tensor(f"{canonical}.weight", (n,))
        name, dtype = f"{self._name(canonical)}.weight", self.g.float_type
        return self.g.stream(name, dtype, (n,), lambda: [as_float_type(tensor.decode(), dtype, tensor.origin)])

    def _tensor(self, name: str, shape: tuple[int, ...]) -> LazyTensor:
        tensor = self.model.tensors.get(name)
        if tensor is None:
            raise SourceError(f"{self.model.name}: tensor {name} is missing")
        if tensor.shape != shape:
            raise ShapeError(f"{tensor.origin}: shape {list(tensor.shape)}, expected {list(shape)} for {name}")
        self._used.add(name)
        return tensor

    def _grid(self, name: str) -> Grid:
        if name not in self._grids:
            raise PlanError(f"{name}: no grid was chosen for it")
        return self._grids[name]

    def _check_all_used(self) -> None:
        unknown = sorted(self.model.tensors.keys() - self._used)
        if unknown:
            raise UnsupportedError(f"{self.model.name}: tensor {unknown[0]} has no place in the graph of a {self.spec.family} model")

    def _name(self, canonical: str) -> str:
        return names.module_name(self.row, canonical)

    def _place(self, canonical: str) -> str:
        return names.place(self._name(canonical))


def _width(x: ir.Value) -> int:
    width: Dim = shape_of(x)[-1]
    assert isinstance(width, int)
    return width
