"""Self-contained HTML pages from templates, and plots as SVG inside them."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment
else:
    Environment = Any  # jinja2 is imported when a page is rendered; tests check annotations at run time

FIGURE_SIZE = (9.0, 3.8)  # inches: two plots side by side, with labels as large as the text around them
Table = tuple[list[str], list[list[str]]]
"""Columns and rows of a table."""


def render_page(template: str, **values: Any) -> str:
    """Return the page that ``templates/TEMPLATE.html.j2`` makes of the values.

    The page refers to no other file and runs no script. All values are escaped.
    """
    return _environment().get_template(f"{template}.html.j2").render(values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("obliteratus.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"anchor": anchor, "data_uri": data_uri}
    return environment


def anchor(name: str) -> str:
    """Return the id of a section: letters, digits and dashes."""
    return "finding-" + "".join(c if c.isascii() and c.isalnum() else f"-{ord(c):x}-" for c in name)


def draw_svg(draw: Callable[[Any], None], name: str, size: tuple[float, float] = FIGURE_SIZE) -> str:
    """Return what ``draw`` draws on a figure of that size in inches, as SVG with text as outlines.

    name: unique on a page, since it seeds the ids inside the SVG. The same drawing gives the same text.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # takes half a second to import, and few commands draw

    figure, file = Figure(figsize=size, layout="constrained"), io.StringIO()
    with rc_context({"svg.hashsalt": name}):  # otherwise ids of clip paths are random
        draw(figure)
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def data_uri(svg: str) -> str:
    """Return an SVG as the address of an image, so that the page needs no other file."""
    return f"data:image/svg+xml;base64,{b64encode(svg.encode()).decode()}"
