"""edgeq_adapter.json: what an adapter's own files leave out, written by whoever knows.

    {"format": 1, "kind": "LOLDU", "alpha": 16}

    kind          further keys
    LOLDU         alpha
    MATRYOSHKA    scaling: "none", "linear" or "sqrt"
    DYLORA        alpha (for any state dict of plain LoRA factors too)
    LORAM         indices: folder of the index lists below this one, "." by default;
                  or removed: by layer, {"3": {"channels": [...], "kv_heads": [...]}}
    L4Q           bits, alpha
    EFFICIENTDM   bits, alpha
    LR-QAT        bits, alpha; downcast of W0 / initial step: "float32" (default), "bfloat16" or "fixed8"

alpha is the `lora_alpha` of training: strength is alpha over the rank. Two keys may stand in any of them, and without a kind: base, the
name of the model it was trained on, and base_fingerprint (`edgeq.base_fingerprint`).
"""

from __future__ import annotations

from pathlib import Path

from edgeq.converters.sources.json_file import Section, read_json_object
from edgeq.errors import SourceError, UnsupportedError

OPTIONS, VERSION = "edgeq_adapter.json", 1
_EXAMPLES = {
    "LOLDU": '"alpha": 16',
    "MATRYOSHKA": '"scaling": "none" | "linear" | "sqrt"',
    "DYLORA": '"alpha": 16',
    "L4Q": '"bits": 4, "alpha": 16',
    "EFFICIENTDM": '"bits": 4, "alpha": 16',
    "LR-QAT": '"bits": 4, "alpha": 16, "downcast": "float32"',
}
KINDS = (*_EXAMPLES, "LORAM")


def read_options(folder: Path) -> Section | None:
    """The file in this folder; None if there is none. Raises SourceError for what is no such file, UnsupportedError for another version."""
    path = folder / OPTIONS
    if not path.is_file():
        return None
    options = Section(read_json_object(path), path)
    version = options.get("format")
    if version != VERSION:
        raise UnsupportedError(f"{options.where('format')} is {version!r}, this edgeq reads {VERSION}")
    kind = options.get("kind")
    if kind not in (None, *KINDS):
        raise SourceError(f"{options.where('kind')} is {kind!r}, expected one of {', '.join(KINDS)}")
    return options


def text(options: Section | None, key: str) -> str | None:
    value = None if options is None else options.get(key)
    if options is not None and value is not None and not isinstance(value, str):
        raise SourceError(f"{options.where(key)} is {value!r}, expected text")
    return value


def needed(options: Section | None, kind: str, path: Path) -> Section:
    """The options of an adapter that cannot be read without. Raises SourceError that says how to give them."""
    if options is None or options.get("kind") != kind:
        raise SourceError(f"{path} {unsaid(kind)}")
    return options


def unsaid(*kinds: str) -> str:
    """What a file leaves out if it is of one of these kinds, and how to give it: the end of a sentence about the file."""
    files = " or ".join(f'{{"format": {VERSION}, "kind": "{kind}", {_EXAMPLES[kind]}}}' for kind in kinds)
    what = f"is a {kinds[0]} adapter" if len(kinds) == 1 else f"may be one of {', '.join(kinds)}"
    return f"{what} and does not say all that is needed. Put {OPTIONS} beside it: {files}, with the values it was trained with."


def refuse_unused(options: Section | None) -> None:
    """Raise SourceError for keys that nobody has asked for."""
    unused = [] if options is None else options.unused()
    if options is not None and unused:
        kind = options.get("kind")
        raise SourceError(f"{options.where(unused[0])} means nothing {'without a kind' if kind is None else f'for {kind}'}. Remove it.")
