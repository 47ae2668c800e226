"""The figures of a report as SVG for inlining: text stays text, colours are CSS variables, the same input gives the same bytes.

matplotlib draws with stand-in colours that are replaced by var(--name) afterwards, so that a page turns dark without a second figure.
Drawn 360 points wide, the width of a phone: letters have the size of the page's there, and are larger elsewhere. Points carry the
variants' numbers, as the tables do.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeq.errors import MissingDependency
from edgeq.runtime.report.advice import METRICS, comparable, loss
from edgeq.runtime.report.document import Report
from edgeq.runtime.report.read import Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.0  # inches of 72 points
_HUES = 8
_COLOURS = {"ink": "#010101", "muted": "#020202", "line": "#030303", "card": "#040404", "accent": "#050505", "bad": "#060606"}
_COLOURS |= {f"c{i}": f"#0a{i:02x}0a" for i in range(_HUES)}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "edgeq",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",  # measured with; the page shows its own
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.edgecolor": _COLOURS["line"],
    "axes.labelcolor": _COLOURS["muted"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _COLOURS["line"],
    "grid.linewidth": 0.5,
    "text.color": _COLOURS["ink"],
    "xtick.color": _COLOURS["muted"],
    "ytick.color": _COLOURS["muted"],
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "hatch.linewidth": 0.5,
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """name: of its SVG's ids. caption and alt are text; alt says what the figure shows to those who cannot see it."""

    name: str
    caption: str
    alt: str
    svg: str


def pictures(report: Report) -> list[Picture]:
    """The figures for which there are numbers. Raises MissingDependency without matplotlib."""
    try:
        import matplotlib
    except ImportError as err:
        raise MissingDependency("matplotlib", "report") from err
    timed = comparable(report.variants)
    made = []
    with matplotlib.rc_context(_STYLE):
        for name, draw in (
            ("speed", _speed),
            ("quality", _quality),
            ("quality-speed", _quality_speed),
            ("latency", _latency),
            ("memory", _memory),
        ):
            if (picture := draw(name, report, timed)) is not None:
                made.append(picture)
    return made


def _new(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=72, layout="constrained")  # a pixel is a point
    return figure, figure.add_subplot()


@dataclass(frozen=True, kw_only=True)
class _Axis:
    label: str
    value: Callable[[Variant], float | None]
    limit: float | None = None
    limit_is_least: bool = False


def _speed(name: str, report: Report, timed: Sequence[Variant]) -> Picture | None:
    limits = report.limits
    x = _memory_axis(report, timed)
    y = _Axis(
        label="decode tok/s",
        value=lambda v: v.figure("decode_tok_s"),
        limit=None if limits is None else limits.decode_tok_s,
        limit_is_least=True,
    )
    caption = "Speed against memory: up and to the left is better."
    return _scatter(name, report, timed, x, y, caption)


def _memory_axis(report: Report, timed: Sequence[Variant]) -> _Axis:
    """What running takes; where that is not known of all, the model's size, on which the limit does not count."""
    if all(v.memory_bytes is not None for v in timed):
        limit = None if report.limits is None or report.limits.memory_bytes is None else report.limits.memory_bytes / 1e6
        return _Axis(label="peak memory, MB", value=lambda v: None if v.memory_bytes is None else v.memory_bytes / 1e6, limit=limit)
    return _Axis(label="model, MB", value=lambda v: None if v.size_bytes is None else v.size_bytes / 1e6)


def _quality_axis(report: Report) -> _Axis | None:
    if report.speaks is None:
        return None
    key = report.speaks
    one = next(v.quality[key] for v in report.variants if key in v.quality)
    better = "lower" if loss(one) == one.value else "higher"
    return _Axis(
        label=f"{METRICS.get(one.metric, one.metric)} ({better} is better)",
        value=lambda v: v.quality[key].value if key in v.quality else None,
    )


def _quality(name: str, report: Report, timed: Sequence[Variant]) -> Picture | None:
    y = _quality_axis(report)
    if y is None:
        return None
    return _scatter(name, report, timed, _memory_axis(report, timed), y, f"Quality against memory: {y.label}; left takes less.")


def _quality_speed(name: str, report: Report, timed: Sequence[Variant]) -> Picture | None:
    y = _quality_axis(report)
    if y is None:
        return None
    limit = None if report.limits is None else report.limits.decode_tok_s
    x = _Axis(label="decode tok/s", value=lambda v: v.figure("decode_tok_s"), limit=limit, limit_is_least=True)
    return _scatter(name, report, timed, x, y, f"Quality against speed: {y.label}; right is faster.")


