"""A report as one HTML file: no scripts, nothing from elsewhere, light and dark, for wide windows, phones and paper.

Every measured number stands in <data value="...">, the attribute holding what the results file has. All text is escaped; the SVG of the
figures, which is ours, is not.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from edgeq.runtime.report.document import Report, to_json
from edgeq.runtime.report.figures import pictures

if TYPE_CHECKING:
    from jinja2 import Template


def to_html(report: Report) -> str:
    """Raises MissingDependency without matplotlib."""
    from markupsafe import Markup

    drawn = [{"caption": one.caption, "svg": Markup(one.svg)} for one in pictures(report)]  # drawn here, its text escaped
    return _template().render(report=to_json(report), pictures=drawn, chosen=report.chosen)


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    source = (resources.files("edgeq.runtime.report") / "page.html").read_text(encoding="utf-8")
    settings: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    return Environment(undefined=StrictUndefined, **settings).from_string(source)
