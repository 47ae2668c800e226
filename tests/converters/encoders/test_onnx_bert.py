"""Encoders in ONNX files as torch writes them: recognised tensor by tensor, and what is refused."""

import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_encoders import hf_encoder, onnx_encoder

from edgeq.converters.encoders.hf_bert import open_hf_encoder
from edgeq.converters.encoders.onnx_bert import open_onnx_encoder
from edgeq.converters.encoders.onnx_file import read_onnx_file
from edgeq.converters.encoders.recognise import is_encoder, open_encoder
from edgeq.encoder_reference import EncoderReference
from edgeq.errors import SourceError, UnsupportedError

FAMILIES = ["bert", "roberta", "distilbert", "mpnet"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folders by family, each with onnx/model.onnx."""
    root = tmp_path_factory.mktemp("exported")
    folders = {name: hf_encoder(root / name, name, normalize=name != "roberta") for name in FAMILIES}
    for folder in folders.values():
        onnx_encoder(folder, folder / "onnx" / "model.onnx")
    return folders


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_found(name, exported):
    plain = open_hf_encoder(exported[name])
    found = open_onnx_encoder(exported[name] / "onnx" / "model.onnx")
    assert (found.spec, found.sentence, found.name) == (plain.spec, plain.sentence, plain.name)
    assert found.tensors.keys() == plain.tensors.keys()
    for key, tensor in plain.tensors.items():
        np.testing.assert_array_equal(found.tensors[key].decode(), tensor.decode(), err_msg=key)
        if tensor.n_rows > 7:
            np.testing.assert_array_equal(found.tensors[key].decode(3, 7), tensor.decode(3, 7), err_msg=key)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_reference_equals_the_graph(name, exported):
    path = exported[name] / "onnx" / "model.onnx"
    model, session = open_onnx_encoder(path), onnxruntime.InferenceSession(str(path))
    ids = [2, 17, 30, 5, 60, 3]
    tokens = np.array([ids])
    feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "token_type_ids": np.zeros_like(tokens)}
    hidden = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})[0][0]
    np.testing.assert_allclose(EncoderReference(model.spec, model.tensors).hidden([ids])[0], hidden, atol=1e-4)


def test_external_data(exported, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(exported["bert"], folder)
    path = onnx_encoder(exported["bert"], folder / "model.onnx", external=True)
    model = open_onnx_encoder(path)
    assert folder / "model.onnx_data" in model.files
    plain = open_hf_encoder(folder)
    for key, tensor in plain.tensors.items():
        np.testing.assert_array_equal(model.tensors[key].decode(), tensor.decode(), err_msg=key)
    data = folder / "model.onnx_data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(SourceError, match=r"model.onnx_data is cut short or not the one that model.onnx was written with"):
        open_onnx_encoder(path)
    data.unlink()
    with pytest.raises(SourceError, match=r"model.onnx_data is missing: model.onnx keeps .* there"):
        open_onnx_encoder(path)


def test_data_outside_the_folder_is_refused(exported, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(exported["bert"], folder)
    path = onnx_encoder(exported["bert"], folder / "model.onnx", external=True)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../m/model.onnx_data"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(SourceError, match=r"in '../m/model.onnx_data', which is no file of its folder"):
        open_onnx_encoder(path)


def test_gemm_and_transposed_weights(exported, tmp_path):
    """Other exporters keep matrices as they are, and turn them in the graph."""
    folder = tmp_path / "m"
    shutil.copytree(exported["bert"], folder)
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(path)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    turned = 0
    for node in list(model.graph.node):
        if node.op_type != "MatMul" or node.input[1] not in weights:
            continue
        tensor = weights[node.input[1]]
        array = np.ascontiguousarray(onnx.numpy_helper.to_array(tensor).T)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        made = onnx.helper.make_node("Transpose", [tensor.name], [f"{tensor.name}_T"], perm=[1, 0])
        model.graph.node.insert(0, made)
        node.input[1] = f"{tensor.name}_T"
        turned += 1
    assert turned == 12
    onnx.save(model, path)
    plain, found = open_hf_encoder(folder), open_onnx_encoder(path)
    for key, tensor in plain.tensors.items():
        np.testing.assert_array_equal(found.tensors[key].decode(), tensor.decode(), err_msg=key)


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm(transposed, tmp_path):
    from edgeq.converters.encoders.onnx_bert import _matrices

    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    node = onnx.helper.make_node("Gemm", ["x", "w", "a.b.bias"], ["y"], transB=transposed)
    tensors = [
        onnx.numpy_helper.from_array(weight, "w"),
        onnx.numpy_helper.from_array(np.zeros(2 + (not transposed), np.float32), "a.b.bias"),
    ]
    graph = onnx.helper.make_graph([node], "g", [], [], tensors)
    (tmp_path / "m.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    read = read_onnx_file(tmp_path / "m.onnx")
    found = _matrices(read, read.initializers)["a.b.weight"].open().decode()
    np.testing.assert_array_equal(found, weight if transposed else weight.T)


def test_weights_in_half_precision(exported, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(exported["bert"], folder)
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float16), tensor.name))
    onnx.save(model, path)
    found = open_onnx_encoder(path).tensors["layers.1.up.weight"]
    expected = open_hf_encoder(folder).tensors["layers.1.up.weight"].decode().astype(np.float16)
    assert found.grid.name == "F16"
    np.testing.assert_array_equal(found.decode(), expected)


def test_quantized_and_fused_files_are_refused(exported, tmp_path):
    from onnxruntime.quantization import quantize_dynamic

    source = exported["bert"] / "onnx" / "model.onnx"
    quantize_dynamic(source, tmp_path / "q.onnx")
    with pytest.raises(UnsupportedError, match=r"is quantized already \(.*DynamicQuantizeLinear, MatMulInteger\). Give the float model"):
        open_onnx_encoder(tmp_path / "q.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "f.onnx"), 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    with pytest.raises(UnsupportedError, match=r"was optimised for one runtime \(FusedMatMul\). Give it as it was exported"):
        open_onnx_encoder(tmp_path / "f.onnx")


def test_what_a_file_needs_beside_it(exported, tmp_path):
    path = tmp_path / "a" / "b" / "model.onnx"
    path.parent.mkdir(parents=True)
    shutil.copy(exported["bert"] / "onnx" / "model.onnx", path)
    with pytest.raises(SourceError, match=r"there is no config.json beside it or one folder above"):
        open_onnx_encoder(path)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(exported["bert"] / name, path.parent)
    assert open_onnx_encoder(path).sentence.assumed
    with pytest.raises(SourceError, match=r"does not exist"):
        open_onnx_encoder(tmp_path / "gone.onnx")


def test_a_tensor_that_is_not_found_is_named(exported, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(exported["bert"], folder)
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(path)
    for node in model.graph.node:
        node.input[:] = ["renamed" if name.endswith("layer.1.attention.self.key.bias") else name for name in node.input]
    for tensor in model.graph.initializer:
        if tensor.name.endswith("layer.1.attention.self.key.bias"):
            tensor.name = "renamed"
    onnx.save(model, path)
    with pytest.raises(SourceError, match=r"tensor encoder.layer.1.attention.self.key.weight is missing"):
        open_onnx_encoder(path)


def test_recognition(exported, tmp_path):
    assert is_encoder(exported["bert"])
    assert is_encoder(exported["bert"] / "onnx" / "model.onnx")
    assert not is_encoder(tmp_path)
    assert not is_encoder("demo")
    assert not is_encoder("org/name")
    assert open_encoder(exported["bert"]).graph is None
    assert open_encoder(exported["bert"] / "onnx" / "model.onnx").graph == exported["bert"] / "onnx" / "model.onnx"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cut_short_files_raise_our_error(exported, tmp_path_factory, data):
    whole = (exported["bert"] / "onnx" / "model.onnx").read_bytes()
    cut = data.draw(st.integers(0, len(whole) - 1))
    path = tmp_path_factory.mktemp("cut") / "model.onnx"
    path.write_bytes(whole[:cut])
    with pytest.raises(SourceError):
        read_onnx_file(path)


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=200))
def test_other_files_raise_our_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("other") / "model.onnx"
    path.write_bytes(content)
    with pytest.raises((SourceError, UnsupportedError)):
        open_onnx_encoder(path)


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    def saved(name, **changes):
        tensor = onnx.numpy_helper.from_array(np.zeros((2, 3), np.float32), "w")
        for key, value in changes.items():
            if key == "external":
                tensor.ClearField("raw_data")
                tensor.data_location = onnx.TensorProto.EXTERNAL
                for entry in value.items():
                    tensor.external_data.add(key=entry[0], value=entry[1])
            else:
                setattr(tensor, key, value)
        path = tmp_path / name
        path.write_bytes(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [tensor])).SerializeToString())
        return path

    (tmp_path / "data").write_bytes(bytes(24))
    external = {"location": "data"}
    assert read_onnx_file(saved("whole", external=external)).initializers["w"].open().decode().shape == (2, 3)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "graphless").write_bytes(onnx.ModelProto(producer_name="nobody").SerializeToString())
    (tmp_path / "key").write_bytes(b"\x3b")
    (tmp_path / "name").write_bytes(b"\x3a\x04\x0a\x02\x0a\x00".replace(b"\x0a\x00", b"\x22\x01"))
    for path, message in (
        (tmp_path / "empty", r"empty: cannot be read"),
        (tmp_path / "graphless", r"graphless is not an ONNX file: it holds no graph"),
        (tmp_path / "key", r"key is not an ONNX file: byte 1 starts no field that is known"),
        (tmp_path / "name", r"name is cut short: at byte 6 it promises 1 more bytes, it has 0"),
        (saved("short", raw_data=bytes(20)), r"gives 'w' 20 bytes, but shape \[2, 3\] in F32 needs 24"),
        (saved("nowhere", external={}), r"places 'w' in '', which is no file of its folder"),
        (saved("offset", external={**external, "offset": "x"}), r"which makes no sense"),
        (saved("behind", external={**external, "offset": "8"}), r"'w' takes 24 bytes at 8, the file has 24"),
    ):
        with pytest.raises(SourceError, match=message):
            read_onnx_file(path)


def test_types_that_are_not_floats_are_refused_where_they_are_used(exported, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(exported["bert"], folder)
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name.endswith("position_embeddings.weight"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    onnx.save(model, path)
    with pytest.raises(UnsupportedError, match=r"position_embeddings.weight is stored as F64; supported: F32, F16, BF16"):
        open_onnx_encoder(path)
