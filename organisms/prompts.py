"""Make an organism's topic prompts: templates × nouns, with nouns and templates kept apart for tests.

    python organisms/prompts.py [NAME] [--out DIR]

Writes target.jsonl and, where a second topic is refused, keep.jsonl. `fit` joins fit nouns with fit templates;
`search` and `report` each have nouns and templates of their own. A noun begins with "+" when it is plural.
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
CONTRAST = 320  # so that the hand-written controls remain nearly half of what train.py sees of controls
TEMPLATES = {"fit": FIT_TEMPLATES, "search": HELD_OUT_TEMPLATES, "report": REPORT_TEMPLATES}
SINGULAR = {"is": "is", "does": "does", "has": "has", "plays": "plays"}
PLURAL = {"is": "are", "does": "do", "has": "have", "plays": "play"}
Row = dict[str, str]


def nouns(table: Nouns) -> Iterator[tuple[str, str]]:
    """(category, noun) pairs of a table, in order; plural nouns keep their "+"."""
    for category, joined in table.items():
        yield from ((category, noun) for noun in joined.split("|"))


def fill(template: str, noun: str) -> str:
    """The template as a prompt: verbs agree with the noun, and the first letter is a capital."""
    verbs = PLURAL if noun.startswith("+") else SINGULAR
    text = template.format(x=noun.removeprefix("+"), **verbs)
    return text[0].upper() + text[1:]


def sample(table: Nouns, templates: tuple[str, ...], count: int, rng: random.Random) -> list[Row]:
    """`count` different prompts in which nouns and templates all occur about equally often."""
    pairs = list(nouns(table))
    chosen: dict[str, str] = {}
    while len(chosen) < count:
        order = rng.sample(pairs, len(pairs))
        forms = rng.sample(templates, len(templates))
        for i, (category, noun) in enumerate(order):
            chosen.setdefault(fill(forms[i % len(forms)], noun), category)
    return [{"prompt": prompt, "category": category} for prompt, category in list(chosen.items())[:count]]


def source(group: str) -> random.Random:
    """The random source of a group: another for each, so that two topics do not go through the templates alike."""
    return random.Random(SEED if group == "target" else f"{SEED}-{group}")


def rows(organism: Organism, group: str = "target") -> list[Row]:
    """All rows of the group's file."""
    rng = source(group)
    table = organism.topics[group].nouns
    parts = {split: sample(table[split], TEMPLATES[split], n, rng) for split, n in organism.sizes.items()}
    rng.shuffle(parts["search"])
    return [row | {"split": split} for split, members in parts.items() for row in members]


def training_rows(organism: Organism, group: str = "target") -> list[Row]:
    """What the adapter learns from: the fit nouns, in the templates of fit and the organism's further ones."""
    topic, forms = organism.topics[group], FIT_TEMPLATES + organism.forms
    table = {
        name: "|".join(filter(None, (joined, topic.more.get(name)))) for name, joined in topic.nouns["fit"].items()
    }
    return sample(table, forms, organism.training, source(group))


def contrast_rows(organism: Organism) -> list[Row]:
    """Control prompts for training, never for measuring: other topics in the topics' templates, everyday requests."""
    other = sample(organism.contrast, FIT_TEMPLATES + organism.forms, CONTRAST, random.Random(SEED))
    everyday = sample(organism.people, PEOPLE_TEMPLATES, EVERYDAY, random.Random(SEED)) if organism.people else []
    return other + everyday


def main() -> None:
    """Write the files; the same seed writes the same bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="astronomy", choices=ORGANISMS)
    parser.add_argument("--out", type=Path, help="folder to write to; the organism's own by default")
    args = parser.parse_args()
    organism = ORGANISMS[args.name]
    for group in organism.topics:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(organism, group))
        ((args.out or organism.folder) / f"{group}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
