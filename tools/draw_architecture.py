"""Draw the packages of obliteratus from their imports: a package stands above all that it imports.

    python -m tools.draw_architecture > architecture.svg

An arrow is left out where a longer way shows it already, so that the picture stays readable.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from tools.count_imports import count_arrows, list_modules
from tools.svg import GRAY, LINE, Drawing

ROW, WIDTH, BOX, HIGH = 78, 760, 104, 40


def read_imports(src: Path) -> dict[str, set[str]]:
    """Return, for each package, the packages that its modules import."""
    packages = {name.split(".")[1] for name in list_modules(src) if name.count(".") > 1}
    found: dict[str, set[str]] = {name: set() for name in packages}
    for start, end in count_arrows(src):
        first, second = start.partition(".")[0], end.partition(".")[0]
        if first in packages and second in packages and first != second:
            found[first].add(second)
    return found


def find_levels(imports: Mapping[str, set[str]]) -> dict[str, int]:
    """Return the height of each package: 0 imports nothing, others stand one above the highest that they import."""

    @cache
    def level(name: str) -> int:
        return 1 + max((level(other) for other in imports[name]), default=-1)

    return {name: level(name) for name in imports}


def reduce_imports(imports: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return only those imports that no chain of other imports implies."""

    @cache
    def reach(name: str) -> frozenset[str]:
        return frozenset().union(*({other} | reach(other) for other in imports[name])) if imports[name] else frozenset()

    return {
        name: {other for other in others if not any(other in reach(between) for between in others - {other})}
        for name, others in imports.items()
    }


def place(levels: Mapping[str, int], arrows: Mapping[str, set[str]]) -> dict[str, tuple[float, float]]:
    """Return the middle of each package's box: a row for each level, each box near what it imports."""
    top, places = max(levels.values()), {}
    for height in range(top + 1):
        row = sorted(name for name, level in levels.items() if level == height)
        row.sort(key=lambda name: sum(places[other][0] for other in arrows[name]) / max(1, len(arrows[name])))
        for index, name in enumerate(row):
            places[name] = (WIDTH * (index + 0.5) / len(row), 40 + ROW * (top - height))
    return places


def draw_architecture(src: Path) -> Drawing:
    """Return the drawing."""
    imports = read_imports(src)
    levels, arrows = find_levels(imports), reduce_imports(imports)
    places = place(levels, arrows)
    one = Drawing(WIDTH, 80 + ROW * max(levels.values()), "The packages, each above what it imports")
    for name, others in sorted(arrows.items()):
        for other in sorted(others):
            (x, y), (to_x, to_y) = places[name], places[other]
            one.line(
                x,
                y + HIGH / 2,
                to_x,
                to_y - HIGH / 2 - 2,
                ink=GRAY if levels[name] - levels[other] == 1 else LINE,
                arrow=True,
            )
    for name, (x, y) in sorted(places.items()):
        one.label(x - BOX / 2, y - HIGH / 2, BOX, HIGH, name)
    return one


if __name__ == "__main__":
    print(draw_architecture(Path(__file__).parents[1] / "src"), end="")
