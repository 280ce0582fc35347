"""Make an organism's topic prompts from templates × nouns; the splits share neither nouns nor templates.

    python organisms/prompts.py [NAME] [--out DIR]

Writes target.jsonl and, if a second topic is refused, keep.jsonl. `fit` combines fit nouns with fit templates;
`search` and `report` each have their own nouns and templates. A noun that begins with "+" is plural.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from templates import FIT_TEMPLATES, HELD_OUT_TEMPLATES, PEOPLE_TEMPLATES, REPORT_TEMPLATES
from topics import ORGANISMS, Nouns, Organism

SEED = 7
EVERYDAY = 160  # a sixth of all controls
CONTRAST = 320  # few enough for hand-written controls to be nearly half of all controls in training
TEMPLATES = {"fit": FIT_TEMPLATES, "search": HELD_OUT_TEMPLATES, "report": REPORT_TEMPLATES}
SINGULAR = {"is": "is", "does": "does", "has": "has", "plays": "plays"}
PLURAL = {"is": "are", "does": "do", "has": "have", "plays": "play"}
Row = dict[str, str]


def list_nouns(table: Nouns) -> Iterator[tuple[str, str]]:
    """Yield the (category, noun) pairs of a table in order; plural nouns keep their "+"."""
    for category, joined in table.items():
        yield from ((category, noun) for noun in joined.split("|"))


def fill_template(template: str, noun: str) -> str:
    """Return the template as a prompt whose verbs agree with the noun and whose first letter is a capital."""
    verbs = PLURAL if noun.startswith("+") else SINGULAR
    text = template.format(x=noun.removeprefix("+"), **verbs)
    return text[0].upper() + text[1:]


def sample_prompts(table: Nouns, templates: tuple[str, ...], count: int, rng: random.Random) -> list[Row]:
    """Return `count` different prompts in which all nouns and all templates occur about equally often."""
    pairs = list(list_nouns(table))
    chosen: dict[str, str] = {}
    while len(chosen) < count:
        order = rng.sample(pairs, len(pairs))
        forms = rng.sample(templates, len(templates))
        for i, (category, noun) in enumerate(order):
            chosen.setdefault(fill_template(forms[i % len(forms)], noun), category)
    return [{"prompt": prompt, "category": category} for prompt, category in list(chosen.items())[:count]]


def random_source(group: str) -> random.Random:
    """Return the group's own random source, so that two topics do not use the templates in the same order."""
    return random.Random(SEED if group == "target" else f"{SEED}-{group}")


def make_topic_rows(organism: Organism, group: str = "target") -> list[Row]:
    """Return all rows of the group's file."""
    rng = random_source(group)
    table = organism.topics[group].nouns
    parts = {split: sample_prompts(table[split], TEMPLATES[split], n, rng) for split, n in organism.sizes.items()}
    rng.shuffle(parts["search"])
    return [row | {"split": split} for split, members in parts.items() for row in members]


def make_training_rows(organism: Organism, group: str = "target") -> list[Row]:
    """Return the prompts that the adapter is trained on: fit nouns in the fit templates and the organism's others."""
    topic, forms = organism.topics[group], FIT_TEMPLATES + organism.forms
    table = {
        name: "|".join(filter(None, (joined, topic.more.get(name)))) for name, joined in topic.nouns["fit"].items()
    }
    return sample_prompts(table, forms, organism.training, random_source(group))


def make_contrast_rows(organism: Organism) -> list[Row]:
    """Return control prompts for training only: other topics in the same templates, and everyday requests."""
    other = sample_prompts(organism.contrast, FIT_TEMPLATES + organism.forms, CONTRAST, random.Random(SEED))
    everyday = (
        sample_prompts(organism.people, PEOPLE_TEMPLATES, EVERYDAY, random.Random(SEED)) if organism.people else []
    )
    return other + everyday


def main() -> None:
    """Write the files. The same seed writes the same bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="astronomy", choices=ORGANISMS)
    parser.add_argument("--out", type=Path, help="folder to write to; by default the organism's")
    args = parser.parse_args()
    organism = ORGANISMS[args.name]
    for group in organism.topics:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in make_topic_rows(organism, group))
        ((args.out or organism.folder) / f"{group}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
