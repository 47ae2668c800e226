"""A loaded package on a device: generate, chat, score, report memory.

    with load("build/demo") as session:
        for piece in session.stream("The capital of France is", max_tokens=16):
            print(piece, end="")

The cache of keys and values survives between calls: a prompt that starts like the text before it pays only for what is new.
A session serves one call at a time: another thread waits for its turn, and the thread of an unfinished stream is told to finish it.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgeq.adapter_records import find_adapter, package_adapters
from edgeq.errors import ContextOverflow, PackageError, RuntimeFailure, TokenizerError, UsageError
from edgeq.package import Package
from edgeq.patch_file import read_patch
from edgeq.runtime.adapter_pool import DEFAULT_BUDGET, AdapterCut, AdapterPool
from edgeq.runtime.adapters import ActiveAdapters, AdapterChoice, AdapterInfo, Cell, Request, Segment, grouped, scales_of
from edgeq.runtime.answer import Answer, Completion, Timings
from edgeq.runtime.closing import Closing
from edgeq.runtime.cut_cache import cached_cut, cached_model, process_cuts
from edgeq.runtime.device import parse_device
from edgeq.runtime.elastic_package import ElasticPackage, Size, open_elastic
from edgeq.runtime.engine import Facts, Model, default_kv_type, kv_bytes, load_model, new_context, no_patches, open_artifact, read_facts
from edgeq.runtime.fitting import fitting_size
from edgeq.runtime.grammar import check_grammar, gbnf
from edgeq.runtime.llama import LlamaModel
from edgeq.runtime.memory import Memory, process_memory
from edgeq.runtime.patch import Patches
from edgeq.runtime.sampling import Sampler, Sampling

MAX_DEFAULT_N_CTX = 4096
EXACT_STEP = 512  # a batch of llama.cpp's; see `Session.exact`
_SCORE_ROWS = 64  # logits rows a session asks for at once: llama.cpp reserves memory for that many

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A prompt in tokens, and how to answer it. budget: most tokens that the answer may have."""

    ids: list[int]
    budget: int
    sampling: Sampling
    stops: tuple[str, ...]
    stop_tokens: frozenset[int]

    def answer(self, model: Model) -> Answer:
        return Answer(model, budget=self.budget, stops=self.stops, stop_tokens=self.stop_tokens)


class Stream(Iterator[str]):
    """Text pieces of a running generation. `completion` is None until the last piece has been taken. Closing it early frees the session."""

    def __init__(self, pieces: Generator[str, None, Completion], cancelled: threading.Event) -> None:
        self._pieces, self._cancelled = pieces, cancelled
        self.completion: Completion | None = None

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            if end.value is not None:
                self.completion = end.value
            raise StopIteration from None

    def cancel(self) -> None:
        """From any thread: let the generation end before its next token; it then has a completion, which says so."""
        self._cancelled.set()

    def close(self) -> None:
        self._pieces.close()


