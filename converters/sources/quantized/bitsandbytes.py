"""bitsandbytes checkpoints: NF4 and FP4 in blocks, and LLM.int8().

4 bits, blocks of `blocksize` values of the flattened weight, first value in the high half of a byte:
    weight                                   two codes per byte, in whatever type `bnb_4bit_quant_storage` names
    weight.absmax                            scale of each block: float32, or with double quantization uint8 codes
    weight.quant_map                         the 16 values that codes stand for
    weight.nested_absmax, .nested_quant_map  double quantization: scale of each `nested_blocksize` codes, and 256 values
    weight.quant_state.bitsandbytes__nf4     JSON as bytes: quant_type, blocksize, shape, dtype, nested_blocksize, nested_offset
value = quant_map[code] * absmax, and with double quantization absmax = nested_quant_map[code] * nested_absmax + nested_offset (Dettmers
et al. 2023, arXiv:2305.14314). 8 bits: weight int8 (n_out, n_in), SCB float32 (n_out); value = code * SCB / 127. Outliers are a matter of
activations: the stored weight has all columns (Dettmers et al. 2022, arXiv:2208.07339). Both compute in float32 and round to the model's
type at last; here the last step is left out. https://github.com/bitsandbytes-foundation/bitsandbytes, bitsandbytes/functional.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.converters.sources.json_file import Section
from edgeq.converters.sources.quantized.groups import Groups, as_tensor, even_groups
from edgeq.converters.sources.quantized.options import refuse
from edgeq.converters.sources.quantized.parts import AGAIN, Decoded, Parts
from edgeq.errors import SourceError, UnsupportedError
from edgeq.group_grids import TABLES
from edgeq.tensors import LazyTensor

_STATE = "quant_state.bitsandbytes__"
# fmt: off
HARMLESS = frozenset({
    "_load_in_4bit", "_load_in_8bit",
    "llm_int8_threshold", "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight",
    "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage", "modules_to_not_convert",
})
# fmt: on


def read_bitsandbytes(config: Section, parts: Parts) -> Decoded:
    """Every weight that has a quantization state or row scales. Raises SourceError for broken tensors, UnsupportedError for options."""
    four, eight = (
        config.boolean(f"load_in_{bits}bit", default=False) or config.boolean(f"_load_in_{bits}bit", default=False) for bits in (4, 8)
    )
    if four == eight:
        raise SourceError(f"{config.path}: {config.within}load_in_4bit and load_in_8bit must say which of the two it is. {AGAIN}")
    kind = str(config.get("bnb_4bit_quant_type") or "fp4") if four else "int8"
    if four and kind not in ("nf4", "fp4"):
        raise UnsupportedError(f"{config.where('bnb_4bit_quant_type')} is {kind!r}; supported: nf4, fp4")
    refuse(config, HARMLESS)
    summary: dict[str, Any] = {"method": "bitsandbytes", "type": kind}
    if four:
        weights = {f"{m}.weight": _four_bit(parts, m, kind) for m in parts.modules(f"weight.{_STATE}{kind}")}
        alien = next((name for name in parts.stored if _STATE in name and name not in parts.taken), None)
        if alien is not None:
            raise SourceError(f"{alien} contradicts {config.where('bnb_4bit_quant_type')}, which is {kind!r}. {AGAIN}")
        summary["double_quantization"] = any(name.endswith(".nested_absmax") for name in parts.taken)
    else:
        weights = {f"{m}.weight": _eight_bit(parts, m) for m in parts.modules("SCB")}
    return Decoded(weights=weights, parts=frozenset(parts.taken), summary=summary)


@dataclass(frozen=True, kw_only=True)
class _State:
    """The JSON part of a quantization state."""

    shape: tuple[int, int]
    blocksize: int
    nested_blocksize: int
    nested_offset: float


def _state(parts: Parts, module: str, kind: str) -> _State:
    tensor = parts.take(module, f"weight.{_STATE}{kind}", ("U8",), (None,))
    try:
        values = json.loads(bytes(tensor.array()))
    except ValueError as err:
        raise SourceError(f"{tensor.origin} is not valid JSON ({err}). {AGAIN}") from err
    state = Section(values if isinstance(values, dict) else {}, tensor.file, within=f"{tensor.name}: ")
    shape = state.optional_list("shape")
    if shape is None or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
        raise SourceError(f"{state.where('shape')} is {shape!r}, expected rows and columns")
    if state.get("quant_type") != kind:
        raise SourceError(f"{state.where('quant_type')} is {state.get('quant_type')!r}, expected {kind!r}. {AGAIN}")
    offset = state.get("nested_offset") or 0.0
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise SourceError(f"{state.where('nested_offset')} is {offset!r}, expected a number")
    return _State(
        shape=(shape[0], shape[1]),
        blocksize=state.integer("blocksize"),
        nested_blocksize=state.optional_integer("nested_blocksize") or 256,
        nested_offset=float(offset),
    )


def _four_bit(parts: Parts, module: str, kind: str) -> LazyTensor:
    state = _state(parts, module, kind)
    n_out, n_in = state.shape
    n_values = n_out * n_in
    weight = parts.take(module, "weight", ("U8", "I8", "F16", "BF16", "F32", "F64"))
    packed = weight.data
    expected = -(-n_values // 2)
    if len(packed()) != expected:
        raise SourceError(f"{weight.origin} has {len(packed())} bytes, but {n_out} x {n_in} values of 4 bits take {expected}. {AGAIN}")
    quant_map = parts.take(module, "weight.quant_map", ("F32",), (16,))
    # the kernels of bitsandbytes have the table built in; its CPU code once rounded that of FP4 to four digits
    if not np.allclose(quant_map.array(), TABLES[kind], rtol=0, atol=1e-4):
        raise UnsupportedError(f"{quant_map.origin} is not the {kind} table. Use the float checkpoint, or a GGUF file of it.")
    n_blocks = -(-n_values // state.blocksize)
    nested = parts.has(module, "weight.nested_absmax")
    absmax = parts.take(module, "weight.absmax", ("U8",) if nested else ("F32",), (n_blocks,))
    if nested:
        n_nested = -(-n_blocks // state.nested_blocksize)
        nested_absmax = parts.take(module, "weight.nested_absmax", ("F32",), (n_nested,))
        nested_map = parts.take(module, "weight.nested_quant_map", ("F32",), (256,))
    size = math.gcd(n_in, state.blocksize)
    if size == 1:
        raise UnsupportedError(f"{weight.origin}: rows of {n_in} values do not go with blocks of {state.blocksize}")

    def codes(start: int, stop: int) -> npt.NDArray[np.uint8]:
        first, last = start * n_in, stop * n_in
        octets = packed()[first // 2 : -(-last // 2)]
        return np.stack([octets >> 4, octets & 15], axis=-1).reshape(-1)[first % 2 :][: last - first].reshape(-1, n_in)

    def scales(start: int, stop: int) -> npt.NDArray[np.float32]:
        block = np.arange(start * n_in, stop * n_in, size) // state.blocksize
        stored = absmax.array()[block]
        if nested:
            wide = nested_map.array().astype(np.float64)[stored] * nested_absmax.array()[block // state.nested_blocksize]
            stored = (wide + state.nested_offset).astype(np.float32)
        return stored.reshape(-1, n_in // size)

    return as_tensor(
        Groups(
            name=kind.upper(),
            shape=state.shape,
            code_bits=4,
            codes=codes,
            scales=scales,
            scale="F32",
            group=even_groups(n_in, size),
            table=kind,
            origin=weight.origin,
        )
    )


def _eight_bit(parts: Parts, module: str) -> LazyTensor:
    weight = parts.take(module, "weight", ("I8",), (None, None))
    n_out, n_in = weight.shape
    row_scale = parts.take(module, "SCB", ("F32",), (n_out,))
    # 0 is rows as they are; other values are tilings of old GPU kernels
    if parts.has(module, "weight_format") and (layout := parts.scalar(module, "weight_format")) != 0:
        raise UnsupportedError(f"{module}.weight_format is {layout}; supported: 0 (rows). Save the model again with a newer bitsandbytes.")

    def scales(start: int, stop: int) -> npt.NDArray[np.float64]:
        return (row_scale.array()[start:stop].astype(np.float64) / 127).reshape(-1, 1)

    return as_tensor(
        Groups(
            name="INT8",
            shape=(n_out, n_in),
            code_bits=8,
            codes=lambda start, stop: weight.array()[start:stop].view(np.uint8) ^ np.uint8(0x80),
            scales=scales,
            scale="F64",
            group=even_groups(n_in, n_in),
            center=128,
            origin=weight.origin,
        )
    )
