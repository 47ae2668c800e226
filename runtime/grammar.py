"""Holding answers to a grammar: GBNF as llama.cpp has it (its grammars/README.md), and JSON schemas turned into that."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from edgeq.errors import UsageError
from edgeq.runtime.grammar_text import check_text
from edgeq.runtime.llama import LlamaModel, library

_COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
_PATTERN_COUNT = re.compile(r"[{,]\s*0*([0-9]+)")
_MAX_WRITTEN = 1 << 28  # characters of the schema times its counts: more than the converter writes for it


def gbnf(json_schema: Mapping[str, Any] | None) -> str:
    """The grammar of a JSON schema; None and {} allow any JSON object.

    Raises UsageError for what is no schema, or uses what has no grammar.
    """
    from llama_cpp.llama_grammar import JSON_GBNF, json_schema_to_gbnf

    if not json_schema:
        return str(JSON_GBNF)
    try:
        text = json.dumps(json_schema)
        if len(text) * _repetitions(json_schema) <= _MAX_WRITTEN:
            return str(json_schema_to_gbnf(text))
    except Exception as err:  # the converter raises whatever a schema leads it to
        raise UsageError(f"the JSON schema cannot be made a grammar: {type(err).__name__}: {err}. Simplify it, or give a grammar.") from err
    raise UsageError("the JSON schema repeats too often to be made a grammar. Lower its lengths and its numbers of items.")


def _repetitions(schema: Mapping[str, Any]) -> int:
    """Sum of the counts in a schema, each of which is written out."""
    total, todo = 0, [schema]
    while todo:
        for key, value in todo.pop().items():
            if key in _COUNTS and isinstance(value, int):
                total += max(0, value)
            elif key == "pattern" and isinstance(value, str):
                total += sum(int(digits[:12]) for digits in _PATTERN_COUNT.findall(value))
            elif isinstance(value, Mapping):
                todo.append(value)
            elif isinstance(value, list):
                todo += [item for item in value if isinstance(item, Mapping)]
    return total


def check_grammar(model: LlamaModel, grammar: str) -> None:
    """Raises UsageError for a grammar that llama.cpp does not take or that would harm it, and for a model that could not end."""
    library().llama_sampler_free(grammar_sampler(model, grammar))


def grammar_sampler(model: LlamaModel, grammar: str) -> Any:
    """A new sampler of llama.cpp's, for its caller to free. Raises as `check_grammar`."""
    check_text(grammar)
    if not model.eog:
        raise UsageError(f"{model.path}: its vocabulary has no token that ends an answer, so none can follow a grammar to its end.")
    return model.grammar_sampler(grammar)
