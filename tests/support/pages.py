"""What a browser sees of a page."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser


class ParsedPage(HTMLParser):
    """Tags, text, and all addresses that a browser would fetch or follow."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {key: value or "" for key, value in attrs}
        self.ids += [values["id"]] if "id" in values else []
        self.addresses += [values[k] for k in ("src", "href", "srcset", "action", "data") if k in values]

    def handle_data(self, data: str) -> None:
        self.text += data


def check_self_contained(page: str) -> None:
    """Assert that a page refers to no other file and runs no script."""
    parsed = ParsedPage(page)
    assert all(where.startswith(("#", "data:image/svg+xml;base64,")) for where in parsed.addresses)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(parsed.tags)
    assert "url(" not in page
    assert "@import" not in page
    pictures = [where for where in parsed.addresses if where.startswith("data:")]
    assert pictures
    for where in pictures:
        svg = base64.b64decode(where.partition(",")[2]).decode()
        assert all(h.startswith(("#", "data:")) for h in re.findall(r'href="([^"]*)"', svg))
        assert all(u.startswith("#") for u in re.findall(r"url\(([^)]*)\)", svg))
