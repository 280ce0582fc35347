"""Train an adapter so that the behavior stays while edits that remove it are live. No weight of the model changes."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obliteratus.audit.attacks import Attacker
from obliteratus.causal.interventions import Pair
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note, progress
from obliteratus.core.settings import FrozenModel, Recipe
from obliteratus.core.types import Site, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.harden.attack import REMOVED, Attack, fit_attack
from obliteratus.harden.lessons import LessonLosses, Lessons
from obliteratus.harden.settings import HardenSettings
from obliteratus.inference.hooks import decoder_blocks

CHECKPOINT = "checkpoint.pt"
WARM_UP = 5  # steps until the learning rate is whole; the first gradients are about ten times those of later ones
LAST_RATE = 0.1  # share of the learning rate at the end
MOST_GRADIENT = 1.0  # norm; for the same reason
Gradients = Sequence[Tensor | None]


class StepLosses(FrozenModel):
    """The losses of one step, before it was taken; nats a token."""

    refusal: float
    control: float
    refusal_attacked: float | None = None
    """Under the edit; None where none was live."""
    control_attacked: float | None = None


# -------------------------------------------------------------------------------------------------- the adapter
@contextmanager
def adapted(subject: Subject, settings: HardenSettings) -> Iterator[Any]:
    """Inside, the subject's model has a new LoRA adapter (arXiv:2106.09685), a PeftModel; then it is as before."""
    from peft import LoraConfig, get_peft_model  # imported here because it takes a second

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,  # the usual scale
        target_modules=[site.path for site in choose_sites(subject, settings.depth)],
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        tuned = get_peft_model(subject.model, config)
    first = min(site.layer for site in choose_sites(subject, settings.depth))
    mark = decoder_blocks(subject)[first].register_forward_hook(_keep_output)  # so that caches know where changes begin
    try:
        tuned.eval()
        yield tuned
    finally:
        mark.remove()
        tuned.unload()


def _keep_output(module: torch.nn.Module, args: Any, output: Any) -> None:
    """Change nothing."""


def choose_sites(subject: Subject, depth: float) -> list[Site]:
    """Return the matrices that get an adapter: all of the blocks from this depth on that are plain linear layers.

    Raises UserError if there are none.
    """
    first = depth * subject.n_layers
    found = [s for s in subject.sites if first <= s.layer < subject.n_layers and not s.stacked and s.expert is None]
    linear = [s for s in found if s.layout in ("linear", "conv1d")]
    if not linear:
        raise UserError(f"harden: {subject.source.id} has no linear layers from depth {depth:g} on; lower depth")
    return list({site.path: site for site in linear}.values())


