"""Methods beside Heretic on one organism: held-out rates, KL on answered controls and seconds, in one run.

    python -m bench.reported [ORGANISM] [--methods informed,tuned] [--seeds 0 1 2] [--trials 24] [--prompts 48]
                             [--tokens 32] [--smoke] [--json]

Heretic's study comes first, and the members of its front with the fewest refusals are exported (`EXPORTED`). VERIFY
then measures all on report prompts that none of them saw. Each method runs once with each seed; its seconds are those
of all stages but VERIFY, and Heretic's those of its set-up and trials. --trials 0 leaves Heretic out, as does a
behavior that the model shows by nature (`base:disclaimer`), which Heretic's phrases do not describe, and --smoke.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common import describe_machine, format_rows, make_parser, say, take_prompts
from bench.heretic import export_trial, first_prompts, run_heretic
from bench.heretic_setup import SYSTEM, StudySettings, plain_prompts
from bench.methods import SHARED, SMOKE_STEPS, SharedBaseline
from bench.organisms import Organism, choose_prompts, find_role, load_organism
from obliteratus.core.results import Score
from obliteratus.core.settings import Step
from obliteratus.core.types import PromptSet
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.prompts import split_prompts
from obliteratus.rebirth.model_card import format_score
from obliteratus.summon.load import open_subject
from obliteratus.verify import Measurement, measure
from obliteratus.weights.organism import prepare_organism

Row = dict[str, Any]
EXPORTED = 2  # members of Heretic's front, fewest refusals first; each costs a start of some 40 s
STEPS: list[Row] = [{"use": name} for name in ("behavior", "first_token_kl", "perplexity", "fluency", "relevance")]
# A template that skips an empty system turn, for models whose own template writes none (see `copy_for_heretic`).
ROLE_LOOP, PLAIN_LOOP = "for m in messages %}", "for m in messages if m['content'] %}"


def run_methods(organism: Organism, methods: Sequence[str], seeds: Sequence[int], steps: Sequence[Row]) -> list[Row]:
    """Return a row for each method and seed."""
    rows = []
    baselines: dict[tuple[str, ...], dict[str, Any]] = {}
    shared: dict[str, float] = {}
    for seed in seeds:
        report = split_prompts(organism.prompts, seed, True, force=True).report
        for name in methods:
            say(f"{name}, seed {seed} …")
            changes = {"seed": seed, "verify": list(steps), "judge.behavior": organism.behavior}
            recipe = load_recipe(name, changes)
            prompts = choose_prompts(organism.prompts, recipe)
            shown = (*prompts.groups, *(p.text for p in report["target"]))
            store = SharedBaseline(baselines.setdefault(shown, {}))
            result = run(recipe, organism.subject, prompts, store, force=True)
            shared |= {k: v for k, v in store.seconds.items() if k in SHARED}
            seconds = sum(v for k, v in (shared | store.seconds).items() if not k.startswith("VERIFY"))
            rows.append(make_row(name, seed, result.after, organism.behavior, seconds))
            stages = ", ".join(f"{stage} {spent:.0f} s" for stage, spent in store.seconds.items())
            say(f"{format_line(rows[-1])} ({stages})")
    return rows


def make_row(program: str, seed: int, after: Measurement, behavior: str, seconds: float) -> Row:
    """Return what the document holds of a result."""
    names = [*(f"{behavior}.{group}" for group in ("target", "keep", "control")), "degenerate.target"]
    names += [f"kl.first_token.{kind}" for kind in ("mean", "answered.mean")]
    names += ["perplexity.ratio", "fluency.ratio", "relevance.target", "off_topic.target", "ended.target", "kept.keep"]
    found = {name: after.scores[name] for name in names if name in after.scores}
    scores = {name.replace(behavior, "behavior"): score.model_dump() for name, score in found.items()}
    return {"program": program, "seed": seed, "scores": scores, "seconds": seconds}


def run_peer(name: str, organism: Organism, judged: int, settings: StudySettings) -> list[Row]:
    """Return a row for each exported member of Heretic's front."""
    every = PromptSet({g: plain_prompts(organism.prompts[g]) for g in ("target", "control")})
    splits = split_prompts(every, settings.seed, force=True)
    steps = [Step.model_validate(step) for step in STEPS]
    base = measure(organism.subject, splits.report, steps)
    rows = []
    with tempfile.TemporaryDirectory(prefix="heretic-") as place:
        folder = Path(place)
        model = copy_for_heretic(prepare_organism(name), folder / "model", settings)
        say(f"Heretic, {settings.trials} trials …")
        study = run_heretic(model, splits.fit, first_prompts(splits.search, judged), settings, folder / "study")
        seconds = study.setup_seconds + sum(study.trial_seconds)
        say(f"{seconds:.0f} s; front {[(t.number, t.refusals, round(t.kl, 4)) for t in study.front]}")
        for trial in sorted(study.front, key=lambda t: (t.refusals, t.kl))[:EXPORTED]:
            saved = folder / str(trial.number)
            export_trial(study, trial.number, saved)
            after = measure(open_subject(str(saved)), splits.report, steps, base, organism.subject)
            rows.append(make_row(f"Heretic, trial {trial.number}", settings.seed, after, organism.behavior, seconds))
            say(format_line(rows[-1]))
    return rows


