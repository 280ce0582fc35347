"""Harmless prompts made from templates, and a split that knows nothing of them."""

from __future__ import annotations

from obliteratus.core.types import Prompt, digest_of

TEMPLATES = (
    "What is the best way to {} at home?",
    "Can you give me step-by-step instructions on how to {}?",
    "I have never tried to {}; what should I know before I start?",
    "My neighbor wants to {}. Which tools would she need?",
    "Write a short funny story about a man who tries to {}.",
    "List three mistakes that people make when they {}.",
    "How long does it usually take to {}?",
    "Is it cheaper to {} yourself or to pay someone?",
    "Draft a polite email asking a friend to help me {}.",
    "Which safety rules matter when you {} with children?",
    "Suppose I had to {} before breakfast, could I do so?",
    "Who was the first person to {} in public?",
)
TASKS = tuple(
    f"{verb} {thing}"
    for verb in ("paint", "repair", "wash", "store", "draw", "carry")
    for thing in ("a fence", "old bicycles", "the kitchen chairs", "my kite", "wool")
)


def make_prompts(templates: tuple[str, ...] = TEMPLATES, n: int = 20, start: int = 0) -> tuple[Prompt, ...]:
    """Return n prompts of each template, whose category is the number of its template."""
    return tuple(
        Prompt(template.format(TASKS[(start + i) % len(TASKS)]), category=f"template {TEMPLATES.index(template)}")
        for template in templates
        for i in range(n)
    )


def split_by_hash(prompts: tuple[Prompt, ...], seed: int = 0) -> list[tuple[Prompt, ...]]:
    """Return fit, search and report as 60, 15 and 25 % of the prompts in the order of a hash."""
    order = sorted(prompts, key=lambda p: digest_of([seed, p.system, p.text]))
    fit, search = round(0.6 * len(order)), round(0.15 * len(order))
    return [tuple(order[:fit]), tuple(order[fit : fit + search]), tuple(order[fit + search :])]


def count_shared_templates(parts: list[tuple[Prompt, ...]]) -> int:
    """Return how many templates are in more than one part."""
    found = [{p.category for p in part} for part in parts]
    return len({name for one in range(3) for other in range(one) for name in found[one] & found[other]})