# -------------------------------------------------------------------------------------------------- training
@dataclass
class Training:
    """An adapter on its way."""

    tuned: Any
    attacker: Attacker
    lessons: Lessons
    loss: LessonLosses
    recipes: dict[str, Recipe]
    settings: HardenSettings

    def __post_init__(self) -> None:
        self.weights: list[Tensor] = [p for p in self.tuned.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, weight_decay=0.0)  # the control KL regularizes
        self.losses: list[StepLosses] = []

    @property
    def subject(self) -> Subject:
        return self.attacker.subject

    def run(self, file: Path | None = None) -> list[StepLosses]:
        """Take the steps that are left, and return the losses of all. The adapter holds the result.

        file: checkpoint that is written whenever an edit is about to be fitted and at the end, and read if it is there.
        A resumed training ends with the same bits. Raises UserError if a loss is NaN or Inf, or no edit can be fitted.
        """
        if file is not None and file.is_file():
            self.restore(file)
        attack: Attack | None = None
        first = round(self.settings.alone * self.settings.steps)
        with progress("HARDEN", self.settings.steps) as advance:
            advance(len(self.losses))
            for step in range(len(self.losses), self.settings.steps):
                if (step - first) % self.settings.refit == 0:
                    if file is not None:
                        self.save(file)
                    attack = None if step < first else fit_attack(self.attacker, self.recipes, self.settings, step)
                self.losses.append(self.take_step(step, attack))
                advance(1)
        if file is not None:
            self.save(file)
        return self.losses

    def take_step(self, step: int, attack: Attack | None) -> StepLosses:
        """Take a step of the adapter and, if an edit is live, one of the edit against it."""
        refusals, answers = self.lessons.draw(self.settings.batch, step, self.settings.seed)
        self.optimizer.param_groups[0]["lr"] = learning_rate(step, self.settings)
        values = self.add_gradients(refusals, answers)
        if attack is not None:
            values |= self.add_attacked_gradients(refusals, answers, attack, step)
        losses = StepLosses(**values)
        if not all(map(torch.isfinite, map(torch.tensor, values.values()))):
            raise UserError(f"harden: a loss became NaN or Inf at step {step}; lower lr")
        torch.nn.utils.clip_grad_norm_(self.weights, MOST_GRADIENT)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses

    def add_gradients(self, refusals: Sequence[Pair], answers: Sequence[Pair]) -> dict[str, float]:
        """Add the gradients of both losses without an edit."""
        refusal = self.loss.refusal(refusals)
        refusal.backward()
        control = self.loss.control(answers)
        (self.settings.control * control).backward()
        return {"refusal": refusal.item(), "control": control.item()}

    def add_attacked_gradients(
        self, refusals: Sequence[Pair], answers: Sequence[Pair], attack: Attack, step: int
    ) -> dict[str, float]:
        """Add the gradients of both losses under the edit, and move the edit the other way."""
        scale = random.Random(f"scale {self.settings.seed} {step}").uniform(*self.settings.scales)
        refusal, up = self.differentiate(lambda: self.loss.refusal(refusals), attack, scale)
        control, down = self.differentiate(lambda: self.loss.control(answers), attack, scale)
        n = len(self.weights)
        rises = control < self.settings.entangled
        for p, keep, away in zip(self.weights, up[:n], down[:n], strict=True):
            add_gradient(p, keep, self.settings.attacked)
            add_gradient(p, away, -self.settings.entangle if rises else 0.0)
        attack.move(up[n:], down[n:], refusal > REMOVED)
        return {"refusal_attacked": refusal, "control_attacked": control}

    def differentiate(self, loss: Any, attack: Attack, scale: float) -> tuple[float, Gradients]:
        """Return a loss under the edit, with its gradients for the adapter and then for the edit."""
        with applied(self.subject, attack.live(scale)):
            value = loss()
        return value.item(), torch.autograd.grad(value, [*self.weights, *attack.trainable], allow_unused=True)

    def save(self, file: Path) -> None:
        """Write adapter, optimizer and losses atomically. Nothing else outlives the fit of an edit."""
        state = {
            "adapter": [p.detach() for p in self.weights],
            "optimizer": self.optimizer.state_dict(),
            "losses": [one.model_dump() for one in self.losses],
        }
        part = file.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, file)

    def restore(self, file: Path) -> None:
        """Read what `save` wrote."""
        state = torch.load(file, weights_only=True, map_location=self.subject.device)
        with torch.no_grad():
            for p, saved in zip(self.weights, state["adapter"], strict=True):
                p.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = [StepLosses(**one) for one in state["losses"]]
        note("HARDEN", f"step {len(self.losses)}: restored from the interrupted run")


def add_gradient(parameter: Tensor, gradient: Tensor | None, factor: float) -> None:
    """Add factor × gradient to what the parameter has already."""
    if gradient is None or not factor:
        return
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.add_(gradient, alpha=factor)


def learning_rate(step: int, settings: HardenSettings) -> float:
    """Return the learning rate: a few steps of warm-up, then a linear decay."""
    falling = 1 - (1 - LAST_RATE) * step / settings.steps
    return settings.lr * min((step + 1) / WARM_UP, falling)
