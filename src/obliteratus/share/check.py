"""Whether what a run was made from is here: its model's files, its prompts, and the releases it ran on."""

from __future__ import annotations

from collections.abc import Mapping

from obliteratus.core.errors import UserError
from obliteratus.core.types import Prompt, PromptSet
from obliteratus.share.model_files import FileSum
from obliteratus.share.reproduce_file import ModelRecord, PromptsRecord, digest_group

MOST_NAMED = 3  # files that one line names


def compare_files(then: Mapping[str, FileSum], now: Mapping[str, FileSum]) -> str:
    """Return which of a model's files are not what they were; '' if all are."""
    changed = [name for name in then if name in now and then[name] != now[name]]
    kinds = {
        "changed": changed,
        "missing": [name for name in then if name not in now],
        "new": [name for name in now if name not in then],
    }
    return "; ".join(f"{kind}: {_name(files)}" for kind, files in kinds.items() if files)


def _name(files: list[str]) -> str:
    rest = len(files) - MOST_NAMED
    return ", ".join(files[:MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def check_model(then: ModelRecord, source: str, now: Mapping[str, FileSum], made_as: str) -> str:
    """Return what differs in an organism's files, which each machine makes by itself; '' if nothing does.

    source: where the model is now. now: the sums of its files. made_as: as in `ModelRecord`. Raises UserError if the
    model is another one.
    """
    found = compare_files(then.files, now)
    if found and made_as and made_as == then.made_as:
        return f"model: an organism is made on each machine, and the sums of its files are others here ({found})"
    if found:
        raise UserError(
            f"{source}: the model is not the one that was edited ({found}); give that with --model, or --anyway"
        )
    return ""


def check_prompts(then: Mapping[str, PromptsRecord], now: PromptSet) -> None:
    """Raise UserError for the first group whose prompts are not those of the run."""
    for group in dict.fromkeys([*then, *now.groups]):
        if problem := compare_group(then.get(group), now.groups.get(group)):
            source = now.sources.get(group) or (then[group].source if group in then else group)
            raise UserError(f"{source}: {problem}; give the prompts of the run with --{group}, or --anyway")


def compare_group(then: PromptsRecord | None, now: tuple[Prompt, ...] | None) -> str:
    """Return how the prompts of one group differ from those of the run; '' if they are the same."""
    if then is None:
        return "the run had no such prompts"
    if now is None:
        return "the run had these prompts, and they are missing"
    if digest_group(now) == then.digest:
        return ""
    count = "" if len(now) == then.prompts else f", and {len(now)} instead of {then.prompts}"
    return f"these are not the prompts of the run (their digest is {digest_group(now)}, was {then.digest}{count})"


def list_conditions(then: Mapping[str, str], now: Mapping[str, str], what: str) -> list[str]:
    """Return a line for each entry that is not what it was. what: ``release`` or ``machine``."""
    names = dict.fromkeys([*then, *now])
    changed = [name for name in names if then.get(name) != now.get(name)]
    return [f"{what}: {name} {now.get(name) or 'none'}, was {then.get(name) or 'none'}" for name in changed]
