"""Which weights an adapter belongs to: a fingerprint of a model that is taken in a moment and fits on a line.

    "1:<sha256>:<sketch>"

The hash is over canonical names, shapes and the values of a few rows of every tensor, decoded to float32, so that it does not depend on
the file format; a model rounded to another number format is another model to it. The sketch tells how far another one: 64 values from all
over the model, each relative to its row's root mean square, in steps of 1/32, one signed byte each in hex. Rounding to 4 bits moves a
sketch by about 0.1 of its length, other weights by about 1.4.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgeq.errors import SourceError
from edgeq.tensors import LazyTensor

GGUF_FIELD = "edgeq.base.fingerprint"  # text, in the header of an adapter file that edgeq wrote
Kinship = Literal["same", "near", "other"]
ROWS = 3  # of every matrix
SKETCH = 64  # values
FAR = 0.7  # from which distance two sketches are of different weights
_STEPS = 32  # per root mean square
_GOLDEN = (math.sqrt(5) - 1) / 2
_FORM = re.compile(r"1:(?P<digest>[0-9a-f]{64}):(?P<sketch>[0-9a-f]{128})")


@dataclass(frozen=True)
class Fingerprint:
    """digest: hex. sketch: SKETCH whole numbers from -127 to 127."""

    digest: str
    sketch: tuple[int, ...]

    def __str__(self) -> str:
        return f"1:{self.digest}:{np.array(self.sketch, dtype=np.int8).tobytes().hex()}"

    @staticmethod
    def parse(text: str, *, where: str) -> Fingerprint:
        """Raises SourceError naming `where` for what is no fingerprint."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise SourceError(
                f"{where} is {text[:40]!r}, which is no fingerprint of a model that this edgeq reads. Remove it, or get the file again."
            )
        return Fingerprint(match["digest"], tuple(np.frombuffer(bytes.fromhex(match["sketch"]), dtype=np.int8).tolist()))

    def distance(self, other: Fingerprint) -> float:
        """Between sketches, relative to this one's length; 0 when both are empty of values."""
        one, two = (np.array(sketch, dtype=np.float64) for sketch in (self.sketch, other.sketch))
        length = float(np.linalg.norm(one)) or 1.0
        return float(np.linalg.norm(one - two)) / length

    def kinship(self, other: Fingerprint) -> Kinship:
        """near: the same model in another number format, or one trained a little further."""
        if self.digest == other.digest:
            return "same"
        return "near" if self.distance(other) < FAR else "other"


def take_fingerprint(tensors: Mapping[str, LazyTensor]) -> Fingerprint:
    """Of a model's tensors, by canonical name. Reads ROWS rows of every matrix, and vectors whole."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        if len(tensor.shape) == 1:
            digest.update(tensor.decode().tobytes())
            continue
        for row in sorted({i * (tensor.n_rows - 1) // (ROWS - 1) for i in range(ROWS)}):
            digest.update(tensor.decode(row, row + 1).tobytes())
    return Fingerprint(digest.hexdigest(), _sketch(tensors))


def _sketch(tensors: Mapping[str, LazyTensor]) -> tuple[int, ...]:
    matrices = [tensor for _, tensor in sorted(tensors.items()) if len(tensor.shape) == 2]
    found = []
    for i in range(SKETCH if matrices else 0):
        tensor = matrices[i * len(matrices) // SKETCH]
        row, col = (int(n * (i * step % 1.0)) for n, step in zip(tensor.shape, (_GOLDEN, _GOLDEN**2), strict=True))
        values = tensor.decode(row, row + 1)[0].astype(np.float64)
        size = math.sqrt(float((values**2).mean())) or 1.0
        found.append(round(min(127.0, max(-127.0, values[col] / size * _STEPS))))
    return tuple(found) if found else (0,) * SKETCH


def check_base(
    stored: str | None, tensors: Mapping[str, LazyTensor], *, adapter: str, model: str, where: str, force: bool = False
) -> str | None:
    """Compare the fingerprint that came with an adapter with the model at hand: a sentence for the user, or None when all is well.

    None is returned for an adapter without one too. Raises SourceError when the weights are another model's, unless force makes that a
    sentence.
    """
    if stored is None:
        return None
    known, here = Fingerprint.parse(stored, where=where), take_fingerprint(tensors)
    kinship = known.kinship(here)
    if kinship == "same":
        return None
    distance = known.distance(here)
    if kinship == "near":
        return (
            f"adapter {adapter!r} was made for weights that are close to those of {model} but not the same (they differ by "
            f"{distance:.0%}): the same model in another number format, or one trained further"
        )
    message = f"adapter {adapter!r} was made for other weights than those of {model}, though its shapes fit"
    if not force:
        raise SourceError(f"{message}. Use its own base model, or --other-base if you know better.")
    return message
