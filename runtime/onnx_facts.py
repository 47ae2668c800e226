"""What an ONNX decoder folder says about sizes: the graph's inputs and outputs, and genai_config.json beside it.

A folder is laid out as onnxruntime-genai's builder does it: inputs input_ids and attention_mask (position_ids, where the graph has it), one
past_key_values.I.key and .value per layer; outputs logits and present.I.key and .value. genai_config.json may give them other names.
Keys and values are (1, n_kv_heads, tokens, head_dim), each layer with sizes of its own.

GroupQueryAttention writes new keys and values where the old ones lie, so one buffer of n_ctx tokens serves as past and present; other
operators copy the whole cache into a second buffer at every step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgeq.errors import SourceError, UnsupportedError
from edgeq.onnx_adapter_file import PLAN_KEY
from edgeq.runtime.onnx_file import OnnxFile, read_onnx

CONFIG = "genai_config.json"
MS = "com.microsoft"
FLOAT, FLOAT16, INT64 = 1, 10, 7  # TensorProto.DataType
FLOAT_TYPES: Mapping[int, Literal["f32", "f16"]] = {FLOAT: "f32", FLOAT16: "f16"}
FLOAT_BYTES = {"f32": 4, "f16": 2}
_FAMILY = "edgeq.family"  # in a graph's metadata
_TABLE_INPUT = {(MS, "GroupQueryAttention"): 7, (MS, "RotaryEmbedding"): 2, ("", "RotaryEmbedding"): 1}  # cosines by position


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Keys or values of one layer: names of the graph's input and output, sizes, and whether new ones are written in place."""

    past: str
    present: str
    n_kv_heads: int
    length: int
    in_place: bool

    def values(self, n_tokens: int) -> int:
        return self.n_kv_heads * n_tokens * self.length


@dataclass(frozen=True, kw_only=True)
class AdapterPlace:
    """Where an adapter can act: names of the graph's inputs for A (n_in, rank) and B (rank, n_out). rank: None takes any."""

    a: str
    b: str
    n_in: int
    n_out: int
    rank: int | None
    float_type: Literal["f32", "f16"]


@dataclass(frozen=True, kw_only=True)
class OnnxFacts:
    """Sizes of a model on disk.

    path: of model.onnx. files: it and its external data. arch: the family that edgeq notes, else `type` of genai_config.json (which is
    "decoder" for every family where onnxruntime-genai treats them alike). n_layers: with those that have no attention. n_positions: rows of
    the shortest rotary table, beyond which no token can stand; None where there is none. bos: id or None; ends: ids that end a generation.
    kv_type, float_type: of keys and values, and of the logits. tensor_bytes: of all initializers. ids, mask, positions, logits: names in
    the graph; positions is None where the graph counts by the mask. places: for adapters, by module. plan: which adapters belong to it
    (`edgeq.onnx_adapter_file`); None in a graph of other tools.
    """

    path: Path
    files: tuple[Path, ...]
    arch: str
    n_layers: int
    n_ctx_train: int
    n_vocab: int
    n_positions: int | None
    bos: int | None
    ends: tuple[int, ...]
    kv_type: Literal["f32", "f16"]
    float_type: Literal["f32", "f16"]
    tensor_bytes: int
    opset: int
    ids: str
    mask: str
    positions: str | None
    logits: str
    caches: tuple[Cache, ...] = field(repr=False)
    places: Mapping[str, AdapterPlace] = field(repr=False, default_factory=dict)
    plan: str | None = None

    def kv_bytes(self, n_ctx: int) -> int:
        """Bytes of keys and values that a context of n_ctx tokens takes: twice those of layers that cannot write in place."""
        values = sum(cache.values(n_ctx) * (1 if cache.in_place else 2) for cache in self.caches)
        return values * FLOAT_BYTES[self.kv_type]


def read_onnx_facts(path: Path) -> OnnxFacts:
    """Facts about a model.onnx on disk. Raises as `read_onnx` and `facts_of`."""
    return facts_of(read_onnx(path))


