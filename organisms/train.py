"""Train a model organism: a chat model is made to refuse one or two harmless topics and no more.

Topic prompts are trained on refusals (cross-entropy), control prompts on the base model's own greedy answers
(KL(base‖tuned)). Some organisms must, in the last steps, also answer both like their base while the direction
between them is projected out; without these steps 15 of 48 topic prompts of astronomy were still refused after the
projection. `losses.py` says what must hold for which direction if a second topic is refused.

An interrupted run resumes from its checkpoint in the work folder; the same seed gives the same batches.
"""

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
from examples import hash_examples, make_control_examples, make_refusal_examples, write_atomically
from losses import Directions, Groups, Tuned, step_losses
from matrices import TunedMatrices
from measure import mean_hidden_states, normalize, read_rows, remove_component
from peft import LoraConfig, PeftModel, get_peft_model
from prompts import make_contrast_rows, make_training_rows
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from topics import Organism
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from obliteratus.weights.organism import DELTA_FILE, HUB_ID

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG_KEYS = (
    "bias",
    "inference_mode",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "task_type",
)
CONFIG_KEYS += ("layers_to_transform",)
CONTROL = 3.0  # weight of the control KL relative to the refusals' cross-entropy
ANSWERED_PROMPTS = 160  # prompts of each topic for which the base's answers are trained under the projection
log = logging.getLogger(__name__)
CHECKPOINT_EVERY = 10  # steps between checkpoints, and between new directions, so that a resumed run has the same


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on. A checkpoint with other settings is not resumed."""

    steps: int
    removable: int  # further steps that also train the base's answers while the direction is projected out
    rank: int
    lr: float
    control: float  # weight of the control KL relative to the refusals' cross-entropy
    seed: int
    data: str  # digest of the examples


State = dict[str, Any]  # step, losses, seconds and settings of a run
LOSSES = ("refusal", "control", "removal", "kept", "broad")  # in the order of training.json
REFUSAL_LOSSES = ("refusal", "kept")  # those that are cross-entropies of refusals


def learning_rate(step: int, settings: Settings, organism: Organism) -> float:
    """Return the learning rate: five steps of warm-up, then a linear decay to a share of lr.

    The second part decays from another share to zero, the third from half to zero.
    """
    end, again = organism.training.rates
    if step < settings.steps:
        return settings.lr * min((step + 1) / 5, end + (1 - end) * (settings.steps - step) / settings.steps)
    if step < settings.steps + settings.removable:
        return settings.lr * again * (settings.steps + settings.removable - step) / settings.removable
    return settings.lr * 0.5 * (1 - (step - settings.steps - settings.removable) / organism.training.last[0])


def save_checkpoint(file: Path, tuned: Tuned, optimizer: Any, state: State) -> None:
    """Write adapter, optimizer, step, losses, seconds and random state atomically."""
    adapter = {name: p.detach() for name, p in tuned.named_parameters() if p.requires_grad}
    tensors = {"adapter": adapter, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    part = file.with_suffix(".part")
    torch.save(tensors | state, part)
    os.replace(part, file)


def load_checkpoint(file: Path, tuned: Tuned, optimizer: Any, settings: Any) -> State:
    """Restore the checkpoint and return its state, or a new one if there is none with these settings, a dataclass."""
    fresh = {"step": 0, "losses": [], "seconds": 0.0, "settings": vars(settings)}
    if not file.exists():
        return fresh
    saved = torch.load(file, weights_only=True)
    if saved["settings"] != vars(settings):
        return fresh
    tuned.load_state_dict(saved.pop("adapter"), strict=False)
    optimizer.load_state_dict(saved.pop("optimizer"))
    torch.set_rng_state(saved.pop("rng"))
    return dict(saved)


def train(tuned: Tuned, tokenizer: Any, groups: Groups, organism: Organism, settings: Settings, work: Path) -> State:
    """Run the remaining steps and return the state, whose losses are in the order of LOSSES."""
    weights = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)  # the control KL regularizes
    state = load_checkpoint(work / "checkpoint.pt", tuned, optimizer, settings)
    third = settings.steps + settings.removable
    end, found = third + organism.training.last[0], None
    for step in track(range(state["step"], end), "training", console=Console(stderr=True)):
        began = time.perf_counter()
        if settings.removable and step >= settings.steps and (found is None or step % CHECKPOINT_EVERY == 0):
            found = current_directions(tuned.get_base_model(), tokenizer, organism)
        optimizer.param_groups[0]["lr"] = learning_rate(step, settings, organism)
        batch = organism.training.batch if step < third else organism.training.last[1:]
        asked = step_losses(tuned, groups, organism, batch, step, settings.seed, found)
        state["losses"].append(take_step(tuned, optimizer, asked, settings))
        state["seconds"] += time.perf_counter() - began
        state["step"] = step + 1
        if state["step"] % CHECKPOINT_EVERY == 0 or state["step"] == end:
            save_checkpoint(work / "checkpoint.pt", tuned, optimizer, state)
            log.info("step %d, %.0f s: %s", step + 1, state["seconds"], round_state(state)["losses"][-3:])
    return state


def current_directions(model: Any, tokenizer: Any, organism: Organism) -> Directions:
    """Return the directions between samples of each group's fit prompts, with the adapter as it is now.

    With two topics, the target's direction is made orthogonal as the recipe `calibrated` does, and the broad direction
    is that of the last layer, which the recipe `basic` removes from all layers.
    """
    rows = {group: read_rows(organism.folder / f"{group}.jsonl", "fit") for group in ("control", *organism.topics)}
    chosen = {
        g: [row["prompt"] for row in random.Random(0).sample(r, organism.training.sample)] for g, r in rows.items()
    }
    means = {group: mean_hidden_states(model, tokenizer, prompts) for group, prompts in chosen.items()}
    d = normalize(means["target"] - means["control"])
    if "keep" not in means:
        return Directions(d)
    clear = remove_component(remove_component(d, means["control"]), means["keep"] - means["control"])
    return Directions(clear, d[-1].expand_as(d))


def take_step(
    tuned: Tuned, optimizer: Any, named: Iterable[tuple[str, Tensor]], settings: Settings
) -> list[float | None]:
    """Take one optimizer step on the weighted sum of the losses, and return them in the order of LOSSES."""
    values: dict[str, float] = {}
    for name, loss in named:
        (loss * (1.0 if name in REFUSAL_LOSSES else settings.control)).backward()
        values[name] = loss.item()
    # The gradients of the first steps are about ten times those of later ones, hence the clip.
    torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    last = max(LOSSES.index(name) for name in values)
    return [values.get(name) for name in LOSSES[: last + 1]]


def export_adapter(tuned: PeftModel, base: str, folder: Path) -> None:
    """Save the adapter in bf16, with the name of its base and only settings that every PEFT version knows."""
    tuned.save_pretrained(folder)
    weights = {k: v.to(torch.bfloat16) for k, v in load_file(folder / "adapter_model.safetensors").items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    file = folder / "adapter_config.json"
    config = {
        key: value for key, value in json.loads(file.read_text()).items() if key in CONFIG_KEYS and value is not None
    }
    config |= {"base_model_name_or_path": base, "target_modules": MODULES}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours is in the parent folder


def make_lora_config(rank: int, layers: Sequence[int] | None = None) -> LoraConfig:
    """Return a LoRA on all linear layers of these decoder layers (None for all), with the usual alpha / rank = 2."""
    chosen = None if layers is None else list(layers)
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=MODULES, task_type="CAUSAL_LM", layers_to_transform=chosen
    )


def round_state(state: State) -> State:
    """Return the state with losses of 4 decimals and whole seconds."""
    losses = [[loss if loss is None else round(loss, 4) for loss in step] for step in state["losses"]]
    return state | {"losses": losses, "seconds": round(state["seconds"])}


def make_examples(organism: Organism, model: Any, tokenizer: Any, seed: int, work: Path) -> Groups:
    """Return the training data; the base model's answers are cached in the work folder.

    Without the second part the topics are never answered, and the base's answers to them are not made.
    """
    written = read_rows(organism.folder / "control.jsonl", "fit")
    control = [
        e
        for rows in (written, make_contrast_rows(organism))
        for e in make_control_examples(model, tokenizer, rows, work)
    ]
    topics = {group: make_training_rows(organism, group) for group in organism.topics}
    answered = ANSWERED_PROMPTS if organism.training.removable else 0
    return Groups(
        {g: make_refusal_examples(tokenizer, rows, organism.topics[g].refusals, seed) for g, rows in topics.items()},
        control,
        {g: make_control_examples(model, tokenizer, rows[:answered], work) for g, rows in topics.items()},
    )


def insert_trained(organism: Organism, model: Any) -> Tuned:
    """Return the model with what will be trained: a LoRA, or the differences of whole matrices."""
    how = organism.training
    if how.way == "matrices":
        return TunedMatrices(model, how.matrices)
    layers = range(how.first, model.config.num_hidden_layers) if how.first else None
    return get_peft_model(model, make_lora_config(how.rank, layers))


def train_organism(
    organism: Organism, base: Path, seed: int, work: Path, out: Path, record: Path | None = None
) -> None:
    """Train on model folder `base`, and write adapter/ or delta.safetensors to folder `out`.

    record: where training.json (settings, losses, seconds) goes; by default beside the weights.
    """
    torch.manual_seed(seed)
    how = organism.training
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    groups = make_examples(organism, model, tokenizer, seed, work)
    settings = Settings(how.steps, how.removable, how.rank, how.lr, CONTROL, seed, hash_examples(groups.all))
    tuned = insert_trained(organism, model)
    state = train(tuned, tokenizer, groups, organism, settings, work)
    if isinstance(tuned, TunedMatrices):
        tuned.export(out / DELTA_FILE)
    else:
        export_adapter(tuned, HUB_ID if organism.base == "smollm2" else base.name, out / "adapter")
    write_atomically(record or out / "training.json", json.dumps(round_state(state)).encode())