def _scatter(name: str, report: Report, timed: Sequence[Variant], x: _Axis, y: _Axis, caption: str) -> Picture | None:
    """Variants as numbered points, cuts of one artifact joined; filled on the frontier, ringed when recommended; limits drawn in."""
    points = [(v, a, b) for v in timed if (a := x.value(v)) is not None and (b := y.value(v)) is not None]
    if not points:
        return None
    figure, axes = _new(3.7)
    hues = _hues(timed)
    groups: dict[tuple[str, ...], list[tuple[Variant, float, float]]] = {}
    for point in points:
        groups.setdefault(_group(point[0]), []).append(point)
    for group in groups.values():
        colour = hues[_kind(group[0][0])]
        by_rate = sorted(group, key=lambda p: p[0].rate or 0.0)
        if len(by_rate) > 1:
            axes.plot([a for _, a, _ in by_rate], [b for _, _, b in by_rate], color=colour, linewidth=1, alpha=0.6, zorder=2)
        for v, a, b in group:
            on = v.number in report.frontier
            if v.number in report.chosen:
                axes.plot(a, b, "o", markersize=15, markerfacecolor="none", markeredgecolor=_COLOURS["accent"], markeredgewidth=2, zorder=3)
            marker = "s" if v.adapter else "o"
            fill = colour if on else _COLOURS["card"]
            axes.plot(a, b, marker, markersize=7, markerfacecolor=fill, markeredgecolor=colour, zorder=4, gid=f"point-{v.number}")
    axes.set_xlabel(x.label)
    axes.set_ylabel(y.label)
    axes.margins(0.14)
    _limit(axes, x, vertical=True)
    _limit(axes, y, vertical=False)
    _number(figure, axes, points, report.chosen)
    _legend(axes, {_kind(v): hues[_kind(v)] for v, _, _ in points})
    alt = f"{caption} " + "; ".join(f"{v.label}: {a:.4g}, {b:.4g}" for v, a, b in points)
    notes = ["Filled: on the frontier.", "Ringed: use this."] if report.chosen else ["Filled: on the frontier."]
    if any(v.adapter for v, _, _ in points):
        notes.append("Squares: with an adapter.")
    if x.limit is not None or y.limit is not None:
        notes.append("Dashed: limits of the profile.")
    titles = {f"point-{v.number}": f"{v.number}. {v.label}" for v, _, _ in points}
    return Picture(name=name, caption=" ".join([caption, *notes]), alt=alt, svg=_svg(figure, name, titles, alt))


def _limit(axes: Axes, axis: _Axis, *, vertical: bool) -> None:
    """Draw a limit as a dashed line with the side that misses it shaded; far outside of the points, as a note at the edge."""
    if axis.limit is None:
        return
    low, high = axes.get_xlim() if vertical else axes.get_ylim()
    span = high - low
    style: dict[str, Any] = {"color": _COLOURS["bad"], "linewidth": 1, "linestyle": (0, (4, 3)), "zorder": 1}
    text = f"{'at least' if axis.limit_is_least else 'at most'} {axis.limit:,.4g}"
    if not low - 0.6 * span <= axis.limit <= high + 0.6 * span:
        side = "→" if axis.limit > high else "←"
        if not vertical:
            side = "↑" if axis.limit > high else "↓"
        place = (0.99, 0.02, "right", "bottom") if vertical else (0.01, 0.98, "left", "top")
        axes.text(
            place[0],
            place[1],
            f"limit {text} {side}",
            transform=axes.transAxes,
            ha=place[2],
            va=place[3],
            fontsize=8,
            color=_COLOURS["bad"],
        )
        return
    low, high = min(low, axis.limit - 0.08 * span), max(high, axis.limit + 0.08 * span)
    wrong = (low, axis.limit) if axis.limit_is_least else (axis.limit, high)
    shade: dict[str, Any] = {"facecolor": _COLOURS["bad"], "alpha": 0.07, "linewidth": 0, "zorder": 0}
    if vertical:
        axes.axvline(axis.limit, **style)
        axes.axvspan(*wrong, **shade)
        axes.set_xlim(low, high)
        room_right = axis.limit < (low + high) / 2
        axes.annotate(text, (axis.limit, 0), xycoords=("data", "axes fraction"), xytext=(3 if room_right else -3, 3),
                      textcoords="offset points", fontsize=8, color=_COLOURS["bad"], ha="left" if room_right else "right")  # fmt: skip
    else:
        axes.axhline(axis.limit, **style)
        axes.axhspan(*wrong, **shade)
        axes.set_ylim(low, high)
        axes.annotate(text, (1, axis.limit), xycoords=("axes fraction", "data"), xytext=(-3, 3), textcoords="offset points", fontsize=8,
                      color=_COLOURS["bad"], ha="right")  # fmt: skip


