"""The gate of embedding packages: how far an artifact's embeddings may point away from the source's, and the verdict.

Every text of `edgeq.gate_prompts` (ordinary passages in eleven languages, code, and lines that are hard to tokenize) is embedded by the
source in float, alone, and by the artifact in its runtime, in batches with padding. Metrics:

    cosine_mean, cosine_min   between the two embeddings of a text, over all texts
    similarity_error          largest difference between the two, of the cosine of any pair of texts: what a search would notice
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgeq.errors import PackageError, UsageError
from edgeq.gate_prompts import gate_prompts

Embeddings = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CosineLimits:
    """For a format: least mean and least single cosine."""

    format: str
    cosine_mean: float
    cosine_min: float

    def faults(self, found: Closeness, *, of: str = "the source") -> list[str]:
        """What is beyond its limit, as sentences."""
        faults = []
        for name, value, limit in (("mean", found.cosine_mean, self.cosine_mean), ("least", found.cosine_min, self.cosine_min)):
            if not value >= limit:
                faults.append(f"{name} cosine to {of} is {value:.5f}; at least {limit:g} is expected of {self.format}")
        return faults


# Behind each row: mean and least cosine measured on all-MiniLM-L6-v2, a small model (6 layers of 384), over all texts; English text alone
# loses a third of it. Limits allow three to ten times the loss.
LIMITS: Mapping[str, CosineLimits] = {
    row.format: row
    for row in (
        CosineLimits("fp32", 0.99999, 0.9999),  # 1.0000000 1.0000000
        CosineLimits("fp16", 0.9999, 0.999),  # 0.9999993 0.9999982
        CosineLimits("Q8_0", 0.997, 0.99),  # 0.99939 0.99817
        CosineLimits("int8", 0.98, 0.93),  # 0.99523 0.98175; 0.99281 0.97795 in the range for x86 without VNNI
        CosineLimits("int4", 0.9, 0.75),  # 0.98198 0.95144; 0.962 0.914 without compensation
    )
}
# Against the reference on the artifact's own rounded weights: what is left is rounding activations to 8 bits, and faults of the graph.
OWN_LIMITS: Mapping[str, CosineLimits] = {
    row.format: row
    for row in (
        CosineLimits("Q8_0", 0.997, 0.99),
        CosineLimits("int8", 0.98, 0.93),
        CosineLimits("int4", 0.997, 0.985),
    )
}


@dataclass(frozen=True, kw_only=True)
class Closeness:
    """Two sets of embeddings of the same texts; see the module's docstring."""

    texts: int
    cosine_mean: float
    cosine_min: float
    similarity_error: float


@dataclass(frozen=True, kw_only=True)
class EncoderGate:
    """The verdict on one artifact. basis: what it was compared with. own: with the reference on the artifact's own rounded weights; None
    for float formats, and for a fingerprint. worst: the text of the least cosine. failures: one sentence each; passed when there are none.
    """

    basis: Literal["source", "fingerprint"]
    runtime: str
    limits: CosineLimits
    found: Closeness
    worst: str
    own: Closeness | None = None
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def compared(self) -> str:
        """How much was compared, for people."""
        return f"{self.found.texts} texts"

    def rows(self) -> list[tuple[str, str, str]]:
        """What was measured, the figure and its limit, for a table."""
        found, limits = self.found, self.limits
        rows = [
            ("mean cosine", f"{found.cosine_mean:.5f}", f"at least {limits.cosine_mean:g}"),
            (f"least cosine ({self.worst})", f"{found.cosine_min:.5f}", f"at least {limits.cosine_min:g}"),
            ("similarities off by at most", f"{found.similarity_error:.4f}", "-"),
        ]
        if self.own is not None:
            rows.append(("mean cosine, own weights", f"{self.own.cosine_mean:.5f}", f"at least {OWN_LIMITS[limits.format].cosine_mean:g}"))
        return rows

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self), "failures": list(self.failures)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> EncoderGate:
        """Raises PackageError when a field is missing or unknown."""
        try:
            values = {name: value for name, value in document.items() if name != "passed"}
            missing = {field.name for field in fields(cls)} - values.keys()
            if missing:
                raise KeyError(", ".join(sorted(missing)))
            values |= {"failures": tuple(values["failures"]), "limits": CosineLimits(**values["limits"])}
            values |= {"found": Closeness(**values["found"]), "own": None if values["own"] is None else Closeness(**values["own"])}
            return cls(**values)
        except (AttributeError, KeyError, TypeError) as err:
            raise PackageError(f"the gate result lacks or misspells {err}. The package is damaged; export it again.") from err


def gate_texts() -> tuple[str, ...]:
    """What every gate embeds."""
    return tuple(text.text for text in gate_prompts().texts)


def judge(
    embeddings: Embeddings,
    reference: Embeddings,
    *,
    format: str,
    runtime: str,
    basis: Literal["source", "fingerprint"] = "source",
    own: Embeddings | None = None,
) -> EncoderGate:
    """Compare an artifact's embeddings of `gate_texts` with the source's, (n_texts, n_out) each. own: of the reference on its weights."""
    limits = LIMITS[format]
    found, worst = compare(embeddings, reference)
    failures = limits.faults(found)
    close = None
    if own is not None:
        close = compare(embeddings, own)[0]
        failures += OWN_LIMITS[format].faults(close, of="the reference on its own weights")
    name = gate_prompts().texts[worst].name
    return EncoderGate(basis=basis, runtime=runtime, limits=limits, found=found, worst=name, own=close, failures=tuple(failures))


def compare(embeddings: Embeddings, reference: Embeddings) -> tuple[Closeness, int]:
    """How close two sets are, (n_texts, n_out) each, and which text is the furthest off. What is not finite is as far off as can be."""
    if embeddings.shape != reference.shape:
        raise UsageError(f"embeddings of shape {list(embeddings.shape)} cannot be compared with others of shape {list(reference.shape)}")
    a, b = _unit(embeddings), _unit(reference)
    cosines = np.nan_to_num((a * b).sum(1), nan=-1.0)
    similarity = float(np.nan_to_num(np.abs(a @ a.T - b @ b.T), nan=2.0).max())
    close = Closeness(texts=len(a), cosine_mean=float(cosines.mean()), cosine_min=float(cosines.min()), similarity_error=similarity)
    return close, int(cosines.argmin())


def _unit(vectors: Embeddings) -> npt.NDArray[np.float64]:
    wide = np.where(np.isfinite(vectors), vectors, np.nan).astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
