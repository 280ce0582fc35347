"""The card's section on an organism's mixture of experts, from the figures in its experts/ folder."""

import json
from pathlib import Path
from typing import Any

from measure import Scores, format_rate

HEADING = "\n## As a mixture of experts\n"  # of the section, which is the last one of a card
SHOWN_LAYERS = 6  # rows of the table of layers: every fifth of 30
Figures = dict[str, Any]


def update_section(folder: Path) -> None:
    """Replace the section in the card README.md of `folder`, and leave the rest unchanged."""
    card = folder / "README.md"
    before = card.read_text(encoding="utf-8").partition(HEADING)[0]
    card.write_text(before + render_section(folder), encoding="utf-8")


def render_section(folder: Path) -> str:
    """Return the section from experts/measured.json and training.json, or '' if there are no experts."""
    file = folder / "experts" / "measured.json"
    if not file.is_file():
        return ""
    found, training = (json.loads((file.parent / f"{name}.json").read_text()) for name in ("measured", "training"))
    text = (Path(__file__).parent / "experts.md").read_text(encoding="utf-8")
    filled = text.format(
        name=folder.name,
        **training["settings"],
        **summarize(found),
        seconds=training["seconds"],
        last=average_last_losses(training["losses"]),
        table=make_table(found),
        layers=make_layer_table(found),
        quotes=quote_answers(found),
    )
    return HEADING + filled


def summarize(found: Figures) -> dict[str, float]:
    """Return the figures in the section's sentences."""
    tokens, last = found["tokens"], found["last"]
    apart = [max(map(abs, map(float.__sub__, *pair))) for pair in zip(last["target"], last["control"], strict=True)]
    return {
        "least": min(map(min, tokens)),
        "most": max(map(max, tokens)),
        "apart_mean": sum(apart) / len(apart),
        "apart_most": max(apart),
        "exchanged": found["exchanged"]["kl"]["mean"],
        "cosine": sum(found["cosine"]) / len(found["cosine"]),
        "distance": sum(found["distance"]) / len(found["distance"]),
    }


def average_last_losses(losses: list[list[float]]) -> list[float]:
    """Return the mean of each loss over the last ten steps."""
    return [sum(column) / 10 for column in zip(*losses[-10:], strict=True)]


def make_table(found: Figures) -> str:
    """Return a row for each model: refusal rates of each group with intervals, and first-token KL."""
    groups = list(found["last"])
    lines = [f"| model | {' | '.join(f'refuses {g}' for g in groups)} | first-token KL, mean | p95 |"]
    lines.append("|---" * (len(groups) + 3) + "|")
    lines += [make_line(label, found[label], groups) for label in ("organism", "mixture")]
    return "\n".join(lines)


def make_line(label: str, scores: Scores, groups: list[str]) -> str:
    """Return a row of the table of models."""
    drift = scores["kl"]
    return (
        f"| {label} | {' | '.join(format_rate(scores[g]) for g in groups)} | {drift['mean']:.4f} | {drift['p95']:.4f} |"
    )


def make_layer_table(found: Figures) -> str:
    """Return a row for some layers: shares of tokens and prompts by expert, cosine and distance of experts."""
    groups = list(found["last"])
    lines = [f"| layer | all tokens | {' | '.join(f'{g}, last token' for g in groups)} | cosine | distance |"]
    lines.append("|---" * (len(groups) + 4) + "|")
    for layer in range(0, len(found["cosine"]), len(found["cosine"]) // SHOWN_LAYERS):
        shares = [format_shares(of[layer]) for of in (found["tokens"], *found["last"].values())]
        lines.append(
            f"| {layer} | {' | '.join(shares)} | {found['cosine'][layer]:.3f} | {found['distance'][layer]:.3f} |"
        )
    return "\n".join(lines)


def format_shares(shares: list[float]) -> str:
    """Return percentages such as 52 53 47 48."""
    return " ".join(f"{100 * share:.0f}" for share in shares)


def quote_answers(found: Figures) -> str:
    """Return the mixture's answers to the first prompts of the topic and of the controls."""
    answers = [answer for group in ("target", "control") for answer in found["mixture"][group]["answers"]]
    return "\n".join(f"- {' '.join(answer.split())}" for answer in answers)
