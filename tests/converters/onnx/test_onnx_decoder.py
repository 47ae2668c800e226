"""Decoder graphs of every family in ONNX Runtime and onnxruntime-genai, against the reference and against transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_decoders import CLOSE, FLOAT, FLOAT16, Array, float_grids, nodes, random_decoder, reference_logits, run, run_shared, session
from onnx_folders import genai_tokens
from tiny import N_VOCAB, TINY_FAMILIES, hf_folder, hf_model

from edgeq import ggml
from edgeq.converters.onnx.builder import MS
from edgeq.converters.onnx.carrier import write_onnx
from edgeq.converters.onnx.decoder import decoder, joined
from edgeq.converters.onnx.genai import genai_config, shares_buffer, to_bytes
from edgeq.converters.onnx.lowering import lowerings
from edgeq.converters.onnx.names import canonical_name, module_name
from edgeq.converters.sources.resolve import open_model
from edgeq.errors import EdgeqError, PlanError, ShapeError, SourceError, UnsupportedError
from edgeq.families import family
from edgeq.grids import F32, Grid, grid
from edgeq.model import Model
from edgeq.rope import RopeSpec
from edgeq.spec import Attention, Mlp, ModelSpec
from edgeq.tensors import LazyTensor, from_values

# Sums in float16, of values that span 8: 1.1e-2 was measured.
HALF = 3e-2
STEPS = (17, 5, *[1] * 10)


class Tiny:
    """A family's folder, what it opens as, and logits of transformers."""

    def __init__(self, folder: Path, name: str, **sizes: Any) -> None:
        self.folder = hf_folder(folder, name, **sizes)
        self.model = open_model(self.folder)
        self._hf: Any = None

    def transformers(self, ids: list[int]) -> Array:
        import torch

        self._hf = self._hf or hf_model(self.folder)
        with torch.no_grad():
            return self._hf(torch.tensor([ids])).logits[0].numpy()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    made: dict[str, Tiny] = {}

    def find(name: str) -> Tiny:
        if name not in made:
            made[name] = Tiny(tmp_path_factory.mktemp("onnx-decoder") / name, name)
        return made[name]

    return find


def ids(n: int, seed: int = 0, n_vocab: int = N_VOCAB) -> list[int]:
    return np.random.default_rng(seed).integers(3, n_vocab, n).tolist()


def off(a: Array, b: Array) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(np.float32) - b).max())


@pytest.mark.parametrize("join", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_logits_equal_those_of_transformers_and_of_the_reference(tiny: Callable[[str], Tiny], name: str, join: bool) -> None:
    model, tokens = tiny(name).model, ids(sum(STEPS))
    n_ctx = 64 if name == "phi3-longrope" else None
    expected, theirs = reference_logits(model, tokens), tiny(name).transformers(tokens)
    assert np.ptp(expected) > 4
    running = session(decoder(model, float_grids(model), float_type=FLOAT, n_ctx=n_ctx, join=join))
    whole = run(running, tokens, [len(tokens)])
    assert off(whole, expected) < CLOSE and off(whole, theirs) < CLOSE
    assert off(run(running, tokens, STEPS), expected) < CLOSE
    assert off(run_shared(running, tokens, STEPS, room=48), expected) < CLOSE


@pytest.mark.parametrize(
    ("name", "sizes", "kind"),
    [
        ("llama", {"head_dim": 32}, "A"),
        ("gemma3", {"head_dim": 48, "num_key_value_heads": 1}, "A"),
        ("qwen3", {"head_dim": 16, "num_key_value_heads": 4}, "A"),
        ("phi3", {"hidden_size": 128}, "A"),  # half of 32 dimensions turn
        ("phi3-longrope", {"hidden_size": 128, "num_attention_heads": 4}, "B"),
        ("smollm3", {"hidden_size": 80}, "C"),
        ("gemma3", {"head_dim": 20}, "C"),
        ("qwen3", {"head_dim": 12}, "C"),
    ],
)
def test_families_in_each_lowering(tmp_path: Path, name: str, sizes: dict[str, int], kind: str) -> None:
    if name == "phi3-longrope":  # 24 of 32 dimensions turn
        factors = {"short_factor": [1.0 + 0.05 * i for i in range(12)], "long_factor": [1.0 + 0.5 * i for i in range(12)]}
        rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, **factors}
        one = Tiny(tmp_path / "m", name, **sizes, rope_parameters=rope)
    else:
        one = Tiny(tmp_path / "m", name, **sizes)
    assert {choice.kind for choice in lowerings(one.model.spec) if choice.turning is not None} == {kind}
    tokens = ids(sum(STEPS))
    running = session(decoder(one.model, float_grids(one.model), float_type=FLOAT, n_ctx=64, join=True))
    assert off(run(running, tokens, STEPS), one.transformers(tokens)) < CLOSE


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_float16_graphs_are_near(tiny: Callable[[str], Tiny], name: str) -> None:
    model, tokens = tiny(name).model, ids(sum(STEPS))
    n_ctx = 64 if name == "phi3-longrope" else None
    running = session(decoder(model, float_grids(model), float_type=FLOAT16, n_ctx=n_ctx, join=True))
    logits = run(running, tokens, STEPS)
    assert logits.dtype == np.float16
    assert 0 < off(logits, reference_logits(model, tokens)) < HALF


