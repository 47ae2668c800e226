"""What to use, what is slower than it should be, what nothing else beats. Pure functions of variants and limits.

Which metric speaks for quality: the first of `PREFERENCE` that every candidate has, else the first that any has. "Loses little" means
within `TOLERANCE` of the best candidate.

The rule of `recommend`: of the candidates that keep within every limit, those that lose little; of these the one that decodes fastest, and
of those whose speeds do not differ measurably, the one that takes least memory. Without quality figures a smaller format cannot be told
from a worse one, and the least compressed candidate within the limits is named instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgeq.runtime.bench_kernels import Phase
from edgeq.runtime.report.kernels import reason as kernel_reason
from edgeq.runtime.report.read import Quality, Variant
from edgeq.sizes import size

PREFERENCE = ("kl_mean", "perplexity", "acc_norm", "acc", "exact_match")
LOWER_IS_BETTER = frozenset({"kl_mean", "kl_p99", "perplexity", "nll_mean"})
TOLERANCE = "KL 0.05 nats, perplexity 5 %, accuracies 2 points or two standard errors"
CLOSE = 0.03  # relative difference of speeds that have no intervals and count as one
MORE_BYTES = 0.01  # by which one variant must exceed another to count as less compressed
ALIKE = 0.15  # by which one may be smaller and still be alike
USUAL_PROMPT = 512
_SPEEDS: tuple[tuple[str, str, Phase], ...] = (("decode_tok_s", "decodes", "decode"), ("prefill_tok_s", "computes prompts", "prefill"))
METRICS = {
    "kl_mean": "mean KL",
    "kl_p99": "KL p99",
    "top1_agreement": "top-1 agreement",
    "acc_norm": "acc norm",
    "exact_match": "exact match",
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a variant must keep within; None does not limit. origin: who says so, for people. bytes of memory while it runs."""

    origin: str
    memory_bytes: int | None = None
    ttft_ms: float | None = None
    decode_tok_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a variant keeps within the limits: misses says where not, unknown what was not measured."""

    misses: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def qualifies(self) -> bool:
        return not self.misses


@dataclass(frozen=True, kw_only=True)
class SlowVariant:
    """variant: number of the one it is about. reason: why, when that is known."""

    variant: int
    text: str
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """variant: number of the one to use; None when none qualifies. adapter: whose variants were looked at. reasons: sentences."""

    adapter: str | None
    variant: int | None
    reasons: tuple[str, ...]


def judge(v: Variant, limits: Limits | None) -> Verdict:
    """A variant that was not timed has no misses, and nothing known."""
    if limits is None:
        return Verdict(misses=(), unknown=())
    checks = (
        ("memory", v.memory_bytes, limits.memory_bytes, False, size),
        ("time to first token", v.figure("ttft_ms"), limits.ttft_ms, False, lambda x: f"{x:,.0f} ms"),
        ("decode speed", v.figure("decode_tok_s"), limits.decode_tok_s, True, lambda x: f"{x:,.1f} tok/s"),
    )
    misses, unknown = [], []
    for name, value, limit, more_is_better, shown in checks:
        if limit is None:
            continue
        if value is None:
            unknown.append(name)
        elif (value < limit) if more_is_better else (value > limit):
            misses.append(f"{name} {shown(value)}, {'at least' if more_is_better else 'at most'} {shown(limit)}")
    return Verdict(misses=tuple(misses), unknown=tuple(unknown))


def loss(one: Quality) -> float:
    """What is lost, in the metric's own unit: lower is better."""
    return one.value if one.metric in LOWER_IS_BETTER else -one.value


def _allowed(best: Quality) -> float:
    """The most that a variant may lose and still be said to lose little, the best being this."""
    if best.metric in ("kl_mean", "kl_p99", "nll_mean"):
        return best.value + 0.05
    if best.metric == "perplexity":
        return best.value * 1.05
    return loss(best) + max(0.02, 2 * (best.stderr or 0.0))


def quality_key(variants: Sequence[Variant]) -> str | None:
    """Column of the metric that speaks for quality among these; see the module docstring."""
    columns = list(dict.fromkeys(key for v in variants for key in v.quality))
    ranked = sorted(
        (key for key in columns if key.split(" ")[0] in PREFERENCE),
        key=lambda key: (PREFERENCE.index(key.split(" ")[0]), columns.index(key)),
    )
    return next((key for key in ranked if all(key in v.quality for v in variants)), ranked[0] if ranked else None)


