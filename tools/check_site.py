"""Check that every link inside the built site leads to a page and an anchor, and that nothing comes from elsewhere.

python -m tools.check_site [build/site]
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from os.path import normpath
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}  # tag → what it loads
NOT_LOADED = {"canonical", "search", "index", "next", "prev", "author", "license"}  # of <link>: where to go, no file


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors that it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = {"", "top"}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take what one tag says."""
        values = {name: value or "" for name, value in attrs}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in LOADED and not NOT_LOADED & set(values.get("rel", "").split()):
            self.loaded.append(values.get(LOADED[tag], ""))


@cache
def read_page(path: Path) -> Page:
    """Return a page, read once."""
    return Page(path)


def find_faults(site: Path) -> Iterator[str]:
    """Yield every link that leads nowhere, and every file that a page loads from another machine."""
    for path in sorted(site.rglob("*.html")):
        page, where = read_page(path), path.relative_to(site)
        yield from (f"{where}: {link} is loaded from elsewhere" for link in page.loaded if urlsplit(link).netloc)
        for link in sorted({*page.links, *page.loaded}):
            if fault := explain(link, path):
                yield f"{where}: {link} {fault}"


def explain(link: str, path: Path) -> str:
    """Return why a link of a page leads nowhere, or ''."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return ""
    file = Path(normpath(path.parent / unquote(parts.path))) if parts.path else path  # one name for each page
    file = file / "index.html" if file.is_dir() else file
    if not file.is_file():
        return "leads to no file"
    known = file.suffix != ".html" or unquote(parts.fragment) in read_page(file).anchors
    return "" if known else "leads to no section"


WIDTHS = (390, 1280)


def find_wide(site: Path) -> Iterator[str]:
    """Yield every page that is wider than its window."""
    from playwright.sync_api import sync_playwright

    pages = sorted(path for path in site.rglob("*.html") if "_modules" not in path.parts and path.parent != site)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for width in WIDTHS:
            page = browser.new_page(viewport={"width": width, "height": 900})
            for path in pages:
                page.goto(path.resolve().as_uri(), wait_until="domcontentloaded")
                if (wide := page.evaluate("document.documentElement.scrollWidth")) > width:
                    yield f"{path.relative_to(site)}: {wide} pixels wide in a window of {width}"
        browser.close()


def main() -> int:
    """Print all faults, and return 1 if there is one."""
    words = [word for word in sys.argv[1:] if word != "--browser"]
    site = Path(words[0] if words else "build/site")
    faults = [*find_faults(site), *(find_wide(site) if "--browser" in sys.argv else ())]
    print(*faults, sep="\n") if faults else None
    print(f"{site}: {len(list(site.rglob('*.html')))} pages, {len(faults)} faults")
    return min(1, len(faults))


if __name__ == "__main__":
    sys.exit(main())
