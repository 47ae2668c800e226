"""One tiny tokenizer per family, read once, with llama.cpp's view of it beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from tiny_tokenizers import Family, open_family


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Family]]:
    made: dict[str, Family] = {}

    def make(kind: str) -> Family:
        if kind not in made:
            made[kind] = open_family(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    yield make
    for one in made.values():
        one.llama.close()
