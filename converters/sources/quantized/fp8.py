"""FP8 weights with scales per block, per tensor or per row, as `quant_method: fp8` has them (DeepSeek-V3 and after).

    weight             F8_E4M3 (n_out, n_in)
    weight_scale_inv   (ceil(n_out / rows), ceil(n_in / columns)) for weight_block_size [rows, columns]; or one value per tensor
    weight_scale       the same, as checkpoints without blocks call it
value = weight * scale (the name is that of the reciprocal which quantizing multiplied with). Scales of activations, `input_scale` and
`activation_scale`, say nothing about weights. DeepSeek-V3 technical report, arXiv:2412.19437, section 3.3.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgeq.converters.sources.json_file import Section
from edgeq.converters.sources.quantized.groups import Groups, Rows, as_tensor, even_groups
from edgeq.converters.sources.quantized.options import choice, refuse
from edgeq.converters.sources.quantized.parts import SCALES, Decoded, Parts
from edgeq.converters.sources.stored import StoredTensor
from edgeq.errors import SourceError
from edgeq.group_grids import as_numbers
from edgeq.tensors import LazyTensor

TABLE_OF = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
HARMLESS = frozenset({"activation_scheme", "ignored_layers", "modules_to_convert", "modules_to_not_convert", "dequantize", "scale_fmt"})


def read_fp8(config: Section, parts: Parts) -> Decoded:
    """Every weight with a scale. Raises UnsupportedError for options that are not described here, SourceError for broken tensors."""
    block = config.optional_list("weight_block_size")
    if block is not None and (len(block) != 2 or not all(type(n) is int and n > 0 for n in block)):
        raise SourceError(f"{config.where('weight_block_size')} is {block!r}, expected rows and columns")
    choice(config, "fmt", ("e4m3", "float8_e4m3fn"), default="e4m3")
    choice(config, "expert_dtype", ("fp8",), default="fp8")
    refuse(config, HARMLESS)
    weights = {}
    for suffix in ("weight_scale_inv", "weight_scale"):
        for module in parts.modules(suffix):
            scale = parts.take(module, suffix, (*SCALES, "F8_E8M0"))
            weights[f"{module}.weight"] = float8(parts, module, scale, None if block is None else (block[0], block[1]))
            parts.drop(module, "input_scale", "activation_scale")
    summary = {"method": "fp8", "type": "e4m3", "block": block}
    return Decoded(weights=weights, parts=frozenset(parts.taken), summary=summary)


def float8(parts: Parts, module: str, scale: StoredTensor, block: tuple[int, int] | None) -> LazyTensor:
    """An 8-bit float weight. block: rows and columns that share a scale; None for one scale per tensor or per row."""
    weight = parts.take(module, "weight", tuple(TABLE_OF), (None, None))
    n_out, n_in = weight.shape
    size = n_in if block is None else block[1]
    return as_tensor(
        Groups(
            name=f"FP8 {weight.dtype.removeprefix('F8_')}",
            shape=(n_out, n_in),
            code_bits=8,
            codes=lambda start, stop: weight.array()[start:stop],
            scales=spread_scales(scale, (n_out, n_in), block),
            scale="F32",
            group=even_groups(n_in, size),
            table=TABLE_OF[weight.dtype],
            origin=weight.origin,
        )
    )


def spread_scales(scale: StoredTensor, shape: tuple[int, int], block: tuple[int, int] | None) -> Rows:
    """Reader of scales, float32 (rows, groups), from one per tensor, per row or per block. Raises SourceError for other shapes."""
    n_out, n_in = shape
    per_block = block and (-(-n_out // block[0]), -(-n_in // block[1]))
    known = {per_block} if per_block else {(), (1,), (1, 1), (n_out,), (n_out, 1)}
    if scale.shape not in known:
        wanted = " or ".join(str(list(s)) for s in sorted(known, key=str))
        raise SourceError(f"{scale.origin} has shape {list(scale.shape)}, expected {wanted} for a weight of shape {list(shape)}")

    def read(start: int, stop: int) -> npt.NDArray[np.float32]:
        rows = as_numbers(scale.array(), scale.dtype).astype(np.float32)
        rows = rows.reshape(per_block) if per_block else rows.reshape(-1, 1)
        height = block[0] if block else (1 if len(rows) == n_out else n_out)
        return rows[np.arange(start, stop) // height]

    return read
