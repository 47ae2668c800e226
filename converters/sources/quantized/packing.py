"""Codes packed into words, as the methods store them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def unpack_words(words: npt.NDArray[Any], bits: int, start: int, stop: int) -> npt.NDArray[np.uint8]:
    """Values start..stop of int32 words (rows, n_words) that hold values of `bits` bits back to back, from the low bits up.

    A value may begin in one word and end in the next, as 3-bit values do.
    """
    first, last = start * bits // 32, -(-stop * bits // 32)
    packed = np.ascontiguousarray(words[:, first:last]).view(np.uint32)
    if 32 % bits == 0:
        octets = packed.view(np.uint8)
        spread = octets[..., None] >> np.arange(0, 8, bits, dtype=np.uint8) & np.uint8((1 << bits) - 1)
        skipped = start - first * 32 // bits
        return spread.reshape(len(packed), -1)[:, skipped : skipped + stop - start]
    places = np.arange(start, stop) * bits - first * 32
    word, shift = places // 32, (places % 32).astype(np.uint64)
    wide = packed.astype(np.uint64)
    joined = wide[:, word] | wide[:, np.minimum(word + 1, packed.shape[1] - 1)] << np.uint64(32)
    return (joined >> shift & np.uint64((1 << bits) - 1)).astype(np.uint8)
