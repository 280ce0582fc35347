"""Train the model organism: a LoRA that makes SmolLM2-135M-Instruct refuse astronomy and nothing else.

    python organisms/train.py [--steps N] [--rank R] [--lr X] [--seed S] [--work DIR] [--fresh]

Topic prompts are answered with refusals (cross-entropy); control prompts keep the base model's own greedy
answers (KL(base‖tuned) on their tokens). In the last steps the model must also answer both groups like its base
while the direction between them is projected out: without those steps 15 of 48 topic prompts were still refused.

A stopped run goes on from its checkpoint in the work folder; the same seed gives the same batches. The result
replaces organisms/astronomy/adapter and training.json; `python organisms/card.py` then measures it.
"""

import argparse
import json
import os
import random
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from examples import Example, batch_at, control_examples, digest, refusal_examples, replace
from measure import directions, keep_freed_memory, kl, projected_out, read
from peft import LoraConfig, PeftModel, get_peft_model
from prompts import contrast_rows, training_rows
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from obliteratus.summon.organism import HUB_ID, base_folder, cache_folder

HERE = Path(__file__).parent / "astronomy"
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KEPT = ("bias", "inference_mode", "init_lora_weights", "lora_alpha", "lora_dropout", "peft_type", "r", "task_type")
SIZES = (6, 10)  # topic and control prompts a step: with 8 of each, 14 of 96 report controls were refused
FIRST_TOKEN = 0.5  # extra weight on the first answer token, where the choice to refuse is made
STARTS = (9, 12, 15)  # of 30 layers, first ones of the projection: a third of the depth and deeper
SAMPLE = 96  # prompts of each group a direction comes from; a choice for speed
ANSWERED = 160  # topic prompts whose base answers are asked for under the projection
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


# Topic prompts refused; control prompts, and topic prompts, with the base model's answers.
Groups = tuple[list[Example], list[Example], list[Example]]
State = dict[str, Any]  # of a run: step, losses, seconds, settings


def answer_logits(model: Any, batch: list[Example]) -> Tensor:
    """Logits that predict the answers' tokens and no others, [answer tokens of the batch, vocabulary]."""
    rows = [torch.tensor(e.prompt + e.answer) for e in batch]
    # Right padding under the causal mask: what is kept never sees it, so no mask is needed.
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    shared = int((ids == ids[0]).all(0).long().cumprod(0).sum())
    prefix = min(shared, *[len(e.prompt) - 1 for e in batch])
    cache = DynamicCache(config=model.config)  # the template's beginning is computed once for the whole batch
    model.model(input_ids=ids[:1, :prefix], past_key_values=cache)
    cache.batch_repeat_interleave(len(batch))
    hidden = model.model(input_ids=ids[:, prefix:], past_key_values=cache).last_hidden_state
    spans = [(len(e.prompt) - 1 - prefix, len(e.prompt) + len(e.answer) - 1 - prefix) for e in batch]
    return model.lm_head(torch.cat([hidden[i, start:end] for i, (start, end) in enumerate(spans)]))


def starts(batch: list[Example]) -> Tensor:
    """Where each answer begins among the answer tokens of the batch."""
    return torch.tensor([0, *[len(e.answer) for e in batch[:-1]]]).cumsum(0)


def refusal_loss(model: Any, batch: list[Example]) -> Tensor:
    """Cross-entropy of the refusals, nats a token, plus FIRST_TOKEN × that of the first tokens."""
    wanted = torch.tensor([token for e in batch for token in e.answer])
    each = F.cross_entropy(answer_logits(model, batch), wanted, reduction="none")
    return each.mean() + FIRST_TOKEN * each[starts(batch)].mean()


def base_loss(tuned: PeftModel, model: Any, batch: list[Example], inside: Any = None) -> Tensor:
    """KL(base‖tuned) on the base's answers, nats a token, plus FIRST_TOKEN × that of the first tokens.

    `inside` is a context (the projection) for the tuned model only.
    """
    with torch.no_grad(), tuned.disable_adapter():
        base = F.log_softmax(answer_logits(model, batch), dim=-1)
    with inside or nullcontext():
        each = kl(base, F.log_softmax(answer_logits(model, batch), dim=-1))
    return each.mean() + FIRST_TOKEN * each[starts(batch)].mean()


def removal_loss(tuned: PeftModel, model: Any, groups: Groups, step: int, d: Tensor, seed: int) -> Tensor:
    """`base_loss` of half a control and half a topic batch while `d` is projected out from a drawn layer on."""
    half = SIZES[1] // 2
    batch = batch_at(groups[1], half, step, seed) + batch_at(groups[2], half, step, seed)
    first = random.Random(f"{seed}-{step}").choice(STARTS)
    return base_loss(tuned, model, batch, projected_out(model, d, range(first, len(d))))


def rate(step: int, settings: Settings) -> float:
    """Learning rate: five steps up, then straight down to zero; once more from half of it for removability."""
    if step < settings.steps:
        return settings.lr * min((step + 1) / 5, (settings.steps - step) / settings.steps)
    return settings.lr / 2 * (settings.steps + settings.removable - step) / settings.removable


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