def comparable(variants: Sequence[Variant]) -> list[Variant]:
    """The timed ones of the usual run: one sequence at a time, a prompt of 512 tokens or, failing that, of the greatest length measured."""
    single = [v for v in variants if v.setup is not None and v.figure("decode_tok_s") is not None and v.setup.batch in (None, 1)]
    lengths = {v.setup.prompt_tokens for v in single if v.setup is not None and v.setup.prompt_tokens is not None}
    if not lengths:
        return single
    usual = USUAL_PROMPT if USUAL_PROMPT in lengths else max(lengths)
    return [v for v in single if v.setup is not None and v.setup.prompt_tokens in (None, usual)]


def recommend(variants: Sequence[Variant], limits: Limits | None = None) -> tuple[Recommendation, ...]:
    """One recommendation per adapter (None: the model alone), in the order in which they appear."""
    candidates = comparable(variants)
    adapters = dict.fromkeys(v.adapter for v in candidates)
    return tuple(_recommend([v for v in candidates if v.adapter == adapter], adapter, limits) for adapter in adapters)


def _recommend(candidates: Sequence[Variant], adapter: str | None, limits: Limits | None) -> Recommendation:
    verdicts = {v.number: judge(v, limits) for v in candidates}
    fit = [v for v in candidates if verdicts[v.number].qualifies]
    if not fit:
        assert limits is not None
        nearest = min(candidates, key=lambda v: len(verdicts[v.number].misses))
        missed = "; ".join(verdicts[nearest.number].misses)
        reasons = (f"No variant keeps within the limits of {limits.origin}.", f"{nearest.label} comes nearest and misses: {missed}.")
        return Recommendation(adapter=adapter, variant=None, reasons=reasons)
    told: list[str] = []
    if limits is not None:
        told.append(f"{_count(fit, candidates)} within the limits of {limits.origin}.")
    key = quality_key(fit)
    judged = [v for v in fit if key in v.quality] if key else []
    if key is None:
        chosen = max(fit, key=lambda v: (v.size_bytes or 0, v.figure("decode_tok_s") or 0))
        told.append(f"Their quality was not measured, so {chosen.label} is named as least compressed. Measure it with `edgeq eval -o`.")
    else:
        best = min(judged, key=lambda v: loss(v.quality[key]))
        good = [v for v in judged if loss(v.quality[key]) <= _allowed(best.quality[key])]
        fastest = max(good, key=_speed)
        equal = [v for v in good if v is fastest or not slower(v, fastest, "decode_tok_s")]
        chosen = min(equal, key=lambda v: (v.memory_bytes is None, v.memory_bytes or 0, -_speed(v)))
        metric = METRICS.get(best.quality[key].metric, best.quality[key].metric)
        lost = f"{metric} {chosen.quality[key].value:.4g}"
        if chosen is best:
            told.append(f"It has the best {metric} of them ({chosen.quality[key].value:.4g}).")
        else:
            told.append(f"It loses little: {lost}, the best being {best.quality[key].value:.4g} ({best.label}).")
        if len(good) > 1:
            told.append(_why_fast(chosen, fastest, good))
        if len(judged) < len(fit):
            told.append(f"{len(fit) - len(judged)} more were not judged, for want of a {metric}.")
    if unknown := verdicts[chosen.number].unknown:
        told.append(f"Not measured, and so not checked: {', '.join(unknown)}.")
    return Recommendation(adapter=adapter, variant=chosen.number, reasons=tuple(told))


def _count(fit: Sequence[Variant], candidates: Sequence[Variant]) -> str:
    if len(fit) == len(candidates):
        return f"All {len(fit)} variants keep" if len(fit) > 1 else "It keeps"
    return f"{len(fit)} of {len(candidates)} variants keep" if len(fit) > 1 else f"It alone of {len(candidates)} variants keeps"


def _why_fast(chosen: Variant, fastest: Variant, good: Sequence[Variant]) -> str:
    speed = f"{_speed(chosen):,.1f} tok/s"
    if chosen is fastest:
        return f"Of the {len(good)} that lose little it decodes fastest: {speed}."
    return f"Of the {len(good)} that lose little it takes least memory among those that decode as fast as {fastest.label} ({speed})."


