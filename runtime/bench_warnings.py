"""What to know before believing a measurement, as sentences. Pure functions of samples: a warning, or None when there is nothing to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeq.runtime.bench_stats import Ratio, median, spread
from edgeq.runtime.contention import BUSY_BEFORE, THRESHOLD
from edgeq.sizes import size

CLOSE = 0.03  # ratios within this of 1 count as equal
COOLING = 0.05  # a clock, or a speed, that falls by more during a run is worth a word
SIZE_EXPLAINS = 0.85  # a speed below this share of what the bytes say has another cause
NOISY = 0.1  # spread over median
_TICKS_S = 0.03  # busy time that three ticks of the kernel's clock make: less may be rounding
_MIN_TREND = 4  # repeats to see a trend in


def is_disturbed(other_cores: float | None, elapsed_s: float) -> bool:
    """Whether others used so much of the machine during a repeat of that length that it should be taken again."""
    return other_cores is not None and other_cores > THRESHOLD and other_cores * elapsed_s >= _TICKS_S


def contention(other_cores: Sequence[float | None], *, before: float | None = None, waited_s: float = 0.0) -> dict[str, Any]:
    """What others used before the run and in each repeat, in cores, and a warning when any repeat suffered."""
    known = [cores for cores in other_cores if cores is not None]
    worst = max(known, default=None)
    disturbed = sum(cores > THRESHOLD for cores in known)
    warning = None
    if worst is not None and disturbed:
        warning = f"other processes used up to {worst:.2f} of a core in {disturbed} of {len(other_cores)} repeats; timings may be too slow"
    return {"before": before, "waited_s": waited_s, "other_cores": list(other_cores), "worst": worst, "warning": warning}


def busy_before(cores: float | None, waited_s: float) -> str | None:
    if cores is None or cores <= BUSY_BEFORE:
        return None
    waited = f" after {waited_s:.0f} s of waiting" if waited_s >= 1 else ""
    return f"other processes used {cores:.2f} of a core before the run{waited}; end them, or wait for them with --wait"


def too_many_threads(threads: int, usable_cores: int, device: str) -> str | None:
    if threads <= usable_cores or device != "cpu":
        return None
    return f"{threads} threads on {usable_cores} usable cores wait for each other; give --threads {usable_cores} or fewer"


def not_cached(fractions: Sequence[float | None]) -> str | None:
    """fractions: of the files in the page cache before warm loads."""
    least = min((fraction for fraction in fractions if fraction is not None), default=1.0)
    return None if least >= 0.99 else f"only {least:.0%} of the files fit the page cache, so load_s is not that of a cached file"


def clock_fell(drift: float | None, hottest_c: float | None) -> str | None:
    """drift: of the clock over the run, as a fraction."""
    if drift is None or drift >= -COOLING:
        return None
    heat = "" if hottest_c is None else f" at up to {hottest_c:.0f} °C"
    return f"the clock fell by {-drift:.0%} during the run{heat}; later repeats are slower. Cool the device, or pause before measuring"


def slowed_down(decode_tok_s: Sequence[float]) -> str | None:
    """When every repeat of the second half is slower than every one of the first, and clearly."""
    half = len(decode_tok_s) // 2
    if len(decode_tok_s) < _MIN_TREND:
        return None
    first, second = decode_tok_s[:half], decode_tok_s[-half:]
    ratio = (median(second) or 0.0) / (median(first) or 1.0)
    if max(second) >= min(first) or ratio >= 1 - COOLING:
        return None
    return f"decoding slowed down by {1 - ratio:.0%} from the first half of the repeats to the second; the device may be getting hot"


def noisy(figures: Mapping[str, Sequence[float]]) -> str | None:
    """figures: samples by what they are ("decoding"), of which the least steady is named."""
    widths = {name: (spread(samples) or 0.0) / (median(samples) or 1.0) for name, samples in figures.items()}
    name = max(widths, key=widths.__getitem__)
    if widths[name] <= NOISY:
        return None
    return (
        f"{name} differs between repeats: their middle half spans {widths[name]:.0%} of the median; repeat more often, on a quiet machine"
    )


def is_slower(ratio: Ratio | None) -> bool:
    """Whether a ratio of speeds says slower: more than CLOSE, and with an interval all of it below 1."""
    return ratio is not None and ratio.ratio < 1 - CLOSE and (ratio.high is None or ratio.high < 1)


def slower_though_smaller(figure: str, ratio: Ratio, *, other: str, n_bytes: int, other_bytes: int, reason: str | None) -> str:
    """figure: prefill_tok_s or decode_tok_s. ratio: of this variant's speed to that of a less compressed one, which `is_slower`."""
    sizes = f"though smaller ({size(n_bytes)} against {size(other_bytes)})"
    return f"{_slower(figure, ratio, other)}, {sizes}{'' if reason is None else f': {reason}'}"


def is_slow_for_its_size(ratio: Ratio | None, *, n_bytes: int, other_bytes: int) -> bool:
    """Whether a variant is slower than one that is no larger, by clearly more than reading its bytes takes."""
    return is_slower(ratio) and ratio is not None and ratio.ratio < SIZE_EXPLAINS * other_bytes / n_bytes


def slower_than_its_size(figure: str, ratio: Ratio, *, other: str, n_bytes: int, other_bytes: int, reason: str) -> str:
    """As `slower_though_smaller`, for a variant that `is_slow_for_its_size`, with a known reason."""
    sizes = f"more than its size accounts for ({size(n_bytes)} against {size(other_bytes)})"
    return f"{_slower(figure, ratio, other)}, {sizes}: {reason}"


def _slower(figure: str, ratio: Ratio, other: str) -> str:
    does = {"decode_tok_s": "decodes", "prefill_tok_s": "computes prompts"}[figure]
    sure = "" if ratio.low is None or ratio.high is None else f", {ratio.low:.2f} to {ratio.high:.2f}"
    return f"{does} {1 - ratio.ratio:.0%} slower than {other} (ratio {ratio.ratio:.2f}{sure})"
