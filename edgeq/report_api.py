"""`edgeq report` as a call: results files in, a page, Markdown or JSON out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.errors import UsageError
from edgeq.output import check_file_target, staged_file
from edgeq.sizes import parse_bytes

if TYPE_CHECKING:
    from edgeq.profiles import DeviceProfile
    from edgeq.runtime.report.advice import Limits
    from edgeq.runtime.report.document import Report

SUFFIXES = (".html", ".md", ".json")


def report(
    results: Sequence[str | Path],
    *,
    output: str | Path | Sequence[str | Path] = (),
    profile: str | Path | None = None,
    budget: int | str | None = None,
    title: str = "edgeq report",
    force: bool = False,
) -> Report:
    """Join results files, draw conclusions, write them; see `edgeq.runtime.report`. Needs edgeq[report] for HTML.

    output: .html, .md or .json files, the suffix says what; none writes nothing. profile: its memory budget and targets are the limits.
    budget: bytes of memory instead of the profile's, a number or text like "70MB".
    Raises UsageError for another suffix, SourceError for a file that is no results file, OutputError for an output that exists.
    """
    from edgeq.runtime.report.document import make_report
    from edgeq.runtime.report.read import read_results

    paths = [Path(path) for path in results]
    targets = [Path(output)] if isinstance(output, str | Path) else [Path(path) for path in output]
    for target in targets:
        if target.suffix not in SUFFIXES:
            raise UsageError(f"{target}: a report is a file that ends in {', '.join(SUFFIXES)}.")
        check_file_target(target, force=force, inputs=tuple(paths))
    limits = limits_of(profile, budget)
    variants, sources = read_results(paths)
    made = make_report(variants, sources, limits=limits, title=title)
    texts = [_written(made, target.suffix) for target in targets]
    for target, text in zip(targets, texts, strict=True):
        with staged_file(target, force=force, inputs=tuple(paths)) as stage:
            stage.write_text(text, encoding="utf-8", newline="\n")
    return made


def limits_of(profile: str | Path | DeviceProfile | None, budget: int | str | None) -> Limits | None:
    """The limits of a profile, with another budget where one is given. Raises ProfileError, UsageError."""
    from edgeq.profiles import DeviceProfile, load_profile
    from edgeq.runtime.report.advice import Limits

    size = parse_bytes(budget) if isinstance(budget, str) else budget
    if profile is None:
        return None if size is None else Limits(origin="the budget given", memory_bytes=size)
    device = profile if isinstance(profile, DeviceProfile) else load_profile(profile)
    targets = device.targets
    origin = f"the profile {device.name}" + ("" if size is None else " and the budget given")
    if targets is not None:
        origin += f" (speeds: {targets.model})"
    return Limits(
        origin=origin,
        memory_bytes=device.memory.budget_mib * 2**20 if size is None else size,
        ttft_ms=None if targets is None else targets.ttft_ms,
        decode_tok_s=None if targets is None else targets.decode_tok_s,
    )


def _written(made: Report, suffix: str) -> str:
    if suffix == ".html":
        from edgeq.runtime.report.html import to_html

        return to_html(made)
    if suffix == ".md":
        from edgeq.runtime.report.markdown import to_markdown

        return to_markdown(made)
    from edgeq.runtime.report.document import to_json

    return json.dumps(to_json(made), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
