"""What sentence-transformers' files say, and what of it is refused."""

import json

import pytest
from tiny_encoders import hf_encoder

from edgeq.converters.encoders.hf_bert import open_hf_encoder
from edgeq.errors import SourceError, UnsupportedError


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_everything_that_is_said(tmp_path):
    folder = hf_encoder(
        tmp_path / "m", pooling=("mean_tokens", "cls_token"), dense=20, max_seq_length=33, prompts={"query": "ask: ", "document": ""}
    )
    rewrite(folder / "sentence_bert_config.json", do_lower_case=True)
    rewrite(folder / "config_sentence_transformers.json", default_prompt_name="query")
    sentence = open_hf_encoder(folder).sentence
    assert sentence.pooling == ("cls", "mean")  # sentence-transformers joins them in this order
    assert (sentence.n_out, sentence.dense, sentence.normalize, sentence.assumed) == (20, "tanh", True, False)
    assert (sentence.max_tokens, sentence.lowercase) == (33, True)
    assert (dict(sentence.prompts), sentence.default_prompt) == ({"query": "ask: ", "document": ""}, "query")


def test_files_are_carried_on(tmp_path):
    model = open_hf_encoder(hf_encoder(tmp_path / "m", dense=5, max_seq_length=20, prompts={}))
    assert model.beside.keys() == {
        "config.json", "tokenizer.json", "tokenizer_config.json", "modules.json", "1_Pooling/config.json", "2_Dense/config.json",
        "2_Dense/model.safetensors", "sentence_bert_config.json", "config_sentence_transformers.json",
    }  # fmt: skip
    assert set(model.beside.values()) < set(model.files)


def test_a_plain_model_pools_by_the_mean_and_says_that_it_is_assumed(tmp_path):
    sentence = open_hf_encoder(hf_encoder(tmp_path / "m", pooling=None)).sentence
    assert (sentence.pooling, sentence.normalize, sentence.assumed, sentence.max_tokens) == (("mean",), False, True, 70)


@pytest.mark.parametrize("stated", ["cls", ["mean", "max"]])
def test_newer_files_name_the_pooling(stated, tmp_path):
    folder = hf_encoder(tmp_path / "m")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"embedding_dimension": 36, "pooling_mode": stated}))
    assert set(open_hf_encoder(folder).sentence.pooling) == set([stated] if isinstance(stated, str) else stated)


def test_the_longest_text(tmp_path):
    folder = hf_encoder(tmp_path / "m", "roberta", max_seq_length=512)
    assert open_hf_encoder(folder).sentence.max_tokens == 68  # no positions for more
    (folder / "sentence_bert_config.json").unlink()
    rewrite(folder / "tokenizer_config.json", model_max_length=50)
    assert open_hf_encoder(folder).sentence.max_tokens == 50


@pytest.mark.parametrize(
    ("file", "changes", "error", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode_lasttoken": True}, UnsupportedError, "pooling 'pooling_mode_lasttoken' is not supported"),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, UnsupportedError, "supported: cls, max, mean, mean_sqrt_len"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, SourceError, "names no pooling"),
        ("1_Pooling/config.json", {"include_prompt": False}, UnsupportedError, "include_prompt is false"),
        ("1_Pooling/config.json", {"word_embedding_dimension": 384}, SourceError, "is 384, but config.json says hidden size 36"),
        ("2_Dense/config.json", {"in_features": 7}, SourceError, "in_features is 7, but pooling gives 36"),
        ("2_Dense/config.json", {"out_features": 7}, SourceError, r"linear.weight of shape \[7, 36\] is missing"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.modules.activation.GELU"}, UnsupportedError, "GELU' is not supported"),
        ("2_Dense/config.json", {"bias": False}, UnsupportedError, "a Dense step without a bias"),
        ("config_sentence_transformers.json", {"prompts": ["a"]}, SourceError, "prompts must be texts by name"),
        ("config_sentence_transformers.json", {"default_prompt_name": "x"}, SourceError, "default_prompt_name is 'x', which is not among"),
    ],
)
def test_files_that_are_refused(file, changes, error, message, tmp_path):
    folder = hf_encoder(tmp_path / "m", dense=5, prompts={"query": "q"})
    rewrite(folder / file, **changes)
    with pytest.raises(error, match=message):
        open_hf_encoder(folder)


@pytest.mark.parametrize(
    ("modules", "error", "message"),
    [
        ("{", SourceError, "modules.json: not valid JSON"),
        ("{}", SourceError, "modules.json: expected a list of steps"),
        ('[{"type": 3}]', SourceError, "a step has no type"),
        (
            '[{"type": "a.Transformer"}, {"type": "a.WeightedLayerPooling"}]',
            UnsupportedError,
            "the steps are Transformer, WeightedLayerPooling",
        ),
        ('[{"type": "a.Transformer"}, {"type": "a.Pooling", "path": "../x"}]', SourceError, "'../x' is not a folder of this model"),
        ('[{"type": "a.Transformer"}, {"type": "a.Pooling", "path": "gone"}]', SourceError, "gone/config.json is missing"),
    ],
)
def test_step_lists_that_are_refused(modules, error, message, tmp_path):
    folder = hf_encoder(tmp_path / "m")
    (folder / "modules.json").write_text(modules)
    with pytest.raises(error, match=message):
        open_hf_encoder(folder)
