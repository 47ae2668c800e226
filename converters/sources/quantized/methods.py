"""Which method a checkpoint is quantized with, and its stored tensors with the quantized weights put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from edgeq.converters.sources.json_file import Section
from edgeq.converters.sources.quantized.awq import read_awq
from edgeq.converters.sources.quantized.bitsandbytes import read_bitsandbytes
from edgeq.converters.sources.quantized.compressed_tensors import read_compressed_tensors
from edgeq.converters.sources.quantized.fp8 import read_fp8
from edgeq.converters.sources.quantized.gptq import read_gptq
from edgeq.converters.sources.quantized.hqq import read_hqq
from edgeq.converters.sources.quantized.options import REMEDY
from edgeq.converters.sources.quantized.parts import AGAIN, Decoded, Parts
from edgeq.converters.sources.stored import FLOATS, StoredTensor
from edgeq.errors import SourceError, UnsupportedError

METHODS: Mapping[str, Callable[[Section, Parts], Decoded]] = {
    "awq": read_awq,
    "bitsandbytes": read_bitsandbytes,
    "compressed-tensors": read_compressed_tensors,
    "fp8": read_fp8,
    "gptq": read_gptq,
    "hqq": read_hqq,
}


def check_method(config: Section) -> str:
    """The `quant_method` of a quantization_config. Raises UnsupportedError when it is none of METHODS."""
    method = config.get("quant_method")
    if method is None and (config.values.get("load_in_4bit") or config.values.get("load_in_8bit")):
        return "bitsandbytes"  # the first transformers versions with it did not name the method
    if method not in METHODS:
        named = "names no quant_method" if method is None else f"has quant_method {method!r}"
        raise UnsupportedError(f"{config.path}: {config.within.rstrip('.')} {named}; supported: {', '.join(METHODS)}. {REMEDY}")
    return str(method)


def put_together(stored: Mapping[str, StoredTensor], config: Section) -> tuple[dict[str, StoredTensor], Mapping[str, Any]]:
    """Stored tensors with each quantized weight as one tensor under its usual name, and what to tell people about the method.

    Raises UnsupportedError for a method or an option that is not described, SourceError when a tensor is missing, has a type or a shape
    that its method does not have, or is quantized without what it takes to decode it.
    """
    method = check_method(config)
    decoded = METHODS[method](config, Parts(stored=stored, method=method))
    if not decoded.weights:
        raise SourceError(f"{config.path}: {config.within.rstrip('.')} says {method}, but no tensor is quantized so. {AGAIN}")
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        if name not in decoded.parts:
            if name.endswith(".weight") and tensor.dtype not in FLOATS:
                raise SourceError(
                    f"{tensor.origin} is stored as {tensor.dtype}, but the scales that {method} keeps beside it are missing. {AGAIN}"
                )
            tensors[name] = tensor
    for name, weight in decoded.weights.items():
        part = next(stored[part] for part in sorted(decoded.parts) if part.startswith(name.removesuffix("weight")))
        if name in tensors:
            raise SourceError(f"{tensors[name].origin} is stored as floats and quantized by {method} too. {AGAIN}")
        tensors[name] = replace(part, name=name, dtype=weight.grid.name, shape=weight.shape, decoded=weight)
    return tensors, decoded.summary
