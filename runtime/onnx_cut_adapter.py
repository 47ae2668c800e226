"""Cutting a kept adapter with its graph: of an `.onnx_adapter` what a cut of an elastic ONNX folder keeps of the matrices beside it.

An adapter of a package has its rows and columns in the order of the elastic graph, so that a cut keeps a prefix: of B the first outputs of
a shortened matrix, of A its first inputs. A down projection's A takes on what it can of the lost channels, as for GGUF adapters
(`edgeq.runtime.cut_adapter`). The result says that it belongs to a cut of the plan that the adapter was for.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.compensation import HiddenModel
from edgeq.elastic import Kept
from edgeq.errors import AdapterError
from edgeq.onnx_adapter_file import SUFFIX, predicted_bytes, read_onnx_adapter, write_onnx_adapter
from edgeq.output import check_disk, staged_file
from edgeq.runtime.cut import CutResult, MemoryCut
from edgeq.runtime.cut_adapter import compensated_a
from edgeq.runtime.onnx_adapters import Pair, adapter_pairs, check_onnx_base, read_onnx_file
from edgeq.runtime.onnx_cut import roomy
from edgeq.runtime.onnx_cut_plan import plan_after
from edgeq.runtime.onnx_facts import facts_of
from edgeq.runtime.onnx_file import OnnxFile
from edgeq.runtime.onnx_sizes import read_sizes, sizes_after

Hidden = Mapping[int, HiddenModel]
Array = npt.NDArray[Any]


def cut_onnx_adapter(
    source: Path, target: Path, base: OnnxFile, kept: Kept, *, hidden: Hidden | None = None, force: bool = False
) -> CutResult:
    """Write the adapter `source` of an elastic graph, cut as that is, to `target`, which is whole or absent.

    hidden: by layer, for a cut that is compensated. removed_fraction: of the adapter's parameters. Raises AdapterError when the
    adapter is none, is damaged, or belongs to another graph; OutputError when the target exists, is an input, or the disk refuses.
    """
    parameters, plan, removed = _cut(source, base, kept, hidden)
    with staged_file(target, force=force, inputs=(source, *base.files)) as stage:
        check_disk(target, _nbytes(parameters))
        written = write_onnx_adapter(stage, parameters, plan=plan)
    return CutResult(bytes=written.nbytes, removed_fraction=removed)


def cut_onnx_adapter_to_memory(source: Path, base: OnnxFile, kept: Kept, *, hidden: Hidden | None = None) -> MemoryCut:
    """The same as a file of its own, in memory where the system has files there."""
    parameters, plan, removed = _cut(source, base, kept, hidden)
    folder = Path(tempfile.mkdtemp(prefix="edgeq-cut-", dir=roomy(_nbytes(parameters))))
    release = partial(shutil.rmtree, folder, ignore_errors=True)
    try:
        path = folder / source.with_suffix(SUFFIX).name
        written = write_onnx_adapter(path, parameters, plan=plan)
    except BaseException:
        release()
        raise
    return MemoryCut(path, CutResult(bytes=written.nbytes, removed_fraction=removed), release)


def _nbytes(parameters: Mapping[str, Array]) -> int:
    return predicted_bytes({name: (values.shape, values.dtype) for name, values in parameters.items()})


def cut_pairs(
    pairs: Mapping[str, Pair], left: Mapping[str, tuple[int, int]], *, hidden: Mapping[str, HiddenModel] | None = None
) -> dict[str, Pair]:
    """Of each module's pair as many rows of A and columns of B as (n_out, n_in) say. hidden: what is known of inputs that are cut."""
    return {module: _cut_pair(pair, *left[module], (hidden or {}).get(module)) for module, pair in pairs.items()}


def _cut_pair(pair: Pair, n_out: int, n_in: int, hidden: HiddenModel | None) -> Pair:
    a, b = pair
    if n_in < len(a):
        whole = np.ascontiguousarray(a.T, dtype=np.float32)
        a = a[:n_in] if hidden is None else compensated_a(whole, hidden, n_in).T.astype(a.dtype)
    return np.ascontiguousarray(a), np.ascontiguousarray(b[:, :n_out])


def _cut(source: Path, base: OnnxFile, kept: Kept, hidden: Hidden | None) -> tuple[dict[str, Array], str, float]:
    """(parameters, plan, removed fraction)."""
    facts = facts_of(base)
    check_onnx_base(read_onnx_file(source), facts)
    if facts.plan is None:
        raise AdapterError(
            f"{source}: {base.path} does not say which adapters belong to it. Export the model again with this adapter kept."
        )
    sizes, pairs = read_sizes(base), adapter_pairs(read_onnx_adapter(source))
    left = {module: sizes_after(module, (b.shape[1], len(a)), sizes, kept) for module, (a, b) in pairs.items()}
    models = {f"model.layers.{layer}.mlp.down_proj": model for layer, model in (hidden or {}).items()}
    cut = cut_pairs(pairs, left, hidden=models)
    parameters: dict[str, Array] = {}
    for module, (a, b) in cut.items():
        parameters |= {facts.places[module].a: a, facts.places[module].b: b}
    before, after = (sum(a.size + b.size for a, b in some.values()) for some in (pairs, cut))
    return parameters, plan_after(facts.plan, sizes, kept), 1 - after / before
