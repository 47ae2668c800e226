"""What `edgeq adapters` does, for Python: look at an adapter, write it in another form, make it smaller.

Not on a device: all of it needs edgeq[export], and most of it the model that the adapter was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from edgeq.errors import MissingDependency, PlanError, UnsupportedError, UsageError
from edgeq.output import check_file_target, check_target
from edgeq.progress import Progress, silent
from edgeq.sizes import parse_bytes

if TYPE_CHECKING:
    from edgeq.calibration import Importance
    from edgeq.converters.adapters.keep import KeptAdapter
    from edgeq.deltas.adapter import Adapter
    from edgeq.deltas.delta import AnyFloats, Factors
    from edgeq.model import Model

Format = Literal["F32", "F16", "Q8_0"]
FORMATS: tuple[Format, ...] = get_args(Format)
CALIBRATION_TOKENS = 1024  # behind "energy": how strongly each input of a matrix is used
_GGUF_BITS: Mapping[int, Format] = {32: "F32", 16: "F16", 8: "Q8_0"}


@dataclass(frozen=True, kw_only=True)
class WrittenAdapter:
    """An adapter that was written. modules: by module or tensor, rank before and after, and the fraction of its energy that is lost.

    bytes: of all files. A rank of 0 means that nothing of the module is left.
    """

    path: Path
    bytes: int
    modules: Mapping[str, Mapping[str, float]]

    @property
    def lost_energy(self) -> float:
        """The largest loss of a module."""
        return max((module["lost_energy"] for module in self.modules.values()), default=0.0)

    def to_json(self) -> dict[str, Any]:
        modules = {name: dict(module) for name, module in self.modules.items()}
        return {"path": str(self.path), "bytes": self.bytes, "lost_energy": self.lost_energy, "modules": modules}


def inspect_adapter(path: str | Path, *, base: str | Path | None = None, progress: Progress = silent) -> dict[str, Any]:
    """Describe an adapter: kind, ranks, what it changes, and with its base model what each way of shipping would do with every tensor.

    Without a base, what the files say by themselves: a GGUF LoRA, or names and shapes of tensors with the configuration beside them.
    Raises SourceError for what is no adapter or another model's, UnsupportedError for a kind that is not known.
    """
    adapter_path = Path(path)
    if base is None:
        return _described_alone(adapter_path)
    try:
        from edgeq.base_fingerprint import take_fingerprint
        from edgeq.converters.adapters.describe import describe
        from edgeq.converters.adapters.open import open_adapter
        from edgeq.converters.sources.resolve import open_model
    except ModuleNotFoundError as err:
        raise MissingDependency(err.name or "tokenizers", "export") from err
    model = open_model(base, progress=progress)
    report = describe(open_adapter(adapter_path, model), model)
    fingerprint = {"model": model.name, "base_fingerprint": str(take_fingerprint(model.tensors))}
    return {**report.to_json(), **fingerprint}


def convert_adapter(
    path: str | Path,
    *,
    base: str | Path,
    output: str | Path,
    format: Format = "F16",
    adapter_rank: int | None = None,
    approx_rank: int | None = None,
    approx_energy: float | None = None,
    other_base: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> WrittenAdapter:
    """Write an adapter of any kind as a LoRA: a .gguf file for stock llama.cpp and the unsorted base, or a folder for PEFT. Or a sparse
    one as an .eqpatch file, which a session applies to the base's own weights: the base is then a GGUF file in F16 or F32.

    format: of the numbers in a .gguf file; a folder has float32. adapter_rank: directions to take of nested adapters. approx_rank,
    approx_energy: replace changes of full rank by their best low-rank factors; without them such changes are refused. Raises
    UnsupportedError for what a LoRA cannot hold, OutputError when the output exists, and as `open_adapter`.
    """
    target = Path(output)
    model, adapter = _opened(path, base, rank=adapter_rank, other_base=other_base, progress=progress)
    _check_output(target, adapter, force=force)
    if target.suffix == ".eqpatch":
        return _write_patch(target, adapter, model, force=force)
    moments = _moments(model, progress) if approx_rank is not None or approx_energy is not None else None
    kept = _factors(target, adapter, model, approx_rank, approx_energy, moments)
    if target.suffix == ".gguf":
        _write_gguf(target, kept, model, format, force=force, progress=progress)
    else:
        from edgeq.converters.adapters.peft_writer import by_module, write_peft_folder

        write_peft_folder(target, by_module(model.spec, kept.factors), model.spec, base_name=adapter.base_name, force=force)
    ranks = {name: float(factors.rank) for name, factors in kept.factors.items()}
    modules = {name: {"before": rank, "rank": rank, "lost_energy": kept.lost.get(name, 0.0)} for name, rank in ranks.items()}
    return WrittenAdapter(path=target, bytes=_size(target), modules=modules)


def squeeze_adapter(
    path: str | Path,
    *,
    base: str | Path,
    output: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | str | None = None,
    bits: int = 16,
    other_base: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> WrittenAdapter:
    """Make an adapter smaller: every module to a rank, to a fraction of its energy, or all of them to a budget in bytes; in fewer bits.

    output: a folder for PEFT (32 or 16 bits; 8, 4, 2 and 1 bit in codes that edgeq reads, and `convert_adapter` turns into floats), or a
    .gguf file for llama.cpp (32, 16, or 8 for Q8_0). Raises PlanError for targets that make no sense or keep nothing, and as
    `convert_adapter`.
    """
    target = Path(output)
    is_gguf = target.suffix == ".gguf"
    if is_gguf and bits not in _GGUF_BITS:
        raise UsageError(f"{target}: llama.cpp has no adapters of {bits} bits. Give 8, 16 or 32 bits, or write a folder.")
    model, adapter = _opened(path, base, rank=None, other_base=other_base, progress=progress)
    _check_output(target, adapter, force=force)
    from edgeq.converters.adapters.peft_writer import by_module, by_tensor, write_coded_folder, write_peft_folder
    from edgeq.squeeze import FLOAT_BITS, squeeze

    modules = by_module(model.spec, _factors(target, adapter, model, None, None, None).factors)
    squeezed = squeeze(
        modules,
        rank=rank,
        energy=energy,
        budget=parse_bytes(budget) if isinstance(budget, str) else budget,
        bits=16 if is_gguf and bits == 8 else bits,
        moments=_by_module(model, _moments(model, progress), modules),
    )
    left = {name: module.factors for name, module in squeezed.items() if module.factors is not None}
    if is_gguf:
        from edgeq.converters.adapters.keep import KeptAdapter

        kept = KeptAdapter(name=adapter.name, factors=by_tensor(model.spec, left), lost={}, base_name=adapter.base_name)
        _write_gguf(target, kept, model, _GGUF_BITS[bits], force=force, progress=progress)
    elif bits in FLOAT_BITS:
        float_bits: Literal[16, 32] = 16 if bits == 16 else 32
        write_peft_folder(target, left, model.spec, base_name=adapter.base_name, bits=float_bits, force=force)
    else:
        write_coded_folder(target, squeezed, model.spec, base_name=adapter.base_name, force=force)
    found = {name: {"before": float(m.before), "rank": float(m.rank), "lost_energy": m.lost} for name, m in squeezed.items()}
    return WrittenAdapter(path=target, bytes=_size(target), modules=found)


def _opened(path: str | Path, base: str | Path, *, rank: int | None, other_base: bool, progress: Progress) -> tuple[Model, Adapter]:
    try:
        from edgeq.converters.adapters.open import open_adapter
        from edgeq.converters.sources.resolve import open_model
    except ModuleNotFoundError as err:
        raise MissingDependency(err.name or "tokenizers", "export") from err
    model = open_model(base, progress=progress)
    return model, open_adapter(Path(path), model, rank=rank, force=other_base)


def _check_output(target: Path, adapter: Adapter, *, force: bool) -> None:
    if target.suffix in (".gguf", ".eqpatch"):
        check_file_target(target, force=force, inputs=adapter.files)
    else:
        check_target(target, force=force, inputs=adapter.files)


def _factors(
    target: Path, adapter: Adapter, model: Model, rank: int | None, energy: float | None, moments: Mapping[str, AnyFloats] | None
) -> KeptAdapter:
    """What goes into the output: llama.cpp cannot do all that PEFT can."""
    from edgeq.converters.adapters.keep import kept_factors, lora_factors

    make = kept_factors if target.suffix == ".gguf" else lora_factors
    return make(adapter, model, rank=rank, energy=energy, moments=moments)


def _write_gguf(target: Path, kept: KeptAdapter, model: Model, format: Format, *, force: bool, progress: Progress) -> None:
    from dataclasses import replace

    from edgeq.base_fingerprint import take_fingerprint
    from edgeq.converters.adapters.gguf_writer import write_lora
    from edgeq.converters.gguf.lowering import lower
    from edgeq.grids import grid

    if format not in FORMATS:
        raise PlanError(f"adapters cannot be written in {format}; choose one of {', '.join(FORMATS)}")
    known = replace(kept, base_fingerprint=str(take_fingerprint(model.tensors)))
    write_lora(target, known, lower(model), grid=grid(format), force=force, progress=progress)


def _write_patch(target: Path, adapter: Adapter, model: Model, *, force: bool) -> WrittenAdapter:
    from edgeq.converters.adapters.patch_writer import patch_places
    from edgeq.converters.gguf.lowering import lower
    from edgeq.gguf_file import read_header
    from edgeq.patch_file import write_patch

    if model.format != "gguf" or len(model.files) != 1:
        raise UsageError(
            f"{target}: a patch is for one GGUF file in F16 or F32. Export the model with --fixed --quant F16, "
            "and give that file as --base."
        )
    path = write_patch(target, patch_places(adapter, model, lower(model)), read_header(model.files[0]), force=force)
    return WrittenAdapter(path=path, bytes=_size(path), modules={})


def _moments(model: Model, progress: Progress) -> Importance:
    """Mean squares of every linear's inputs on the text that comes with edgeq."""
    from edgeq.converters.disposition import quick_importance
    from edgeq.converters.export import read_calibration

    ids = model.tokenizer.encode(read_calibration(None).text)
    return quick_importance(model, ids, tokens=CALIBRATION_TOKENS, progress=progress)


