"""Find the directions by which a language model represents a behavior, edit the weights along them, measure the change.

The public names are imported when they are first used, so that ``import obliteratus`` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from obliteratus.core.views import register_view_modules

if TYPE_CHECKING:
    from obliteratus.core.errors import UserError
    from obliteratus.core.results import Run
    from obliteratus.core.settings import Recipe
    from obliteratus.core.types import Plan, Prompt, PromptSet, Subject
    from obliteratus.excise.live.hooks import applied
    from obliteratus.excise.plan import load_plan, save_plan
    from obliteratus.pipeline.presets import list_methods
    from obliteratus.pipeline.recipe import load_recipe
    from obliteratus.pipeline.run import run
    from obliteratus.probe.probe import collect_activations
    from obliteratus.prompts import load_prompts, split_prompts
    from obliteratus.rebirth.save import save
    from obliteratus.summon.load import assemble_subject, open_subject
    from obliteratus.verify import measure

MODULES = {
    "Plan": "core.types",
    "Prompt": "core.types",
    "PromptSet": "core.types",
    "Recipe": "core.settings",
    "Run": "core.results",
    "Subject": "core.types",
    "UserError": "core.errors",
    "applied": "excise.live.hooks",
    "assemble_subject": "summon.load",
    "collect_activations": "probe.probe",
    "list_methods": "pipeline.presets",
    "load_plan": "excise.plan",
    "load_prompts": "prompts",
    "load_recipe": "pipeline.recipe",
    "measure": "verify",
    "open_subject": "summon.load",
    "run": "pipeline.run",
    "save": "rebirth.save",
    "save_plan": "excise.plan",
    "split_prompts": "prompts",
}

__all__ = [
    "Plan",
    "Prompt",
    "PromptSet",
    "Recipe",
    "Run",
    "Subject",
    "UserError",
    "applied",
    "assemble_subject",
    "collect_activations",
    "list_methods",
    "load_plan",
    "load_prompts",
    "load_recipe",
    "measure",
    "open_subject",
    "run",
    "save",
    "save_plan",
    "split_prompts",
]

register_view_modules("obliteratus.report.notebook", "obliteratus.rebirth.run_view", "obliteratus.search.search_view")


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module 'obliteratus' has no attribute '{name}'")
    return getattr(import_module(f"obliteratus.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
