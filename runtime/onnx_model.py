"""An ONNX decoder folder in ONNX Runtime, seen as `edgeq.runtime.llama` shows a GGUF model: what the folder holds, and its tokenizer.

    with OnnxModel.load(folder / "model.onnx", threads=2) as model, OnnxContext(model, n_ctx=2048) as context:
        logits = context.decode(model.tokenize("Hello", add_special=True))[-1]

Everything that can be wrong with a folder, and that ONNX Runtime would answer late, in its own terms or not at all, is looked for before
the runtime sees it: see `onnx_file`, `onnx_facts` and `onnx_kernels`. Changed bytes of weights are not: compare with a package's hashes.

The graph is given to the runtime from memory, changed so that it computes logits for chosen tokens only (`onnx_rows`), and without its
places for adapters (`onnx_places`) until the first adapter is set: then the whole graph is loaded in its place, and stays as long as an
adapter is in memory. Threads belong to the model, not to a context. A model or context is closed by `close()`, by its `with` block or when
it is dropped.
"""

from __future__ import annotations

import sys
import threading
import weakref
from contextlib import redirect_stdout
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import MissingDependency, RuntimeFailure, TokenizerError, UsageError
from edgeq.runtime.adapter_file import file_stamp
from edgeq.runtime.closing import Shared
from edgeq.runtime.cores import usable_cores
from edgeq.runtime.onnx_facts import OnnxFacts, facts_of
from edgeq.runtime.onnx_file import OnnxFile, read_onnx
from edgeq.runtime.onnx_kernels import CPU, CUDA, check_kernels, without_kernel
from edgeq.runtime.onnx_places import without_places
from edgeq.runtime.onnx_rows import choose_rows
from edgeq.runtime.onnx_tokenizer import OnnxTokenizer
from edgeq.runtime.token_ids import TokenIds, checked_ids

if TYPE_CHECKING:
    from edgeq.runtime.onnx_context import OnnxContext

QUIET = 4  # log severity: fatal alone. Errors come back in exceptions
NO_CUDA = (
    "the installed onnxruntime cannot use CUDA. Install the build that can, in its place: "
    "pip uninstall onnxruntime && pip install onnxruntime-gpu"
)

_ready: dict[str, ModuleType] = {}
_ready_lock = threading.Lock()


def library() -> ModuleType:
    """The `onnxruntime` module. Raises MissingDependency."""
    with _ready_lock:
        if "module" not in _ready:
            try:
                import onnxruntime
            except ImportError as err:
                raise MissingDependency("onnxruntime", "onnx") from err
            onnxruntime.disable_telemetry_events()
            _ready["module"] = onnxruntime
        return _ready["module"]


def check_cuda() -> None:
    """Raise RuntimeFailure that says what to install when this build of ONNX Runtime has no CUDA."""
    if CUDA not in library().get_available_providers():
        raise RuntimeFailure(NO_CUDA)


