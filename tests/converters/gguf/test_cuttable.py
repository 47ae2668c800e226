"""What an elastic export can be cut by, and the reasons given for the rest."""

from __future__ import annotations

import re

import pytest
from made_models import made_spec

from edgeq.converters.gguf.cuttable import cuttable
from edgeq.families import FAMILIES, Family

PORTS = {"ffn", "kv_group", "layer", "vo", "qk"}


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.name)
def test_every_family_has_an_answer_for_every_port(row: Family) -> None:
    ports = cuttable(made_spec(row.name, n_layers=4, n_embd=96))
    assert ports.keys() == PORTS
    expected = "per layer" if row.gguf_layered else "all layers alike"
    assert (ports["ffn"].freedom, ports["kv_group"].freedom) == (expected, expected)
    for port in ports.values():
        assert bool(port.reason) == (port.freedom != "per layer")
        assert not re.search("[{}]", port.reason)


def test_reasons_name_what_stands_in_the_way() -> None:
    qwen3 = cuttable(made_spec("qwen3"))
    assert qwen3["ffn"].reason == "llama.cpp's qwen3 architecture has one width of MLPs for all layers."
    assert qwen3["qk"].reason.startswith("llama.cpp's qwen3 architecture normalises queries and keys over the whole head")
    assert qwen3["layer"].reason.startswith("llama.cpp's qwen3 architecture has no layers without attention or MLP")
    smollm3 = cuttable(made_spec("smollm3", n_layers=4))
    assert smollm3["layer"].reason.startswith("llama.cpp's smollm3 architecture does not rotate every 4th layer: without one, those")
    assert smollm3["vo"].reason.startswith("llama.cpp's smollm3 architecture has one head size for keys and values of all layers")
    assert cuttable(made_spec("gemma3", n_kv_heads=1))["kv_group"].reason == "there is one kv head, which every query head reads."
    assert cuttable(made_spec("llama", n_kv_heads=1))["kv_group"].freedom == "per layer"
