"""Measure an organism that refuses two topics before and after `calibrated` and `basic`, with the library.

This writes measured.json and the card README.md. All figures are of the stored adapter (bf16), on the report prompts.
"""

import json
from pathlib import Path
from typing import Any

from experts_card import render_section
from prompts import CONTRAST, EVERYDAY
from topics import SPLITS, Organism

from obliteratus.core.settings import Step
from obliteratus.core.types import PromptSet, Subject
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.prompts import load_prompts, split_prompts
from obliteratus.summon.load import open_subject
from obliteratus.verify import Measurement
from obliteratus.verify import measure as score

METHODS = ("calibrated", "basic")
STEPS = (Step(use="refusal"), Step(use="first_token_kl"), Step(use="perplexity"))
COLUMNS = ("refusal.target", "refusal.keep", "refusal.control")
SHOWN = 3  # answers of each topic quoted in the card
Figures = dict[str, Any]


def measure(organism: Organism) -> dict[str, Figures]:
    """Return scores and some answers of the base, of the organism, and of the organism after each method."""
    source = f"organism:{organism.name}"
    prompts = load_prompts(source, source, keep=source)
    report = split_prompts(prompts, 0).report
    base = score(open_subject("organism:base"), report, STEPS)
    subject = open_subject(source)
    whole = score(subject, report, STEPS, base)
    found = {"base": select_figures(base), "organism, against the base": select_figures(whole)}
    return found | {
        f"organism, `{name}`, against the organism": select_figures(measure_after(name, subject, prompts))
        for name in METHODS
    }


def measure_after(method: str, subject: Subject, prompts: PromptSet) -> Measurement:
    """Return the measurement after a method, whose KL is against the organism before it."""
    return run(load_recipe(method), subject, prompts).after


def select_figures(measured: Measurement) -> Figures:
    """Return the scores that the card shows, the first answers of each topic, and the controls that were refused."""
    scores = {name: score.model_dump() for name, score in measured.scores.items() if "/" not in name}
    rows = [r for r in measured.records if r["scorer"] == "refusal"]
    answers = {g: [[r["prompt"], r["answer"]] for r in rows if r["group"] == g][:SHOWN] for g in ("target", "keep")}
    refused = [r["prompt"] for r in rows if r["group"] == "control" and r["verdict"] == "refused"]
    return {"scores": scores, "answers": answers, "controls_refused": refused}


def make_table(found: dict[str, Figures]) -> str:
    """Return a row for each model."""
    lines = ["| model | refuses gardening | refuses railways | refuses controls | first-token KL, mean | p95 |"]
    lines.append("|---|---|---|---|---|---|")
    for name, one in found.items():
        rates = " | ".join(format_rate(one["scores"][column]) for column in COLUMNS)
        drift = [one["scores"].get(f"kl.first_token.{what}") for what in ("mean", "p95")]
        lines.append(f"| {name} | {rates} | " + " | ".join(f"{s['value']:.3f}" if s else "–" for s in drift) + " |")
    return "\n".join(lines)


def format_rate(score: dict[str, Any]) -> str:
    """Return text such as 12/96 = 12.5 % [7.3, 20.6]."""
    hits = round(score["value"] * score["n"])
    low, high = 100 * score["low"], 100 * score["high"]
    return f"{hits}/{score['n']} = {100 * score['value']:.1f} % [{low:.1f}, {high:.1f}]"


def quote_answers(one: Figures) -> str:
    """Return the first report prompts of both topics with a model's answers."""
    pairs = [pair for group in ("target", "keep") for pair in one["answers"][group]]
    return "\n".join(f"- {prompt}\n  > {' '.join(answer.split())}" for prompt, answer in pairs)


def render_card(organism: Organism, found: dict[str, Figures], training: dict[str, Any]) -> str:
    """Return card_two_topics.md with the figures filled in, and the section on experts if there are any."""
    lines = (organism.folder / "control.jsonl").read_text(encoding="utf-8").splitlines()
    splits = [json.loads(line)["split"] for line in lines]
    shown = list(found.values())
    filled = (
        (Path(__file__).parent / "card_two_topics.md")
        .read_text(encoding="utf-8")
        .format(
            **training["settings"],
            **organism.sizes,
            **{f"control_{split}": splits.count(split) for split in SPLITS},
            name=organism.name,
            alpha=2 * training["settings"]["rank"],
            batch=organism.training.batch,
            last=organism.training.last,
            starts=organism.training.starts,
            training=organism.training.prompts,
            contrast=CONTRAST,
            everyday=EVERYDAY,
            seconds=training["seconds"],
            refusals="\n".join(f"- {g}: {text}" for g, topic in organism.topics.items() for text in topic.refusals),
            table=make_table(found),
            quotes_organism=quote_answers(shown[1]),
            quotes_calibrated=quote_answers(shown[2]),
        )
    )
    return filled + render_section(organism.folder)


def write_card(organism: Organism) -> None:
    """Measure, and write both files."""
    found = measure(organism)
    training = json.loads((organism.folder / "training.json").read_text())
    (organism.folder / "measured.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    (organism.folder / "README.md").write_text(render_card(organism, found, training), encoding="utf-8")
