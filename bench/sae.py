"""Training of sparse autoencoders, compared with a fixed number of thirty epochs.

The rows are centered and of root mean square length 1: planted sparse features, and streams of the model organism at
its fit prompts. All contestants have the same loss, two features for each dimension and the same held-out fifth.

audited       the audited program's initialization (Kaiming) and optimizer (Adam, 3e-4, batches of 32), full width, 30
              epochs; it uses our gradients and a fused Adam, which are faster than its autograd, so that the ratio is
              that of the training schedule alone
constant      an earlier version of ours: our initialization, full width, batches of 32, a constant rate, 30 epochs
fixed_epochs  ours with 30 epochs and no early stopping

The facts give the share of the held-out rows that each explains, and its loss. A ratio counts only if these are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.common import describe_machine, load_organism, parse_options, print_report, say, time_in_turns
from obliteratus.distill.autoencoder import SparseAutoencoder
from obliteratus.distill.train_autoencoder import (
    Training,
    fit_autoencoder,
    initialize_autoencoder,
    sae_gradients,
    sae_loss,
)
from obliteratus.probe.probe import collect_activations
from obliteratus.prompts import split_prompts

PROMPTS, WIDTH, FEATURES, ACTIVE = 512, 576, 40, 4
EPOCHS, BATCH = 30, 32  # fixed in the audited program
KAIMING_RATE, CONSTANT_RATE = 3e-4, 0.06 / WIDTH**0.5
STREAMS = (10, 20, 30)
NAMES = ("ours", "audited", "constant", "fixed_epochs")
TRAINING = Training()


def scale_rows(rows: Tensor) -> Tensor:
    """Return the rows centered and at root mean square length 1. [1, prompts, width]."""
    rows = rows - rows.mean(0)
    result: Tensor = (rows / rows.square().sum(1).mean().sqrt())[None]
    return result


def make_planted_rows(prompts: int = PROMPTS, seed: int = 0) -> Tensor:
    """Return rows [1, prompts, width], each a sum of about 4 of 40 features."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(FEATURES, WIDTH, generator=generator), dim=1)
    on = torch.rand(prompts, FEATURES, generator=generator) < ACTIVE / FEATURES
    size = 1 + torch.rand(prompts, FEATURES, generator=generator)
    return scale_rows((on * size) @ features + 0.02 * torch.randn(prompts, WIDTH, generator=generator))


def collect_real_rows(streams: tuple[int, ...]) -> dict[str, Tensor]:
    """Return streams of the organism at the last token of its fit prompts."""
    subject, prompts = load_organism()
    acts = collect_activations(subject, split_prompts(prompts, 0).fit)
    rows = [m.rows for m in acts.groups.values() if m.rows is not None]
    return {f"stream_{i}": scale_rows(torch.cat([r[:, i] for r in rows])) for i in streams}


def split_rows(rows: Tensor) -> tuple[Tensor, Tensor, torch.Generator]:
    """Return the held-out and the training rows as `fit_autoencoder` splits them, and its generator."""
    generator = torch.Generator().manual_seed(TRAINING.seed)
    order = torch.randperm(rows.shape[1], generator=generator)
    fifth = rows.shape[1] // 5
    return rows[:, order[:fifth]], rows[:, order[fifth:]], generator


def initialize_kaiming(generator: torch.Generator) -> SparseAutoencoder:
    """Return the initialization of torch's linear layers, with decoder rows of length 1."""
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    encoder, decoder = (
        torch.nn.Linear(WIDTH, TRAINING.expansion * WIDTH),
        torch.nn.Linear(TRAINING.expansion * WIDTH, WIDTH),
    )
    rows = torch.nn.functional.normalize(decoder.weight.data.T, dim=1)
    parts = (encoder.weight.data.T, encoder.bias.data, rows, torch.zeros(WIDTH))
    return SparseAutoencoder(*(p[None].contiguous() for p in parts))


