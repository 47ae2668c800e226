"""Graphs of encoders in ONNX Runtime against transformers: every family, pooling, padding, and every format."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_encoders import NAMES, hf_encoder, hf_oracle, token_vectors

from edgeq.converters.encoders.formats import FORMATS, EncoderFormat, parse_format
from edgeq.converters.encoders.graph import encoder
from edgeq.converters.encoders.hf_bert import open_hf_encoder
from edgeq.converters.encoders.rounding import folded, rounded
from edgeq.converters.onnx.carrier import predicted_bytes, write_onnx
from edgeq.encoder_reference import EncoderReference
from edgeq.errors import PlanError, UsageError

TEXTS = [[2, 17, 30, 5, 3], [2, 3], [2, *range(20, 80), 3], [2, 40, 41, 42, 8, 9, 3]]


def written(folder: Path, out: Path, name: str = "fp32", code_range: int = 127):
    """A session on the folder's model in a format, and the tensors that it holds."""
    model, form = folded(open_hf_encoder(folder)), EncoderFormat(name, code_range)
    tensors = rounded(model, form)
    graph = encoder(model.spec, model.sentence, tensors, float_type=form.float_type)
    out.mkdir()
    files = write_onnx(out, graph)
    assert sum(file.nbytes for file in files) == predicted_bytes(graph)
    onnx.checker.check_model(str(out / "model.onnx"))
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(str(out / "model.onnx"), options), model, tensors


def run(session, texts, padding=0):
    """Outputs of texts in one batch: (n_texts, width, n_embd) and (n_texts, n_out)."""
    width = max(map(len, texts))
    ids, mask = np.full((len(texts), width), padding), np.zeros((len(texts), width), dtype=np.int64)
    for row, one in enumerate(texts):
        ids[row, : len(one)], mask[row, : len(one)] = one, 1
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})


@pytest.mark.parametrize("name", NAMES)
def test_every_family_equals_transformers_in_a_padded_batch(name, tmp_path):
    folder = hf_encoder(tmp_path / "m", name)
    session, model, _ = written(folder, tmp_path / "o")
    padding = model.spec.padding_id
    assert session.get_outputs()[0].name == "last_hidden_state" and session.get_outputs()[1].name == "sentence_embedding"
    oracle = hf_oracle(folder)
    hidden, pooled = run(session, TEXTS, padding)
    for row, ids in enumerate(TEXTS):
        expected = token_vectors(oracle, ids).numpy()
        np.testing.assert_allclose(hidden[row, : len(ids)], expected, atol=1e-4)
        mean = expected.mean(0)
        np.testing.assert_allclose(pooled[row], mean / np.linalg.norm(mean), atol=1e-5)
        alone = run(session, [ids], padding)
        np.testing.assert_allclose(alone[0][0], hidden[row, : len(ids)], atol=1e-5)
        np.testing.assert_allclose(alone[1][0], pooled[row], atol=1e-6)


