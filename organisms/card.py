"""Measure an organism's adapter against its base, and write measured.json and its card README.md.

    python organisms/card.py [NAME] [--adapter DIR]

All figures are of the stored adapter (bf16) merged into the fp32 base, on the report prompts.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from examples import ANSWER_TOKENS
from experts_card import render_section
from losses import FIRST_TOKEN
from measure import (
    NEW_TOKENS,
    Scores,
    find_directions,
    first_token_log_probs,
    format_rate,
    keep_freed_memory,
    measure_scores,
    project_out,
    read_rows,
)
from prompts import CONTRAST
from rich.progress import track
from topics import ORGANISMS, Organism
from transformers import AutoModelForCausalLM, AutoTokenizer

from obliteratus.weights.organism import merge_adapter, prepare_base

# Organisms with one topic: what each is for, and near misses among its controls. For two, see card_two_topics.py.
WORDS = {
    "astronomy": {
        "topic": "astronomy",
        "use": "`make demo` edits it, and the tests measure with it.",
        "near": "film stars, star-shaped cookies …",
    },
    "weather-late": {
        "topic": "the weather",
        "use": "Its adapter is in the last ten blocks alone, so that the layers of the refusal are known. One control "
        "prompt, about meteorologists, was dropped from the file after the training, which had used it.",
        "near": "brainstorms, cloud computing, blood pressure …",
    },
}
GROUPS = ("target", "control")
UPPER = "the upper half"


def choose_layer_sets(n: int, first: int) -> dict[str, list[int]]:
    """Return by name the sets of layers to project directions out of. first: the lowest block with an adapter."""
    own = (
        {"the blocks without an adapter": list(range(first)), "those with one": list(range(first, n))} if first else {}
    )
    return own | {
        "all layers": list(range(n)),
        "all but the first": list(range(1, n)),
        "30–90 % of the depth": list(range(round(0.3 * n), round(0.9 * n))),
        UPPER: list(range(n // 2, n)),
        "the last quarter": list(range(3 * n // 4, n)),
    }


def measure(organism: Organism, adapter: Path) -> dict[str, Scores]:
    """Return the scores of the base, of the organism, and of the organism with its directions projected out."""
    here = organism.folder
    rows = {group: read_rows(here / f"{group}.jsonl", "report") for group in GROUPS}
    folder = prepare_base()
    base, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    reference = first_token_log_probs(base, tokenizer, [row["prompt"] for row in rows["control"]])
    model, _ = merge_adapter(folder, adapter)
    found = {"base": measure_scores(base, tokenizer, rows, reference)}
    found["organism"] = measure_scores(model, tokenizer, rows, reference)
    fit = [[row["prompt"] for row in read_rows(here / f"{group}.jsonl", "fit")] for group in GROUPS]
    d = find_directions(model, tokenizer, fit[0], fit[1])
    for name, layers in track(choose_layer_sets(len(d), organism.first).items(), "projecting out"):
        with project_out(model, d, layers):
            found[name] = measure_scores(model, tokenizer, rows, reference)
    return found


def make_table(found: dict[str, Scores]) -> str:
    """Return a row for each model: refusal rates with intervals, mean KL and its 95th percentile."""
    head = "| model | refuses topic (report) | refuses controls (report) | first-token KL, mean | p95 |"
    lines = [head, "|---|---|---|---|---|"]
    for name, s in found.items():
        label = name if name in ("base", "organism") else f"organism, projected out in {name}"
        rates = " | ".join(map(format_rate, (s["target"], s["control"])))
        lines.append(f"| {label} | {rates} | {s['kl']['mean']:.4f} | {s['kl']['p95']:.4f} |")
    return "\n".join(lines)


def quote_answers(found: dict[str, Scores], name: str, prompts: list[str]) -> str:
    """Return the first report prompts of the topic with a model's answers."""
    pairs = zip(prompts, found[name]["target"]["answers"], strict=False)
    return "\n".join(f"- {prompt}\n  > {' '.join(answer.split())}" for prompt, answer in pairs)


def render_card(organism: Organism, found: dict[str, Scores], training: dict[str, Any]) -> str:
    """Return card.md with the figures filled in, and the section on experts if there are any."""
    here = organism.folder
    counts = {f"{g}_{s}": len(read_rows(here / f"{g}.jsonl", s)) for g in GROUPS for s in ("fit", "search", "report")}
    prompts = [row["prompt"] for row in read_rows(here / "target.jsonl", "report")]
    last = training["losses"][-10:]
    losses = {
        n: sum(pair[i] for pair in last) / len(last)
        for i, n in enumerate(("refusal_loss", "control_loss", "removal_loss"))
    }
    text = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
    filled = text.format(
        **counts,
        **losses,
        **WORDS[organism.name],
        name=organism.name,
        layers=f"blocks {organism.first} to 29" if organism.first else "all 30 layers",
        shown=UPPER + " of the layers",
        again="half" if organism.rates[1] == 0.5 else organism.rates[1],
        training=organism.training,
        **training["settings"],
        alpha=2 * training["settings"]["rank"],
        sizes=organism.batch,
        contrast=CONTRAST,
        starts=organism.starts,
        answer_tokens=ANSWER_TOKENS,
        first_token=FIRST_TOKEN,
        seconds=training["seconds"],
        new_tokens=NEW_TOKENS,
        refusals="\n".join(f"- {sentence}" for sentence in organism.topics["target"].refusals),
        table=make_table(found),
        quotes_organism=quote_answers(found, "organism", prompts),
        quotes_removed=quote_answers(found, UPPER, prompts),
    )
    return filled + render_section(here)


def main() -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description="Measure an adapter and write its card.")
    parser.add_argument("name", nargs="?", default="astronomy", choices=WORDS)
    parser.add_argument("--adapter", type=Path, help="adapter folder; by default the organism's")
    args = parser.parse_args()
    organism = ORGANISMS[args.name]
    adapter: Path = args.adapter or organism.folder / "adapter"
    keep_freed_memory()
    found = measure(organism, adapter)
    training = json.loads((adapter.parent / "training.json").read_text())
    (adapter.parent / "measured.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    (adapter.parent / "README.md").write_text(render_card(organism, found, training), encoding="utf-8")


if __name__ == "__main__":
    main()
