"""Graphs that the installed ONNX Runtime cannot run are refused by name, before it sees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_folders import copy_of, edit_graph, write_tiny_onnx

from edgeq.errors import RuntimeFailure, UnsupportedError
from edgeq.runtime import onnx_model
from edgeq.runtime.onnx_context import OnnxContext
from edgeq.runtime.onnx_facts import facts_of
from edgeq.runtime.onnx_file import read_onnx
from edgeq.runtime.onnx_kernels import CPU, CUDA, check_kernels
from edgeq.runtime.onnx_model import OnnxModel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx-kernels") / "tiny"
    write_tiny_onnx(folder)
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return copy_of(source, tmp_path / "model")


def attention(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda proto: change(next(node for node in proto.graph.node if node.op_type == "GroupQueryAttention"))


def set_attribute(node: Any, name: str, value: int) -> None:
    next(attribute for attribute in node.attribute if attribute.name == name).i = value


def resize(*sizes: int) -> Callable[[Any], None]:
    """Head sizes of the keys and values of layer 0, as the graph's inputs say."""

    def change(proto: Any) -> None:
        for kind, size in zip(("key", "value"), sizes, strict=True):
            value = next(value for value in proto.graph.input if value.name == f"past_key_values.0.{kind}")
            value.type.tensor_type.shape.dim[3].dim_value = size

    return change


def set_opset(proto: Any, version: int) -> None:
    proto.opset_import[0].version = version


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: set_opset(p, 99), r"is written for opset 99 \(IR version 10\), which is too new for the installed onnxruntime \d"),
        (lambda p: setattr(p, "ir_version", 99), r"opset 23 \(IR version 99\), which is too new .* Upgrade it: pip install -U onnxruntime"),
        (
            attention(lambda node: setattr(node, "op_type", "GroupQueryAttentionOfTomorrow")),
            r"has no operator GroupQueryAttentionOfTomorrow of com\.microsoft 1 \(node /model/layers\.0/attn/GroupQueryAttention\)",
        ),
        (resize(40, 40), r"GroupQueryAttention has heads of 40; GroupQueryAttention takes multiples of 16 for heads that it rotates"),
        (resize(32, 24), r"has keys of 32 and values of 24 numbers; GroupQueryAttention wants both alike"),
        (
            attention(lambda node: set_attribute(node, "num_heads", 3)),
            r"has 3 heads and 2 KV heads, and a cache of 2\. The graph con",
        ),
        (attention(lambda node: set_attribute(node, "kv_num_heads", 4)), r"has 4 heads and 4 KV heads, and a cache of 2"),
    ],
)
def test_what_the_runtime_has_nothing_for(folder: Path, change: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        OnnxModel.load(edit_graph(folder, change), threads=1)


def test_operators_may_be_functions_of_the_model_itself(folder: Path, source: Path) -> None:
    def change(proto: Any) -> None:
        body = [onnx.helper.make_node("Sigmoid", ["x"], ["y"])]
        function = onnx.helper.make_function("own", "Squash", ["x"], ["y"], body, [onnx.helper.make_opsetid("", 23)])
        proto.functions.append(function)
        proto.opset_import.append(onnx.helper.make_opsetid("own", 1))
        for node in proto.graph.node:
            if node.op_type == "Sigmoid":
                node.op_type, node.domain = "Squash", "own"

    found = []
    for path in (edit_graph(folder, change), source / "model.onnx"):
        with OnnxModel.load(path, threads=1) as model, OnnxContext(model, n_ctx=16) as context:
            found.append(context.decode([1, 70, 80]).copy())
    np.testing.assert_allclose(*found, atol=1e-5)


def test_heads_that_do_not_rotate_may_be_finer(folder: Path) -> None:
    def change(proto: Any) -> None:
        resize(40, 40)(proto)
        attention(lambda node: set_attribute(node, "do_rotary", 0))(proto)

    file = read_onnx(edit_graph(folder, change))
    check_kernels(file, facts_of(file), onnxruntime, CPU)
    file = read_onnx(edit_graph(folder, resize(36, 36)))
    with pytest.raises(UnsupportedError, match=r"has heads of 36; GroupQueryAttention takes multiples of 8 for heads\. Export or cut"):
        check_kernels(file, facts_of(file), onnxruntime, CPU)


def test_float32_has_no_attention_on_a_gpu(source: Path) -> None:
    file = read_onnx(source / "model.onnx")
    with pytest.raises(UnsupportedError, match=r"keys and values in float32, for which CUDA has no kernel. Export the model in float16"):
        check_kernels(file, facts_of(file), onnxruntime, CUDA)


def test_an_operator_without_a_kernel_is_named_beside_the_runtimes_words(folder: Path) -> None:
    """MatMulNBitsQLoRA has a schema and, on a CPU, no kernel."""

    def change(proto: Any) -> None:
        node = next(node for node in proto.graph.node if node.op_type == "MatMul")
        arrays = [np.zeros((64, 1, 32), np.uint8), np.zeros(64, np.float32), np.zeros(64, np.uint8)]
        arrays += [np.zeros((64, 4), np.float32), np.zeros((4, 64), np.float32), np.ones(1, np.float32)]
        proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, f"qlora.{i}") for i, array in enumerate(arrays))
        inputs = [node.input[0], *(f"qlora.{i}" for i in range(6))]
        sizes = {"K": 64, "N": 64, "bits": 4, "block_size": 64}
        proto.graph.node.append(onnx.helper.make_node("MatMulNBitsQLoRA", inputs, ["unused"], domain="com.microsoft", **sizes))
        proto.graph.output.append(onnx.helper.make_tensor_value_info("unused", 1, None))

    with pytest.raises(RuntimeFailure, match=r"cannot load it\. CPUExecutionProvider has no kernel for MatMulNBitsQLoRA\. It said: "):
        OnnxModel.load(edit_graph(folder, change), threads=1)


def test_what_the_runtime_says_is_passed_on(folder: Path) -> None:
    """A graph that contradicts itself in a way that only the runtime looks for."""

    def change(proto: Any) -> None:
        next(node for node in proto.graph.node if node.op_type == "MatMul").input.append("embed")

    with pytest.raises(RuntimeFailure, match=r"model\.onnx: onnxruntime [\d.]+ cannot load it\. It said: .*Node input 'embed' is not"):
        OnnxModel.load(edit_graph(folder, change), threads=1)


def test_cuda_needs_another_build(source: Path) -> None:
    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(RuntimeFailure, match=r"cannot use CUDA\. Install .*: pip uninstall onnxruntime && pip install onnxruntime-gpu"):
        OnnxModel.load(source / "model.onnx", gpu=0)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_gpu_that_does_not_start_is_not_replaced_by_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime falls back to the CPU with a line in its log. Here the build claims CUDA and has none."""
    import onnx_ir as ir

    write_tiny_onnx(tmp_path / "m", float_type=ir.DataType.FLOAT16)
    monkeypatch.setattr(onnx_model, "check_cuda", lambda: None)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcudnn"))
    with pytest.raises(RuntimeFailure, match=r"could not start CUDAExecutionProvider and would use the CPU\. Install CUDA and cuDNN"):
        OnnxModel.load(tmp_path / "m" / "model.onnx", gpu=0, threads=1)
    assert capsys.readouterr() == ("", "Failed to load libcudnn\n")