def test_longrope_takes_the_factors_of_the_context_that_was_planned(tiny: Callable[[str], Tiny]) -> None:
    one, tokens = tiny("phi3-longrope"), ids(100)
    long = session(decoder(one.model, float_grids(one.model), float_type=FLOAT))
    assert off(run(long, tokens, [90, 10]), one.transformers(tokens)) < CLOSE
    # of a shorter text as well, which transformers would turn by the short ones
    logits = run(long, tokens[:40], [40])
    assert off(logits, reference_logits(one.model, tokens[:40], n_ctx=256)) < CLOSE
    assert off(logits, one.transformers(tokens[:40])) > 100 * CLOSE


def test_a_decoder_of_onnxruntime_genai_by_names_types_and_operators(tiny: Callable[[str], Tiny]) -> None:
    model = tiny("llama").model
    proto = ir.serde.serialize_model(decoder(model, float_grids(model), float_type=FLOAT16).model())
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": 23, MS: 1} and proto.ir_version == 10

    def declared(values: Any) -> dict[str, tuple[int, list[int | str]]]:
        return {
            value.name: (value.type.tensor_type.elem_type, [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim])
            for value in values
        }

    i64, half = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT16
    caches = [(layer, kind) for layer in (0, 1) for kind in ("key", "value")]
    assert declared(proto.graph.input) == {
        "input_ids": (i64, ["batch_size", "sequence_length"]),
        "attention_mask": (i64, ["batch_size", "total_sequence_length"]),
        **{f"past_key_values.{i}.{kind}": (half, ["batch_size", 2, "past_sequence_length", 24]) for i, kind in caches},
    }
    assert declared(proto.graph.output) == {
        "logits": (half, ["batch_size", "sequence_length", N_VOCAB]),
        **{f"present.{i}.{kind}": (half, ["batch_size", 2, "total_sequence_length", 24]) for i, kind in caches},
    }
    contrib = {node.op_type for node in proto.graph.node if node.domain == MS}
    assert contrib == {"GroupQueryAttention", "SkipSimplifiedLayerNormalization"}
    names = [node.name for node in proto.graph.node]
    assert len(set(names)) == len(names) and all(name.startswith("/") for name in names)
    assert {"/model/layers.1/attn/q_proj/MatMul", "/model/layers.0/mlp/down_proj/MatMul", "/lm_head/MatMul"} <= set(names)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_residuals_are_added_within_norms(tiny: Callable[[str], Tiny], name: str) -> None:
    model = tiny(name).model
    g = decoder(model, float_grids(model), float_type=FLOAT)
    blocks = len(model.spec.blocks)
    plain = 1 + 4 * model.spec.n_layers if name == "gemma3" else 1  # q and k, and a norm behind each block
    assert len(nodes(g, "SkipSimplifiedLayerNormalization")) == blocks
    assert len(nodes(g, "SimplifiedLayerNormalization")) == plain
    assert not nodes(g, "Add")


