"""How well the judges agree with labels, and what judging takes of VERIFY.

Cohen's kappa of the phrases and of the classifier alone on the answers in tests/judge, which neither was made with:
refusals and compliant answers in 17 languages, compliant answers that sound like refusals, and the held-out half of
SmolLM2's disclaimers. --ask WHO also asks another judge.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.common import SMOKE_PROMPTS, describe_machine, make_parser, print_report, say
from obliteratus.core.settings import JudgeSettings, Step
from obliteratus.core.types import PromptSet, Subject
from obliteratus.judge.behavior import load_behavior
from obliteratus.judge.judge import SHOWN, Judge, Judgment
from obliteratus.judge.rung import Answered
from obliteratus.prompts import load_prompts, split_prompts
from obliteratus.summon.load import open_subject
from obliteratus.verify import measure
from obliteratus.verify.agreement import measure_agreement
from obliteratus.verify.ladder import build_judge

DATA = Path(__file__).parents[1] / "tests" / "judge"
REFUSED = ("refused", "partial", "disclaimed")
STEPS = (Step(use="behavior"), Step(use="first_token_kl"), Step(use="perplexity"))
HELD_OUT = (slice(150, 300), slice(450, 600))  # of disclaimers.jsonl, of either group: the classifier has the others


def read_sets() -> dict[str, list[tuple[Answered, bool]]]:
    """Return labeled answers by set: a language, ``traps`` or ``disclaimers``."""
    files = {file.stem: _read(file) for file in sorted((DATA / "answers").glob("*.jsonl"))}
    disclaimers = _read(DATA / "disclaimers.jsonl")
    return files | {
        "traps": _read(DATA / "compliant_traps.jsonl"),
        "disclaimers": [line for half in HELD_OUT for line in disclaimers[half]],
    }


def _read(file: Path) -> list[tuple[Answered, bool]]:
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    labels = [line.get("verdict", line.get("label", "complied")) in REFUSED for line in lines]
    return [
        (Answered(line.get("prompt", ""), line["answer"]), label) for line, label in zip(lines, labels, strict=True)
    ]


def compare_with_labels(judge: Judge, labeled: Sequence[tuple[Answered, bool]]) -> dict[str, dict[str, Any]]:
    """Return each rung's agreement with the labels, and how often it is wrong either way."""
    judgments, labels = judge.judge_all([answered for answered, _ in labeled]), [label for _, label in labeled]
    found = {}
    for rung in ("phrases", *judge.rungs):
        said = [judgment.rungs.get(rung) in SHOWN for judgment in judgments]
        pairs = list(zip(said, labels, strict=True))
        missed, false = (sum(pair == wrong for pair in pairs) for wrong in ((False, True), (True, False)))
        scores = measure_agreement(said, labels) if any(labels) else {}
        rounded = {name: round(score.value, 3) for name, score in scores.items()}
        found[rung] = {"missed": missed, "false": false, "n": len(labels), **rounded}
    return found


@dataclass(frozen=True)
class TimedJudge(Judge):
    """A judge that notes how long it takes."""

    seconds: list[float] = field(default_factory=list)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds.append(time.perf_counter() - start)

    def is_shown(self, text: str) -> bool:
        with self._timed():
            return super().is_shown(text)

    def judge_all(self, answers: Sequence[Answered]) -> list[Judgment]:
        with self._timed():
            return super().judge_all(answers)


def time_judging(subject: Subject, most: int | None) -> dict[str, float]:
    """Return the seconds of VERIFY on the disclaimer prompts, and those of judging in a process's first and second."""
    behavior = load_behavior("disclaimer")
    report = split_prompts(load_prompts(behavior.head.target, behavior.head.control), 0).report
    prompts = PromptSet({group: members[:most] for group, members in report.groups.items()})
    built = build_judge(JudgeSettings(behavior="disclaimer"), subject)
    seconds = dict[str, float]()
    for name in ("first", "later"):  # patterns are compiled, and the language identifier loaded, once a process
        judge = TimedJudge(built.behavior, rungs=built.rungs)
        start = time.perf_counter()
        measure(subject, prompts, STEPS, judge=judge)
        seconds |= {f"verify {name}": time.perf_counter() - start, f"judging {name}": sum(judge.seconds)}
    return seconds | {"share later": seconds["judging later"] / seconds["verify later"]}


def main(argv: Sequence[str] | None = None) -> None:
    """Print agreement by set, and the time that judging takes."""
    parser = make_parser(__doc__)
    parser.add_argument("--ask", default="", help="a judge to ask too: self, or a model's folder or hub id")
    options = parser.parse_args(argv)
    subject = open_subject("organism:base", dtype="bfloat16")
    judge = build_judge(JudgeSettings(rungs=("classifier", *([options.ask] if options.ask else []))), subject)
    sets, agreement = read_sets(), {}
    for name, labeled in sets.items():
        say(f"{name} …")
        agreement[name] = compare_with_labels(judge, labeled[: SMOKE_PROMPTS if options.smoke else None])
    languages = [line for name in sets if len(name) == 2 for line in sets[name]]
    agreement["all languages"] = compare_with_labels(judge, languages[: SMOKE_PROMPTS if options.smoke else None])
    report = {"agreement": agreement, "seconds": time_judging(subject, SMOKE_PROMPTS if options.smoke else None)}
    print_report(report | {"facts": {"machine": describe_machine()}}, options.json)


if __name__ == "__main__":
    main()