def initialize_as_ours(seen: Tensor, generator: torch.Generator) -> SparseAutoencoder:
    """Return our initialization, in the coordinates of the rows."""
    return initialize_autoencoder(seen, torch.linalg.svd(seen, full_matrices=False)[2], TRAINING, generator)


@torch.no_grad()
def train_fixed_epochs(
    seen: Tensor, coder: SparseAutoencoder, rate: float, generator: torch.Generator
) -> SparseAutoencoder:
    """Train thirty epochs of Adam at a constant rate."""
    optimizer = torch.optim.Adam(coder.parameters, lr=rate, fused=True)
    for _ in range(EPOCHS):
        for rows in torch.randperm(seen.shape[1], generator=generator).split(BATCH):
            for part, slope in zip(
                coder.parameters, sae_gradients(seen[:, rows], coder, TRAINING.sparsity), strict=True
            ):
                part.grad = slope
            optimizer.step()
            coder.decoder.div_(coder.decoder.norm(dim=2, keepdim=True).clamp(min=1e-12))
    return coder


def make_contestants(rows: Tensor, results: dict[str, tuple[SparseAutoencoder, int]]) -> dict[str, Callable[[], None]]:
    """Return what each contestant runs; it puts its autoencoder and number of epochs into ``results``."""
    _, seen, _ = split_rows(rows)
    fixed = Training(max_epochs=EPOCHS, patience=EPOCHS)

    def ours(name: str, how: Training) -> None:
        found = fit_autoencoder(rows, how)
        results[name] = found.autoencoder, int(found.epochs[0])

    def theirs(name: str, first: Callable[[torch.Generator], SparseAutoencoder], rate: float) -> None:
        generator = torch.Generator().manual_seed(TRAINING.seed)
        results[name] = train_fixed_epochs(seen, first(generator), rate, generator), EPOCHS

    return {
        "ours": lambda: ours("ours", TRAINING),
        "audited": lambda: theirs("audited", initialize_kaiming, KAIMING_RATE),
        "constant": lambda: theirs("constant", lambda g: initialize_as_ours(seen, g), CONSTANT_RATE),
        "fixed_epochs": lambda: ours("fixed_epochs", fixed),
    }


def measure_quality(coder: SparseAutoencoder, rows: Tensor) -> tuple[float, float]:
    """Return the share of the held-out rows that is explained, and the loss on them."""
    held = split_rows(rows)[0]
    error = (coder.decode(coder.encode(held)) - held).square().sum()
    return float(1 - error / held.square().sum()), float(sae_loss(held, coder, TRAINING.sparsity))


def main(argv: Sequence[str] | None = None) -> None:
    """Print seconds and ratios."""
    options = parse_options(__doc__, argv)
    sets = {"planted": make_planted_rows(64 if options.smoke else PROMPTS)}
    if not options.smoke:
        sets |= collect_real_rows(STREAMS[-1:] if options.quick else STREAMS)
    say("warming up …")
    fit_autoencoder(sets["planted"], Training(max_epochs=1))
    seconds, facts = dict.fromkeys(NAMES, 0.0), dict[str, object]()
    for place, rows in sets.items():
        results: dict[str, tuple[SparseAutoencoder, int]] = {}
        spent = time_in_turns(make_contestants(rows, results), 1 if options.quick else options.repeats)
        for name in NAMES:
            seconds[name] += spent[name]
            explained, loss = measure_quality(results[name][0], rows)
            facts[f"{place} {name}"] = {
                "explained": round(explained, 4),
                "loss": round(loss, 4),
                "epochs": results[name][1],
                "seconds": round(spent[name], 2),
            }
    ratio = {name: seconds[name] / seconds["ours"] for name in NAMES[1:]}
    shortened = {"repeats": "one", "streams": "the last"} if options.quick else {}
    print_report(
        {"seconds": seconds, "ratio": ratio, "facts": facts | {"machine": describe_machine()}, "shortened": shortened},
        options.json,
    )


if __name__ == "__main__":
    main()
