"""An elastic package on the device: opened, asked what a rate or a budget comes to, and cut.

    elastic = open_elastic(Path("my-package"))
    size = elastic.at_budget(70_000_000)
    elastic.cut(size, Path("small.gguf"))

Packages are of a GGUF file, or of an ONNX folder (`edgeq.runtime.onnx_elastic`). A package is a folder with a manifest; what it says about
its files is checked before they are used: side files when it is opened, the artifact while it is cut. At rate 0 a cut is the artifact, byte
for byte.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgeq.elastic import Kept, steps_for_bytes, steps_for_rate
from edgeq.elastic_files import Elastic, check_is_elastic, read_elastic
from edgeq.errors import PackageError
from edgeq.gguf_file import Header, read_header
from edgeq.package import MANIFEST, MODEL_ONNX, ArtifactRecord, Package, check_size, read_package
from edgeq.progress import Progress, silent
from edgeq.runtime.compensated import compensated, planned
from edgeq.runtime.cut import CutResult, MemoryCut, SourceCheck, cut_gguf, cut_to_memory
from edgeq.runtime.cut_adapter import cut_adapter, cut_adapter_to_memory
from edgeq.runtime.cut_plan import Extras, cut_bytes, read_sizes


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size of a package: the first n_steps steps of its ladder are taken. rate: what was asked for, or what was reached."""

    rate: float
    removed_fraction: float
    n_steps: int
    kept: Kept


@dataclass(frozen=True, kw_only=True)
class ElasticPackage(ABC):
    """An open elastic package. Sizes of its ladder are those of its artifact. record: of the file with the weights.

    check: of that file's hash, if it is under way.
    """

    package: Package
    record: ArtifactRecord
    elastic: Elastic
    check: SourceCheck | None = None

    @property
    @abstractmethod
    def path(self) -> Path:
        """The GGUF file or model.onnx."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file of the package."""
        records = (*self.package.artifacts, *self.package.side_files)
        return (self.package.folder / MANIFEST, *(self.package.folder / record.path for record in records))

    def at_rate(self, rate: float) -> Size:
        """Raises PlanError for a rate outside [0, MAX_RATE], or that the package does not reach."""
        n_steps = steps_for_rate(self.elastic.ladder, rate)
        return self._size(n_steps, rate)

    def at_budget(self, n_bytes: int) -> Size:
        """The largest cut of at most n_bytes. Raises PlanError naming the smallest one when that is larger."""
        return self.at_steps(steps_for_bytes(self.elastic.ladder, self.bytes_of, n_bytes))

    def at_steps(self, n_steps: int) -> Size:
        """The cut by the first n_steps steps; its rate is the fraction that they remove."""
        return self._size(n_steps, self.elastic.ladder.removed_fraction(n_steps))

    @property
    @abstractmethod
    def adapter_suffix(self) -> str:
        """How names of its adapters' cuts end."""

    @abstractmethod
    def bytes_of(self, kept: Kept) -> int:
        """Exact size of the file that a cut writes; of an ONNX folder, of its graph and weights."""

    @abstractmethod
    def cut(self, size: Size, target: Path, *, force: bool = False, threads: int | None = None, progress: Progress = silent) -> CutResult:
        """Write a cut. Raises OutputError, PackageError and SourceError as `cut_gguf`, and as `compensated`; then nothing is written."""

    @abstractmethod
    def cut_adapter(self, source: Path, target: Path, size: Size, *, force: bool = False) -> CutResult:
        """Write what is left of an adapter of the artifact at a size of it. Raises as `edgeq.runtime.cut_adapter.cut_adapter`."""

    @abstractmethod
    def cut_adapter_to_memory(self, source: Path, size: Size) -> MemoryCut:
        """The same into memory."""

    @abstractmethod
    def cut_to_memory(self, size: Size, *, threads: int | None = None, progress: Progress = silent) -> MemoryCut:
        """The same into memory."""

    def _size(self, n_steps: int, rate: float) -> Size:
        ladder = self.elastic.ladder
        return Size(rate=rate, removed_fraction=ladder.removed_fraction(n_steps), n_steps=n_steps, kept=ladder.kept(n_steps))


