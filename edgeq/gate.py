"""The parity gate: what an artifact has to match, how closely, and the verdict. Its metrics are defined in `edgeq.runtime.quality`.

Limits follow the coarsest grid of the artifact, because that decides how far a faultless export may be from its source. LIMITS is
the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from edgeq.errors import PackageError, UsageError
from edgeq.grids import Grid, grid

# Tokens whose logits differ by no more than this are as good as equal: their probabilities are within 2 % of each other.
TIE_MARGIN = 0.02


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Limits, and the grid they are for: mean and p99 KL at most (nats), top-1 agreement at least (a share; near-ties agree)."""

    grid: str
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    tie_margin: float = TIE_MARGIN

    def faults(self, *, kl_mean: float, kl_p99: float, top1_agreement: float) -> list[str]:
        """What is beyond its limit, as sentences."""
        found = []
        for name, value, limit in (("mean KL", kl_mean, self.kl_mean), ("99th percentile of KL", kl_p99, self.kl_p99)):
            if not value <= limit:
                found.append(f"{name} from the reference is {value:.3g}; at most {limit:g} is expected of {self.grid}")
        if not top1_agreement >= self.top1_agreement:
            found.append(f"top-1 agreement is {top1_agreement:.2%}; at least {self.top1_agreement:.1%} is expected of {self.grid}")
        return found


@dataclass(frozen=True)
class Limit:
    """For grids of at least `bits` bits per weight (scales included)."""

    bits: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float


# Behind each row: mean KL, p99 and top-1 as measured on SmolLM2-135M over the gate's passages and 350 tokens of English, rounded without
# an importance matrix. So small a model loses the most, and scripts it hardly knows lose more than English; limits are two to
# thirty times what was measured.
LIMITS = (
    Limit(16, 2e-4, 2e-3, 0.995),  # F32 0.000001 0.00001 1.000; F16 0.000007 0.00004 1.000
    Limit(8, 0.03, 0.3, 0.88),  # Q8_0 0.007 0.04 0.948
    Limit(6.5, 0.08, 0.6, 0.80),  # Q6_K 0.024 0.16 0.902
    Limit(5.5, 0.35, 2.5, 0.65),  # Q5_0 0.136 0.99 0.788; Q5_1 0.121 0.85 0.788
    Limit(4, 1.0, 5.0, 0.40),  # Q4_0 0.434 2.28 0.588; IQ4_NL 0.293 1.70 0.685; 4 bits in blocks of 128 0.457 2.55 0.567
    Limit(3, 2.0, 8.0, 0.25),  # Q3_K 1.071 4.82 0.416
    Limit(0, 3.0, 12.0, 0.15),  # Q2_K 7.557 16.3 0.031: perplexity 39,293 instead of 25, and fails as it should
)
BF16_LIMIT = Limit(16, 2e-3, 2e-2, 0.97)  # 0.0002 0.0016 0.995: llama.cpp rounds activations to BF16 too
# For quantized weights that lost nothing: llama.cpp multiplies them with activations rounded to 8 bits. Q4_1 0.006 0.04 0.954,
# Q4_0 0.007 0.03 0.941, IQ4_NL 0.014 0.09 0.908, K-quants 0.016 to 0.025 and p99 to 0.17; a rope base off by 10 gives 0.119.
UNCHANGED_LIMIT = Limit(0, 0.05, 0.4, 0.85)


def thresholds_for(grids: Iterable[str | Grid], *, copied: Iterable[str | Grid] = ()) -> Thresholds:
    """Limits for an artifact whose matrices were rounded to `grids`, and others `copied` from the source as they were.

    Copied matrices have lost nothing: whatever their grid, they need room for the runtime's rounding of activations only. Pass
    matrices only: vectors stay in float and say nothing. Raises UsageError when there are none.

    With every matrix as `copied`, these are the limits for an artifact against its own rounded weights (`Fidelity`).
    """
    limits = [(_limit(g), g.name) for g in map(_grid, grids)]
    limits += [(max(_limit(g), UNCHANGED_LIMIT, key=_strictness), f"unchanged {g.name}") for g in map(_grid, copied)]
    if not limits:
        raise UsageError("no grids: give those of the artifact's matrices")
    limit, name = min(limits, key=lambda pair: (_strictness(pair[0]), pair[1]))
    return Thresholds(grid=name, kl_mean=limit.kl_mean, kl_p99=limit.kl_p99, top1_agreement=limit.top1_agreement)


def _grid(value: str | Grid) -> Grid:
    return value if isinstance(value, Grid) else grid(value)


def _limit(found: Grid) -> Limit:
    return BF16_LIMIT if found.name == "BF16" else next(limit for limit in LIMITS if found.bits >= limit.bits)


