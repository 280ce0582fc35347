"""Harden a model: measure it, train the adapter, save it, and measure what was saved by an attacker who fits anew."""

from __future__ import annotations

from dataclasses import dataclass, field

from obliteratus.audit.attacks import Attacker, load_methods
from obliteratus.audit.results import AuditReport
from obliteratus.audit.settings import AuditSettings
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.run_folder import Store
from obliteratus.core.types import Splits, Subject
from obliteratus.harden.attack import load_attacks
from obliteratus.harden.lessons import LessonLosses, Lessons, collect_lessons, load_lessons, save_lessons
from obliteratus.harden.measure import (
    CHECKS,
    CostChange,
    Effect,
    HeldOut,
    compare_answers,
    compare_least,
    measure_costs,
)
from obliteratus.harden.save import HardenedForm, check_saved, check_trainable, log_first_tokens, write_model
from obliteratus.harden.settings import DEFAULT, HardenSettings
from obliteratus.harden.train import CHECKPOINT, StepLosses, Training, adapted, choose_sites
from obliteratus.harden.wordings import check_wordings, vary_wordings
from obliteratus.judge.judge import Judge
from obliteratus.rebirth.save import reload_output

OUTPUT = "output"
MEASURED_BEFORE, MEASURED_AFTER = "before", "after"
"""Folders of the two audits, so that either resumes."""


@dataclass(frozen=True)
class Hardening:
    """What was done, and what it changed."""

    model: str
    behavior: str
    settings: HardenSettings
    checks: AuditSettings
    form: HardenedForm
    before: AuditReport
    after: AuditReport
    effect: Effect
    losses: tuple[StepLosses, ...]
    max_kl: float
    """Largest KL(trained ‖ saved and reloaded) of first answer tokens, nats."""
    costs: tuple[CostChange, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class HardenJob:
    """What is to be hardened, and how it is measured."""

    subject: Subject
    splits: Splits
    settings: HardenSettings = DEFAULT
    checks: AuditSettings = CHECKS
    judge: Judge = field(default_factory=Judge)
    form: HardenedForm = "merged"

    def check(self) -> None:
        """Raise UserError for what cannot work, before anything is measured."""
        load_attacks(self.settings.attacks)
        check_wordings(self.settings.wordings, self.judge)
        load_methods(self.checks.methods)
        check_trainable(self.subject)
        choose_sites(self.subject, self.settings.depth)


def harden_model(job: HardenJob, store: Store) -> Hardening:
    """Train, save and measure. The model goes to the folder ``output`` of the store's; the subject is not changed.

    The adapter is trained so that the behavior stays while edits that remove it are live, as ReFAT (arXiv:2409.20089)
    does for a difference of means. Here the edits are those of several methods, fitted anew on the model as it is, and
    they move against the training by gradient steps, as in latent adversarial training (arXiv:2407.15549). Control
    prompts are held to the base by KL, and are to change while an edit is live, as in self-destructive models
    (arXiv:2505.12186). Raises UserError for a model that cannot be trained, or that does not show the behavior.
    """
    assert store.folder is not None, "an adapter is trained into a folder"
    job.check()
    subject, folder = job.subject, store.folder
    lessons = store.stage(
        "HARDEN answers",
        lambda: vary_wordings(subject, collect_lessons(subject, job.splits.fit, job.judge, job.settings), job.settings),
        save_lessons,
        load_lessons,
    )
    with store.clock.time("AUDIT before"):
        before = measure_costs(subject, job.splits, job.checks, job.judge, open_part(store, MEASURED_BEFORE))
    if before.presence.against:
        raise UserError(f"harden: there is nothing to harden; {before.presence.against}")
    held_out = HeldOut.draw(job.splits, job.judge, job.checks)
    with store.clock.time("HARDEN base"):
        base = held_out.answer(subject, "HARDEN base")
    losses, max_kl = train_and_save(job, lessons, store)
    with reload_output(subject, folder / OUTPUT, job.form) as fresh:
        with store.clock.time("HARDEN hardened"):
            effect = compare_answers(base, held_out.answer(fresh, "HARDEN hardened"))
        with store.clock.time("AUDIT after"):
            after = measure_costs(fresh, job.splits, job.checks, job.judge, open_part(store, MEASURED_AFTER))
    return Hardening(
        model=subject.source.id,
        behavior=job.judge.name,
        settings=job.settings,
        checks=job.checks,
        form=job.form,
        before=before,
        after=after,
        effect=effect,
        losses=tuple(losses),
        max_kl=max_kl,
        costs=tuple(compare_least(before, after)),
        seconds=dict(store.seconds),
    )


def train_and_save(job: HardenJob, lessons: Lessons, store: Store) -> tuple[list[StepLosses], float]:
    """Train the adapter, or go on with it, and write the model. Return the losses, and how far it is from its copy."""
    assert store.folder is not None, "checked by the caller"
    subject, folder, controls = job.subject, store.folder / OUTPUT, job.splits.report["control"]
    with store.clock.time("HARDEN"):
        losses_of = LessonLosses(subject, lessons)
        attacker = Attacker(subject, job.splits, job.judge, job.settings.seed)
        with adapted(subject, job.settings) as tuned:
            training = Training(tuned, attacker, lessons, losses_of, load_attacks(job.settings.attacks), job.settings)
            losses = training.run(store.folder / CHECKPOINT)
            trained = log_first_tokens(subject, controls, "HARDEN trained")
            write_model(subject, tuned, folder, job.form)
    note("HARDEN", describe_losses(losses))
    with store.clock.time("REBIRTH"):
        return losses, check_saved(subject, trained, folder, job.form, controls)


def open_part(store: Store, name: str) -> Store:
    """Return a store for a part, in a folder and with a clock of its own, since both audits have the same stages."""
    assert store.folder is not None, "checked by the caller"
    folder = store.folder / name
    folder.mkdir(exist_ok=True)
    return Store(folder)


def describe_losses(losses: list[StepLosses]) -> str:
    """Return the means of the last steps."""
    last = [one.model_dump(exclude_none=True) for one in losses[-5:]]
    means = {name: sum(one[name] for one in last if name in one) / len(last) for name in last[-1]}
    attacked = [f"{means[name]:.2f}" for name in ("refusal_attacked", "control_attacked") if name in means]
    return (
        f"after {len(losses)} steps: refusals {means['refusal']:.2f} nats a token, KL on controls "
        f"{means['control']:.3f}{f'; under the edit {attacked[0]} and {attacked[1]}' if attacked else ''}"
    )
