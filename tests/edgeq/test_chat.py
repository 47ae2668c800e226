"""Chat templates render as transformers renders them."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from edgeq.chat import render
from edgeq.errors import TokenizerError

LLAMA_CPP = os.environ.get("EDGEQ_LLAMA_CPP_SOURCE")

TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "How <b>warm</b> & 'wet' it is in Köln", "parameters": {"b": 1, "a": 2}},
    }
]
ENDS = {"bos_token": "<s>", "eos_token": "</s>"}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Is 1 < 2 & 'true'?\n"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Grüße 👋"},
        {"role": "assistant", "content": " Hi. ", "reasoning": "They greet."},
        {"role": "user", "content": "Again"},
    ],
    [
        {"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "text", "text": "here"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "abc123def", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}],
        },
        {"role": "tool", "name": "weather", "tool_call_id": "abc123def", "content": '{"t": 3.5}'},
    ],
]

TEMPLATES = {
    "loop and trim": """
{%- for message in messages %}
    {%- if loop.first and message.role != "system" %}
        {{- bos_token + "[system] none\\n" }}
    {%- endif %}
    {% if message.content is string %}
{{ message.role | upper }}: {{ message.content | trim }}
    {% else %}
{{ message.role }}: {{ (message.content or []) | map(attribute="text") | join(" + ") }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
ASSISTANT:{% endif %}
""",
    "namespace and set": """{% set ns = namespace(n=0, last=none) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set ns.last = m %}
{% if ns.n == 2 %}{% continue %}{% endif %}{% if ns.n > 3 %}{% break %}{% endif %}
<{{ m['role'] }}|{{ loop.index0 }}|{{ ns.n }}>{% endfor %}{{ ns.last['role'] }}{{ eos_token }}""",
    "tojson": """{{ messages | tojson }}
{{ tools | tojson(indent=2) }}
{{ {"b": "é<>&'", "a": [1, 2.0, none, true]} | tojson(ensure_ascii=true, sort_keys=true, separators=(",", ":")) }}""",
    "macros and filters": """{% macro turn(m, tag='x') %}[{{ tag }}:{{ m.role }}]{% if m.tool_calls is defined %}{% for c in m.tool_calls %}
{{ c.function.name }}({{ c.function.arguments | items | list }}){% endfor %}{% endif %}{% endmacro %}
{% for m in messages if m.role != 'system' %}{{ turn(m) }}{{- "  " -}}{{ turn(m, tag=m.role[0]) }}{% endfor %}
{{ messages[-1].content[:3] }} {{ range(3) | list }} {{ 7 // 2 }} {{ "a,b".split(",") }} {{ dict(a=1, b=dict.fromkeys("cd", 2)) }}""",
    "generation": """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}
{{- m.reasoning_content }}|{{ m.thinking }}
{%- endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}""",
    "variables": "{{ enable_thinking is defined and enable_thinking }}|{{ date_string | default('no date') }}|{{ documents }}|"
    "{{ tools is none }}|{{ pad_token }}|{{ add_generation_prompt }}|{{ strftime_now is defined }}",
}
VARIABLES: list[dict[str, Any]] = [
    {},
    {"enable_thinking": False, "date_string": "26 July 2024", "pad_token": "<pad>", "documents": [{"title": "t"}]},
]


def theirs(template: str, chat: list[dict[str, Any]], **given: Any) -> str:
    return render_jinja_template([chat], chat_template=template, **given)[0][0]


@pytest.mark.parametrize("variables", VARIABLES, ids=["plain", "more"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("chat", CHATS, ids=["short", "long", "tools"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_that_of_transformers(name: str, chat: list[dict[str, Any]], prompt: bool, tools: Any, variables: dict[str, Any]) -> None:
    given = {"add_generation_prompt": prompt, "tools": tools, **ENDS, **variables}
    text = render(TEMPLATES[name], chat, **given)
    assert text == theirs(TEMPLATES[name], chat, **given)
    assert text


def plain(template: str, *, bos_token: str | None = "<s>", **variables: Any) -> str:
    return render(template, CHATS[0], add_generation_prompt=False, bos_token=bos_token, eos_token=None, **variables)


def test_a_token_the_model_lacks_is_undefined() -> None:
    assert plain("{{ eos_token is defined }} {{ bos_token }}|") == "False <s>|"
    assert plain("{{ bos_token is defined }}", bos_token=None) == "False"


def test_today() -> None:
    assert plain("{{ strftime_now('%Y') }}") in (str(datetime.now().year), str(datetime.now().year - 1))


def test_names_set_inside_a_generation_block_stay_inside() -> None:
    template = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    assert plain(template) == theirs(template, CHATS[0]) == "21"


def test_the_conversation_is_left_alone() -> None:
    chat = [{"role": "user", "content": ["a"], "reasoning": "r"}]
    render("{{ messages[0].reasoning_content }}", chat, add_generation_prompt=False, bos_token=None, eos_token=None)
    assert chat == [{"role": "user", "content": ["a"], "reasoning": "r"}]


def test_values_that_are_not_json_are_placeholders() -> None:
    class Word(str):
        def shout(self) -> str:
            return self.upper()

    assert plain("{{ thing }} {{ word }} {{ pair[1] }}", thing=object(), word=Word("hi"), pair=(1, 2.5)) == "<object> hi 2.5"
    with pytest.raises(TokenizerError, match="has no attribute 'shout'"):
        plain("{{ word.shout() }}", word=Word("hi"))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", r"does not accept these messages: TemplateError: roles must alternate"),
        ("{{ messages.missing.further }}", r"does not accept these messages: UndefinedError: 'list object' has no attribute 'missing'"),
        ("{{ 1 / 0 }}", r"does not accept these messages: ZeroDivisionError: division by zero"),
        ("{{ messages.append(1) }}", r"does not accept these messages: SecurityError: "),
        ("{{ ''.__class__.__mro__ }}", r"does not accept these messages: SecurityError: access to attribute '__class__'"),
        ("{{ namespace(_x=1) }}", r"does not accept these messages: SecurityError: a namespace cannot hold '_x'"),
        (
            "{% set ns = namespace() %}{% set ns._x = 1 %}",
            r"SecurityError: a namespace cannot hold '_x'; names must not begin with an underscore",
        ),
        ("one\n{% if %}", r"the chat template does not parse: line 2: Expected an expression"),
        ("{{ 'a' | nofilter }}", r"the chat template does not parse: line 1: No filter named 'nofilter'"),
        ("{% generation %}", r"the chat template does not parse: line 1: Unexpected end of template"),
    ],
)
def test_templates_that_fail(template: str, says: str) -> None:
    with pytest.raises(TokenizerError, match=says) as raised:
        plain(template)
    assert raised.value.__cause__ is not None
    with pytest.raises((jinja2.TemplateError, ZeroDivisionError)):
        theirs(template, CHATS[0], bos_token="<s>")


def test_no_messages() -> None:
    with pytest.raises(TokenizerError, match="a chat needs at least one message; got none"):
        render("x", [], add_generation_prompt=True, bos_token=None, eos_token=None)
    with pytest.raises(TokenizerError, match="a chat message has to be a mapping with role and content; got 'hello'"):
        render("x", ["hello"], add_generation_prompt=True, bos_token=None, eos_token=None)  # type: ignore[list-item]


@pytest.mark.slow
@pytest.mark.skipif(LLAMA_CPP is None, reason="EDGEQ_LLAMA_CPP_SOURCE names no llama.cpp source folder")
def test_templates_that_come_with_llama_cpp() -> None:
    """Dozens of published templates: the same text, or both refuse."""
    files = sorted((Path(str(LLAMA_CPP)) / "models" / "templates").glob("*.jinja"))
    rendered = 0
    for template in (file.read_text(encoding="utf-8") for file in files):
        for chat in CHATS:
            for tools in (None, TOOLS):
                for prompt in (False, True):
                    given = {
                        "add_generation_prompt": prompt,
                        "bos_token": "<s>",
                        "eos_token": "</s>",
                        "tools": tools,
                        "date_string": "today",
                    }
                    try:
                        text = theirs(template, chat, **given)
                    except Exception as err:  # whatever a template raises
                        with pytest.raises(TokenizerError) as raised:
                            render(template, chat, **given)
                        assert str(err) in str(raised.value)
                    else:
                        assert render(template, chat, **given) == text
                        rendered += 1
    assert len(files) > 40 and rendered > 200
