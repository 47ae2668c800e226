"""Logits for chosen tokens only: the same numbers, whatever stands behind the head, and graphs that are left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_folders import copy_of, edit_graph, write_tiny_onnx
from tiny import N_VOCAB

from edgeq.runtime.onnx_context import OnnxContext
from edgeq.runtime.onnx_model import OnnxModel
from edgeq.runtime.onnx_rows import ROWS, choose_rows

IDS = [1, *range(60, 90)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx-rows") / "tiny"
    write_tiny_onnx(folder)
    return folder


def behind_the_head(*nodes: tuple[str, Any], dtype: type = np.float32) -> Callable[[Any], None]:
    """Put operators between the head and the logits: names and second operands."""

    def change(proto: Any) -> None:
        graph = proto.graph
        head = next(node for node in graph.node if "logits" in node.output)
        head.output[0] = value = "bare"
        for i, (op, operand) in enumerate(nodes):
            inputs, result = [value], "logits" if i == len(nodes) - 1 else f"behind.{i}"
            if operand is not None:
                graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(operand, dtype=dtype), f"operand.{i}"))
                inputs.append(f"operand.{i}")
            graph.node.append(onnx.helper.make_node(op, inputs, [result], **({"to": 1} if op == "Cast" else {})))
            value = result

    return change


CHANGES: dict[str, Callable[[Any], None]] = {
    "head alone": lambda proto: None,
    "bias": behind_the_head(("Add", np.arange(N_VOCAB) / 100)),
    "soft cap": behind_the_head(("Div", 3.0), ("Tanh", None), ("Mul", 3.0), ("Cast", None)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_rows_are_those_of_the_whole_graph(source: Path, tmp_path: Path, name: str) -> None:
    path = edit_graph(copy_of(source, tmp_path / "m"), CHANGES[name])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    ids = np.array([IDS], dtype=np.int64)
    feeds = {value.name: np.zeros((1, 2, 0, 32), np.float32) for value in session.get_inputs() if value.name.startswith("past")}
    expected = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **feeds})[0][0]
    with OnnxModel.load(path, threads=1) as model, OnnxContext(model, n_ctx=64) as context:
        assert model.chooses_rows
        assert [value.name for value in model.session.get_inputs()].count(ROWS) == 1
        # A product of one row sums in another order than one of many.
        np.testing.assert_allclose(context.decode(IDS), expected[-1:], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(context.logits_of(IDS), expected, rtol=1e-5, atol=1e-5)
    assert np.ptp(expected) > 1


@pytest.mark.parametrize(
    "change",
    [
        behind_the_head(("Softmax", None)),  # not of one row alone, for all that is known here
        behind_the_head(("MatMul", np.eye(N_VOCAB)), ("Relu", None)),
    ],
)
def test_other_heads_are_left_alone_and_give_the_same(source: Path, tmp_path: Path, change: Callable[[Any], None]) -> None:
    path = edit_graph(copy_of(source, tmp_path / "m"), change)
    proto = onnx.load(path, load_external_data=False)
    before = proto.SerializeToString()
    assert not choose_rows(proto.graph, "logits")
    assert proto.SerializeToString() == before
    with OnnxModel.load(path, threads=1) as model, OnnxContext(model, n_ctx=64, n_batch=8) as context:
        assert not model.chooses_rows
        every = context.logits_of(IDS)
        context.clear()
        np.testing.assert_allclose(context.decode(IDS), every[-1:], rtol=1e-5, atol=1e-6)
        assert context.last_logits.shape == (N_VOCAB,)


def test_a_head_whose_weight_is_not_fixed_is_left_alone(source: Path) -> None:
    proto = onnx.load(source / "model.onnx", load_external_data=False)
    head = next(node for node in proto.graph.node if "logits" in node.output)
    proto.graph.input.append(onnx.helper.make_tensor_value_info(head.input[1], 1, [64, N_VOCAB]))  # may be overridden by a feed
    assert not choose_rows(proto.graph, "logits")