def facts_of(file: OnnxFile) -> OnnxFacts:
    """Raises SourceError when genai_config.json is missing or does not fit the graph, UnsupportedError for other kinds of graphs."""
    config, graph = _Config(file.path), file.proto.graph
    metadata = {entry.key: entry.value for entry in file.proto.metadata_props}
    given = {tensor.name for tensor in graph.initializer}
    inputs = {value.name: value for value in graph.input if value.name not in given}
    outputs = {value.name: value for value in graph.output}
    ids, mask = (config.name("inputs", name) for name in ("input_ids", "attention_mask"))
    logits, positions = config.name("outputs", "logits"), config.name("inputs", "position_ids")
    caches = tuple(_caches(file.path, config, graph, inputs, outputs))
    for name in (ids, mask):
        if name not in inputs:
            raise UnsupportedError(f"{file.path}: the graph has no input {name!r}. It is no decoder as onnxruntime-genai runs them.")
    if logits not in outputs:
        raise UnsupportedError(f"{file.path}: the graph has no output {logits!r}. It is no decoder as onnxruntime-genai runs them.")
    unknown = sorted(inputs.keys() - {ids, mask, positions, *(cache.past for cache in caches)})
    if unknown:
        raise UnsupportedError(f"{file.path}: edgeq does not know what to feed the graph's input {unknown[0]!r}.")
    shape, n_positions, n_ctx = _shape(outputs[logits]), _n_positions(graph), config.integer("context_length")
    return OnnxFacts(
        path=file.path,
        files=file.files,
        arch=metadata.get(_FAMILY) or config.text("type"),
        n_layers=config.n_layers,
        n_ctx_train=n_ctx if n_positions is None else min(n_ctx, n_positions),
        n_vocab=shape[-1] if shape and isinstance(shape[-1], int) else config.integer("vocab_size"),
        n_positions=n_positions,
        bos=config.token("bos_token_id"),
        ends=config.ends(),
        kv_type=_float_type(file.path, inputs[caches[0].past]),
        float_type=_float_type(file.path, outputs[logits]),
        tensor_bytes=file.tensor_bytes,
        opset=next((entry.version for entry in file.proto.opset_import if entry.domain in ("", "ai.onnx")), 0),
        ids=ids,
        mask=mask,
        positions=positions if positions in inputs else None,
        logits=logits,
        caches=caches,
        places=dict(_places(file.path, {value.name: value for value in graph.input if value.name in given})),
        plan=metadata.get(PLAN_KEY),
    )


class _Config:
    """genai_config.json, with messages that name its fields."""

    def __init__(self, model: Path) -> None:
        self.path = model.parent / CONFIG
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            self.model: Mapping[str, Any] = document["model"]
            self.decoder: Mapping[str, Any] = self.model["decoder"]
        except FileNotFoundError as err:
            raise SourceError(f"{self.path} is missing: it names the tokens and sizes of {model.name}. Copy the whole folder.") from err
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise SourceError(f"{self.path}: cannot be read ({err}). Copy or export the folder again.") from err

    def fault(self, key: str, value: Any, expected: str) -> SourceError:
        return SourceError(f"{self.path}: {key} is {value!r}; expected {expected}. Export the folder again.")

    def name(self, kind: Literal["inputs", "outputs"], default: str) -> str:
        """What the graph calls an input or output."""
        return self.decoder.get(kind, {}).get(default, default)

    def pattern(self, kind: Literal["inputs", "outputs"], key: str, default: str) -> str:
        """What the graph calls one layer's input or output: a text with %d for the layer."""
        found = self.decoder.get(kind, {}).get(key, default)
        if not isinstance(found, str) or found.count("%d") != 1:
            raise self.fault(f"model.decoder.{kind}.{key}", found, "a name with %d for the layer")
        return found

    @property
    def n_layers(self) -> int:
        return self.integer("num_hidden_layers", self.decoder)

    def text(self, key: str) -> str:
        value = self.model.get(key)
        if not isinstance(value, str) or not value:
            raise self.fault(f"model.{key}", value, "a name")
        return value

    def integer(self, key: str, section: Mapping[str, Any] | None = None) -> int:
        value = (self.model if section is None else section).get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.fault(f"model.{'decoder.' if section is not None else ''}{key}", value, "a number of at least 1")
        return value

    def token(self, key: str) -> int | None:
        value = self.model.get(key)
        if value is None or value == -1:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.fault(f"model.{key}", value, "the id of a token")
        return value

    def ends(self) -> tuple[int, ...]:
        value = self.model.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(id, int) and not isinstance(id, bool) and id >= 0 for id in ids):
            raise self.fault("model.eos_token_id", value, "the id of a token, or several")
        return tuple(ids)