class OnnxModel(Shared):
    """A model in memory and its tokenizer. gpu: index of the GPU it runs on, None for the CPU. chooses_rows: see `onnx_rows`."""

    def __init__(
        self,
        facts: OnnxFacts,
        graphs: _Graphs,
        tokenizer: OnnxTokenizer,
        *,
        gpu: int | None,
        threads: int,
        chooses_rows: bool,
        places: bool,
    ) -> None:
        super().__init__()
        self.path, self.facts, self.gpu, self.threads, self.chooses_rows = facts.path, facts, gpu, threads, chooses_rows
        self._graphs = graphs
        self._has_places = places or graphs.bare is None
        self._session: Any | None = graphs.start(places=self._has_places)
        self._n_adapters = 0
        self._last_has_gone = False
        self._tokenizer = tokenizer
        self._contexts: weakref.WeakSet[OnnxContext] = weakref.WeakSet()

    @classmethod
    def load(
        cls, path: Path | str, *, gpu: int | None = None, threads: int | None = None, places: bool = False, stays: bool = True
    ) -> OnnxModel:
        """Load a folder by its model.onnx. threads: default is every core this process may use. places: with those for adapters, as one
        will be set at once. stays: whether the folder does, so that the graph can be loaded once more, with or without them.

        Raises SourceError, UnsupportedError or TokenizerError for a folder that the runtime must not see or cannot run, RuntimeFailure with
        ONNX Runtime's own words for one that it refuses, or when there is no CUDA; MissingDependency.
        """
        threads = usable_cores() if threads is None else threads
        if threads < 1:
            raise UsageError(f"threads is {threads}; expected at least 1")
        file = read_onnx(Path(path))
        facts, ort, provider = facts_of(file), library(), CPU
        if gpu is not None:
            check_cuda()
            provider = CUDA
        check_kernels(file, facts, ort, provider)
        tokenizer = OnnxTokenizer(file.path.parent, bos=facts.bos, eos=facts.ends[0] if facts.ends else None)
        if tokenizer.n_tokens > facts.n_vocab:
            raise TokenizerError(
                f"{file.path.parent}: tokenizer.json has {tokenizer.n_tokens} tokens, the model's logits {facts.n_vocab}. "
                "They belong to different models; copy the whole folder again."
            )
        chooses_rows = choose_rows(file.proto.graph, facts.logits)
        graphs = _Graphs(file, facts, provider, gpu=gpu, threads=threads, stays=stays)
        return cls(facts, graphs, tokenizer, gpu=gpu, threads=threads, chooses_rows=chooses_rows, places=places)

    @property
    def contexts(self) -> list[OnnxContext]:
        """Those on this model that are still there."""
        return list(self._contexts)

    def _release(self) -> None:
        for context in list(self._contexts):
            context.close()
        self._session = None

    @property
    def session(self) -> Any:
        """The runtime's `InferenceSession` now: another one after the first adapter was set, or the last one has gone."""
        if self._session is None:
            raise RuntimeFailure(f"{self.path}: the model is closed. Load it again.")
        if self._last_has_gone:
            self._leave_places()
        return self._session

    def adapter_opened(self) -> None:
        """Count an adapter that is in memory."""
        with self.lock:
            self._n_adapters += 1
            self._last_has_gone = False

    def adapter_closed(self) -> None:
        with self.lock:
            self._n_adapters -= 1
            self._last_has_gone = not self._n_adapters

    def with_places(self) -> None:
        """Run the graph that takes adapters from now on. Raises RuntimeFailure when its files have changed, or as `load`."""
        with self.lock:
            if not self._has_places:
                self._session, self._has_places = self._graphs.start(places=True), True

    def _leave_places(self) -> None:
        """Go back to the graph without them, where that can be had: the one that runs does as well."""
        with self.lock:
            if self._last_has_gone and self._has_places and self._graphs.bare is not None and self._graphs.unchanged:
                self._session, self._has_places = self._graphs.start(places=False), False
            self._last_has_gone = False

    @property
    def n_vocab(self) -> int:
        return self.facts.n_vocab

    @property
    def n_ctx_train(self) -> int:
        """Tokens of context the model was trained for."""
        return self.facts.n_ctx_train

    @property
    def size_bytes(self) -> int:
        """Bytes of all initializers. The runtime keeps matrices rearranged for its kernels beside them or in their place."""
        return self.facts.tensor_bytes

    @property
    def description(self) -> str:
        """A short description, such as "llama, 30 layers, ONNX opset 23, f32"."""
        facts = self.facts
        return f"{facts.arch}, {facts.n_layers} layers, ONNX opset {facts.opset}, {facts.kv_type}"

    @property
    def library(self) -> str:
        return f"onnxruntime {library().__version__}"

    @property
    def bos(self) -> int | None:
        return self.facts.bos

    @property
    def eos(self) -> int | None:
        return self.facts.ends[0] if self.facts.ends else None

    @cached_property
    def eog(self) -> frozenset[int]:
        """Tokens that end a generation."""
        return frozenset(self.facts.ends)

    def is_eog(self, token: int) -> bool:
        return token in self.eog

    def chat_template(self) -> str | None:
        """The Jinja template the folder carries, or None."""
        return self._tokenizer.chat_template()

    def token_text(self, token: int) -> str:
        """A token's spelling in the vocabulary ("<|im_end|>", "Ġthe")."""
        self.check_tokens([token])
        return self._tokenizer.text(token)

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of a text. add_special: with the BOS/EOS that the model wants; parse_special: text may spell special tokens."""
        return self._tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def token_to_piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes a token stands for, possibly a part of a character. special: spell control tokens too, else they are empty."""
        self.check_tokens([token])
        return self._tokenizer.piece(token, special=special)

    def detokenize(self, tokens: TokenIds, *, special: bool = False) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD. special: spell control tokens too."""
        return self._tokenizer.decode(self.check_tokens(tokens).tolist(), special=special)

    def check_tokens(self, tokens: TokenIds) -> npt.NDArray[np.int32]:
        """Token ids as int32, every one within the vocabulary. Raises UsageError naming the first that is not."""
        return checked_ids(tokens, n_vocab=self.n_vocab, path=self.path)


class _Graphs:
    """What sessions of a model are started from. bare: without places for adapters; None where there are none, or the folder goes."""

    def __init__(self, file: OnnxFile, facts: OnnxFacts, provider: str, *, gpu: int | None, threads: int, stays: bool) -> None:
        self._file, self._provider, self._gpu, self._threads = file, provider, gpu, threads
        for tensor in file.proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = file.data[entry.value].resolve().relative_to(file.folder).as_posix()
        inputs = [name for place in facts.places.values() for name in (place.a, place.b)]
        self.bare = without_places(file.proto, inputs) if stays else None
        self._stamps = self._look()

    def start(self, *, places: bool) -> Any:
        """Raises RuntimeFailure with ONNX Runtime's own words, or when the files are not those that were read."""
        if not self.unchanged:
            raise RuntimeFailure(f"{self._file.path}: has changed since it was loaded. Load it again.")
        proto = self._file.proto if places or self.bare is None else self.bare
        return _session(self._file, proto, library(), self._provider, gpu=self._gpu, threads=self._threads)

    @property
    def unchanged(self) -> bool:
        """Whether the files are those that were read."""
        return self._look() == self._stamps

    def _look(self) -> list[tuple[int, int] | None]:
        return [file_stamp(path) if path.exists() else None for path in (self._file.path, *self._file.data.values())]


