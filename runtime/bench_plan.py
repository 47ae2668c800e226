"""What one run of `edgeq bench` measures: artifacts and their cuts, each at every prompt length, batch and number of threads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeq.adapter_records import find_adapter
from edgeq.elastic import MAX_RATE
from edgeq.errors import UsageError
from edgeq.gguf_file import read_parts
from edgeq.grids import Grid, grid
from edgeq.package import Package
from edgeq.runtime.adapter_formats import check_base, read_adapter
from edgeq.runtime.elastic_package import open_elastic
from edgeq.runtime.engine import Facts, Runtime, artifact_sha256, default_kv_type, kv_bytes, open_artifact, read_facts, runtime_of
from edgeq.runtime.gguf_facts import GgufFacts
from edgeq.runtime.llama_context import KV_TYPES

_PROMPT_SEED = 20240229


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An artifact to measure, or a cut of one, which is in memory already. adapter: name and file, cut alike. files: what is loaded."""

    artifact: str
    path: Path
    files: tuple[Path, ...]
    is_cut: bool = False
    rate: float | None
    quant: str | None
    elastic_package: str | None
    facts: Facts
    sha256: str
    adapter: tuple[str, Path] | None = None
    kv_type: str

    @property
    def name(self) -> str:
        return Path(self.artifact).resolve().name

    @property
    def runtime(self) -> Runtime:
        return runtime_of(self.path)

    @property
    def n_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @property
    def label(self) -> str:
        """For messages: what tells it from others of the same run."""
        cut = f" at rate {self.rate:g}" if self.rate else ""
        return f"{self.name}{cut}{f' + {self.adapter[0]}' if self.adapter else ''}"

    def kv_bytes(self, n_ctx: int, batch: int = 1) -> int:
        return batch * kv_bytes(self.facts, n_ctx, self.kv_type)


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One row to be. base: measured to compare others with."""

    entry: Entry
    prompt_tokens: int
    gen_tokens: int
    batch: int
    threads: int | None
    base: bool = False

    @property
    def n_ctx(self) -> int:
        return self.prompt_tokens + self.gen_tokens

    @property
    def setup(self) -> tuple[int, int, int | None]:
        """What rows that are compared have in common."""
        return self.prompt_tokens, self.batch, self.threads


def configurations(
    entries: Sequence[Entry],
    base: Entry | None,
    *,
    prompt_tokens: Sequence[int],
    gen_tokens: int,
    batch: Sequence[int],
    threads: Sequence[int | None],
) -> list[Configuration]:
    """Every entry at every setting, the base first unless it is one of the entries anyway. Raises UsageError for a batch ONNX cannot do."""
    if base is not None:
        same = [entry for entry in entries if entry.path == base.path and entry.adapter is None]
        base = same[0] if same else base
        entries = entries if same else [base, *entries]
    for entry in entries:
        if entry.runtime == "onnxruntime" and any(n > 1 for n in batch):
            raise UsageError(f"{entry.artifact}: edgeq runs one sequence at a time in ONNX Runtime. Measure it with --batch 1.")
    return [
        Configuration(entry=entry, prompt_tokens=n, gen_tokens=gen_tokens, batch=size, threads=count, base=entry is base)
        for entry in entries
        for n in prompt_tokens
        for size in batch
        for count in threads
    ]


def check_rates(rates: Sequence[float] | None) -> None:
    """Raises UsageError for an empty list, one that repeats a rate, and rates outside 0 to MAX_RATE."""
    if rates is None:
        return
    if not rates or len(set(rates)) < len(rates) or not all(0 <= rate <= MAX_RATE for rate in rates):
        given = ", ".join(f"{rate:g}" for rate in rates) or "none"
        raise UsageError(f"rates to measure are {given}. Give different numbers from 0 to {MAX_RATE}, e.g. 0,0.15,0.25.")


def counts(name: str, values: int | Sequence[int]) -> tuple[int, ...]:
    """One number or several as several. Raises UsageError for none, for repeated ones and for those below 1."""
    several = (values,) if isinstance(values, int) else tuple(values)
    if not several or len(set(several)) < len(several):
        raise UsageError(f"{name} is {', '.join(map(str, several)) or 'an empty list'}; give different numbers")
    for value in several:
        if value < 1:
            raise UsageError(f"{name} is {value}; expected at least 1")
    return several


def open_entry(artifact: Path | str, rate: float | None, adapter: str | None, cuts: ExitStack, *, kv_type: str | None = None) -> Entry:
    """rate: None takes the artifact as it is. cuts: keeps a cut alive as long as it is measured. kv_type: None is what is usual."""
    path, package = open_artifact(Path(artifact))
    beside = None if adapter is None else find_adapter(package, adapter)
    stated = {} if package is None else package.manifest["export"]
    elastic_name = package.folder.resolve().name if package is not None and stated.get("elastic") else None
    is_cut = False
    if rate is not None and (rate or stated.get("elastic")):
        elastic = open_elastic(Path(artifact))
        size = elastic.at_rate(rate)
        if is_cut := size.n_steps > 0:
            path = cuts.enter_context(elastic.cut_to_memory(size)).path
            if beside is not None:
                beside = beside[0], cuts.enter_context(elastic.cut_adapter_to_memory(beside[1], size)).path
    facts = read_facts(path)
    if beside is not None:
        check_base(read_adapter(beside[1], facts), facts)
    return Entry(
        artifact=str(artifact),
        path=path,
        files=_files(path, facts),
        is_cut=is_cut,
        rate=rate if is_cut else stated.get("rate"),
        quant=_quant(package, facts),
        elastic_package=elastic_name,
        facts=facts,
        sha256=artifact_sha256(path),
        adapter=beside,
        kv_type=_kv_type(artifact, facts, kv_type),
    )


def prompt_ids(n_vocab: int, n_tokens: int) -> list[int]:
    """The prompt of every measurement: pseudo-random ids, the same for the same vocabulary size; longer ones start with shorter ones."""
    return np.random.default_rng(_PROMPT_SEED).integers(0, n_vocab, n_tokens).tolist()


def prompts_of(configuration: Configuration, n_vocab: int) -> list[list[int]]:
    """A prompt for each sequence, the first as with batch 1."""
    n = configuration.prompt_tokens
    ids = prompt_ids(n_vocab, configuration.batch * n)
    return [ids[start : start + n] for start in range(0, len(ids), n)]


def main_grid(facts: Facts) -> Grid | None:
    """The format of most bytes of the matrices in a GGUF file's blocks; None for ONNX."""
    if not isinstance(facts, GgufFacts):
        return None
    n_bytes: Counter[str] = Counter()
    matrices = {name: tensor for name, tensor in facts.tensors.items() if name.startswith("blk.") and len(tensor.shape) > 1}
    for tensor in matrices.values():
        n_bytes[tensor.grid.name] += tensor.nbytes
    most = n_bytes.most_common(1)
    return next((tensor.grid for tensor in matrices.values() if tensor.grid.name == most[0][0]), None) if most else None


def _quant(package: Package | None, facts: Facts) -> str | None:
    planned = None if package is None else package.manifest.get("plan", {}).get("quant")
    kind = main_grid(facts)
    return planned or (None if kind is None else kind.name)


def _files(path: Path, facts: Facts) -> tuple[Path, ...]:
    return tuple(header.path for header in read_parts(path)) if isinstance(facts, GgufFacts) else facts.files


def _kv_type(artifact: Path | str, facts: Facts, wanted: str | None) -> str:
    if wanted is None:
        return default_kv_type(facts)
    if isinstance(facts, GgufFacts):
        if wanted not in KV_TYPES:
            raise UsageError(f"kv_type {wanted!r} is not known; expected one of {', '.join(KV_TYPES)}")
        if not grid(wanted.upper()).fits(facts.key_length):
            raise UsageError(f"{artifact}: heads of {facts.key_length} do not divide into {wanted} blocks. Use --kv-type f16.")
    elif wanted != facts.kv_type:
        raise UsageError(
            f"{artifact}: this graph keeps keys and values in {facts.kv_type}, not {wanted}. Leave --kv-type out, or measure it on its own."
        )
    return wanted
