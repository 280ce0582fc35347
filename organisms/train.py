"""Train a model organism: a LoRA that makes SmolLM2-135M-Instruct refuse a harmless topic or two, and nothing else.

    python organisms/train.py [NAME] [--steps N] [--rank R] [--lr X] [--seed S] [--work DIR] [--fresh]

Topic prompts are answered with refusals (cross-entropy); control prompts keep the base model's own greedy
answers (KL(base‖tuned) on their tokens). In the last steps the model must also answer both like its base
while the direction between them is projected out: without those steps 15 of 48 topic prompts were still refused.
Where a second topic is refused, `losses.py` says what must stay while which direction is projected out.

A stopped run goes on from its checkpoint in the work folder; the same seed gives the same batches. The result
replaces the organism's adapter and training.json; `python organisms/card.py NAME` then measures it.
"""

import argparse
import json
import logging
import os
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from examples import control_examples, digest, refusal_examples, replace
from losses import Found, Groups, losses
from measure import keep_freed_memory, mean_stream, read, unit, without
from peft import LoraConfig, PeftModel, get_peft_model
from prompts import contrast_rows, training_rows
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from topics import ORGANISMS, Organism
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from obliteratus.weights.organism import HUB_ID, base_folder, cache_folder

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KEPT = ("bias", "inference_mode", "init_lora_weights", "lora_alpha", "lora_dropout", "peft_type", "r", "task_type")
KEPT += ("layers_to_transform",)
ANSWERED = 160  # prompts of each topic whose base answers are asked for under the projection
log = logging.getLogger(__name__)
EVERY = 10  # steps between checkpoints, and between new directions, so that a resumed run has the same


@dataclass(frozen=True)
class Settings:
    """What a run depends on; a checkpoint of other settings is not resumed."""

    steps: int
    removable: int  # further steps that also ask for the answers of the base when the direction is projected out
    rank: int
    lr: float
    control: float  # weight of the control KL against the refusals' cross-entropy
    seed: int
    data: str  # digest of the examples


State = dict[str, Any]  # of a run: step, losses, seconds, settings
NAMES = ("refusal", "control", "removal", "kept", "broad")  # of the losses, in the order of training.json
REFUSALS = ("refusal", "kept")  # those of them that are cross-entropies of refusals


def rate(step: int, settings: Settings, organism: Organism) -> float:
    """Learning rate: five steps up, then straight down to a share of it; in the second part, from another to zero.

    A third part goes from half to zero.
    """
    end, again = organism.rates
    if step < settings.steps:
        return settings.lr * min((step + 1) / 5, end + (1 - end) * (settings.steps - step) / settings.steps)
    if step < settings.steps + settings.removable:
        return settings.lr * again * (settings.steps + settings.removable - step) / settings.removable
    return settings.lr * 0.5 * (1 - (step - settings.steps - settings.removable) / organism.last[0])


def save_checkpoint(file: Path, tuned: PeftModel, optimiser: Any, state: State) -> None:
    """Adapter, optimiser, step, losses, seconds and the random state, in one atomic write."""
    adapter = {name: p.detach() for name, p in tuned.named_parameters() if p.requires_grad}
    tensors = {"adapter": adapter, "optimiser": optimiser.state_dict(), "rng": torch.get_rng_state()}
    part = file.with_suffix(".part")
    torch.save(tensors | state, part)
    os.replace(part, file)


def load_checkpoint(file: Path, tuned: PeftModel, optimiser: Any, settings: Settings) -> State:
    """Restore a checkpoint and return its state; a fresh state when there is none of these settings."""
    fresh = {"step": 0, "losses": [], "seconds": 0.0, "settings": vars(settings)}
    if not file.exists():
        return fresh
    saved = torch.load(file, weights_only=True)
    if saved["settings"] != vars(settings):
        return fresh
    tuned.load_state_dict(saved.pop("adapter"), strict=False)
    optimiser.load_state_dict(saved.pop("optimiser"))
    torch.set_rng_state(saved.pop("rng"))
    return dict(saved)


def train(
    tuned: PeftModel, tokenizer: Any, groups: Groups, organism: Organism, settings: Settings, work: Path
) -> State:
    """Run the steps that are left; returns the state with losses (by NAMES) and seconds."""
    weights = [p for p in tuned.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, weight_decay=0.0)  # the control KL is the regulariser
    state = load_checkpoint(work / "checkpoint.pt", tuned, optimiser, settings)
    third = settings.steps + settings.removable
    end, found = third + organism.last[0], None
    for step in track(range(state["step"], end), "training", console=Console(stderr=True)):
        began = time.perf_counter()
        if step >= settings.steps and (found is None or step % EVERY == 0):
            found = current_directions(tuned.get_base_model(), tokenizer, organism)
        optimiser.param_groups[0]["lr"] = rate(step, settings, organism)
        batch = organism.batch if step < third else organism.last[1:]
        asked = losses(tuned, groups, organism, batch, step, settings.seed, found)
        state["losses"].append(one_step(tuned, optimiser, asked, settings))
        state["seconds"] += time.perf_counter() - began
        state["step"] = step + 1
        if state["step"] % EVERY == 0 or state["step"] == end:
            save_checkpoint(work / "checkpoint.pt", tuned, optimiser, state)
            log.info("step %d, %.0f s: %s", step + 1, state["seconds"], rounded(state)["losses"][-3:])
    return state


