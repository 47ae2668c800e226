"""Chat templates: rendering a conversation into the text a model was trained on.

A template is Jinja2 as transformers runs it (`apply_chat_template`, transformers.utils.chat_template_utils): sandboxed and immutable,
`trim_blocks` and `lstrip_blocks` on, loop controls, a `tojson` that does not escape HTML, `raise_exception`, `strftime_now`, and a
`{% generation %}` block that marks the assistant's words and changes nothing in the text. Templates come with the model, from
strangers: they see plain JSON values only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from jinja2.parser import Parser

from edgeq.errors import TokenizerError

Message = Mapping[str, Any]

# Names under which reasoning is passed; templates read the first, gpt-oss's the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    bos_token: str | None,
    eos_token: str | None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """The text of a conversation, as transformers' apply_chat_template(..., tokenize=False) gives it.

    bos_token, eos_token: spellings; None leaves the name undefined, as it is for a tokenizer without one. tools: JSON schemas.
    variables: whatever else the template knows (`enable_thinking`, `date_string`, `documents`, ...).

    Raises TokenizerError when there are no messages, when the template does not parse, and when it fails or refuses the messages.
    """
    if not messages:
        raise TokenizerError("a chat needs at least one message; got none")
    for message in messages:
        if not isinstance(message, Mapping):
            raise TokenizerError(f"a chat message has to be a mapping with role and content; got {message!r}")
    tokens = {"bos_token": bos_token, "eos_token": eos_token}
    context = {
        **{name: token for name, token in tokens.items() if token is not None},
        "documents": None,
        **variables,
        "messages": [_with_reasoning(message) for message in messages],
        "tools": None if tools is None else list(tools),
        "add_generation_prompt": add_generation_prompt,
    }
    compiled = _compiled(template)
    try:
        return compiled.render(_plain(context))
    except Exception as err:  # a template can raise anything
        raise TokenizerError(f"the chat template does not accept these messages: {type(err).__name__}: {err}") from err


@lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as err:
        raise TokenizerError(f"the chat template does not parse: line {err.lineno}: {err.message}") from err
    except (jinja2.TemplateError, RecursionError, ValueError) as err:
        raise TokenizerError(f"the chat template does not parse: {err}") from err


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: the assistant's words. A call block, so that names set inside stay inside."""

    tags = {"generation"}  # noqa: RUF012 - Jinja2's declaration

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("words"), [], [], body).set_lineno(line)

    def words(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` in a template: makes dictionaries, and has nothing of the class to reach for."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` in a template, closed to names with an underscore in front."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args  # so that `namespace(self=...)` works, as in Jinja2
        attributes = dict(*given, **kwargs)
        for name in attributes:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}; names must not begin with an underscore")


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _with_reasoning(message: Message) -> Message:
    """Reasoning under any of its names, also under the names that templates read."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """Rebuilt of JSON types; anything else is a placeholder that names its type, as in transformers."""
    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)
        case int():
            return int(value)
        case float():
            return float(value)
        case Mapping():
            return {_plain(key): _plain(item) for key, item in value.items()}
        case list():
            return [_plain(item) for item in value]
        case tuple():
            return tuple(_plain(item) for item in value)
        case _:
            return f"<{type(value).__name__}>"
