"""Scoring in a child process: an abort() inside a runtime, which no Python can catch, then costs a message and not the export.

    with ScoringWorker(path, n_ctx=512) as worker:
        ids = worker.tokenize("Hello", add_special=True)
        logits = worker.logits(ids)

Logits come through a file that child and parent share: memory without a name on Linux, else an unlinked temporary file, so nothing is
left behind however either process ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from edgeq.errors import UsageError
from edgeq.runtime.adapter_formats import check_base, read_adapter
from edgeq.runtime.child import Child, ignore
from edgeq.runtime.closing import Closing
from edgeq.runtime.engine import read_facts, runtime_of

CHILD = "edgeq.runtime._scoring_child"
PATIENCE_S = 600.0

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ArtifactFacts:
    """What its runtime says about the artifact. bos, eos: their ids, or None; bos_text, eos_text: their spelling, or None.

    library: what ran it ("llama-cpp-python 0.3.36", "onnxruntime 1.32.0"), on `threads` threads.
    """

    architecture: str
    n_vocab: int
    n_ctx_train: int
    bos: int | None
    eos: int | None
    bos_text: str | None
    eos_text: str | None
    chat_template: str | None
    threads: int
    library: str


class ScoringWorker(Closing):
    """One artifact in its runtime, in a process of its own, on the CPU.

    adapter: file of one to have beside it. n_ctx: tokens of the longest window. n_ubatch: tokens computed together. threads: default is
    every core this process may use. patience_s: how long the child may be silent before it counts as hung; it reports after every n_ubatch
    tokens.

    Raises RuntimeFailure when the child dies or hangs, with the runtime's last words, after which the worker is closed; and what
    loading raises (SourceError, UnsupportedError, MissingDependency; AdapterError for an adapter that is broken or for another model,
    UsageError for an aLoRA). Not for use by two threads at once.
    """

    def __init__(
        self,
        artifact: Path,
        *,
        n_ctx: int,
        adapter: Path | None = None,
        threads: int | None = None,
        n_ubatch: int = 512,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.artifact = Path(artifact)
        if adapter is not None:
            facts = read_facts(self.artifact)
            file = read_adapter(adapter, facts)
            check_base(file, facts)
            if file.invocation:
                raise UsageError(f"{adapter}: an aLoRA acts from its invocation tokens on. It cannot be measured on plain text.")
        self._logits_file = _anonymous_file()
        try:
            handle = self._logits_file.fileno()
            subject, runtime = str(self.artifact), runtime_of(self.artifact)
            self._child = Child(CHILD, subject, runtime=runtime, arguments=[str(handle)], inherit=[handle], patience_s=patience_s)
        except BaseException:
            self._logits_file.close()
            raise
        files = {"artifact": str(self.artifact), "adapter": None if adapter is None else str(adapter)}
        request = {"op": "load", **files, "n_ctx": n_ctx, "threads": threads, "n_ubatch": n_ubatch}
        try:
            self.facts = ArtifactFacts(**self._child.ask(request, doing="loading it"))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the child and free what it shared; closing twice is fine."""
        self._child.close()
        self._logits_file.close()

    @property
    def pid(self) -> int:
        return self._child.pid

    def peak_rss_bytes(self) -> int | None:
        """The most memory the child had resident so far."""
        return self._child.ask({"op": "peak_rss"})

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        request = {"op": "tokenize", "text": text, "add_special": add_special, "parse_special": parse_special}
        return self._child.ask(request, doing=f"tokenizing {len(text):,} characters")

    def logits(self, ids: Sequence[int], *, on_tokens: Callable[[int], None] = ignore) -> Floats:
        """Logits at every position of a text on its own, (n_tokens, n_vocab).

        A read-only view of shared memory that the next call overwrites. on_tokens is told how many tokens are done.
        """
        n_tokens = self._child.ask({"op": "logits", "ids": _plain(ids)}, doing=_scoring(ids), on_progress=on_tokens)
        shape = (n_tokens, self.facts.n_vocab)
        if not n_tokens:
            return np.empty(shape, dtype=np.float32)
        shared = mmap.mmap(self._logits_file.fileno(), 4 * shape[0] * shape[1], access=mmap.ACCESS_READ)
        return np.frombuffer(shared, dtype=np.float32).reshape(shape)

    def nll(self, ids: Sequence[int], *, on_tokens: Callable[[int], None] = ignore) -> Doubles:
        """-log p of tokens 1.. of a text on its own, each given those before it, (n_tokens - 1,) in nats. No logits are moved."""
        nll = self._child.ask({"op": "nll", "ids": _plain(ids)}, doing=_scoring(ids), on_progress=on_tokens)
        return np.asarray(nll, dtype=np.float64)

    def continuation_nll(self, ids: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Doubles]:
        """-log p of every token of each continuation of a text of at least one token, given what stands before it, in nats."""
        request = {"op": "continuations", "ids": _plain(ids), "continuations": [_plain(part) for part in continuations]}
        found = self._child.ask(request, doing=f"scoring {len(continuations)} continuations of {len(ids)} tokens")
        return [np.asarray(nll, dtype=np.float64) for nll in found]

    def generate(self, ids: Sequence[int], *, max_tokens: int, one_line: bool = False) -> str:
        """The likeliest continuation of a text of at least one token, up to an end token. one_line: its first line with text in it."""
        request = {"op": "generate", "ids": _plain(ids), "max_tokens": max_tokens, "one_line": one_line}
        return self._child.ask(request, doing=f"continuing {len(ids)} tokens")


def _anonymous_file() -> IO[bytes]:
    """A file without a name, which lasts as long as someone holds it."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("edgeq-logits"), "w+b")
    return tempfile.TemporaryFile()


def _scoring(ids: Sequence[int]) -> str:
    return f"scoring {len(ids)} tokens"


def _plain(ids: Sequence[int]) -> list[int]:
    return np.asarray(ids, dtype=np.int64).tolist()
