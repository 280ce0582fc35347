"""Training of sparse autoencoders: stopping on a plateau, and the audited thirty epochs whatever happens.

Rows [512, 1 stream, 576] of planted sparse features. Both keep their best epoch on the held-out fifth; the
reconstructions (share of the held-out rows explained) are in facts and must be near each other for the ratio to count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.common import arguments, interleaved, machine, report, say
from obliteratus.distill.sparse import Fitted, Training, fit

PROMPTS, WIDTH, FEATURES, ACTIVE = 512, 576, 40, 4
EPOCHS = 30  # what the audit found fixed


def planted(seed: int = 0) -> Tensor:
    """Rows [1, prompts, width], centred, of root mean square length 1: each a sum of about 4 of 40 features."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(FEATURES, WIDTH, generator=generator), dim=1)
    on = torch.rand(PROMPTS, FEATURES, generator=generator) < ACTIVE / FEATURES
    size = 1 + torch.rand(PROMPTS, FEATURES, generator=generator)
    rows = (on * size) @ features + 0.02 * torch.randn(PROMPTS, WIDTH, generator=generator)
    rows = rows - rows.mean(0)
    scaled: Tensor = (rows / rows.square().sum(1).mean().sqrt())[None]
    return scaled


def main() -> None:
    """Print seconds and ratios."""
    options = arguments(__doc__ or "")
    rows = planted()
    kept: dict[str, Fitted] = {}

    def run(name: str, how: Training) -> None:
        kept[name] = fit(rows, how)

    ours, fixed = Training(max_epochs=EPOCHS), Training(max_epochs=EPOCHS, patience=EPOCHS)
    say("warming up …")
    fit(rows, Training(max_epochs=1))
    runs = {"ours": lambda: run("ours", ours), "fixed_epochs": lambda: run("fixed_epochs", fixed)}
    seconds = interleaved(runs, 1 if options.quick else options.repeats)
    ratio = {"fixed_epochs": seconds["fixed_epochs"] / seconds["ours"]}
    facts: dict[str, object] = {"rows": PROMPTS, "width": WIDTH, "features": Training().expansion * WIDTH}
    for name, fitted in kept.items():
        facts[f"{name}_explained"] = float(fitted.explained[0])
        facts[f"{name}_epochs"], facts[f"{name}_dead"] = int(fitted.epochs[0]), int(fitted.dead[0])
    shortened = {"repeats": "one"} if options.quick else {}
    report(
        {"seconds": seconds, "ratio": ratio, "facts": facts | {"machine": machine()}, "shortened": shortened},
        options.json,
    )


if __name__ == "__main__":
    main()
