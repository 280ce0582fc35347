"""Several plans on one loaded model, each at any strength, ready for batches whose rows differ in both."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from obliteratus.core.types import Plan, Subject
from obliteratus.excise.live.compile import NormReadings
from obliteratus.excise.live.hooks import CompiledPlan, compile_plan
from obliteratus.excise.live.hooks_per_row import compile_per_row

# Compiled forms hold vectors and small matrices, about 1 MB for a norm rule on SmolLM2.
KEPT = 16


class Setting(NamedTuple):
    """A plan at a strength. `UNEDITED` stands for every plan at strength 0."""

    plan: str
    strength: float


UNEDITED = Setting("", 0.0)


class PreparedPlans:
    """Plans by name, compiled for the settings that were used last."""

    def __init__(self, subject: Subject, plans: Mapping[str, Plan]) -> None:
        self.subject, self.plans = subject, plans
        self.readings: dict[str, NormReadings] = {name: {} for name in ("", *plans)}
        self.compile_one = lru_cache(KEPT)(self._compile_one)
        """(setting) → the plan, for rows that are all under it."""
        self.compile_several = lru_cache(KEPT)(self._compile_several)
        """(settings) → their plans, for rows whose variant is the place of their setting."""

    def _compile_one(self, setting: Setting) -> CompiledPlan:
        return compile_plan(self.subject, self._scale(setting), self.readings[setting.plan])

    def _compile_several(self, settings: tuple[Setting, ...]) -> CompiledPlan:
        readings = [self.readings[setting.plan] for setting in settings]
        return compile_per_row(self.subject, [self._scale(setting) for setting in settings], readings)

    def _scale(self, setting: Setting) -> Plan:
        return self.plans[setting.plan].scaled(setting.strength) if setting.strength else Plan()
