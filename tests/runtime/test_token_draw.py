"""Draws in numpy against llama.cpp's own sampler chain, from the same logits and seed."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from edgeq.runtime.likelihood import Floats
from edgeq.runtime.llama import library
from edgeq.runtime.token_draw import Twister, candidates, draw

SETTINGS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 300},
    {"top_k": 5000},
    {"top_p": 0.0},
    {"top_p": 0.6},
    {"top_p": 1.0},
    {"min_p": 0.0},
    {"min_p": 0.08},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.9},
    {"top_p": 0.8, "min_p": 0.05},
    {"top_k": 60, "top_p": 0.95, "min_p": 0.02},
]


def llama_draws(rows: Floats, *, temperature: float, seed: int, top_k: int | None, top_p: float | None, min_p: float | None) -> list[int]:
    c = library()
    chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
    for part in (
        *([c.llama_sampler_init_top_k(top_k)] if top_k is not None else []),
        *([c.llama_sampler_init_top_p(top_p, 1)] if top_p is not None else []),
        *([c.llama_sampler_init_min_p(min_p, 1)] if min_p is not None else []),
        c.llama_sampler_init_temp(temperature),
        c.llama_sampler_init_dist(seed),
    ):
        c.llama_sampler_chain_add(chain, part)
    drawn = []
    for row in rows:
        tokens = (c.llama_token_data * len(row))()
        for i, logit in enumerate(row):
            tokens[i].id, tokens[i].logit = i, float(logit)
        found = c.llama_token_data_array(data=tokens, size=len(row), selected=-1, sorted=False)
        c.llama_sampler_apply(chain, ctypes.byref(found))
        drawn.append(found.data[found.selected].id)
    c.llama_sampler_free(chain)
    return drawn


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_same_seed_draws_what_llama_cpp_draws(settings: dict[str, Any]) -> None:
    limits = {"top_k": None, "top_p": None, "min_p": None, **settings}
    rng = np.random.default_rng(3)
    for n_vocab, temperature in ((5, 0.7), (320, 1.0), (1500, 1.9)):
        rows = (rng.standard_normal((12, n_vocab)) * 2).astype(np.float32)
        seed = int(rng.integers(0, 2**32 - 1))
        twister, drawn = Twister(seed), []
        for row in rows:
            ids, kept = candidates(row, **limits)
            drawn.append(draw(ids, kept / np.float32(temperature), twister.uniform()))
        assert drawn == llama_draws(rows, temperature=temperature, seed=seed, **limits)


def test_draws_differ_by_seed_and_go_on() -> None:
    first, second = ([Twister(seed).uniform() for _ in range(1)] for seed in (1, 2))
    assert first != second
    twister = Twister(1)
    draws = [twister.uniform() for _ in range(200)]
    assert draws[0] == first[0] and len(set(draws)) == 200
    assert 0 <= min(draws) < 0.1 and 0.9 < max(draws) < 1