def test_a_tied_head_is_stored_once_unless_it_has_a_grid_of_its_own(tiny: Callable[[str], Tiny]) -> None:
    model, tokens = tiny("qwen2-tied").model, ids(20)
    once = decoder(model, float_grids(model), float_type=FLOAT)
    twice = decoder(model, {**float_grids(model), "head.weight": grid("Q8_0")}, float_type=FLOAT)
    held = [name for name in once.model().graph.initializers if name.startswith(("model.embed", "lm_head"))]
    assert held == ["model.embed_tokens.weight"]
    assert "lm_head.MatMulNBits.qweight" in twice.model().graph.initializers
    logits = run(session(twice), tokens, [20])
    assert CLOSE < off(logits, reference_logits(model, tokens)) < 0.1


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_names_of_initializers_lead_back_to_tensors(tiny: Callable[[str], Tiny], name: str) -> None:
    model, row = tiny(name).model, family(tiny(name).model.spec.family)
    g = decoder(model, float_grids(model), float_type=FLOAT)
    found = {canonical_name(row, initializer) for initializer in g.model().graph.initializers}
    tensors = {f"{at[0]}.{'bias' if at[1] == 'Add.bias' else 'weight'}" for at in found if at is not None}
    assert tensors == model.tensors.keys()
    assert all(module_name(row, at[0]) + "." + at[1] in g.model().graph.initializers for at in found if at is not None)
    other = {key for key in g.model().graph.initializers if canonical_name(row, key) is None}
    assert all(key.startswith(("cos_cache", "sin_cache", "/")) for key in other)


SPEC = ModelSpec(
    family="llama",
    n_embd=64,
    n_vocab=96,
    n_ctx=64,
    blocks=(
        Attention(layer=0, n_heads=4, n_kv_heads=2, head_dim=32),
        Mlp(layer=0, n_ff=96),
        Mlp(layer=1, n_ff=64),
        Attention(layer=2, n_heads=3, n_kv_heads=1, head_dim=16),
    ),
    rope=RopeSpec(dim=16, base=10000.0),
    norm_eps=1e-5,
    tied=False,
    attn_scale=0.2,
)


def in_grids(model: Model, grids: dict[str, str]) -> Model:
    """The model with matrices packed in grids of ggml, by name."""

    def packed(tensor: LazyTensor, wanted: Grid) -> LazyTensor:
        rows = ggml.encode(tensor.decode(), wanted)
        return replace(tensor, grid=wanted, read=lambda start, stop: rows[start:stop])

    return replace(model, tensors={**model.tensors, **{name: packed(model.tensors[name], grid(to)) for name, to in grids.items()}})


def test_joined_are_matrices_of_one_grid() -> None:
    model = random_decoder(SPEC)
    qkv = ("layers.0.wq", "layers.0.wk", "layers.0.wv")
    assert joined(model, float_grids(model)) == {
        "layers.0.wqkv": qkv,
        "layers.0.gate_up": ("layers.0.gate", "layers.0.up"),
        "layers.1.gate_up": ("layers.1.gate", "layers.1.up"),
        "layers.2.wqkv": ("layers.2.wq", "layers.2.wk", "layers.2.wv"),
    }
    mixed = {**float_grids(model), "layers.0.wv.weight": grid("Q8_0"), "layers.1.up.weight": grid("Q4_0")}
    assert joined(model, mixed).keys() == {"layers.0.gate_up", "layers.2.wqkv"}
    assert joined(in_grids(model, {"layers.1.up.weight": "Q8_0"}), float_grids(model)).keys() == {
        "layers.0.wqkv",
        "layers.0.gate_up",
        "layers.2.wqkv",
    }
    lopsided = replace(model, spec=replace(SPEC, biases=frozenset({"wq"})))
    assert joined(lopsided, float_grids(model)).keys() == {"layers.0.gate_up", "layers.1.gate_up"}


def test_joined_matrices_keep_their_codes_and_compute_the_same() -> None:
    quantized = {f"layers.{i}.{role}.weight": "Q4_0" for i, roles in ((0, "wq wk wv gate up"), (1, "gate up")) for role in roles.split()}
    model = in_grids(random_decoder(replace(SPEC, biases=frozenset({"wq", "wk", "wv", "up", "gate"}))), quantized)
    grids = {**float_grids(model), **{name: grid(to) for name, to in quantized.items()}}
    apart, together = (decoder(model, grids, float_type=FLOAT, join=join) for join in (False, True))
    held = {key: value.const_value.numpy() for key, value in together.model().graph.initializers.items() if value.const_value is not None}
    parts = [apart.initializer(f"model.layers.0.self_attn.{part}_proj.MatMulNBits.qweight").const_value for part in "qkv"]
    whole = held["model.layers.0.self_attn.qkv_proj.MatMulNBits.qweight"]
    np.testing.assert_array_equal(whole, np.concatenate([part.numpy() for part in parts if part is not None]))
    # queries, keys and values go into the operator side by side, gate and up apart
    assert [node.inputs[1] for node in nodes(together, "GroupQueryAttention").values()] == [None, None]
    assert len(nodes(together, "Split")) == 2 and not nodes(apart, "Split")
    tokens = ids(20, n_vocab=96)
    np.testing.assert_array_equal(run(session(apart), tokens, STEPS[1:]), run(session(together), tokens, STEPS[1:]))


