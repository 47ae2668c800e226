"""A grid of quants and rates, exported, measured and reported: `edgeq sweep`.

The folder of a sweep holds

    sweep.json                      what it is
    packages/QUANT-KEY/             one package per quant, elastic where there are rates; KEY is a hash of all that it is made from
    measured/bench-KEY.json         the bench's row of one package at one rate; KEY hashes artifact, settings, machine and libraries
    measured/quality-KEY.json       the same for quality; KEY hashes artifact, rate, tasks and reference
    bench.json quality.json         the rows of this sweep, for `edgeq report`
    report.html report.md report.json

What is there under its key is not made again: an interrupted sweep goes on where it was, and one with another quant adds that one. What
has not been timed yet is timed together, in turns, so that a slow spell of the machine meets all of it; all else goes package by package.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeq import __version__
from edgeq.errors import EdgeqError, MissingDependency, OutputError, PlanError, UsageError
from edgeq.output import staged_file
from edgeq.package import Package, is_package, read_package, sha256
from edgeq.progress import Progress, silent

if TYPE_CHECKING:
    from edgeq.profiles import DeviceProfile
    from edgeq.runtime.evaluation import Tasks
    from edgeq.runtime.report.document import Report

MARKER = "sweep.json"
FORMAT, VERSION = "edgeq-sweep", 1
RATES = (0.0, 0.15, 0.25)
REPORTS = ("report.html", "report.md", "report.json")

_EXPORT, _TIME, _JUDGE = 10.0, 1.0, 2.0  # how long the steps take, roughly, for the time that is left


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A quant that did not come to a package that can be measured, and why."""

    quant: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """made, reused: steps that were done now and that had been done before. packages: by quant, in the order asked for."""

    folder: Path
    packages: Mapping[str, Path]
    failures: tuple[Failure, ...]
    made: int
    reused: int
    seconds: float
    report: Report
    reports: tuple[Path, ...]

    def to_json(self) -> dict[str, Any]:
        from edgeq.runtime.report.document import to_json

        content = to_json(self.report)
        return {
            "folder": str(self.folder),
            "packages": [{"quant": quant, "path": str(path)} for quant, path in self.packages.items()],
            "failures": [{"quant": one.quant, "reason": one.reason} for one in self.failures],
            "made": self.made,
            "reused": self.reused,
            "seconds": round(self.seconds, 3),
            "reports": [str(path) for path in self.reports],
            "recommendations": content["recommendations"],
            "warnings": content["warnings"],
            "variants": content["variants"],
        }