def load(
    path: Path | str,
    *,
    rate: float | Literal["auto"] | None = None,
    adapter: AdapterChoice = None,
    adapter_budget: int = DEFAULT_BUDGET,
    patchable: bool = False,
    n_ctx: int | None = None,
    threads: int | None = None,
    kv_type: str | None = None,
    device: str = "cpu",
) -> Session:
    """Load a package folder, a GGUF file or an ONNX folder for generation.

    rate: cut an elastic package by this much, in memory; "auto" takes the smallest rate that fits the memory free now; None takes the
    file as it is. adapter: the package's adapter of this name, or the GGUF adapter of this path, or several of them with their scales;
    see `Session.set_adapter`. adapter_budget: bytes that adapters may take in memory. patchable: read the weights into memory instead of
    mapping them, so that patches can be applied. n_ctx: tokens of context; by default what the package was planned for, else the model's
    own up to 4096. kv_type: of the cache; by default what the package was planned for, else f16; an ONNX graph has one, and no choice.
    threads: by default every core this process may use. device: "cpu", "cuda" or "cuda:N".
    Raises PackageError, SourceError, UnsupportedError, RuntimeFailure or MissingDependency; PlanError for a rate outside 0 to 0.35, or
    when not even the smallest cut fits; as `set_adapter` for the adapter.
    """
    artifact, package = open_artifact(Path(path))
    gpu = parse_device(device)
    facts = read_facts(artifact)
    planned = None if package is None else package.manifest["export"].get("kv_type")
    n_ctx, kv_type = n_ctx or default_n_ctx(facts, package), kv_type or default_kv_type(facts, planned)
    source = _Source(path=Path(path), artifact=artifact, package=package, gpu=gpu, threads=threads, patchable=patchable)
    size = None
    if rate == "auto":
        if gpu is not None:
            raise UsageError('rate="auto" looks at the memory of this computer, not at that of a GPU. Give a rate as a number.')
        size = fitting_size(source.elastic, facts, n_ctx=n_ctx, kv_type=kv_type)
    elif rate is not None and (rate or source.is_elastic):
        size = source.elastic.at_rate(rate)
    elif source.is_elastic:
        size = source.elastic.at_steps(0)
    model = source.load(size, adapted=bool(scales_of(adapter)))
    try:
        session = Session(model, n_ctx=n_ctx, threads=threads, kv_type=kv_type, source=source, size=size, adapter_budget=adapter_budget)
        session._open_adapters(adapter)
        return session
    except BaseException:
        model.close()
        raise


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where a session's models come from, and where they go. path: as the user gave it. gpu: None for the CPU. patchable: not mapped."""

    path: Path
    artifact: Path
    package: Package | None
    gpu: int | None
    threads: int | None
    patchable: bool

    @property
    def is_elastic(self) -> bool:
        return self.package is not None and bool(self.package.manifest["export"].get("elastic"))

    @cached_property
    def elastic(self) -> ElasticPackage:
        return open_elastic(self.path)

    def load(self, size: Size | None, *, adapted: bool) -> Model:
        """The artifact, or a cut of it, which other sessions may use as well unless it can be patched. adapted: see `load_model`."""

        def load(path: Path, *, stays: bool = False) -> Model:
            return load_model(path, gpu=self.gpu, threads=self.threads, patchable=self.patchable, adapted=adapted, stays=stays)

        if size is None or not size.n_steps:
            return load(self.artifact, stays=True)
        return load(cached_cut(self.elastic, size).path) if self.patchable else cached_model(self.elastic, size, self.gpu, load)

    def adapter_cut(self, size: Size | None) -> AdapterCut | None:
        """What brings adapters of the artifact to a size of it; None where nothing is cut."""
        if size is None or not size.n_steps:
            return None
        return lambda path: self.elastic.cut_adapter_to_memory(path, size)


def default_n_ctx(facts: Facts, package: Package | None) -> int:
    """The context a package was planned for, else the model's own up to MAX_DEFAULT_N_CTX tokens."""
    planned = package.manifest["export"].get("n_ctx") if package is not None else None
    return planned or min(facts.n_ctx_train, MAX_DEFAULT_N_CTX)


