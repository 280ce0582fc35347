"""How many forward passes each measurement of an audit takes at most: of one prompt, or of one token of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from obliteratus.analyze.repair import RANDOM
from obliteratus.audit.doses import MOST_CHECKS
from obliteratus.audit.rewordings import FRAMES
from obliteratus.audit.settings import AuditSettings
from obliteratus.core.settings import Recipe, Tune
from obliteratus.core.types import Prompt
from obliteratus.tune.weakest import MOST_LOOKS

TEXTS = 16  # paragraphs for perplexity
FIXED_REWORDINGS = 4  # as they are, in small letters, after another question, asked to go on


def estimate_passes(
    settings: AuditSettings,
    methods: Mapping[str, Recipe],
    n_layers: int,
    benign: int,
    own: Mapping[str, Sequence[Prompt]],
) -> dict[str, int]:
    """Return the most passes by measurement. One that is not wanted is not among them."""
    dose = settings.prompts * (2 + settings.tokens)
    match = settings.prompts * MOST_CHECKS + dose
    fit = 2 * settings.fit
    windows, examples = min(settings.windows, n_layers), len(settings.examples)
    wordings = FIXED_REWORDINGS + len(FRAMES) + len(own)
    passes = {
        "curves": dose + sum(settings.looks * dose + fit + _count_tuning(r.tune, dose) for r in methods.values()),
        "controls": (1 + 2 * settings.controls) * match + (1 + settings.controls) * fit,
        "blocks": windows * (match + fit),
        "examples": examples * match + 2 * sum(settings.examples),
        "rewordings": 2 * wordings * settings.reworded * (1 + settings.tokens),
        "perplexity": (1 + 2 * (len(methods) + 1)) * TEXTS,
        "directions": len(settings.directions) * (settings.looks * dose + fit),
        "seeds": settings.seeds * (settings.looks * dose + fit // 2),
        "fitted": (settings.looks * dose + _count_steps(settings, dose)) if settings.tune_steps else 0,
        "repair": 2 * settings.repair * (1 + 4 * (1 + RANDOM)),
        "benign": 2 * min(benign, settings.prompts) * (1 + settings.tokens),
    }
    return {name: count for name, count in passes.items() if count}


def _count_tuning(tune: Tune | None, dose: int) -> int:
    if tune is None:
        return 0
    answers, gradients = 4 * tune.prompts * (1 + tune.tokens), 4 * tune.prompts
    return answers + gradients + MOST_LOOKS * dose + 4 * tune.steps * tune.batch


def _count_steps(settings: AuditSettings, dose: int) -> int:
    tune = Tune()
    answers = 4 * settings.tune_prompts * (1 + tune.tokens)
    return answers + 4 * settings.tune_steps * tune.batch + MOST_LOOKS * dose
