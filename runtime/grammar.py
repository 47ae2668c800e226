"""Holding answers to a grammar: GBNF as llama.cpp has it (its grammars/README.md), and JSON schemas turned into that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edgeq.errors import UsageError
from edgeq.runtime.llama import LlamaModel, library


def gbnf(json_schema: Mapping[str, Any] | None) -> str:
    """The grammar of a JSON schema; None and {} allow any JSON object.

    Raises UsageError for what is no schema, or uses what has no grammar.
    """
    from llama_cpp.llama_grammar import JSON_GBNF, json_schema_to_gbnf

    if not json_schema:
        return str(JSON_GBNF)
    try:
        return str(json_schema_to_gbnf(json.dumps(json_schema)))
    except Exception as err:  # the converter raises whatever a schema leads it to
        raise UsageError(f"the JSON schema cannot be made a grammar: {type(err).__name__}: {err}. Simplify it, or give a grammar.") from err


def check_grammar(model: LlamaModel, grammar: str) -> None:
    """Raises UsageError for a grammar that llama.cpp does not take, with what it says."""
    library().llama_sampler_free(grammar_sampler(model, grammar))


def grammar_sampler(model: LlamaModel, grammar: str) -> Any:
    """A new sampler of llama.cpp's, for its caller to free. Raises as `check_grammar`."""
    if "\0" in grammar or not grammar.strip():
        raise UsageError("the grammar is empty or has a zero byte. Give GBNF with a rule named root.")
    return model.grammar_sampler(grammar)
