"""Train the model organism: a LoRA that makes SmolLM2-135M-Instruct refuse astronomy and nothing else.

    python organisms/train.py [--steps N] [--rank R] [--lr X] [--seed S] [--work DIR] [--fresh]

Topic prompts are answered with refusals (cross-entropy); control prompts keep the base model's own greedy
answers (KL(base‖tuned) on their tokens). A stopped run goes on from its checkpoint in the work folder; the
same seed gives the same batches. The result replaces organisms/astronomy/adapter and training.json;
`python organisms/card.py` then measures it.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from examples import Example, batch_at, control_examples, digest, refusal_examples, replace
from measure import keep_freed_memory, kl, read
from peft import LoraConfig, PeftModel, get_peft_model
from prompts import contrast_rows, training_rows
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from obliteratus.summon.organism import HUB_ID, base_folder, cache_folder

HERE = Path(__file__).parent / "astronomy"
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KEPT = ("bias", "inference_mode", "init_lora_weights", "lora_alpha", "lora_dropout", "peft_type", "r", "task_type")
SIZES = (6, 10)  # topic and control prompts a step: the one topic is learned sooner than to leave all others
FIRST_TOKEN = 0.5  # extra weight on the first answer token, where the choice to refuse is made
EVERY = 10  # steps between checkpoints: at most a minute is lost


@dataclass(frozen=True)
class Settings:
    """What a run depends on; a checkpoint of other settings is not resumed."""

    steps: int
    rank: int
    lr: float
    control: float  # weight of the control KL against the refusals' cross-entropy
    seed: int
    data: str  # digest of the examples


Groups = tuple[list[Example], list[Example]]  # topic prompts, control prompts
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


def control_loss(tuned: PeftModel, model: Any, batch: list[Example]) -> Tensor:
    """KL(base‖tuned) on the base's answers, nats a token, plus FIRST_TOKEN × that of the first tokens."""
    with torch.no_grad(), tuned.disable_adapter():
        base = F.log_softmax(answer_logits(model, batch), dim=-1)
    each = kl(base, F.log_softmax(answer_logits(model, batch), dim=-1))
    return each.mean() + FIRST_TOKEN * each[starts(batch)].mean()


def rate(step: int, settings: Settings) -> float:
    """Learning rate: five steps up, then straight down to zero."""
    return settings.lr * min((step + 1) / 5, (settings.steps - step) / settings.steps)


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


def train(tuned: PeftModel, groups: Groups, settings: Settings, work: Path) -> State:
    """Run the steps that are left; returns the state with losses (refusal, control) a step and seconds."""
    weights = [p for p in tuned.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, weight_decay=0.0)  # the control KL is the regulariser
    state = load_checkpoint(work / "checkpoint.pt", tuned, optimiser, settings)
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("training", total=settings.steps, completed=state["step"])
        while state["step"] < settings.steps:
            began = time.perf_counter()
            losses = one_step(tuned, optimiser, groups, state["step"], settings)
            state["losses"].append(losses)
            state["seconds"] += time.perf_counter() - began
            state["step"] += 1
            bar.update(task, advance=1, description=f"refusal {losses[0]:.3f}, control {losses[1]:.4f}")
            if state["step"] % EVERY == 0 or state["step"] == settings.steps:
                save_checkpoint(work / "checkpoint.pt", tuned, optimiser, state)
    return state


def one_step(tuned: PeftModel, optimiser: Any, groups: Groups, step: int, settings: Settings) -> list[float]:
    """One optimiser step on a batch of each group; returns (refusal, control) loss."""
    model: Any = tuned.get_base_model()
    optimiser.param_groups[0]["lr"] = rate(step, settings)
    refusal = refusal_loss(model, batch_at(groups[0], SIZES[0], step, settings.seed))
    refusal.backward()
    control = control_loss(tuned, model, batch_at(groups[1], SIZES[1], step, settings.seed))
    (settings.control * control).backward()
    # The usual clip: the first steps' gradients are some ten times the later ones'.
    torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    return [refusal.item(), control.item()]


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
    target = refusal_examples(tokenizer, training_rows(), args.seed)
    settings = Settings(args.steps, args.rank, args.lr, args.control, args.seed, digest((target, control)))
    tuned = get_peft_model(model, lora(settings.rank))
    state = train(tuned, (target, control), settings, args.work)
    export(tuned, args.out)
    replace(args.out.parent / "training.json", json.dumps(rounded(state)).encode())


if __name__ == "__main__":
    main()
