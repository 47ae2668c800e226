"""How text is cut before merging: rows that tie llama.cpp's names to the structure of a `tokenizer.json`.

A byte-level row gives the steps that the `tokenizers` library runs before its merges and the name under which llama.cpp cuts in the
same places (`tokenizer.ggml.pre`; its regular expressions are in src/llama-vocab.cpp, the hand-written cutters in src/unicode.cpp).
A sentencepiece-like row gives the steps that turn spaces into "▁", and whether llama.cpp has to put a space in front.

llama.cpp's own converter recognizes a tokenizer by a hash of the token ids of one text, which fails for every changed vocabulary.
Rows compare structure instead, so a fine-tune with resized or added tokens is recognized. A row may say in `differs` on which input
llama.cpp cuts otherwise; a structure that no row describes is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edgeq.errors import TokenizerError

SPACE_MARK = "▁"

# One step of a normalizer or pre-tokenizer, in a spelling that equal behaviour shares: ("split", regex), ("digits",), ("prepend", "▁"), ...
Step = tuple[str, ...]

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)

LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
O200K = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"


def _cased_in_ascii_only(pattern: str, letters: str) -> str:
    """A pattern with llama.cpp's stand-in for case, which it knows of ASCII letters only: letters are not small, then not capital."""
    upper, lower = rf"(?:(?=[{letters}])[^a-z])", rf"(?:(?=[{letters}])[^A-Z])"
    lead = r"[^\r\n\p{L}\p{N}]?"
    return pattern.replace(_CASED[0], f"{lead}{upper}*{lower}+").replace(_CASED[1], f"{lead}{upper}+{lower}*")


GPT2_STEP: Step = ("gpt2",)
DIGITS_STEP: Step = ("digits",)


@dataclass(frozen=True, kw_only=True)
class ByteLevelRow:
    """A cut in front of byte-level merges.

    name: value of `tokenizer.ggml.pre` we write; aliases: other names under which llama.cpp does the same. ignore_merges: a word that
    is a token is taken whole, whatever the merges say (llama.cpp decides this by the name). add_bos: what llama.cpp does when a file
    does not say. differs: the input that llama.cpp cuts otherwise than `steps` do, and llama_cpp: how it does cut.
    """

    name: str
    steps: tuple[Step, ...]
    aliases: tuple[str, ...] = ()
    ignore_merges: bool = False
    add_bos: bool = False
    differs: str | None = None
    llama_cpp: tuple[Step, ...] | None = None


_MARKS = "words with combining marks (vowel signs of Indic scripts and Thai, Hebrew and Arabic points, decomposed accents)"
_CASE = "words in which a capital follows a small letter and one of the letters is not ASCII"