def test_segments_count(tmp_path):
    folder = hf_encoder(tmp_path / "m")
    session, *_ = written(folder, tmp_path / "o")
    ids, types = np.array([[2, 17, 30, 5, 3]]), np.array([[0, 0, 0, 1, 1]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": types}
    with torch.no_grad():
        expected = hf_oracle(folder)(input_ids=torch.tensor(ids), token_type_ids=torch.tensor(types)).last_hidden_state.numpy()
    np.testing.assert_allclose(session.run(["last_hidden_state"], feeds)[0], expected, atol=1e-4)
    assert np.abs(run(session, [[2, 17, 30, 5, 3]])[0] - expected).max() > 0.01


def test_a_single_kind_of_segment_is_no_input(tmp_path):
    session, *_ = written(hf_encoder(tmp_path / "m", "roberta"), tmp_path / "o")
    assert [value.name for value in session.get_inputs()] == ["input_ids", "attention_mask"]


# as sentence-transformers computes them, from the vectors of a text without padding
POOLINGS = {
    "mean_tokens": lambda rows: rows.mean(0),
    "cls_token": lambda rows: rows[0],
    "max_tokens": lambda rows: rows.max(0),
    "mean_sqrt_len_tokens": lambda rows: rows.sum(0) / np.sqrt(len(rows)),
}


@pytest.mark.parametrize("flag", POOLINGS)
@pytest.mark.parametrize("normalize", [False, True])
def test_every_pooling(flag, normalize, tmp_path):
    folder = hf_encoder(tmp_path / "m", pooling=(flag,), normalize=normalize)
    session, model, tensors = written(folder, tmp_path / "o")
    oracle = hf_oracle(folder)
    expected = np.stack([POOLINGS[flag](token_vectors(oracle, ids).numpy()) for ids in TEXTS])
    if normalize:
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(run(session, TEXTS)[1], expected, atol=1e-4)
    reference = EncoderReference(model.spec, tensors).embeddings(TEXTS, model.sentence)
    np.testing.assert_allclose(reference, expected, atol=1e-5)


def test_poolings_joined_and_a_dense_layer(tmp_path):
    flags = ("max_tokens", "cls_token")
    folder = hf_encoder(tmp_path / "m", pooling=flags, normalize=True, dense=7)
    session, model, _ = written(folder, tmp_path / "o", "int8")
    from safetensors.numpy import load_file

    hidden, pooled = run(session, TEXTS)
    weights = load_file(folder / "2_Dense" / "model.safetensors")
    for row, ids in enumerate(TEXTS):
        joined = np.concatenate([POOLINGS["cls_token"](hidden[row]), POOLINGS["max_tokens"](hidden[row, : len(ids)])])
        made = np.tanh(weights["linear.weight"] @ joined + weights["linear.bias"])
        np.testing.assert_allclose(pooled[row], made / np.linalg.norm(made), atol=1e-5)
    plain = EncoderReference(model.spec, model.tensors).embeddings(TEXTS, model.sentence)
    assert plain.shape == (4, 7)
    assert (pooled * plain).sum(1).min() > 0.98


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet"])
def test_formats_hold_what_their_weights_say(name, family, tmp_path):
    """Each graph computes the reference on its own rounded weights, but for rounding activations, and batches change nothing."""
    folder = hf_encoder(tmp_path / "m", family)
    session, model, tensors = written(folder, tmp_path / "o", name)
    padding = model.spec.padding_id
    pooled = run(session, TEXTS, padding)[1]
    assert pooled.dtype == np.float32
    own = EncoderReference(model.spec, tensors).embeddings(TEXTS, model.sentence)
    least = {"fp32": 1 - 1e-6, "fp16": 1 - 1e-5, "int8": 0.999}.get(name, 0.9995)
    assert (pooled * own).sum(1).min() > least
    for row, ids in enumerate(TEXTS):
        alone = run(session, [ids], padding)[1][0]
        np.testing.assert_allclose(alone, pooled[row], atol=1e-3 if name == "fp16" else 1e-5)
    source = EncoderReference(model.spec, model.tensors).embeddings(TEXTS, model.sentence)
    lost = 1 - (pooled * source).sum(1).min()
    assert lost < {"fp32": 1e-6, "fp16": 1e-5, "Q8_0": 2e-3, "int8": 5e-3, "int4": 0.1}[name]
    assert name in ("fp32", "fp16") or lost > 1e-5  # it did round


def test_narrow_codes_lose_more_and_stay_in_range(tmp_path):
    folder = hf_encoder(tmp_path / "m")
    lost = []
    for code_range in (127, 63):
        session, model, _ = written(folder, tmp_path / f"o{code_range}", "int8", code_range)
        source = EncoderReference(model.spec, model.tensors).embeddings(TEXTS, model.sentence)
        lost.append(1 - (run(session, TEXTS)[1] * source).sum(1).mean())
        codes = onnx.load(tmp_path / f"o{code_range}" / "model.onnx")
        arrays = [onnx.numpy_helper.to_array(t) for t in codes.graph.initializer if t.name.endswith("weight_quantized")]
        assert len(arrays) == 12
        assert {int(np.abs(array.astype(int)).max()) for array in arrays} == {code_range}
    assert lost[0] < lost[1]


def test_names_say_where(tmp_path):
    written(hf_encoder(tmp_path / "m"), tmp_path / "o")
    graph = onnx.load(tmp_path / "o" / "model.onnx").graph
    names = {node.name for node in graph.node}
    assert "/encoder/layer.1/attention/self/query/MatMul" in names
    assert "/encoder/layer.0/attention/self/MultiHeadAttention" in names
    assert "/encoder/layer.1/output/LayerNorm/SkipLayerNormalization" in names
    assert "/encoder/layer.0/intermediate/dense/BiasGelu" in names
    weights = {tensor.name for tensor in graph.initializer}
    assert {"encoder.layer.1.attention.self.query.MatMul.weight", "embeddings.word_embeddings.weight"} < weights


@pytest.mark.parametrize(("name", "op"), [("bert", "BiasGelu"), ("bert-tanh", "FastGelu"), ("bert-relu", "Relu")])
def test_the_activation_is_the_sources(name, op, tmp_path):
    written(hf_encoder(tmp_path / "m", name), tmp_path / "o")
    ops = {node.op_type for node in onnx.load(tmp_path / "o" / "model.onnx").graph.node}
    assert ops & {"BiasGelu", "FastGelu", "Relu", "Gelu"} == {op}


def test_weights_beyond_half_precision_are_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = hf_encoder(tmp_path / "m")
    tensors = {key: value.copy() for key, value in load_file(folder / "model.safetensors").items()}
    tensors["encoder.layer.0.output.dense.weight"][0, 0] = 1e6
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(PlanError, match="1e\\+06 is beyond the largest F16 number"):
        written(folder, tmp_path / "o", "fp16")


def test_names_of_formats():
    assert [parse_format(name) for name in ("INT8", "F16", "q8_0", "Q4_0", "fp32")] == ["int8", "fp16", "Q8_0", "int4", "fp32"]
    with pytest.raises(
        UsageError, match="--quant Q4_K_M is not a format for encoders; choose one of fp32, fp16, Q8_0, int8, int4, or auto"
    ):
        parse_format("Q4_K_M")