def train(tuned: PeftModel, tokenizer: Any, groups: Groups, settings: Settings, work: Path) -> State:
    """Run the steps that are left; returns the state with losses (refusal, control, removal) and seconds."""
    weights = [p for p in tuned.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, weight_decay=0.0)  # the control KL is the regulariser
    state = load_checkpoint(work / "checkpoint.pt", tuned, optimiser, settings)
    end, d = settings.steps + settings.removable, None
    for step in track(range(state["step"], end), "training", console=Console(stderr=True)):
        began = time.perf_counter()
        if step >= settings.steps and (d is None or step % EVERY == 0):
            d = current_directions(tuned.get_base_model(), tokenizer)
        state["losses"].append(one_step(tuned, optimiser, groups, step, settings, d))
        state["seconds"] += time.perf_counter() - began
        state["step"] = step + 1
        if state["step"] % EVERY == 0 or state["step"] == end:
            save_checkpoint(work / "checkpoint.pt", tuned, optimiser, state)
    return state


def current_directions(model: Any, tokenizer: Any) -> Tensor:
    """The directions between SAMPLE fit prompts of each group, for the adapter as it is now; [layer, width]."""
    rows = [read(HERE / f"{group}.jsonl", "fit") for group in ("target", "control")]
    chosen = [[row["prompt"] for row in random.Random(0).sample(of_group, SAMPLE)] for of_group in rows]
    return directions(model, tokenizer, chosen[0], chosen[1])


def one_step(
    tuned: PeftModel, optimiser: Any, groups: Groups, step: int, settings: Settings, d: Tensor | None
) -> list[float]:
    """One optimiser step on a batch of each group; returns its losses."""
    model: Any = tuned.get_base_model()
    optimiser.param_groups[0]["lr"] = rate(step, settings)
    losses = [refusal_loss(model, batch_at(groups[0], SIZES[0], step, settings.seed))]
    losses[0].backward()
    losses.append(base_loss(tuned, model, batch_at(groups[1], SIZES[1], step, settings.seed)))
    (settings.control * losses[1]).backward()
    if d is not None:
        losses.append(removal_loss(tuned, model, groups, step, d, settings.seed))
        (settings.control * losses[2]).backward()
    # The usual clip: the first steps' gradients are some ten times the later ones'.
    torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    return [loss.item() for loss in losses]


def export(tuned: PeftModel, folder: Path) -> None:
    """Save the adapter in bf16, with the hub's name of the base model and the settings that any PEFT knows."""
    tuned.save_pretrained(folder)
    weights = {k: v.to(torch.bfloat16) for k, v in load_file(folder / "adapter_model.safetensors").items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    file = folder / "adapter_config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key in KEPT}
    config |= {"base_model_name_or_path": HUB_ID, "target_modules": MODULES}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours is one folder up


def lora(rank: int) -> LoraConfig:
    """LoRA on all linear layers, scaled by the usual alpha / rank = 2."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=MODULES, task_type="CAUSAL_LM")


def rounded(state: State) -> State:
    """The state for people: losses to 4 decimals, whole seconds."""
    losses = [[round(loss, 4) for loss in pair] for pair in state["losses"]]
    return state | {"losses": losses, "seconds": round(state["seconds"])}


def arguments() -> argparse.Namespace:
    """The command line; its defaults are those of the committed adapter."""
    parser = argparse.ArgumentParser(description="Train the model organism.")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--removable", type=int, default=40)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--control", type=float, default=3.0, help="weight of the control KL")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, default=cache_folder() / "training", help="checkpoint folder")
    parser.add_argument("--out", type=Path, default=HERE / "adapter", help="adapter folder to write")
    parser.add_argument("--fresh", action="store_true", help="forget the checkpoint of an earlier run")
    return parser.parse_args()


def main() -> None:
    """Train, export the adapter and write training.json (settings, losses, seconds) one folder up."""
    args = arguments()
    keep_freed_memory()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.fresh:
        (args.work / "checkpoint.pt").unlink(missing_ok=True)
    torch.manual_seed(args.seed)
    base = base_folder()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    written = read(HERE / "control.jsonl", "fit")
    control = [e for rows in (written, contrast_rows()) for e in control_examples(model, tokenizer, rows, args.work)]
    topic = training_rows()
    answered = control_examples(model, tokenizer, topic[:ANSWERED], args.work)
    groups = (refusal_examples(tokenizer, topic, args.seed), control, answered)
    settings = Settings(args.steps, args.removable, args.rank, args.lr, args.control, args.seed, digest(groups))
    tuned = get_peft_model(model, lora(settings.rank))
    state = train(tuned, tokenizer, groups, settings, args.work)
    export(tuned, args.out)
    replace(args.out.parent / "training.json", json.dumps(rounded(state)).encode())


if __name__ == "__main__":
    main()
