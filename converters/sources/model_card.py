"""General facts from a model card: the YAML front matter of a Hugging Face README.md.

Only what a carrier can put into its `general.*` fields is read, and only in the plain forms that cards use for it: `key: value`,
`key: [a, b]`, or `key:` followed by `- a` lines. A card is written by hand, so a line in any other form is passed over.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_TEXTS = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
_LINE = re.compile(r"(?P<key>\w+):(?:\s+(?P<value>.*))?")


def card_metadata(path: Path) -> dict[str, Any]:
    """license, license.name, license.link (strings) and languages (a list), as far as stated; empty without a card."""
    try:
        card = _front_matter(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}
    metadata: dict[str, Any] = {ours: card[key][0] for key, ours in _TEXTS.items() if len(card.get(key, ())) == 1}
    if card.get("language"):
        metadata["languages"] = card["language"]
    return metadata


def _front_matter(text: str) -> dict[str, list[str]]:
    """Values by key, from the lines between the --- that opens the file and the next ---."""
    lines = [line.rstrip() for line in text.splitlines()]
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return {}
    card: dict[str, list[str]] = {}
    key = ""
    for line in lines[1 : lines.index("---", 1)]:
        match = _LINE.fullmatch(line)
        if match:
            key, value = match["key"], match["value"] or ""
            inner = value[1:-1].split(",") if value.startswith("[") and value.endswith("]") else [value]
            card[key] = [_plain(v) for v in inner if _plain(v)]
        elif line.lstrip().startswith("- ") and key:
            card[key].append(_plain(line.lstrip()[2:]))
    return card


def _plain(value: str) -> str:
    """Without quotes and without a comment; empty for YAML's other forms (blocks, objects, anchors)."""
    value = value.split(" #")[0].strip()
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
    return "" if value[:1] in ("|", ">", "{", "&", "*", "#") else value
