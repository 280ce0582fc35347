"""Count the imports between the packages of obliteratus.

    python tools/count_imports.py [SRC]

A room is a package, or a module that lies at the root of the package. An arrow is a pair of rooms of which one imports
the other. Prints the rooms, the arrows with the number of imports behind each, and the circles.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path


def room_of(module: str) -> str:
    """Return the package of a module by its folder, or the module itself if it lies at the root."""
    parts = module.split(".")[1:]
    return ".".join(parts[:-1]) if len(parts) > 1 else "".join(parts)


def list_modules(src: Path) -> dict[str, Path]:
    """Return all modules by dotted name. A package is named as its ``__init__`` module."""
    return {".".join(p.relative_to(src).with_suffix("").parts): p for p in sorted((src / "obliteratus").rglob("*.py"))}


def imported_by(path: Path, modules: dict[str, Path]) -> set[str]:
    """Return the modules of ours that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("obliteratus"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in modules or f"{full}.__init__" in modules else node.module)
    return {name if name in modules else f"{name}.__init__" for name in names}


def count_arrows(src: Path) -> Counter[tuple[str, str]]:
    """Return how many imports run from one room to another."""
    modules = list_modules(src)
    arrows: Counter[tuple[str, str]] = Counter()
    for name, path in modules.items():
        for other in imported_by(path, modules):
            if name != "obliteratus.__init__" and room_of(name) != room_of(other):
                arrows[room_of(name), room_of(other)] += 1
    return arrows


def main() -> None:
    src = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "src"
    arrows, modules = count_arrows(src), list_modules(src)
    rooms = sorted({room_of(name) for name in modules if name != "obliteratus.__init__"})
    print(f"{len(modules)} files, {len(rooms)} rooms: {', '.join(rooms)}")
    for (start, end), count in sorted(arrows.items()):
        print(f"{start} -> {end}: {count}")
    both = sorted({tuple(sorted(pair)) for pair in arrows if (pair[1], pair[0]) in arrows})
    print(f"{len(arrows)} arrows, {sum(arrows.values())} imports; rooms that import each other: {both or 'none'}")


if __name__ == "__main__":
    main()
