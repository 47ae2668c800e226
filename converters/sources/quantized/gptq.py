"""GPTQ checkpoints (AutoGPTQ, GPTQModel, optimum), bits 2, 3, 4 and 8.

For a linear of n_in inputs and n_out outputs, in int32 words that hold values back to back:
    qweight (n_in * bits / 32, n_out)       codes, packed along the inputs
    qzeros  (n_groups, n_out * bits / 32)   zero points, packed along the outputs
    scales  (n_groups, n_out)               16-bit floats
    g_idx   (n_in)                          group of each input; not in order with `desc_act`
weight[o, i] = (code[i, o] - zero[g, o]) * scale[g, o] with g = g_idx[i]. Format `gptq_v2` stores zero points as they are, `gptq` (v1) minus
one. GPTQModel adds one to every value of the packed words, carries included, and so do we; to 3-bit values, which words cut, one by one as
AutoGPTQ does.
https://github.com/ModelCloud/GPTQModel, gptqmodel/nn_modules/qlinear and gptqmodel/utils/model.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.converters.sources.json_file import Section
from edgeq.converters.sources.quantized.groups import Groups, as_tensor, even_groups
from edgeq.converters.sources.quantized.options import choice, refuse
from edgeq.converters.sources.quantized.packing import unpack_words
from edgeq.converters.sources.quantized.parts import SCALES, Decoded, Parts
from edgeq.errors import SourceError, UnsupportedError
from edgeq.tensors import LazyTensor

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")
# Settings of quantizing, loading and running; what they chose stands in the tensors.
# fmt: off
HARMLESS = frozenset({
    "act_group_aware", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs", "damp_auto_increment", "damp_percent",
    "dataset", "desc_act", "disable_exllama", "exllama_config", "fail_safe", "failsafe", "gptaq", "hyb_act", "lm_head", "max_input_length",
    "meta", "method", "model_file_base_name", "model_name_or_path", "model_seqlen", "module_name_preceding_first_block",
    "modules_in_block_to_quantize", "mse", "offload_to_disk", "offload_to_disk_path", "pack_impl", "pad_token_id", "static_groups",
    "tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama", "v2", "vram_strategy",
})
# fmt: on


def read_gptq(config: Section, parts: Parts) -> Decoded:
    """Every module that has a qweight. Raises UnsupportedError for options that are not described here, SourceError for broken tensors."""
    bits = choice(config, "bits", BITS)
    group_size = config.get("group_size")
    if type(group_size) is not int or group_size == 0 or group_size < -1:
        raise SourceError(f"{config.where('group_size')} is {group_size!r}, expected a positive whole number, or -1 for one group per row")
    stated = "checkpoint_format" if config.get("checkpoint_format") is not None else "format"
    v1 = choice(config, stated, FORMATS, default="gptq") == "gptq"
    choice(config, "format", FORMATS, default="gptq")
    choice(config, "is_marlin_format", (False,), default=False)
    choice(config, "pack_dtype", ("int32",), default="int32")
    symmetric = config.boolean("sym", default=True)
    overrides = config.get("dynamic") or {}
    if not isinstance(overrides, dict) or any(not key.startswith("-:") for key in overrides):
        raise UnsupportedError(
            f"{config.where('dynamic')} gives modules bits or groups of their own, which is not read; only exclusions (-:) are. "
            "Use the float checkpoint, or a GGUF file of it."
        )
    weights = {f"{m}.weight": _weight(parts, m, bits, group_size, v1=v1) for m in parts.modules("qweight")}
    refuse(config, HARMLESS)
    summary = {"method": "gptq", "bits": bits, "group_size": group_size, "symmetric": symmetric, "format": "gptq" if v1 else "gptq_v2"}
    return Decoded(weights=weights, parts=frozenset(parts.taken), summary=summary)


def _weight(parts: Parts, module: str, bits: int, group_size: int, *, v1: bool) -> LazyTensor:
    qweight = parts.take(module, "qweight", ("I32",), (None, None))
    n_words, n_out = qweight.shape
    n_in = n_words * 32 // bits
    if n_words * 32 % bits:
        raise SourceError(f"{qweight.origin} has {n_words} rows, which is no whole number of {bits}-bit values")
    n_groups = 1 if group_size == -1 else -(-n_in // group_size)
    scales = parts.take(module, "scales", SCALES, (n_groups, n_out))
    qzeros = parts.take(module, "qzeros", ("I32",), (n_groups, -(-n_out * bits // 32)))
    group = even_groups(n_in, n_in if group_size == -1 else group_size)
    if parts.has(module, "g_idx"):
        group = parts.take(module, "g_idx", ("I32", "I64"), (n_in,)).array().astype(np.int32)

    most = (1 << bits) - 1

    def codes(start: int, stop: int) -> npt.NDArray[np.uint8]:
        return unpack_words(qweight.array()[:, start:stop].T, bits, 0, n_in)

    def zeros(start: int, stop: int) -> npt.NDArray[np.uint8]:
        low, high = start // 32 * bits, -(-stop // 32) * bits  # 32 values fill whole words
        words = qzeros.array()[:, low:high]
        if v1 and bits != 3:
            words = words.view(np.uint32) + np.uint32(0xFFFFFFFF // most)
        first = start // 32 * 32
        values = unpack_words(words, bits, start - first, stop - first)
        return (values + np.uint8(1) & np.uint8(most) if v1 and bits == 3 else values).T

    def stored_scales(start: int, stop: int) -> npt.NDArray[Any]:
        return scales.array()[:, start:stop].T

    return as_tensor(
        Groups(
            name=f"GPTQ {bits}-bit",
            shape=(n_out, n_in),
            code_bits=bits,
            codes=codes,
            scales=stored_scales,
            scale=scales.dtype,
            group=group,
            zeros=zeros,
            zero="U8",
            origin=f"{qweight.file}: {module}.weight",
        )
    )