class Session(Closing):
    """A model with a context. Made by `load`; owns the model and closes it. source, size: for models that can be cut.

    exact: compute a prompt's tokens in the same batches whatever is cached, so that an answer does not depend on what came before: kernels
    round a token's sums otherwise when others stand beside it. Less is reused then: whole runs of EXACT_STEP tokens of earlier prompts,
    and nothing that was generated.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int,
        threads: int | None = None,
        kv_type: str | None = None,
        source: _Source | None = None,
        size: Size | None = None,
        adapter_budget: int = DEFAULT_BUDGET,
    ) -> None:
        self.model = model
        self._source, self._size = source, size
        self.context = new_context(model, n_ctx=n_ctx, threads=threads, kv_type=kv_type, max_outputs=_SCORE_ROWS)
        self.last: Completion | None = None
        cut = None if source is None else source.adapter_cut(size)
        self._active = ActiveAdapters(AdapterPool(model, budget_bytes=adapter_budget, cut=cut), self.context)
        self._patches: Patches | None = None
        self._cached: list[Cell] = []
        self._n_prefilled = 0  # tokens of the cache that were computed as parts of a prompt
        self.exact = False
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._stream: Callable[[], Stream | None] = lambda: None  # the last stream, while someone still holds it
        self._closed = False

    @property
    def n_ctx(self) -> int:
        return self.context.n_ctx

    @property
    def rate(self) -> float | None:
        """The rate that this model is cut by, as asked for; None for a file that does not say."""
        return self._stated("rate") if self._size is None else self._size.rate

    @property
    def removed_fraction(self) -> float | None:
        """Fraction of block parameters that are gone; None for a file that does not say."""
        return self._stated("removed_fraction") if self._size is None else self._size.removed_fraction

    def _stated(self, key: str) -> float | None:
        package = None if self._source is None else self._source.package
        return None if package is None else package.manifest["export"].get(key)

    def set_rate(self, rate: float) -> None:
        """Cut the package by another rate, in memory, and go on with that model: same context, threads and cache type, an empty cache.

        While it is loaded both models take memory. A rate that comes to the size of now changes nothing but `rate`. Adapters stay, cut as
        the model is; a model with patches is refused. When anything fails, the session stays as it was. Raises PlanError for a rate
        outside 0 to 0.35, PackageError for a model that is not elastic, and as `load` and `set_adapter`.
        """
        self._check_open()
        if self._source is None:
            raise PackageError(f"{self.model.path}: this session knows of no package. Open it with edgeq.load.")
        size = self._source.elastic.at_rate(rate)
        with self._turn():
            self._check_open()
            if self._size is None or size.n_steps != self._size.n_steps:
                if self.patches:
                    raise UsageError(f"patch {self.patches[0]!r} is for the size of now. Undo it before changing the rate.")
                model = self._source.load(size, adapted=bool(self._active.scales))
                try:
                    before = self.context
                    context = new_context(
                        model, n_ctx=before.n_ctx, threads=before.threads, kv_type=before.kv_type, max_outputs=_SCORE_ROWS
                    )
                    active = self._active.moved(model, context, self._source.adapter_cut(size))
                except BaseException:
                    model.close()
                    raise
                self._free()
                self.model, self.context, self._active = model, context, active
                self._cached, self._patches = [], None
            self._size = size

    @property
    def adapters(self) -> tuple[AdapterInfo, ...]:
        """The adapters that `set_adapter` knows: those of the package and those loaded beside them."""
        own = package_adapters(self._package) if self._package is not None else {}
        known = {name: file.path for name, file in self._active.pool.files.items()}
        scales, resident = self._active.scales, self._active.pool.resident
        paths = {name: self._package.folder / record.path for name, record in own.items() if self._package is not None} | known
        return tuple(AdapterInfo(name=name, path=path, scale=scales.get(name), resident=name in resident) for name, path in paths.items())

    @property
    def adapter_pool(self) -> AdapterPool:
        """The adapters' memory, with its counts of hits, misses and evictions."""
        return self._active.pool

    @property
    def _package(self) -> Package | None:
        return None if self._source is None else self._source.package

    def load_adapter(self, path: Path | str, name: str | None = None) -> str:
        """Make a GGUF adapter known under a name (by default the file's) and return that. It takes memory from its first use on.

        An adapter of the uncut model is cut as the session's model is. Raises AdapterError naming the first thing in which the file is
        broken or does not fit the model, UsageError for a name that is taken.
        """
        self._check_open()
        with self._turn():
            if name is not None and self._package is not None and name in package_adapters(self._package):
                raise UsageError(f"{self._package.folder} has an adapter named {name!r} itself. Choose another name.")
            return self._active.pool.add(Path(path), name)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter and free its memory. Raises UsageError when it is not known, or is set."""
        self._check_open()
        with self._turn():
            self._active.pool.remove(name)

    def set_adapter(self, adapter: AdapterChoice) -> None:
        """Answer with this adapter from here on: a name, several with scales ({"sql": 1.0, "tone": 0.5}), or None for the model alone.

        What is cached of earlier prompts is used again only where it was computed under the same adapters. When anything fails, the
        adapters before stay. Raises UsageError that lists what there is for an unknown name; AdapterError when the adapters do not fit
        the model or, together, the budget.
        """
        self._check_open()
        with self._turn():
            self._know(adapter)
            self._active.set(adapter)

    def _know(self, adapter: AdapterChoice) -> None:
        """Let the pool read those adapters of the package that are asked for the first time."""
        if self._package is not None:
            records = package_adapters(self._package)
            for name in scales_of(adapter):
                if name in records and name not in self._active.pool.files:
                    self._active.pool.add(find_adapter(self._package, name)[1], name)

    def know_package_adapters(self) -> None:
        """Read all adapters of the package, so that they are known by name. Raises AdapterError for one that does not fit."""
        self._check_open()
        with self._turn():
            if self._package is not None:
                self._know(dict.fromkeys(package_adapters(self._package), 1.0))

    def _open_adapters(self, adapter: AdapterChoice) -> None:
        """Set adapters that may be given by their files' paths too."""
        scales = {}
        for wanted, scale in scales_of(adapter).items():
            name, path = find_adapter(self._package, wanted)
            scales[self._active.pool.add(path, name)] = scale
        self._active.set(scales)

    @property
    def patches(self) -> tuple[str, ...]:
        """Names of the patches that are applied."""
        return () if self._patches is None else self._patches.applied

    def apply_patch(self, path: Path | str, name: str | None = None, *, scale: float = 1.0) -> str:
        """Change the model's weights by a sparse patch, and return its name; see `edgeq.runtime.patch`. Empties the cache.

        Needs a session opened with patchable=True. Raises UsageError and AdapterError; then nothing is changed.
        """
        self._check_open()
        patch = read_patch(Path(path))
        with self._turn():
            name = self._patched().apply(patch, name=name, scale=scale)
            self._cached = []
        return name

    def undo_patch(self, name: str) -> None:
        """Take a patch back, bit by bit. Empties the cache. Raises UsageError for one that is not applied."""
        self._check_open()
        with self._turn():
            self._patched().undo(name)
            self._cached = []

    def _patched(self) -> Patches:
        if not isinstance(self.model, LlamaModel):
            raise no_patches(self.model.path)
        if self._patches is None:
            self._patches = Patches(self.model)
        return self._patches

    def close(self) -> None:
        """Free model and context, ending this thread's unfinished stream. Closing twice is fine."""
        if self._closed:
            return
        stream = self._stream()
        if stream is not None and self._holder == threading.get_ident():
            stream.close()
        with self._turn():
            self._closed = True
            self._free()

    def _free(self) -> None:
        """Give up what is this session's own, and its share of the model."""
        self.context.close()
        self._active.pool.close()
        self.model.close()

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Stream:
        """Continue a prompt, piece by piece. Pieces are whole characters; joined they are `completion.text`.

        prompt: text (with the BOS the model wants; it may spell special tokens) or token ids. Options, all of them optional:
        max_tokens: None goes on until the model ends or the context is full. temperature 0 takes the likeliest token; top_k, top_p, min_p
        and seed shape a draw. stop: strings that end the text and are left out of it; stop_tokens: ids that do so. grammar (GBNF) or
        json_schema: the text is one that these allow; llama.cpp only. Raises UsageError at once for bad arguments and for a prompt that,
        with max_tokens, does not fit the context.
        """
        return self.answer(self.ask(prompt, **options))

    def answer(self, ask: Ask) -> Stream:
        """`stream`, of what `ask` has checked."""
        cancelled = threading.Event()
        stream = Stream(self._generate(ask, cancelled), cancelled)
        self._stream = weakref.ref(stream)
        return stream

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Completion:
        """Continue a prompt and return the whole result. Options and errors as for `stream`."""
        stream = self.stream(prompt, **options)
        for _ in stream:
            pass
        assert stream.completion is not None
        return stream.completion

    def ask(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
        grammar: str | None = None,
        json_schema: Mapping[str, Any] | None = None,
    ) -> Ask:
        """Check what `stream` was given, and turn it into what is generated from."""
        self._check_open()
        sampling = Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, grammar=self._grammar(grammar, json_schema)
        )
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(stops):
            raise UsageError("a stop string is empty; leave it out")
        if max_tokens is not None and max_tokens < 1:
            raise UsageError(f"max_tokens is {max_tokens}; expected at least 1")
        ends = frozenset(self.model.check_tokens(stop_tokens).tolist()) if len(stop_tokens) else frozenset()
        ids = self._prompt_ids(prompt)
        self._check_room(len(ids), max_tokens)
        budget = self.n_ctx - len(ids) + 1 if max_tokens is None else max_tokens
        return Ask(ids=ids, budget=budget, sampling=sampling, stops=stops, stop_tokens=ends)

    def _grammar(self, grammar: str | None, json_schema: Mapping[str, Any] | None) -> str | None:
        if grammar is None and json_schema is None:
            return None
        if grammar is not None and json_schema is not None:
            raise UsageError("a grammar and a JSON schema were given; an answer can follow one of them.")
        if not isinstance(self.model, LlamaModel):
            raise UsageError(f"{self.model.path}: ONNX Runtime cannot hold answers to a grammar. Use a GGUF package for that.")
        text = gbnf(json_schema) if grammar is None else grammar
        assert text is not None
        check_grammar(self.model, text)
        return text

    def generate_many(self, requests: Sequence[Request], *, slots: int = 1, **options: Any) -> list[Completion]:
        """Answer requests that want different adapters, in an order that switches as seldom as possible; results come in theirs.

        slots: how many of one set of adapters are computed together, see `edgeq.runtime.batcher`. Options as for `generate`, the same for
        all. The adapters set before are set again at the end.
        """
        if slots > 1:
            from edgeq.runtime.batcher import Batcher

            with Batcher(self, slots=slots, max_queue=max(1, len(requests))) as batcher:
                jobs = [batcher.submit(request.prompt, adapter=request.adapter, **options) for request in requests]
                return [job.result() for job in jobs]
        before, results = self._active.scales, {}
        now = tuple(before.items())
        try:
            for i in grouped(requests, now=now, resident=self._active.pool.resident):
                self.set_adapter(requests[i].adapter)
                results[i] = self.generate(requests[i].prompt, **options)
        finally:
            self.set_adapter(before)
        return [results[i] for i in range(len(requests))]

    def chat(self, messages: str | Messages, **options: Any) -> Completion:
        """Answer a conversation (or one user message) through the model's chat template. Options as for `generate`."""
        return self.generate(self.chat_prompt(messages), **options)

    def chat_prompt(self, messages: str | Messages) -> list[int]:
        """Token ids of a conversation up to where the assistant's answer begins, as the model's own template has it."""
        self._check_open()
        return self.model.tokenize(self.render_chat(messages), parse_special=True)

    def render_chat(self, messages: str | Messages) -> str:
        """A conversation in the model's own template. Raises TokenizerError when the model has none or it does not take these messages."""
        from edgeq.chat import render

        self._check_open()
        template = self.model.chat_template()
        if template is None:
            raise TokenizerError(f"{self.model.path}: the model has no chat template. Continue a text instead, without chat.")
        conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        bos, eos = (None if token is None else self.model.token_text(token) for token in (self.model.bos, self.model.eos))
        return render(template, conversation, add_generation_prompt=True, bos_token=bos, eos_token=eos)

    def score(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        """Log-probability of each token but the first, given those before it: float64 (n_tokens - 1,)."""
        self._check_open()
        tokens = self.model.check_tokens(ids)
        self._check_room(len(tokens), None)
        if len(tokens) < 2:
            raise UsageError(f"{len(tokens)} tokens cannot be scored; give at least two")
        scores = np.empty(len(tokens) - 1)
        with self._turn():
            self._cached = []
            self.context.clear()
            cells = self._cells(segments := self._active.segments(tokens.tolist()), tokens.tolist())
            for segment in segments:
                self._active.apply(segment.key)
                for at, logits in self.context.iter_logits(tokens[segment.start : segment.stop], keep=True):
                    start = segment.start + at
                    targets = tokens[start + 1 : start + 1 + len(logits)]
                    rows = logits[: len(targets)].astype(np.float64)
                    top = rows.max(axis=1)
                    total = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
                    scores[start : start + len(targets)] = rows[np.arange(len(targets)), targets] - total
            self._cached = cells
        return scores

    def memory(self) -> Memory:
        """What this process and this session hold, in bytes."""
        self._check_open()
        kv = kv_bytes(self.model.facts, self.n_ctx, self.context.kv_type)
        return process_memory(model_bytes=self.model.size_bytes, kv_bytes=kv, cuts_bytes=process_cuts().nbytes)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeFailure(f"{self.model.path}: the session is closed. Load it again.")

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            ids = self.model.tokenize(prompt, add_special=True, parse_special=True)
            if not ids and self.model.bos is not None:
                ids = [self.model.bos]
        else:
            ids = self.model.check_tokens(prompt).tolist()
        if not ids:
            raise UsageError("the prompt is empty and the model has no BOS token to start from. Give some text.")
        return ids

    def _check_room(self, n_prompt: int, max_tokens: int | None) -> None:
        if n_prompt + (max_tokens or 0) > self.n_ctx:
            wanted = f" and {max_tokens} new tokens" if max_tokens else ""
            raise ContextOverflow(
                f"a prompt of {n_prompt} tokens{wanted} does not fit the context of {self.n_ctx} tokens. "
                "Load with a larger n_ctx, or shorten the prompt or max_tokens."
            )

    def _generate(self, ask: Ask, cancelled: threading.Event) -> Generator[str, None, Completion]:
        """Yield text as soon as it is certain; the lock is held until the end or until the generator is closed."""
        with self._turn():
            self._check_open()
            began = time.perf_counter()
            reused = self._prefill(ask.ids)
            prefilled = first = time.perf_counter()
            sampler, answer = Sampler(ask.sampling, self.context), ask.answer(self.model)
            try:
                while answer.finish_reason is None:
                    token = sampler.sample(self.context)
                    if not answer.tokens:
                        first = time.perf_counter()
                    piece = answer.take(token)
                    if answer.finish_reason is None:
                        self._cached.append((token, self._cached[-1][1]))
                        if cancelled.is_set():
                            piece += answer.end("cancelled")
                    if piece:
                        yield piece
                    if answer.finish_reason is None:
                        self.context.decode([token])
            finally:
                del self._cached[self.context.n_past :]
                sampler.close()
            assert answer.finish_reason is not None
            timings = Timings(
                prompt_tokens=len(ask.ids),
                reused_tokens=reused,
                prefill_s=prefilled - began,
                ttft_s=first - began,
                decode_s=time.perf_counter() - first,
                new_tokens=len(answer.tokens),
            )
            self.last = Completion(text=answer.text, tokens=tuple(answer.tokens), finish_reason=answer.finish_reason, timings=timings)
            return self.last

    def _prefill(self, ids: list[int]) -> int:
        """Bring the cache to hold exactly `ids`, with logits for the last; returns how many of them were in it before."""
        segments = self._active.segments(ids)
        cells = self._cells(segments, ids)
        keep = min(_common_prefix(self._cached, cells), len(ids) - 1)
        if self.exact:
            keep = min(keep, self._n_prefilled) // EXACT_STEP * EXACT_STEP
        keep = self.context.truncate(keep) if self._cached else 0
        if not keep:
            self.context.clear()
        self._cached = cells[:keep]
        try:
            for segment in segments:
                if segment.stop > keep:
                    self._active.apply(segment.key)
                    logits = self.context.decode(ids[max(segment.start, keep) : segment.stop])
        except BaseException:
            self._cached = cells[: self.context.n_past]
            raise
        self._cached, self._n_prefilled = cells, len(cells)
        if not np.isfinite(logits).all():
            raise RuntimeFailure(f"{self.model.path}: the model's outputs are not finite. Its weights are damaged; run edgeq verify.")
        return keep

    def _cells(self, segments: Sequence[Segment], ids: Sequence[int]) -> list[Cell]:
        return [(token, segment.key) for segment in segments for token in ids[segment.start : segment.stop]]

    def _turn(self) -> _Turn:
        return _Turn(self)


class _Turn:
    """Exclusive use of a session: waits for other threads, refuses its own (which would wait for ever)."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __enter__(self) -> None:
        me = threading.get_ident()
        if not self.session._lock.acquire(blocking=self.session._holder != me):
            raise RuntimeFailure("the session is busy with an unfinished stream. Take its remaining pieces or close it first.")
        self.session._holder = me

    def __exit__(self, *_exc: object) -> None:
        self.session._holder = None
        self.session._lock.release()


def _common_prefix(a: Sequence[Cell], b: Sequence[Cell]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