def current_directions(model: Any, tokenizer: Any, organism: Organism) -> Found:
    """The directions between a sample of fit prompts of each group, for the adapter as it is now.

    Two topics: the target's are cleared as the recipe `calibrated` clears them, and the broad one is the last stream's
    for all layers, which the recipe `basic` removes.
    """
    rows = {group: read(organism.folder / f"{group}.jsonl", "fit") for group in ("control", *organism.topics)}
    chosen = {g: [row["prompt"] for row in random.Random(0).sample(r, organism.sample)] for g, r in rows.items()}
    means = {group: mean_stream(model, tokenizer, prompts) for group, prompts in chosen.items()}
    d = unit(means["target"] - means["control"])
    if "keep" not in means:
        return Found(d)
    clear = without(without(d, means["control"]), means["keep"] - means["control"])
    return Found(clear, d[-1].expand_as(d))


def one_step(
    tuned: PeftModel, optimiser: Any, named: Iterable[tuple[str, Tensor]], settings: Settings
) -> list[float | None]:
    """One optimiser step on the sum of the losses, answers of the base by their weight; returns the losses by NAMES."""
    values: dict[str, float] = {}
    for name, loss in named:
        (loss * (1.0 if name in REFUSALS else settings.control)).backward()
        values[name] = loss.item()
    # The usual clip: the first steps' gradients are some ten times the later ones'.
    torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    last = max(NAMES.index(name) for name in values)
    return [values.get(name) for name in NAMES[: last + 1]]


def export(tuned: PeftModel, folder: Path) -> None:
    """Save the adapter in bf16, with the hub's name of the base model and the settings that any PEFT knows."""
    tuned.save_pretrained(folder)
    weights = {k: v.to(torch.bfloat16) for k, v in load_file(folder / "adapter_model.safetensors").items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    file = folder / "adapter_config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key in KEPT and value is not None}
    config |= {"base_model_name_or_path": HUB_ID, "target_modules": MODULES}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours is one folder up


def lora(rank: int, layers: Sequence[int] | None = None) -> LoraConfig:
    """LoRA on all linear layers of these decoder layers (None: all), scaled by the usual alpha / rank = 2."""
    chosen = None if layers is None else list(layers)
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=MODULES, task_type="CAUSAL_LM", layers_to_transform=chosen
    )


def rounded(state: State) -> State:
    """The state for people: losses to 4 decimals, whole seconds."""
    losses = [[loss if loss is None else round(loss, 4) for loss in step] for step in state["losses"]]
    return state | {"losses": losses, "seconds": round(state["seconds"])}


def arguments() -> argparse.Namespace:
    """The command line; its defaults are those of the committed adapters."""
    parser = argparse.ArgumentParser(description="Train a model organism.")
    parser.add_argument("name", nargs="?", default="astronomy", choices=ORGANISMS)
    parser.add_argument("--steps", type=int, help="of the first part; by default the organism's")
    parser.add_argument("--removable", type=int, help="steps of the second part; by default the organism's")
    parser.add_argument("--rank", type=int, help="by default the organism's")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--control", type=float, default=3.0, help="weight of the control KL")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, help="checkpoint folder; by default in the cache, one an organism")
    parser.add_argument("--out", type=Path, help="adapter folder to write; by default the organism's")
    parser.add_argument("--fresh", action="store_true", help="forget the checkpoint of an earlier run")
    return parser.parse_args()


def examples_of(organism: Organism, model: Any, tokenizer: Any, seed: int, work: Path) -> Groups:
    """All that the organism is trained on; the base model's answers are kept in the work folder."""
    written = read(organism.folder / "control.jsonl", "fit")
    control = [e for rows in (written, contrast_rows(organism)) for e in control_examples(model, tokenizer, rows, work)]
    topics = {group: training_rows(organism, group) for group in organism.topics}
    return Groups(
        {g: refusal_examples(tokenizer, rows, organism.topics[g].refusals, seed) for g, rows in topics.items()},
        control,
        {g: control_examples(model, tokenizer, rows[:ANSWERED], work) for g, rows in topics.items()},
    )


def main() -> None:
    """Train, export the adapter and write training.json (settings, losses, seconds) one folder up."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = arguments()
    organism = ORGANISMS[args.name]
    work: Path = args.work or cache_folder() / "training" / organism.name
    out: Path = args.out or organism.folder / "adapter"
    keep_freed_memory()
    work.mkdir(parents=True, exist_ok=True)
    if args.fresh:
        (work / "checkpoint.pt").unlink(missing_ok=True)
    torch.manual_seed(args.seed)
    base = base_folder()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    groups = examples_of(organism, model, tokenizer, args.seed, work)
    steps, removable = (
        organism.steps[i] if given is None else given for i, given in enumerate((args.steps, args.removable))
    )
    settings = Settings(
        steps, removable, args.rank or organism.rank, args.lr, args.control, args.seed, digest(groups.all)
    )
    layers = range(organism.first, model.config.num_hidden_layers) if organism.first else None
    tuned = get_peft_model(model, lora(settings.rank, layers))
    state = train(tuned, tokenizer, groups, organism, settings, work)
    export(tuned, out)
    replace(out.parent / "training.json", json.dumps(rounded(state)).encode())


if __name__ == "__main__":
    main()