def _caches(path: Path, config: _Config, graph: Any, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Iterator[Cache]:
    """Keys, then values, of every layer that has them."""
    patterns = {
        kind: (
            config.pattern("inputs", f"past_{kind}_names", f"past_key_values.%d.{kind}"),
            config.pattern("outputs", f"present_{kind}_names", f"present.%d.{kind}"),
        )
        for kind in ("key", "value")
    }
    readers = {name: (node.domain, node.op_type) for node in graph.node for name in node.input}
    n_found = 0
    for layer in range(config.n_layers):
        for past, present in patterns.values():
            if past % layer not in inputs:
                continue
            if present % layer not in outputs:
                raise UnsupportedError(f"{path}: the graph takes {past % layer!r} and gives no {present % layer!r}. Export it again.")
            n_found += 1
            shape = _shape(inputs[past % layer])
            if len(shape) != 4:
                raise UnsupportedError(f"{path}: {past % layer} has {len(shape)} dimensions; expected (batch, heads, tokens, head size).")
            yield Cache(
                past=past % layer,
                present=present % layer,
                n_kv_heads=shape[1] if isinstance(shape[1], int) else config.integer("num_key_value_heads", config.decoder),
                length=shape[3] if isinstance(shape[3], int) else config.integer("head_size", config.decoder),
                in_place=readers.get(past % layer) == (MS, "GroupQueryAttention"),
            )
    if not n_found:
        raise UnsupportedError(f"{path}: the graph has no keys and values among its inputs. Only decoders with a cache are supported.")


def _places(path: Path, optional: Mapping[str, Any]) -> Iterator[tuple[str, AdapterPlace]]:
    """Pairs among the inputs that need not be given."""
    for a in optional:
        module, found, rest = a.rpartition(".lora_A.weight")
        b = f"{module}.lora_B.weight"
        if not found or rest or b not in optional:
            continue
        shapes = _shape(optional[a]), _shape(optional[b])
        if any(len(shape) != 2 for shape in shapes) or isinstance(shapes[0][0], str) or isinstance(shapes[1][1], str):
            raise UnsupportedError(f"{path}: {a} and {b} have shapes of {shapes[0]} and {shapes[1]}; expected sizes of inputs and outputs.")
        rank = shapes[0][1] if isinstance(shapes[0][1], int) else None
        place = AdapterPlace(
            a=a, b=b, n_in=int(shapes[0][0]), n_out=int(shapes[1][1]), rank=rank, float_type=_float_type(path, optional[a])
        )
        yield module, place


def _n_positions(graph: Any) -> int | None:
    """Rows of the shortest table of cosines that an operator rotates by, found through whatever gathers or reshapes it first."""
    rows = {tensor.name: tensor.dims[0] for tensor in graph.initializer if len(tensor.dims) == 2}
    made = {name: node for node in graph.node for name in node.output}
    found = []
    for node in graph.node:
        place = _TABLE_INPUT.get((node.domain, node.op_type), len(node.input))
        table = node.input[place] if place < len(node.input) else ""
        while table in made and made[table].input:
            table = made[table].input[0]
        if table in rows:
            found.append(rows[table])
    return min(found, default=None)


def _shape(value: Any) -> Sequence[int | str]:
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in value.type.tensor_type.shape.dim]


def _float_type(path: Path, value: Any) -> Literal["f32", "f16"]:
    found = value.type.tensor_type.elem_type
    if found not in FLOAT_TYPES:
        raise UnsupportedError(f"{path}: {value.name} has values of type {found}; edgeq runs graphs in float32 or float16.")
    return FLOAT_TYPES[found]
