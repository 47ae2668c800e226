"""Writing an adapter as the folder that PEFT loads: adapter_config.json and adapter_model.safetensors, a plain LoRA.

Keys are "base_model.model." + module path + ".lora_A.weight" (rank, n_in) and ".lora_B.weight" (n_out, rank), of the embedding
".lora_embedding_A" (rank, n_vocab) and ".lora_embedding_B" (n_embd, rank). Strength is alpha / rank there; all of it is in B here, so every
module's alpha is its rank. Modules are named in full, ranks that differ stand in rank_pattern.

With fewer than 16 bits the numbers are codes, which PEFT does not read: they go into a file of their own, see
`edgeq.converters.adapters.coded`, beside the same adapter_config.json. `decoded_folder` makes a folder for PEFT of that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgeq import codec
from edgeq.codec import Coded
from edgeq.converters.adapters.coded import CODED, read_coded, save_coded, save_tensors
from edgeq.converters.adapters.peft import CONFIG, WEIGHTS
from edgeq.converters.adapters.sites import Site, model_sites
from edgeq.converters.sources.json_file import read_json_object
from edgeq.deltas.delta import Factors
from edgeq.errors import PlanError
from edgeq.low_rank import split, stacked
from edgeq.output import staged_folder
from edgeq.spec import ModelSpec
from edgeq.squeeze import Squeezed

FloatBits = Literal[16, 32]
_DTYPES = {16: np.float16, 32: np.float32}
_PREFIX = "base_model.model."


def by_module(spec: ModelSpec, factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """Factors of tensors ("layers.0.wq.weight") as those of the modules they lie in ("model.layers.0.self_attn.qkv_proj")."""
    modules: dict[str, Factors] = {}
    for path, site in model_sites(spec).items():
        parts = [factors.get(f"{stem}.weight") for stem, _ in site.pieces]
        if len(parts) == 1 and parts[0] is not None:
            modules[path] = parts[0]
        elif any(part is not None for part in parts):
            modules[path] = stacked([(rows, part) for (_, rows), part in zip(site.pieces, parts, strict=True)])
    return modules


def by_tensor(spec: ModelSpec, modules: Mapping[str, Factors]) -> dict[str, Factors]:
    """The other way round. Parts of a fused module share its directions."""
    sites, factors = model_sites(spec), {}
    for path, whole in modules.items():
        pieces = sites[path].pieces
        for (stem, _), part in zip(pieces, split(whole, [rows for _, rows in pieces]), strict=True):
            factors[f"{stem}.weight"] = part
    return factors


def write_peft_folder(
    folder: Path, modules: Mapping[str, Factors], spec: ModelSpec, *, base_name: str | None, bits: FloatBits = 32, force: bool = False
) -> None:
    """Write an adapter, by module, in numbers of 32 or 16 bits.

    The folder is whole or absent, and its bytes depend on the adapter alone. Raises PlanError for an adapter without modules or numbers
    beyond 16 bits, OutputError when the folder exists or the disk refuses.
    """
    sites = model_sites(spec)
    with staged_folder(folder, force=force) as stage:
        _write_config(stage, {path: factors.rank for path, factors in modules.items()}, base_name)
        tensors: dict[str, npt.NDArray[Any]] = {}
        for path, factors in modules.items():
            for key, values in _keyed(sites[path], factors.a, factors.b):
                tensors[key] = _rounded(path, values, bits)
        save_tensors(stage / WEIGHTS, tensors)


def write_coded_folder(
    folder: Path, modules: Mapping[str, Squeezed], spec: ModelSpec, *, base_name: str | None, force: bool = False
) -> None:
    """Write an adapter that was squeezed to 8 bits or fewer, in its codes. Raises as `write_peft_folder`."""
    sites = model_sites(spec)
    with staged_folder(folder, force=force) as stage:
        _write_config(stage, {path: module.rank for path, module in modules.items() if module.coded}, base_name)
        tensors: dict[str, Coded] = {}
        for path, module in modules.items():
            if module.coded:
                tensors |= _keyed(sites[path], *module.coded)
        save_coded(stage / CODED, tensors)


def decoded_folder(source: Path, target: Path, *, bits: FloatBits = 32, force: bool = False) -> None:
    """A folder of codes as one that PEFT loads. Raises SourceError and UnsupportedError as `load_coded`, OutputError besides."""
    config = read_json_object(source / CONFIG)
    values = {key: _rounded(key, decoded, bits) for key, decoded in read_coded(source / CODED).items()}
    with staged_folder(target, force=force, inputs=(source / CODED,)) as stage:
        _write_json(stage / CONFIG, config)
        save_tensors(stage / WEIGHTS, values)


def _keyed(site: Site, a: Any, b: Any) -> Iterator[tuple[str, Any]]:
    """Both halves, arrays or codes, under PEFT's keys; an embedding's are those of its transpose."""
    if site.kind == "embedding":
        yield f"{_PREFIX}{site.path}.lora_embedding_A", _transposed(b)
        yield f"{_PREFIX}{site.path}.lora_embedding_B", _transposed(a)
    else:
        yield f"{_PREFIX}{site.path}.lora_A.weight", a
        yield f"{_PREFIX}{site.path}.lora_B.weight", b


def _transposed(values: Any) -> Any:
    return codec.transposed(values) if isinstance(values, Coded) else values.T


def _rounded(what: str, values: npt.NDArray[Any], bits: FloatBits) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):
        rounded = np.ascontiguousarray(values, dtype=_DTYPES[bits])
    if not np.isfinite(rounded).all():
        raise PlanError(f"{what}: factors are beyond the largest {bits}-bit number. Use 32 bits.")
    return rounded


def _write_config(folder: Path, ranks: Mapping[str, int], base_name: str | None) -> None:
    if not ranks:
        raise PlanError("the adapter changes nothing, so there is nothing to write")
    counts = list(ranks.values())
    usual = max(counts, key=lambda rank: (counts.count(rank), rank))
    unusual = {path: rank for path, rank in ranks.items() if rank != usual}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "rank_pattern": unusual,
        "alpha_pattern": unusual,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(ranks),
    }
    _write_json(folder / CONFIG, config)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
