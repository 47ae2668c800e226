"""Facts from the front matter of a README, against a YAML library where the card is well-formed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from edgeq.converters.sources.model_card import card_metadata

CARDS: list[tuple[str, dict[str, Any]]] = [
    ("license: apache-2.0\nlanguage:\n- en\n- fr", {"license": "apache-2.0", "languages": ["en", "fr"]}),
    ("language: en\nlicense: 'mit'", {"license": "mit", "languages": ["en"]}),
    ('license: other\nlicense_name: "qwen-research"\nlicense_link: https://x.org/LICENSE', {"license": "other"}),
    ("library_name: transformers\nlanguage: [en, 'zh']\ntags:\n  - chat\n", {"languages": ["en", "zh"]}),
    ("license: gemma # see below\nextra_gated_prompt: >-\n  To access\n  license: no\n", {"license": "gemma"}),
    ("base_model:\n- a/b\npipeline_tag: text-generation", {}),
    ("", {}),
]


@pytest.mark.parametrize(("front", "some"), CARDS)
def test_cards(tmp_path: Path, front: str, some: dict[str, Any]) -> None:
    card = tmp_path / "README.md"
    card.write_text(f"---\n{front}\n---\n# A model\nlicense: none of this counts\n", encoding="utf-8")
    found = card_metadata(card)
    assert some.items() <= found.items()
    truth = yaml.safe_load(front) or {}
    languages = truth.get("language", [])
    expected = {ours: truth[key] for key, ours in (("license", "license"), ("license_name", "license.name")) if key in truth}
    assert {key: value for key, value in found.items() if key in ("license", "license.name")} == expected
    assert found.get("languages", []) == ([languages] if isinstance(languages, str) else languages)


def test_license_link(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_link: https://x.org/LICENSE#a\n---\n")
    assert card_metadata(tmp_path / "README.md") == {"license": "other", "license.link": "https://x.org/LICENSE#a"}


@pytest.mark.parametrize(
    "text", ["# no front matter\nlicense: mit\n", "---\nlicense: mit\nnever closed", "", "---\nlicense: |\n  mit\n---\n"]
)
def test_cards_that_state_nothing_plainly(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert card_metadata(tmp_path / "README.md") == {}


def test_no_card(tmp_path: Path) -> None:
    assert card_metadata(tmp_path / "README.md") == {}
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert card_metadata(tmp_path / "README.md") == {}
