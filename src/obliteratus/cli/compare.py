"""Do what `verify` asks for: measure a model by itself or against its base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obliteratus.cli.jobs import load_with_examples
from obliteratus.cli.options import check_split_by
from obliteratus.core.clock import Clock
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.results import Score
from obliteratus.core.run_folder import check_free, publish, workspace
from obliteratus.core.settings import JudgeSettings, Recipe, Step
from obliteratus.core.toml import parse_overrides
from obliteratus.core.types import PromptSet, Subject
from obliteratus.inference.memory import free_memory
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.record import describe_judge
from obliteratus.prompts import split_prompts
from obliteratus.rebirth.model_card import format_score
from obliteratus.summon.load import open_subject
from obliteratus.verify import Measurement, measure, scorers
from obliteratus.verify.answers import write_answers
from obliteratus.verify.ladder import embed_files, hear_judge

STEPS: tuple[Step, ...] = Recipe.model_fields["verify"].default
# Free memory that a second model needs, in units of the first one's weights: as many again, and batches beside them.
ROOM = 1.5


@dataclass(frozen=True)
class Compared:
    """The scores of a model, and of its base if it was compared with one."""

    before: Mapping[str, Score]
    """Those of the base; empty without one."""
    after: Mapping[str, Score]
    judge: Mapping[str, Any]
    """What was looked for, and by whom."""

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as plain data, with a text for people each."""
        return {"before": _to_plain(self.before), "after": _to_plain(self.after)}


@dataclass(frozen=True)
class Comparison:
    """A request to measure a model, checked as far as possible without it."""

    judge: JudgeSettings
    prompts: PromptSet
    """The prompts that are reported on."""
    heard: PromptSet
    """The prompts on which the base model is listened to for words of its own."""
    out: Path | None

    @classmethod
    def create(
        cls,
        choices: list[str],
        sources: Mapping[str, Any],
        seed: int | None,
        everything: bool,
        out: Path | None,
        split_by: str | None = None,
    ) -> Comparison:
        """Check a request. choices: changes of a recipe's ``judge``. everything: whether to report on all prompts."""
        settings = embed_files(load_recipe("basic", parse_overrides(choices)).judge)
        prompts = load_with_examples(sources, settings)
        if out is not None:
            check_free(out)
        if everything and (seed is not None or split_by is not None):
            raise UserError("--all: takes all prompts, so --seed and --split-by have no effect; leave them out")
        if everything:
            return cls(settings, prompts, prompts, out)
        splits = split_prompts(prompts, seed or 0, split_by=check_split_by(split_by))
        return cls(settings, splits.report, splits.fit, out)

    def run(self, model: str, against: str | None, opening: dict[str, Any], clock: Clock) -> Compared:
        """Return the scores of the model and of its base, if there is one.

        They and every answer are written if there is an output folder.
        """
        before, after, judged_by = self._measure(model, against, opening, clock)
        found = Compared(dict(before.scores) if before else {}, dict(after.scores), judged_by)
        if self.out is not None:
            with workspace(self.out, {"model": model, "against": against or ""}, resume=True) as partial:
                folder = partial / "output"
                folder.mkdir(exist_ok=True)
                write_answers(before, after, folder)
                (folder / "verify.json").write_text(
                    json.dumps(found.to_dict() | {"judge": judged_by}, indent=1), encoding="utf-8"
                )
                publish(partial, self.out)
        return found

    def _measure(
        self, model: str, against: str | None, opening: dict[str, Any], clock: Clock
    ) -> tuple[Measurement | None, Measurement, dict[str, Any]]:
        with clock.time("SUMMON base" if against else "SUMMON"):
            first = open_subject(against or model, **opening)
        with clock.time("VERIFY before" if against else "VERIFY"):
            judge = hear_judge(self.judge, first, self.heard)
            before, vocabulary = measure(first, self.prompts, STEPS, base=first, judge=judge), len(first.tokenizer)
        described = describe_judge(judge, before)
        if against is None:
            return None, before, described
        base = first if has_room_beside(first) else None
        del first  # so that only one of the two models is in memory where there is no room for both
        with clock.time("SUMMON"):
            subject = open_subject(model, **opening)
        if vocabulary != len(subject.tokenizer):
            raise UserError(
                f"{model}: its vocabulary differs from that of {against}; compare a model with its own base"
            )
        steps = STEPS if base is not None else without_base(STEPS)
        with clock.time("VERIFY after"):
            return before, measure(subject, self.prompts, steps, before, base, judge=judge), described


def has_room_beside(subject: Subject) -> bool:
    """Return whether another model of this size can be opened while this one stays."""
    weights = sum(p.numel() * p.element_size() for p in subject.model.parameters())
    return bool(free_memory(subject) >= ROOM * weights)


def without_base(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Return the steps that do not run the unedited model, and name the others in a note."""
    if left_out := [step.use for step in steps if "base" in scorers[step.use].needs]:
        note("VERIFY", f"skipped {', '.join(left_out)}: there is no memory for both models at once")
    return tuple(step for step in steps if "base" not in scorers[step.use].needs)


def _to_plain(scores: Mapping[str, Score]) -> dict[str, Any]:
    return {name: {**score.model_dump(), "text": format_score(score)} for name, score in scores.items()}


def show_compared(found: Compared, model: str, against: str | None, out: Path | None, json: bool) -> None:
    """Print the scores as JSON or as a table, and what to do next."""
    from obliteratus.cli.scores import show_scores
    from obliteratus.cli.terminal import say, show_json

    if json:
        show_json(found.to_dict())
        return
    what = f"{model} against {against}" if against else model
    sides = {"base": found.before, "model": found.after} if against else {"model": found.after}
    show_scores(f"{what}: held-out prompts, 95 % intervals", sides, str(found.judge["behavior"]))
    if out:
        say(f"{out} (verify.json and answers.jsonl)", "Saved")
        say(f"obliteratus judge {out} counts the verdicts, and exports the answers for labeling.", "Next")
    else:
        say("--out FOLDER keeps the scores with every answer; --against BASE compares with another model.", "Next")
