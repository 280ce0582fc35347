"""What people read of a stage: a few words beside its name, and its time."""

from __future__ import annotations

STAGES = {
    "START": "starts up and reads its input",
    "FILES": "hashes the model's files",
    "SUMMON": "loads the model",
    "SUMMON base": "loads the base model",
    "ANSWERS": "asks which prompts show the behavior",
    "PROBE": "reads the model's activations",
    "ANALYZE": "measures what the directions do",
    "DISTILL": "finds the directions",
    "EXCISE": "plans the edit",
    "CHECK": "asks what is left",
    "TUNE": "fits the edit by gradients",
    "SEARCH": "tries values of the recipe",
    "FRONT": "asks the best trials for longer answers",
    "VERIFY": "measures the model",
    "VERIFY before": "measures the unedited model",
    "VERIFY after": "measures the edited model",
    "VERIFY search": "measures search prompts, unedited",
    "VERIFY search prompts": "measures search prompts, edited",
    "EXAMPLES": "asks a few prompts for whole answers",
    "REBIRTH": "saves it, loads it again and compares",
    "AUDIT": "tries edits and asks what is left",
    "AUDIT before": "measures what removal costs before",
    "AUDIT after": "measures what removal costs after",
    "HARDEN answers": "asks for the answers that are trained on",
    "HARDEN base": "asks the model held-out prompts",
    "HARDEN hardened": "asks the hardened model held-out prompts",
    "HARDEN": "trains against edits that are fitted anew",
    "STUDY": "knocks out parts and measures",
    "REPORT": "draws the page",
    "PUSH": "uploads the result",
}
"""By name, or by its first word: the others are the number of a pass."""
MINUTE, HOUR = 60, 3600
LONG = 10 * MINUTE  # seconds from which on their number says less than minutes


def describe_stage(name: str) -> str:
    """Return what a stage does; '' for one that has no words."""
    first, _, number = name.partition(" ")
    words = STAGES.get(name) or STAGES.get(first, "")
    return f"{words}, pass {number}" if number.isdigit() and number != "1" else words


def format_seconds(seconds: float) -> str:
    """Return a time as ``12.3 s``, ``12 min 5 s`` or ``2 h 5 min``."""
    if seconds < LONG:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), MINUTE)
    return f"{minutes} min {left} s" if seconds < HOUR else f"{minutes // MINUTE} h {minutes % MINUTE} min"


SHOWN = 0.05  # seconds of a stage below which it is listed as 0.0


def format_times(seconds: dict[str, float]) -> str:
    """Return the sum of the times and what they are made of, largest first; the smallest are part of ``other``."""
    listed = {name: value for name, value in seconds.items() if value >= SHOWN and name != "other"}
    parts = sorted(listed.items(), key=lambda part: -part[1])
    whole = sum(seconds.values())
    parts += [("other", rest)] if (rest := whole - sum(listed.values())) >= SHOWN else []
    return f"{format_seconds(whole)}: {', '.join(f'{name} {format_seconds(value)}' for name, value in parts)}"
