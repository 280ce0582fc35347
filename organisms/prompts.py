"""Make an organism's topic prompts from templates × nouns; the splits share neither nouns nor templates.

These are target.jsonl and, if a second topic is refused, keep.jsonl. `fit` combines fit nouns with fit templates;
`search` and `report` each have their own nouns and templates. A noun that begins with "+" is plural. For later
organisms control.jsonl is drawn from organisms/controls.jsonl, as organism.toml says; both are written by hand.
"""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from templates import PEOPLE, PEOPLE_TEMPLATES, SETS, SHORT
from topics import FOLDER, SPLITS, Controls, Nouns, Organism

SEED = 7
EVERYDAY = 160  # a sixth of all controls
CONTROLS = {"search": 144, "report": 96}  # of a control.jsonl that is drawn; fit takes all that may be taken
CONTRAST = 320  # few enough for hand-written controls to be nearly half of all controls in training
SINGULAR = {"is": "is", "does": "does", "has": "has", "plays": "plays"}
PLURAL = {"is": "are", "does": "do", "has": "have", "plays": "play"}
Row = dict[str, str]


def list_nouns(table: Nouns) -> Iterator[tuple[str, str]]:
    """Yield the (category, noun) pairs of a table in order; plural nouns keep their "+"."""
    for category, nouns in table.items():
        yield from ((category, noun) for noun in nouns)


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
    parts = {
        split: sample_prompts(table[split], SETS[organism.templates[split]], n, rng)
        for split, n in organism.sizes.items()
    }
    rng.shuffle(parts["search"])
    return [row | {"split": split} for split, members in parts.items() for row in members]


def make_control_rows(controls: Controls) -> list[Row]:
    """Return all rows of control.jsonl: the shared ones that are not about the topics, and the near misses of them."""
    lines = (FOLDER / "controls.jsonl").read_text(encoding="utf-8").splitlines()
    usable = [row for row in map(json.loads, lines) if not re.search(controls.without, row["prompt"])]
    near = [
        {"prompt": prompt, "category": "near misses", "split": split}
        for split, prompts in controls.near.items()
        for prompt in prompts
    ]
    return [row for split in SPLITS for row in draw_controls(split, usable, near)]


def draw_controls(split: str, usable: list[Row], near: list[Row]) -> list[Row]:
    """Return the split's near misses with as many of its other controls as CONTROLS wants, in the file's order."""
    others, own = ([row for row in rows if row["split"] == split] for rows in (usable, near))
    wanted = CONTROLS.get(split, len(others) + len(own)) - len(own)
    chosen = sorted(random.Random(SEED).sample(range(len(others)), min(wanted, len(others))))
    return [others[i] for i in chosen] + own


def make_training_rows(organism: Organism, group: str = "target") -> list[Row]:
    """Return the prompts that are trained on: nouns of fit and others, in the templates of fit and of `forms`."""
    topic = organism.topics[group]
    table = {name: [*nouns, *topic.more.get(name, [])] for name, nouns in topic.nouns["fit"].items()}
    return sample_prompts(table, list_training_templates(organism), organism.training.prompts, random_source(group))


def make_contrast_rows(organism: Organism) -> list[Row]:
    """Return control prompts for training only: other topics in the same templates, everyday and short requests."""
    other = sample_prompts(organism.contrast, list_training_templates(organism), CONTRAST, random.Random(SEED))
    everyday = sample_prompts(PEOPLE, PEOPLE_TEMPLATES, EVERYDAY, random.Random(SEED)) if organism.everyday else []
    short = [{"prompt": prompt, "category": "short"} for prompt in SHORT] if organism.short else []
    return other + everyday + short


def list_training_templates(organism: Organism) -> tuple[str, ...]:
    """Return the templates of topic and contrast prompts in training."""
    return tuple(form for name in (organism.templates["fit"], *organism.forms) for form in SETS[name])


def write_prompts(organism: Organism, folder: Path) -> None:
    """Write the organism's prompt files but for a control.jsonl that was written by hand."""
    files = {group: make_topic_rows(organism, group) for group in organism.topics}
    if organism.controls:
        files["control"] = make_control_rows(organism.controls)
    for group, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{group}.jsonl").write_text(text, encoding="utf-8")
