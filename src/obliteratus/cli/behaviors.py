"""The behaviors command: what can be looked for in answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from obliteratus.cli.options import Json

if TYPE_CHECKING:
    from obliteratus.judge.behavior import Behavior


def behaviors(
    name: Annotated[str | None, typer.Argument(help="Behavior, or .toml file, to show.")] = None, json: Json = False
) -> None:
    """List the behaviors with how each is seen in answers, or show one: its file is a pattern for your own."""
    from obliteratus.cli.terminal import results, show_json, show_table
    from obliteratus.judge.behavior_file import find_file, list_behaviors

    if name:
        find_file(name)
    from obliteratus.judge.behavior import load_behavior

    chosen = [load_behavior(n) for n in ([name] if name else list_behaviors())]
    if json:
        show_json({behavior.name: describe(behavior) for behavior in chosen})
    elif name:
        results.out(find_file(name).read_text(encoding="utf-8"), end="")
    else:
        columns = ["behavior", "an answer that shows it", "seen by", "prompts"]
        show_table("Behaviors", columns, [_row(behavior) for behavior in chosen])


def describe(behavior: Behavior) -> dict[str, Any]:
    """Return what a behavior is and how it is seen, as plain data."""
    return {
        "about": behavior.head.about,
        "question": behavior.question,
        "languages": sorted(behavior.phrases),
        "written": list(behavior.head.written),
        "longer_than": behavior.head.longer_than,
        "classifier": behavior.classifier is not None,
        "labeled": len(behavior.head.labeled),
        "target": behavior.head.target,
        "control": behavior.head.control,
    }


def _row(behavior: Behavior) -> list[str]:
    n = len(behavior.phrases)
    seen = [f"phrases in {n} language{'s' if n > 1 else ''}"] if n else []
    seen += ["marks in the text"] if behavior.head.written else []
    seen += [f"more than {behavior.head.longer_than} words"] if behavior.head.longer_than else []
    seen += ["a classifier"] if behavior.classifier else []
    return [behavior.name, behavior.head.about, ", ".join(seen), "its own" if behavior.head.target else "yours"]
