"""Requests of the API: what they may hold, checked strictly. Units and meanings are those of `Session.stream`.

Fields fall into four kinds: those that are read; those that mean nothing here and change no answer (`user`, `metadata`, ...), which are
dropped; those that ask for something this server does not do (`tools`, `logprobs`, `n`, ...), which pass only with the value that asks
for nothing; and all others, which are refused by name, so that nobody waits for an effect that never comes. null is the same as absent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from edgeq.runtime.server.api_error import ApiError

_SEEDS = 2**32 - 1  # as many as the sampler knows; larger and negative ones are taken modulo this
_MAX_STOPS = 16
_DEFAULT_COMPLETION_TOKENS = 16  # the API's own default for completions; a chat goes on until the model ends

_DROPPED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})
# Field -> the values that ask for nothing.
_ASKING_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
}

Text = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    reasoning_content: str | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates know it: one text, and system where newer clients say developer."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        rest = {"name": self.name, "reasoning_content": self.reasoning_content}
        return {"role": role, "content": content, **{key: value for key, value in rest.items() if value is not None}}


class JsonSchema(BaseModel):
    """`schema` is a name that pydantic keeps for itself, so it goes by another here."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = ""
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("schema", "a json_schema belongs to type json_schema, and only to that")
        return self

    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must fulfil; None for free text."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class _Generation(_Strict):
    """What both endpoints take. top_k, min_p and grammar are not OpenAI's: the `openai` client passes them in extra_body."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int | None = None
    stop: Text | Annotated[list[Text], Field(max_length=_MAX_STOPS)] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    grammar: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_done(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        _check_text(value)
        kept = {}
        for name, item in value.items():
            if item is None or name in _DROPPED:
                continue
            if name not in _ASKING_NOTHING:
                kept[name] = item
            elif not any(type(item) is type(nothing) and item == nothing for nothing in _ASKING_NOTHING[name]):
                allowed = ", ".join(repr(nothing) for nothing in _ASKING_NOTHING[name])
                hint = f"Leave it out or give {allowed}." if allowed else "Leave it out."
                raise PydanticCustomError("unsupported", "{hint}", {"param": name, "hint": f"this server does not support it. {hint}"})
        return kept

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def options(self) -> dict[str, Any]:
        """Arguments of `Batcher.submit`."""
        schema = None if self.response_format is None else self.response_format.schema_of_answer()
        constraint = {"grammar": self.grammar, "json_schema": schema}
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "seed": None if self.seed is None else self.seed % _SEEDS,
            "stop": self.stop,
            **{name: value for name, value in constraint.items() if value is not None},
        }


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    def options(self) -> dict[str, Any]:
        return {**super().options(), "max_tokens": self.max_completion_tokens or self.max_tokens}

    def conversation(self) -> list[dict[str, str]]:
        return [message.for_template() for message in self.messages]


class CompletionRequest(_Generation):
    """POST /v1/completions."""

    prompt: str | list[int] | Annotated[list[str | list[int]], Field(min_length=1, max_length=1)]

    def options(self) -> dict[str, Any]:
        return {**super().options(), "max_tokens": self.max_tokens or _DEFAULT_COMPLETION_TOKENS}

    def text_or_ids(self) -> str | list[int]:
        """The one prompt, also when it comes as a list of one."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return prompt
        first = prompt[0] if prompt else []
        return first if isinstance(first, str | list) else [token for token in prompt if isinstance(token, int)]


def _check_text(body: Mapping[str, Any]) -> None:
    """JSON can spell halves of surrogate pairs, which are no characters: no tokenizer takes them and no answer can repeat them."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("text", "the body holds a lone surrogate (\\ud800 to \\udfff), which is not a character") from None
    except RecursionError:
        raise PydanticCustomError("depth", "the body is nested too deeply") from None


def refusal(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """One error out of those that pydantic found in a body: the first field at fault, and all that is said of it."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    param = first.get("ctx", {}).get("param") or (str(first["loc"][1]) if len(first["loc"]) > 1 else None)
    if param is None and first["type"] in {"text", "depth"}:
        return ApiError(400, first["msg"], code="invalid_value")
    if param is None:
        return ApiError(400, "the body has to be a JSON object, sent as application/json", code="invalid_json")
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 2:
        return ApiError(400, f"{param}: this server does not know this parameter. Leave it out.", param=param, code="unknown_parameter")
    if first["type"] == "missing" and len(first["loc"]) == 2:
        return ApiError(400, f"{param}: missing; it is required", param=param, code="missing_parameter")
    said = [_where(error["loc"][2:]) + error["msg"] for error in errors if error["loc"][1:2] == first["loc"][1:2]]
    code = "unsupported_parameter" if first["type"] == "unsupported" else "invalid_value"
    return ApiError(400, f"{param}: {'; '.join(dict.fromkeys(said))}", param=param, code=code)


def _where(loc: Sequence[Any]) -> str:
    """The place inside a field; tags of alternatives, which pydantic puts among them, hold a bracket or name a type."""
    parts = [str(part) for part in loc if isinstance(part, int) or (part.isidentifier() and part not in {"str", "int", "TextPart"})]
    return f"{'.'.join(parts)}: " if parts else ""
