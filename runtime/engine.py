"""What sessions, measurements and the gate need of a runtime, and which of the two runtimes an artifact is for.

llama.cpp runs GGUF files (`edgeq.runtime.llama`), ONNX Runtime runs folders around a model.onnx (`edgeq.runtime.onnx_model`). Their models
and contexts are alike in what the protocols below name; everything above this module speaks in these. Neither library is imported
before a model is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from edgeq.errors import MissingDependency, RuntimeFailure, UsageError
from edgeq.package import Package, check_files, resolve_artifact, sha256
from edgeq.runtime import gguf_facts
from edgeq.runtime.gguf_facts import GgufFacts
from edgeq.runtime.likelihood import Floats
from edgeq.runtime.llama import ALL_LAYERS, NO_GPU_BUILD, LlamaModel, library
from edgeq.runtime.llama_context import LlamaContext
from edgeq.runtime.memory import kv_bytes as llama_kv_bytes
from edgeq.runtime.onnx_facts import OnnxFacts, read_onnx_facts
from edgeq.runtime.token_ids import TokenIds

Runtime = Literal["llama.cpp", "onnxruntime"]
Facts = GgufFacts | OnnxFacts


class Model(Protocol):
    """A model in memory and its vocabulary. facts: sizes on disk. eog: tokens that end a generation."""

    path: Path

    @property
    def facts(self) -> Any: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def n_ctx_train(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def description(self) -> str: ...
    @property
    def library(self) -> str: ...
    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    @property
    def eog(self) -> frozenset[int]: ...
    def is_eog(self, token: int) -> bool: ...
    def chat_template(self) -> str | None: ...
    def token_text(self, token: int) -> str: ...
    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]: ...
    def token_to_piece(self, token: int, *, special: bool = False) -> bytes: ...
    def detokenize(self, tokens: TokenIds, *, special: bool = False) -> str: ...
    def check_tokens(self, tokens: TokenIds) -> npt.NDArray[np.int32]: ...
    def share(self) -> Model: ...
    def close(self) -> None: ...


class Context(Protocol):
    """The cache of one sequence. `decode` and `iter_logits` return views that the next call overwrites."""

    n_ctx: int
    threads: int
    kv_type: str

    @property
    def n_past(self) -> int: ...
    def set_adapters(self, scales: Mapping[Any, float]) -> None: ...
    def clear(self) -> None: ...
    def truncate(self, n_tokens: int) -> int: ...
    def decode(self, tokens: TokenIds, *, outputs: Literal["last", "all"] = "last") -> Floats: ...
    def greedy_stepper(self, n_steps: int) -> Callable[[int], int]: ...
    def iter_logits(self, tokens: TokenIds, *, keep: bool = False) -> Iterator[tuple[int, Floats]]: ...
    def logits_of(self, tokens: TokenIds, out: Floats | None = None) -> Floats: ...
    def close(self) -> None: ...


def is_onnx(artifact: Path) -> bool:
    return artifact.suffix == ".onnx"


def runtime_of(artifact: Path) -> Runtime:
    """Which runtime an artifact is for, by its name."""
    return "onnxruntime" if is_onnx(artifact) else "llama.cpp"


def open_artifact(path: Path) -> tuple[Path, Package | None]:
    """`resolve_artifact`, and for an ONNX package every hash as well: ONNX Runtime computes with damaged weights without a word.

    Raises PackageError.
    """
    artifact, package = resolve_artifact(path)
    if package is not None and is_onnx(artifact):
        check_files(package)
    return artifact, package


def artifact_sha256(artifact: Path) -> str:
    """Hash of a GGUF file; of model.onnx and its data one after another. Raises as `read_facts`."""
    if not is_onnx(artifact):
        return sha256(artifact)
    digests = [sha256(file) for file in read_onnx_facts(artifact).files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def read_facts(artifact: Path) -> Facts:
    """Sizes of an artifact, after a look at whether a runtime may see it. Raises SourceError and UnsupportedError."""
    return read_onnx_facts(artifact) if is_onnx(artifact) else gguf_facts.read_facts(artifact)


def fitting_n_ctx(artifact: Path, n_ctx: int) -> int:
    """n_ctx, or what the rotary tables of a graph have room for when that is less. Raises as `read_facts`."""
    positions = read_onnx_facts(artifact).n_positions if is_onnx(artifact) else None
    return n_ctx if positions is None else min(n_ctx, positions)


def kv_bytes(facts: Facts, n_ctx: int, kv_type: str) -> int:
    """Bytes of keys and values that the artifact's runtime allocates for n_ctx tokens."""
    return llama_kv_bytes(facts, n_ctx, kv_type) if isinstance(facts, GgufFacts) else facts.kv_bytes(n_ctx)


