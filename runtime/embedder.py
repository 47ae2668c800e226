"""Embeddings on a device: a package that `edgeq export` made of an encoder, in ONNX Runtime.

    with Embedder.load("minilm/") as embedder:
        vectors = embedder.embed(["How old are you?", "What is your age?"])       # float32 (2, 384)
        print(embedder.similarity(vectors, vectors))

Texts are sorted by length and run in batches that are padded to their longest. What a batch holds changes an embedding by no more than
float rounding, in every format. Needs onnxruntime and tokenizers, which edgeq[onnx] installs, and neither torch nor transformers.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.encoder_spec import SentenceSpec
from edgeq.errors import MissingDependency, PackageError, RuntimeFailure, TokenizerError, UsageError
from edgeq.package import Package, check_files, read_package
from edgeq.progress import Progress, silent
from edgeq.runtime.closing import Closing
from edgeq.runtime.cores import usable_cores
from edgeq.runtime.device import parse_device

Embeddings = npt.NDArray[np.float32]

BATCH_SIZE = 32
BATCH_TOKENS = 4096  # padding included; the largest intermediate of a 12-layer model of 768 then takes 48 MiB
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "sentence_embedding"
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class Embedder(Closing):
    """An encoder in memory. Calls from several threads wait for each other."""

    def __init__(self, package: Package, sentence: SentenceSpec, session: Any, tokenizer: Any, *, padding_id: int) -> None:
        self.package, self.sentence = package, sentence
        self._session: Any | None = session
        self._tokenizer = tokenizer
        self._padding_id = padding_id
        self._inputs = [value.name for value in session.get_inputs()]
        self._lock = threading.Lock()

    @classmethod
    def load(cls, path: Path | str, *, threads: int | None = None, device: str = "cpu") -> Embedder:
        """Load a package folder, every file checked against its hash. threads: default is every core this process may use.

        Raises PackageError for what is no package of an encoder, or a damaged one; TokenizerError, RuntimeFailure and UsageError for a
        tokenizer, graph or device that does not work; MissingDependency.
        """
        package = read_package(Path(path))
        section = package.manifest.get("encoder")
        if not isinstance(section, Mapping):
            raise PackageError(f"{package.folder} is not a package of an encoder: it generates text. Use `edgeq run` or edgeq.load.")
        check_files(package)
        try:
            sentence, padding_id = SentenceSpec.from_json(section["sentence"]), int(section["spec"]["padding_id"])
        except (KeyError, TypeError, ValueError) as err:
            raise PackageError(f"{package.folder}: the manifest's encoder section lacks or misspells {err}. Export it again.") from err
        session = open_session(package.artifact_path(), threads=threads, device=device)
        unknown = [value.name for value in session.get_inputs() if value.name not in INPUTS]
        if unknown or OUTPUT not in [value.name for value in session.get_outputs()]:
            raise PackageError(
                f"{package.artifact_path()}: the graph is not one of an encoder's: it wants {unknown or OUTPUT}. Export it again."
            )
        return cls(package, sentence, session, open_tokenizer(package.folder / "tokenizer.json", sentence), padding_id=padding_id)

    @property
    def n_out(self) -> int:
        """Numbers of an embedding."""
        return self.sentence.n_out

    @property
    def max_tokens(self) -> int:
        """Texts are cut to this many tokens, special ones included."""
        return self.sentence.max_tokens

    @property
    def prompts(self) -> Mapping[str, str]:
        """Texts that the model wants before those of a kind ("query", "document"), by name."""
        return self.sentence.prompts

    @property
    def runtime(self) -> str:
        """What runs the model, for reports."""
        session = self._opened()
        device = "CPU" if session.get_providers()[0] == CPU else "GPU"
        return f"onnxruntime {_library().__version__} on {device}"

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        prompt: str | None = None,
        batch_size: int = BATCH_SIZE,
        progress: Progress = silent,
    ) -> Embeddings:
        """One vector per text, float32 (n_texts, n_out); of a single string (n_out,). Of unit length if the model's are.

        prompt: name of the prompt to put before every text; by default the model's default one, if it has one, and "" for none. Longer
        texts than the model takes are cut. progress: step "embed", in texts. Raises UsageError.
        """
        if isinstance(texts, str):
            return self.embed([texts], prompt=prompt, batch_size=batch_size)[0]
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}; expected at least 1")
        ids = self.tokenize(texts, prompt=prompt)
        found = np.empty((len(ids), self.n_out), dtype=np.float32)
        done = 0
        for index in batches(list(map(len, ids)), batch_size=batch_size):
            progress("embed", done, len(ids))
            found[index] = self._run([ids[i] for i in index])
            done += len(index)
        progress("embed", done, done)
        return found

    def tokenize(self, texts: Sequence[str], *, prompt: str | None = None) -> list[list[int]]:
        """Token ids of every text as the model reads them: with prompt and special tokens, and cut to `max_tokens`."""
        name = self.sentence.default_prompt if prompt is None else prompt
        if name and name not in self.prompts:
            known = ", ".join(map(repr, self.prompts)) or "none"
            raise UsageError(f"prompt {name!r} is not one of the model's; it has {known}.")
        before = self.prompts[name] if name else ""
        lowercase = self.sentence.lowercase
        try:
            prepared = [(before + text).lower() if lowercase else before + text for text in texts]
            with self._lock:
                return [encoding.ids for encoding in self._tokenizer.encode_batch(prepared)]
        except (TypeError, UnicodeEncodeError) as err:
            raise TokenizerError(f"text cannot be tokenized: {err}. Repair its encoding.") from err

    def similarity(self, a: Embeddings, b: Embeddings) -> npt.NDArray[np.float32]:
        """Cosine of every pair, (len(a), len(b)); of two single vectors, a number in an array of no dimensions."""
        return cosine_similarity(a, b)

    def close(self) -> None:
        """Free the model. Closing twice is fine."""
        self._session = None

    def _opened(self) -> Any:
        if self._session is None:
            raise RuntimeFailure(f"{self.package.folder}: the embedder is closed. Load it again.")
        return self._session

    def _run(self, ids: Sequence[Sequence[int]]) -> Embeddings:
        session = self._opened()
        width = max(map(len, ids))
        tokens = np.full((len(ids), width), self._padding_id, dtype=np.int64)
        mask = np.zeros((len(ids), width), dtype=np.int64)
        for row, one in enumerate(ids):
            tokens[row, : len(one)], mask[row, : len(one)] = one, 1
        feeds = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": np.zeros_like(tokens)}
        try:
            with self._lock:
                return session.run([OUTPUT], {name: feeds[name] for name in self._inputs})[0]
        except Exception as err:  # its errors have no base of their own
            raise RuntimeFailure(f"{self.package.artifact_path()}: {_said(err)}") from err


def load_embedder(path: Path | str, *, threads: int | None = None, device: str = "cpu") -> Embedder:
    """See `Embedder.load`."""
    return Embedder.load(path, threads=threads, device=device)


def cosine_similarity(a: Embeddings, b: Embeddings) -> npt.NDArray[np.float32]:
    """Cosine of every pair of rows, (len(a), len(b)); a vector of one dimension adds none. A vector of zeros is like no other: 0."""

    def unit(vectors: Embeddings) -> Embeddings:
        length = np.linalg.norm(vectors, axis=-1, keepdims=True).astype(np.float32)
        return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)

    return np.asarray(unit(a) @ unit(b).T, dtype=np.float32)


def batches(lengths: Sequence[int], *, batch_size: int) -> list[list[int]]:
    """Texts that run together, by their number: of like length, longest first, at most BATCH_TOKENS with padding."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        last = groups[-1] if groups else []
        if last and len(last) < batch_size and (len(last) + 1) * lengths[last[0]] <= BATCH_TOKENS:
            last.append(i)
        else:
            groups.append([i])
    return groups