def _speed(v: Variant) -> float:
    return v.figure("decode_tok_s") or 0.0


def slower(a: Variant, b: Variant, figure: str) -> bool:
    """Whether `a` is measurably slower than `b`: their intervals do not meet; without intervals, by more than CLOSE."""
    x, y = a.figure(figure), b.figure(figure)
    if x is None or y is None:
        return False
    if figure in a.intervals and figure in b.intervals:
        return a.intervals[figure][1] < b.intervals[figure][0]
    return x < y * (1 - CLOSE)


def slow_variants(variants: Sequence[Variant]) -> tuple[SlowVariant, ...]:
    """A warning for every variant that is slower than its compression lets expect, of those that were run alike under one adapter.

    That is one slower than a less compressed variant: more bytes, and no more cut away. And one slower than a variant that is cut alike and
    smaller by at most ALIKE, by more than the bytes it reads explain: bytes count for decoding, and not for prompts.
    """
    found = []
    for v in variants:
        alike = [u for u in variants if u is not v and u.setup == v.setup and u.adapter == v.adapter and u.size_bytes and v.size_bytes]
        for figure, does, phase in _SPEEDS:
            beaten_by = [u for u in alike if slower(v, u, figure) and _unexpected(v, u, figure)]
            if not beaten_by:
                continue
            fast = max(beaten_by, key=lambda u: u.figure(figure) or 0.0)
            mine, theirs = v.figure(figure) or 0.0, fast.figure(figure) or 1.0
            mine_bytes, other_bytes = v.size_bytes or 0.0, fast.size_bytes or 0.0
            than = f"{does} {100 * (1 - mine / theirs):.0f} % slower than {fast.label} ({mine:,.1f} against {theirs:,.1f} tok/s)"
            sizes = f"{size(mine_bytes)} against {size(other_bytes)}"
            text = f"{v.label} {than}, though {'smaller' if mine_bytes < other_bytes else 'hardly larger'}: {sizes}."
            found.append(SlowVariant(variant=v.number, text=text, reason=kernel_reason(v, fast, phase) or _doubt(v)))
    return tuple(found)


def _doubt(v: Variant) -> str | None:
    return "The bench warned of this measurement: look there first." if own_warnings(v) else None


def own_warnings(v: Variant) -> list[str]:
    """What the bench said of a variant's own measurement: it names slow variants too, and so does `slow_variants`."""
    return [text for text in v.warnings if "though smaller (" not in text]


def _unexpected(v: Variant, u: Variant, figure: str) -> bool:
    """Whether the sizes of two variants do not explain that `v` is slower."""
    ratio = (u.size_bytes or 0.0) / (v.size_bytes or 1.0)
    if ratio > 1 + MORE_BYTES:
        return (u.rate or 0.0) <= (v.rate or 0.0)
    explained = ratio if figure == "decode_tok_s" else 1.0
    expected = (u.figure(figure) or 0.0) * min(1.0, explained) * (1 - CLOSE)
    return u.rate == v.rate and 1 - ALIKE <= ratio <= 1 and (v.figure(figure) or 0.0) < expected


def frontier(variants: Sequence[Variant]) -> frozenset[int]:
    """Numbers of the variants that no other beats: none is at least as good in speed, memory and quality and better in one.

    Only what both know is compared, and only variants that were run for the same adapter. What was not timed is not on it.
    """
    timed = comparable(variants)
    key = quality_key(timed) if timed else None

    def lost(v: Variant) -> float | None:
        return loss(v.quality[key]) if key is not None and key in v.quality else None

    axes: tuple[Callable[[Variant], float | None], ...] = (
        lambda v: None if v.figure("decode_tok_s") is None else -_speed(v),
        lambda v: v.memory_bytes if v.memory_bytes is not None else v.size_bytes,
        lost,
    )

    def beats(u: Variant, v: Variant) -> bool:
        pairs = [(axis(u), axis(v)) for axis in axes]
        known = [(x, y) for x, y in pairs if x is not None and y is not None]
        less_known = any(x is None and y is not None for x, y in pairs)
        return bool(known) and not less_known and all(x <= y for x, y in known) and any(x < y for x, y in known)

    return frozenset(v.number for v in timed if not any(beats(u, v) for u in timed if u.adapter == v.adapter and u is not v))
