"""An encoder in an ONNX file as exporters write it: which initializer is which tensor.

Embeddings, norms and biases keep their checkpoint's names. Matrices lose theirs, because they are stored transposed; each is found by the
bias that is added behind its product. config.json, the tokenizer and the files of sentence-transformers are looked for beside the file and
one folder above it (`onnx/model.onnx` is a usual place). That tensors mean what they are taken for is proven by the gate, which compares
with the file itself, run by ONNX Runtime.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgeq.converters.encoders.families import EncoderFamily
from edgeq.converters.encoders.hf_bert import assemble, checkpoint_name, read_encoder_config
from edgeq.converters.encoders.onnx_file import Node, OnnxGraph, read_onnx_file
from edgeq.converters.sources.stored import StoredTensor
from edgeq.encoder_spec import LINEARS, EncoderModel, EncoderSpec
from edgeq.errors import SourceError, UnsupportedError
from edgeq.tensors import Bytes, LazyTensor

_QUANTIZED = {"DequantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulNBits", "QLinearMatMul"}
_FUSED = {"Attention", "EmbedLayerNormalization", "FusedMatMul", "MultiHeadAttention", "SkipLayerNormalization"}


def open_onnx_encoder(path: Path) -> EncoderModel:
    """Raises SourceError and TokenizerError for what is missing or broken, UnsupportedError for what is not described."""
    graph = read_onnx_file(path)
    _refuse(graph)
    folder = _folder(path)
    spec, family = read_encoder_config(folder / "config.json")
    stored = recognised(graph, spec, family)
    name = folder.resolve().name
    return assemble(folder, stored, graph.files, name=name, graph=path)


def recognised(graph: OnnxGraph, spec: EncoderSpec, family: EncoderFamily) -> dict[str, StoredTensor]:
    """Initializers under the names that a checkpoint has for them. What is not found is left out."""
    embed = checkpoint_name("embed.weight", family)
    prefix = next((name.removesuffix(embed) for name in graph.initializers if name.endswith(embed)), "")
    aliases = {node.outputs[0]: node.inputs[0] for node in graph.nodes if node.op == "Identity" and node.inputs}
    by_name = {**graph.initializers}
    by_name |= {made: graph.initializers[source] for made, source in aliases.items() if source in graph.initializers}
    matrices = _matrices(graph, by_name)
    found = {}
    linears = {role for group in LINEARS for role in group}
    for name in spec.shapes():
        theirs = checkpoint_name(name, family)
        is_matrix = name.endswith(".weight") and name.rsplit(".", 2)[-2] in linears
        tensor = matrices.get(prefix + theirs) if is_matrix else by_name.get(prefix + theirs)
        if tensor is not None:
            found[theirs] = replace(tensor, name=theirs)
    return found


def _refuse(graph: OnnxGraph) -> None:
    ops = {node.op for node in graph.nodes}
    if done := sorted(ops & _QUANTIZED):
        raise UnsupportedError(
            f"{graph.path} is quantized already ({', '.join(done)}). Give the float model, which usually lies beside it."
        )
    if done := sorted(ops & _FUSED):
        raise UnsupportedError(
            f"{graph.path} was optimised for one runtime ({', '.join(done)}). Give it as it was exported, or the Hugging Face folder."
        )


def _folder(path: Path) -> Path:
    for folder in (path.parent, path.parent.parent):
        if (folder / "config.json").is_file():
            return folder
    raise SourceError(
        f"{path}: there is no config.json beside it or one folder above, and a graph does not say what its model is. "
        "Put config.json and tokenizer.json of the model there."
    )


def _matrices(graph: OnnxGraph, by_name: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Weights (n_out, n_in) of linear layers, by the name that goes with their bias."""
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    turned = {node.outputs[0]: node.inputs[0] for node in graph.nodes if node.op == "Transpose" and len(node.inputs) == 1}
    found = {}
    bias: str | None
    for node in graph.nodes:
        if node.op == "Gemm" and len(node.inputs) == 3:
            weight, bias, transposed = node.inputs[1], node.inputs[2], not node.integers.get("transB", 0)
        elif node.op == "MatMul":
            weight, bias, transposed = node.inputs[1], _bias_behind(node, readers, by_name), True
        else:
            continue
        if weight in turned:
            weight, transposed = turned[weight], not transposed
        tensor = by_name.get(weight)
        if tensor is not None and len(tensor.shape) == 2 and bias is not None and bias.endswith(".bias"):
            found[bias.removesuffix("bias") + "weight"] = turned_over(tensor) if transposed else tensor
    return found


def _bias_behind(node: Node, readers: Mapping[str, list[Node]], by_name: Mapping[str, StoredTensor]) -> str | None:
    """Name of the vector that is added to what a node makes."""
    for reader in readers.get(node.outputs[0], ()):
        others = [name for name in reader.inputs if name != node.outputs[0]]
        if reader.op == "Add" and len(others) == 1 and others[0] in by_name and len(by_name[others[0]].shape) == 1:
            return others[0]
    return None


def turned_over(tensor: StoredTensor) -> StoredTensor:
    """A matrix that is stored as its transpose, read as rows of itself."""
    stored = tensor.open()
    n_in, n_out = tensor.shape
    size = stored.grid.block_bytes

    def read(start: int, stop: int) -> Bytes:
        whole = stored.packed().reshape(n_in, n_out, size)
        return np.ascontiguousarray(whole[:, start:stop].transpose(1, 0, 2)).reshape(max(0, stop - start), n_in * size)

    assert math.prod(tensor.shape) * size == stored.nbytes
    lazy = LazyTensor(shape=(n_out, n_in), grid=stored.grid, read=read, origin=stored.origin)
    return replace(tensor, shape=(n_out, n_in), decoded=lazy)