BYTE_LEVEL_ROWS = (
    # https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
    ByteLevelRow(
        name="smollm",
        steps=(DIGITS_STEP, GPT2_STEP),
        aliases=("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    ),
    # https://huggingface.co/openai-community/gpt2
    ByteLevelRow(
        name="gpt-2",
        steps=(GPT2_STEP,),
        aliases=("phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "a.x-4.0", "mellum", "exaone4"),
    ),
    # https://huggingface.co/meta-llama/Llama-3.2-1B-Instruct, https://huggingface.co/HuggingFaceTB/SmolLM3-3B
    ByteLevelRow(
        name="llama-bpe",
        steps=(("split", LLAMA3),),
        aliases=("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        ignore_merges=True,
        add_bos=True,
    ),
    # The same cut without ignore_merges. https://huggingface.co/databricks/dbrx-instruct
    ByteLevelRow(name="dbrx", steps=(("split", LLAMA3),), aliases=("smaug-bpe",)),
    # https://huggingface.co/Qwen/Qwen2.5-0.5B-Instruct, https://huggingface.co/Qwen/Qwen3-0.6B
    ByteLevelRow(
        name="qwen2",
        steps=(("split", QWEN2),),
        aliases=("stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "kormo", "f2llmv2", "solar-open", "grok-2"),
    ),
    # https://huggingface.co/microsoft/Phi-4-mini-instruct. llama.cpp's "gpt-4o" forgets the marks of this pattern, so that Hindi, Thai or
    # pointed Hebrew come apart; the cut it has for another model with the same pattern keeps them, but takes whole words first.
    ByteLevelRow(
        name="granite-embed-multi-97m",
        steps=(("split", O200K),),
        ignore_merges=True,
        differs=_CASE,
        llama_cpp=(("split", _cased_in_ascii_only(O200K, r"\p{L}\p{M}")),),
    ),
    ByteLevelRow(
        name="gpt-4o",
        steps=(("split", O200K),),
        aliases=("llama4", "kanana2", "talkie", "minimax-m2"),
        differs=f"{_MARKS}, and {_CASE}",
        llama_cpp=(("split", _cased_in_ascii_only(O200K, r"\p{L}")),),
    ),
    # https://huggingface.co/mistralai/Mistral-Nemo-Instruct-2407
    ByteLevelRow(
        name="tekken",
        steps=(("split", TEKKEN),),
        ignore_merges=True,
        add_bos=True,
        differs=f"{_MARKS}, and {_CASE}",
        llama_cpp=(("split", _cased_in_ascii_only(TEKKEN, r"\p{L}")),),
    ),
)


@dataclass(frozen=True, kw_only=True)
class SpaceRow:
    """A way to mark spaces in front of sentencepiece-like merges; llama.cpp's one knob for it is `add_space_prefix`."""

    name: str
    steps: tuple[Step, ...]
    add_space_prefix: bool
    differs: str | None = None


_PREPEND: Step = ("prepend", SPACE_MARK)
_REPLACE: Step = ("replace", " ", SPACE_MARK)
_NO_SECOND_SPACE = "text that starts with a space (the library adds no second one)"

SPACE_ROWS = (
    # Llama 2, TinyLlama, Phi-3, Mistral up to v0.2. https://huggingface.co/TinyLlama/TinyLlama-1.1B-Chat-v1.0
    SpaceRow(name="prepend and replace", steps=(_PREPEND, _REPLACE), add_space_prefix=True),
    SpaceRow(name="replace", steps=(_REPLACE,), add_space_prefix=False),
    # Gemma 1 to 3; after the replacement no space is left to split at. https://huggingface.co/google/gemma-3-1b-it
    SpaceRow(name="replace, split at spaces", steps=(_REPLACE, ("split at spaces",)), add_space_prefix=False),
    SpaceRow(name="metaspace never", steps=(("metaspace", "never"),), add_space_prefix=False),
    # Mistral v0.3. https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.3
    SpaceRow(
        name="metaspace first",
        steps=(("metaspace", "first"),),
        add_space_prefix=True,
        differs=f"{_NO_SECOND_SPACE} and text right behind a special token (the library adds no space there)",
    ),
    SpaceRow(name="metaspace always", steps=(("metaspace", "always"),), add_space_prefix=True, differs=_NO_SECOND_SPACE),
)


def byte_level_rows(steps: tuple[Step, ...], *, where: str) -> tuple[ByteLevelRow, ...]:
    """The rows with these steps, best first; TokenizerError naming `where` when there is none."""
    rows = tuple(row for row in BYTE_LEVEL_ROWS if row.steps == steps)
    if not rows:
        raise TokenizerError(
            f"{where}: pre_tokenizer {describe(steps)} is not one edgeq knows for byte-level merges. "
            f"Known are those of {', '.join(row.name for row in BYTE_LEVEL_ROWS)}"
        )
    return rows


def byte_level_row_named(name: str, *, where: str) -> ByteLevelRow:
    """The row for a value of `tokenizer.ggml.pre`."""
    for row in BYTE_LEVEL_ROWS:
        if name == row.name or name in row.aliases:
            return row
    known = ", ".join(n for row in BYTE_LEVEL_ROWS for n in (row.name, *row.aliases))
    raise TokenizerError(f"{where}: tokenizer.ggml.pre {name!r} is not a pre-tokenizer edgeq knows. Known: {known}")


def space_row(steps: tuple[Step, ...], *, where: str) -> SpaceRow:
    """The row with these steps; TokenizerError naming `where` when none has them."""
    for row in SPACE_ROWS:
        if row.steps == steps:
            return row
    raise TokenizerError(
        f"{where}: normalizer and pre_tokenizer {describe(steps)} are not ones edgeq knows for merges with byte fallback. "
        f"Known: {'; '.join(f'{row.name} = {describe(row.steps)}' for row in SPACE_ROWS)}"
    )


def describe(steps: Iterable[Step]) -> str:
    """Steps for a message: [digits, split by (?i:'s|...)]."""
    words = {"split": "split by {}", "prepend": "prepend {!r}", "replace": "replace {!r} by {!r}"}
    return "[" + ", ".join(words[step[0]].format(*step[1:]) if step[0] in words else " ".join(step) for step in steps) + "]"


def normalizer_steps(part: Mapping[str, Any] | None, *, where: str) -> tuple[Step, ...]:
    """Steps of a `normalizer`: ("NFC",), ("prepend", text), ("replace", from, to)."""
    steps: list[Step] = []
    for item in _flat(part, "normalizers"):
        match item:
            case {"type": "NFC"}:
                steps.append(("NFC",))
            case {"type": "Prepend", "prepend": str(text)}:
                steps.append(("prepend", text))
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                steps.append(("replace", old, new))
            case _:
                raise _unknown(where, "normalizer", item, "NFC, Prepend and Replace of a string")
    return tuple(steps)


def pre_tokenizer_steps(part: Mapping[str, Any] | None, *, where: str) -> tuple[Step, ...]:
    """Steps of a `pre_tokenizer`. The mapping of bytes to letters, which a byte-level one ends with, is ("byte level",)."""
    steps: list[Step] = []
    for item in _flat(part, "pretokenizers"):
        match item:
            case {"type": "ByteLevel", "add_prefix_space": False}:
                steps += [GPT2_STEP, ("byte level",)] if item.get("use_regex", True) else [("byte level",)]
            case {"type": "Digits", "individual_digits": True}:
                steps.append(DIGITS_STEP)
            # Either way the matches stay as pieces; all patterns we know match every character, so nothing is removed.
            case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False}:
                steps.append(("split", regex))
            case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Removed", "invert": True}:
                steps.append(("split", regex))
            case {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}:
                steps.append(("split at spaces",))
            case {"type": "Metaspace", "replacement": str(mark)} if mark == SPACE_MARK:
                steps.append(("metaspace", _prepend_scheme(item)))
            case _:
                known = (
                    "ByteLevel without add_prefix_space, Digits one by one, Split by a regex (Isolated), Split at ' ' (MergedWithPrevious) "
                    "and Metaspace with '▁'"
                )
                raise _unknown(where, "pre_tokenizer", item, known)
    return tuple(steps)


def metaspace_splits(part: Mapping[str, Any] | None) -> bool:
    """Whether a Metaspace step also cuts in front of every "▁" (the library's default)."""
    return any(item.get("type") == "Metaspace" and item.get("split", True) for item in _flat(part, "pretokenizers"))


def pre_tokenizer_json(row: ByteLevelRow, absent: str = "", *, as_published: bool = False) -> dict[str, Any]:
    """The row as a `pre_tokenizer` that cuts as llama.cpp does, or as the model's own files do.

    absent: letters (bytes, as byte-level merges spell them) that the vocabulary lacks. llama.cpp leaves them out after merging, so
    nothing merges across them; the library would leave them out before.
    """
    steps: list[dict[str, Any]] = []
    cuts = row.steps if as_published else row.llama_cpp or row.steps
    for step in cuts:
        match step:
            case ("digits",):
                steps.append({"type": "Digits", "individual_digits": True})
            case ("split", regex):
                steps.append({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False})
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": GPT2_STEP in cuts}
    steps.append(byte_level)
    if absent:
        code_points = "".join(rf"\x{{{ord(letter):04X}}}" for letter in absent)
        steps.append({"type": "Split", "pattern": {"Regex": f"[{code_points}]"}, "behavior": "Removed", "invert": False})
    return {"type": "Sequence", "pretokenizers": steps}


def normalizer_json(*, add_space_prefix: bool) -> dict[str, Any]:
    """Marking of spaces as llama.cpp does it, as a `normalizer`."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    prepend = {"type": "Prepend", "prepend": SPACE_MARK}
    return {"type": "Sequence", "normalizers": [prepend, replace] if add_space_prefix else [replace]}


def _prepend_scheme(item: Mapping[str, Any]) -> str:
    # Files older than prepend_scheme have add_prefix_space.
    return item.get("prepend_scheme") or ("always" if item.get("add_prefix_space", True) else "never")


def _flat(part: Mapping[str, Any] | None, children: str) -> Iterable[Mapping[str, Any]]:
    """The parts of a tree of Sequences in the order they run."""
    if part is None:
        return
    if part.get("type") == "Sequence":
        for child in part.get(children, ()):
            yield from _flat(child, children)
    else:
        yield part


def _unknown(where: str, name: str, item: Mapping[str, Any], known: str) -> TokenizerError:
    return TokenizerError(f"{where}: {name} step {dict(item)!r} is not one edgeq can carry to llama.cpp. Known: {known}")
