"""Save a hardened model, as a whole or as an adapter, and check that what was saved is what was trained."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.shapes import Float
from obliteratus.core.types import Prompt, Subject
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.logits import bounded_kl, first_token_log_probs
from obliteratus.rebirth.save import SAMPLE, reload_output, write_merged_model
from obliteratus.rebirth.tolerance import choose_tolerance, is_quantized
from obliteratus.weights.safetensors_io import list_dtypes

HardenedForm = Literal["merged", "adapter"]


def check_hardened_form(form: str) -> HardenedForm:
    """Return the form. Raises UserError for one that holds no trained adapter."""
    if form in get_args(HardenedForm):
        return cast(HardenedForm, form)
    raise UserError(f"--save {form}: a hardened model is saved as merged or adapter; give one of them")


def check_trainable(subject: Subject) -> None:
    """Raise UserError for a model that no adapter can be trained on and merged into."""
    if subject.offloaded is not None:
        raise UserError("harden: the whole model must be in memory to be trained; give a larger machine")
    if is_quantized(subject) or subject.source.quantization:
        raise UserError(
            f"harden: {subject.source.id} is quantized ({subject.source.quantization}); give the full-precision model"
        )


def write_model(subject: Subject, tuned: Any, folder: Path, form: HardenedForm) -> None:
    """Write the model with its adapter, a PeftModel's, into a folder that is made anew."""
    shutil.rmtree(folder, ignore_errors=True)  # an interrupted run may have left half of it
    folder.mkdir()
    if form == "merged":
        write_merged_model(subject, folder)
        return
    for config in tuned.peft_config.values():
        config.base_model_name_or_path = subject.source.id
    tuned.save_pretrained(str(folder))


def log_first_tokens(subject: Subject, prompts: Sequence[Prompt], title: str) -> Float[Tensor, "n vocabulary"]:
    """Return the log-probabilities of the first answer tokens of a few prompts."""
    return first_token_log_probs(subject, render_prompts(subject, prompts[:SAMPLE]), title=title)


def check_saved(
    subject: Subject,
    trained: Float[Tensor, "n vocabulary"],
    folder: Path,
    form: HardenedForm,
    prompts: Sequence[Prompt],
) -> float:
    """Return the largest KL(trained ‖ reloaded) of first answer tokens, nats.

    trained: what `log_first_tokens` returned with the adapter. Raises UserError if the KL is beyond rounding.
    """
    with reload_output(subject, folder, form) as fresh:
        saved = log_first_tokens(fresh, prompts, "HARDEN reloaded")
    most, limit = float(bounded_kl(trained, saved).max()), choose_tolerance(subject, form, list_dtypes(folder))
    if not most <= limit:
        raise UserError(
            f"{folder}: the reloaded model differs from the trained one (KL {most:.2g} nats, and "
            f"{subject.source.dtype} allows at most {limit:.0e}); this is a bug: please report it"
        )
    return most
