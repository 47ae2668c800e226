"""GGUF models as sources: every silent rule of llama.cpp's loader is checked by running the same file in llama.cpp.

Files are written by gguf-py with random weights; what we read from them, run by the reference, must give llama.cpp's logits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import real_llama
from gguf_files import demo_file, write_with_gguf_py
from tiny import N_VOCAB, SPECIAL_TOKENS, tiny_tokenizer

from edgeq.converters.sources.gguf import read_gguf_model, rotate_half_rows
from edgeq.converters.sources.gguf_spec import RULES
from edgeq.errors import SourceError, UnsupportedError
from edgeq.families import FAMILIES
from edgeq.gguf_fields import Field
from edgeq.gguf_file import read_header
from edgeq.gguf_write import write_gguf
from edgeq.model import Model
from edgeq.rope import RopeSpec
from edgeq.spec import Attention, ModelSpec

V = gguf.GGUFValueType
Keys = dict[str, tuple[gguf.GGUFValueType, Any]]
Tensors = dict[str, Any]

N_EMBD, N_FF, HEAD_DIM, N_HEADS, N_KV = 64, 160, 24, 4, 2
N_CTX = 256  # llama.cpp rounds contexts up to this
IDS = np.random.default_rng(5).integers(0, N_VOCAB, 24).tolist()


@cache
def tokenizer_keys() -> Mapping[str, tuple[gguf.GGUFValueType, Any]]:
    described = json.loads(tiny_tokenizer().to_str())["model"]
    tokens = sorted(described["vocab"], key=described["vocab"].get)
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in described["merges"]]
    return {
        "tokenizer.ggml.model": (V.STRING, "gpt2"),
        "tokenizer.ggml.pre": (V.STRING, "smollm"),
        "tokenizer.ggml.tokens": (V.ARRAY, tokens),
        "tokenizer.ggml.token_type": (V.ARRAY, [3] * len(SPECIAL_TOKENS) + [1] * (N_VOCAB - len(SPECIAL_TOKENS))),
        "tokenizer.ggml.merges": (V.ARRAY, merges),
        "tokenizer.ggml.bos_token_id": (V.UINT32, 1),
        "tokenizer.ggml.eos_token_id": (V.UINT32, 2),
    }


class Draft:
    """A GGUF file in the making: keys below the architecture, and tensors with random values."""

    def __init__(self, arch: str, *, n_layers: int = 2, n_embd: int = N_EMBD, head_dim: int = HEAD_DIM) -> None:
        self.arch, self.n_layers, self.n_embd, self.head_dim = arch, n_layers, n_embd, head_dim
        self.random = np.random.default_rng(n_layers)
        self.keys: Keys = {
            "general.name": (V.STRING, "Tiny Test"),
            "general.license": (V.STRING, "mit"),
            "general.file_type": (V.UINT32, 0),
        }
        for key, size in {
            "block_count": n_layers,
            "context_length": N_CTX,
            "embedding_length": n_embd,
            "feed_forward_length": N_FF,
            "attention.head_count": N_HEADS,
            "attention.head_count_kv": N_KV,
            "attention.key_length": head_dim,
            "attention.value_length": head_dim,
            "rope.dimension_count": head_dim,
        }.items():
            self.set(key, size)
        self.set("attention.layer_norm_rms_epsilon", 1e-5)
        self.keys |= tokenizer_keys()
        self.tensors: Tensors = {}
        self.matrix("token_embd", N_VOCAB, n_embd)
        for i in range(n_layers):
            self.layer(f"blk.{i}.")
        self.vector("output_norm", n_embd)

    def set(self, key: str, value: Any, kind: gguf.GGUFValueType | None = None) -> Draft:
        guess = {bool: V.BOOL, int: V.UINT32, float: V.FLOAT32, str: V.STRING, list: V.ARRAY}[type(value)]
        self.keys[f"{self.arch}.{key}"] = (kind or guess, value)
        return self

    def drop(self, *keys: str) -> Draft:
        for key in keys:
            del self.keys[f"{self.arch}.{key}"]
        return self

    def matrix(self, name: str, n_out: int, n_in: int) -> None:
        self.tensors[name + ".weight"] = (self.random.standard_normal((n_out, n_in)) / math.sqrt(n_in)).astype(np.float32)

    def vector(self, name: str, n: int, suffix: str = ".weight") -> None:
        center = 1.0 if suffix == ".weight" else 0.0
        self.tensors[name + suffix] = (center + 0.2 * self.random.standard_normal(n)).astype(np.float32)

    def layer(self, blk: str) -> None:
        n_q, n_kv = N_HEADS * self.head_dim, N_KV * self.head_dim
        self.vector(blk + "attn_norm", self.n_embd)
        if self.arch == "phi3":
            self.matrix(blk + "attn_qkv", n_q + 2 * n_kv, self.n_embd)
        else:
            for name, n in (("attn_q", n_q), ("attn_k", n_kv), ("attn_v", n_kv)):
                self.matrix(blk + name, n, self.n_embd)
        if self.arch in ("qwen3", "gemma3"):
            self.vector(blk + "attn_q_norm", self.head_dim)
            self.vector(blk + "attn_k_norm", self.head_dim)
        self.matrix(blk + "attn_output", self.n_embd, n_q)
        self.vector(blk + "ffn_norm", self.n_embd)
        if self.arch != "phi3":
            self.matrix(blk + "ffn_gate", N_FF, self.n_embd)
        self.matrix(blk + "ffn_up", 2 * N_FF if self.arch == "phi3" else N_FF, self.n_embd)
        self.matrix(blk + "ffn_down", self.n_embd, N_FF)
        if self.arch == "gemma3":
            self.vector(blk + "post_attention_norm", self.n_embd)
            self.vector(blk + "post_ffw_norm", self.n_embd)

    def bias(self, *names: str) -> Draft:
        """A bias for each of these weights, in every layer."""
        for i in range(self.n_layers):
            for name in names:
                self.vector(f"blk.{i}.{name}", len(self.tensors[f"blk.{i}.{name}.weight"]), ".bias")
        return self

    def untie(self) -> Draft:
        self.matrix("output", N_VOCAB, self.n_embd)
        return self

    def fuse(self) -> Draft:
        """One attn_qkv tensor per layer instead of three."""
        for i in range(self.n_layers):
            for suffix in (".weight", ".bias"):
                names = [f"blk.{i}.attn_{x}{suffix}" for x in "qkv"]
                if names[0] in self.tensors:
                    self.tensors[f"blk.{i}.attn_qkv{suffix}"] = np.concatenate([self.tensors.pop(name) for name in names])
        return self

    def factors(self, name: str, start: float, stop: float) -> Draft:
        n = self.keys[f"{self.arch}.rope.dimension_count"][1] // 2
        self.tensors[name + ".weight"] = np.linspace(start, stop, n, dtype=np.float32)
        return self

    def write(self, folder: Path, name: str = "tiny.gguf") -> Path:
        return write_with_gguf_py(folder / name, self.arch, self.keys, self.tensors)


def llama() -> Draft:
    return Draft("llama")


def qwen2() -> Draft:
    return Draft("qwen2", n_embd=96).bias("attn_q", "attn_k", "attn_v")


def phi3() -> Draft:
    return Draft("phi3", n_embd=96).set("rope.dimension_count", 12).untie()


def longrope(draft: Draft) -> Draft:
    """Long factors apply: the context has 256 tokens."""
    draft.set("rope.scaling.type", "longrope").set("rope.scaling.attn_factor", 1.2).set("rope.scaling.original_context_length", 64)
    return draft.factors("rope_factors_short", 1.0, 1.5).factors("rope_factors_long", 1.0, 6.0)


def yarn(draft: Draft) -> Draft:
    return draft.set("rope.scaling.type", "yarn").set("rope.scaling.factor", 4.0).set("rope.scaling.original_context_length", 64)


def gemma3(n_layers: int = 7) -> Draft:
    return Draft("gemma3", n_layers=n_layers).set("attention.sliding_window", 6).set("rope.freq_base", 30000.0)


ALL_BIASES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")

MODELS: Mapping[str, Callable[[], Draft]] = {
    "llama": llama,
    "llama untied": lambda: llama().untie().set("rope.freq_base", 500000.0),
    "llama square": lambda: Draft("llama", head_dim=16).drop("attention.key_length", "attention.value_length", "rope.dimension_count"),
    "llama full heads": lambda: all_kv_heads(llama()),
    "llama per-layer": lambda: llama().set("attention.head_count", [4, 4]).set("feed_forward_length", [160, 160]),
    "llama biases": lambda: llama().bias(*ALL_BIASES),
    "llama bias in one layer": lambda: without("blk.0.ffn_down.bias", llama().bias("attn_output", "ffn_down")),
    "llama fused": lambda: llama().bias("attn_q", "attn_k", "attn_v").fuse(),
    "llama fused weights only": lambda: fused_weights_only(llama().bias("attn_q", "attn_k", "attn_v")),
    "llama factors": lambda: llama().factors("rope_freqs", 1.0, 8.0),
    "llama factors and linear": lambda: llama().factors("rope_freqs", 1.0, 8.0).set("rope.scaling.factor", 2.0),
    "llama linear": lambda: llama().set("rope.scaling.type", "linear").set("rope.scaling.factor", 2.5),
    "llama old linear": lambda: llama().set("rope.scale_linear", 2.5),
    "llama scaling none": lambda: llama().set("rope.scaling.type", "none").set("rope.scaling.factor", 2.5),
    "llama attn factor": lambda: llama().set("rope.scaling.attn_factor", 1.3),
    "llama yarn": lambda: yarn(llama()).set("rope.scaling.attn_factor", 1.1),
    "llama yarn without effect": lambda: (
        yarn(llama())
        .set("rope.scaling.original_context_length", 4096)
        .set("rope.scaling.yarn_beta_fast", 8.0)
        .set("rope.scaling.yarn_attn_factor", 3.0)
        .set("attention.sliding_window", 4)
    ),
    "llama longrope": lambda: longrope(llama()).set("rope.scaling.factor", 1.5),
    "qwen2": qwen2,
    "qwen2 yarn untied": lambda: yarn(qwen2()).untie(),
    "qwen3": lambda: Draft("qwen3"),
    "phi3": phi3,
    "phi3 split": lambda: split_attention(phi3()),
    "phi3 window without effect": lambda: phi3().set("attention.sliding_window", 4),
    "phi3 long factors": lambda: longrope(phi3()),
    "phi3 short factors": lambda: longrope(phi3()).set("rope.scaling.original_context_length", 4096),
    "gemma3": gemma3,
    "gemma3 linear": lambda: gemma3().set("rope.scaling.type", "linear").set("rope.scaling.factor", 8.0),
    "gemma3 yarn": lambda: yarn(gemma3()).set("rope.scaling.attn_factor", 1.2),
    "gemma3 local base": lambda: gemma3(3).set("rope.freq_base_swa", 500.0).set("attention.sliding_window_pattern", [True, False, True]),
    "gemma3 period": lambda: gemma3(4).set("attention.sliding_window_pattern", 2),
    "gemma3 all local": lambda: gemma3(2).set("attention.sliding_window_pattern", 0),
    "gemma3 no window": lambda: gemma3(2).set("attention.sliding_window", 0),
    "gemma3 62 layers": lambda: gemma3(62),
    "smollm3": lambda: Draft("smollm3", n_layers=5),
    "smollm3 biases": lambda: Draft("smollm3", n_layers=4).bias("attn_q", "attn_k", "attn_v"),
}


def all_kv_heads(draft: Draft) -> Draft:
    draft.drop("attention.head_count_kv")
    for i in range(draft.n_layers):
        for name in "kv":
            draft.matrix(f"blk.{i}.attn_{name}", N_HEADS * HEAD_DIM, draft.n_embd)
    return draft


def fused_weights_only(draft: Draft) -> Draft:
    biases = {name: value for name, value in draft.tensors.items() if name.endswith(".bias")}
    draft.tensors = {name: value for name, value in draft.tensors.items() if name not in biases}
    draft.fuse().tensors |= biases
    return draft


def split_attention(draft: Draft) -> Draft:
    n_kv = N_KV * draft.head_dim
    for i in range(draft.n_layers):
        fused = draft.tensors.pop(f"blk.{i}.attn_qkv.weight")
        for name, part in zip("qkv", np.split(fused, [N_HEADS * draft.head_dim, N_HEADS * draft.head_dim + n_kv]), strict=True):
            draft.tensors[f"blk.{i}.attn_{name}.weight"] = part
    return draft


def reference_logits(model: Model) -> np.ndarray:
    from edgeq.reference import Reference

    reference = Reference(model.spec, model.tensors)
    [hidden] = reference.hidden([IDS], n_ctx=N_CTX)
    return reference.logits(hidden).numpy()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Torch's threads cost more than they give on matrices this small."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: draft().write(folder, name.replace(" ", "-") + ".gguf") for name, draft in MODELS.items()}


@pytest.fixture(scope="module")
def stock(files: Mapping[str, Path]) -> Mapping[str, np.ndarray]:
    """llama.cpp's logits of every model."""
    return dict(zip(files, real_llama.all_logits(list(files.values()), IDS, n_ctx=N_CTX), strict=True))


