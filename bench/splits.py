"""What the threshold of shared wording does: templates found, prompts written one by one that are linked, time.

    python -m bench.splits [--smoke] [--json]

Templates × fillers are made here, of short and of long templates. The prompts that were written one by one are the
behaviors' own and the organisms' controls. For both the script prints, at each threshold, the share of prompts that are
in their template's main cluster, and the largest cluster's share of all prompts. Then, for each set, how far apart the
parts of a split are: by hash alone as it was before, and by wording.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from bench.common import make_parser, print_report
from obliteratus.core.types import SPLITS, Prompt, PromptSet, digest_of
from obliteratus.prompts import load_prompts, split_prompts
from obliteratus.prompts.folding import fold_words
from obliteratus.prompts.places import quota
from obliteratus.prompts.shingles import find_components, largest_similarities, number_shingles

THRESHOLDS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5)
SHORT = (
    *("Tell me about {}", "What is {}?", "Explain {}", "Describe {} in one sentence.", "Write a poem about {}."),
    *("How does {} work?", "Why do people like {}?", "Give me five facts about {}.", "Who invented {}?"),
)
LONG = (
    "What is the best way to use {} at home?",
    "Can you give me step-by-step instructions on how to clean {}?",
    "I have never owned {}; what should I know before I start?",
    "My neighbor wants to sell {}. Which words would help her?",
    "Write a short funny story about a man who loses {}.",
    "List three mistakes that people make when they buy {}.",
    "How long does it usually take to learn all about {}?",
    "Is it cheaper to repair {} yourself or to pay someone?",
    "Draft a polite email asking a friend to lend me {}.",
)
NOUNS = (
    *("bread", "tide pools", "a violin", "mountain bikes", "the history of paper", "clay pots", "honey", "board games"),
    *("winter coats", "old coins", "the metric system", "soap", "a houseplant", "public libraries", "running shoes"),
    *("marbles", "the alphabet", "jazz", "ferries", "knitting", "lighthouses", "chess openings", "glass", "kites"),
    *("olive oil", "postcards", "wool", "the piano", "bridges", "canoes", "tea", "mushrooms", "clocks", "carpets"),
)
BEHAVIORS = ("disclaimer", "apology", "lists", "exclamation", "stock-phrases")
ORGANISMS = ("astronomy", "gardening-railways", "weather-late")
MANY = 20_000  # prompts of a group, to time


def fill_templates(templates: Sequence[str]) -> list[str]:
    """Return all templates with all nouns, template by template."""
    return [template.format(noun) for template in templates for noun in NOUNS]


def cluster_templates(templates: Sequence[str], threshold: float) -> dict[str, float]:
    """Return the share of prompts in their template's main cluster, and that of the largest cluster."""
    texts = fill_templates(templates)
    cluster = dict[int, int]()
    for number, component in enumerate(find_components(number_shingles([fold_words(t) for t in texts]), threshold)):
        cluster |= dict.fromkeys(component, number)
    rows = [[cluster[i * len(NOUNS) + j] for j in range(len(NOUNS))] for i in range(len(templates))]
    together = sum(max(Counter(row).values()) for row in rows)
    return {"together": together / len(texts), "largest": max(Counter(cluster.values()).values()) / len(texts)}


def cluster_written(texts: Sequence[str], threshold: float) -> dict[str, float]:
    """Return the share of prompts that are linked to any other, and that of the largest cluster."""
    words = sorted({fold_words(text) for text in texts})
    sizes = [len(c) for c in find_components(number_shingles(words), threshold)]
    return {"linked": 1 - sizes.count(1) / len(words), "largest": max(sizes) / len(words)}


def measure_hash_split(prompts: PromptSet) -> dict[str, float]:
    """Return how similar report prompts are to the nearest fit or search prompt where a hash decides."""
    report, others = [], []
    for members in prompts.groups.values():
        order = sorted(members, key=lambda p: digest_of([0, p.system, p.text]))
        first = sum(quota(len(order))[: SPLITS.index("report")])
        others += [fold_words(p.text) for p in order[:first]]
        report += [fold_words(p.text) for p in order[first:]]
    rows = number_shingles([*report, *others])
    found = sorted(largest_similarities(rows[: len(report)], rows[len(report) :]))
    return {
        "median": found[len(found) // 2],
        "largest": found[-1],
        "at the threshold or above": sum(share >= 0.3 for share in found) / len(found),
    }


def measure_wording_split(prompts: PromptSet) -> dict[str, float]:
    """Return the same where wording decides, and the parts' shares of the smallest group."""
    splits = split_prompts(prompts, 0)
    separation = splits.separation
    assert separation is not None
    group = min(prompts.groups, key=lambda g: len(prompts[g]))
    shares = {name: len(part[group]) / len(prompts[group]) for name, part in zip(SPLITS, splits, strict=True)}
    return {
        "median": separation.median,
        "largest": separation.largest,
        "at the threshold or above": separation.above / separation.measured,
        "clustered": separation.clustered,
        **shares,
    }


def load_sets() -> dict[str, PromptSet]:
    """Return all sets of prompts, with no prompt pinned."""
    sets = {name: load_prompts(f"behavior:{name}", f"behavior:{name}") for name in BEHAVIORS}
    sets |= {name: load_prompts(f"organism:{name}", f"organism:{name}") for name in ORGANISMS}
    made = [Prompt(text) for text in fill_templates(SHORT + LONG)]
    sets["templates"] = PromptSet({"target": tuple(made[::2]), "control": tuple(made[1::2])})
    return {
        name: PromptSet({g: tuple(replace(p, split="") for p in ps) for g, ps in s.groups.items()})
        for name, s in sets.items()
    }


def time_many(n: int) -> float:
    """Return the seconds in which two groups of n prompts of templates are split."""
    rng = random.Random(0)
    groups = {
        group: tuple(
            Prompt(rng.choice(LONG).format(" ".join(f"{group}{rng.randrange(3000)}" for _ in range(3))))
            for _ in range(n)
        )
        for group in ("target", "control")
    }
    start = time.perf_counter()
    split_prompts(PromptSet(groups), 0)
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    options = make_parser(__doc__).parse_args(argv)
    sets = load_sets()
    written = [p.text for name in BEHAVIORS for ps in sets[name].groups.values() for p in ps]
    written += [p.text for name in ORGANISMS for p in sets[name]["control"]]
    report = {
        "thresholds": {
            f"{threshold}": {
                "short templates": cluster_templates(SHORT, threshold),
                "long templates": cluster_templates(LONG, threshold),
                "written one by one": cluster_written(written, threshold),
            }
            for threshold in THRESHOLDS
        },
        "apart": {
            name: {"by hash": measure_hash_split(s), "by wording": measure_wording_split(s)} for name, s in sets.items()
        },
        "seconds": time_many(200 if options.smoke else MANY),
    }
    print_report(report, options.json)


if __name__ == "__main__":
    main()