_PLACES = [(0, 10), (0, -10), (11, 0), (-11, 0), (9, 8), (-9, 8), (9, -8), (-9, -8)]


def _number(figure: Figure, axes: Axes, points: Sequence[tuple[Variant, float, float]], ringed: frozenset[int]) -> None:
    """Write each point's number beside it, where points and numbers written before leave most room."""
    figure.draw_without_rendering()  # places the axes, so that data have pixels
    scale = axes.transData.transform
    taken = [tuple(scale((a, b))) for _, a, b in points]
    box = axes.get_window_extent()
    for i, (v, a, b) in enumerate(points):
        here = taken[i]
        others = [place for j, place in enumerate(taken) if j != i]
        away = 1.5 if v.number in ringed else 1.0
        places = [(away * right, away * up) for right, up in _PLACES]

        def room(place: tuple[float, float], here: Any = here, others: Any = others, places: Any = places) -> float:
            x, y = here[0] + place[0], here[1] + place[1]
            inside = box.x0 <= x <= box.x1 and box.y0 <= y <= box.y1
            return (min(((x - p) ** 2 + (y - q) ** 2 for p, q in others), default=1e9) if inside else -1.0) - 1e-3 * places.index(place)

        best = max(places, key=room)
        axes.annotate(str(v.number), (a, b), xytext=best, textcoords="offset points", ha="center", va="center", fontsize=8, zorder=5)
        taken.append((here[0] + best[0], here[1] + best[1]))


def _kind(v: Variant) -> str:
    return v.quant or v.name


def _group(v: Variant) -> tuple[str, ...]:
    """Cuts of one artifact, run alike."""
    return (v.artifact, v.adapter or "", repr(v.setup))


def _hues(variants: Sequence[Variant]) -> Mapping[str, str]:
    kinds = list(dict.fromkeys(_kind(v) for v in variants))
    return {kind: _COLOURS[f"c{i % _HUES}"] for i, kind in enumerate(kinds)}


def _legend(axes: Axes, kinds: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="o", linestyle="", color=colour, markersize=6) for colour in kinds.values()]
    names = [_clipped(kind, 18) for kind in kinds]
    axes.figure.legend(
        handles, names, loc="outside upper left", ncols=3 if max(map(len, names)) > 10 else 4, handletextpad=0.1, columnspacing=1.0
    )


