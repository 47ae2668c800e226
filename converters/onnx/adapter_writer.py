"""Writing an adapter as the `.onnx_adapter` that onnxruntime and onnxruntime-genai load beside a graph with places for it
(`edgeq.converters.onnx.lora`, `edgeq.onnx_adapter_file`).

Factors are as PEFT has them, (rank, n_in) and (n_out, rank), and stand turned in the file; strength is in B. Of an embedding, whose rows
are looked up, A is the table: what PEFT calls lora_B. Numbers are of the graph's own type, since ONNX Runtime takes no other. Float16 loses
little when directions are as strong in B as each other: see `edgeq.converters.adapters.gguf_writer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.converters.adapters.gguf_writer import LoraPair, balanced
from edgeq.converters.adapters.keep import KeptAdapter
from edgeq.converters.onnx.lora import a_name, b_name
from edgeq.converters.onnx.names import module_name
from edgeq.deltas.delta import Factors
from edgeq.errors import PlanError, UnsupportedError
from edgeq.families import family
from edgeq.gguf_write import Written
from edgeq.model import Model
from edgeq.onnx_adapter_file import write_onnx_adapter
from edgeq.output import staged_file

Array = npt.NDArray[Any]


def adapter_parameters(adapter: KeptAdapter, model: Model, *, half: bool) -> dict[str, Array]:
    """Matrices by the names of a graph's inputs, in the order of the model's tensors. half: of a graph that computes in float16.

    Raises PlanError for an adapter without factors, UnsupportedError for numbers that float16 does not reach.
    """
    if not adapter.factors:
        raise PlanError(f"adapter {adapter.name!r} changes nothing")
    order = {name: i for i, name in enumerate((*model.tensors, "head.weight"))}
    found: dict[str, Array] = {}
    for name in sorted(adapter.factors, key=order.__getitem__):
        canonical = name.removesuffix(".weight")
        module = module_name(family(model.spec.family), canonical)
        a, b = _turned(canonical, adapter.factors[name], half)
        if half and not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise UnsupportedError(
                f"adapter {adapter.name!r}: its change of {module} is too strong for float16. Merge it (--adapters merge), or export the "
                "model in a precision that computes in float32."
            )
        found |= {a_name(module): a, b_name(module): b}
    return found


def write_kept_adapter(path: Path, adapter: KeptAdapter, model: Model, *, half: bool, plan: str, force: bool = False) -> Written:
    """Write factors on a model for its graph; the file is whole or absent. plan: of the graph.

    Raises as `adapter_parameters`, and OutputError.
    """
    parameters = adapter_parameters(adapter, model, half=half)
    with staged_file(path, force=force) as stage:
        return write_onnx_adapter(stage, parameters, plan=plan)


def _turned(canonical: str, factors: Factors, half: bool) -> tuple[Array, Array]:
    """(n_in, rank) and (rank, n_out)."""
    embeds = canonical == "embed"
    pair = (
        LoraPair(name=canonical, a=factors.b, b=factors.a.T, flipped=True) if embeds else LoraPair(name=canonical, a=factors.a, b=factors.b)
    )
    dtype: Mapping[bool, Any] = {True: np.float16, False: np.float32}
    with np.errstate(over="ignore"):
        pair = balanced(pair) if half else pair
        a, b = (values.astype(dtype[half]) for values in (pair.a if embeds else pair.a.T, pair.b.T))
    return np.ascontiguousarray(a), np.ascontiguousarray(b)