def tolerance(name: str) -> float:
    """Both compute in float32, but llama.cpp's CPU code takes GELU from a table of float16 values."""
    return 1e-2 if name.startswith("gemma3") else 2e-5


@pytest.mark.parametrize("name", MODELS)
def test_what_we_read_is_what_llama_cpp_runs(name: str, files: Mapping[str, Path], stock: Mapping[str, np.ndarray]) -> None:
    assert np.std(stock[name]) > 0.3
    np.testing.assert_allclose(reference_logits(read_gguf_model(files[name])), stock[name], atol=tolerance(name), rtol=0)


def with_blocks(spec: ModelSpec, change: Callable[[Attention], Attention]) -> ModelSpec:
    return replace(spec, blocks=tuple(change(b) if isinstance(b, Attention) else b for b in spec.blocks))


WRONG: Mapping[str, tuple[str, Callable[[ModelSpec], ModelSpec]]] = {
    "window of one more": ("gemma3", lambda s: with_blocks(s, lambda b: replace(b, window=b.window and b.window + 1))),
    "no window": ("gemma3", lambda s: with_blocks(s, lambda b: replace(b, window=None))),
    "one base for all": ("gemma3", lambda s: replace(s, rope_local=s.rope)),
    "unscaled": ("gemma3 linear", lambda s: replace(s, rope=replace(s.rope, kind="plain"))),
    "local scaled": ("gemma3 linear", lambda s: replace(s, rope_local=replace(s.rope_local, kind="linear", factor=8.0))),
    "default local base": ("gemma3 local base", lambda s: replace(s, rope_local=replace(s.rope_local, base=10000.0))),
    "scaled by the head": ("gemma3 62 layers", lambda s: replace(s, attn_scale=HEAD_DIM**-0.5)),
    "yarn betas": ("llama yarn without effect", lambda s: replace(s, rope=replace(s.rope, beta_fast=8.0))),
    "yarn magnitude": ("llama yarn", lambda s: replace(s, rope=replace(s.rope, attn_factor=1.1))),
    "all rotate": ("smollm3", lambda s: with_blocks(s, lambda b: replace(b, rope="main"))),
    "short factors": ("phi3 long factors", lambda s: replace(s, rope=replace(s.rope, original_n_ctx=4096))),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_rule_would_be_seen(case: str, files: Mapping[str, Path], stock: Mapping[str, np.ndarray]) -> None:
    name, change = WRONG[case]
    model = read_gguf_model(files[name])
    wrong = replace(model, spec=change(model.spec))
    assert np.abs(reference_logits(wrong) - stock[name]).max() > 3 * tolerance(name)


# ---- the model's other parts


def test_facts_of_a_model(tmp_path: Path) -> None:
    path = llama().untie().bias("attn_q", "attn_k", "attn_v").write(tmp_path)
    model = read_gguf_model(path)
    assert (model.name, model.format, model.files) == ("Tiny Test", "gguf", (path,))
    assert model.metadata == {"name": "Tiny Test", "license": "mit"}
    assert model.gguf_fields == read_header(path).fields
    spec = model.spec
    assert (spec.family, spec.n_vocab, spec.n_embd, spec.n_ctx, spec.n_layers, spec.tied) == ("llama", N_VOCAB, N_EMBD, N_CTX, 2, False)
    assert spec.biases == {"wq", "wk", "wv"}
    assert spec.rope == RopeSpec(dim=HEAD_DIM, base=10000.0)
    layer = ["attn_norm", "wo", "wq", "wk", "wv"]
    biased = [f"{role}.bias" for role in ("wq", "wk", "wv")]
    expected = {f"{role}.weight" for role in (*layer, "mlp_norm", "gate", "up", "down")} | set(biased)
    names = {"embed.weight", "final_norm.weight", "head.weight"} | {f"layers.{i}.{role}" for i in range(2) for role in expected}
    assert set(model.tensors) == names
    assert model.tensors["layers.1.wq.weight"].origin == f"{path}: blk.1.attn_q.weight"
    text = "The other dogs: 42!"
    assert model.tokenizer.encode(text) == tiny_tokenizer().encode(text, add_special_tokens=False).ids


def test_a_nameless_model_is_called_after_its_file(tmp_path: Path) -> None:
    draft = llama()
    del draft.keys["general.name"]
    assert read_gguf_model(draft.write(tmp_path, "some-model.gguf")).name == "some-model"


def rotate_half(stored: np.ndarray, n_heads: int) -> np.ndarray:
    """Undo what llama.cpp's converter does to q and k rows (LlamaModel.permute)."""
    head_dim = len(stored) // n_heads
    return stored.reshape(n_heads, head_dim // 2, 2, -1).swapaxes(1, 2).reshape(stored.shape)


def test_rows_of_the_demo_model() -> None:
    path = demo_file()
    model, header = read_gguf_model(path), read_header(path)
    spec = model.spec
    assert (spec.n_layers, spec.n_embd, spec.n_vocab, spec.n_ctx, spec.tied) == (30, 576, 49152, 8192, True)
    assert (spec.attention[7].n_heads, spec.attention[7].n_kv_heads, spec.mlps[7].n_ff) == (9, 3, 1536)
    assert spec.rope == RopeSpec(dim=64, base=100000.0)
    assert spec.attn_scale == 0.125 and spec.norm_eps == pytest.approx(1e-5, rel=1e-6)
    assert len(model.tensors) == len(header.tensors) == 272

    def stored(name: str) -> np.ndarray:
        info = header.tensors[name]
        raw = np.fromfile(path, dtype=np.uint8, count=info.nbytes, offset=info.offset)
        return gguf.dequantize(raw.reshape(-1, info.grid.row_bytes(info.shape[-1])), gguf.GGMLQuantizationType(info.grid.id))

    for ours, theirs in {
        "layers.0.attn_norm": "blk.0.attn_norm",
        "layers.13.down": "blk.13.ffn_down",
        "layers.29.wv": "blk.29.attn_v",
        "final_norm": "output_norm",
    }.items():
        tensor = model.tensors[ours + ".weight"]
        np.testing.assert_array_equal(tensor.decode().reshape(-1, tensor.n_cols), stored(theirs + ".weight"))
    np.testing.assert_array_equal(model.tensors["embed.weight"].decode(100, 300), stored("token_embd.weight")[100:300])
    for role, name, heads in (("wq", "attn_q", 9), ("wk", "attn_k", 3)):
        tensor = model.tensors[f"layers.5.{role}.weight"]
        assert tensor.grid.name == "Q4_1"
        np.testing.assert_array_equal(tensor.decode(), rotate_half(stored(f"blk.5.{name}.weight"), heads))


def test_order_of_rows() -> None:
    assert rotate_half_rows(2, 6).tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    rows = np.random.default_rng(0).standard_normal((4 * 8, 3))
    np.testing.assert_array_equal(rows[rotate_half_rows(4, 8)], rotate_half(rows, 4))


def test_quantized_and_fused_tensors_stay_in_their_grid(tmp_path: Path) -> None:
    draft = Draft("llama", head_dim=16).set("rope.dimension_count", 16).fuse()
    quantized = {}
    for name, kind in (("blk.0.attn_qkv.weight", "Q8_0"), ("blk.1.ffn_down.weight", "Q4_1"), ("token_embd.weight", "BF16")):
        type_ = gguf.GGMLQuantizationType[kind]
        draft.tensors[name] = quantized[name] = (gguf.quantize(draft.tensors[name], type_), type_)
    model = read_gguf_model(draft.write(tmp_path))
    raw = quantized["blk.0.attn_qkv.weight"][0]
    q, k, v = raw[:64], raw[64:96], raw[96:]
    assert model.tensors["layers.0.wq.weight"].grid.name == "Q8_0"
    np.testing.assert_array_equal(model.tensors["layers.0.wq.weight"].packed(), rotate_half(q, 4))
    np.testing.assert_array_equal(model.tensors["layers.0.wk.weight"].packed(), rotate_half(k, 2))
    np.testing.assert_array_equal(model.tensors["layers.0.wv.weight"].packed(), v)
    for ours, theirs in (("layers.1.down.weight", "blk.1.ffn_down.weight"), ("embed.weight", "token_embd.weight")):
        np.testing.assert_array_equal(model.tensors[ours].packed(), quantized[theirs][0].view(np.uint8))


def test_dimensions_of_one_are_no_contradiction(tmp_path: Path) -> None:
    draft = llama()
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_up.weight", "token_embd.weight"):
        draft.tensors[name] = draft.tensors[name][None]
    assert read_gguf_model(draft.write(tmp_path)).tensors["layers.0.up.weight"].shape == (N_FF, N_EMBD)


def test_a_split_model(tmp_path: Path) -> None:
    whole = llama()
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=7)
    for key, (kind, value) in whole.keys.items():
        writer.add_key_value(key, value, kind)
    for name, tensor in whole.tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = tuple(sorted(tmp_path.glob("*.gguf")))
    model = read_gguf_model(parts[1])
    assert model.files == parts and len(parts) == 3
    np.testing.assert_array_equal(model.tensors["layers.1.down.weight"].decode(), whole.tensors["blk.1.ffn_down.weight"])


# ---- refusals


def without(name: str, draft: Draft) -> Draft:
    del draft.tensors[name]
    return draft


def with_tensor(name: str, value: Any, draft: Draft) -> Draft:
    draft.tensors[name] = np.asarray(value, dtype=np.float32)
    return draft


def with_key(key: str, kind: gguf.GGUFValueType, value: Any, draft: Draft) -> Draft:
    draft.keys[key] = (kind, value)
    return draft


REFUSED: Mapping[str, tuple[Callable[[], Draft], type[Exception], str]] = {
    "family": (lambda: Draft("mamba2"), UnsupportedError, "GGUF architecture 'mamba2' is not supported; supported: llama, deci, qwen2"),
    "adapter": (lambda: with_key("general.type", V.STRING, "adapter", llama()), UnsupportedError, "holds 'adapter', not a model"),
    "experts": (lambda: llama().set("expert_count", 8), UnsupportedError, "llama.expert_count is 8; mixtures of experts are not supported"),
    "not causal": (lambda: llama().set("attention.causal", False), UnsupportedError, "models without causal attention are not supported"),
    "pooling": (lambda: Draft("qwen3").set("pooling_type", 3), UnsupportedError, "embedding and ranking models are not supported"),
    "soft cap": (lambda: gemma3(2).set("final_logit_softcapping", 30.0), UnsupportedError, "soft caps on logits are not supported"),
    "unknown key": (lambda: llama().set("logit_scale", 2.0), UnsupportedError, "could change the model: llama.logit_scale"),
    "local base": (lambda: llama().set("rope.freq_base_swa", 2.0), UnsupportedError, r"could change the model: llama.rope.freq_base_swa"),
    "missing key": (
        lambda: llama().drop("embedding_length"),
        SourceError,
        "metadata key llama.embedding_length is missing. The file is incomplete; convert",
    ),
    "missing number": (lambda: llama().drop("attention.layer_norm_rms_epsilon"), SourceError, "layer_norm_rms_epsilon is missing"),
    "zero": (lambda: llama().set("context_length", 0), SourceError, "llama.context_length is 0, expected a positive whole number"),
    "text": (lambda: llama().set("block_count", "two"), SourceError, "llama.block_count is 'two', expected a positive whole number"),
    "not finite": (lambda: llama().set("rope.freq_base", math.inf), SourceError, "llama.rope.freq_base is inf, expected a finite number"),
    "array": (
        lambda: llama().set("attention.head_count", [4, 4, 4]),
        SourceError,
        "llama.attention.head_count is an array of 3, expected 2 positive whole numbers, one per layer",
    ),
    "layers": (lambda: llama().set("block_count", 513), SourceError, "llama.block_count is 513, expected at most 512"),
    "heads": (lambda: llama().set("attention.head_count_kv", 3), SourceError, "4 heads do not divide into 3 kv heads. The metadata contra"),
    "value heads": (
        lambda: llama().set("attention.value_length", 8),
        UnsupportedError,
        "key_length 24 and attention.value_length 8 differ",
    ),
    "rotary size": (
        lambda: llama().set("rope.dimension_count", 12),
        UnsupportedError,
        "rope.dimension_count 12 differs from the head size 24",
    ),
    "odd rotary size": (
        lambda: phi3().set("rope.dimension_count", 11),
        UnsupportedError,
        "rope dimension 11 is not a positive even number",
    ),
    "rotary beyond": (lambda: phi3().set("rope.dimension_count", 48), SourceError, "rope dimension 48 exceeds head_dim 24"),
    "rotary base": (lambda: llama().set("rope.freq_base", -1.0), UnsupportedError, "rope base -1.0 is not a positive number"),
    "scaling": (
        lambda: llama().set("rope.scaling.type", "ntk"),
        UnsupportedError,
        "type 'ntk' is unknown; known: none, linear, yarn, longrope",
    ),
    "factor": (lambda: llama().set("rope.scaling.factor", -2.0), SourceError, "rope.scaling.factor is -2.0, expected a positive number"),
    "yarn factors": (
        lambda: yarn(llama()).factors("rope_freqs", 1, 2),
        UnsupportedError,
        "yarn together with rope factor tensors is not supported",
    ),
    "half of the factors": (
        lambda: without("rope_factors_long.weight", longrope(phi3())),
        UnsupportedError,
        "of rope_factors_short.weight and rope_factors_long.weight only one is there",
    ),
    "negative factors": (
        lambda: llama().factors("rope_freqs", -1, 2),
        SourceError,
        "rope_freqs.weight: value -1.0 found, all must be positive",
    ),
    "factors of NaN": (
        lambda: with_tensor("rope_freqs.weight", [math.nan] * 12, llama()),
        SourceError,
        "rope_freqs.weight: 12 values are NaN, 0 infinite",
    ),
    "window pattern": (
        lambda: gemma3(3).set("attention.sliding_window_pattern", [True, False]),
        SourceError,
        "sliding_window_pattern is an array of 2, expected 3 values, one per layer",
    ),
    "window period": (
        lambda: gemma3(3).set("attention.sliding_window_pattern", "often"),
        SourceError,
        "sliding_window_pattern is 'often', expected a whole number, or one value per layer",
    ),
    "vocabulary": (
        lambda: with_key("tokenizer.ggml.tokens", V.ARRAY, ["a", "b"], llama()),
        SourceError,
        "token_embd.weight has 320 rows, but tokenizer.ggml.tokens lists 2 tokens",
    ),
    "no embedding": (lambda: without("token_embd.weight", llama()), SourceError, "tensor token_embd.weight is missing"),
    "missing tensor": (
        lambda: without("blk.1.ffn_up.weight", llama()),
        SourceError,
        "tensor blk.1.ffn_up.weight is missing. The file is incompl",
    ),
    "missing bias": (lambda: without("blk.1.attn_k.bias", qwen2()), SourceError, "tensor blk.1.attn_k.bias is missing"),
    "shape": (
        lambda: llama().set("feed_forward_length", 128),
        SourceError,
        r"tensor blk.0.ffn_down.weight has shape \[64, 160\], expected \[64, 128\] by the metadata",
    ),
    "deep tensor": (
        lambda: with_tensor("blk.0.ffn_up.weight", np.zeros((2, N_FF, N_EMBD)), llama()),
        SourceError,
        r"tensor blk.0.ffn_up.weight has shape \[2, 160, 64\], expected \[160, 64\]",
    ),
    "unknown tensor": (
        lambda: with_tensor("blk.0.attn_sinks.weight", np.zeros(4), llama()),
        UnsupportedError,
        "tensors that this family does not have: blk.0.attn_sinks.weight",
    ),
    "unknown tensors": (
        lambda: Draft("qwen2", n_embd=96, n_layers=6).bias("ffn_up"),
        UnsupportedError,
        "does not have: blk.0.ffn_up.bias, .*, blk.4.ffn_up.bias and 1 more",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason(case: str, tmp_path: Path) -> None:
    draft, error, message = REFUSED[case]
    path = draft().write(tmp_path)
    with pytest.raises(error, match=message) as caught:
        read_gguf_model(path)
    assert str(caught.value).startswith(str(path))


def test_no_architecture(tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    write_gguf(path, [Field.string("general.name", "x")], [])
    with pytest.raises(SourceError, match=r"f\.gguf: general\.architecture is missing"):
        read_gguf_model(path)


def test_every_gguf_family_has_rules() -> None:
    assert set(RULES) == {arch for row in FAMILIES for arch in (row.gguf_arch, row.gguf_layered) if arch}