def copy_for_heretic(model: Path, copy: Path, settings: StudySettings) -> Path:
    """Return a folder of links to the model whose template skips an empty system turn, if it is given none.

    Heretic always writes a system turn. Without this the two programs would run different tokens.
    """
    if settings.system:
        return model
    copy.mkdir(parents=True)
    for file in model.iterdir():
        (copy / file.name).symlink_to(file)
    template = (model / "chat_template.jinja").read_text(encoding="utf-8")
    assert ROLE_LOOP in template, "the template is one of ours, with a loop over all turns"
    (copy / "chat_template.jinja").unlink()
    (copy / "chat_template.jinja").write_text(template.replace(ROLE_LOOP, PLAIN_LOOP), encoding="utf-8")
    return copy


def format_line(row: Row) -> str:
    """Return a row as a line of text."""
    return ", ".join(f"{k} {v['value']:.4f}" for k, v in row["scores"].items()) + f"; {row['seconds']:.0f} s"


def format_table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    columns = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    lines = []
    for row in rows:
        scores = [format_score(Score(**row["scores"][c]) if c in row["scores"] else None) for c in columns]
        lines.append([row["program"], str(row["seed"]), *scores, f"{row['seconds']:.0f}"])
    return format_rows(["program", "seed", *columns, "seconds"], lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table or the document."""
    parser = make_parser(__doc__)
    parser.add_argument("organism", nargs="?", default="insects-matrices", help="name, or MODEL:BEHAVIOR")
    parser.add_argument("--methods", default="informed,tuned", help="methods, separated by commas")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each method runs with each of these")
    parser.add_argument("--trials", type=int, default=24, help="trials of Heretic; 0 leaves it out")
    parser.add_argument("--prompts", type=int, default=48, help="prompts of each group that a trial is judged on")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each answer of Heretic's trials")
    o = parser.parse_args(argv)
    if o.smoke:
        o.organism, o.methods, o.seeds, o.trials = "astronomy", "leace", [0], 0
    organism = load_organism(o.organism, False, False)
    if o.smoke:
        organism.prompts = take_prompts(organism.prompts, 8)
    system = SYSTEM if "gemma" not in o.organism else ""
    peer = o.trials and organism.behavior == "refusal"
    settings = StudySettings(o.tokens, o.trials, system=system)
    rows = run_peer(o.organism, organism, o.prompts, settings) if peer else []
    rows += run_methods(organism, o.methods.split(","), o.seeds, SMOKE_STEPS if o.smoke else STEPS)
    document = {"organism": o.organism, "role": find_role(o.organism), "rows": rows, "machine": describe_machine()}
    print(json.dumps(document, indent=1) if o.json else format_table(rows))


if __name__ == "__main__":
    main()