def default_kv_type(facts: Facts, planned: str | None = None) -> str:
    """What an artifact keeps keys and values in unless something else is asked for: a graph has no choice."""
    return planned or "f16" if isinstance(facts, GgufFacts) else facts.kv_type


def prepare(artifact: Path, gpu: int | None = None) -> None:
    """Import what will run an artifact. Raises MissingDependency, and RuntimeFailure when it cannot use a GPU that is asked for."""
    if is_onnx(artifact):
        from edgeq.runtime import onnx_context, onnx_model

        assert onnx_context
        onnx_model.library()
        for module in ("onnx", "tokenizers"):
            try:
                import_module(module)
            except ImportError as err:
                raise MissingDependency(module, "onnx") from err
        if gpu is not None:
            onnx_model.check_cuda()
    elif gpu is not None and not library().llama_supports_gpu_offload():
        raise RuntimeFailure(NO_GPU_BUILD)
    else:
        library()


def load_model(
    artifact: Path,
    *,
    gpu: int | None = None,
    threads: int | None = None,
    patchable: bool = False,
    adapted: bool = False,
    stays: bool = True,
) -> Model:
    """Load an artifact on the CPU, or on a GPU by its index. threads: of ONNX Runtime, which gives them to the model.

    patchable: in memory that patches can change, which GGUF files alone can be. adapted: an adapter will be set at once. stays: whether
    its files do. Raises as `LlamaModel.load` and `OnnxModel.load`.
    """
    if not is_onnx(artifact):
        return LlamaModel.load(artifact, gpu_layers=0 if gpu is None else ALL_LAYERS, main_gpu=gpu or 0, use_mmap=not patchable)
    from edgeq.runtime.onnx_model import OnnxModel

    if patchable:
        raise no_patches(artifact)
    return OnnxModel.load(artifact, gpu=gpu, threads=threads, places=adapted, stays=stays)


def no_patches(artifact: Path) -> UsageError:
    return UsageError(f"{artifact}: patches change weights in memory, and ONNX Runtime gives no access to them. Use a GGUF package.")


def new_context(
    model: Model,
    *,
    n_ctx: int,
    threads: int | None = None,
    kv_type: str | None = None,
    n_batch: int = 512,
    max_outputs: int | None = None,
) -> Context:
    """A context on a model. threads: those of an ONNX model are its own. kv_type: None is f16 for GGUF, and what a graph has.

    n_batch: most tokens computed together. Raises as `LlamaContext` and `OnnxContext`.
    """
    if isinstance(model, LlamaModel):
        settings: dict[str, Any] = {"threads": threads, "kv_type": kv_type or "f16", "n_batch": n_batch, "n_ubatch": n_batch}
        return LlamaContext(model, n_ctx=n_ctx, max_outputs=max_outputs, **settings)
    from edgeq.runtime.onnx_context import OnnxContext
    from edgeq.runtime.onnx_model import OnnxModel

    assert isinstance(model, OnnxModel)
    return OnnxContext(model, n_ctx=n_ctx, kv_type=kv_type, n_batch=n_batch, max_outputs=max_outputs)
