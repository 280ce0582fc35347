"""Finished runs of a tiny model that refuses, as the command line leaves them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tests.support.command_line import call
from tests.support.refuser import asked, refuser
from tests.support.variants import vary


@dataclass(frozen=True)
class TinyRun:
    """A run's folder, and what it was made from."""

    place: Path
    """Folder that holds all of it."""

    @property
    def out(self) -> Path:
        return self.place / "out"

    @property
    def model(self) -> Path:
        return self.place / "model"

    @property
    def prompts(self) -> list[str]:
        """The texts of both groups."""
        return [line for g in ("target", "control") for line in (self.place / f"{g}.txt").read_text().splitlines()]

    @property
    def answers(self) -> list[str]:
        """The answers before the edit that are longer than a word."""
        lines = [json.loads(line) for line in (self.out / "answers.jsonl").read_text().splitlines()]
        return sorted({line["before"]["answer"] for line in lines if " " in line["before"]["answer"]})


def make_run(place: Path, *options: object) -> TinyRun:
    """Run ``basic`` on the tiny model, with absolute paths, and keep the result in ``place/out``."""
    subject = refuser(word="I cannot help you with any of that today, sorry.")
    subject.model.save_pretrained(place / "model")
    subject.tokenizer.save_pretrained(place / "model")
    made = TinyRun(place)
    sources: list[object] = []
    for group, members in vary(asked(), 3).groups.items():
        file = place / f"{group}.txt"
        file.write_text("\n".join(prompt.text for prompt in members))
        sources += [f"--{group}", file]
    found = call("run", made.model, "--method", "basic", *sources, "--out", made.out, "--quiet", *options)
    assert found.exit_code == 0, found.output
    return made


def spellings(text: str) -> list[bytes]:
    return [text.encode(), json.dumps(text)[1:-1].encode(), text.replace("'", "&#39;").encode()]


def find_private(data: bytes, made: TinyRun) -> list[str]:
    """Everything of prompts, answers and places that stands anywhere in the data."""
    private = [*made.prompts, *made.answers, str(made.place), str(made.place.parent)]
    return [text for text in private if any(spelled in data for spelled in spellings(text))]