@dataclass(frozen=True, kw_only=True)
class ElasticGguf(ElasticPackage):
    """A package of a GGUF file."""

    header: Header

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def adapter_suffix(self) -> str:
        return ".lora.gguf"

    def bytes_of(self, kept: Kept) -> int:
        return cut_bytes(self.header, kept, planned(self.header, self.elastic.hidden, kept))

    def cut(self, size: Size, target: Path, *, force: bool = False, threads: int | None = None, progress: Progress = silent) -> CutResult:
        with self._extras(size, threads) as extras:
            check = self.check or self.record.sha256
            return cut_gguf(self.header, target, size.kept, extras=extras, sha256=check, force=force, progress=progress)

    def cut_to_memory(self, size: Size, *, threads: int | None = None, progress: Progress = silent) -> MemoryCut:
        with self._extras(size, threads) as extras:
            return cut_to_memory(self.header, size.kept, extras=extras, sha256=self.check or self.record.sha256, progress=progress)

    def cut_adapter(self, source: Path, target: Path, size: Size, *, force: bool = False) -> CutResult:
        return cut_adapter(source, target, self.path, size.kept, hidden=self.elastic.hidden, force=force)

    def cut_adapter_to_memory(self, source: Path, size: Size) -> MemoryCut:
        return cut_adapter_to_memory(source, self.path, size.kept, hidden=self.elastic.hidden)

    @contextmanager
    def _extras(self, size: Size, threads: int | None) -> Iterator[Extras]:
        with compensated(self.header, self.elastic.hidden, size.kept, threads=threads) as extras:
            yield extras


@contextmanager
def opened_to_cut(path: Path) -> Iterator[ElasticPackage]:
    """`open_elastic` for one cut: the artifact is hashed on another thread from the beginning."""
    with ExitStack() as stack:

        def begin(artifact: Path, sha256: str) -> SourceCheck:
            return stack.enter_context(SourceCheck(artifact, sha256))

        yield open_elastic(path, begin)


def open_elastic(path: Path, begin_check: Callable[[Path, str], SourceCheck] | None = None) -> ElasticPackage:
    """Open a package for cutting: its manifest, its side files checked against their hashes, and the header of its artifact.

    begin_check: called with the artifact and its hash as soon as they are known.
    Raises PackageError for what is no elastic package, or a damaged one; SourceError and UnsupportedError as `read_sizes`.
    """
    kind = "a single file" if path.is_file() else "an ONNX folder" if (path / MODEL_ONNX).is_file() else None
    if kind is not None:
        raise PackageError(
            f"{path} is {kind}: what it may be cut to, and what makes up for that, is in the package that it came from. "
            "Give that folder, or export the model with --elastic."
        )
    package = read_package(path)
    check_is_elastic(package)
    if package.artifacts[0].format == "onnx":
        from edgeq.runtime.onnx_elastic import open_onnx_elastic

        return open_onnx_elastic(package, begin_check)
    record = package.artifacts[0]
    artifact = check_size(package, record)
    check = None if begin_check is None else begin_check(artifact, record.sha256)
    elastic = read_elastic(package)
    header = read_header(artifact)
    check_fits(header, elastic)
    return ElasticGguf(package=package, record=record, header=header, elastic=elastic, check=check)


def check_elastic(package: Package) -> None:
    """Raises PackageError when the side files of an elastic package are not of its artifact, or not what they should be."""
    elastic = read_elastic(package)
    if package.artifacts[0].format == "onnx":
        from edgeq.runtime.onnx_elastic import check_onnx_fits

        check_onnx_fits(package.artifact_path(), elastic)
    else:
        check_fits(read_header(package.artifact_path()), elastic)
    for layer, model in elastic.hidden.items():
        if len(model.mean) != elastic.ladder.n_ff[layer]:
            raise PackageError(f"{package.folder}: hidden activations of layer {layer} do not have the width of its MLP. Export it again.")


def check_fits(header: Header, elastic: Elastic) -> None:
    """Raises PackageError when a ladder is not that of an artifact."""
    sizes, ladder = read_sizes(header), elastic.ladder
    said = (ladder.n_ff, ladder.n_kv, sizes.head_dim if ladder.head_dim is None else ladder.head_dim)
    if said != (sizes.n_ff, sizes.n_kv, sizes.head_dim):
        raise PackageError(
            f"{header.path}: its MLP widths, KV heads and head size are not those that the package's ladder starts from. "
            "The package is mixed up; export it again."
        )
