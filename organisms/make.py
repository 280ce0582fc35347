"""Make a model organism: its prompts, its weights and its card, from organisms/NAME/organism.toml.

    python organisms/make.py NAME [--only prompts|weights|card] [--seed N] [--work DIR] [--out DIR] [--fresh]

An interrupted training resumes from its checkpoint in the work folder; one that ended only writes its weights again.
The base's answers that training needs are kept there too. An organism whose base may not be copied goes to the cache.
Experts are a further step: `python organisms/upcycle.py NAME`.
"""

import argparse
import logging
from pathlib import Path

import card
import card_two_topics
import plain_card
from gemma import prepare_chat
from measure import keep_freed_memory
from prompts import write_prompts
from topics import ORGANISMS, Organism
from train import train_organism

from obliteratus.weights.organism import create_folder, find_local, is_local, merge_adapter, prepare_base
from obliteratus.weights.organism_files import get_cache_folder

log = logging.getLogger(__name__)
STEPS = ("prompts", "weights", "card")


def make_weights(organism: Organism, seed: int, work: Path, out: Path) -> None:
    """Train the organism, and write its weights with training.json to `out`, or the whole model to the cache."""
    base = prepare_chat(organism, work) if organism.base == "gemma" else prepare_base()
    if not is_local(organism.name):
        train_organism(organism, base, seed, work, out)
        return
    work /= base.name  # answers and checkpoints of another base are of no use
    work.mkdir(exist_ok=True)
    train_organism(organism, base, seed, work, work, out / "training.json")
    folder = find_local(organism.name)
    if folder.is_dir():
        log.info("%s is there already; remove it to have it made anew", folder)
        return
    with create_folder(folder) as new:
        model, tokenizer = merge_adapter(base, work / "adapter")
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)


def write_card(organism: Organism, work: Path, out: Path) -> None:
    """Measure the organism, and write measured.json and README.md to its folder."""
    if not organism.training.removable:
        base = prepare_chat(organism, work) if organism.base == "gemma" else prepare_base()
        plain_card.write_card(organism, base, out)
    elif "keep" in organism.topics:
        card_two_topics.write_card(organism)
    else:
        card.write_card(organism, out)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ORGANISMS)
    parser.add_argument("--only", choices=STEPS, help="one step alone; by default all, in this order")
    parser.add_argument("--seed", type=int, default=1, help="of the training; that of the committed weights by default")
    parser.add_argument("--work", type=Path, help="checkpoint folder; by default one for each organism in the cache")
    parser.add_argument("--out", type=Path, help="folder to write to; by default the organism's")
    parser.add_argument("--fresh", action="store_true", help="ignore the checkpoint of an earlier training")
    return parser.parse_args()


def main() -> None:
    """Run the steps."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_arguments()
    organism = ORGANISMS[args.name]
    work: Path = args.work or get_cache_folder() / "training" / organism.name
    out: Path = args.out or organism.folder
    work.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    if args.fresh:
        (work / "checkpoint.pt").unlink(missing_ok=True)
    for step in (args.only,) if args.only else STEPS:
        if step == "prompts":
            write_prompts(organism, out)
        elif step == "weights":
            make_weights(organism, args.seed, work, out)
        else:
            write_card(organism, work, out)


if __name__ == "__main__":
    main()