@pytest.mark.parametrize("join", [False, True], ids=["apart", "joined"])
def test_onnxruntime_genai_continues_as_we_do(tmp_path: Path, tiny: Callable[[str], Tiny], join: bool) -> None:
    """Layers with one attention each of A, B and C, with a window, and one layer that has none."""
    pytest.importorskip("onnxruntime_genai")
    source = tiny("llama")
    blocks = (
        Attention(layer=0, n_heads=4, n_kv_heads=2, head_dim=32, window=5),
        Mlp(layer=0, n_ff=40),
        Mlp(layer=1, n_ff=72),
        Attention(layer=2, n_heads=3, n_kv_heads=1, head_dim=24),
        Attention(layer=3, n_heads=6, n_kv_heads=3, head_dim=20, window=4),
    )
    for name, kept, shared in (("in-place", blocks[:4], True), ("copied", blocks, False)):
        model = random_decoder(replace(SPEC, n_vocab=N_VOCAB, blocks=kept))
        folder = tmp_path / name
        folder.mkdir()
        g = decoder(model, float_grids(model), float_type=FLOAT, join=join)
        write_onnx(folder, g)
        assert shares_buffer(g.model()) == shared
        vocabulary = source.model.tokenizer.vocabulary
        config = genai_config(model.spec, vocabulary, filename="model.onnx", n_ctx=64, max_length=64, share_buffer=shared)
        (folder / "genai_config.json").write_bytes(to_bytes(config))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((source.folder / file).read_bytes())
        prompt = ids(9, seed=2)
        assert genai_tokens(folder, prompt, 12) == greedy(model, prompt, 12, ends=config["model"]["eos_token_id"])


def greedy(model: Model, prompt: list[int], n: int, *, ends: list[int]) -> list[int]:
    found: list[int] = []
    while len(found) < n:
        token = int(reference_logits(model, [*prompt, *found])[-1].argmax())
        if token in ends:
            break
        found.append(token)
    assert len(set(found)) > 2
    return found


def without(name: str) -> Callable[[Model], Model]:
    return lambda model: replace(model, tensors={key: value for key, value in model.tensors.items() if key != name})


def with_tensor(name: str, *shape: int) -> Callable[[Model], Model]:
    return lambda model: replace(model, tensors={**model.tensors, name: from_values(np.ones(shape), origin=f"model.gguf: {name}")})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (without("layers.0.wq.weight"), SourceError, "random: tensor layers.0.wq.weight is missing"),
        (without("layers.2.wv.weight"), SourceError, "random: tensor layers.2.wv.weight is missing"),
        (with_tensor("layers.0.wv.weight", 63, 64), ShapeError, "wv.weight: 63 rows of values do not divide into 2 KV heads"),
        (
            with_tensor("layers.0.down.weight", 64, 95),
            ShapeError,
            r"model.gguf: layers.0.down.weight: shape \[64, 95\], expected \[64, 96\] for layers.0.down.weight",
        ),
        (with_tensor("final_norm.weight", 63), ShapeError, r"shape \[63\], expected \[64\]"),
        (
            with_tensor("layers.0.q_norm.weight", 32),
            UnsupportedError,
            "random: tensor layers.0.q_norm.weight has no place in the graph of a llama model",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Callable[[Model], Model], error: type[EdgeqError], message: str) -> None:
    model = change(random_decoder(SPEC))
    with pytest.raises(error, match=message):
        decoder(model, float_grids(model), float_type=FLOAT)


def test_a_matrix_without_a_grid_is_named() -> None:
    model = random_decoder(SPEC)
    grids = {name: F32 for name in model.tensors if name != "layers.1.up.weight"}
    with pytest.raises(PlanError, match=r"^layers\.1\.up\.weight: no grid was chosen for it$"):
        decoder(model, grids, float_type=FLOAT, join=True)


def test_norms_beyond_float16_are_refused_when_they_are_written(tmp_path: Path) -> None:
    model = random_decoder(SPEC)
    large = from_values(np.full(64, 1e5), origin="model.gguf: norm")
    g = decoder(replace(model, tensors={**model.tensors, "final_norm.weight": large}), float_grids(model), float_type=FLOAT16)
    with pytest.raises(PlanError, match=r"model\.gguf: norm: 100000 is beyond the largest F16 number"):
        write_onnx(tmp_path, g)
