"""Adapters of both runtimes: GGUF files beside GGUF models, `.onnx_adapter` files beside graphs."""

from __future__ import annotations

from pathlib import Path

from edgeq.errors import AdapterError
from edgeq.onnx_adapter_file import SUFFIX
from edgeq.runtime import adapter_file
from edgeq.runtime.adapter_file import AdapterFile, file_stamp
from edgeq.runtime.engine import Facts, Model
from edgeq.runtime.gguf_facts import GgufFacts
from edgeq.runtime.llama import LlamaAdapter, LlamaModel
from edgeq.runtime.onnx_adapters import OnnxAdapter, OnnxAdapterFile, check_onnx_base, read_onnx_file

AnyFile = AdapterFile | OnnxAdapterFile
AnyAdapter = LlamaAdapter | OnnxAdapter


def read_adapter(path: Path, base: Facts) -> AnyFile:
    """Read and check a file of the kind that goes with a model. Raises AdapterError for the other kind, and as this kind's reader."""
    file_stamp(path)
    with path.open("rb") as file:
        head = file.read(8)
    if isinstance(base, GgufFacts):
        if head[4:] == b"TORT":
            raise AdapterError(f"{path}: an adapter for ONNX Runtime cannot act on {base.path}. Give a GGUF adapter.")
        return adapter_file.read_adapter(path)
    if head[:4] == b"GGUF":
        raise AdapterError(f"{path}: a GGUF adapter cannot act on {base.path}. Give an {SUFFIX} file, or export the model with it merged.")
    return read_onnx_file(path)


def check_base(adapter: AnyFile, base: Facts) -> None:
    """Raise AdapterError naming the first thing in which an adapter, read for this model, does not fit it."""
    if isinstance(base, GgufFacts):
        assert isinstance(adapter, AdapterFile)
        adapter_file.check_base(adapter, base)
    else:
        assert isinstance(adapter, OnnxAdapterFile)
        check_onnx_base(adapter, base)


def load_adapter(model: Model, path: Path) -> AnyAdapter:
    """Bring an adapter that was checked into memory. Raises AdapterError, and RuntimeFailure when the runtime refuses it."""
    if isinstance(model, LlamaModel):
        return LlamaAdapter.load(model, path)
    from edgeq.runtime.onnx_model import OnnxModel

    assert isinstance(model, OnnxModel)
    return OnnxAdapter.load(model, path)
