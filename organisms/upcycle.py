"""Upcycle a model organism to a mixture of experts, and train a router and what tells the experts apart.

    python organisms/upcycle.py [NAME] [--steps N] [--seed S] [--goal X] [--out DIR] [--measure]

Every MLP is copied (arXiv:2212.05055), a router from k-means chooses two copies of four, and low-rank additions to the
down projections make them differ. Router and additions are trained to give the organism's own greedy answers to the
fit prompts while loads stay even and experts stay apart. experts.safetensors (fp16) and training.json are written, then
the mixture is measured on report prompts (`--measure`: that alone) and the card's section on it is written anew.
"""

import argparse
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from examples import Example, batch_at, control_examples, digest, replace
from experts_card import renew
from first_experts import begin
from measure import keep_freed_memory, read
from measure_experts import measure
from mixture import Mixture, experts_of, losses, mix
from rich.console import Console
from rich.progress import track
from safetensors.torch import save
from topics import ORGANISMS, Organism
from transformers import AutoModelForCausalLM, AutoTokenizer

from obliteratus.weights.organism import cache_folder, organism_folder
from obliteratus.weights.upcycling import FILE

EXPERTS = 4
RANK = 4  # of each expert's addition: 2 MB in all
TOKENS = 32  # of each answer, as long as those that are measured
SIZES = {"control": 5}  # examples of a step; of every other group 2, whose answers are few and alike
FIRST = 24  # examples of each group that the first experts come from, some 1500 tokens
NAMES = ("kl", "entropy", "balance", "nearness")  # of the losses, in the order of training.json
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a run depends on."""

    steps: int
    lr: float  # of the additions
    router_lr: float
    goal: float  # how far experts are to be apart, as a share of the MLP's output: with 0.35, KL was 0.224, not 0.194
    weights: tuple[float, ...]  # of the losses, by NAMES
    seed: int
    data: str  # digest of the examples


def examples_of(organism: Organism, model: Any, tokenizer: Any, work: Path) -> dict[str, list[Example]]:
    """The fit prompts of every group with the organism's own answers, which are kept in the work folder."""
    groups = [*organism.topics, "control"]
    rows = {group: read(organism.folder / f"{group}.jsonl", "fit") for group in groups}
    return {group: control_examples(model, tokenizer, r, work, TOKENS) for group, r in rows.items()}


def batch_of(groups: dict[str, list[Example]], step: int, seed: int) -> list[Example]:
    """The step's examples of all groups."""
    return [e for group, every in groups.items() for e in batch_at(every, SIZES.get(group, 2), step, seed)]


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: five steps up, as AdamW's first ones are blind, then straight down to zero."""
    return min((step + 1) / 5, (steps - step) / steps)


def train(
    model: Any, mixtures: list[Mixture], groups: dict[str, list[Example]], settings: Settings
) -> list[list[float]]:
    """Train the mixtures, in place; the losses of each step, by NAMES."""
    routers = [m.router for m in mixtures]
    additions = [part for m in mixtures for part in (m.a, m.b)]
    # No weight decay: it would bring the experts together again.
    optimiser = torch.optim.AdamW([{"params": additions}, {"params": routers}], weight_decay=0.0)
    told = []
    for step in track(range(settings.steps), "training", console=Console(stderr=True)):
        for group, lr in zip(optimiser.param_groups, (settings.lr, settings.router_lr), strict=True):
            group["lr"] = lr * rate(step, settings.steps)
        found = losses(model, mixtures, batch_of(groups, step, settings.seed), settings.goal)
        total = sum(weight * found[name] for name, weight in zip(NAMES, settings.weights, strict=True))
        total.backward()
        torch.nn.utils.clip_grad_norm_([*additions, *routers], 1.0)  # the usual clip, as in train.py
        optimiser.step()
        optimiser.zero_grad()
        told.append([round(found[name].item(), 4) for name in NAMES])
        log.info("step %d: %s", step, told[-1])
    return told


def write(mixtures: list[Mixture], told: list[list[float]], settings: Settings, seconds: float, out: Path) -> None:
    """experts.safetensors in fp16 and training.json."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: part.half().contiguous() for name, part in vars(experts_of(mixtures)).items()}
    replace(out / FILE, save(tensors, metadata={"format": "pt"}))
    training = {"settings": vars(settings), "seconds": round(seconds), "losses": told}
    replace(out / "training.json", (json.dumps(training) + "\n").encode())


def trained(organism: Organism, settings: dict[str, Any], out: Path) -> None:
    """Make and train the organism's experts, and write them to `out`; seconds are the processor's, answers not among
    them."""
    source = organism_folder(organism.name)
    work = cache_folder() / "training" / f"{organism.name}-moe" / source.name
    work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    groups = examples_of(organism, model, tokenizer, work)
    began = time.process_time()
    made = Settings(data=digest(list(groups.values())), **settings)
    mixtures = mix(model, EXPERTS, RANK)
    first = [e for every in groups.values() for e in every[:: len(every) // FIRST]]
    begin(model, mixtures, first, made.goal, torch.Generator().manual_seed(made.seed))
    log.info("experts begin after %.0f s", time.process_time() - began)
    told = train(model, mixtures, groups, made)
    write(mixtures, told, made, time.process_time() - began, out)


def arguments() -> argparse.Namespace:
    """The command line; its defaults are those of the committed experts."""
    parser = argparse.ArgumentParser(description="Upcycle a model organism to a mixture of experts.")
    parser.add_argument("name", nargs="?", default="astronomy", choices=ORGANISMS)
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--lr", type=float, default=2e-3, help="of the additions")
    parser.add_argument("--router-lr", type=float, default=1e-3)
    parser.add_argument("--goal", type=float, default=0.25, help="how far experts are to be apart")
    parser.add_argument("--weights", type=float, nargs=4, default=(1.0, 0.5, 2.0, 1.0), help=f"of {', '.join(NAMES)}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder to write to; by default experts/ in the organism's")
    parser.add_argument("--measure", action="store_true", help="only measure the experts that are there")
    return parser.parse_args()


def main() -> None:
    """Train, write, measure, and write the card's section anew."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = arguments()
    organism = ORGANISMS[args.name]
    out: Path = args.out or organism.folder / "experts"
    keep_freed_memory()
    if not args.measure:
        names = ("steps", "lr", "router_lr", "goal", "weights", "seed")
        trained(organism, {name: vars(args)[name] for name in names}, out)
    found = measure(organism, out)
    replace(out / "measured.json", (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
    if args.out is None:
        renew(organism.folder)


if __name__ == "__main__":
    main()
