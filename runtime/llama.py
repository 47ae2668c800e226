"""llama.cpp through the low-level functions of llama-cpp-python, made safe to call: its library, models and adapters.

What C code would answer with an abort is refused in Python: here files whose header does not hold together and token ids out of range, in
`edgeq.runtime.llama_context` what does not fit a context. What llama.cpp says goes to this module's logger and into the `RuntimeFailure` of
a call that failed; nothing is printed.

    with LlamaModel.load(path) as model, LlamaContext(model, n_ctx=2048) as context:
        logits = context.decode(model.tokenize("Hello", add_special=True))[-1]

A model or context is closed by `close()`, by its `with` block or when it is dropped; closing twice is fine, using it afterwards is
a RuntimeFailure.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import MissingDependency, RuntimeFailure, UsageError
from edgeq.runtime.closing import Shared
from edgeq.runtime.gguf_facts import GgufFacts, read_facts
from edgeq.runtime.token_ids import TokenIds, checked_ids

if TYPE_CHECKING:
    from edgeq.runtime.llama_context import LlamaContext

ALL_LAYERS = 1 << 30

logger = logging.getLogger(__name__)
# ggml_log_level of ggml.h (llama-cpp-python's own table is off by one). Errors come back in exceptions, so they are not shouted here.
_INFO, _ERROR, _CONTINUED = 2, 4, 5


class _Log(threading.local):
    """Log lines of this thread: open captures, and the line being continued."""

    def __init__(self) -> None:
        self.captures: list[deque[tuple[int, str]]] = []
        self.level = _INFO
        self.partial = ""


_log = _Log()
_ready: dict[str, Any] = {}
_ready_lock = threading.Lock()


def library() -> ModuleType:
    """The `llama_cpp` module, with its log turned towards this module. Raises MissingDependency."""
    with _ready_lock:
        if "module" not in _ready:
            try:
                import llama_cpp
            except ImportError as err:
                raise MissingDependency("llama_cpp", "llama") from err
            callback = llama_cpp.llama_log_callback(_on_log)
            llama_cpp.llama_log_set(callback, None)
            llama_cpp.llama_backend_init()
            _ready.update(module=llama_cpp, callback=callback)  # C keeps a pointer to the callback
        return _ready["module"]


def _on_log(level: int, text: bytes, _user_data: object) -> None:
    if level != _CONTINUED:
        _log.level = level
    _log.partial += text.decode("utf-8", "replace")
    *lines, _log.partial = _log.partial.split("\n")
    for line in filter(None, (line.strip() for line in lines)):
        logger.log(logging.DEBUG if _log.level <= _INFO else logging.INFO, "%s", line)
        for capture in _log.captures:
            capture.append((_log.level, line))


@contextmanager
def captured() -> Iterator[deque[tuple[int, str]]]:
    lines: deque[tuple[int, str]] = deque(maxlen=400)
    _log.captures.append(lines)
    try:
        yield lines
    finally:
        _log.captures.remove(lines)


def said(lines: deque[tuple[int, str]], count: int = 3) -> str:
    """The last error lines of a capture, else its last lines of any kind, on one line."""
    chosen = [line for level, line in lines if level >= _ERROR] or [line for _, line in lines]
    return " | ".join(chosen[-count:]) or "nothing"


class LlamaModel(Shared):
    """A model in memory (its pages mapped from the file unless `use_mmap` is off) and its vocabulary."""

    def __init__(self, pointer: int, facts: GgufFacts, module: ModuleType, *, gpu_layers: int, vocab_only: bool, mapped: bool) -> None:
        super().__init__()  # its lock guards llama.cpp's list of a model's adapters
        self.path, self.facts, self.gpu_layers, self.vocab_only, self.mapped = facts.path, facts, gpu_layers, vocab_only, mapped
        self._c = module
        self._open: int | None = pointer
        self._vocab = module.llama_model_get_vocab(pointer)
        self._contexts: weakref.WeakSet[LlamaContext] = weakref.WeakSet()
        self._adapters: weakref.WeakSet[LlamaAdapter] = weakref.WeakSet()
        self._free = weakref.finalize(self, module.llama_model_free, pointer)

    @classmethod
    def load(
        cls, path: Path | str, *, gpu_layers: int = 0, main_gpu: int = 0, vocab_only: bool = False, use_mmap: bool = True
    ) -> LlamaModel:
        """Load a GGUF file after checking its header.

        gpu_layers: layers to put on GPU `main_gpu`; 0 keeps everything on the CPU even in a GPU build, ALL_LAYERS takes all.
        Raises SourceError or UnsupportedError for a file that llama.cpp must not see, RuntimeFailure with llama.cpp's own words
        for one that it refuses, MissingDependency without llama-cpp-python.
        """
        path = Path(path)
        facts = read_facts(path)
        c = library()
        if gpu_layers and not c.llama_supports_gpu_offload():
            raise RuntimeFailure(NO_GPU_BUILD)
        params = c.llama_model_default_params()
        params.vocab_only = vocab_only
        params.load_mode = c.LLAMA_LOAD_MODE_MMAP if use_mmap else c.LLAMA_LOAD_MODE_NONE
        params.n_gpu_layers = gpu_layers
        no_devices = (ctypes.c_void_p * 1)(None)
        if gpu_layers:
            params.split_mode, params.main_gpu = c.LLAMA_SPLIT_MODE_NONE, main_gpu
        else:
            params.devices = ctypes.addressof(no_devices)
        with captured() as lines:
            pointer = c.llama_model_load_from_file(str(path).encode(), params)
        if not pointer:
            raise RuntimeFailure(f"{path}: llama.cpp cannot load it. It said: {said(lines)}")
        return cls(pointer, facts, c, gpu_layers=gpu_layers, vocab_only=vocab_only, mapped=use_mmap)

    def grammar_sampler(self, grammar: str) -> Any:
        """A sampler that holds answers to a GBNF grammar with a rule "root", for its caller to free. Raises UsageError."""
        with captured() as lines:
            sampler = self._c.llama_sampler_init_grammar(self._vocabulary, grammar.encode(), b"root")
        if not sampler:
            raise UsageError(f"llama.cpp does not take the grammar. It said: {said(lines)}")
        return sampler

    def _release(self) -> None:
        for context in list(self._contexts):
            context.close()
        for adapter in list(self._adapters):
            adapter.close()
        self._open = None
        self._free()

    @property
    def pointer(self) -> int:
        if self._open is None:
            raise RuntimeFailure(f"{self.path}: the model is closed. Load it again.")
        return self._open

    @property
    def native(self) -> ctypes.CDLL:
        """llama.cpp's library, for the little that llama-cpp-python does not wrap."""
        return self._c.llama_cpp._lib

    @property
    def _vocabulary(self) -> int:
        assert self.pointer
        return self._vocab

    @cached_property
    def n_vocab(self) -> int:
        return self._c.llama_vocab_n_tokens(self._vocabulary)

    @cached_property
    def n_ctx_train(self) -> int:
        """Tokens of context the model was trained for."""
        return self._c.llama_model_n_ctx_train(self.pointer) or self.facts.n_ctx_train

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all tensors, as llama.cpp counts them; 0 for a model loaded with `vocab_only`."""
        return self._c.llama_model_size(self.pointer)

    @cached_property
    def n_params(self) -> int:
        return self._c.llama_model_n_params(self.pointer)

    @cached_property
    def description(self) -> str:
        """llama.cpp's short description, such as "llama 256M Q4_1"."""
        buffer = ctypes.create_string_buffer(256)
        self._c.llama_model_desc(self.pointer, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    @property
    def library(self) -> str:
        """What runs it, such as "llama-cpp-python 0.3.36"."""
        return f"llama-cpp-python {self._c.__version__}"

    @cached_property
    def n_window(self) -> int:
        """Tokens that layers with a sliding window look back; 0 when there are none."""
        return self._c.llama_model_n_swa(self.pointer)

    @cached_property
    def bos(self) -> int | None:
        return self._token(self._c.llama_vocab_bos)

    @cached_property
    def eos(self) -> int | None:
        return self._token(self._c.llama_vocab_eos)

    @cached_property
    def add_bos(self) -> bool:
        """Whether a prompt starts with BOS when specials are added."""
        return self._c.llama_vocab_get_add_bos(self._vocabulary)

    @cached_property
    def add_eos(self) -> bool:
        return self._c.llama_vocab_get_add_eos(self._vocabulary)

    @cached_property
    def eog(self) -> frozenset[int]:
        """Tokens that end a generation."""
        vocabulary, is_eog = self._vocabulary, self._c.llama_vocab_is_eog
        return frozenset(token for token in range(self.n_vocab) if is_eog(vocabulary, token))

    def is_eog(self, token: int) -> bool:
        """Whether a token ends a generation."""
        return self._c.llama_vocab_is_eog(self._vocabulary, token)

    def _token(self, function: Any) -> int | None:
        token = function(self._vocabulary)
        return None if token == self._c.LLAMA_TOKEN_NULL else token

    def chat_template(self) -> str | None:
        """The Jinja template the model carries, or None."""
        template = self._c.llama_model_chat_template(self.pointer, None)
        return None if template is None else template.decode("utf-8", "replace")

    def token_text(self, token: int) -> str:
        """A token's spelling in the vocabulary ("<|im_end|>", "Ġthe")."""
        self.check_tokens([token])
        return self._c.llama_vocab_get_text(self._vocabulary, token).decode("utf-8", "replace")

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of a text. add_special: with the BOS/EOS that the model wants; parse_special: text may spell special tokens."""
        data = text.encode("utf-8")
        size = len(data) + 8
        for _ in range(2):
            tokens = (self._c.llama_token * size)()
            count = self._c.llama_tokenize(self._vocabulary, data, len(data), tokens, size, add_special, parse_special)
            if count >= 0:
                return list(tokens[:count])
            size = -count
        raise RuntimeFailure(f"{self.path}: llama.cpp cannot tokenize a text of {len(data):,} bytes. Split it into shorter parts.")

    def token_to_piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes a token stands for, possibly a part of a character. special: spell control tokens too, else they are empty."""
        self.check_tokens([token])
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self._c.llama_token_to_piece(self._vocabulary, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def detokenize(self, tokens: TokenIds, *, special: bool = False) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD. special: spell control tokens too."""
        ids = self.check_tokens(tokens)
        size = 8 * len(ids) + 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            count = self._c.llama_detokenize(self._vocabulary, pointer, len(ids), buffer, size, False, special)
            if count >= 0:
                return buffer.raw[:count].decode("utf-8", "replace")
            size = -count

    def check_tokens(self, tokens: TokenIds) -> npt.NDArray[np.int32]:
        """Token ids as int32, every one within the vocabulary. Raises UsageError naming the first that is not."""
        return checked_ids(tokens, n_vocab=self.n_vocab, path=self.path)


class LlamaAdapter:
    """A LoRA adapter in a model's memory, on no context yet: see `LlamaContext.set_adapters`."""

    def __init__(self, model: LlamaModel, path: Path, pointer: Any) -> None:
        self.model, self.path = model, path
        self._open: Any = pointer
        self._free = weakref.finalize(self, _free_adapter, model._c, pointer, model)
        model._adapters.add(self)

    @classmethod
    def load(cls, model: LlamaModel, path: Path) -> LlamaAdapter:
        """Load a GGUF adapter. Check it with `edgeq.runtime.adapter_file` first: llama.cpp ends the process on some bad ones.

        Raises RuntimeFailure with llama.cpp's own words for a file that it refuses.
        """
        with model.lock, captured() as lines:
            pointer = model._c.llama_adapter_lora_init(model.pointer, str(path).encode())
        if not pointer:
            raise RuntimeFailure(f"{path}: llama.cpp cannot load this adapter. It said: {said(lines)}")
        return cls(model, path, pointer)

    def close(self) -> None:
        """Free the adapter. Raises RuntimeFailure while a context uses it, which would read freed memory. Closing twice is fine."""
        if any(self in context.adapters for context in self.model._contexts):
            raise RuntimeFailure(f"{self.path}: the adapter is in use. Set another one first.")
        self._open = None
        self._free()

    @property
    def pointer(self) -> Any:
        if self._open is None:
            raise RuntimeFailure(f"{self.path}: the adapter was unloaded. Load it again.")
        return self._open


NO_GPU_BUILD = (
    "the installed llama-cpp-python was built without GPU support. Build it with: "
    'CMAKE_ARGS="-DGGML_CUDA=on" pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python'
)


def _free_adapter(c: ModuleType, pointer: Any, model: LlamaModel) -> None:
    """Holding the model here keeps it until its adapters are gone: with it llama.cpp frees what is left of them."""
    with model.lock:
        c.llama_adapter_lora_free(pointer)
