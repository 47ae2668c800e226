"""docs/adapters.md says of every kind what the code does with it."""

from __future__ import annotations

import re
from pathlib import Path

from test_keep import EXACT, FULL

from edgeq.converters.adapters.kinds import KINDS, REFUSED

TEXT = (Path(__file__).parents[3] / "docs" / "adapters.md").read_text(encoding="utf-8")


def rows() -> dict[str, tuple[str, str]]:
    """kind -> (merge, keep)."""
    table = TEXT.split("| kind | merge | keep |")[1].split("\n\n")[0]
    found = {}
    for line in table.splitlines()[2:]:
        kinds, merge, keep = (cell.strip() for cell in line.strip("|").split("|"))
        for kind in re.sub(r"\(.*\)", "", kinds).split(","):
            found[kind.strip()] = merge, keep
    return found


def test_every_kind_has_a_row_that_is_true() -> None:
    found = rows()
    assert found.keys() == {*KINDS, *REFUSED, "DORA"}
    assert {kind for kind, (merge, _) in found.items() if merge.startswith("refused")} == set(REFUSED)
    names = {"rslora": "LORA"}
    for kind in EXACT:
        assert found[names.get(kind, kind.upper())][1].startswith("exact"), kind
    for kind in FULL:
        assert found[kind.upper()][1].startswith("approximate"), kind
