"""llama.cpp through the low-level functions of llama-cpp-python, made safe to call.

What C code would answer with an abort is refused here in Python: files whose header does not hold together, token ids out of range,
batches beyond the batch size, positions beyond the context. What llama.cpp says goes to this module's logger and into the
`RuntimeFailure` of a call that failed; nothing is printed.

    with LlamaModel.load(path) as model, LlamaContext(model, n_ctx=2048) as context:
        logits = context.decode(model.tokenize("Hello", add_special=True))[-1]

A model or context is closed by `close()`, by its `with` block or when it is dropped; closing twice is fine, using it afterwards is
a RuntimeFailure. One context must not be used by two threads at once.
"""

from __future__ import annotations

import ctypes
import logging
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import psutil

from edgeq.errors import MissingDependency, PlanError, RuntimeFailure, UsageError
from edgeq.grids import grid
from edgeq.runtime.closing import Closing, Shared
from edgeq.runtime.cores import usable_cores
from edgeq.runtime.gguf_facts import GgufFacts, read_facts
from edgeq.runtime.memory import kv_bytes
from edgeq.runtime.token_ids import TokenIds, checked_ids

Floats = npt.NDArray[np.float32]

KV_TYPES = ("f16", "f32", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
ALL_LAYERS = 1 << 30
_LOGITS_CHUNK = 1 << 25  # values of logits that may exist at once while a long text is scored: 128 MiB

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
def _captured() -> Iterator[deque[tuple[int, str]]]:
    lines: deque[tuple[int, str]] = deque(maxlen=400)
    _log.captures.append(lines)
    try:
        yield lines
    finally:
        _log.captures.remove(lines)


def _errors(lines: deque[tuple[int, str]], count: int = 3) -> str:
    """The last error lines of a capture, else its last lines of any kind, on one line."""
    said = [line for level, line in lines if level >= _ERROR] or [line for _, line in lines]
    return " | ".join(said[-count:]) or "nothing"


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
        with _captured() as lines:
            pointer = c.llama_model_load_from_file(str(path).encode(), params)
        if not pointer:
            raise RuntimeFailure(f"{path}: llama.cpp cannot load it. It said: {_errors(lines)}")
        return cls(pointer, facts, c, gpu_layers=gpu_layers, vocab_only=vocab_only, mapped=use_mmap)

    def grammar_sampler(self, grammar: str) -> Any:
        """A sampler that holds answers to a GBNF grammar with a rule "root", for its caller to free. Raises UsageError."""
        with _captured() as lines:
            sampler = self._c.llama_sampler_init_grammar(self._vocabulary, grammar.encode(), b"root")
        if not sampler:
            raise UsageError(f"llama.cpp does not take the grammar. It said: {_errors(lines)}")
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
        with model.lock, _captured() as lines:
            pointer = model._c.llama_adapter_lora_init(model.pointer, str(path).encode())
        if not pointer:
            raise RuntimeFailure(f"{path}: llama.cpp cannot load this adapter. It said: {_errors(lines)}")
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


@dataclass(frozen=True)
class State:
    """What a context remembers: the number of tokens in its cache, and llama.cpp's bytes. For use within one process."""

    n_past: int
    data: bytes


class LlamaContext(Closing):
    """A KV cache for one sequence, and the means to fill it; or room for several (`edgeq.runtime.lanes`).

    n_ctx: tokens that fit, of each of n_seq sequences (llama.cpp rounds its cells up to a multiple of 256). n_batch: most tokens per
    llama_decode; longer input is split. n_ubatch: most tokens computed together. threads: default is every core this process may use.
    kv_type: number format of keys and values, one of KV_TYPES. flash_attention: None leaves it to llama.cpp.
    max_outputs: most logits rows that one decode may return (default n_batch); llama.cpp reserves memory for that many.
    """

    def __init__(
        self,
        model: LlamaModel,
        *,
        n_ctx: int,
        n_batch: int = 512,
        n_ubatch: int = 512,
        threads: int | None = None,
        kv_type: str = "f16",
        flash_attention: bool | None = None,
        max_outputs: int | None = None,
        n_seq: int = 1,
    ) -> None:
        if model.vocab_only:
            raise UsageError(f"{model.path} was loaded with vocab_only, without weights. Load it in full to decode.")
        threads = usable_cores() if threads is None else threads
        for name, value in (("n_ctx", n_ctx), ("n_batch", n_batch), ("n_ubatch", n_ubatch), ("threads", threads), ("n_seq", n_seq)):
            if value < 1:
                raise UsageError(f"{name} is {value}; expected at least 1")
        self.model, self.n_ctx, self.threads, self.kv_type, self.n_seq = model, n_ctx, threads, kv_type, n_seq
        self.n_batch = max(min(n_batch, n_ctx * n_seq), n_seq)
        self.n_ubatch = min(n_ubatch, self.n_batch)
        self.max_outputs = min(max_outputs or self.n_batch, self.n_batch)
        self._c = model._c
        pointer = self._create(flash_attention)
        self._open: int | None = pointer
        self._memory = self._c.llama_get_memory(pointer)
        self._batch = Batch(self._c, self.n_batch)
        self._n_past = 0
        self.adapters: Mapping[LlamaAdapter, float] = {}
        self._free = weakref.finalize(self, _free_context, self._c, pointer, model)
        model._contexts.add(self)

    def _create(self, flash_attention: bool | None) -> int:
        c, model = self._c, self.model
        params = c.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = self._cells, self.n_batch, self.n_ubatch
        params.n_seq_max, params.kv_unified = self.n_seq, False  # each sequence has cells of its own
        params.n_outputs_max = self.max_outputs
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k = params.type_v = _kv_id(model, self._cells, self.kv_type, flash_attention)
        params.flash_attn_type = {
            None: c.LLAMA_FLASH_ATTN_TYPE_AUTO,
            True: c.LLAMA_FLASH_ATTN_TYPE_ENABLED,
            False: c.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        }[flash_attention]
        params.swa_full = False  # windowed layers keep a window's worth of cells, not n_ctx
        params.offload_kqv = params.op_offload = bool(model.gpu_layers)
        with _captured() as lines:
            pointer = c.llama_init_from_model(model.pointer, params)
        if not pointer:
            raise RuntimeFailure(
                f"{model.path}: llama.cpp cannot make a context of {self.n_ctx} tokens with {self.kv_type} keys and values. "
                f"It said: {_errors(lines)}"
            )
        return pointer

    @property
    def _cells(self) -> int:
        """Of all sequences; llama.cpp gives each a multiple of 256."""
        return self.n_ctx if self.n_seq == 1 else self.n_seq * -(-self.n_ctx // 256) * 256

    @property
    def memory(self) -> Any:
        """llama.cpp's handle of the cache."""
        return self._memory

    def close(self) -> None:
        self._open, self.adapters = None, {}
        self._free()

    @property
    def pointer(self) -> int:
        """llama.cpp's handle."""
        if self._open is None:
            raise RuntimeFailure(f"{self.model.path}: the context is closed. Make a new one.")
        return self._open

    def _check_open(self) -> None:
        assert self.pointer

    @property
    def n_past(self) -> int:
        """Tokens in the cache."""
        return self._n_past

    def set_adapters(self, scales: Mapping[LlamaAdapter, float]) -> None:
        """Let these adapters, times their scales, act on what is decoded from now on; none for an empty mapping.

        The cache stays as it is: keys and values in it were computed under the adapters of their time. Another set of adapters than
        before costs the next decode a new reservation of its graph.
        """
        for adapter, scale in scales.items():
            if adapter.model is not self.model:
                raise UsageError(f"{adapter.path}: the adapter was loaded for another model")
            if not math.isfinite(scale):
                raise UsageError(f"{adapter.path}: the adapter's scale is {scale}; expected a finite number")
        c, n = self._c, len(scales)
        pointers = (c.llama_adapter_lora_p_ctypes * n)(*(adapter.pointer for adapter in scales))
        status = c.llama_set_adapters_lora(self.pointer, pointers, n, (ctypes.c_float * n)(*scales.values()))
        if status:
            raise RuntimeFailure(f"{self.model.path}: llama.cpp cannot set {n} adapters (status {status})")
        self.adapters = dict(scales)

    def clear(self) -> None:
        """Empty the cache."""
        self._check_open()
        self._c.llama_memory_clear(self._memory, False)
        self._n_past = 0

    def truncate(self, n_tokens: int) -> int:
        """Forget what follows the first `n_tokens` tokens; returns how many are left.

        That is fewer (0) when a sliding window has already dropped cells that the remaining tokens would look back at.
        """
        self._check_open()
        if not 0 <= n_tokens <= self._n_past:
            raise UsageError(f"cannot keep {n_tokens} tokens of the {self._n_past} in the cache")
        if n_tokens == self._n_past:
            return n_tokens
        window = self.model.n_window
        if n_tokens and window and self._c.llama_memory_seq_pos_min(self._memory, 0) > max(0, n_tokens - window):
            n_tokens = 0
        if n_tokens and self._c.llama_memory_seq_rm(self._memory, 0, n_tokens, -1):
            self._n_past = n_tokens
        else:
            self.clear()
        return self._n_past

    def decode(self, tokens: TokenIds, *, outputs: Literal["last", "all"] = "last") -> Floats:
        """Append tokens to the sequence and return their logits.

        Returns float32 (1, n_vocab) for the last token, or (n_tokens, n_vocab): a view of llama.cpp's memory, good until the next
        call on this context. With outputs="all" at most `max_outputs` tokens; `logits_of` takes more.
        Raises UsageError for ids out of range, no tokens, or more than fit (the cache is then as before); RuntimeFailure when
        llama.cpp fails, after dropping what it had taken.
        """
        pointer, ids = self.pointer, self.model.check_tokens(tokens)
        if not ids.size:
            raise UsageError("no tokens to decode; give at least one")
        if self._n_past + ids.size > self.n_ctx:
            raise UsageError(
                f"{ids.size} tokens after the {self._n_past} in the cache exceed the context of {self.n_ctx}. Use a larger n_ctx."
            )
        if outputs == "all" and ids.size > self.max_outputs:
            raise UsageError(f"logits of {ids.size} tokens were asked for at once, at most {self.max_outputs} are possible. Use logits_of.")
        for start in range(0, ids.size, self.n_batch):
            chunk = ids[start : start + self.n_batch]
            last = start + len(chunk) == ids.size
            self._decode_batch(chunk, "all" if outputs == "all" else "last" if last else "none")
        n_outputs = ids.size if outputs == "all" else 1
        return np.ctypeslib.as_array(self._c.llama_get_logits(pointer), shape=(n_outputs, self.model.n_vocab))

    def _check_room(self, n_tokens: int) -> None:
        if self._n_past + n_tokens > self.n_ctx:
            raise UsageError(
                f"{n_tokens} tokens after the {self._n_past} in the cache exceed the context of {self.n_ctx}. Use a larger n_ctx."
            )

    def _decode_batch(self, ids: npt.NDArray[np.int32], outputs: Literal["last", "all", "none"]) -> None:
        with _captured() as lines:
            status = self._c.llama_decode(self.pointer, self._batch.filled(ids, self._n_past, outputs))
        if status:
            self._c.llama_memory_seq_rm(self._memory, 0, self._n_past, -1)
            meaning = {1: "no room in the KV cache", 2: "stopped", -1: "bad input"}.get(status, "computation failed")
            raise RuntimeFailure(
                f"{self.model.path}: llama_decode of {len(ids)} tokens failed with {status} ({meaning}). It said: {_errors(lines)}"
            )
        self._n_past += len(ids)

    def greedy_stepper(self, n_steps: int) -> Callable[[int], int]:
        """A function that appends one token and returns the likeliest next one, for loops whose overhead matters.

        Room for n_steps tokens is checked once, here; the argument must be a token of the vocabulary and is not checked. numpy's
        argmax takes 4 us for 49,152 logits; llama.cpp's greedy sampler, which first lists all candidates, takes 100 us.
        Raises UsageError when n_steps tokens do not fit.
        """
        self._check_room(n_steps)
        pointer, decode, logits_of_last = self.pointer, self._c.llama_decode, self._c.llama_get_logits
        batch = self._batch.filled(np.zeros(1, dtype=np.int32), self._n_past, "last")
        tokens, positions, shape = self._batch.tokens, self._batch.positions, (self.model.n_vocab,)
        address, logits = 0, np.empty(shape, dtype=np.float32)

        def step(token: int) -> int:
            nonlocal address, logits
            tokens[0] = token
            positions[0] = self._n_past
            if status := decode(pointer, batch):
                raise RuntimeFailure(f"{self.model.path}: llama_decode failed with {status} at position {self._n_past}")
            self._n_past += 1
            found = logits_of_last(pointer)  # waits for the device
            if (now := ctypes.addressof(found.contents)) != address:
                address, logits = now, np.ctypeslib.as_array(found, shape=shape)
            return int(logits.argmax())

        return step

    def iter_logits(self, tokens: TokenIds, *, keep: bool = False) -> Iterator[tuple[int, Floats]]:
        """Logits of a text on its own, in pieces: (position of the first row, float32 (rows, n_vocab)), a view as in `decode`.

        The cache is emptied first and holds the text afterwards. keep: the text goes on from what the cache holds instead; positions
        are still those within `tokens`.
        """
        self._check_open()
        ids = self.model.check_tokens(tokens)
        before = self._n_past if keep else 0
        if before + ids.size > self.n_ctx:
            raise UsageError(f"{before + ids.size} tokens exceed the context of {self.n_ctx}. Use a larger n_ctx or fewer tokens.")
        if not keep:
            self.clear()
        step = min(self.n_ubatch, self.max_outputs, max(1, _LOGITS_CHUNK // self.model.n_vocab))
        for start in range(0, ids.size, step):
            yield start, self.decode(ids[start : start + step], outputs="all")

    def logits_of(self, tokens: TokenIds, out: Floats | None = None) -> Floats:
        """Logits at every position of a text on its own, float32 (n_tokens, n_vocab), in `out` when given.

        The cache is emptied first and holds the text afterwards.
        """
        self._check_open()
        shape = (len(tokens), self.model.n_vocab)
        if out is None:
            out = np.empty(shape, dtype=np.float32)
        elif out.shape != shape or out.dtype != np.float32:
            raise UsageError(f"out is {out.dtype} of shape {list(out.shape)}, expected float32 of shape {list(shape)}")
        for start, logits in self.iter_logits(tokens):
            out[start : start + len(logits)] = logits
        return out

    def state(self) -> State:
        """The cache and the last logits, for `restore` on a context of the same shape."""
        size = self._c.llama_state_get_size(self.pointer)
        buffer = (ctypes.c_uint8 * size)()
        written = self._c.llama_state_get_data(self.pointer, buffer, size)
        return State(n_past=self._n_past, data=bytes(buffer)[:written])

    def restore(self, state: State) -> None:
        """Bring back what `state` saved. Raises RuntimeFailure when it came from another model or another kind of context."""
        buffer = (ctypes.c_uint8 * len(state.data)).from_buffer_copy(state.data)
        with _captured() as lines:
            read = self._c.llama_state_set_data(self.pointer, buffer, len(state.data))
        if read != len(state.data):
            self.clear()
            raise RuntimeFailure(f"{self.model.path}: this state does not fit the context. llama.cpp said: {_errors(lines)}")
        self._n_past = state.n_past


class Batch:
    """A llama_batch over memory of our own, filled in place. Each token is of one sequence."""

    def __init__(self, c: ModuleType, size: int) -> None:
        self.tokens = np.zeros(size, dtype=np.int32)
        self.positions = np.zeros(size, dtype=np.int32)
        self.wanted = np.zeros(size, dtype=np.int8)
        self._counts = np.ones(size, dtype=np.int32)
        self.sequences = np.zeros(size, dtype=np.int32)
        ints = ctypes.POINTER(ctypes.c_int32)
        first = self.sequences.ctypes.data
        self._sequences = (ints * size)(*(ctypes.cast(first + 4 * i, ints) for i in range(size)))
        self.c = c.llama_batch(
            n_tokens=0,
            token=self.tokens.ctypes.data_as(ints),
            embd=None,
            pos=self.positions.ctypes.data_as(ints),
            n_seq_id=self._counts.ctypes.data_as(ints),
            seq_id=self._sequences,
            logits=self.wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def filled(self, ids: npt.NDArray[np.int32], start: int, outputs: Literal["last", "all", "none"], sequence: int = 0) -> Any:
        n = len(ids)
        assert 0 < n <= len(self.tokens)
        self.tokens[:n], self.sequences[:n] = ids, sequence
        self.positions[:n] = np.arange(start, start + n)
        self.wanted[:n] = outputs == "all"
        self.wanted[n - 1] = outputs != "none"
        self.c.n_tokens = n
        return self.c


NO_GPU_BUILD = (
    "the installed llama-cpp-python was built without GPU support. Build it with: "
    'CMAKE_ARGS="-DGGML_CUDA=on" pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python'
)


def _free_context(c: ModuleType, pointer: int, _model: LlamaModel) -> None:
    """Holding the model here keeps it until its context is gone, in whatever order both are dropped."""
    c.llama_free(pointer)


def _free_adapter(c: ModuleType, pointer: Any, model: LlamaModel) -> None:
    """Holding the model here keeps it until its adapters are gone: with it llama.cpp frees what is left of them."""
    with model.lock:
        c.llama_adapter_lora_free(pointer)


def _kv_id(model: LlamaModel, n_ctx: int, kv_type: str, flash_attention: bool | None) -> int:
    """ggml's id of a KV type, checked against the model and the machine's memory."""
    facts = model.facts
    if kv_type not in KV_TYPES:
        raise UsageError(f"kv_type {kv_type!r} is not known; expected one of {', '.join(KV_TYPES)}")
    kv_grid = grid(kv_type.upper())
    if not kv_grid.is_float and flash_attention is False:
        raise UsageError(f"kv_type {kv_type} needs flash attention. Leave it on or use f16.")
    if not kv_grid.fits(facts.key_length):
        raise UsageError(
            f"{facts.path.name}: heads of {facts.key_length} do not divide into {kv_grid.name} blocks of {kv_grid.block_size}. "
            "Use kv_type f16."
        )
    # llama.cpp would fill gigabytes before it finds that a cache does not fit.
    needed, total = kv_bytes(facts, n_ctx, kv_type), psutil.virtual_memory().total
    if not model.gpu_layers and needed > total:
        raise PlanError(
            f"{facts.path}: {n_ctx} tokens of context need {needed / 1e9:.1f} GB of keys and values, "
            f"this machine has {total / 1e9:.1f} GB. Use a smaller n_ctx."
        )
    return kv_grid.id
