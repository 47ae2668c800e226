"""What an elastic export can be cut by, and the reasons given for the rest."""

from __future__ import annotations

import re

import pytest
from made_models import made_spec

from edgeq.converters.gguf.cuttable import HEAD_SIZES, cuttable, head_sizes
from edgeq.families import FAMILIES, Family

PORTS = {"ffn", "kv_group", "layer", "head", "vo", "qk"}


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.name)
def test_every_family_has_an_answer_for_every_port(row: Family) -> None:
    ports = cuttable(made_spec(row.name, n_layers=4, n_embd=96))
    assert ports.keys() == PORTS
    expected = "per layer" if row.gguf_layered else "all layers alike"
    assert (ports["ffn"].freedom, ports["kv_group"].freedom) == (expected, expected)
    heads = "all layers alike" if row.gguf_layered else "no"
    wide = cuttable(made_spec(row.name, n_layers=4, n_embd=384, head_dim=96))
    assert {wide[port].freedom for port in ("head", "vo", "qk")} == {heads}
    for port in (*ports.values(), *wide.values()):
        assert bool(port.reason) == (port.freedom != "per layer")
        assert not re.search("[{}]", port.reason)


def test_reasons_name_what_stands_in_the_way() -> None:
    qwen3 = cuttable(made_spec("qwen3"))
    assert qwen3["ffn"].reason == "llama.cpp's qwen3 architecture has one width of MLPs for all layers."
    assert qwen3["qk"].reason.startswith("llama.cpp's qwen3 architecture normalises queries and keys over the whole head")
    assert qwen3["layer"].reason.startswith("llama.cpp's qwen3 architecture has no layers without attention or MLP")
    smollm3 = cuttable(made_spec("smollm3", n_layers=4))
    assert smollm3["layer"].reason.startswith("llama.cpp's smollm3 architecture does not rotate every 4th layer: without one, those")
    assert smollm3["vo"].reason.startswith("llama.cpp's smollm3 architecture has one size of heads, the same for keys and values, for all")
    assert smollm3["head"].reason.startswith("llama.cpp's smollm3 architecture reads no rotary divisors, without which the RoPE pairs that")
    assert qwen3["head"] == qwen3["qk"]
    assert cuttable(made_spec("qwen2", n_embd=96))["head"].reason.startswith(
        "heads have 24 dimensions, and flash attention kernels exist for"
    )
    phi3 = cuttable(made_spec("phi3", n_embd=384, head_dim=96))
    assert phi3["head"].reason.endswith("the same for keys and values, for all layers, and one set of rotary frequencies.")
    assert phi3["vo"].reason.startswith(
        "value dimensions are cut together with RoPE pairs, as port head: llama.cpp's deci architecture has"
    )
    assert phi3["qk"].reason.startswith("RoPE pairs are cut together with value dimensions, as port head")
    assert cuttable(made_spec("gemma3", n_kv_heads=1))["kv_group"].reason == "there is one kv head, which every query head reads."
    assert cuttable(made_spec("llama", n_kv_heads=1))["kv_group"].freedom == "per layer"


def test_head_sizes_have_kernels_and_divide_into_blocks() -> None:
    spec = made_spec("llama", head_dim=128)
    assert head_sizes(spec, 1) == (112, 96, 80, 64)
    assert head_sizes(spec, 32) == (96, 64)
    assert head_sizes(spec, 256) == ()
    assert head_sizes(made_spec("llama", head_dim=64), 1) == ()
    assert head_sizes(made_spec("phi3", n_embd=384, head_dim=96), 32) == (64,)
    assert head_sizes(made_spec("qwen3", head_dim=128), 32) == ()
    assert head_sizes(made_spec("smollm3", head_dim=128), 32) == ()
    assert sorted(HEAD_SIZES, reverse=True) == list(HEAD_SIZES)
