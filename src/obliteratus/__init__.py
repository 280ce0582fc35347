"""Find the directions by which a language model represents a behavior, edit the weights along them, measure the change.

The public names are imported when they are first used, so that ``import obliteratus`` is fast. docs/guide/api.md lists
them by stage, and docs/guide/stability.md says what is promised of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any
from warnings import warn

from obliteratus.core.progress import register_reporter_module
from obliteratus.core.views import register_view_modules

if TYPE_CHECKING:
    from obliteratus.analyze import analyses
    from obliteratus.analyze.run import AnalysisReport, run_analysis
    from obliteratus.audit.firmness import run_audit
    from obliteratus.audit.settings import AuditSettings
    from obliteratus.causal import FitContext, extractors
    from obliteratus.core.errors import UserError
    from obliteratus.core.plugins import load_plugin
    from obliteratus.core.progress import show_progress
    from obliteratus.core.results import Run, Score
    from obliteratus.core.settings import Excise, JudgeSettings, Probe, Recipe, Step
    from obliteratus.core.types import (
        Activations,
        Directions,
        Edit,
        Mask,
        Plan,
        Prompt,
        PromptSet,
        Shift,
        Site,
        Splits,
        Subject,
    )
    from obliteratus.distill import find_directions
    from obliteratus.excise.live.hooks import applied
    from obliteratus.excise.live.steer import steer
    from obliteratus.excise.needs import wanted_by
    from obliteratus.excise.plan import load_plan, plan_edits, save_plan
    from obliteratus.inference.text import generate
    from obliteratus.judge.judge import Judgment
    from obliteratus.pipeline.presets import list_methods
    from obliteratus.pipeline.recipe import load_recipe
    from obliteratus.pipeline.run import RunResult, run
    from obliteratus.probe.probe import collect_activations
    from obliteratus.prompts import load_prompts, split_prompts
    from obliteratus.rebirth.save import save
    from obliteratus.search import SearchResult
    from obliteratus.search.start import run_search
    from obliteratus.study import Study
    from obliteratus.study.base import strategies
    from obliteratus.study.files import load_study
    from obliteratus.study.start import StudyResult, run_study
    from obliteratus.summon.load import open_subject
    from obliteratus.summon.wrap import wrap
    from obliteratus.verify import Measurement, measure, scorers
    from obliteratus.verify.judging import judge_answers
    from obliteratus.weigh import weigh_sites, weighers

MODULES = {
    "Activations": "core.types",
    "AnalysisReport": "analyze.run",
    "AuditSettings": "audit.settings",
    "Directions": "core.types",
    "Edit": "core.types",
    "Excise": "core.settings",
    "FitContext": "causal",
    "JudgeSettings": "core.settings",
    "Judgment": "judge.judge",
    "Mask": "core.types",
    "Measurement": "verify",
    "Plan": "core.types",
    "Probe": "core.settings",
    "Prompt": "core.types",
    "PromptSet": "core.types",
    "Recipe": "core.settings",
    "Run": "core.results",
    "RunResult": "pipeline.run",
    "Score": "core.results",
    "SearchResult": "search",
    "Shift": "core.types",
    "Site": "core.types",
    "Splits": "core.types",
    "Step": "core.settings",
    "Study": "study",
    "StudyResult": "study.start",
    "Subject": "core.types",
    "UserError": "core.errors",
    "analyses": "analyze",
    "applied": "excise.live.hooks",
    "collect_activations": "probe.probe",
    "extractors": "causal",
    "find_directions": "distill",
    "generate": "inference.text",
    "judge_answers": "verify.judging",
    "list_methods": "pipeline.presets",
    "load_plan": "excise.plan",
    "load_plugin": "core.plugins",
    "load_prompts": "prompts",
    "load_recipe": "pipeline.recipe",
    "load_study": "study.files",
    "measure": "verify",
    "open_subject": "summon.load",
    "plan_edits": "excise.plan",
    "run": "pipeline.run",
    "run_analysis": "analyze.run",
    "run_audit": "audit.firmness",
    "run_search": "search.start",
    "run_study": "study.start",
    "save": "rebirth.save",
    "save_plan": "excise.plan",
    "scorers": "verify",
    "show_progress": "core.progress",
    "split_prompts": "prompts",
    "steer": "excise.live.steer",
    "strategies": "study.base",
    "wanted_by": "excise.needs",
    "weigh_sites": "weigh",
    "weighers": "weigh",
    "wrap": "summon.wrap",
}

__all__ = [
    "Activations",
    "AnalysisReport",
    "AuditSettings",
    "Directions",
    "Edit",
    "Excise",
    "FitContext",
    "JudgeSettings",
    "Judgment",
    "Mask",
    "Measurement",
    "Plan",
    "Probe",
    "Prompt",
    "PromptSet",
    "Recipe",
    "Run",
    "RunResult",
    "Score",
    "SearchResult",
    "Shift",
    "Site",
    "Splits",
    "Step",
    "Study",
    "StudyResult",
    "Subject",
    "UserError",
    "analyses",
    "applied",
    "collect_activations",
    "extractors",
    "find_directions",
    "generate",
    "judge_answers",
    "list_methods",
    "load_plan",
    "load_plugin",
    "load_prompts",
    "load_recipe",
    "load_study",
    "measure",
    "open_subject",
    "plan_edits",
    "run",
    "run_analysis",
    "run_audit",
    "run_search",
    "run_study",
    "save",
    "save_plan",
    "scorers",
    "show_progress",
    "split_prompts",
    "steer",
    "strategies",
    "wanted_by",
    "weigh_sites",
    "weighers",
    "wrap",
]

RENAMED = {"assemble_subject": "wrap"}
"""Old name → new name. An old one works for one more minor release, with a DeprecationWarning."""

register_reporter_module("obliteratus.cli.progress")
register_view_modules(
    "obliteratus.report.notebook",
    "obliteratus.verify.measurement_view",
    "obliteratus.rebirth.run_view",
)


def __getattr__(name: str) -> Any:
    if name in RENAMED:
        warn(f"obliteratus.{name} is now called {RENAMED[name]}", DeprecationWarning, stacklevel=2)
        name = RENAMED[name]
    if name not in MODULES:
        raise AttributeError(f"module 'obliteratus' has no attribute '{name}'")
    return getattr(import_module(f"obliteratus.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
