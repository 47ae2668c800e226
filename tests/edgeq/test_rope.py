"""Frequencies and attention factors against transformers, whose configs state them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from edgeq.attention import rope_angles, rotate
from edgeq.errors import UnsupportedError
from edgeq.rope import NEVER, RopeSpec, llama3_factors

HEAD_DIM = 24
# Frequencies of transformers are float32: one rounding of the power, one of each product.
FLOAT32 = 1e-6


def transformers_rope(n_tokens: int | None = None, *, theta: float = 10000.0, **values: Any) -> tuple[np.ndarray, float]:
    """Inverse frequencies and attention factor that transformers computes for a Llama of head_dim 24."""
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=HEAD_DIM,
        max_position_embeddings=4096,
        rope_parameters={"rope_theta": theta, **values},
    )
    if values["rope_type"] == "default":
        frequencies, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[values["rope_type"]](config, torch.device("cpu"), seq_len=n_tokens)
    return frequencies.numpy(), factor


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1e6])
def test_plain(theta: float) -> None:
    expected, factor = transformers_rope(theta=theta, rope_type="default")
    np.testing.assert_allclose(RopeSpec(dim=HEAD_DIM, base=theta).frequencies(77), expected, rtol=FLOAT32)
    assert factor == 1.0


def test_linear() -> None:
    expected, factor = transformers_rope(rope_type="linear", factor=8.0)
    np.testing.assert_allclose(RopeSpec(dim=HEAD_DIM, base=10000.0, kind="linear", factor=8.0).frequencies(77), expected, rtol=FLOAT32)
    assert factor == 1.0


@pytest.mark.parametrize("original", [64, 512, 8192])
def test_llama3(original: int) -> None:
    """8192 tokens is Llama 3.1's own; 64 and 512 put other pairs into the smooth middle."""
    values = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    expected, factor = transformers_rope(rope_type="llama3", original_max_position_embeddings=original, **values)
    factors = llama3_factors(dim=HEAD_DIM, base=10000.0, original_n_ctx=original, **values)
    np.testing.assert_allclose(
        RopeSpec(dim=HEAD_DIM, base=10000.0, kind="factors", factors=factors).frequencies(77), expected, rtol=FLOAT32
    )
    assert factor == 1.0
    assert min(factors) == 1.0 < max(factors)
    assert original == 8192 or any(1.0 < f < 8.0 for f in factors)


@pytest.mark.parametrize(("original", "betas"), [(2048, (32.0, 1.0)), (64, (32.0, 1.0)), (32768, (32.0, 1.0)), (4096, (16.0, 2.0))])
def test_yarn(original: int, betas: tuple[float, float]) -> None:
    expected, factor = transformers_rope(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=original, beta_fast=betas[0], beta_slow=betas[1]
    )
    rope = RopeSpec(
        dim=HEAD_DIM,
        base=10000.0,
        kind="yarn",
        factor=4.0,
        original_n_ctx=original,
        beta_fast=betas[0],
        beta_slow=betas[1],
        attn_factor=0.1 * math.log(4.0) + 1,
    )
    np.testing.assert_allclose(rope.frequencies(77), expected, rtol=FLOAT32)
    assert rope.attn_factor == pytest.approx(factor)
    assert not np.allclose(expected, RopeSpec(dim=HEAD_DIM, base=10000.0).frequencies(77))


@pytest.mark.parametrize("n_tokens", [64, 65])
def test_longrope_changes_factors_beyond_the_original_context(n_tokens: int) -> None:
    short, long = [1.0 + 0.05 * i for i in range(9)], [1.0 + 0.5 * i for i in range(9)]
    config = Phi3Config(
        hidden_size=96,
        num_attention_heads=4,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": short,
            "long_factor": long,
        },
    )
    expected, factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=n_tokens)
    rope = RopeSpec(
        dim=18,
        base=10000.0,
        kind="longrope",
        short_factors=tuple(short),
        long_factors=tuple(long),
        original_n_ctx=64,
        attn_factor=math.sqrt(1 + math.log(256 / 64) / math.log(64)),
    )
    np.testing.assert_allclose(rope.frequencies(n_tokens), expected.numpy(), rtol=FLOAT32)
    assert rope.attn_factor == pytest.approx(factor)
    assert not np.array_equal(rope.frequencies(64), rope.frequencies(65))


