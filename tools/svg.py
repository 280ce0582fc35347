"""A small drawing that is written as SVG: boxes, lines and text, on white, so that it reads on light and dark pages."""

from __future__ import annotations

from html import escape
from pathlib import Path

INK, GRAY, PALE, LINE = "#1f2933", "#5f6c7b", "#eef2f6", "#b8c2cc"
BLUE, RED = "#2563a8", "#b4452b"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
HEAD = "M0,0 L8,4 L0,8 z"  # an arrow's


class Drawing:
    """Shapes in the order in which they are drawn. All lengths are pixels at 100 %."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.shapes: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, *, fill: str = PALE, line: str = LINE, r: float = 6) -> None:
        """Draw a rectangle with round corners."""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{r:g}" fill="{fill}" stroke="{line}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 14,
        fill: str = INK,
        at: str = "start",
        bold: bool = False,
    ) -> None:
        """Write one line; ``at`` says which point of it stands at x: start, middle or end."""
        weight = ' font-weight="600"' if bold else ""
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{fill}" text-anchor="{at}"{weight}>'
            f"{escape(words, quote=False)}</text>"
        )

    def label(self, x: float, y: float, w: float, h: float, words: str, note: str = "", *, fill: str = PALE) -> None:
        """Draw a box with a word in its middle, and a smaller one below."""
        self.box(x, y, w, h, fill=fill)
        middle = y + h / 2 + (5 if not note else -2)
        self.text(x + w / 2, middle, words, at="middle", bold=True)
        if note:
            self.text(x + w / 2, middle + 16, note, size=12, fill=GRAY, at="middle")

    def line(
        self, x: float, y: float, to_x: float, to_y: float, *, ink: str = LINE, width: float = 1.5, arrow: bool = False
    ) -> None:
        """Draw a straight line, or an arrow."""
        end = f' marker-end="url(#{"red" if ink == RED else "blue" if ink == BLUE else "gray"})"' if arrow else ""
        self.shapes.append(
            f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{ink}" stroke-width="{width:g}"{end}/>'
        )

    def dot(self, x: float, y: float, ink: str, *, r: float = 5, opacity: float = 1.0) -> None:
        """Draw a filled circle."""
        self.shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:g}" fill="{ink}" opacity="{opacity:g}"/>')

    def __str__(self) -> str:
        markers = "".join(
            f'<marker id="{name}" markerUnits="userSpaceOnUse" markerWidth="8" markerHeight="8" refX="7" refY="4" '
            f'orient="auto">'
            f'<path d="{HEAD}" fill="{ink}"/></marker>'
            for name, ink in (("gray", GRAY), ("blue", BLUE), ("red", RED))
        )
        body = "\n".join(self.shapes)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'width="{self.width:g}" height="{self.height:g}" font-family="{FONT}" role="img">\n'
            f"<title>{escape(self.title)}</title>\n<defs>{markers}</defs>\n"
            f'<rect width="{self.width:g}" height="{self.height:g}" rx="8" fill="#ffffff"/>\n{body}\n</svg>\n'
        )

    def save(self, path: Path) -> None:
        """Write the file."""
        path.write_text(str(self), encoding="utf-8")