def _session(file: OnnxFile, proto: Any, ort: ModuleType, provider: str, *, gpu: int | None, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = QUIET
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.folder))
    if gpu is not None:
        with redirect_stdout(sys.stderr):  # it prints what it misses
            ort.preload_dlls()  # CUDA's libraries from their Python packages, where those are installed
    providers: list[Any] = [CPU] if gpu is None else [(CUDA, {"device_id": gpu}), CPU]
    try:
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=providers)
    except Exception as err:  # its errors have no base of their own
        missing = without_kernel(file, ort, provider)
        hint = f" {provider} has no kernel for {', '.join(missing)}." if missing else ""
        raise RuntimeFailure(f"{file.path}: onnxruntime {ort.__version__} cannot load it.{hint} It said: {said(err)}") from err
    if session.get_providers()[0] != provider:
        raise RuntimeFailure(
            f"{file.path}: onnxruntime could not start {provider} and would use the CPU. Install CUDA and cuDNN of the versions that "
            f"onnxruntime-gpu {ort.__version__} was built for: pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    return session


def said(err: Exception) -> str:
    """What ONNX Runtime says, on one line, without its own prefix."""
    text = " ".join(str(err).split())
    return text.split(" : ", 3)[-1] if text.startswith("[ONNXRuntimeError]") else text