def _clipped(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _latency(name: str, report: Report, timed: Sequence[Variant]) -> Picture | None:
    """Of every timed variant: p5 to p95 as a line, quartiles as a box, median and p99 as marks. From percentiles alone without samples."""
    import numpy as np

    rows = [v for v in timed if v.itl_ms or v.figure("itl_p50_ms") is not None]
    if not rows:
        return None
    figure, axes = _new(0.9 + 0.3 * len(rows))
    hues = _hues(timed)
    for y, v in enumerate(rows):
        colour = hues[_kind(v)]
        if v.itl_ms:
            p5, p25, p75 = (float(p) for p in np.percentile(v.itl_ms, [5, 25, 75]))
            axes.barh(y, p75 - p25, left=p25, height=0.5, color=colour, alpha=0.45, linewidth=0)
        else:
            p5 = v.figure("itl_p50_ms") or 0.0
        p50, p95, p99 = (v.figure(f"itl_{p}_ms") for p in ("p50", "p95", "p99"))
        if p95 is not None:
            axes.plot([p5, p95], [y, y], color=colour, linewidth=1.2)
        if p50 is not None:
            axes.plot([p50, p50], [y - 0.3, y + 0.3], color=_COLOURS["ink"], linewidth=1.5, gid=f"latency-{v.number}")
        if p99 is not None:
            axes.plot(p99, y, "d", color=colour, markersize=4)
    _rows(axes, rows)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms between tokens")
    caption = "Time between tokens: median (bar), middle half (box), 5th to 95th percentile (line), 99th (diamond)."
    alt = caption + " " + "; ".join(f"{v.label}: {' '.join(_percentiles(v))}" for v in rows)
    titles = {f"latency-{v.number}": f"{v.number}. {v.label}" for v in rows}
    return Picture(name=name, caption=caption, alt=alt, svg=_svg(figure, name, titles, alt))


def _percentiles(v: Variant) -> list[str]:
    return [f"{p} {value:.4g} ms" for p in ("p50", "p95", "p99") if (value := v.figure(f"itl_{p}_ms")) is not None]


def _rows(axes: Axes, variants: Sequence[Variant]) -> None:
    axes.set_yticks(range(len(variants)), [f"{v.number}  {_clipped(v.label, 26)}" for v in variants])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


PARTS = (("model", "model_bytes"), ("KV cache", "kv_bytes"), ("compute", "compute_bytes"))


def memory_parts(v: Variant) -> list[tuple[str, float]]:
    """What is known of a variant's memory, in bytes: model, cache, buffers, and what is left of the measured peak."""
    known = [(name, value) for name, key in PARTS if (value := v.figure(key)) is not None]
    total = sum(value for _, value in known)
    if v.memory_bytes is not None and v.memory_bytes > total:
        known.append(("rest of the process", v.memory_bytes - total))
    return known


def _memory(name: str, report: Report, timed: Sequence[Variant]) -> Picture | None:
    rows = [v for v in timed if memory_parts(v)]
    if not rows:
        return None
    figure, axes = _new(1.2 + 0.3 * len(rows))
    names = [part for part, _ in PARTS] + ["rest of the process"]
    colours = {part: _COLOURS[hue] for part, hue in zip(names, ("c0", "c1", "c2", "line"), strict=True)}
    used: dict[str, str] = {}
    for y, v in enumerate(rows):
        left = 0.0
        for part, value in memory_parts(v):
            axes.barh(y, value / 1e6, left=left, height=0.6, color=colours[part], linewidth=0)
            used[part] = colours[part]
            left += value / 1e6
        if v.memory_bytes is not None:
            axes.plot([v.memory_bytes / 1e6] * 2, [y - 0.35, y + 0.35], color=_COLOURS["ink"], linewidth=1.5, gid=f"memory-{v.number}")
    _rows(axes, rows)
    axes.set_xlabel("MB")
    limit = None if report.limits is None or report.limits.memory_bytes is None else report.limits.memory_bytes / 1e6
    _limit(axes, _Axis(label="", value=lambda v: None, limit=limit), vertical=True)
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour) for colour in used.values()]
    figure.legend(handles, list(used), loc="outside upper left", ncols=4, handlelength=1, handletextpad=0.4, columnspacing=1.0)
    caption = "Memory by part; the mark is the measured peak. A peak left of the end of a bar: parts of the model were never touched."
    alt = (
        caption
        + " "
        + "; ".join(f"{v.label}: " + ", ".join(f"{part} {value / 1e6:.1f} MB" for part, value in memory_parts(v)) for v in rows)
    )
    return Picture(
        name=name, caption=caption, alt=alt, svg=_svg(figure, name, {f"memory-{v.number}": f"{v.number}. {v.label}" for v in rows}, alt)
    )


def _svg(figure: Figure, name: str, titles: Mapping[str, str], alt: str) -> str:
    """The figure as an <svg> element for a page: titles on marked elements, variables for colours, ids of its own, no metadata."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)  # it would reach the whole page
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)  # matplotlib repeats every text as a comment
    for variable, colour in _COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"<text style=\"(?![^\"]*fill:)", '<text style="fill: var(--ink); ', text)
    for mark, title in titles.items():
        text = text.replace(f'<g id="{mark}">', f'<g id="{mark}"><title>{html.escape(title)}</title>', 1)
    ids = re.findall(r'\bid="([^"]+)"', text)
    for one in sorted(set(ids), key=len, reverse=True):
        text = re.sub(rf'(id="|#){re.escape(one)}(?=["\)])', rf"\g<1>{name}-{one}", text)
    opening = re.match(r"<svg[^>]*>", text)
    assert opening is not None
    box = re.search(r'viewBox="([^"]+)"', opening[0])
    assert box is not None
    head = f'<svg viewBox="{box[1]}" role="img" aria-label="{html.escape(alt)}" xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg">'
    lines = [line.rstrip() for line in (head + text[opening.end() :]).splitlines()]
    return "\n".join(line for line in lines if line)
