"""All findings on one HTML page that needs nothing beside it: what each says, its plot, and its numbers."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from html import escape
from types import MappingProxyType
from typing import Any

from obliteratus.analyze.base import Finding, analyses

SIZE = (9.0, 3.8)  # inches: two plots side by side, their labels as large as the text around them
SCORE = {"value", "low", "high", "n", "unit"}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin: 0; } section { margin: 2.5rem 0; border-top: 1px solid #ccc; padding-top: 1rem; }
nav li { margin: .3rem 0; } .about { color: #666; margin: .2rem 0; } .told { font-weight: 600; }
img { width: 100%; height: auto; } summary { cursor: pointer; } .wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .85rem; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #e5e5e5; text-align: left; vertical-align: top; }
.wide td, .wide th { white-space: nowrap; font-variant-numeric: tabular-nums; }
"""


def page(found: Mapping[str, Finding], title: str, skipped: Mapping[str, str] = MappingProxyType({})) -> str:
    """One self-contained HTML document: a table of contents, and for each finding its line, its plot and its numbers.

    skipped: analyses that did not run, with the reason of each; named below the contents.

    The plots are SVG inside data addresses, text as outlines, so that they look the same everywhere; the page names no
    other file and runs no script. What findings say is escaped.
    """
    links = "\n".join(
        f'<li><a href="#{name_of(n)}">{escape(n)}</a>: {escape(f.summary())}</li>' for n, f in found.items()
    )
    left = "".join(f'<p class="about">Skipped: {escape(n)}, {escape(why)}</p>\n' for n, why in skipped.items())
    sections = "\n".join(_section(name, finding) for name, finding in found.items())
    return document(title, f"<nav><ol>\n{links}\n</ol></nav>\n{left}{sections}")


def document(title: str, body: str) -> str:
    """A whole HTML document of these pages' style, from HTML under its title."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""


def name_of(name: str) -> str:
    """What a section is linked by: letters, digits and dashes."""
    return "finding-" + "".join(c if c.isascii() and c.isalnum() else f"-{ord(c):x}-" for c in name)


def svg(finding: Finding, name: str) -> str:
    """The finding's plot. The same finding gives the same text."""
    return rendered(finding.draw, name)


def rendered(draw: Callable[[Any], None], name: str, size: tuple[float, float] = SIZE) -> str:
    """What ``draw`` draws on a figure of that size in inches, as SVG; no two on one page may share a name."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # takes half a second to load, and few commands draw

    figure, file = Figure(figsize=size, layout="constrained"), io.StringIO()
    with rc_context({"svg.hashsalt": name}):  # else the names of clip paths are drawn by chance
        draw(figure)
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def embedded(svg: str) -> str:
    """A picture as the address of an image that stands in the page itself."""
    return f"data:image/svg+xml;base64,{b64encode(svg.encode()).decode()}"


def _section(name: str, finding: Finding) -> str:
    told, picture = escape(finding.summary()), embedded(svg(finding, name))
    return f"""<section id="{name_of(name)}">
<h2>{escape(name)}</h2>
{_about(name)}<p class="told">{told}</p>
<img alt="{told}" src="{picture}">
<details><summary>Numbers</summary>
{tables(finding.to_dict())}
</details>
</section>"""


def _about(name: str) -> str:
    """What the analysis measures and where it is from, if it is a registered one."""
    if name not in list(analyses):
        return ""
    entry = analyses[name]
    cite = f" ({escape(entry.cite)})" if entry.cite else ""
    return f'<p class="about">{escape(entry.about.replace("``", ""))}{cite}</p>\n'


def tables(numbers: Mapping[str, Any]) -> str:
    """Single values as one table, then lists of one length side by side: one row for each stream, or site."""
    flat = dict(_flat(numbers))
    lengths = [len(v) for v in flat.values() if isinstance(v, list)]
    together = {n for n in lengths if n > 1 and lengths.count(n) > 1}
    single = {k: v for k, v in flat.items() if not (isinstance(v, list) and len(v) in together)}
    made = [table(["", "value"], [[k, shown(v)] for k, v in single.items()])] if single else []
    for n in sorted(together):
        columns = {k: v for k, v in flat.items() if isinstance(v, list) and len(v) == n}
        rows = [[str(i), *(shown(v[i]) for v in columns.values())] for i in range(n)]
        made.append(table(["index", *columns], rows))
    return "\n".join(made)


def _flat(numbers: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Dictionaries opened; a score stays one value, a list of lists is only named."""
    made: list[tuple[str, Any]] = []
    for key, value in numbers.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping) and set(value) != SCORE:
            made += _flat(value, f"{name}: ")
        elif isinstance(value, list) and any(isinstance(v, list) for v in value):
            made.append((name, f"{len(value)} lists, in the JSON"))
        else:
            made.append((name, value))
    return made


def shown(value: Any) -> str:
    """For people: four digits, an interval in brackets."""
    if isinstance(value, Mapping) and set(value) == SCORE:
        return f"{shown(value['value'])} [{shown(value['low'])}, {shown(value['high'])}], n = {value['n']}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    if isinstance(value, list):
        return ", ".join(shown(v) for v in value) or "none"
    return "–" if value is None else str(value)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as an HTML table; what they say is escaped."""
    top = "".join(f"<th>{escape(h.replace('_', ' '))}</th>" for h in head)
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{top}</tr>\n{body}\n</table></div>'
