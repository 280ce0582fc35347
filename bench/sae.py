"""Training of sparse autoencoders, against thirty epochs whatever happens.

Rows [prompts, 1 stream, 576], centred, of root mean square length 1: planted sparse features, and streams of the model
organism at its fit prompts. The same loss, the same two features a dimension, the same held-out fifth. Contestants:

audited       the audited program's start (Kaiming) and optimiser (Adam, 3e-4, batches of 32), full width, 30 epochs;
              its gradients and Adam's kernel are ours, which are faster than autograd: the ratio is training's alone
constant      this step as it was before: our start, all of the width, batches of 32, a constant rate, 30 epochs
fixed_epochs  this step as it is, with 30 epochs and no early stop

Reconstruction (the share of the held-out rows explained) and loss of each are in facts: a ratio counts where these
are equal.
"""

from __future__ import annotations

from collections.abc import Callable

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

PROMPTS, WIDTH, FEATURES, ACTIVE = 512, 576, 40, 4
EPOCHS, BATCH = 30, 32  # what the audit found fixed
KAIMING_RATE, CONSTANT_RATE = 3e-4, 0.06 / WIDTH**0.5
STREAMS = (10, 20, 30)
NAMES = ("ours", "audited", "constant", "fixed_epochs")
HOW = Training()


def scale_rows(rows: Tensor) -> Tensor:
    """[1, prompts, width]."""
    rows = rows - rows.mean(0)
    result: Tensor = (rows / rows.square().sum(1).mean().sqrt())[None]
    return result


def make_planted_rows(seed: int = 0) -> Tensor:
    """Rows [1, prompts, width]: each a sum of about 4 of 40 features."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(FEATURES, WIDTH, generator=generator), dim=1)
    on = torch.rand(PROMPTS, FEATURES, generator=generator) < ACTIVE / FEATURES
    size = 1 + torch.rand(PROMPTS, FEATURES, generator=generator)
    return scale_rows((on * size) @ features + 0.02 * torch.randn(PROMPTS, WIDTH, generator=generator))


def collect_real_rows(streams: tuple[int, ...]) -> dict[str, Tensor]:
    """Streams of the organism at the last token of its fit prompts."""
    subject, prompts = load_organism()
    acts = collect_activations(subject, prompts.split(0).fit)
    rows = [m.rows for m in acts.groups.values() if m.rows is not None]
    return {f"stream_{i}": scale_rows(torch.cat([r[:, i] for r in rows])) for i in streams}


def split_rows(rows: Tensor) -> tuple[Tensor, Tensor, torch.Generator]:
    """(held, seen) as `fit_autoencoder` parts them, and its generator."""
    generator = torch.Generator().manual_seed(HOW.seed)
    order = torch.randperm(rows.shape[1], generator=generator)
    fifth = rows.shape[1] // 5
    return rows[:, order[:fifth]], rows[:, order[fifth:]], generator


def initialize_kaiming(generator: torch.Generator) -> SparseAutoencoder:
    """As torch's linear layers begin; decoder rows of length 1."""
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    encoder, decoder = torch.nn.Linear(WIDTH, HOW.expansion * WIDTH), torch.nn.Linear(HOW.expansion * WIDTH, WIDTH)
    rows = torch.nn.functional.normalize(decoder.weight.data.T, dim=1)
    parts = (encoder.weight.data.T, encoder.bias.data, rows, torch.zeros(WIDTH))
    return SparseAutoencoder(*(p[None].contiguous() for p in parts))


def initialize_as_ours(seen: Tensor, generator: torch.Generator) -> SparseAutoencoder:
    """Our start, in the rows' own coordinates."""
    return initialize_autoencoder(seen, torch.linalg.svd(seen, full_matrices=False)[2], HOW, generator)


@torch.no_grad()
def train_fixed_epochs(
    seen: Tensor, coder: SparseAutoencoder, rate: float, generator: torch.Generator
) -> SparseAutoencoder:
    """Thirty epochs of Adam at a constant rate."""
    optimiser = torch.optim.Adam(coder.parameters, lr=rate, fused=True)
    for _ in range(EPOCHS):
        for rows in torch.randperm(seen.shape[1], generator=generator).split(BATCH):
            for part, slope in zip(coder.parameters, sae_gradients(seen[:, rows], coder, HOW.sparsity), strict=True):
                part.grad = slope
            optimiser.step()
            coder.decoder.div_(coder.decoder.norm(dim=2, keepdim=True).clamp(min=1e-12))
    return coder


def make_contestants(rows: Tensor, kept: dict[str, tuple[SparseAutoencoder, int]]) -> dict[str, Callable[[], None]]:
    """What each runs on these rows; coders and epochs land in ``kept``."""
    _, seen, _ = split_rows(rows)
    fixed = Training(max_epochs=EPOCHS, patience=EPOCHS)

    def ours(name: str, how: Training) -> None:
        found = fit_autoencoder(rows, how)
        kept[name] = found.autoencoder, int(found.epochs[0])

    def theirs(name: str, first: Callable[[torch.Generator], SparseAutoencoder], rate: float) -> None:
        generator = torch.Generator().manual_seed(HOW.seed)
        kept[name] = train_fixed_epochs(seen, first(generator), rate, generator), EPOCHS

    return {
        "ours": lambda: ours("ours", HOW),
        "audited": lambda: theirs("audited", initialize_kaiming, KAIMING_RATE),
        "constant": lambda: theirs("constant", lambda g: initialize_as_ours(seen, g), CONSTANT_RATE),
        "fixed_epochs": lambda: ours("fixed_epochs", fixed),
    }


def measure_quality(coder: SparseAutoencoder, rows: Tensor) -> tuple[float, float]:
    """Share of the held-out rows explained, and the loss on them."""
    held = split_rows(rows)[0]
    error = (coder.decode(coder.encode(held)) - held).square().sum()
    return float(1 - error / held.square().sum()), float(sae_loss(held, coder, HOW.sparsity))


def main() -> None:
    """Print seconds and ratios."""
    options = parse_options(__doc__ or "")
    sets = {"planted": make_planted_rows()} | collect_real_rows(STREAMS[-1:] if options.quick else STREAMS)
    say("warming up …")
    fit_autoencoder(sets["planted"], Training(max_epochs=1))
    seconds, facts = dict.fromkeys(NAMES, 0.0), dict[str, object]()
    for place, rows in sets.items():
        kept: dict[str, tuple[SparseAutoencoder, int]] = {}
        spent = time_in_turns(make_contestants(rows, kept), 1 if options.quick else options.repeats)
        for name in NAMES:
            seconds[name] += spent[name]
            explained, loss = measure_quality(kept[name][0], rows)
            facts[f"{place} {name}"] = {
                "explained": round(explained, 4),
                "loss": round(loss, 4),
                "epochs": kept[name][1],
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
