"""AWQ checkpoints in AutoAWQ's `gemm` layout, 4 bits.

In int32 words of eight values each, with values in the order 0 2 4 6 1 3 5 7 from the low bits up:
    qweight (n_in, n_out / 8)       codes
    qzeros  (n_groups, n_out / 8)   zero points
    scales  (n_groups, n_out)       16-bit floats
weight[o, i] = (code[i, o] - zero[g, o]) * scale[g, o] with g = i // group_size. Lin et al. 2023, arXiv:2306.00978;
https://github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py and awq/utils/packing_utils.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.converters.sources.json_file import Section
from edgeq.converters.sources.quantized.groups import Groups, as_tensor, even_groups
from edgeq.converters.sources.quantized.options import choice, refuse
from edgeq.converters.sources.quantized.parts import SCALES, Decoded, Parts
from edgeq.errors import SourceError
from edgeq.tensors import LazyTensor

# Where in a word each of eight outputs lies.
_PLACE = np.array([0, 4, 1, 5, 2, 6, 3, 7])
# fmt: off
HARMLESS = frozenset({
    "backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse", "modules_to_not_convert", "desc_act", "sym", "meta",
    "true_sequential", "damp_percent", "act_group_aware", "batch_size", "cache_block_outputs", "lm_head",
})
# fmt: on


def read_awq(config: Section, parts: Parts) -> Decoded:
    """Every module that has a qweight. Raises UnsupportedError for options that are not described here, SourceError for broken tensors."""
    choice(config, "bits" if config.get("bits") is not None else "w_bit", (4,))
    size_key = "group_size" if config.get("group_size") is not None else "q_group_size"
    group_size = config.get(size_key)
    if type(group_size) is not int or group_size == 0 or group_size < -1:
        raise SourceError(f"{config.where(size_key)} is {group_size!r}, expected a positive whole number, or -1 for one group per row")
    for key in ("version", "format"):
        choice(config, key, ("gemm",), default="gemm")
    choice(config, "zero_point", (True,), default=True)
    weights = {f"{m}.weight": _weight(parts, m, group_size) for m in parts.modules("qweight")}
    refuse(config, HARMLESS)
    summary = {"method": "awq", "bits": 4, "group_size": group_size, "format": "gemm"}
    return Decoded(weights=weights, parts=frozenset(parts.taken), summary=summary)


def _weight(parts: Parts, module: str, group_size: int) -> LazyTensor:
    qweight = parts.take(module, "qweight", ("I32",), (None, None))
    n_in, n_words = qweight.shape
    size = n_in if group_size == -1 else group_size
    if n_in % size:
        raise SourceError(f"{qweight.origin} has {n_in} rows, which do not divide into groups of {size} as config.json has them")
    qzeros = parts.take(module, "qzeros", ("I32",), (n_in // size, n_words))
    scales = parts.take(module, "scales", SCALES, (n_in // size, 8 * n_words))

    def stored_scales(start: int, stop: int) -> npt.NDArray[Any]:
        return scales.array()[:, start:stop].T

    return as_tensor(
        Groups(
            name="AWQ 4-bit",
            shape=(8 * n_words, n_in),
            code_bits=4,
            codes=lambda start, stop: _outputs(qweight.array(), start, stop),
            scales=stored_scales,
            scale=scales.dtype,
            group=even_groups(n_in, size),
            zeros=lambda start, stop: _outputs(qzeros.array(), start, stop),
            zero="U8",
            origin=f"{qweight.file}: {module}.weight",
        )
    )


def _outputs(words: npt.NDArray[np.int32], start: int, stop: int) -> npt.NDArray[np.uint8]:
    """Values of outputs start..stop, (stop - start, rows of `words`)."""
    first = start // 8
    octets = np.ascontiguousarray(words[:, first : -(-stop // 8)]).view(np.uint8)
    values = np.stack([octets & 15, octets >> 4], axis=-1).reshape(len(words), -1, 8)[..., _PLACE].reshape(len(words), -1)
    return values[:, start - first * 8 : stop - first * 8].T
