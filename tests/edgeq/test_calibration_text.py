"""The text edgeq calibrates on when the user gives none: whole, varied wherever one looks, nothing said twice."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from importlib import resources

import pytest

PARTS = 16  # The text in as many equal parts: the density at which windows sample it.
COMMON = re.compile(r"\b(?:the|of|and|to|a|in|was|is)\b", re.IGNORECASE)


@pytest.fixture(scope="module")
def raw() -> bytes:
    return resources.files("edgeq").joinpath("data/calibration.txt").read_bytes()


@pytest.fixture(scope="module")
def lines(raw: bytes) -> list[str]:
    return raw.decode("utf-8").split("\n")


def is_prose(line: str) -> bool:
    """A paragraph of English: long, nearly all ASCII, with the words that no other language or code has so often."""
    if len(line.encode()) < 200 or sum(char < "\x80" for char in line) < 0.97 * len(line):
        return False
    return len(COMMON.findall(line)) > 0.12 * len(line.split())


def test_it_is_whole_clean_utf8(raw: bytes) -> None:
    text = raw.decode("utf-8")
    assert len(raw) >= 190_000
    assert text.startswith("The Harbour Lights of Vessøy\n\nVessøy is a small island")
    assert text.endswith("\n") and not text.endswith("\n\n")
    assert "\ufffd" not in text and "\n\n\n\n" not in text
    assert {char for char in text if unicodedata.category(char) == "Cc"} <= {"\n", "\t"}
    assert not re.search(r"[ \t]$", text, re.MULTILINE)


def test_no_paragraph_and_no_heading_comes_twice(lines: list[str]) -> None:
    counts = Counter(line for line in lines if len(line) > 40 or line.startswith("= "))
    assert [line for line, count in counts.items() if count > 1] == []


def test_no_markup_of_other_corpora(lines: list[str]) -> None:
    foreign = re.compile(r"@[-,.]@|<unk>|<eos>|= = |\[\[|\{\{|&[a-z]+;|%%%%")
    assert [line for line in lines if foreign.search(line)] == []


def test_most_of_it_is_english_prose(raw: bytes, lines: list[str]) -> None:
    share = sum(len(line.encode()) for line in lines if is_prose(line)) / len(raw)
    assert 0.6 < share < 0.8
    assert sum(line.startswith("= ") and line.endswith(" =") for line in lines) >= 80


def test_prose_is_spread_over_the_whole(raw: bytes, lines: list[str]) -> None:
    prose, offset = [0] * PARTS, 0
    for line in lines:
        size = len(line.encode()) + 1
        prose[min(offset * PARTS // len(raw), PARTS - 1)] += size * is_prose(line)
        offset += size
    assert min(prose) > 0.4 * len(raw) / PARTS


@pytest.mark.parametrize(
    ("script", "letters"),
    [
        ("CYRILLIC", 500),
        ("GREEK", 100),
        ("CJK", 500),
        ("HIRAGANA", 200),
        ("HANGUL", 100),
        ("ARABIC", 200),
        ("HEBREW", 50),
        ("DEVANAGARI", 100),
        ("BENGALI", 50),
        ("THAI", 50),
    ],
)
def test_other_scripts_are_in_it(raw: bytes, script: str, letters: int) -> None:
    assert sum(unicodedata.name(char, "").startswith(script) for char in raw.decode("utf-8") if char > "\x7f") >= letters


@pytest.mark.parametrize(
    "language", ["python", "c", "javascript", "typescript", "rust", "go", "java", "sql", "bash", "html", "diff", "json", "yaml"]
)
def test_code_is_in_it_with_its_fences_closed(lines: list[str], language: str) -> None:
    fences = [line for line in lines if line.startswith("```")]
    assert all(line == "```" for line in fences[1::2])
    assert f"```{language}" in fences[::2]


@pytest.mark.parametrize("sign", ["|---|", "\\begin{align}", "∎", "<|user|>", "INTERVIEWER:", "Q: ", "Subject: ", "Traceback", "$ git log"])
def test_tables_mathematics_dialogue_and_letters_are_in_it(lines: list[str], sign: str) -> None:
    assert any(sign in line for line in lines)