def _by_module(model: Model, moments: Importance, modules: Mapping[str, Factors]) -> dict[str, AnyFloats]:
    """Parts of a fused module read the same inputs."""
    from edgeq.converters.adapters.sites import model_sites

    sites = model_sites(model.spec)
    found = {name: moments.get(sites[name].pieces[0][0]) for name in modules}
    return {name: values for name, values in found.items() if values is not None}


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())


def _described_alone(path: Path) -> dict[str, Any]:
    """What an adapter says without its model."""
    from edgeq.converters.adapters.coded import CODED
    from edgeq.converters.adapters.peft import CONFIG, PICKLE, WEIGHTS
    from edgeq.converters.adapters.tensors import AdapterTensors
    from edgeq.converters.sources.json_file import read_json_object

    if path.suffix == ".gguf":
        from edgeq.runtime.adapter_file import read_adapter

        file = read_adapter(path)
        rows = [{"name": name, "shape": list(shape), "rank": file.ranks[name]} for name, shape in file.shapes.items()]
        return {"name": path.stem, "kind": "GGUF LoRA", "architecture": file.arch, "alpha": file.alpha, "tensors": rows}
    if not (path / CONFIG).is_file():
        raise UnsupportedError(f"{path}: only PEFT folders and .gguf files describe themselves. Name its model with --base.")
    config = read_json_object(path / CONFIG)
    stored = next((path / name for name in (WEIGHTS, PICKLE) if (path / name).is_file()), None)
    tensors = (
        [] if stored is None else [{"name": name, "shape": list(AdapterTensors(stored).shape(name))} for name in AdapterTensors(stored)]
    )
    return {
        "name": path.resolve().name,
        "kind": config.get("peft_type"),
        "base": config.get("base_model_name_or_path"),
        "coded": (path / CODED).is_file(),
        "config": {key: value for key, value in config.items() if value not in (None, [], {}, "")},
        "tensors": tensors,
    }
