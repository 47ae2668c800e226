"""A report as Markdown: the same words and tables as the page, without the figures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from edgeq.runtime.report.document import Report, to_json
from edgeq.runtime.report.tables import Cell


def to_markdown(report: Report) -> str:
    content = to_json(report)
    parts = [f"# {_text(content['title'])}", _text(content["summary"])]
    for one in content["recommendations"]:
        parts.append(f"## {_text(one['heading'])}")
        if one["facts"]:
            parts.append(", ".join(f"{_text(fact['name'])} **{_cell(fact['cell'])}**" for fact in one["facts"]))
        if one["artifact"]:
            parts.append(f"Variant {one['variant']}, from {_text(one['artifact'])}")
        parts.append("\n".join(f"- {_text(reason)}" for reason in one["reasons"]))
    if content["limits"]:
        parts.append(f"Limits of {_text(content['limits']['origin'])}: {_limits(content['limits'])}.")
    if content["warnings"]:
        parts += ["## Warnings", "\n".join(f"- {_warning(one)}" for one in content["warnings"])]
    for table in content["tables"]:
        parts.append(f"## {_text(table['title'])}")
        if table["note"]:
            parts.append(_text(table["note"]))
        rows = [[f"{row['variant']}. {_text(row['label'])}", *map(_cell, row["cells"])] for row in table["rows"]]
        parts.append(_table(["variant", *map(_text, table["columns"])], rows))
    parts += ["## Artifacts", "\n".join(_artifact(v) for v in content["variants"])]
    for one in content["environments"]:
        whose = f" (variants {', '.join(map(str, one['variants']))})" if len(content["environments"]) > 1 else ""
        parts.append(f"## Environment{whose}")
        parts.append("\n".join(f"- {_text(name)}: {_text(value)}" for name, value in one["facts"].items()))
    parts += ["## Definitions", "\n".join(f"- **{_text(one['word'])}**: {_text(one['meaning'])}" for one in content["definitions"])]
    sources = ", ".join(f"{_text(source['name'])} (sha256 {source['sha256'][:16]})" for source in content["sources"])
    parts.append(f"Results: {sources}. Written by edgeq {content['edgeq']}.")
    return "\n\n".join(parts) + "\n"


def _text(text: object) -> str:
    """Text in which nothing is Markdown or HTML."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", flat)


def _cell(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return _text(cell)
    return _text(cell["shown"] + (f" [{cell['span']}]" if "span" in cell else ""))


def _limits(limits: Mapping[str, Any]) -> str:
    parts = []
    if limits["memory_bytes"]:
        parts.append(f"memory {limits['memory_bytes'] / 1e6:,.0f} MB")
    if limits["ttft_ms"]:
        parts.append(f"first token within {limits['ttft_ms']:,.0f} ms")
    if limits["decode_tok_s"]:
        parts.append(f"at least {limits['decode_tok_s']:,.4g} tok/s")
    return ", ".join(parts) or "none"


def _warning(one: Mapping[str, Any]) -> str:
    if one["kind"] == "slow":
        return _text(f"{one['text']} {one['reason'] or 'The reason is not known.'}")
    return _text(f"{one['text']} (variants {', '.join(map(str, one['variants']))})")


def _artifact(v: Mapping[str, Any]) -> str:
    digest = f", sha256 {v['sha256'][:16]}" if v["sha256"] else ""
    return f"{v['number']}. {_text(v['label'])}: {_text(v['artifact'])}{digest}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
