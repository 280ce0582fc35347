"""The edit that is live while a model is trained: fitted on the model as it is, and moved against the training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obliteratus.audit.attacks import GROUPS, Attacker, draw_prompts, is_cheap, load_methods
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.settings import Recipe
from obliteratus.core.types import Edit, Plan, PromptSet
from obliteratus.harden.settings import HardenSettings
from obliteratus.tune.parameters import EditParameters

# Nats a token of the refusals under the edit: from there on they are gone, and the edit turns to what it costs.
REMOVED = 3.0
SEED_STEP = 100_003  # a prime above all numbers of steps that are taken: no two seeds share a draw


def load_attacks(names: Sequence[str]) -> dict[str, Recipe]:
    """Return the recipes by name. Raises UserError as `load_methods`, and for one that takes gradients or analyses."""
    found = load_methods(names)
    for name, recipe in found.items():
        if not is_cheap(recipe):
            raise UserError(
                f"attack '{name}' takes gradients or analyses, which is too slow to be fitted again and again; name "
                "methods that only read activations, such as basic, least_change or leace"
            )
    return found


@dataclass
class Attack:
    """An edit with what moves it. Gradients reach its strengths and rows where its kind allows that."""

    name: str
    plan: Plan
    parameters: EditParameters | None
    optimizer: torch.optim.Optimizer | None

    @property
    def trainable(self) -> list[Tensor]:
        """The tensors that move."""
        return self.parameters.trainable if self.parameters is not None else []

    def live(self, scale: float) -> Plan:
        """Return the edit as it stands, at this scale."""
        return (self.parameters.to_live_plan() if self.parameters is not None else self.plan).scaled(scale)

    def move(self, refusal: Sequence[Tensor | None], control: Sequence[Tensor | None], removed: bool) -> None:
        """Take a step that removes more of the behavior, if any is left, and that costs less KL.

        refusal, control: gradients of both losses under the edit.
        """
        if self.optimizer is None:
            return
        for x, up, down in zip(self.trainable, refusal, control, strict=True):
            rise = torch.zeros_like(x) if up is None or removed else up
            x.grad = (torch.zeros_like(x) if down is None else down) - rise
        self.optimizer.step()


def fit_attack(attacker: Attacker, recipes: dict[str, Recipe], settings: HardenSettings, step: int) -> Attack:
    """Fit the method whose turn it is on the model as it is, or the next one that can be fitted.

    Raises UserError if none can, as where target and control prompts no longer differ.
    """
    names, turn = list(recipes), step // settings.refit
    seed = settings.seed * SEED_STEP + step
    few = PromptSet({g: draw_prompts(attacker.splits.fit[g], settings.attack_prompts, seed) for g in GROUPS})
    reasons: list[str] = []
    for i in range(len(names)):
        name = names[(turn + i) % len(names)]
        try:
            plan = attacker.fit(recipes[name], few)
        except UserError as error:
            reasons.append(str(error))
            continue
        note("HARDEN", f"step {step}: {name} is fitted anew, {len(plan.edits)} edits")
        return make_attack(name, plan, attacker, settings.climb)
    raise UserError(f"harden: no attack could be fitted at step {step}; {reasons[0]}")


def make_attack(name: str, plan: Plan, attacker: Attacker, climb: float) -> Attack:
    """Return the edit with what moves it, where gradients reach it."""
    if not climb or not can_move(plan):
        return Attack(name, plan, None, None)
    parameters = EditParameters(plan, attacker.subject.device, "both")
    return Attack(name, plan, parameters, torch.optim.Adam(parameters.groups(climb)))


def can_move(plan: Plan) -> bool:
    """Return whether gradients reach all of a plan: not through norm rules, nor edits of single heads."""
    return all(isinstance(e, Edit) and e.norm == "none" and e.site.span is None for e in plan.edits)
