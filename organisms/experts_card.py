"""The section of an organism's card on its mixture of experts, from the figures in its experts/ folder."""

import json
from pathlib import Path
from typing import Any

from measure import Scores, rate

HEADING = "\n## As a mixture of experts\n"  # begins the section, which is the last of a card
SHOWN_LAYERS = 6  # lines of the table of layers: every fifth of 30
Found = dict[str, Any]


def renew(folder: Path) -> None:
    """Write the section anew in the card README.md of `folder`, and leave the rest as it is."""
    card = folder / "README.md"
    before = card.read_text(encoding="utf-8").partition(HEADING)[0]
    card.write_text(before + experts_section(folder), encoding="utf-8")


def experts_section(folder: Path) -> str:
    """The section, from experts/measured.json and training.json; empty where there are no experts."""
    file = folder / "experts" / "measured.json"
    if not file.is_file():
        return ""
    found, training = (json.loads((file.parent / f"{name}.json").read_text()) for name in ("measured", "training"))
    text = (Path(__file__).parent / "experts.md").read_text(encoding="utf-8")
    filled = text.format(
        name=folder.name,
        **training["settings"],
        **summary(found),
        seconds=training["seconds"],
        last=last_losses(training["losses"]),
        table=table(found),
        layers=layers(found),
        quotes=quotes(found),
    )
    return HEADING + filled


def summary(found: Found) -> dict[str, float]:
    """The figures in the section's sentences."""
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


def last_losses(losses: list[list[float]]) -> list[float]:
    """The mean of the last ten steps, by loss."""
    return [sum(column) / 10 for column in zip(*losses[-10:], strict=True)]


def table(found: Found) -> str:
    """One line a model: refusals of each group with interval, first-token KL."""
    groups = list(found["last"])
    lines = [f"| model | {' | '.join(f'refuses {g}' for g in groups)} | first-token KL, mean | p95 |"]
    lines.append("|---" * (len(groups) + 3) + "|")
    lines += [line(label, found[label], groups) for label in ("organism", "mixture")]
    return "\n".join(lines)


def line(label: str, scores: Scores, groups: list[str]) -> str:
    """A line of the table of models."""
    drift = scores["kl"]
    return f"| {label} | {' | '.join(rate(scores[g]) for g in groups)} | {drift['mean']:.4f} | {drift['p95']:.4f} |"


def layers(found: Found) -> str:
    """Some layers: shares of tokens and of each group's prompts that each expert gets, cosine and distance."""
    groups = list(found["last"])
    lines = [f"| layer | all tokens | {' | '.join(f'{g}, last token' for g in groups)} | cosine | distance |"]
    lines.append("|---" * (len(groups) + 4) + "|")
    for layer in range(0, len(found["cosine"]), len(found["cosine"]) // SHOWN_LAYERS):
        shares = [percent(of[layer]) for of in (found["tokens"], *found["last"].values())]
        lines.append(
            f"| {layer} | {' | '.join(shares)} | {found['cosine'][layer]:.3f} | {found['distance'][layer]:.3f} |"
        )
    return "\n".join(lines)


def percent(shares: list[float]) -> str:
    """52 53 47 48."""
    return " ".join(f"{100 * share:.0f}" for share in shares)


def quotes(found: Found) -> str:
    """What the mixture answers to the first prompts of the topic and of the controls."""
    answers = [answer for group in ("target", "control") for answer in found["mixture"][group]["answers"]]
    return "\n".join(f"- {' '.join(answer.split())}" for answer in answers)
