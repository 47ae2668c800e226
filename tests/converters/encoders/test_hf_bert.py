"""Encoders in Hugging Face layout: the reference against transformers, and what is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_encoders import N_VOCAB, NAMES, hf_encoder, hf_oracle, token_vectors

from edgeq.converters.encoders.hf_bert import is_encoder_folder, open_hf_encoder
from edgeq.encoder_reference import EncoderReference
from edgeq.errors import EdgeqError, SourceError, TokenizerError, UnsupportedError, UsageError

TEXTS = [[2, 17, 30, 5, 3], [2, 3], [2, *range(20, 80), 3][:68], [2, 40, 41, 42, 3], [2, 9, 1, 0, 1, 60, 3]]


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_equals_transformers(name, tmp_path):
    folder = hf_encoder(tmp_path / "m", name)
    model = open_hf_encoder(folder)
    reference = EncoderReference(model.spec, model.tensors, dtype=torch.float64)
    oracle = hf_oracle(folder).double()
    for ids, found in zip(TEXTS, reference.hidden(TEXTS), strict=True):
        torch.testing.assert_close(found, token_vectors(oracle, ids), rtol=0, atol=1e-6)  # norms of transformers' RoBERTa stay float32


def test_a_swapped_pair_of_tensors_would_show(tmp_path):
    folder = hf_encoder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    names = ("encoder.layer.0.attention.self.query.weight", "encoder.layer.0.attention.self.key.weight")
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
    oracle = hf_oracle(folder)
    save_file(tensors, folder / "model.safetensors")
    model = open_hf_encoder(folder)
    found = EncoderReference(model.spec, model.tensors).hidden(TEXTS[:1])[0]
    assert (found - token_vectors(oracle, TEXTS[0])).abs().max() > 0.01


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "mpnet"])
def test_checkpoints_with_a_head_have_a_prefix_and_more_tensors(name, tmp_path):
    prefix = {"bert": "bert.", "roberta": "roberta.", "distilbert": "distilbert.", "mpnet": "mpnet."}[name]
    folder = hf_encoder(tmp_path / "m", name, prefix=prefix)
    plain = open_hf_encoder(hf_encoder(tmp_path / "plain", name))
    tensors = load_file(folder / "model.safetensors")
    extra = {"cls.predictions.bias": np.zeros(N_VOCAB), "lm_head.dense.weight": np.zeros((3, 3)), "vocab_projector.bias": np.zeros(3)}
    extra |= {f"{prefix}embeddings.position_ids": np.zeros((1, 70)), f"{prefix}pooler.dense.bias": np.zeros(36)}
    save_file(tensors | {key: value.astype(np.float32) for key, value in extra.items()}, folder / "model.safetensors")
    model = open_hf_encoder(folder)
    assert model.tensors.keys() == plain.tensors.keys() == plain.spec.shapes().keys()
    for key, tensor in plain.tensors.items():
        np.testing.assert_array_equal(model.tensors[key].decode(), tensor.decode())


def test_norms_may_have_their_old_names(tmp_path):
    folder = hf_encoder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {key.replace(new, was): value for key, value in tensors.items() for new, was in old.items() if new in key}
    kept = {key: value for key, value in tensors.items() if "LayerNorm" not in key}
    before = open_hf_encoder(folder).tensors["layers.1.mlp_norm.bias"].decode()
    save_file(kept | renamed, folder / "model.safetensors")
    np.testing.assert_array_equal(open_hf_encoder(folder).tensors["layers.1.mlp_norm.bias"].decode(), before)


def test_recognition_reads_config_alone(tmp_path):
    assert is_encoder_folder(hf_encoder(tmp_path / "m"))
    (tmp_path / "m" / "model.safetensors").unlink()
    assert is_encoder_folder(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "llama"}')
    assert not is_encoder_folder(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("no json")
    assert not is_encoder_folder(tmp_path / "m")
    assert not is_encoder_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_act": "quick_gelu"}, UnsupportedError, "hidden_act is 'quick_gelu'; supported: gelu, "),
        ({"position_embedding_type": "relative_key"}, UnsupportedError, "position_embedding_type is 'relative_key'; supported: 'absolute'"),
        ({"is_decoder": True}, UnsupportedError, "is_decoder is True; supported: False"),
        ({"add_cross_attention": True}, UnsupportedError, "add_cross_attention is True"),
        ({"mystery": 7}, UnsupportedError, r"mystery \(value 7\) is a setting edgeq does not know"),
        (
            {"model_type": "electra"},
            UnsupportedError,
            "model_type 'electra' is not an encoder that is supported; supported: bert, roberta, ",
        ),
        (
            {"architectures": ["BertForSequenceClassification"]},
            UnsupportedError,
            "is not an embedding model; supported: bert without a head",
        ),
        ({"num_attention_heads": 5}, SourceError, "hidden size 36 does not divide into 5 heads"),
        ({"hidden_size": 0}, SourceError, "hidden_size is 0, expected a positive whole number"),
        ({"pad_token_id": -1}, SourceError, "pad_token_id is -1, expected a token id"),
        ({"pad_token_id": 999}, SourceError, "pad_token_id 999 leaves no positions of 70 or is outside the vocabulary"),
        ({"layer_norm_eps": None}, SourceError, "layer_norm_eps is missing"),
        ({"intermediate_size": 51}, SourceError, r"intermediate.dense.weight has shape \[50, 36\], but config.json asks for \[51, 36\]"),
        ({"num_hidden_layers": 3}, SourceError, "tensor encoder.layer.2.attention.self.query.weight is missing"),
        ({"num_hidden_layers": 1}, UnsupportedError, "has no place in a bert model of 1 layers"),
    ],
)
def test_configs_that_are_refused(change, error, message, tmp_path):
    folder = hf_encoder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(error, match=message):
        open_hf_encoder(folder)


def test_mpnet_with_other_buckets_is_refused(tmp_path):
    folder = hf_encoder(tmp_path / "m", "mpnet")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"relative_attention_num_buckets": 16}))
    with pytest.raises(UnsupportedError, match=r"relative_attention_num_buckets is 16; supported: 32"):
        open_hf_encoder(folder)


def test_a_folder_without_tokenizer_or_that_is_a_package(tmp_path):
    folder = hf_encoder(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer.json is missing. Save the model's fast tokenizer there"):
        open_hf_encoder(folder)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(SourceError, match=r"is an edgeq package, not a model to export"):
        open_hf_encoder(folder)


def test_texts_that_the_reference_refuses(tmp_path):
    model = open_hf_encoder(hf_encoder(tmp_path / "m", "roberta"))
    reference = EncoderReference(model.spec, model.tensors)
    assert model.spec.n_ctx == 68  # two of 70 positions stand for padding
    for ids, message in (([], "text 1 has 0 tokens; the model takes 1 to 68"), ([0] * 69, "text 1 has 69 tokens"), ([N_VOCAB], "outside")):
        with pytest.raises(UsageError, match=message):
            reference.hidden([[1], ids])


def test_damaged_weights_are_refused_when_they_are_rounded(tmp_path):
    from edgeq.converters.encoders.formats import EncoderFormat
    from edgeq.converters.encoders.rounding import rounded

    folder = hf_encoder(tmp_path / "m")
    tensors = {key: value.copy() for key, value in load_file(folder / "model.safetensors").items()}
    tensors["encoder.layer.1.output.dense.weight"][3, 4] = np.nan
    save_file(tensors, folder / "model.safetensors")
    model = open_hf_encoder(folder)
    with pytest.raises(EdgeqError, match=r"output.dense.weight: 1 values are NaN"):
        rounded(model, EncoderFormat("int8"))["layers.1.down.weight"].decode()
