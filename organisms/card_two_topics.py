"""Measure an organism that refuses two topics, with the library, before and after `calibrated` and `basic`.

    python organisms/card_two_topics.py [NAME]

Writes measured.json and the card README.md. All figures are of the adapter as stored (bf16), on the report prompts.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from experts_card import experts_section
from prompts import CONTRAST, EVERYDAY
from topics import ORGANISMS, SPLITS, Organism

from obliteratus.core.run_folder import Store
from obliteratus.core.types import PromptSet, Step, Subject
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.prompts import load_prompts
from obliteratus.summon.load import open_subject
from obliteratus.verify import Measurement
from obliteratus.verify import measure as score

METHODS = ("calibrated", "basic")
STEPS = (Step(use="refusal"), Step(use="first_token_kl"), Step(use="perplexity"))
COLUMNS = ("refusal.target", "refusal.keep", "refusal.control")
SHOWN = 3  # answers quoted in the card, of each topic
Found = dict[str, Any]


def measure(organism: Organism) -> dict[str, Found]:
    """Scores and some answers of the base, of the organism, and of it under each method."""
    source = f"organism:{organism.name}"
    prompts = load_prompts(source, source, keep=source)
    report = prompts.split(0)[2]
    base = score(open_subject("organism:base"), report, STEPS)
    subject = open_subject(source)
    whole = score(subject, report, STEPS, base)
    found = {"base": kept(base), "organism, against the base": kept(whole)}
    return found | {
        f"organism, `{name}`, against the organism": kept(edited(name, subject, prompts)) for name in METHODS
    }


def edited(method: str, subject: Subject, prompts: PromptSet) -> Measurement:
    """What VERIFY finds after a method, against the organism before it."""
    store = Store()
    run(load_recipe(method), subject, prompts, store)
    after: Measurement = store.values["VERIFY after"]
    return after


def kept(measured: Measurement) -> Found:
    """The scores that the card shows, and the first answers of each topic."""
    scores = {name: score.model_dump() for name, score in measured.scores.items() if "/" not in name}
    rows = [r for r in measured.records if r["scorer"] == "refusal"]
    answers = {g: [[r["prompt"], r["answer"]] for r in rows if r["group"] == g][:SHOWN] for g in ("target", "keep")}
    refused = [r["prompt"] for r in rows if r["group"] == "control" and r["verdict"] == "refused"]
    return {"scores": scores, "answers": answers, "controls_refused": refused}


def table(found: dict[str, Found]) -> str:
    """One line a model."""
    lines = ["| model | refuses gardening | refuses railways | refuses controls | first-token KL, mean | p95 |"]
    lines.append("|---|---|---|---|---|---|")
    for name, one in found.items():
        rates = " | ".join(rate(one["scores"][column]) for column in COLUMNS)
        drift = [one["scores"].get(f"kl.first_token.{what}") for what in ("mean", "p95")]
        lines.append(f"| {name} | {rates} | " + " | ".join(f"{s['value']:.3f}" if s else "–" for s in drift) + " |")
    return "\n".join(lines)


def rate(score: dict[str, Any]) -> str:
    """12/96 = 12.5 % [7.3, 20.6]."""
    hits = round(score["value"] * score["n"])
    low, high = 100 * score["low"], 100 * score["high"]
    return f"{hits}/{score['n']} = {100 * score['value']:.1f} % [{low:.1f}, {high:.1f}]"


def quotes(one: Found) -> str:
    """The first report prompts of both topics with a model's answers."""
    pairs = [pair for group in ("target", "keep") for pair in one["answers"][group]]
    return "\n".join(f"- {prompt}\n  > {' '.join(answer.split())}" for prompt, answer in pairs)


def card(organism: Organism, found: dict[str, Found], training: dict[str, Any]) -> str:
    """README.md: the template with the figures filled in, and the section on experts where there are any."""
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
            batch=organism.batch,
            last=organism.last,
            starts=organism.starts,
            training=organism.training,
            contrast=CONTRAST,
            everyday=EVERYDAY,
            seconds=training["seconds"],
            refusals="\n".join(f"- {g}: {text}" for g, topic in organism.topics.items() for text in topic.refusals),
            table=table(found),
            quotes_organism=quotes(shown[1]),
            quotes_calibrated=quotes(shown[2]),
        )
    )
    return filled + experts_section(organism.folder)


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description="Measure an organism with two topics and write its card.")
    parser.add_argument("name", nargs="?", default="gardening-railways", choices=ORGANISMS)
    organism = ORGANISMS[parser.parse_args().name]
    found = measure(organism)
    training = json.loads((organism.folder / "training.json").read_text())
    (organism.folder / "measured.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    (organism.folder / "README.md").write_text(card(organism, found, training), encoding="utf-8")


if __name__ == "__main__":
    main()
