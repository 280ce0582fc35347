"""Measure an organism that was made editable against its base, and write measured.json and its card README.md.

All figures are of the stored adapter (bf16) merged into the fp32 base, on the report prompts.
"""

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
    measure_scores,
    project_out,
    read_rows,
)
from prompts import CONTRAST
from rich.progress import track
from topics import Organism
from transformers import AutoModelForCausalLM, AutoTokenizer

from obliteratus.weights.organism import merge_adapter, prepare_base

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
    for name, layers in track(choose_layer_sets(len(d), organism.training.first).items(), "projecting out"):
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


def quote_answers(found: dict[str, Scores], name: str, prompts: list[str], group: str = "target") -> str:
    """Return the first report prompts of a group with a model's answers."""
    pairs = zip(prompts, found[name][group]["answers"], strict=False)
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
        **organism.card,
        name=organism.name,
        layers=f"blocks {organism.training.first} to 29" if organism.training.first else "all 30 layers",
        shown=UPPER + " of the layers",
        again="half" if organism.training.rates[1] == 0.5 else organism.training.rates[1],
        training=organism.training.prompts,
        **training["settings"],
        alpha=2 * training["settings"]["rank"],
        sizes=organism.training.batch,
        contrast=CONTRAST,
        starts=organism.training.starts,
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


def write_card(organism: Organism, out: Path) -> None:
    """Measure the adapter in folder `out`, and write both files there."""
    found = measure(organism, out / "adapter")
    training = json.loads((out / "training.json").read_text())
    (out / "measured.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    (out / "README.md").write_text(render_card(organism, found, training), encoding="utf-8")