def test_rotation_equals_transformers() -> None:
    rope = RopeSpec(dim=HEAD_DIM, base=10000.0)
    x = torch.randn(2, 3, 50, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    angle = torch.outer(torch.arange(50).float(), torch.from_numpy(rope.frequencies(50)).float()).repeat(1, 2)[None]
    expected, _ = apply_rotary_pos_emb(x, x, angle.cos(), angle.sin())
    rotated = rotate(x, rope_angles(rope, 50, n_ctx=50, device=torch.device("cpu"), dtype=torch.float32))
    torch.testing.assert_close(rotated, expected, atol=2e-5, rtol=0)  # their angles are float32: up to 50 * 2^-24 rad off, times |x| < 5
    assert not torch.allclose(rotated, x)


def test_partial_rotation_leaves_the_rest() -> None:
    x = torch.randn(1, 1, 7, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    rotated = rotate(x, rope_angles(RopeSpec(dim=10, base=100.0), 7, n_ctx=7, device=torch.device("cpu"), dtype=torch.float32))
    assert torch.equal(rotated[..., 10:], x[..., 10:])
    assert (rotated[..., 1:, :10] != x[..., 1:, :10]).all()
    torch.testing.assert_close(rotated.square().sum(-1), x.square().sum(-1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dim": 7}, "rope dimension 7 is not a positive even number"),
        ({"dim": 0}, "rope dimension 0 is not a positive even number"),
        ({"base": 0.0}, "rope base 0.0 is not a positive number"),
        ({"base": math.inf}, "rope base inf is not a positive number"),
        ({"base": math.nan}, "rope base nan is not a positive number"),
        ({"kind": "factors", "factors": (1.0, 2.0)}, "rope factors has 2 values, expected 4 (half of the rope dimension)"),
        (
            {"kind": "longrope", "short_factors": (1.0,) * 4, "long_factors": (1.0,)},
            "rope long_factors has 1 values, expected 4 (half of the rope dimension)",
        ),
        ({"kind": "factors"}, "rope factors has 0 values, expected 4 (half of the rope dimension)"),
        ({"kind": "factors", "factors": (1.0, 0.0, 1.0, 1.0)}, "rope factors 0.0 is not a positive number"),
        (
            {"kind": "longrope", "short_factors": (1.0,) * 4, "long_factors": (math.inf,) * 4},
            "rope long_factors inf is not a positive number",
        ),
        ({"kind": "linear", "factor": -2.0}, "rope factor -2.0 is not a positive number"),
        ({"attn_factor": math.nan}, "rope attn_factor nan is not a positive number"),
        ({"kind": "yarn", "factor": 4.0}, "yarn rope scaling needs the original context length"),
        (
            {"kind": "longrope", "short_factors": (1.0,) * 4, "long_factors": (2.0,) * 4},
            "longrope rope scaling needs the original context length",
        ),
    ],
)
def test_what_is_no_rotation_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        RopeSpec(**{"dim": 8, "base": 10000.0, **values})
    assert str(caught.value) == message


ROPES = [
    RopeSpec(dim=8, base=1e4, attn_factor=1.5),
    RopeSpec(dim=8, base=1e4, kind="linear", factor=4.0),
    RopeSpec(dim=8, base=1e4, kind="factors", factors=(1.0, 2.0, 3.0, 8.0)),
    RopeSpec(dim=8, base=1e4, kind="yarn", factor=4.0, original_n_ctx=64, attn_factor=1.1386),
    RopeSpec(dim=8, base=1e4, kind="longrope", short_factors=(1.0, 2.0, 3.0, 4.0), long_factors=(4.0, 5.0, 6.0, 7.0), original_n_ctx=64),
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.kind)
@pytest.mark.parametrize("n_ctx", [64, 65])
def test_pairs_keep_their_frequencies_wherever_they_are_taken(rope: RopeSpec, n_ctx: int) -> None:
    for pairs in ((3, 1, 0, 2), (2, 0), (1,), (0, 1, 2, 3), (0, 1)):
        taken = rope.take(pairs)
        assert (taken.dim, taken.attn_factor) == (2 * len(pairs), rope.attn_factor)
        np.testing.assert_allclose(taken.frequencies(n_ctx), rope.frequencies(n_ctx)[list(pairs)], rtol=1e-12)
    assert rope.take(range(4)).kind == ("factors" if rope.kind == "yarn" else rope.kind)


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.kind)
def test_a_wider_rotation_adds_pairs_that_stand_still(rope: RopeSpec) -> None:
    wide = rope.widened(14)
    assert (wide.dim, wide.attn_factor) == (14, rope.attn_factor)
    for n_ctx in (64, 65):
        np.testing.assert_allclose(wide.frequencies(n_ctx)[:4], rope.frequencies(n_ctx), rtol=1e-12)
        assert wide.frequencies(n_ctx)[4:].max() <= 1 / NEVER
        first = wide.take((6, 0))  # a divisor of float32, however far it moves
        assert first.frequencies(n_ctx)[0] <= 1 / NEVER
        assert max(*first.factors, *first.long_factors, 0) < 3.4e38
    assert rope.widened(8) is rope


def test_pairs_that_are_not_there_are_refused() -> None:
    for pairs in ((4,), (-1,), (0, 0)):
        with pytest.raises(UnsupportedError, match=r"the rope has pairs 0 to 3, each at most once; got \["):
            ROPES[0].take(pairs)
    with pytest.raises(UnsupportedError, match="heads of 9 dimensions do not divide into pairs"):
        ROPES[0].widened(9)