def open_tokenizer(path: Path, sentence: SentenceSpec) -> Any:
    """The `tokenizers` library's own, set to cut texts as the model says, and to pad none. Raises TokenizerError, MissingDependency."""
    try:
        import tokenizers
    except ImportError as err:
        raise MissingDependency("tokenizers", "onnx") from err
    try:
        found = tokenizers.Tokenizer.from_file(str(path))
    except Exception as err:  # the library raises nothing narrower
        raise TokenizerError(f"{path}: the tokenizers library cannot load it: {err}. Copy or export the folder again.") from err
    found.no_padding()
    found.enable_truncation(sentence.max_tokens)
    return found


def open_session(path: Path, *, threads: int | None, device: str) -> Any:
    """An inference session of ONNX Runtime. Raises RuntimeFailure with its own words, UsageError for threads and devices."""
    threads = usable_cores() if threads is None else threads
    if threads < 1:
        raise UsageError(f"threads is {threads}; expected at least 1")
    gpu, ort = parse_device(device), _library()
    if gpu is not None and CUDA not in ort.get_available_providers():
        raise RuntimeFailure(
            f"device {device}: the installed onnxruntime cannot use CUDA. Install onnxruntime-gpu in its place, or use cpu."
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # fatal alone: errors come back in exceptions
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[Any] = [CPU] if gpu is None else [(CUDA, {"device_id": gpu}), CPU]
    try:
        return ort.InferenceSession(str(path), options, providers=providers)
    except Exception as err:  # its errors have no base of their own
        raise RuntimeFailure(f"{path}: onnxruntime {ort.__version__} cannot load it. It said: {_said(err)}") from err


def run_graph(path: Path, ids: Sequence[Sequence[int]], *, threads: int | None = None) -> dict[str, list[npt.NDArray[np.float32]]]:
    """Every output of an encoder's graph, by name, for each text alone: (n_tokens, n_embd) or (n_out,) each.

    Raises RuntimeFailure, and UsageError when the graph asks for inputs that are not known.
    """
    session = open_session(path, threads=threads, device="cpu")
    wanted = [value.name for value in session.get_inputs()]
    if unknown := [name for name in wanted if name not in INPUTS]:
        raise UsageError(f"{path}: the graph asks for {', '.join(unknown)}; known inputs are {', '.join(INPUTS)}.")
    names = [value.name for value in session.get_outputs()]
    found: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in names}
    for one in ids:
        tokens = np.array([one], dtype=np.int64)
        feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "token_type_ids": np.zeros_like(tokens)}
        try:
            outputs = session.run(names, {name: feeds[name] for name in wanted})
        except Exception as err:  # its errors have no base of their own
            raise RuntimeFailure(f"{path}: {_said(err)}") from err
        for name, value in zip(names, outputs, strict=True):
            found[name].append(np.asarray(value[0], dtype=np.float32))
    return found


def _library() -> Any:
    from edgeq.runtime.onnx_model import library

    return library()


def _said(err: Exception) -> str:
    from edgeq.runtime.onnx_model import said

    return said(err)
