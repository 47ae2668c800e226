"""What the installed ONNX Runtime can compute, asked before it is given a model.

It finds an unknown opset or operator when it loads a graph, and tells so in words about its own source files; sizes for which an operator
has no kernel it finds at the first run. Sizes measured on the CPU kernels of onnxruntime 1.32.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

from edgeq.errors import UnsupportedError
from edgeq.runtime.onnx_facts import FLOAT, MS, OnnxFacts
from edgeq.runtime.onnx_file import OnnxFile

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
HEAD_STEP, ROTARY_HEAD_STEP = 8, 16  # head sizes of GroupQueryAttention, the second where it rotates as well


def check_kernels(file: OnnxFile, facts: OnnxFacts, ort: ModuleType, provider: str) -> None:
    """Raise UnsupportedError that names the operator or size that the runtime has nothing for, and what helps."""
    opsets = {entry.domain: entry.version for entry in file.proto.opset_import}
    if not _knows_opset(ort, facts.opset, file.proto.ir_version):
        raise UnsupportedError(
            f"{file.path}: is written for opset {facts.opset} (IR version {file.proto.ir_version}), which is too new for the installed "
            f"onnxruntime {ort.__version__}. Upgrade it: pip install -U onnxruntime."
        )
    known, own = _operators(ort), {(_domain(function.domain), function.name) for function in file.proto.functions}
    for node in file.proto.graph.node:
        if known and (_domain(node.domain), node.op_type) not in known | own:
            opset = f"{_domain(node.domain)} {opsets.get(node.domain, facts.opset)}"
            raise UnsupportedError(
                f"{file.path}: the installed onnxruntime {ort.__version__} has no operator {node.op_type} of {opset} (node {node.name}). "
                "Upgrade it: pip install -U onnxruntime."
            )
    _check_heads(file, facts, provider)


def without_kernel(file: OnnxFile, ort: ModuleType, provider: str) -> list[str]:
    """Operators of a graph for which neither the provider nor the CPU has a kernel of its own, for messages about a failed load."""
    try:
        kernels = ort.capi.onnxruntime_pybind11_state.get_all_opkernel_def()
    except AttributeError:
        return []  # a build that does not tell
    there = {(_domain(kernel.domain), kernel.op_name) for kernel in kernels if kernel.provider in (provider, CPU)}
    return sorted({node.op_type for node in file.proto.graph.node if (_domain(node.domain), node.op_type) not in there})


def _check_heads(file: OnnxFile, facts: OnnxFacts, provider: str) -> None:
    caches = {cache.past: cache for cache in facts.caches}
    for node in file.proto.graph.node:
        if (node.domain, node.op_type) != (MS, "GroupQueryAttention") or len(node.input) < 5:
            continue
        past = [caches[name] for name in node.input[3:5] if name in caches]
        if len(past) != 2:
            continue
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        step = ROTARY_HEAD_STEP if attributes.get("do_rotary") else HEAD_STEP
        where = f"{file.path}: {node.name} has"
        if past[0].length != past[1].length:
            raise UnsupportedError(
                f"{where} keys of {past[0].length} and values of {past[1].length} numbers; GroupQueryAttention wants both alike. "
                "Export the model again: edgeq writes such layers with another operator."
            )
        if past[0].length % step:
            rotates = " that it rotates" if step == ROTARY_HEAD_STEP else ""
            raise UnsupportedError(
                f"{where} heads of {past[0].length}; GroupQueryAttention takes multiples of {step} for heads{rotates}. "
                "Export or cut the model again with such head sizes."
            )
        n_heads, n_kv_heads = attributes.get("num_heads", 0), attributes.get("kv_num_heads", 0)
        if n_kv_heads != past[0].n_kv_heads or n_heads % n_kv_heads:
            raise UnsupportedError(
                f"{where} {n_heads} heads and {n_kv_heads} KV heads, and a cache of {past[0].n_kv_heads}. "
                "The graph contradicts itself; export it again."
            )
        if provider == CUDA and facts.kv_type == "f32":
            raise UnsupportedError(f"{where} keys and values in float32, for which CUDA has no kernel. Export the model in float16.")


@lru_cache
def _knows_opset(ort: ModuleType, opset: int, ir_version: int) -> bool:
    """Whether a graph of one Identity loads: there is no other way to ask."""
    from onnx import helper

    value = [helper.make_tensor_value_info(name, FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=[CPU])
    except Exception:  # its errors have no base of their own
        return False
    return True


@lru_cache
def _operators(ort: ModuleType) -> frozenset[tuple[str, str]]:
    """Domain and name of every operator that has a schema; empty where the build does not tell."""
    try:
        schemas = ort.capi.onnxruntime_pybind11_state.get_all_operator_schema()
    except AttributeError:
        return frozenset()
    return frozenset((_domain(schema.domain), schema.name) for schema in schemas)


def _domain(name: str) -> str:
    return name or "ai.onnx"