def _strictness(limit: Limit) -> float:
    return -limit.kl_mean


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """An artifact against the reference run on the artifact's own weights, so that rounding them is not counted.

    What is left is the runtime's rounding of activations, and faults in what surrounds the weights: a wrong rope base, norm epsilon
    or scale, which the loss of a coarse grid would hide. Fields as in GateResult.
    """

    thresholds: Thresholds
    tokens: int
    kl_mean: float
    kl_p99: float
    top1_agreement: float


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """The verdict on one artifact. None is unknown: it was not measured, or the artifact did not live to be measured.

    basis: "logits" of the reference model itself, or "fingerprint" for what of them a package carries.
    runtime: what ran the artifact, such as "llama-cpp-python 0.3.36 on CPU". tokens: positions compared.
    chat_template_equal is None where neither side has a template, and with a fingerprint. cut: of an elastic package, a cut of it by
    cut_rate against the reference on the cut's own weights.
    failures: why it failed, one sentence each; it passed when there are none.
    """

    basis: Literal["logits", "fingerprint"]
    runtime: str
    thresholds: Thresholds
    failures: tuple[str, ...]
    tokens: int = 0
    kl_mean: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top1_agreement: float | None = None
    perplexity_reference: float | None = None
    perplexity_artifact: float | None = None
    fidelity: Fidelity | None = None
    cut: Fidelity | None = None
    cut_rate: float | None = None
    adapters: Mapping[str, Fidelity] = field(default_factory=dict)
    tokenizer_equal: bool | None = None
    chat_template_equal: bool | None = None

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def compared(self) -> str:
        """How much was compared, for people."""
        return f"{self.tokens} tokens"

    def rows(self) -> list[tuple[str, str, str]]:
        """What was measured, the figure and its limit, for a table; what was not measured is left out."""
        limits = self.thresholds
        rows = []
        if self.kl_mean is not None and self.kl_p99 is not None and self.top1_agreement is not None:
            rows += [
                ("mean KL (nats)", f"{self.kl_mean:.2g}", f"at most {limits.kl_mean:g}"),
                ("99th percentile of KL", f"{self.kl_p99:.2g}", f"at most {limits.kl_p99:g}"),
                ("top-1 agreement", f"{self.top1_agreement:.2%}", f"at least {limits.top1_agreement:.1%}"),
            ]
        if self.perplexity_reference is not None and self.perplexity_artifact is not None:
            rows.append(("perplexity", f"{self.perplexity_artifact:.4g}", f"reference {self.perplexity_reference:.4g}"))
        if self.fidelity is not None:
            rows.append(("mean KL, own weights", f"{self.fidelity.kl_mean:.2g}", f"at most {self.fidelity.thresholds.kl_mean:g}"))
        if self.cut is not None and self.cut_rate is not None:
            rows.append((f"mean KL, cut by {self.cut_rate:.0%}", f"{self.cut.kl_mean:.2g}", f"at most {self.cut.thresholds.kl_mean:g}"))
        for name, found in self.adapters.items():
            rows.append((f"mean KL with {name}", f"{found.kl_mean:.2g}", f"at most {found.thresholds.kl_mean:g}"))
        for name, equal in (("token ids", self.tokenizer_equal), ("chat template", self.chat_template_equal)):
            if equal is not None:
                rows.append((name, "equal" if equal else "different", "equal"))
        return rows

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self), "failures": list(self.failures)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> GateResult:
        """Raises PackageError when a field is missing or unknown."""
        try:
            values = {name: value for name, value in document.items() if name != "passed"}
            missing = {field.name for field in fields(cls)} - values.keys()
            if missing:
                raise KeyError(", ".join(sorted(missing)))
            values |= {"failures": tuple(values["failures"]), "thresholds": Thresholds(**values["thresholds"])}
            for name in ("fidelity", "cut"):
                if values[name] is not None:
                    values[name] = _fidelity(values[name])
            values["adapters"] = {name: _fidelity(found) for name, found in values["adapters"].items()}
            return cls(**values)
        except (AttributeError, KeyError, TypeError) as err:
            raise PackageError(f"the gate result lacks or misspells {err}. The package is damaged; export it again.") from err


def _fidelity(document: Mapping[str, Any]) -> Fidelity:
    return Fidelity(**{**document, "thresholds": Thresholds(**document["thresholds"])})


class ReferenceScores(Protocol):
    """The reference model's logits over some windows of token ids.

    n_ctx: length of the context that an artifact is to be given for them (LongRoPE chooses its factors by it); no window is longer.
    """

    @property
    def windows(self) -> Sequence[Sequence[int]]: ...

    @property
    def n_ctx(self) -> int: ...

    def logits(self, i: int) -> npt.NDArray[np.float32]:
        """Logits of window i, float32 (n_tokens, n_vocab)."""
        ...
