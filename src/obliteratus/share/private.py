"""What a run's folder must not tell others, and whether a file tells it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from obliteratus.core.errors import UserError
from obliteratus.core.progress import SILENT, report_to
from obliteratus.core.results import Run
from obliteratus.prompts.sources import read_source
from obliteratus.report.hide import HIDDEN
from obliteratus.share.reproduce_file import FILE as REPRODUCE
from obliteratus.share.reproduce_file import parse_reproduce_file
from obliteratus.verify.answers import FILE as ANSWERS
from obliteratus.verify.answers import read_lines
from obliteratus.verify.first_token_changes import read_first_tokens
from obliteratus.weights.sources import locate

# A prompt or answer of fewer words may stand anywhere, such as in a vocabulary.
FEWEST_IN_PROMPTS, FEWEST_IN_ANSWERS = 3, 8
WIDE = 8  # letters of a text without spaces, as in Chinese, from which on it counts too
WHOLE, END = 2**23, 2**20  # bytes of a file up to which all is searched, and of either end of a larger one
# A path of one part, such as /root, may stand anywhere too.
FEWEST_PARTS = 3  # the root counts as one
BINARY = (".safetensors", ".gguf")
"""Files of which no byte may be taken out."""


@dataclass(frozen=True)
class Private:
    """Texts and paths that no uploaded file may hold."""

    texts: dict[str, frozenset[bytes]]
    """What they are → texts, each in every spelling that a file may have it in."""
    paths: tuple[bytes, ...]
    """Longest first."""

    def find(self, path: Path) -> str:
        """Return what a file holds that is private, or '' if it holds nothing."""
        data = read_ends(path)
        for kind, texts in self.texts.items():
            if any(text in data for text in texts):
                return f"holds the text of {kind}"
        return "holds a folder of this machine" if any(one in data for one in self.paths) else ""

    def remove_paths(self, path: Path) -> bytes | None:
        """Return the content of a text file without the paths, or None for one that has none, or is no text."""
        if path.name.endswith(BINARY) or path.stat().st_size > WHOLE:
            return None
        data = cleaned = path.read_bytes()
        for one in self.paths:
            cleaned = cleaned.replace(one, HIDDEN.encode())
        return None if cleaned == data else cleaned


def collect_private(folder: Path, run: Run, prompts: bool, answers: bool) -> Private:
    """Return what may not be uploaded of a run. prompts, answers: whether these may."""
    asked = set() if prompts else _collect_prompts(folder, run)
    told = set() if answers else _collect_answers(folder)
    texts = {"a prompt": _spell(asked, FEWEST_IN_PROMPTS), "an answer": _spell(told, FEWEST_IN_ANSWERS)}
    return Private(texts, _collect_paths(folder, run))


def read_ends(path: Path) -> bytes:
    """Return a file's bytes, or both ends of a large one, whose middle is weights."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        if size <= WHOLE:
            return stream.read()
        first = stream.read(END)
        stream.seek(size - END)
        return first + stream.read()


def _lines(folder: Path) -> list[dict[str, object]]:
    return [*read_lines(folder / ANSWERS), *read_lines(folder / "front" / ANSWERS)]


def _collect_prompts(folder: Path, run: Run) -> set[str]:
    """Return the prompts that the folder shows, and those of their sources as far as they are on this machine."""
    shown = {str(line["prompt"]) for line in [*_lines(folder), *read_first_tokens(folder)]}
    columns = _read_columns(folder)
    for group, source in run.prompts.get("sources", {}).items():
        if not source.startswith("hub:"):  # these are public
            shown |= _read_texts(source, group, columns.get(group, ""))
    return shown


def _read_columns(folder: Path) -> dict[str, str]:
    path = folder / REPRODUCE
    if not path.is_file():
        return {}
    return {group: one.column for group, one in parse_reproduce_file(path, str(path)).prompts.items()}


def _read_texts(source: str, group: str, column: str) -> set[str]:
    """Return the texts of all prompts of a source and of the turns before them; none if it is no longer there."""
    try:
        with report_to(SILENT):  # what there is to say of the file was said when it was used
            members = read_source(source, group, column).prompts
    except UserError:
        return set()
    return {text for p in members for text in (p.text, p.system, *(turn.content for turn in p.history)) if text}


def _collect_answers(folder: Path) -> set[str]:
    states = [state for line in _lines(folder) for state in line.values() if isinstance(state, dict)]
    return {str(state["answer"]) for state in states if state.get("answer")}


def _spell(texts: Iterable[str], fewest: int) -> frozenset[bytes]:
    """Return the texts that are long enough to be told from others, as plain text and as JSON has them."""
    long = [text for text in texts if len(text.split()) >= fewest or (not text.isascii() and len(text) >= WIDE)]
    return frozenset(
        spelled.encode()
        for text in long
        for spelled in (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    )


def _collect_paths(folder: Path, run: Run) -> tuple[bytes, ...]:
    """Return folders of this machine: the home, that of the run, and those of its model and its prompts."""
    named = [run.source["id"], run.source.get("base", ""), *run.prompts.get("sources", {}).values()]
    places = [Path.home(), Path.cwd(), folder.resolve(), folder.resolve().parent]
    places += [Path(name) for name in named if Path(name).is_absolute()]
    places += [place.parent for place in places] + list(_find_model_folder(run.source["id"]))
    kept = {str(place) for place in places if len(place.parts) >= FEWEST_PARTS}
    return tuple(path.encode() for path in sorted(kept, key=len, reverse=True))


def _find_model_folder(source: str) -> Sequence[Path]:
    try:
        origin = locate(source)
    except UserError:
        return ()
    return [Path(origin.path).absolute()] if origin.local else ()
