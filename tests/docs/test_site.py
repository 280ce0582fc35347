"""What checks the built site notices links that lead nowhere, and what comes from elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools.check_site import find_faults

GOOD = '<a href="two.html#there">x</a><a href="#here" id="here">x</a><img src="p.png"><a href="mailto:a@b.c">x</a>'


def write_site(folder: Path, page: str) -> Path:
    (folder / "one.html").write_text(page)
    (folder / "two.html").write_text('<h1 id="there">x</h1>')
    (folder / "p.png").write_bytes(b"")
    return folder


def test_a_whole_site_has_no_fault(tmp_path: Path) -> None:
    assert list(find_faults(write_site(tmp_path, GOOD))) == []


@pytest.mark.parametrize(
    ("tag", "said"),
    [
        ('<a href="three.html">x</a>', "one.html: three.html leads to no file"),
        ('<a href="two.html#gone">x</a>', "one.html: two.html#gone leads to no section"),
        ('<img src="gone.png">', "one.html: gone.png leads to no file"),
        ('<script src="//a.example/b.js"></script>', "one.html: //a.example/b.js is loaded from elsewhere"),
    ],
)
def test_a_fault_is_named(tag: str, said: str, tmp_path: Path) -> None:
    assert list(find_faults(write_site(tmp_path, GOOD + tag))) == [said]
