"""Sizes of encoders, what a manifest carries of them, and buckets of distances."""

import json

import pytest
import torch
from tiny_encoders import random_encoder

from edgeq.encoder_spec import EncoderSpec, SentenceSpec, relative_buckets
from edgeq.errors import PackageError, ShapeError

SIZES = {"n_layers": 1, "n_embd": 12, "n_heads": 3, "n_ff": 20, "n_vocab": 30, "n_positions": 10, "n_types": 2}


def spec(**changes):
    values = {"family": "bert", "norm_eps": 1e-12, "activation": "gelu", "padding_id": 1, "counts_positions": False}
    return EncoderSpec(**{**values, **SIZES, **changes})


def test_sizes():
    assert (spec().head_dim, spec().n_ctx, spec(counts_positions=True).n_ctx) == (4, 10, 8)
    assert len(spec(n_layers=2).shapes()) == 5 + 2 * 16
    assert "types.weight" not in spec(n_types=0).shapes()
    assert spec(n_buckets=32).shapes()["relative.weight"] == (32, 3)
    with pytest.raises(ShapeError, match=r"hidden size 12 does not divide into 5 heads"):
        spec(n_heads=5)
    with pytest.raises(ShapeError, match=r"every size of an encoder must be positive"):
        spec(n_ff=0)


def test_sentences_in_a_manifest():
    made = SentenceSpec(
        pooling=("cls", "mean"), normalize=True, max_tokens=9, n_out=24, dense="tanh", prompts={"q": "ask: "}, default_prompt="q"
    )
    assert SentenceSpec.from_json(json.loads(json.dumps(made.to_json()))) == made
    document = made.to_json()
    for broken, message in (
        ({**document, "new": 1}, "lacks or misspells"),
        ({k: v for k, v in document.items() if k != "pooling"}, "lacks or misspells 'pooling'"),
        ({**document, "pooling": ["last"]}, "a value that is not known: last"),
        ({**document, "max_tokens": 0}, "a value that is not known: max_tokens"),
    ):
        with pytest.raises(PackageError, match=message):
            SentenceSpec.from_json(broken)


def test_buckets_are_those_of_mpnet():
    places = torch.arange(600)
    theirs = type(random_encoder("mpnet").encoder).relative_position_bucket(places[None, :] - places[:, None], num_buckets=32)
    assert torch.equal(torch.from_numpy(relative_buckets(600, 32)), theirs)