def sweep(
    model: str | Path,
    *,
    profile: str | Path,
    output: str | Path,
    quants: Sequence[str] | None = None,
    rates: Sequence[float] = RATES,
    format: Literal["gguf", "onnx", "auto"] = "auto",
    calibration: str | Path | None = None,
    verify: bool = True,
    text: str | Path | None = None,
    choices: str | Path | None = None,
    exact: str | Path | None = None,
    reference: str | Path | None = None,
    chat: bool = False,
    ctx: int = 1024,
    chunks: int | None = None,
    prompt_tokens: int = 512,
    gen_tokens: int = 128,
    repeat: int = 5,
    device: str = "cpu",
    budget: int | str | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> SweepResult:
    """Export a model in every quant, cut it at every rate, measure all and report; see the module docstring. Needs edgeq[export,report].

    quants: by default what the profile prefers. rates: of elastic packages; (0,) exports packages of one size. text, choices, exact: tasks
    for the quality, as in `edgeq.quality_api.evaluate_tasks`; none leaves it unmeasured. reference: by default the model itself.
    budget: memory instead of the profile's, for the report's limits.
    A quant that cannot be exported, or fails its gate, is left out and named in `failures`. Raises the last error when that leaves nothing;
    UsageError for no quants and bad rates; OutputError for a folder that holds something else.
    """
    from edgeq.profiles import load_profile
    from edgeq.quality_api import read_tasks
    from edgeq.report_api import limits_of, report
    from edgeq.runtime.bench import check_rates

    start = time.monotonic()
    _check_installed()
    wanted = load_profile(profile)
    check_rates(rates)
    limits_of(wanted, budget)
    names = list(dict.fromkeys(quants if quants is not None else _usual_quants(wanted, format)))
    if not names or not all(names):
        raise UsageError("no quants to try. Name some, e.g. Q4_K_M,Q4_0, or leave them out for those of the profile.")
    tasks = read_tasks(text=text, choices=choices, exact=exact, ctx=ctx, chunks=chunks, chat=chat) if text or choices or exact else None
    folder = _claimed(Path(output))
    steps = _Steps(progress, total=len(names) * (_EXPORT + len(rates) * (_TIME + (_JUDGE if tasks else 0.0))))

    elastic = None if any(rates) else False
    settings = {"profile": profile, "format": format, "calibration": calibration, "verify": verify, "elastic": elastic, "threads": threads}
    inputs = _inputs(model, progress)
    recipe: dict[str, Any] = {"model": inputs.hashes, "profile": wanted.to_json(), "format": format, "elastic": elastic, "verify": verify}
    recipe |= {"calibration": None if calibration is None else sha256(Path(calibration)), "edgeq": __version__}
    packages, failures = _export_all(model, folder, names, recipe, settings, steps, progress)

    grid = {quant: _rates_of(package, rates) for quant, package in packages.items()}
    timing = {"prompt_tokens": prompt_tokens, "gen_tokens": gen_tokens, "repeat": repeat, "device": device, "threads": threads}
    bench_rows = _time_all(folder, packages, grid, timing, steps, progress)
    results = [_write(folder / "bench.json", "bench", bench_rows)]
    if tasks is not None:
        against = reference if reference is not None else inputs.reference
        files = {"text": text, "choices": choices, "exact": exact, "reference": against, "ctx": ctx, "chunks": chunks, "chat": chat}
        quality_rows = _judge_all(folder, packages, grid, tasks, files, threads, steps, progress)
        results.append(_write(folder / "quality.json", "quality", quality_rows))
    targets = [folder / name for name in REPORTS]
    made = report(results, output=targets, profile=profile, budget=budget, title=f"{Path(model).name} for {wanted.name}", force=True)
    steps.end()
    return SweepResult(
        folder=folder,
        packages={quant: package.folder for quant, package in packages.items()},
        failures=tuple(failures),
        made=steps.made,
        reused=steps.reused,
        seconds=time.monotonic() - start,
        report=made,
        reports=tuple(targets),
    )


class _Steps:
    """Counts what is done, for the bar of the whole sweep; what was there already takes no time."""

    def __init__(self, progress: Progress, *, total: float) -> None:
        self._progress, self._done, self._total = progress, 0.0, total
        self.made = self.reused = 0
        progress("sweep", 0, total)

    def did(self, weight: float, *, reused: bool = False) -> None:
        self.made, self.reused = self.made + (not reused), self.reused + reused
        if reused:
            self.drop(weight)
        else:
            self._done += weight
            self._progress("sweep", self._done, self._total)

    def drop(self, weight: float) -> None:
        """Work that there is no need, or no way, to do."""
        self._total -= weight
        self._progress("sweep", self._done, max(self._total, self._done))

    def end(self) -> None:
        self._progress("sweep", 1, 1)


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """hashes: of the model's files, by name. reference: the model as something to compare with."""

    hashes: list[list[str]]
    reference: Path


def _inputs(model: str | Path, progress: Progress) -> _Inputs:
    """Raises as `edgeq.export` for a model that cannot be read."""
    try:
        from edgeq.converters.records import hash_inputs
        from edgeq.converters.sources.resolve import open_model
    except ModuleNotFoundError as err:
        raise MissingDependency(err.name or "torch", "export") from err
    opened = open_model(model, progress=progress)
    files = hash_inputs(opened.files, progress)
    first = Path(opened.files[0])
    return _Inputs(hashes=[[file.path, file.sha256] for file in files], reference=first if first.suffix == ".gguf" else first.parent)


def _check_installed() -> None:
    """Before hours of work, not after. Raises MissingDependency."""
    from importlib.util import find_spec

    for module, extra in (("torch", "export"), ("matplotlib", "report")):
        if find_spec(module) is None:
            raise MissingDependency(module, extra)


def _usual_quants(profile: DeviceProfile, format: str) -> Sequence[str]:
    if format == "gguf" or (format == "auto" and profile.runtime.name == "llama.cpp"):
        return profile.export.grids
    from edgeq.converters.onnx.quants import auto_names

    return auto_names(profile.export.grids, quantized=False)


def _claimed(folder: Path) -> Path:
    """A folder of sweeps, made or found. Raises OutputError for one that holds something else."""
    marker = folder / MARKER
    if marker.is_file():
        try:
            said = json.loads(marker.read_text(encoding="utf-8"))
        except ValueError:
            said = None
        if not isinstance(said, dict) or said.get("format") != FORMAT or said.get("version") != VERSION:
            raise OutputError(f"{marker} is not that of a sweep of this edgeq. Choose another folder.")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and holds no sweep. Choose another folder.")
    else:
        with staged_file(marker) as stage:
            stage.write_text(json.dumps({"format": FORMAT, "version": VERSION}) + "\n", encoding="utf-8")
    return folder


def _key(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


def _export_all(
    model: str | Path,
    folder: Path,
    quants: Sequence[str],
    recipe: Mapping[str, Any],
    settings: Mapping[str, Any],
    steps: _Steps,
    progress: Progress,
) -> tuple[dict[str, Package], list[Failure]]:
    """A package per quant. Raises the last error when there is none."""
    from edgeq import api

    packages: dict[str, Package] = {}
    failures: list[Failure] = []
    last: EdgeqError | None = None
    for quant in quants:
        place = folder / "packages" / f"{_safe(quant)}-{_key({**recipe, 'quant': quant})}"
        reused = is_package(place)
        if not reused:
            try:
                api.export(model, output=place, quant=quant, progress=progress, **settings)
            except MissingDependency:
                raise
            except EdgeqError as err:
                last = err
                failures.append(Failure(quant=quant, reason=str(err)))
                steps.drop(_EXPORT)
                continue
        package = read_package(place)
        steps.did(_EXPORT, reused=reused)
        if package.status == "failed":
            failures.append(Failure(quant=quant, reason=f"{place} did not pass its gate, and was not measured."))
        else:
            packages[quant] = package
    if not packages:
        raise last or PlanError(f"no quant came to a package that passes its gate: {'; '.join(one.reason for one in failures)}")
    return packages, failures


def _safe(quant: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in quant).lstrip(".") or "quant"


def _rates_of(package: Package, rates: Sequence[float]) -> list[float | None]:
    """Rates to cut a package at; None takes one that cannot be cut as it is."""
    return list(rates) if package.manifest["export"].get("elastic") else [None]


def _time_all(
    folder: Path,
    packages: Mapping[str, Package],
    grid: Mapping[str, Sequence[float | None]],
    timing: Mapping[str, Any],
    steps: _Steps,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The bench's rows, quant by quant. What is missing is measured together per list of missing rates, or alone where memory is short."""
    from edgeq import api
    from edgeq.runtime.environment import describe

    machine = describe()
    machine.pop("memory_bytes", None)
    places = {
        (quant, rate): folder / "measured" / f"bench-{_key([package.artifacts[0].sha256, rate, dict(timing), machine])}.json"
        for quant, package in packages.items()
        for rate in grid[quant]
    }
    missing: dict[tuple[float | None, ...], list[str]] = {}
    for quant in packages:
        rates = tuple(rate for rate in grid[quant] if not places[quant, rate].is_file())
        for _ in range(len(grid[quant]) - len(rates)):
            steps.did(_TIME, reused=True)
        if rates:
            missing.setdefault(rates, []).append(quant)

    def measure(quants: Sequence[str], rates: tuple[float | None, ...]) -> None:
        cuts = None if rates == (None,) else [rate for rate in rates if rate is not None]
        rows = api.bench([packages[quant].folder for quant in quants], rates=cuts, progress=progress, **timing)
        pairs = [(quant, rate) for quant in quants for rate in rates]
        for pair, row in zip(pairs, rows, strict=True):
            _store(places[pair], {**row.to_json(), "quant": pair[0], "rate": pair[1]})
            steps.did(_TIME)

    for rates, quants in missing.items():
        try:
            measure(quants, rates)
        except PlanError:  # not enough memory for all at once
            if len(quants) == 1:
                raise
            for quant in quants:
                measure([quant], rates)
    return [_stored(place) for place in places.values()]


def _judge_all(
    folder: Path,
    packages: Mapping[str, Package],
    grid: Mapping[str, Sequence[float | None]],
    tasks: Tasks,
    files: Mapping[str, Any],
    threads: int | None,
    steps: _Steps,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Rows of quality, quant by quant."""
    from edgeq.quality_api import evaluate_tasks
    from edgeq.runtime.evaluation import QUALITY_VERSION

    read = {task: file.sha256 for task, file in tasks.files.items()}
    against = _content(Path(files["reference"]))
    rows: list[dict[str, Any]] = []
    for quant, package in packages.items():
        about = [package.artifacts[0].sha256, read, against, tasks.ctx, tasks.chunks, tasks.chat, QUALITY_VERSION]
        places = {rate: folder / "measured" / f"quality-{_key([*about, rate])}.json" for rate in grid[quant]}
        missing = [rate for rate in grid[quant] if not places[rate].is_file()]
        for _ in range(len(places) - len(missing)):
            steps.did(_JUDGE, reused=True)
        for rate in missing:
            cuts = None if rate is None else [rate]
            found = evaluate_tasks([package.folder], rates=cuts, threads=threads, progress=progress, **files)
            _store(places[rate], {"rows": [row.to_json() for row in found]})
            steps.did(_JUDGE)
        for place in places.values():
            rows += [row for row in _stored(place)["rows"] if row not in rows]
    return rows


def _content(path: Path) -> str:
    """What a reference is: the hash of a file, or of a folder's files."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return _key([[file.name, sha256(file)] for file in files])


def _store(place: Path, content: Mapping[str, Any]) -> None:
    with staged_file(place, force=True) as stage:
        stage.write_text(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _stored(place: Path) -> dict[str, Any]:
    try:
        return json.loads(place.read_text(encoding="utf-8"))
    except ValueError as err:
        raise OutputError(f"{place} is damaged ({err}). Delete it and sweep again.") from err


def _write(target: Path, kind: str, rows: Sequence[dict[str, Any]]) -> Path:
    from edgeq.quality_api import write_results

    write_results(target, kind, rows, force=True)
    return target
