"""An elastic ONNX package on the device: `edgeq.runtime.elastic_package` for folders around a model.onnx.

Ladder, side files and rates are those of GGUF packages. Every file of the folder has its hash in the manifest: the weights are hashed while
they are cut, the small files before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgeq.elastic import Kept
from edgeq.elastic_files import Elastic, read_elastic
from edgeq.errors import PackageError
from edgeq.onnx_adapter_file import SUFFIX
from edgeq.package import ArtifactRecord, Package, check_size
from edgeq.progress import Progress, silent
from edgeq.runtime.cut import CutResult, MemoryCut, SourceCheck
from edgeq.runtime.elastic_package import ElasticPackage, Size
from edgeq.runtime.onnx_compensated import onnx_compensated
from edgeq.runtime.onnx_cut import Hashes, cut_onnx, cut_onnx_to_memory
from edgeq.runtime.onnx_cut_adapter import cut_onnx_adapter, cut_onnx_adapter_to_memory
from edgeq.runtime.onnx_cut_plan import plan_onnx_cut
from edgeq.runtime.onnx_file import OnnxFile, read_onnx
from edgeq.runtime.onnx_sizes import read_sizes


@dataclass(frozen=True, kw_only=True)
class ElasticOnnx(ElasticPackage):
    """A package of an ONNX folder. record: of the data file."""

    file: OnnxFile

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def adapter_suffix(self) -> str:
        return SUFFIX

    def bytes_of(self, kept: Kept) -> int:
        return plan_onnx_cut(self.file, kept).nbytes

    def cut(self, size: Size, target: Path, *, force: bool = False, threads: int | None = None, progress: Progress = silent) -> CutResult:
        with onnx_compensated(self.file, self.elastic.hidden, size.kept, threads=threads) as extras:
            return cut_onnx(self.file, target, size.kept, extras=extras, hashes=self._hashes(), force=force, progress=progress)

    def cut_to_memory(self, size: Size, *, threads: int | None = None, progress: Progress = silent) -> MemoryCut:
        with onnx_compensated(self.file, self.elastic.hidden, size.kept, threads=threads) as extras:
            return cut_onnx_to_memory(self.file, size.kept, extras=extras, hashes=self._hashes(), progress=progress)

    def cut_adapter(self, source: Path, target: Path, size: Size, *, force: bool = False) -> CutResult:
        return cut_onnx_adapter(source, target, self.file, size.kept, hidden=self.elastic.hidden, force=force)

    def cut_adapter_to_memory(self, source: Path, size: Size) -> MemoryCut:
        return cut_onnx_adapter_to_memory(source, self.file, size.kept, hidden=self.elastic.hidden)

    def _hashes(self) -> Hashes:
        """Of all files of the model's folder. A file that the manifest does not list is not the package's."""
        records = (*self.package.artifacts, *self.package.side_files)
        names = {
            Path(record.path).name: record.sha256 for record in records if self.package.folder / Path(record.path).parent == self._folder
        }
        data = Path(self.record.path).name
        return Hashes(files={name: sha256 for name, sha256 in names.items() if name != data}, data=self.check or self.record.sha256)

    @property
    def _folder(self) -> Path:
        return self.file.path.parent


def open_onnx_elastic(package: Package, begin_check: Callable[[Path, str], SourceCheck] | None = None) -> ElasticOnnx:
    """As `edgeq.runtime.elastic_package.open_elastic`, for a package that is elastic. Raises PackageError, SourceError, UnsupportedError
    and MissingDependency."""
    for record in package.artifacts:
        check_size(package, record)
    record = _data_record(package)
    check = None if begin_check is None else begin_check(package.folder / record.path, record.sha256)
    elastic = read_elastic(package)
    file = check_onnx_fits(package.artifact_path(), elastic)
    return ElasticOnnx(package=package, record=record, elastic=elastic, check=check, file=file)


def check_onnx_fits(path: Path, elastic: Elastic) -> OnnxFile:
    """The model.onnx of a package. Raises PackageError when its ladder is that of another one."""
    file, ladder = read_onnx(path), elastic.ladder
    sizes = read_sizes(file)
    if (ladder.n_ff, ladder.n_kv) != (sizes.n_ff, sizes.n_kv):
        raise PackageError(
            f"{path}: its MLP widths and KV heads are not those that the package's ladder starts from. The package is mixed up; export it "
            "again."
        )
    return file


def _data_record(package: Package) -> ArtifactRecord:
    if len(package.artifacts) != 2:
        raise PackageError(
            f"{package.folder}: an elastic ONNX package has a graph and one file of weights, this one {len(package.artifacts)} artifacts. "
            "Export it again."
        )
    return package.artifacts[1]
